"""The gradient along the 2^n paths of a chain.

Every function of a chain raises TypeError for an argument of the wrong kind, and ValueError where labels do not fit,
the inputs hold NaN, the network cannot take them, draws random numbers or is in training mode (but for
`gradient_norms`), or the loss is no scalar.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import product
from typing import Any, cast

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.autograd import grad
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from .batches import IGNORED, NOTHING, can_stack, check_labels, class_last, device_of, inputs_and_labels, named_failure
from .chain import FLAG, Chain, Unit, check_chain, check_kind, check_number, listed

Loss = Callable[[Tensor, Any], Tensor]

# Gradients of several lengths go through a branch as one batch, up to this size, where launches count: for ResNet-110
# on the digits 1.3 times as fast in batches of 16 and 32, 1.1 times in batches of 64.
STACKED = 2**19


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Return the mean cross-entropy (nats) of logits ``(B, K)`` and labels ``(B,)``, or ``(B, T, K)`` and ``(B, T)``.

    Labels of -100 are ignored.

    Raises:
        TypeError, ValueError: a label is no class, or none is left.
    """
    check_kind(Tensor, "a tensor (B, K), or a loss of your own", logits=logits)
    if logits.is_complex():
        raise TypeError("the logits are complex: give a loss of your own")
    if isinstance(y, Tensor) and y.is_floating_point() and y.shape == logits.shape and y.dim() != 3:  # probabilities
        return F.cross_entropy(logits, y)
    logits = class_last(logits, y)
    check_labels(logits, y)
    if (y == IGNORED).all():
        raise ValueError(NOTHING)
    return F.cross_entropy(logits.flatten(0, -2), y.flatten().long())


@torch.inference_mode(False)  # which also turns gradients on, whatever the caller has set
def gradient_norms(chain: Chain, x: Any, y: Any = None, loss: Loss = cross_entropy) -> pd.DataFrame:
    """Return the norm of the loss gradient at every state y_0 … y_n, in the mode the chain is in.

    Args:
        chain: the network. In training mode batch norm uses the batch, and its running statistics stay as they are.
        x: normalised images ``(B, C, H, W)``, or whatever the chain takes, such as a dict of tokens.
        y: labels ``(B,)``, or ``(B, T)``; those in the dict ``x`` when None.
        loss: maps logits and ``y`` to a scalar.

    Returns:
        One row a state, with ``state`` (0 to n), ``gradient_norm`` over the whole batch.
    """
    x, y = _inputs(chain, x, y, loss)
    with _as_found(chain):
        with named_failure(x):
            states = [chain.stem(x).detach().requires_grad_()]
            for unit in chain.units:
                states.append(unit(states[-1]))
            logits = chain.head(states[-1])
        gradients = _gradients(loss, logits, y, states)
    return pd.DataFrame([{"state": i, "gradient_norm": _double(g).norm().item()} for i, g in enumerate(gradients)])


@torch.inference_mode(False)
def path_gradients(chain: Chain, x: Any, y: Any = None, loss: Loss = cross_entropy) -> dict[tuple[int, ...], Tensor]:
    """Return the gradient at y_0 along each of the 2^n paths, by brute force.

    The chain rule through y_i = post_i(skip_i(y_{i-1}) + branch_i(y_{i-1})) is a product of sums of two Jacobians,
    taken at the true states. Multiplied out it has one term for each choice of skip or branch at every residual
    unit, and their sum is the ordinary gradient, exactly.

    Args:
        chain: a network of at most 12 units, in eval mode; a ValueError for more.
        x, y, loss: as in `gradient_norms`.

    Returns:
        A map from a tuple of n bits, 1 where the path takes the branch, to a tensor of the shape of y_0.
    """
    if len(check_chain(chain)) > 12:
        raise ValueError(f"{len(chain)} units make 2^{len(chain)} paths: use gradient_by_length for more than 12")
    top, steps = _descent(chain, x, y, loss)
    paths: dict[tuple[int, ...], Tensor] = {(): top}
    for step in steps:
        longer = {(i, *bits): way(g) for (bits, g), (i, way) in product(paths.items(), enumerate(step.ways))}
        paths = {bits: g for bits, g in longer.items() if g is not None}
    return paths


@torch.inference_mode(False)
def gradient_by_length(
    chain: Chain, x: Any, y: Any = None, loss: Loss = cross_entropy, *, at: str = "stem",
    max_length: int | None = None, dtype: torch.dtype | None = None, batch_statistics: bool = False,
) -> Tensor:
    """Return G_0 … G_n, the exact sums of the gradients at y_0 along all paths through k branches.

    Going down from the loss, G_k becomes S_i^T G_k + J_i^T G_{k-1} at unit i, where S_i and J_i are the Jacobians of
    its skip and branch at the true state: n(n + 1) / 2 vector-Jacobian products of branches for 2^n paths. See
    section 5 and figure 6 of Veit et al. (2016), who sample paths.

    Args:
        chain: the network, in eval mode.
        x, y, loss: as in `gradient_norms`.
        at: ``"stem"`` for the gradient at y_0, the first unit's input, ``"pixels"`` for that at ``x``.
        max_length: the longest length m told apart; all of them when None.
        dtype: compute in this type, such as ``torch.float64``, on a copy of the chain; as the chain is when None.
        batch_statistics: whether batch norm takes its statistics from the batch, as in training, and the gradient flows
            through them. The sums are then exact for the batch as a whole, whose images are tied; nothing is stored.

    Returns:
        A tensor ``(n + 1, B, …)`` whose sum over the first dimension is the gradient of the loss, with what units read
        beside their state held fixed; with ``max_length``, ``(m + 2, B, …)``, the last of all paths longer than m.

    Raises:
        TypeError, ValueError: ``at``, ``max_length`` or ``dtype`` makes no sense.
    """
    if not isinstance(at, str) or at not in ("stem", "pixels"):
        raise ValueError(f'at is {at!r}: the gradient is taken at "stem" or "pixels"')
    if max_length is not None and check_number(max_length=max_length) > len(check_chain(chain)):
        raise ValueError(f"max_length {max_length} makes no sense: paths have lengths 0 to {len(chain)}")
    if dtype is not None:
        if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise TypeError(f"dtype is {dtype!r}: expected a floating type, such as torch.float64")
        chain = copy.deepcopy(check_chain(chain)).to(dtype)
    with _as_found(chain, batch_statistics):
        whole, steps = _descent(chain, x, y, loss, batch_statistics, STACKED if max_length is None else 0)
        by_length: list[Tensor | None] = [whole]
        for step in steps:
            by_length = step.longer(by_length)
            if max_length is not None:
                whole = _sum(step.skip(whole), step.branch(whole))
                by_length = by_length[: max_length + 1]
        if max_length is not None:
            by_length.append(_sum(whole, *(-g for g in by_length if g is not None)))
        zero = torch.zeros_like(next(g for g in by_length if g is not None))
        stacked = torch.stack([zero if g is None else g for g in by_length])
        return stacked if at == "stem" else _to_pixels(chain, x if y is None else (x, y), stacked)


def spectrum(gradients: Tensor, *, per_sample: bool = False) -> pd.DataFrame:
    """Return norms and signed shares of what `gradient_by_length` returns.

    Args:
        gradients: ``(n + 1, B, …)``; the index of the first dimension is called the length.
        per_sample: whether every image gets rows of its own, and not the batch as a whole.

    Returns:
        One row a length, with ``length``, ``norm`` ‖G_k‖, ``share`` ⟨g, G_k⟩ / ‖g‖² with g = Σ G_k, so that shares sum
        to 1, and are NaN where g is 0; with ``per_sample`` also ``sample``.

    Raises:
        TypeError, ValueError: ``gradients`` is no tensor, has fewer than two dimensions, or is not finite.
    """
    check_kind(Tensor, "the tensor from gradient_by_length", gradients=gradients)
    check_kind(*FLAG, per_sample=per_sample)
    if gradients.dim() < 2 or not gradients.numel() or not gradients.isfinite().all():
        shape = tuple(gradients.shape)
        raise ValueError(f"gradients has shape {shape}, or holds NaN or inf: expected (n + 1, B, …)")
    flat = _double(gradients)
    flat = flat.reshape(*flat.shape[:2], -1) if per_sample else flat.flatten(1)[:, None]
    whole = flat.sum(0)
    norm = flat.norm(dim=-1)
    lengths, samples = norm.shape
    table = pd.DataFrame({"sample": np.tile(np.arange(samples), lengths), "length": np.arange(lengths).repeat(samples)})
    share = (flat * whole).sum(-1) / (whole**2).sum(-1)
    table["norm"], table["share"] = norm.flatten().numpy(), share.flatten().numpy()
    return table if per_sample else table.drop(columns="sample")


@torch.inference_mode(False)
def weight_spectrum(
    chain: Chain, x: Any, y: Any = None, loss: Loss = cross_entropy, *, batch_statistics: bool = False
) -> pd.DataFrame:
    """Return norms and signed shares of the gradient at the weights, which an update follows, by the paths' length.

    A path to a weight of branch i runs from the loss down to the sum of unit i and into that branch, which counts, so
    that with G_k at y_i as in `gradient_by_length` the paths of length k + 1 bring W_{i,k+1} = (∂f_i/∂θ_i)^T G_k. Their
    sum over k is the ordinary gradient at θ_i, exactly. Weights of stem, skips and head are left out. It takes
    n(n + 1) / 2 backward passes through branches more than `gradient_by_length`.

    Args:
        chain, x, y, loss, batch_statistics: as in `gradient_by_length`. Branches share no weights with each other.

    Returns:
        One row for each unit and length there is, with ``unit``, ``length`` (1 to n), ``norm`` ‖W_{i,k}‖, ``share``
        ⟨W_i, W_{i,k}⟩ / Σ_j ‖W_j‖² with W_i = Σ_k W_{i,k}; shares sum to 1 over the whole table, and for all weights
        together the share of a length is the sum over its rows, its norm the root of the sum of squares.

    Raises:
        ValueError: no branch has weights, or two share some.
    """
    branches = [unit.branch for unit in check_chain(chain).units if unit.branch is not None]
    weights = [id(weight) for branch in branches for weight in branch.parameters()]
    if not weights or len(set(weights)) < len(weights):
        reason = "two branches share weights, which lie on several ways at once" if weights else "no branch has weights"
        raise ValueError(f"{reason}: the gradient at the weights cannot be split by unit")
    rows = []
    with _as_found(chain, batch_statistics):
        top, steps = _descent(chain, x, y, loss, batch_statistics)
        by_length: list[Tensor | None] = [top]
        for step in steps:
            here = () if step.unit.is_deleted else by_length
            parts = {k: _double(step.weights(g)) for k, g in enumerate(here, 1) if g is not None}
            whole = sum(parts.values())
            rows += [(step.i, k, part.norm().item(), (part @ whole).item()) for k, part in parts.items()]
            by_length = step.longer(by_length)
    table = pd.DataFrame(rows, columns=["unit", "length", "norm", "share"])
    table = table.sort_values(["unit", "length"], ignore_index=True)
    table["share"] /= table["share"].sum()
    return table


@torch.inference_mode(False)
def canonical_split(chain: Chain, x: Any, samples: int = 16, seed: int = 0) -> pd.DataFrame:
    """Estimate how much of the identity lies in every branch: c_i = 1 + tr J_i / d, with J_i the branch's d×d Jacobian.

    Since y + f = c·y + [f + (1 - c)·y], how the gradient divides into paths depends on what is called the branch. With
    c_i the Jacobian of the rest is free of trace, on average over the images: ``chain.split(table["c"])`` is the same
    function by that split. Hutchinson's estimator with Rademacher probes v, E v^T J v = tr J, takes one vector-Jacobian
    product of every branch for each sample.

    Args:
        chain: the network, in eval mode.
        x: as in `gradient_norms`; labels beside it are left alone.
        samples: probes; a ValueError for fewer than 2.
        seed: of the probes.

    Returns:
        One row a unit, with ``unit``, ``name``, ``c``, its ``standard_error`` over the probes for these images. Both
        are NaN where there is no such split: in a deleted or plain unit, or one whose skip is not the identity.
    """
    check_number(2, samples=samples)
    random = torch.Generator().manual_seed(check_number(seed=seed))
    states = _states(chain, inputs_and_labels(check_chain(chain), x, labels=False)[0])
    table = pd.DataFrame({"unit": range(len(chain)), "name": [unit.name for unit in chain.units]})
    table[["c", "standard_error"]] = math.nan
    for i, (unit, y) in enumerate(zip(chain.units, states, strict=False)):
        if unit.branch is not None and unit.residual and unit.has_identity_skip:
            y = y.detach().requires_grad_()
            f = unit.branch(y)
            traces = []
            for _ in range(samples):
                v = (2.0 * torch.randint(2, y.shape, generator=random) - 1).to(y)
                traces.append((_double(v) * _double(grad(f, y, v, retain_graph=True)[0])).sum().item() / y.numel())
            table.loc[i, ["c", "standard_error"]] = 1 + np.mean(traces), np.std(traces, ddof=1) / math.sqrt(samples)
    return table


@torch.inference_mode(False)
def mean_length(chain: Chain, x: Any, y: Any = None, loss: Loss = cross_entropy) -> Tensor:
    """Return every image's mean path length Σ k ⟨g, G_k⟩ / ‖g‖², weighted by the signed shares of the gradient at y_0.

    With G(t) = Σ t^k G_k it is ⟨g, dG/dt⟩ / ‖g‖² = d log ‖G(t)‖ / d log t at t = 1: the elasticity of the gradient's
    norm to a common gain of all branches, states held fixed. It takes two vector-Jacobian products of every branch.

    Args:
        chain: the network, in eval mode.
        x, y, loss: as in `gradient_norms`.

    Returns:
        Lengths ``(B,)``, NaN where an image has no gradient. For a whole batch, average them with weights ‖g‖².
    """
    g, steps = _descent(chain, x, y, loss)
    derivative = torch.zeros_like(g)
    for step in steps:
        taken = step.branch(g)
        g, derivative = _sum(step.skip(g), taken), _sum(step.skip(derivative), step.branch(derivative), taken)
    g, derivative = _double(g).flatten(1), _double(derivative).flatten(1)
    return (g * derivative).sum(1) / (g**2).sum(1)


@torch.inference_mode(False)
def sample_path_gradients(
    chain: Chain, x: Any, y: Any, lengths: Iterable[int], samples: int, seed: int = 0, loss: Loss = cross_entropy
) -> pd.DataFrame:
    """Measure the gradient along random single paths, as section 5 and figure 6b of Veit et al. (2016).

    The forward pass goes through the whole network. The backward pass goes through the branches alone at k units chosen
    at random, and through the skips alone at the others.

    Args:
        chain: the network, in eval mode; use float64, since long paths carry less than float32 can hold.
        x, y, loss: as in `gradient_norms`.
        lengths: numbers k of branches.
        samples: paths for each length.
        seed: of the choices.

    Returns:
        One row a path, with ``length``, ``sample``, ``norm`` of the gradient at y_0 over the batch.

    Raises:
        ValueError: there is no path of such a length, or there are no samples.
    """
    check_number(1, samples=samples)
    free, always = _choices(check_chain(chain))
    lengths = [check_number(lengths=k) for k in listed(lengths=lengths)]
    shortest, longest = len(always), len(always) + len(free)
    for k in lengths:
        if not shortest <= k <= longest:
            raise ValueError(f"no path has length {k}: this chain's have lengths {shortest} to {longest}")
    random = np.random.default_rng(check_number(seed=seed))
    top, descent = _descent(chain, x, y, loss)
    steps, rows = list(descent), []
    for k, sample in product(lengths, range(samples)):
        taken = {*always, *random.choice(free, k - shortest, replace=False).tolist()}
        g: Any = top
        for step in steps:
            g = step.ways[step.i in taken](g)
        rows.append({"length": k, "sample": sample, "norm": 0.0 if g is None else _double(g).norm().item()})
    return pd.DataFrame(rows)


@torch.inference_mode(False)
def path_norms(chain: Chain, x: Any, y: Any, repeats: int, seed: int = 0, loss: Loss = cross_entropy) -> pd.DataFrame:
    """Estimate Σ ‖g_path‖² over all paths of every length at once, by random signs.

    Every branch is given an independent random sign for every image. In G_k ← S_i^T G_k ± J_i^T G_{k-1} the products of
    different paths then cancel in expectation, so that E ‖G_k‖² is the sum over the paths of length k.

    Args:
        chain: the network, in eval mode; float64 for lengths at which the gradient is tiny.
        x, y, loss: as in `gradient_norms`.
        repeats: independent draws of all signs; a ValueError for fewer than 2.
        seed: of the signs.

    Returns:
        One row a length, with ``length``; ``sum_of_squares`` over the batch with ``standard_error``; ``paths``, how
        many there are; ``rms_norm``, the root mean square of ‖g_path‖.
    """
    check_number(2, repeats=repeats)
    generator = torch.Generator().manual_seed(check_number(seed=seed))
    top, descent = _descent(chain, x, y, loss, most=STACKED)
    steps = list(descent)
    squares = np.zeros((repeats, len(chain) + 1))
    for repeat in range(repeats):
        by_length: list[Tensor | None] = [top]
        for step in steps:
            signs = 2.0 * torch.randint(2, (len(top),), generator=generator) - 1
            signed = [None if g is None else g * signs.to(g).view(-1, *[1] * (g.dim() - 1)) for g in by_length]
            by_length = step.longer(by_length, signed)
        squares[repeat] = [0.0 if g is None else (_double(g) ** 2).sum().item() for g in by_length]
    free, always = map(len, _choices(chain))
    paths = [math.comb(free, k - always) if k >= always else 0 for k in range(len(chain) + 1)]
    table = pd.DataFrame({"length": range(len(chain) + 1), "sum_of_squares": squares.mean(0)})
    table["standard_error"], table["paths"] = squares.std(0, ddof=1) / math.sqrt(repeats), paths
    table["rms_norm"] = [math.sqrt(s / c) if c else 0.0 for s, c in zip(table["sum_of_squares"], paths, strict=True)]
    return table


def length_distribution(n: int) -> pd.DataFrame:
    """Return how many of the 2^n paths have each length: ``length``, ``paths`` C(n, k) and ``share``, exactly."""
    paths = [math.comb(n, k) for k in range(check_number(n=n) + 1)]
    return pd.DataFrame({"length": range(n + 1), "paths": paths, "share": [p / 2**n for p in paths]})


def surviving(n: int, d: int) -> pd.DataFrame:
    """Return the share of the paths of each length that survive when d of n units are deleted, C(n-d, k) / C(n, k).

    Compare figure 7 of Veit et al. (2016). Columns: ``length``, ``share``. Raises ValueError for fewer than d units.
    """
    if check_number(d=d) > check_number(n=n):
        raise ValueError(f"cannot delete {d} of {n} units")
    share = [math.comb(n - d, k) / math.comb(n, k) for k in range(n + 1)]
    return pd.DataFrame({"length": range(n + 1), "share": share})


class _Step:
    """One unit at its true state, and its vector-Jacobian products, which give None where no way or gradient leads."""

    def __init__(self, i: int, unit: Unit, state: Tensor, copies: int = 1) -> None:
        state = state if copies == 1 else torch.cat([state] * copies)
        self.i, self.unit, self.state, self.copies = i, unit, state.detach().requires_grad_(), copies
        self.f = None if unit.branch is None else unit.branch(self.state)
        self.s = unit.skip(self.state) if self.f is None or unit.residual else None  # a plain unit's is for deletion
        self.total = _sum(self.s, self.f).detach().requires_grad_()
        self.after = unit.post(self.total)
        self.skip, self.branch = self.ways = tuple(functools.partial(self._through, part) for part in (self.s, self.f))

    def longer(self, kept: list[Tensor | None], taken: list[Tensor | None] | None = None) -> list[Tensor | None]:
        """Take gradients by path length down: ``kept`` through the skip, ``taken``, the same when None, the branch."""
        pairs = zip([*self._each(self.s, kept), None], [None, *self._each(self.f, taken or kept)], strict=True)
        return [_sum(*pair) for pair in pairs]

    def _each(self, part: Tensor | None, gradients: list[Tensor | None]) -> list[Tensor | None]:
        """Take several gradients through a part, as many at a time as there are copies of the state."""
        if self.copies == 1:
            return [self._through(part, g) for g in gradients]
        if part is self.state and isinstance(self.unit.post, nn.Identity) and self.total.shape == part.shape:
            return gradients
        there = [g for g in gradients if g is not None]
        through: list[Tensor | None] = []
        for k in range(0, len(there), self.copies):
            some = there[k : k + self.copies]
            filled = some + some[:1] * (self.copies - len(some))
            product = self._through(part, torch.cat(filled))
            through += [None] * len(some) if product is None else product.chunk(self.copies)[: len(some)]
        found = iter(through)
        return [None if g is None else next(found) for g in gradients]

    def weights(self, g: Tensor) -> Tensor:
        """Return the gradient at the branch's weights, in one vector, empty where there are none."""
        given, f = self._weighted
        g = self._before_post(g).sum_to_size(f.shape)
        through = grad(f, given, g, retain_graph=True, materialize_grads=True) if given else ()
        return torch.cat([g.new_zeros(0), *(part.flatten() for part in through)])

    @functools.cached_property
    def _weighted(self) -> tuple[list[Tensor], Tensor]:
        """The branch's weights, as copies that need a gradient even where they are frozen, and its output from them."""
        branch = cast("nn.Module", self.unit.branch)
        weights = {name: p.detach() for name, p in branch.named_parameters() if p.is_floating_point()}
        given = {name: p.requires_grad_() for name, p in weights.items()}
        return list(given.values()), functional_call(branch, given, (self.state,))

    def _before_post(self, g: Tensor) -> Tensor:
        identity = isinstance(self.unit.post, nn.Identity)
        return g if identity else grad(self.after, self.total, g, retain_graph=True)[0]

    def _through(self, part: Tensor | None, g: Tensor | None) -> Tensor | None:
        g = None if part is None or g is None else self._before_post(g)
        if part is None or g is None or not part.requires_grad:
            return None
        g = g.sum_to_size(part.shape)  # of two terms the smaller is added to all parts of the larger
        return g if part is self.state else grad(part, self.state, g, retain_graph=True, allow_unused=True)[0]


def _descent(
    chain: Chain, x: Any, y: Any, loss: Loss, batch_statistics: bool = False, most: int = 0
) -> tuple[Tensor, Iterator[_Step]]:
    """Return the gradient at y_n, and the steps from there down to y_0, each made when it is asked for.

    Where images do not mix, a step holds as many copies of its state as there are gradients, up to ``most`` bytes.
    """
    x, y = _inputs(chain, x, y, loss)
    states = _states(chain, x, batch_statistics)
    with _nothing_random(device_of(chain)), named_failure(x):
        last = states[-1].detach().requires_grad_()  # not in place: it may be the caller's x
        logits = chain.head(last)
    (top,) = _gradients(loss, logits, y, [last])
    n, images = len(chain), len(y) if isinstance(y, Tensor) and y.dim() else 0
    stacking = not batch_statistics and all(can_stack(chain, images, state) for state in states)
    copies = [min(n - i, most // state.nbytes) if stacking else 1 for i, state in enumerate(states[:-1])]
    return top, (_Step(i, chain.units[i], states[i], max(1, copies[i])) for i in reversed(range(n)))


def _states(chain: Chain, x: Any, batch_statistics: bool = False) -> list[Tensor]:
    """Return y_0 … y_n for inputs on the chain's device, or raise ValueError where the chain is not in eval mode."""
    if not batch_statistics and any(isinstance(m, _BatchNorm) and m.training for m in chain.modules()):
        raise ValueError("batch norm is in training mode, which ties the images of a batch: call chain.eval() first")
    with _nothing_random(device_of(chain)), named_failure(x), torch.no_grad():
        states = chain.trace(x)
    if not all(state.isfinite().all() for state in states):
        raise ValueError("the network's states are NaN or infinite: look at weights, statistics and inputs")
    return states


def _inputs(chain: Chain, x: Any, y: Any, loss: Loss) -> tuple[Any, Any]:
    """Return inputs and labels on the chain's device; the labels from a dict where there are none beside it."""
    check_kind(Callable, "a function of logits and labels", loss=loss)
    return inputs_and_labels(check_chain(chain), x if y is None else (x, y))


def _gradients(loss: Loss, logits: Tensor, y: Any, states: list[Tensor]) -> list[Tensor]:
    """Return the gradients of the loss at some states, of which the last is what the head takes."""
    named = named_failure((logits, y), "the loss cannot take logits and labels")
    with nullcontext() if loss is cross_entropy else named:  # cross_entropy says itself what does not fit
        value = loss(logits, y)
    if not isinstance(value, Tensor) or not value.requires_grad:
        kind = type(value).__name__
        raise TypeError(f"the loss is a {kind} without a gradient: compute it from the logits, in torch")
    if value.numel() != 1 or value.is_complex():
        raise ValueError(f"the loss must be a real scalar, not {(*value.shape,)} of {value.dtype}: average or sum it")
    if not value.isfinite():
        raise ValueError("the loss is NaN or infinite: look for NaN in the network's weights, or logits that overflow")
    found = grad(value, states, allow_unused=True)
    if found[-1] is None:
        raise ValueError("the loss has no gradient at the logits: compute it from them, in torch, without detach")
    return [torch.zeros_like(state) if g is None else g for g, state in zip(found, states, strict=True)]


def _choices(chain: Chain) -> tuple[list[int], list[int]]:
    """Return the units that a path can skip or enter, and those that it must enter."""
    there = [(i, unit.residual) for i, unit in enumerate(chain.units) if not unit.is_deleted]
    return [i for i, residual in there if residual], [i for i, residual in there if not residual]


def _sum(*terms: Any) -> Any:
    """Add the terms that there are; None where there is none."""
    there = [term for term in terms if term is not None]
    return functools.reduce(torch.add, there) if there else None


def _double(x: Tensor) -> Tensor:
    """Return a tensor in float64, on the CPU, since a device may lack it; TypeError for complex numbers."""
    if x.is_complex():
        raise TypeError("the states are complex, and norms and shares of such gradients are not defined here")
    return x.detach().cpu().double()


def _to_pixels(chain: Chain, batch: Any, gradients: Tensor) -> Tensor:
    x, _ = inputs_and_labels(chain, batch, labels=False)
    if not isinstance(x, Tensor) or not (x.is_floating_point() or x.is_complex()):
        raise ValueError('the input holds no numbers to take a gradient at: use at="stem", the first unit\'s input')
    x = x.detach().requires_grad_()
    y_0 = chain.stem(x)
    return gradients if y_0 is x else torch.stack([grad(y_0, x, g, retain_graph=True)[0] for g in gradients])


@contextmanager
def _as_found(chain: Chain, batch_statistics: bool = False) -> Iterator[None]:
    """Give buffers and modes back after a ``with`` block, where batch norm may have to take the batch's statistics."""
    check_kind(*FLAG, batch_statistics=batch_statistics)
    modes = [(part, part.training) for part in check_chain(chain).modules()]
    changing = batch_statistics or any(training for _, training in modes)
    buffers = [(buffer, buffer.clone()) for buffer in chain.buffers()] if changing else []
    try:
        for part, training in modes:
            part.training = training or (batch_statistics and isinstance(part, _BatchNorm))
        yield
    finally:
        for part, training in modes:
            part.training = training
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)


@contextmanager
def _nothing_random(device: torch.device) -> Iterator[None]:
    """Raise ValueError after a ``with`` block that drew random numbers, and give the generators their state back."""
    sources: list[tuple[Any, tuple]] = [(torch, ())]
    if device.type != "cpu":
        sources.append((torch.get_device_module(device), () if device.type == "mps" else (device,)))
    before = [module.get_rng_state(*where) for module, where in sources]
    yield
    after = [module.get_rng_state(*where) for module, where in sources]
    for (module, where), state in zip(sources, before, strict=True):
        module.set_rng_state(state, *where)
    if not all(map(torch.equal, before, after)):
        what = "random numbers, as dropout and stochastic depth do in training mode"
        raise ValueError(f"the network draws {what}, in which no two passes are the same: call chain.eval() first")
