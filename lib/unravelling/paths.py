"""The gradient along the 2^n paths of a chain."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.autograd import grad
from torch.nn import functional as F

from .batches import device_of, inputs_and_labels, move
from .chain import Chain, Unit, check_positive

Loss = Callable[[Tensor, Any], Tensor]


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Return the mean cross-entropy (nats) of logits ``(B, K)`` and labels ``(B,)``, or ``(B, T, K)`` and ``(B, T)``.

    Labels of -100 are ignored.
    """
    return F.cross_entropy(logits.flatten(0, 1), y.flatten()) if logits.dim() == 3 else F.cross_entropy(logits, y)


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
    buffers = {name: buffer.clone() for name, buffer in chain.named_buffers()}
    x, y = _inputs(chain, x, y)
    try:
        states = [chain.stem(x).detach().requires_grad_()]
        for unit in chain.units:
            states.append(unit(states[-1]))
        gradients = grad(_scalar(loss(chain.head(states[-1]), y)), states)
    finally:
        with torch.no_grad():
            for name, buffer in chain.named_buffers():
                buffer.copy_(buffers[name])
    norms = [_double(g).norm().item() for g in gradients]
    return pd.DataFrame({"state": range(len(norms)), "gradient_norm": norms})


def path_gradients(chain: Chain, x: Any, y: Any = None, loss: Loss = cross_entropy) -> dict[tuple[int, ...], Tensor]:
    """Return the gradient at y_0 along each of the 2^n paths, by brute force.

    The chain rule through y_i = post_i(skip_i(y_{i-1}) + branch_i(y_{i-1})) is a product of sums of two Jacobians,
    taken at the true states. Multiplied out it has one term for each choice of skip or branch at every residual
    unit, and their sum is the ordinary gradient, exactly.

    Args:
        chain: a network of at most 12 units, in eval mode.
        x, y, loss: as in `gradient_norms`.

    Returns:
        A map from a tuple of n bits, 1 where the path takes the branch, to a tensor of the shape of y_0.

    Raises:
        ValueError: the chain has more than 12 units or is in training mode, or the loss is no scalar.
    """
    if len(chain) > 12:
        raise ValueError(f"{len(chain)} units make 2^{len(chain)} paths: use gradient_by_length for more than 12")
    states, top = _states_and_top_gradient(chain, x, y, loss)
    paths: dict[tuple[int, ...], Tensor] = {(): top}
    for unit, vjps in _backwards(chain, states):
        paths = {(bit, *bits): vjps[bit](g) for (bits, g), bit in product(paths.items(), _bits(unit))}
    return paths


def gradient_by_length(
    chain: Chain,
    x: Any,
    y: Any = None,
    loss: Loss = cross_entropy,
    *,
    at: str = "stem",
    max_length: int | None = None,
    dtype: torch.dtype | None = None,
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

    Returns:
        A tensor ``(n + 1, B, …)`` whose sum over the first dimension is the gradient of the loss. With ``max_length``,
        ``(m + 2, B, …)``, where the last is the sum over all paths longer than m.

    Raises:
        ValueError: the chain is in training mode, the loss is no scalar, or ``at`` or ``max_length`` makes no sense.
    """
    if at not in ("stem", "pixels"):
        raise ValueError(f'the gradient is taken at "stem" or "pixels", not at {at!r}')
    if max_length is not None and not 0 <= max_length <= len(chain):
        raise ValueError(f"max_length {max_length} makes no sense: paths have lengths 0 to {len(chain)}")
    if dtype is not None:
        chain = copy.deepcopy(chain).to(dtype)
    states, top = _states_and_top_gradient(chain, x, y, loss)
    by_length: list[Tensor | None] = [top]
    whole = top
    for unit, vjps in _backwards(chain, states):
        by_length = _one_longer(unit, vjps, by_length)
        if max_length is not None:
            whole = _sum(vjps[bit](whole) for bit in _bits(unit))
            by_length = by_length[: max_length + 1]
    if max_length is not None:
        by_length.append(_sum((whole, *(-g for g in by_length if g is not None))))
    zero = torch.zeros_like(states[0])
    stacked = torch.stack([zero if g is None else g for g in by_length])
    return stacked if at == "stem" else _to_pixels(chain, x, stacked)


def spectrum(gradients: Tensor, *, per_sample: bool = False) -> pd.DataFrame:
    """Return norms and signed shares of what `gradient_by_length` returns.

    Args:
        gradients: ``(n + 1, B, …)``; the index of the first dimension is called the length.
        per_sample: whether every image gets rows of its own, and not the batch as a whole.

    Returns:
        One row a length, with ``length``, ``norm`` ‖G_k‖, ``share`` ⟨g, G_k⟩ / ‖g‖² with g = Σ G_k, so that shares sum
        to 1; with ``per_sample`` also ``sample``.
    """
    flat = _double(gradients).flatten(2) if per_sample else _double(gradients).flatten(1)[:, None]
    whole = flat.sum(0)
    norm = flat.norm(dim=-1)
    share = (flat * whole).sum(-1) / (whole**2).sum(-1)
    lengths, samples = norm.shape
    table = pd.DataFrame(
        {
            "sample": np.tile(np.arange(samples), lengths),
            "length": np.repeat(np.arange(lengths), samples),
            "norm": norm.numpy().ravel(),
            "share": share.numpy().ravel(),
        }
    )
    return table if per_sample else table.drop(columns="sample")


def mean_length(chain: Chain, x: Any, y: Any = None, loss: Loss = cross_entropy) -> Tensor:
    """Return every image's mean path length Σ k ⟨g, G_k⟩ / ‖g‖², weighted by the signed shares of the gradient at y_0.

    With G(t) = Σ t^k G_k it is ⟨g, dG/dt⟩ / ‖g‖² at t = 1, and the derivative follows from two vector-Jacobian products
    of every branch.

    Args:
        chain: the network, in eval mode.
        x, y, loss: as in `gradient_norms`.

    Returns:
        Lengths ``(B,)``. For a whole batch, average them with weights ‖g‖².

    Raises:
        ValueError: the chain is in training mode, or the loss is no scalar.
    """
    states, g = _states_and_top_gradient(chain, x, y, loss)
    derivative = torch.zeros_like(g)
    for unit, vjps in _backwards(chain, states):
        bits = _bits(unit)
        derivative = _sum([vjps[bit](derivative) for bit in bits] + [vjps[1](g) for bit in bits if bit])
        g = _sum(vjps[bit](g) for bit in bits)
    g, derivative = _double(g).flatten(1), _double(derivative).flatten(1)
    return (g * derivative).sum(1) / (g**2).sum(1)


def sample_path_gradients(
    chain: Chain,
    x: Any,
    y: Any,
    lengths: Iterable[int],
    samples: int,
    seed: int = 0,
    loss: Loss = cross_entropy,
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
        ValueError: there is no path of such a length, there are no samples, the chain is in training mode, or the loss
            is no scalar.
    """
    check_positive(samples=samples)
    ways = [_bits(unit) for unit in chain.units]
    free = [i for i, bits in enumerate(ways) if len(bits) == 2]
    always = [i for i, bits in enumerate(ways) if bits == (1,)]
    lengths = list(lengths)
    for k in lengths:
        if not len(always) <= k <= len(always) + len(free):
            raise ValueError(
                f"no path has length {k}: this chain's have lengths {len(always)} to {len(always) + len(free)}"
            )
    states, top = _states_and_top_gradient(chain, x, y, loss)
    vjps = [pair for _, pair in _backwards(chain, states)][::-1]
    random = np.random.default_rng(seed)
    rows = []
    for k in lengths:
        for sample in range(samples):
            taken = {*always, *random.choice(free, k - len(always), replace=False).tolist()}
            g = top
            for i in reversed(range(len(chain))):
                g = vjps[i][i in taken](g)
            rows.append({"length": k, "sample": sample, "norm": _double(g).norm().item()})
    return pd.DataFrame(rows)


def path_norms(chain: Chain, x: Any, y: Any, repeats: int, seed: int = 0, loss: Loss = cross_entropy) -> pd.DataFrame:
    """Estimate Σ ‖g_path‖² over all paths of every length at once, by random signs.

    Every branch is given an independent random sign for every image. In G_k ← S_i^T G_k ± J_i^T G_{k-1} the products of
    different paths then cancel in expectation, so that E ‖G_k‖² is the sum over the paths of length k.

    Args:
        chain: the network, in eval mode; float64 for lengths at which the gradient is tiny.
        x, y, loss: as in `gradient_norms`.
        repeats: independent draws of all signs, at least 2.
        seed: of the signs.

    Returns:
        One row a length, with ``length``; ``sum_of_squares`` over the batch with ``standard_error``; ``paths``, how
        many there are; ``rms_norm``, the root mean square of ‖g_path‖.

    Raises:
        ValueError: fewer than 2 repeats, the chain is in training mode, or the loss is no scalar.
    """
    if repeats < 2:
        raise ValueError(f"{repeats} repeats give no standard error: use at least 2")
    states, top = _states_and_top_gradient(chain, x, y, loss)
    units = list(_backwards(chain, states))
    generator = torch.Generator().manual_seed(seed)
    squares = np.zeros((repeats, len(chain) + 1))
    for repeat in range(repeats):
        by_length: list[Tensor | None] = [top]
        for unit, vjps in units:
            signs = 2.0 * torch.randint(2, (len(top),), generator=generator) - 1
            by_length = _one_longer(unit, vjps, by_length, signs)
        squares[repeat] = [0.0 if g is None else (_double(g) ** 2).sum().item() for g in by_length]
    free = sum(len(_bits(unit)) == 2 for unit in chain.units)
    always = sum(_bits(unit) == (1,) for unit in chain.units)
    paths = [math.comb(free, k - always) if k >= always else 0 for k in range(len(chain) + 1)]
    total = squares.mean(0)
    return pd.DataFrame(
        {
            "length": range(len(chain) + 1),
            "sum_of_squares": total,
            "standard_error": squares.std(0, ddof=1) / math.sqrt(repeats),
            "paths": paths,
            "rms_norm": [math.sqrt(s / c) if c else 0.0 for s, c in zip(total, paths, strict=True)],
        }
    )


def count(n: int) -> int:
    """Return the number of paths through n residual units, 2^n."""
    return 2**n


def length_distribution(n: int) -> pd.DataFrame:
    """Return how many of the 2^n paths have each length: ``length``, ``paths`` C(n, k) and ``share``, exactly."""
    paths = [math.comb(n, k) for k in range(n + 1)]
    return pd.DataFrame({"length": range(n + 1), "paths": paths, "share": [p / 2**n for p in paths]})


def surviving(n: int, d: int) -> pd.DataFrame:
    """Return the share of the paths of each length that survive when d of n units are deleted, C(n-d, k) / C(n, k).

    Compare figure 7 of Veit et al. (2016). Columns: ``length``, ``share``.

    Raises:
        ValueError: there are fewer than d units.
    """
    if not 0 <= d <= n:
        raise ValueError(f"cannot delete {d} of {n} units")
    share = [math.comb(n - d, k) / math.comb(n, k) for k in range(n + 1)]
    return pd.DataFrame({"length": range(n + 1), "share": share})


def _bits(unit: Unit) -> tuple[int, ...]:
    """Return which ways lead through a unit: 0 the skip, 1 the branch."""
    return (0,) if unit.is_deleted else (0, 1) if unit.residual else (1,)


Ways = tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]


def _backwards(chain: Chain, states: list[Tensor]) -> Iterator[tuple[Unit, Ways]]:
    """Yield the units from the last to the first, each with its vector-Jacobian products through skip and branch."""
    for unit, state in zip(reversed(chain.units), reversed(states[:-1]), strict=True):
        yield unit, _vjps(unit, state)


def _one_longer(
    unit: Unit, vjps: Ways, by_length: list[Tensor | None], signs: Tensor | None = None
) -> list[Tensor | None]:
    """Take gradients by path length one unit down; each image's part through the branch times its sign, ``(B,)``."""
    bits = _bits(unit)
    skipped = [vjps[0](g) if 0 in bits and g is not None else None for g in by_length]
    taken = [vjps[1](g) if 1 in bits and g is not None else None for g in by_length]
    if signs is not None:
        taken = [None if g is None else g * signs.to(g).view(-1, *[1] * (g.dim() - 1)) for g in taken]
    return [_sum((s, t)) for s, t in zip([*skipped, None], [None, *taken], strict=True)]


def _sum(terms: Iterable[Any]) -> Any:
    """Add the terms that there are; None where there is none."""
    there = [term for term in terms if term is not None]
    return functools.reduce(torch.add, there) if there else None


def _inputs(chain: Chain, x: Any, y: Any) -> tuple[Any, Any]:
    """Return inputs and labels on the chain's device; the labels from a dict where there are none beside it."""
    return inputs_and_labels(chain, x if y is None else (x, y))


def _double(x: Tensor) -> Tensor:
    """Return a tensor in float64, on the CPU, since a device may lack it."""
    return x.detach().cpu().double()


def _to_pixels(chain: Chain, x: Any, gradients: Tensor) -> Tensor:
    x = move(x, chain)
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise ValueError('the input holds no numbers to take a gradient at: use at="stem", the first unit\'s input')
    x = x.detach().requires_grad_()
    y_0 = chain.stem(x)
    if y_0 is x:
        return gradients
    return torch.stack([grad(y_0, x, g, retain_graph=True)[0] for g in gradients])


def _scalar(value: Tensor) -> Tensor:
    if value.numel() != 1:
        raise ValueError(f"the loss must be a scalar, but has shape {tuple(value.shape)}: average or sum it")
    return value


def _states_and_top_gradient(chain: Chain, x: Tensor, y: Tensor, loss: Loss) -> tuple[list[Tensor], Tensor]:
    """Return y_0 … y_n, detached, and the gradient of the loss at y_n."""
    if any(isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training for m in chain.modules()):
        raise ValueError("batch norm is in training mode, which ties the images of a batch: call chain.eval() first")
    x, y = _inputs(chain, x, y)
    with _nothing_random(device_of(chain)):
        with torch.no_grad():
            states = chain.trace(x)
        last = states[-1].detach().requires_grad_()  # not in place: it may be the caller's x
        logits = chain.head(last)
    return states, grad(_scalar(loss(logits, y)), last)[0]


@contextmanager
def _nothing_random(device: torch.device) -> Iterator[None]:
    """Raise ValueError after a ``with`` block that drew random numbers, and give the generators their state back."""
    sources: list[tuple[Any, tuple]] = [(torch, ())]
    if device.type != "cpu":
        sources.append((torch.get_device_module(device), () if device.type == "mps" else (device,)))
    before = [module.get_rng_state(*where) for module, where in sources]
    yield
    drawn = False
    for (module, where), state in zip(sources, before, strict=True):
        drawn |= not torch.equal(module.get_rng_state(*where), state)
        module.set_rng_state(state, *where)
    if drawn:
        raise ValueError(
            "the network draws random numbers, as dropout and stochastic depth do in training mode, in which no two "
            "passes are the same: call chain.eval() first"
        )


def _vjps(unit: Unit, state: Tensor) -> Ways:
    """Return the maps g → S^T g and g → J^T g of a unit at ``state``, its ``post`` included."""
    state = state.detach().requires_grad_()
    branch = unit.branch(state) if unit.branch is not None else None
    skip = unit.skip(state) if branch is None or unit.residual else None  # a plain unit's is for its deletion
    total = skip if branch is None else branch if skip is None else skip + branch
    assert total is not None
    total = total.detach().requires_grad_()
    after = unit.post(total)

    def through(part: Tensor | None) -> Callable[[Tensor], Tensor]:
        def vjp(g: Tensor) -> Tensor:
            assert part is not None, "no way leads through a deleted branch or a plain unit's skip"
            if not isinstance(unit.post, nn.Identity):
                (g,) = grad(after, total, g, retain_graph=True)
            return g if part is state else grad(part, state, g, retain_graph=True)[0]

        return vjp

    return through(skip), through(branch)
