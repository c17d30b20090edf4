"""The gradient along the 2^n paths of a chain."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pandas as pd
import torch
from torch import Tensor, nn
from torch.autograd import grad
from torch.nn.functional import cross_entropy

from .chain import Chain, Unit, device_of, eval_mode

Loss = Callable[[Tensor, Tensor], Tensor]


def gradient_norms(chain: Chain, x: Tensor, y: Tensor, loss: Loss = cross_entropy) -> pd.DataFrame:
    """Return the norm of the loss gradient at every state y_0 … y_n, in the mode the chain is in.

    Args:
        chain: the network. In training mode batch norm uses the batch, and its running statistics stay as they are.
        x: normalised images ``(B, C, H, W)``.
        y: labels ``(B,)``.
        loss: maps logits ``(B, K)`` and ``y`` to a scalar.

    Returns:
        One row a state: ``state`` (0 to n), ``gradient_norm`` over the whole batch.
    """
    buffers = {name: buffer.clone() for name, buffer in chain.named_buffers()}
    x = x.to(device_of(chain)).detach().requires_grad_()  # y_0 is x itself where the stem does nothing
    states = chain.trace(x)
    gradients = grad(_scalar(loss(chain.head(states[-1]), y.to(x.device))), states)
    with torch.no_grad():
        for name, buffer in chain.named_buffers():
            buffer.copy_(buffers[name])
    norms = [g.double().norm().item() for g in gradients]
    return pd.DataFrame({"state": range(len(norms)), "gradient_norm": norms})


def path_gradients(chain: Chain, x: Tensor, y: Tensor, loss: Loss = cross_entropy) -> dict[tuple[int, ...], Tensor]:
    """Return the gradient at y_0 along each of the 2^n paths, by brute force.

    The chain rule through y_i = post_i(skip_i(y_{i-1}) + branch_i(y_{i-1})) is a product of sums of two Jacobians,
    taken at the true states. Multiplied out it has one term for each choice of skip or branch at every residual
    unit, and their sum is the ordinary gradient, exactly.

    Args:
        chain: a network of at most 12 units, in eval mode for the duration of the call.
        x: normalised images ``(B, C, H, W)``.
        y: labels ``(B,)``.
        loss: maps logits ``(B, K)`` and ``y`` to a scalar.

    Returns:
        A map from a tuple of n bits, 1 where the path takes the branch, to a tensor of the shape of y_0.

    Raises:
        ValueError: the chain has more than 12 units.
    """
    if len(chain) > 12:
        raise ValueError(f"{len(chain)} units make 2^{len(chain)} paths: use gradient_by_length for more than 12")
    with eval_mode(chain):
        states, top = _states_and_top_gradient(chain, x, y, loss)
        paths = {(): top}
        for unit, state in zip(reversed(chain.units), reversed(states[:-1]), strict=True):
            through_skip, through_branch = _vjps(unit, state)
            paths = {
                (bit, *bits): (through_branch if bit else through_skip)(g)
                for (bits, g), bit in product(paths.items(), _bits(unit))
            }
    return paths


def gradient_by_length(chain: Chain, x: Tensor, y: Tensor, loss: Loss = cross_entropy) -> list[Tensor]:
    """Return G_0 … G_n, the exact sums of the gradients at y_0 along all paths through k branches.

    Going down from the loss, G_k becomes S_i^T G_k + J_i^T G_{k-1} at unit i, where S_i and J_i are the Jacobians of
    its skip and branch at the true state: n(n + 1) / 2 vector-Jacobian products of branches for 2^n paths. See
    section 3.2 and figure 6 of Veit et al. (2016), who sample paths.

    Args:
        chain: the network, in eval mode for the duration of the call.
        x: normalised images ``(B, C, H, W)``.
        y: labels ``(B,)``.
        loss: maps logits ``(B, K)`` and ``y`` to a scalar.

    Returns:
        n + 1 tensors of the shape of y_0; their sum is the gradient of the loss at y_0.
    """
    with eval_mode(chain):
        states, top = _states_and_top_gradient(chain, x, y, loss)
        by_length: list[Tensor | None] = [top]
        for unit, state in zip(reversed(chain.units), reversed(states[:-1]), strict=True):
            through_skip, through_branch = _vjps(unit, state)
            bits = _bits(unit)
            skipped = [through_skip(g) if 0 in bits and g is not None else None for g in by_length]
            taken = [through_branch(g) if 1 in bits and g is not None else None for g in by_length]
            by_length = [_add(s, t) for s, t in zip([*skipped, None], [None, *taken], strict=True)]
    zero = torch.zeros_like(states[0])
    return [zero if g is None else g for g in by_length]


def _bits(unit: Unit) -> tuple[int, ...]:
    """Return which ways lead through a unit: 0 the skip, 1 the branch."""
    return (0,) if unit.is_deleted else (0, 1) if unit.residual else (1,)


def _add(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


def _scalar(value: Tensor) -> Tensor:
    if value.numel() != 1:
        raise ValueError(f"the loss must be a scalar, but has shape {tuple(value.shape)}: average or sum it")
    return value


def _states_and_top_gradient(chain: Chain, x: Tensor, y: Tensor, loss: Loss) -> tuple[list[Tensor], Tensor]:
    """Return y_0 … y_n, detached, and the gradient of the loss at y_n."""
    device = device_of(chain)
    with torch.no_grad():
        states = chain.trace(x.to(device))
    last = states[-1].requires_grad_()
    return states, grad(_scalar(loss(chain.head(last), y.to(device))), last)[0]


def _vjps(unit: Unit, state: Tensor) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """Return the maps g → S^T g and g → J^T g of a unit at ``state``, its ``post`` included."""
    state = state.detach().requires_grad_()
    skip = unit.skip(state)
    branch = unit.branch(state) if unit.branch is not None else None
    total = skip if branch is None else skip + branch if unit.residual else branch
    total = total.detach().requires_grad_()
    after = unit.post(total)

    def through(part: Tensor | None) -> Callable[[Tensor], Tensor]:
        def vjp(g: Tensor) -> Tensor:
            if not isinstance(unit.post, nn.Identity):
                (g,) = grad(after, total, g, retain_graph=True)
            return g if part is state else grad(part, state, g, retain_graph=True)[0]

        return vjp

    return through(skip), through(branch)
