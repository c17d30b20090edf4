"""Lesion studies: delete units of a trained chain and measure what happens (Veit et al., 2016, section 4)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, fx, nn

from .batches import IGNORED, Batches, eval_mode, iterate
from .chain import Chain, check_positive
from .data import Split
from .stats import paired_bootstrap, wilson

Loss = Callable[[Tensor, Any], Tensor]


def _run(chain: Chain, x: Any, variants: Sequence[Sequence[int]]) -> Iterator[tuple[int, Tensor]]:
    """Yield the number and the logits of every variant for one batch of inputs, in an order that shares work."""
    deleted = {i: chain.units[~i].deleted() for i in {i for variant in variants for i in variant if i < 0}}
    states: list[Tensor] = [chain.stem(x)]
    path: tuple[int, ...] = ()
    for v in sorted(range(len(variants)), key=lambda v: tuple(variants[v])):
        variant = tuple(variants[v])
        pairs = enumerate(zip(path, variant, strict=False))
        shared = next((i for i, (a, b) in pairs if a != b), min(len(path), len(variant)))
        del states[shared + 1 :]
        for i in variant[shared:]:
            states.append((chain.units[i] if i >= 0 else deleted[i])(states[-1]))
        path = variant
        yield v, chain.head(states[-1])


def variant_logits(
    chain: Chain, data: Split | Batches, variants: Sequence[Sequence[int]]
) -> tuple[np.ndarray, np.ndarray]:
    """Run many rearrangements of one chain, computing what they have in common only once.

    The variants are visited in sorted order, so that consecutive ones share their longest prefix of units; its
    states are kept. Deleting each of n units in turn takes n(n + 1) / 2 branch evaluations a batch this way, the intact
    network included, where a loop takes n². In eval mode the results are those of the loop to the last bit.

    Args:
        chain: the network; its modes and parameters stay as they are.
        data: a split, or `Batches`.
        variants: each a sequence of units, where i is unit i and ``~i`` (that is -i - 1) is unit i deleted.

    Returns:
        Logits ``(variants, images, K)``, float32, and labels ``(images,)``. All of them are kept: for language models,
        with logits ``(variants, sequences, T, K)``, use `evaluate_variants`.

    Raises:
        ValueError: a unit cannot be deleted.
    """
    logits, labels = [], []
    for x, y in iterate(chain, data):
        batch = [np.empty(0)] * len(variants)
        with eval_mode(chain), torch.inference_mode():  # around the model alone: the iterator is the caller's
            for v, out in _run(chain, x, variants):
                batch[v] = out.float().cpu().numpy()
        logits.append(np.stack(batch))
        labels.append(y.cpu().numpy())
    return np.concatenate(logits, 1), np.concatenate(labels)


def evaluate_variants(
    chain: Chain, data: Split | Batches, variants: Sequence[Sequence[int]], loss: Loss | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return errors and losses of many rearrangements of one chain; logits are not kept.

    Args:
        chain: the network; its modes and parameters stay as they are.
        data: a split, or `Batches`.
        variants: as in `variant_logits`.
        loss: maps logits ``(1, …)`` and labels of one image to a scalar; the cross-entropy when None.

    Returns:
        ``wrong`` (bool) and ``loss`` (nats), both ``(variants, images)``. With labels ``(B, T)`` each row of tokens
        counts as an image, and both are means over its tokens, times their number over the average one: so the mean
        over rows is the mean over all tokens. With a ``loss``, ``wrong`` is NaN where the labels are no classes.

    Raises:
        ValueError: a unit cannot be deleted, or there is no label to score.
    """
    wrongs, losses, counts = [], [], []
    for x, y in iterate(chain, data):
        scores: list[Any] = [None] * len(variants)
        with eval_mode(chain), torch.inference_mode():
            for v, out in _run(chain, x, variants):
                scores[v] = _score_batch(out, y, loss)
        for parts, column in zip(
            (wrongs, losses), zip(*((w, values) for w, values, _ in scores), strict=True), strict=True
        ):
            parts.append(np.stack(column))
        counts.append(scores[0][2])
    wrong, values, count = np.concatenate(wrongs, 1), np.concatenate(losses, 1), np.concatenate(counts)
    if not count.any():
        raise ValueError(f"every label is {IGNORED}, which counts for nothing: nothing is left to score")
    share = len(count) / count.sum()
    return wrong if wrong.dtype == bool else wrong * share, values * share if loss is None else values


def _score_batch(out: Tensor, y: Any, loss: Loss | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return, for each image of a batch, whether it is wrong, its loss, and how many labels it has: sums over them."""
    labels = y.cpu().numpy() if isinstance(y, Tensor) else None
    logits = _classes_last(out.float().cpu().numpy(), labels)
    if labels is not None and (loss is None or (labels.dtype.kind in "iu" and logits.shape[:-1] == labels.shape)):
        wrong, values = score(logits, labels)
        kept = labels != IGNORED
        if kept.ndim > 1 or not kept.all():
            inner = tuple(range(1, kept.ndim))
            wrong, values = (wrong & kept).sum(inner), values.sum(inner, where=kept)
            kept = kept.sum(inner)
    elif loss is None:
        raise ValueError(f"the labels are a {type(y).__name__}: pass a loss that knows what to do with them")
    else:
        wrong, kept = np.full(len(out), np.nan), np.ones(len(out))
    if loss is not None:
        values = np.array([float(loss(out[i : i + 1], _labels_of(y, i))) for i in range(len(out))])
    return wrong, values, kept


def _labels_of(y: Any, i: int) -> Any:
    """Return the labels of image i."""
    if isinstance(y, Mapping):
        return {name: _labels_of(value, i) for name, value in y.items()}
    return y[i : i + 1] if isinstance(y, Tensor) else y


def _classes_last(logits: np.ndarray, labels: np.ndarray | None) -> np.ndarray:
    """Bring the logits ``(B, K, H, W)`` of a segmentation into the order of its labels ``(B, H, W)``."""
    if labels is None or labels.ndim < 3 or logits.shape[:-1] == labels.shape:
        return logits
    return np.moveaxis(logits, 1, -1)


def score(logits: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return ``wrong`` (bool) and cross-entropy ``loss`` (nats), both ``(…, images)``, of logits ``(…, images, K)``.

    Labels ``(images,)`` may also be those of tokens, ``(images, T)``, for logits ``(…, images, T, K)``. A token with
    the label -100 is not wrong and has the loss NaN.

    Raises:
        ValueError: a label is no number of a class.
    """
    from scipy.special import logsumexp  # imported when needed, as everywhere: scipy doubles the time of the import

    logits = logits.astype(float)
    ignored = labels == IGNORED
    last = logits.shape[-1] - 1
    foreign = labels[~ignored & ((labels < 0) | (labels > last))]
    if foreign.size:
        raise ValueError(f"there is a label {foreign[0]}: expected 0 to {last}, or {IGNORED} to ignore it")
    chosen = np.broadcast_to(np.where(ignored, 0, labels)[..., None], (*logits.shape[:-1], 1))
    loss = logsumexp(logits, axis=-1) - np.take_along_axis(logits, chosen, -1)[..., 0]
    wrong = logits.argmax(-1) != labels
    return (wrong & ~ignored, np.where(ignored, np.nan, loss)) if ignored.any() else (wrong, loss)


def delete_each(chain: Chain, data: Split | Batches, *, loss: Loss | None = None) -> pd.DataFrame:
    """Delete every unit in turn (Veit et al., 2016, section 4.1 and figures 3 and 4).

    Args:
        chain: a trained network.
        data: a split, or `Batches`, such as a ``DataLoader``.
        loss: maps logits and labels of one image to a scalar; the cross-entropy when None.

    Returns:
        One row a unit, with ``unit``, ``name``, ``stage``, ``is_transition``, then the columns of `summarize`: missing
        values where the unit cannot be deleted, since it has no skip and changes the shape of its state.

    Raises:
        ValueError: no unit can be deleted.
    """
    intact = tuple(range(len(chain)))
    chosen = [i for i, unit in enumerate(chain.units) if unit.can_be_deleted]
    if not chosen:
        raise ValueError("no unit can be deleted: none has a skip, and each changes the shape of its state")
    variants = [intact, *((*intact[:i], ~i, *intact[i + 1 :]) for i in chosen)]
    table = summarize(*evaluate_variants(chain, data, variants, loss)).set_axis(chosen)
    units = pd.DataFrame(
        [{key: getattr(unit, key) for key in ("name", "stage", "is_transition")} for unit in chain.units]
    )
    return units.rename_axis("unit").reset_index().join(table)


def delete_random(
    chain: Chain,
    data: Split | Batches,
    k: int | Iterable[int],
    trials: int,
    seed: int = 0,
    candidates: Sequence[int] | None = None,
    *,
    loss: Loss | None = None,
) -> pd.DataFrame:
    """Delete k units chosen at random, several times over (Veit et al., 2016, section 4.2 and figure 5a).

    Args:
        chain: a trained network.
        data, loss: as in `delete_each`.
        k: how many units to delete; several numbers are measured together, which shares work between them.
        trials: random choices for each k.
        seed: of the choices.
        candidates: units to choose from; all that can be deleted when None.

    Returns:
        One row a choice, with ``k``, ``trial``, ``units`` (numbers, separated by spaces), then the columns of
        `summarize`.

    Raises:
        ValueError: k is larger than the number of candidates, or negative; there are no trials; or a candidate cannot
            be deleted.
        IndexError: a candidate does not exist.
    """
    check_positive(trials=trials)
    free = [i for i, unit in enumerate(chain.units) if unit.can_be_deleted]
    pool = chain.check_indices(free if candidates is None else candidates)
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
    return pd.DataFrame(rows).join(summarize(*evaluate_variants(chain, data, variants, loss)))


def reorder(
    chain: Chain,
    data: Split | Batches,
    swaps: int | Iterable[int | None] | None,
    trials: int,
    seed: int = 0,
    *,
    loss: Loss | None = None,
) -> pd.DataFrame:
    """Swap random pairs of units of equal shape, several times over (Veit et al., 2016, section 4.3 and figure 5b).

    Args:
        chain: a trained network.
        data, loss: as in `delete_each`.
        swaps: how many different pairs to swap, one after the other; transition units stay where they are. None
            shuffles every stage completely. Several numbers are measured together, which shares work between them.
        trials: random orders for each number of swaps.
        seed: of the orders.

    Returns:
        One row an order, with ``swaps`` (missing for a complete shuffle), ``trial``, ``order`` (numbers, separated by
        spaces), Kendall's ``tau`` between the order and the trained one over all units, ``tau_within``, the same over
        pairs of movable units of one stage, then the columns of `summarize`.

    Raises:
        ValueError: no two units have equal shapes, there are fewer pairs than swaps, or there are no trials.
    """
    check_positive(trials=trials)
    stages: dict[int, list[int]] = {}
    for i, unit in enumerate(chain.units):
        if not unit.is_transition:
            stages.setdefault(unit.stage, []).append(i)
    pairs = [pair for members in stages.values() for pair in combinations(members, 2)]
    if not pairs:
        raise ValueError(f"no two of the {len(chain)} units can change places: no stage has two that keep the shape")
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
    return pd.DataFrame(rows).join(summarize(*evaluate_variants(chain, data, variants, loss)))


def _taus(order: list[int], stages: dict[int, list[int]]) -> dict[str, float]:
    from scipy.stats import kendalltau

    movable = [members for members in stages.values() if len(members) > 1]
    weights = [len(members) * (len(members) - 1) / 2 for members in movable]
    within = [kendalltau(members, [order[i] for i in members]).statistic for members in movable]
    tau = kendalltau(range(len(order)), order).statistic
    return {"tau": tau, "tau_within": float(np.average(within, weights=weights))}


def summarize(wrong: np.ndarray, loss: np.ndarray) -> pd.DataFrame:
    """Turn the results of `evaluate_variants`, the intact network first, into one row for each other variant.

    Columns: ``images``; ``error`` (fraction) with its 95 % Wilson interval ``error_low``, ``error_high``; ``loss``
    (nats); ``delta_error`` and ``delta_loss``, the differences to the intact network on the same images, each with a
    95 % paired bootstrap interval ``…_low``, ``…_high``. For a language model each sequence counts as an image, since
    its tokens are not independent, and the interval of the error is a bootstrap one, too.
    """
    images = wrong.shape[1]
    low, high = wilson(wrong[1:].sum(1), images) if wrong.dtype == bool else paired_bootstrap(wrong[1:])
    table = {"images": images, "error": wrong[1:].mean(1), "error_low": low, "error_high": high}
    table["loss"] = loss[1:].mean(1)
    for name, values in (("delta_error", wrong.astype(float)), ("delta_loss", loss)):
        difference = values[1:] - values[0]
        table[name] = difference.mean(1)
        table[f"{name}_low"], table[f"{name}_high"] = paired_bootstrap(difference)
    return pd.DataFrame(table)


def reestimate_batch_norm(chain: Chain, batches: Split | Batches) -> Chain:
    """Return a copy of the chain whose batch norm statistics are averaged anew over ``batches``.

    The control for a lesion: it tells lost paths from statistics that no longer fit. Parameters are copied unchanged.

    Args:
        chain: usually one with deleted units.
        batches: a split, or `Batches` of training images, whose labels may be missing.

    Raises:
        ValueError: there are no batches, or the chain was traced from a model that calls batch norm as a function.
    """
    nodes = [node for part in chain.modules() if isinstance(part, fx.GraphModule) for node in part.graph.nodes]
    baked = [node.name for node in nodes if node.op == "call_function" and "batch_norm" in str(node.target)]
    if baked:
        raise ValueError(
            f"the traced model calls batch norm as a function ({baked[0]}), whose statistics cannot be estimated anew: "
            "register its blocks with block_units, so that their layers are kept"
        )
    chain = copy.deepcopy(chain).eval()
    for module in chain.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.reset_running_stats()
            module.momentum = None  # a plain average over the batches
            module.train()  # this one alone: dropout stays off
    for x, _ in iterate(chain, batches, labels=False):
        with torch.no_grad():
            chain(x)
    return chain.eval()
