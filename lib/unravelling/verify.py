"""Compare a chain with the model that it was made from: logits, gradients and deletions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import cache, partial
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from .batches import eval_mode, move
from .chain import Chain
from .tracing.parts import Origin
from .tracing.trace import Unsupported, call, free_dims, preserved

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}
"""The largest difference allowed, as a share of the largest number compared; 0.05 for half precision."""

Gradients = dict[tuple[str, str], Tensor | None]
"""Gradients by the kind of tensor, ``"input"`` or ``"parameters"``, and its name."""


def tolerance_of(model: nn.Module, numbers: Tensor) -> float:
    """Return the tolerance for numbers that a model computes: that of the lowest precision in it."""
    types = {t.dtype for t in [numbers, *model.parameters()] if t.is_floating_point()}
    return max((TOLERANCE.get(dtype, 0.05) for dtype in types), default=TOLERANCE[torch.float32])


def difference(found: Tensor, expected: Tensor, scale: Callable[[], float] | None = None) -> float:
    """Return the largest difference of two tensors, as a share of ``scale()``, or of the largest number expected."""
    if found.shape != expected.shape:
        return float("inf")
    if torch.equal(found, expected):
        return 0.0
    found, expected = (t.to(torch.complex128) if t.is_complex() else t.double() for t in (found, expected))
    same = torch.isclose(found, expected, rtol=0, atol=0, equal_nan=True)
    gap = torch.where(same, 0.0, (found - expected).abs()).max().item()
    top = _largest([expected]) if scale is None else scale()
    return gap / top if top else (float("inf") if gap else 0.0)


def _largest(tensors: Iterable[Tensor | None]) -> float:
    finite = (t.detach().nan_to_num(0, 0, 0).abs().max().item() for t in tensors if t is not None and t.numel())
    return max(finite, default=0)


def gradients(module: nn.Module, model: nn.Module, x: Any) -> tuple[Tensor, Gradients]:
    """Return logits, and the gradients of a random combination of them at the input ``x`` and the model's parameters.

    The logits are those of ``module``: the model itself, or a chain that shares its parameters. A model for inference
    alone, whose backward pass fails, has no gradients.
    """
    leaves: dict[tuple[str, str], Tensor] = {}

    def leaf(t: Any) -> Any:
        if not isinstance(t, Tensor) or not (t.is_floating_point() or t.is_complex()):
            return t
        leaves["input", str(len(leaves))] = copy = t.detach().clone().requires_grad_()
        return copy.clone()  # what is overwritten must be no leaf

    with torch.enable_grad():
        example = tree_map(leaf, x)
        leaves |= {("parameters", name): p for name, p in model.named_parameters() if p.requires_grad}
        logits = call(module, example) if module is model else module(example)
    if not logits.requires_grad or not leaves:
        return logits, {}
    real = torch.view_as_real(logits) if logits.is_complex() else logits
    weights = torch.randn(real.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    total = (real * weights.to(real)).sum()
    try:
        found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    except RuntimeError:
        return logits.detach(), {}
    return logits.detach(), dict(zip(leaves, found, strict=True))


def compared_gradients(found: Gradients, expected: Gradients) -> Iterable[tuple[str, str, Tensor, Tensor, float]]:
    """Yield kind, name, both gradients (zeros where missing), their difference as a share of the kind's largest."""
    scale = cache(lambda kind: _largest(g for (k, _), g in expected.items() if k == kind))
    for (kind, name), theirs in expected.items():
        ours = found.get((kind, name))
        some = ours if theirs is None else theirs
        if some is not None:
            ours, theirs = (torch.zeros_like(some) if g is None else g for g in (ours, theirs))
            yield kind, name, ours, theirs, difference(ours, theirs, partial(scale, kind))


def _kinks_aside(
    chain: nn.Module, model: nn.Module, x: Any, allowed: float, pair: tuple[Gradients, Gradients]
) -> tuple[Gradients, Gradients]:
    """Return gradients of chain and model at ``x``, or where they differ less at one of two inputs beside it.

    Rounding that crosses the kink of an activation changes a gradient at one input; what is lost, is lost at all.
    """

    def worst(pair: tuple[Gradients, Gradients]) -> float:
        return max((gap for *_, gap in compared_gradients(*pair)), default=0.0)

    for seed in (1, 2):
        if worst(pair) <= allowed:
            break
        draw = torch.Generator().manual_seed(seed)

        def shaken(t: Tensor, draw: torch.Generator = draw) -> Tensor:
            if not t.is_floating_point():
                return t
            return t + 0.01 * t.abs().mean() * torch.randn(t.shape, generator=draw).to(t)

        near = tree_map_only(Tensor, shaken, x)
        pair = min(pair, (gradients(chain, model, near)[1], gradients(model, model, near)[1]), key=worst)
    return pair


def refuse_unequal(chain: Chain, origin: Origin, x: Any, logits: Tensor, found: Tensor) -> None:
    """Raise Unsupported where a new chain computes other logits or gradients than its model.

    The logits ``found`` by the chain are compared with the model's for the example, and logits and gradients for an
    input of another size, which costs less: smaller images, few of them, and one more token; or what of that model and
    chain take. The graph of a chain that takes it is the same one, so that all of its operations are compared.
    """
    model, failed = origin.model, None
    allowed = tolerance_of(model, logits)
    if found.dtype != logits.dtype:
        raise Unsupported(f"the chain computes {found.dtype}, the model {logits.dtype}: tracing loses torch.autocast")
    if difference(found, logits) > allowed:
        refuse_changing(model, x, logits, "it depends on something else")
        raise Unsupported(first_difference(chain, origin, x))
    for other in _others(x):
        try:
            expected, theirs = gradients(model, model, other)
        except Exception:
            continue
        try:
            found, ours = gradients(chain, model, other)
        except Exception as error:  # or at this size alone
            failed = error
            continue
        if difference(found, expected) > allowed:
            now = [tuple(t.shape) for t in tree_leaves(other) if isinstance(t, Tensor)]
            what = f"the chain computes what the model does for the example, but not for inputs of the sizes {now}"
            raise Unsupported(f"{what}: the forward pass depends on sizes in a way that tracing loses")
        for kind, name, _, _, gap in compared_gradients(*_kinks_aside(chain, model, other, allowed, (ours, theirs))):
            if gap > allowed:
                what = f"its gradient at the {kind} {name} differs by {gap:.2g} of the largest"
                why = "tracing loses a backward pass of one's own, and regions under torch.no_grad()"
                remedy = "Register the class of the block that holds one with block_units: it is not looked into then"
                raise Unsupported(f"the chain computes what the model does, but {what}: {why}. {remedy}")
        return
    if failed is not None:
        raise Unsupported(f"the chain fails where the model does not: {str(failed).partition(chr(10))[0]}")


def refuse_changing(model: nn.Module, x: Any, logits: Tensor, why: str) -> None:
    """Raise Unsupported where a second forward pass gives other logits than the first."""
    with torch.no_grad():
        second = call(model, x)
    if not torch.allclose(second, logits, equal_nan=True):
        needed = "A chain needs a forward pass in eval mode that depends on nothing but its input"
        raise Unsupported(f"two forward passes on the same input give different logits: {why}. {needed}")


def _others(x: Any) -> Iterator[Any]:
    """Yield inputs of other sizes than the example, from the smallest to the example itself."""
    tensors = [t for t in tree_leaves(x) if isinstance(t, Tensor) and t.dim()]
    sizes = [*[t.shape[0] for t in tensors[:1]], *[t.shape[1] for t in tensors if 1 in free_dims(t)][:1]]

    def changed(t: Tensor, dims: int, side: int | None) -> Tensor:
        for dim in range(min(dims, t.dim())):
            if dim in free_dims(t) and t.shape[dim] == sizes[dim]:
                more = t.shape[1] + 1 if dim else 3 if len(t) == 2 else 2
                t = t.narrow(dim, 0, more) if more < t.shape[dim] else torch.cat([t, t.narrow(dim, 0, 1)], dim)
        return t[..., :side, :side] if t.dim() == 4 and t.is_floating_point() else t

    tried = []
    for dims, side in [(2, 64), (1, 64), (2, None), (1, None), (0, None)]:
        other = tree_map_only(Tensor, partial(changed, dims=dims, side=side), x)
        shapes = [t.shape for t in tree_leaves(other) if isinstance(t, Tensor)]
        if shapes not in tried:
            tried.append(shapes)
            yield other


def _calls(model: nn.Module, x: Any, names: Iterable[str], zero: Iterable[tuple[str, int]] = ()) -> tuple[Any, dict]:
    """Run a model with hooks, gone afterwards; return logits, and what the named modules returned each time."""
    outputs: dict[str, list[Any]] = {name: [] for name in names}
    zeros = set(zero)

    def hook(name: str) -> Callable[..., Any]:
        def catch(module: nn.Module, args: Any, output: Any) -> Any:
            number = len(outputs[name])
            several = isinstance(output, (tuple, list))
            value = output[0] if several else output
            outputs[name].append(value.detach().clone() if isinstance(value, Tensor) else value)
            if (name, number) not in zeros:
                return None
            return type(output)((torch.zeros_like(value), *output[1:])) if several else torch.zeros_like(value)

        return catch

    handles = [model.get_submodule(name).register_forward_hook(hook(name)) for name in outputs]
    try:
        with torch.no_grad():
            return call(model, x), outputs
    finally:
        for handle in handles:
            handle.remove()


def first_difference(chain: Chain, origin: Origin, x: Any) -> str:
    """Return a sentence that names the first unit after which the chain's state is not the model's."""
    with preserved(origin.model), torch.no_grad():
        _, outputs = _calls(origin.model, x, {end[0] for end in origin.outputs if end is not None})
        states = chain.trace(x)
        last, since = "the stem", 0
        for i, (unit, end) in enumerate(zip(chain.units, origin.outputs, strict=True)):
            if end is None or len(outputs[end[0]]) <= end[1]:
                continue
            expected = outputs[end[0]][end[1]]
            gap, allowed = difference(states[i + 1], expected), tolerance_of(origin.model, expected)
            if gap > allowed:
                names = " to ".join(dict.fromkeys((chain.units[since].name, unit.name)))
                where = f"unit {i} ({names})" if since == i else f"units {since} to {i} ({names})"
                whole = unit.branch is not None and unit.residual
                swallowed = whole and difference(unit.branch(states[i]), expected) < allowed
                hint = ": its branch returns what the whole block does, so it contains the stream already"
                by = f"by {gap:.2g} of the largest number after {last}{hint if swallowed else ''}"
                remedy = "Say by hand what the block computes: units=…, branch=…"
                return f"the chain differs from the model first at {where}, {by}. {remedy}"
            last, since = f"unit {i} ({unit.name})", i + 1
    return f"the chain differs from the model after {last}, where no module's output can be compared"


def verify(chain: Chain, origin: Origin, x: Any, tolerance: float | None = None) -> pd.DataFrame:
    """Compare a chain with the model it came from; see `unravelling.from_model.Unravelled.verify`."""
    model = origin.model
    x = move(x, model)
    if tolerance is not None and not 0 <= tolerance < float("inf"):
        raise ValueError(f"tolerance must be a finite number of at least 0, not {tolerance}")
    rows: list[tuple[str, bool, float]] = []
    with preserved(model), eval_mode(chain):
        expected, outputs = _calls(model, x, {name for ends in origin.zeros for name, _ in ends})
        allowed = tolerance_of(model, expected) if tolerance is None else tolerance
        if not expected.numel() or expected.isnan().any():
            what = "contain NaN, which hides any difference" if expected.numel() else "are no numbers at all"
            raise ValueError(f"the model's logits for x {what}: pass at least one input for which they are finite")

        def note(check: str, found: Tensor, expected: Tensor, gap: float, where: str) -> None:
            rows.append((check, torch.equal(found, expected), gap))
            if gap > allowed:
                message = f"{check} {where} differs from the model's by {gap:.2g} of the largest number"
                raise ValueError(f"{message} ({allowed:g} is allowed)" if where else first_difference(chain, origin, x))

        with torch.no_grad():
            logits = chain(x)
        note("logits", logits, expected, difference(logits, expected), "")
        (_, ours), (_, theirs) = gradients(chain, model, x), gradients(model, model, x)
        for kind, name, one, other, gap in compared_gradients(*_kinks_aside(chain, model, x, allowed, (ours, theirs))):
            note(f"gradient at the {kind}", one, other, gap, f"{name}")
        for i, ends in enumerate(origin.zeros):
            if ends and all(len(outputs[name]) > number for name, number in ends):
                with torch.no_grad():
                    found = chain.without(i)(x)
                edited, _ = _calls(model, x, {name for name, _ in ends}, ends)
                note("deletion", found, edited, difference(found, edited), f"of unit {i} ({chain.units[i].name})")
    table = []
    for check in [*dict.fromkeys(row[0] for row in rows if row[0] != "deletion"), "deletion"]:
        equal, gaps = [row[1] for row in rows if row[0] == check], [row[2] for row in rows if row[0] == check]
        reason = "; ".join(origin.notes) or "the same operations in another order, or by other kernels"
        if not equal:
            reason = "no module returns the end of a branch alone, so that there is no edit to compare with"
        of, worst = len(chain) if check == "deletion" else len(equal), max(gaps, default=float("nan"))
        table.append((check, len(equal), of, sum(equal), worst, allowed, "" if equal and all(equal) else reason))
    return pd.DataFrame(table, columns=["check", "compared", "of", "equal", "difference", "tolerance", "reason"])
