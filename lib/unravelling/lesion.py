"""Lesion studies: delete units of a trained chain and measure what happens (Veit et al., 2016, section 4)."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from itertools import combinations

import numpy as np
import pandas as pd
import torch
from scipy.special import logsumexp
from scipy.stats import kendalltau
from torch import Tensor, nn

from .chain import Chain, device_of, eval_mode
from .data import Split
from .stats import paired_bootstrap, wilson

Batches = Iterable[tuple[Tensor, Tensor]]


def variant_logits(
    chain: Chain, data: Split | Batches, variants: Sequence[Sequence[int]]
) -> tuple[np.ndarray, np.ndarray]:
    """Run many rearrangements of one chain, computing what they have in common only once.

    The variants are visited in sorted order, so that consecutive ones share their longest prefix of units; its
    states are kept. Deleting each of n units in turn takes n(n + 1) / 2 branch evaluations a batch this way, the intact
    network included, where a loop takes n². In eval mode the results are those of the loop to the last bit.

    Args:
        chain: the network; its modes and parameters stay as they are.
        data: a split, or batches of normalised images ``(B, C, H, W)`` and labels ``(B,)`` that can be iterated over.
        variants: each a sequence of units, where i is unit i and ``~i`` (that is -i - 1) is unit i deleted.

    Returns:
        Logits ``(variants, images, K)``, float32, and labels ``(images,)``.
    """
    device = device_of(chain)
    batches = data.batches(device=device) if isinstance(data, Split) else data
    units: dict[int, nn.Module] = dict(enumerate(chain.units))
    units |= {~i: unit.deleted() for i, unit in enumerate(chain.units)}
    order = sorted(range(len(variants)), key=lambda v: tuple(variants[v]))
    logits, labels = [], []
    with eval_mode(chain), torch.inference_mode():
        for x, y in batches:
            states, path = [chain.stem(x.to(device))], ()
            batch = [np.empty(0)] * len(variants)
            for v in order:
                variant = tuple(variants[v])
                pairs = enumerate(zip(path, variant, strict=False))
                shared = next((i for i, (a, b) in pairs if a != b), min(len(path), len(variant)))
                del states[shared + 1 :]
                for i in variant[shared:]:
                    states.append(units[i](states[-1]))
                path = variant
                batch[v] = chain.head(states[-1]).float().cpu().numpy()
            logits.append(np.stack(batch))
            labels.append(y.cpu().numpy())
    return np.concatenate(logits, 1), np.concatenate(labels)


def evaluate_variants(
    chain: Chain, data: Split | Batches, variants: Sequence[Sequence[int]]
) -> tuple[np.ndarray, np.ndarray]:
    """Return ``wrong`` (bool) and ``loss`` (nats), both ``(variants, images)``; arguments as `variant_logits`."""
    return score(*variant_logits(chain, data, variants))


def score(logits: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return ``wrong`` (bool) and cross-entropy ``loss`` (nats), both ``(…, images)``, of logits ``(…, images, K)``."""
    logits = logits.astype(float)
    true = np.take_along_axis(logits, np.broadcast_to(labels[:, None], (*logits.shape[:-1], 1)), -1)[..., 0]
    return logits.argmax(-1) != labels, logsumexp(logits, axis=-1) - true


def delete_each(chain: Chain, data: Split | Batches) -> pd.DataFrame:
    """Delete every unit in turn (Veit et al., 2016, section 4.1 and figures 3 and 4).

    Args:
        chain: a trained network.
        data: a split, or batches of normalised images ``(B, C, H, W)`` and labels ``(B,)`` that can be iterated over.

    Returns:
        One row a unit: ``unit``, ``name``, ``stage``, ``is_transition``, then the columns of `summarize`.
    """
    intact = tuple(range(len(chain)))
    variants = [intact, *((*intact[:i], ~i, *intact[i + 1 :]) for i in intact)]
    table = summarize(*evaluate_variants(chain, data, variants))
    units = [
        {"unit": i, "name": unit.name, "stage": unit.stage, "is_transition": unit.is_transition}
        for i, unit in enumerate(chain.units)
    ]
    return pd.DataFrame(units).join(table)


def delete_random(
    chain: Chain,
    data: Split | Batches,
    k: int | Iterable[int],
    trials: int,
    seed: int = 0,
    candidates: Sequence[int] | None = None,
) -> pd.DataFrame:
    """Delete k units chosen at random, several times over (Veit et al., 2016, section 4.2 and figure 5a).

    Args:
        chain: a trained network.
        data: a split, or batches of normalised images ``(B, C, H, W)`` and labels ``(B,)`` that can be iterated over.
        k: how many units to delete; several numbers are measured together, which shares work between them.
        trials: random choices for each k.
        seed: of the choices.
        candidates: units to choose from; all of them when None.

    Returns:
        One row a choice: ``k``, ``trial``, ``units`` (numbers, separated by spaces), then the columns of `summarize`.

    Raises:
        ValueError: k is larger than the number of candidates, or negative.
        IndexError: a candidate does not exist.
    """
    pool = chain.check_indices(range(len(chain)) if candidates is None else candidates)
    numbers = list(k) if isinstance(k, Iterable) else [k]
    for number in numbers:
        if not 0 <= number <= len(pool):
            raise ValueError(f"cannot delete {number} units: there are {len(pool)} to choose from")
    random = np.random.default_rng(seed)
    rows, variants = [], [tuple(range(len(chain)))]
    for number in numbers:
        for trial in range(trials):
            gone = sorted(random.choice(pool, number, replace=False).tolist())
            rows.append({"k": number, "trial": trial, "units": " ".join(map(str, gone))})
            variants.append(tuple(~i if i in gone else i for i in range(len(chain))))
    return pd.DataFrame(rows).join(summarize(*evaluate_variants(chain, data, variants)))


def reorder(
    chain: Chain,
    data: Split | Batches,
    swaps: int | Iterable[int | None] | None,
    trials: int,
    seed: int = 0,
) -> pd.DataFrame:
    """Swap random pairs of units of equal shape, several times over (Veit et al., 2016, section 4.3 and figure 5b).

    Args:
        chain: a trained network.
        data: a split, or batches of normalised images ``(B, C, H, W)`` and labels ``(B,)`` that can be iterated over.
        swaps: how many different pairs to swap, one after the other; transition units stay where they are. None
            shuffles every stage completely. Several numbers are measured together, which shares work between them.
        trials: random orders for each number of swaps.
        seed: of the orders.

    Returns:
        One row an order: ``swaps`` (missing for a complete shuffle), ``trial``, ``order`` (numbers, separated by
        spaces), Kendall's ``tau`` between the order and the trained one over all units, ``tau_within``, the same over
        pairs of movable units of one stage, then the columns of `summarize`.

    Raises:
        ValueError: no two units have equal shapes, or there are fewer pairs than swaps.
    """
    stages: dict[int, list[int]] = {}
    for i, unit in enumerate(chain.units):
        if not unit.is_transition:
            stages.setdefault(unit.stage, []).append(i)
    pairs = [pair for members in stages.values() for pair in combinations(members, 2)]
    if not pairs:
        raise ValueError(
            f"no two of the {len(chain)} units can change places: no stage has two that preserve the shape"
        )
    numbers = list(swaps) if isinstance(swaps, Iterable) else [swaps]
    for number in numbers:
        if number is not None and not 0 <= number <= len(pairs):
            raise ValueError(f"cannot swap {number} different pairs: there are {len(pairs)} of equal shape")
    random = np.random.default_rng(seed)
    rows, variants = [], [tuple(range(len(chain)))]
    for number in numbers:
        for trial in range(trials):
            order = list(range(len(chain)))
            if number is None:
                for members in stages.values():
                    for position, i in zip(members, random.permutation(members).tolist(), strict=True):
                        order[position] = i
            else:
                for chosen in random.choice(len(pairs), number, replace=False):
                    a, b = pairs[chosen]
                    order[a], order[b] = order[b], order[a]
            rows.append({"swaps": number, "trial": trial, "order": " ".join(map(str, order))} | _taus(order, stages))
            variants.append(tuple(chain.check_order(order)))
    return pd.DataFrame(rows).join(summarize(*evaluate_variants(chain, data, variants)))


def _taus(order: list[int], stages: dict[int, list[int]]) -> dict[str, float]:
    movable = [members for members in stages.values() if len(members) > 1]
    weights = [len(members) * (len(members) - 1) / 2 for members in movable]
    within = [kendalltau(members, [order[i] for i in members]).statistic for members in movable]
    return {
        "tau": kendalltau(range(len(order)), order).statistic,
        "tau_within": float(np.average(within, weights=weights)),
    }


def summarize(wrong: np.ndarray, loss: np.ndarray) -> pd.DataFrame:
    """Turn the results of `evaluate_variants`, the intact network first, into one row for each other variant.

    Columns: ``images``; ``error`` (fraction) with its 95 % Wilson interval ``error_low``, ``error_high``; ``loss``
    (nats); ``delta_error`` and ``delta_loss``, the differences to the intact network on the same images, each with a
    95 % paired bootstrap interval ``…_low``, ``…_high``.
    """
    images = wrong.shape[1]
    low, high = wilson(wrong[1:].sum(1), images)
    table = {
        "images": images,
        "error": wrong[1:].mean(1),
        "error_low": low,
        "error_high": high,
        "loss": loss[1:].mean(1),
    }
    for name, values in (("delta_error", wrong.astype(float)), ("delta_loss", loss)):
        difference = values[1:] - values[0]
        table[name] = difference.mean(1)
        table[f"{name}_low"], table[f"{name}_high"] = paired_bootstrap(difference)
    return pd.DataFrame(table)


def reestimate_batch_norm(chain: Chain, batches: Batches) -> Chain:
    """Return a copy of the chain whose batch norm statistics are averaged anew over ``batches``.

    The control for a lesion: it tells lost paths from statistics that no longer fit. Parameters are copied unchanged.

    Args:
        chain: usually one with deleted units.
        batches: normalised training images ``(B, C, H, W)`` and labels, which are not looked at.
    """
    chain = copy.deepcopy(chain)
    for module in chain.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.reset_running_stats()
            module.momentum = None  # a plain average over the batches
    chain.train()
    with torch.no_grad():
        for x, _ in batches:
            chain(x.to(device_of(chain)))
    return chain.eval()
