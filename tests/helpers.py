"""Small networks, and a forward pass written by hand that serves as oracle for all of them."""

import torch
from torch import Tensor, nn
from torch.nn.functional import relu
from torch.nn.modules.batchnorm import _BatchNorm
from unravelling import Chain, plain, resnet, vgg

SMALL = {
    "pre": lambda: resnet(14, width=4, in_channels=1, seed=1),
    "post": lambda: resnet(14, width=4, in_channels=1, seed=1, preactivation=False),
    "pre-projection": lambda: resnet(14, width=4, in_channels=1, seed=1, shortcut="projection"),
    "post-projection": lambda: resnet(14, width=4, in_channels=1, seed=1, preactivation=False, shortcut="projection"),
    "plain": lambda: plain(14, width=4, in_channels=1, seed=1),
    "plain-post": lambda: plain(14, width=4, in_channels=1, seed=1, preactivation=False),
    "vgg": lambda: vgg(15, width=12, in_channels=1, image_size=8, seed=1),
    "vgg-nobn": lambda: vgg(15, width=12, in_channels=1, image_size=8, batch_norm=False, seed=1),
}
"""One network of every kind, for 1×8×8 images."""


def randomized(chain: Chain, seed: int = 0, dtype: torch.dtype = torch.float32) -> Chain:
    """Give the batch norms statistics and parameters away from 0 and 1, which would hide errors; set eval mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in chain.modules():
            if isinstance(module, _BatchNorm):
                module.weight.uniform_(0.5, 1.5, generator=generator)
                module.bias.normal_(0, 0.3, generator=generator)
                module.running_mean.normal_(0, 0.3, generator=generator)
                module.running_var.uniform_(0.5, 2, generator=generator)
                module.num_batches_tracked.fill_(7)
    return chain.to(dtype).eval()


def small(kind: str, dtype: torch.dtype = torch.float32) -> Chain:
    return randomized(SMALL[kind](), dtype=dtype)


def images(count: int = 3, seed: int = 0, dtype: torch.dtype = torch.float32, size: int = 8) -> tuple[Tensor, Tensor]:
    """Random images (count, 1, size, size) and labels."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 1, size, size, generator=generator, dtype=torch.float64).to(dtype)
    return x, torch.randint(10, (count,), generator=generator)


def shortcut_by_hand(unit: nn.Module, y: Tensor, shape: torch.Size) -> Tensor:
    """The identity, option A of He et al. (2015) written as a copy into zeros, or the unit's own projection."""
    if any(isinstance(part, nn.Conv2d) for part in unit.skip.modules()):
        return unit.skip(y)
    channels, side = shape[1], shape[2]
    out = torch.zeros(len(y), channels, *y.shape[2:], dtype=y.dtype)
    out[:, : y.shape[1]] = y
    if side == y.shape[2]:
        return out
    if any(isinstance(part, nn.MaxPool2d) for part in unit.skip.modules()):
        return torch.stack([out[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1)]).amax(0)
    return out[:, :, ::2, ::2]


def states_by_hand(kind: str, chain: Chain, x: Tensor, gone: tuple[int, ...] = (), order=None) -> list[Tensor]:
    """y_0 … y_n, as an edited source would compute them: without the units in ``gone``, in the order ``order``."""
    y = chain.stem(x)
    states = [y]
    for i in order or range(len(chain)):
        unit = chain.units[i]
        f = y
        for layer in unit.branch:
            f = layer(f)
        skip = shortcut_by_hand(unit, y, f.shape)
        if i in gone:
            y = skip
        elif kind.startswith(("plain", "vgg")):
            y = f
        else:
            y = skip + f
        if "post" in kind:
            y = relu(y)
        states.append(y)
    return states


def snapshot(chain: nn.Module) -> dict:
    """All of a module that a careless function could change: bytes, modes, hooks, gradients, parts."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {
        "bytes": {name: tensor.numpy().tobytes() for name, tensor in chain.state_dict().items()},
        "modes": {name: module.training for name, module in chain.named_modules()},
        "hooks": [len(getattr(module, kind)) for module in chain.modules() for kind in hooks],
        "gradients": [(p.requires_grad, p.grad is None) for p in chain.parameters()],
        "parts": [id(module) for module in chain.modules()],
    }


def mix_modes(chain: nn.Module) -> None:
    """Put every third part into training mode, so that a mode that is not given back shows."""
    for i, module in enumerate(chain.modules()):
        module.training = i % 3 == 0
