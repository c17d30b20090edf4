"""Lesion studies: delete units of a trained chain and measure what happens (Veit et al., 2016, section 4).

Every function of a chain and data raises TypeError for an argument of the wrong kind, and ValueError where there are no
batches or no labels to score, where the network cannot take them or computes NaN, or where a number makes no sense.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import combinations, groupby, product
from operator import itemgetter
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, fx
from torch.nn.modules.batchnorm import _BatchNorm

from .batches import NOTHING, Batches, can_stack, class_last, device_of, eval_mode, iterate, named_failure, scores
from .chain import Chain, Change, Unit, check_chain, check_number, listed
from .data import Split
from .stats import paired_bootstrap, wilson

Loss = Callable[[Tensor, Any], Tensor]
Variants = Sequence[Sequence[int | Unit]]

# Together, small states save launches; large ones leave the caches. For ResNet-110 on a CPU most of the gain is gone
# between states of half a megabyte (128 digits, 8 images of CIFAR-10) and of two (500 and 32): room for the former.
MAX_MEMORY = 2**26
KINDS = ("mean", "resample", "noise", "added noise")


def _parts(chain: Chain, variants: Variants) -> tuple[list[Unit], list[list[int]], bool]:
    """Return the variants' units, each variant as their numbers, and whether several have one of the caller's own."""
    check_chain(chain)
    parts, numbers, several = [], {}, listed(variants=variants)
    try:
        rows = [tuple(variant) for variant in several]
        for number, entry in enumerate(dict.fromkeys(entry for row in rows for entry in row)):
            numbers[entry] = number
            if isinstance(entry, Unit):
                parts.append(entry)
            else:
                (i,) = chain.check_indices([~entry if entry < 0 else entry])
                parts.append(chain.units[i].deleted() if entry < 0 else chain.units[i])
    except (TypeError, RuntimeError) as error:
        raise TypeError(f"variants must hold sequences of units, such as range(len(chain)): {error}") from error
    own = [entry for row in rows for entry in set(row) if isinstance(entry, Unit)]
    return parts, [[numbers[entry] for entry in row] for row in rows], len(own) > len(set(own))


def _run(
    chain: Chain, x: Any, images: int, variants: Sequence[Sequence[int]], parts: Sequence[Unit], max_memory: int
) -> Iterator[tuple[int, Tensor]]:
    """Yield the number and the logits of every variant for one batch, computing each distinct prefix of units once.

    Prefixes are gone through in layers, of which those with the same next unit go through it as one batch, so that a
    launch serves many. Of a layer that does not fit, the rest waits, and with it the states from which it goes on.
    Where only one prefix fits, this is a walk in depth.
    """
    with named_failure(x):
        layer, depth = [(chain.stem(x), list(range(len(variants))))], 0  # states, and the variants that begin with each
        stacked, longest = can_stack(chain, images, layer[0][0]), max(map(len, variants))
        waiting: list[tuple[int, list[tuple[int, Any, list[int]]]]] = []  # depth, and steps: unit, state, variants
        while layer or waiting:
            steps: list[tuple[int, Any, list[int]]] = []
            for state, members in layer:
                if ended := [v for v in members if len(variants[v]) == depth]:
                    logits = chain.head(state)
                    yield from ((v, logits) for v in ended)
                onward = sorted((variants[v][depth], v) for v in members if len(variants[v]) > depth)
                steps += [(i, state, [v for _, v in some]) for i, some in groupby(onward, key=itemgetter(0))]
            if steps:
                most = 1
                if stacked:
                    kept = [step[1].untyped_storage() for _, piece in [*waiting, (depth, steps)] for step in piece]
                    held = sum({storage.data_ptr(): storage.nbytes() for storage in kept}.values())
                    size = steps[0][1].nbytes
                    spare = max_memory - held - (longest - depth) * size  # a walk in depth may keep a state a unit
                    most = max(1, spare // (2 * size))  # the states as one batch, and what comes out
                steps.sort(key=itemgetter(0))
                waiting += [(depth, steps[i : i + most]) for i in reversed(range(0, len(steps), most))]
            layer = []
            if waiting:
                depth, steps = waiting.pop()
                for i, some in groupby(steps, key=itemgetter(0)):
                    _, states, groups = zip(*some, strict=True)
                    out = parts[i](states[0] if len(states) == 1 else torch.cat(states))
                    layer += zip([out] if len(states) == 1 else out.split(images), groups, strict=True)
                depth += 1


def _results(
    chain: Chain, data: Split | Batches, variants: Variants, result: Callable[[Tensor, Any], Any], *,
    max_memory: int = MAX_MEMORY, dtype: torch.dtype | None = None,
) -> Iterator[tuple[list[Any], Any]]:
    """Yield for each batch what ``result`` makes of every variant's logits and the labels, and the labels."""
    parts, numbered, shared = _parts(chain, variants)
    max_memory = 0 if check_number(max_memory=max_memory) and shared else max_memory  # one's own unit may mix images
    if not any(dtype is kind for kind in (None, torch.bfloat16, torch.float16)):
        raise TypeError(f"dtype is {dtype!r}: expected torch.bfloat16 or torch.float16, or None for the chain's own")
    for x, y in iterate(chain, data):
        images = len(y) if isinstance(y, Tensor) and y.dim() else 0
        found: list[Any] = [None] * len(numbered)
        cast = nullcontext() if dtype is None else torch.autocast(device_of(chain).type, dtype)
        with eval_mode(chain), torch.inference_mode(), cast:  # around the model alone: the iterator is the caller's
            for v, out in _run(chain, x, images, numbered, parts, max_memory):
                found[v] = result(out, y)
        yield found, y


def variant_logits(
    chain: Chain, data: Split | Batches, variants: Variants, **options: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Return logits ``(variants, images, K)``, float32, and labels ``(images,)``; arguments as in `evaluate_variants`.

    All logits are kept: for language models, with ``(variants, sequences, T, K)``, use `evaluate_variants`.
    """
    batches = list(_results(chain, data, variants, lambda out, _: out.float().cpu().numpy(), **options))
    logits = np.concatenate([np.stack(found) for found, _ in batches], 1)
    if np.isnan(logits).any():
        raise ValueError("logits are NaN: look for NaN in the network's weights, statistics and inputs")
    return logits, np.concatenate([y.cpu().numpy() for _, y in batches])


def evaluate_variants(
    chain: Chain, data: Split | Batches, variants: Variants, loss: Loss | None = None, **options: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Return errors and losses of many rearrangements of one chain, computing what they have in common only once.

    Each distinct prefix of units is computed once: deleting each of n units in turn takes n(n + 1) / 2 branch
    evaluations a batch, the intact network included, where a loop takes n². Small states of different variants go
    through a unit as one batch, for which PyTorch may choose a kernel that rounds differently; otherwise the results
    are those of the loop to the last bit.

    Args:
        chain: the network; its modes and parameters stay as they are.
        data: a split, or `~unravelling.batches.Batches`.
        variants: each a sequence of units, by number i, deleted as ``~i`` (that is -i - 1), or a unit of your own.
        loss: maps logits ``(1, …)`` and labels of one image to a scalar; the cross-entropy when None.
        options: ``max_memory``, bytes that the states of a batch may take, 64 MiB by default; one variant at a time,
            which may take a state a unit and three more, is always computed, and where a unit enlarges its state, what
            comes out is as much larger. ``dtype`` for `torch.autocast`, such as ``torch.bfloat16``, faster in hardware.

    Returns:
        ``wrong`` (bool) and ``loss`` (nats), both ``(variants, images)``. With labels ``(B, T)`` each row of tokens
        counts as an image, and both are means over its tokens, times their number over the average one: so the mean
        over rows is the mean over all tokens. With a ``loss``, ``wrong`` is NaN where the labels are no classes.

    Raises ValueError where a unit cannot be deleted, and IndexError where there is none.
    """
    results = _results(chain, data, variants, lambda out, y: _score_batch(out, y, loss), **options)
    batches = [[torch.stack(scores).numpy() for scores in zip(*found, strict=True)] for found, _ in results]
    wrong, values, counts = (np.concatenate(scores, 1) for scores in zip(*batches, strict=True))
    if loss is None and (bad := np.isnan(values).any(1)).any():
        raise ValueError(f"logits are NaN: look for NaN in weights, statistics and inputs of variant {bad.argmax()}")
    share = _share(counts[0])
    wrong = wrong * share if wrong.dtype.kind == "f" or (counts != 1).any() else wrong.astype(bool)
    return wrong, values * share if loss is None else values


def _share(counts: np.ndarray) -> float:
    """Return images over labels: the factor by which the mean of sums over an image's labels is that over labels."""
    if not counts.any():
        raise ValueError(NOTHING)
    return len(counts) / counts.sum()


def _score_batch(out: Tensor, y: Any, loss: Loss | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return, for each image of a batch, how many labels are missed, its loss, and how many labels it has."""
    labels = y.cpu() if isinstance(y, Tensor) and not y.is_floating_point() else None
    logits = class_last(out.cpu().double(), labels)  # in this order, since a device may lack the type
    if labels is not None and (loss is None or logits.shape[:-1] == labels.shape):
        wrong, values, kept = (part.reshape(len(labels), -1).sum(1) for part in scores(logits, labels))
    elif loss is None:
        kind = y.type() if isinstance(y, Tensor) else type(y).__name__
        raise ValueError(f"the labels are a {kind}: pass a loss that knows what to do with them")
    else:
        wrong, kept = torch.full((len(out),), torch.nan), torch.ones(len(out), dtype=torch.long)
    if loss is not None:
        with named_failure(out, "loss gives no number for each image of the logits"):
            each = (loss(out[i : i + 1], _labels_of(y, i)) for i in range(len(out)))
            values = torch.stack([torch.as_tensor(value).reshape(()) for value in each])
    return wrong, values.cpu().double(), kept


def _labels_of(y: Any, i: int) -> Any:
    """Return the labels of image i."""
    if isinstance(y, Mapping):
        return {name: _labels_of(value, i) for name, value in y.items()}
    return y[i : i + 1] if isinstance(y, Tensor) else y


def score(logits: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return ``wrong`` (bool) and cross-entropy ``loss`` (nats), both ``(…, images)``, of logits ``(…, images, K)``.

    Labels ``(images,)`` may also be those of tokens, ``(images, T)``, for logits ``(…, images, T, K)``. A token with
    the label -100 is not wrong and has the loss NaN. Raises ValueError for a label that is no class.
    """
    x, y = torch.tensor(np.ascontiguousarray(logits, float)), torch.tensor(np.ascontiguousarray(labels, np.int64))
    wrong, losses, kept = scores(x, y.expand(*x.shape[: x.dim() - 1 - y.dim()], *y.shape))
    return wrong.numpy(), torch.where(kept, losses, torch.nan).numpy()


def _units(chain: Chain) -> pd.DataFrame:
    keys = ("name", "stage", "is_transition")
    table = pd.DataFrame([{key: getattr(unit, key) for key in keys} for unit in chain.units])
    return table.rename_axis("unit").reset_index()


def _with_one(chain: Chain, i: int, other: int | Unit) -> list[int | Unit]:
    """Return the variant in which another stands at the place of unit i."""
    return [*range(i), other, *range(i + 1, len(chain))]


def _measure(
    chain: Chain, data: Split | Batches, rows: Iterable[Any], variants: Variants, **options: Any
) -> pd.DataFrame:
    """Return a row for each variant, compared with the intact network: what is known of it, then how it does."""
    every = [range(len(chain)), *variants]
    return pd.DataFrame(rows).join(summarize(*evaluate_variants(chain, data, every, **options)))


def delete_each(chain: Chain, data: Split | Batches, **options: Any) -> pd.DataFrame:
    """Delete every unit in turn (Veit et al., 2016, section 4.1 and figures 3 and 4).

    Args:
        chain: a trained network.
        data: a split, or `~unravelling.batches.Batches`, such as a ``DataLoader``.
        options: ``loss``, ``max_memory`` and ``dtype`` of `evaluate_variants`.

    Returns:
        One row a unit, with ``unit``, ``name``, ``stage``, ``is_transition``, then the columns of `summarize`: missing
        values where the unit cannot be deleted, since it has no skip and changes the shape of its state.

    Raises ValueError where no unit can be deleted.
    """
    chosen = [i for i, unit in enumerate(check_chain(chain).units) if unit.can_be_deleted]
    if not chosen:
        raise ValueError("no unit can be deleted: none has a skip, and each changes the shape of its state")
    variants = [_with_one(chain, i, ~i) for i in chosen]
    return _units(chain).merge(_measure(chain, data, {"unit": chosen}, variants, **options), how="left")


def _draws(
    name: str, numbers: Any, trials: int, seed: int, most: int, refusal: str, optional: bool = False
) -> Iterator[tuple[Any, int, np.random.Generator]]:
    """Yield each number with the number of each trial and the random generator of all; refuse what is out of range."""
    numbers = listed(**{name: numbers}) if isinstance(numbers, Iterable) else [numbers]
    for number in numbers:
        if not (optional and number is None) and not 0 <= check_number(None, **{name: number}) <= most:
            raise ValueError(refusal.format(number, most))
    random = np.random.default_rng(check_number(seed=seed))
    yield from ((number, trial, random) for number, trial in product(numbers, range(check_number(1, trials=trials))))


def delete_random(
    chain: Chain, data: Split | Batches, k: int | Iterable[int], trials: int, seed: int = 0,
    candidates: Sequence[int] | None = None, **options: Any,
) -> pd.DataFrame:
    """Delete k units chosen at random, several times over (Veit et al., 2016, section 4.2 and figure 5a).

    Args:
        chain, data, options: as in `delete_each`.
        k: how many units to delete; several numbers are measured together, which shares work between them.
        trials: random choices for each k.
        seed: of the choices.
        candidates: units to choose from; all that can be deleted when None.

    Returns:
        One row a choice, with ``k``, ``trial``, ``units`` (numbers, between spaces), then the columns of `summarize`.

    Raises ValueError where k exceeds the candidates or one cannot be deleted, and IndexError where one does not exist.
    """
    free = [i for i, unit in enumerate(check_chain(chain).units) if unit.can_be_deleted]
    pool = chain.check_indices(free if candidates is None else candidates)
    rows, variants = [], []
    refusal = "cannot delete {} units: there are {} to choose from"
    for number, trial, random in _draws("k", k, trials, seed, len(pool), refusal):
        gone = sorted(random.choice(pool, number, replace=False).tolist())
        rows.append({"k": number, "trial": trial, "units": " ".join(map(str, gone))})
        variants.append([~i if i in gone else i for i in range(len(chain))])
    return _measure(chain, data, rows, variants, **options)


def reorder(
    chain: Chain, data: Split | Batches, swaps: int | Iterable[int | None] | None, trials: int, seed: int = 0,
    **options: Any,
) -> pd.DataFrame:
    """Swap random pairs of units of equal shape, several times over (Veit et al., 2016, section 4.3 and figure 5b).

    Args:
        chain, data, options: as in `delete_each`.
        swaps: how many different pairs to swap, one after the other; transition units stay where they are. None
            shuffles every stage completely. Several numbers are measured together, which shares work between them.
        trials: random orders for each number of swaps.
        seed: of the orders.

    Returns:
        One row an order, with ``swaps`` (missing for a complete shuffle), ``trial``, ``order`` (numbers, separated by
        spaces), Kendall's ``tau`` between the order and the trained one over all units, ``tau_within``, the same over
        pairs of movable units of one stage, then the columns of `summarize`.

    Raises ValueError where no two units have equal shapes, or there are fewer pairs than swaps.
    """
    stages: dict[int, list[int]] = {}
    for i, unit in enumerate(check_chain(chain).units):
        if not unit.is_transition:
            stages.setdefault(unit.stage, []).append(i)
    pairs = [pair for members in stages.values() for pair in combinations(members, 2)]
    if not pairs:
        raise ValueError(f"no two of the {len(chain)} units can change places: no stage has two that keep the shape")
    rows, variants = [], []
    refusal = "cannot swap {} different pairs: there are {} of equal shape"
    for number, trial, random in _draws("swaps", swaps, trials, seed, len(pairs), refusal, True):
        order = np.arange(len(chain))
        if number is None:
            for members in stages.values():
                order[members] = random.permutation(members)
        else:
            for chosen in random.choice(len(pairs), number, replace=False):
                order[list(pairs[chosen])] = order[list(reversed(pairs[chosen]))]
        rows.append({"swaps": number, "trial": trial, "order": " ".join(map(str, order))} | _taus(order, stages))
        variants.append(chain.check_order(order.tolist()))
    return _measure(chain, data, rows, variants, **options)


def _taus(order: np.ndarray, stages: dict[int, list[int]]) -> dict[str, float]:
    from scipy.stats import kendalltau  # imported when needed: SciPy doubles the time of the import

    movable = [members for members in stages.values() if len(members) > 1]
    weights = [len(members) * (len(members) - 1) / 2 for members in movable]
    within = [kendalltau(members, order[members]).statistic for members in movable]
    tau = kendalltau(range(len(order)), order).statistic
    return {"tau": tau, "tau_within": float(np.average(within, weights=weights))}


def replace_branches(
    chain: Chain, data: Split | Batches, kind: str | Iterable[str] = KINDS, seed: int = 0, **options: Any
) -> pd.DataFrame:
    """Put something else in the place of each unit's branch in turn: controls that tell what a deletion takes away.

    Args:
        chain, options: as in `delete_each`.
        data: as in `delete_each`, in batches that can be gone through twice.
        kind: one or several of ``"mean"``, the branch's average over all images of ``data``, at each position and in
            each channel; ``"resample"``, the branch's output for another image of the batch; ``"noise"``, Gaussian
            noise with the norm that the branch has for the image; ``"added noise"``, the same beside the branch.
        seed: of who gets whose branch, and of the noise.

    Returns:
        One row a kind and unit, with ``kind``, then the columns of `delete_each`: missing values where the unit has no
        branch. The branch of a plain unit is replaced, too: nothing of its input is left then.

    Raises ValueError where no unit has a branch, a batch to resample in holds one image, or inputs differ in size.
    """
    kinds = [kind] if isinstance(kind, str) else listed(kind=kind)
    if not all(name in KINDS for name in kinds):
        raise ValueError(f"kind={kind!r} names no way to replace a branch: choose from {', '.join(KINDS)}")
    kinds = list(dict.fromkeys(kinds))
    check_number(seed=seed)
    check_chain(chain)
    means = _branch_means(chain, data) if "mean" in kinds else {}
    rows, variants = [], []
    for name, (i, unit) in product(kinds, enumerate(chain.units)):
        if not unit.is_deleted:
            rows.append({"kind": name, "unit": i})
            variants.append(_with_one(chain, i, unit.then(Change(_substitute(name, means.get(i), [seed, i])))))
    if not rows:
        raise ValueError("no unit has a branch that could be replaced")
    table = _measure(chain, data, rows, variants, **options)
    return pd.DataFrame({"kind": kinds}).merge(_units(chain), how="cross").merge(table, how="left")


def _changed(chain: Chain, change: Callable[[int, Tensor], Tensor]) -> Chain:
    """Return a chain that changes the outputs of all branches, given the number of the unit."""
    return chain.with_units(unit.then(Change(partial(change, i))) for i, unit in enumerate(chain.units))


def _branch_means(chain: Chain, data: Split | Batches) -> dict[int, Tensor]:
    """Return the mean of each unit's branch over all images, of the shape that the branch has for one."""
    sums: dict[int, tuple[Tensor, int]] = {}

    def add(i: int, f: Tensor) -> Tensor:
        total, count = sums.get(i, (torch.zeros_like(f[0]), 0))
        if total.shape != f.shape[1:]:
            raise ValueError("the branches' outputs differ in size between batches: pass inputs of one size")
        sums[i] = total + f.sum(0), count + len(f)
        return f

    watched = _changed(chain, add)
    for x, _ in iterate(chain, data, labels=False):
        with eval_mode(chain), torch.inference_mode(), named_failure(x):
            watched(x)
    return {i: total / count for i, (total, count) in sums.items()}


def _substitute(kind: str, mean: Tensor | None, seed: list[int]) -> Callable[[Tensor], Tensor]:
    """Return the function that maps a branch's output to what comes in its place."""
    random = np.random.default_rng(seed)

    def change(f: Tensor) -> Tensor:
        if kind == "mean" and mean is not None:
            return mean.expand_as(f)
        if kind == "resample":
            if len(f) < 2:
                raise ValueError("a batch of one image has no other to take a branch from: pass larger batches")
            order = random.permutation(len(f))
            return f[np.roll(order, 1)[np.argsort(order)]]  # along one cycle, so that none keeps its own
        noise = torch.from_numpy(random.standard_normal(f.shape, np.float32)).to(f)
        noise = torch.einsum("b...,b->b...", noise, f.flatten(1).norm(dim=1) / noise.flatten(1).norm(dim=1))
        return f + noise if kind == "added noise" else noise

    return change


@torch.inference_mode(False)  # which also turns gradients on, whatever the caller has set
def taylor_importance(chain: Chain, data: Split | Batches, loss: Loss | None = None) -> pd.DataFrame:
    """Predict from gradients what each deletion does: to first order in the branch, ⟨∂L/∂y_i, f_i⟩ for each image.

    That is the derivative of the loss by a factor on the branch, by which Molchanov et al. (2017) prune. The gradient
    is taken at the sum, before the unit's ``post``.

    Args:
        chain, data: as in `delete_each`.
        loss: as in `evaluate_variants`; differentiable.

    Returns:
        One row a unit, with ``unit``, ``name``, ``stage``, ``is_transition``; ``importance``, the mean over images of
        the derivative's absolute value (nats), with its 95 % bootstrap interval ``importance_low``,
        ``importance_high``; and ``delta_loss``, minus the mean derivative: the change by a deletion, to first order.
        Missing values where the unit has no branch. Raises ValueError where none has, or the loss has no gradient.
    """
    slopes, counts = [], []
    factors: dict[int, Tensor] = {}  # of the batch, by unit

    def scale(i: int, f: Tensor) -> Tensor:
        factors[i] = f.new_ones(len(f), requires_grad=True)
        return torch.einsum("b...,b->b...", f, factors[i])

    scaled = _changed(check_chain(chain), scale)
    for x, y in iterate(chain, data):
        with eval_mode(chain):
            with named_failure(x):
                logits = scaled(x)
            _, losses, kept = _score_batch(logits, y, loss)
            if not factors or not losses.requires_grad:
                raise ValueError("no unit has a branch, or the loss no gradient: compute it from the logits, in torch")
            slopes.append(torch.stack(torch.autograd.grad(losses.sum(), list(factors.values()))).cpu().double())
            counts.append(kept)
    slope = torch.cat(slopes, 1).numpy() * (_share(torch.cat(counts).numpy()) if loss is None else 1)
    if not np.isfinite(slope).all():
        raise ValueError("the gradient is not finite: look for NaN in the network's weights, statistics and inputs")
    low, high = paired_bootstrap(np.abs(slope))
    table = {"unit": list(factors), "importance": np.abs(slope).mean(1), "importance_low": low, "importance_high": high}
    return _units(chain).merge(pd.DataFrame(table | {"delta_loss": -slope.mean(1)}), how="left")


def summarize(wrong: np.ndarray, loss: np.ndarray) -> pd.DataFrame:
    """Turn the results of `evaluate_variants`, the intact network first, into one row for each other variant.

    Columns: ``images``; ``error`` (fraction) with its 95 % Wilson interval ``error_low``, ``error_high``; ``loss``
    (nats); ``delta_error`` and ``delta_loss``, the differences to the intact network on the same images, each with a
    95 % paired bootstrap interval ``…_low``, ``…_high``. For a language model each sequence counts as an image, since
    its tokens are not independent, and the interval of the error is a bootstrap one, too.

    Raises ValueError where the intact network's loss is no number.
    """
    if np.isnan(loss[0]).any():
        raise ValueError("the intact network's loss is NaN: look for NaN in its weights, statistics and inputs")
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
        batches: a split, or `~unravelling.batches.Batches` of training images, whose labels may be missing.

    Raises ValueError where the statistics are not finite, or were traced as constants into a function of the model.
    """
    graphs = [part.graph for part in check_chain(chain).modules() if isinstance(part, fx.GraphModule)]
    nodes = [node for graph in graphs for node in graph.nodes if node.op == "call_function"]
    baked = [node.name for node in nodes if "batch_norm" in str(node.target)]
    if baked:
        remedy = "register its blocks with block_units, so that their layers are kept"
        what = f"the traced model calls batch norm as a function ({baked[0]})"
        raise ValueError(f"{what}, whose statistics cannot be estimated anew: {remedy}")
    chain = copy.deepcopy(chain).eval()
    norms = [module for module in chain.modules() if isinstance(module, _BatchNorm)]
    for module in norms:
        module.reset_running_stats()
        module.momentum = None  # a plain average over the batches
        module.train()  # this one alone: dropout stays off
    for x, _ in iterate(chain, batches, labels=False):
        with torch.no_grad(), named_failure(x):
            chain(x)
    if not all(buffer.isfinite().all() for module in norms for buffer in module.buffers()):
        raise ValueError("the statistics are not finite: look for NaN and for huge numbers in weights and inputs")
    return chain.eval()
