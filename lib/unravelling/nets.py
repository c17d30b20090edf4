"""The networks of the book, as chains: residual, plain and VGG, for small images."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from .chain import FLAG, Chain, NoSkip, Unit, check_kind, check_number

SHAPES = {"digits": (1, 8), "cifar10": (3, 32)}
"""Channels and side length in pixels of the images of each dataset."""


class Pad(nn.Module):
    """The parameter-free shortcut, option A of He et al. (2015): every ``stride``-th pixel, zero channels appended."""

    def __init__(self, extra_channels: int, stride: int) -> None:
        super().__init__()
        self.extra_channels, self.stride = extra_channels, stride

    def forward(self, y: Tensor) -> Tensor:
        """Map ``(B, C, H, W)`` to ``(B, C + extra, H / stride, W / stride)``, rounded up."""
        y = nn.functional.avg_pool2d(y, 1, self.stride)  # unlike a slice's, gradients keep their layout in memory
        return nn.functional.pad(y, (0, 0, 0, 0, 0, self.extra_channels))


def conv(c_in: int, c_out: int, stride: int = 1, kernel: int = 3) -> nn.Conv2d:
    """Return a convolution without bias that keeps the size at stride 1."""
    return nn.Conv2d(c_in, c_out, kernel, stride, padding=kernel // 2, bias=False)


class SkipInit(nn.Module):
    """A factor with one weight, 0 before training, that ends a branch without normalisation (De & Smith, 2020)."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.zeros(()))

    def forward(self, f: Tensor) -> Tensor:
        """Map a branch's output of any shape to the factor times it."""
        return self.factor * f


def resnet(
    depth: int, *, in_channels: int = 3, classes: int = 10, width: int = 16, preactivation: bool = True,
    shortcut: str = "pad", batch_norm: bool = True, norm_stem: bool = False, seed: int = 0,
) -> Chain:
    """Return the CIFAR ResNet of He et al. (2015, section 4.2), or its pre-activation form (He et al., 2016).

    Three stages of (depth - 2) / 6 units with ``width``, 2 ``width`` and 4 ``width`` channels; the second and third
    stage halve the image. ``resnet(110)`` has the 54 units that Veit et al. (2016) take apart.

    Args:
        depth: number of weighted layers; a ValueError where it is not 6n + 2.
        in_channels: channels of the images ``(B, in_channels, H, W)``.
        classes: number of classes K of the logits ``(B, K)``.
        width: channels of the first stage.
        preactivation: True for BN-ReLU-conv twice, False for the 2015 form with a ReLU after the sum.
        shortcut: at the transitions ``"pad"``, without parameters, or ``"projection"`` (1×1), or else a ValueError.
        batch_norm: False for a pre-activation network without any statistics: convolutions with biases, and a
            `SkipInit` at the end of every branch in place of the normalisation; or else a ValueError.
        norm_stem: whether batch norm and ReLU follow the first convolution before the first skip leaves, as in He et
            al. (2016, appendix); the 2015 form has them anyway, and a network without batch norm must not.
        seed: of the initial weights; the global generator is left alone.
    """
    if check_number(None, depth=depth) < 8 or (depth - 2) % 6:
        near = max(8, round((depth - 2) / 6) * 6 + 2)
        raise ValueError(f"depth {depth} is not 6n + 2: use a depth such as 8, 20, 56 or 110 (nearest: {near})")
    if shortcut not in ("pad", "projection"):
        raise ValueError(f'unknown shortcut {shortcut!r}: use "pad" or "projection"')
    check_kind(*FLAG, preactivation=preactivation, batch_norm=batch_norm, norm_stem=norm_stem)
    if not batch_norm and (norm_stem or not preactivation):
        what = "without batch norm there is the pre-activation form alone"
        raise ValueError(f"{what}: leave out preactivation=False and norm_stem")
    with _seeded(seed, in_channels=in_channels, classes=classes, width=width):
        units, channels = [], width
        for stage, block in product((1, 2, 3), range((depth - 2) // 6)):
            c_out, stride = width * 2 ** (stage - 1), 2 if stage > 1 and block == 0 else 1
            skip: nn.Module | None = None
            if stride > 1 and shortcut == "pad":
                skip = Pad(c_out - channels, stride)
            elif stride > 1:
                skip = conv(channels, c_out, stride, kernel=1)
                skip = skip if preactivation else nn.Sequential(skip, nn.BatchNorm2d(c_out))
            branch = _branch(channels, c_out, stride, preactivation, batch_norm)
            post = None if preactivation else nn.ReLU()
            name = f"stage{stage}.block{block}"
            units.append(Unit(branch, skip, post, name=name, stage=stage, transition=stride > 1))
            channels = c_out
        stem: nn.Module = conv(in_channels, width)
        head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes)]
        if preactivation:
            head = [*([nn.BatchNorm2d(channels)] if batch_norm else []), nn.ReLU(), *head]
        if norm_stem or not preactivation:
            stem = nn.Sequential(stem, nn.BatchNorm2d(width), nn.ReLU())
        name = f"resnet{depth}" + ("" if preactivation else "-post")
        name += ("-projection" if shortcut == "projection" else "") + ("" if batch_norm else "-nobn")
        name += "-stem" if norm_stem and preactivation else ""
        config = {"name": name, "in_channels": in_channels, "classes": classes, "width": width}
        return _initialize(Chain(stem, units, nn.Sequential(*head), config))


def _branch(c_in: int, c_out: int, stride: int, preactivation: bool, batch_norm: bool) -> nn.Sequential:
    if not batch_norm:
        biased = nn.Conv2d(c_in, c_out, 3, stride, padding=1), nn.Conv2d(c_out, c_out, 3, padding=1)
        return nn.Sequential(nn.ReLU(), biased[0], nn.ReLU(), biased[1], SkipInit())
    norms = nn.BatchNorm2d(c_in if preactivation else c_out), nn.BatchNorm2d(c_out)
    convs = conv(c_in, c_out, stride), conv(c_out, c_out)
    if preactivation:
        return nn.Sequential(norms[0], nn.ReLU(), convs[0], norms[1], nn.ReLU(), convs[1])
    return nn.Sequential(convs[0], norms[0], nn.ReLU(), convs[1], norms[1])


def plain(
    depth: int, *, in_channels: int = 3, classes: int = 10, width: int = 16, preactivation: bool = True, seed: int = 0
) -> Chain:
    """Return the same network as `resnet` without skips: y_i = post(branch_i(y_{i-1})).

    Its units keep the parameter-free shortcut for their deletion. Arguments and errors are those of `resnet`.
    """
    chain = resnet(depth, in_channels=in_channels, classes=classes, width=width, preactivation=preactivation, seed=seed)
    for unit in chain.units:
        unit.residual = False
    assert chain.config is not None
    chain.config["name"] = chain.config["name"].replace("resnet", "plain")
    return chain


def vgg(
    depth: int = 15, *, in_channels: int = 3, classes: int = 10, width: int = 128, image_size: int = 32,
    batch_norm: bool = True, seed: int = 0,
) -> Chain:
    """Return the 15-layer VGG beside the ResNet in Veit et al. (2016): 13 convolutions, a hidden and an output layer.

    Every layer has ``width`` channels, so that any of them can be removed. A convolution with its normalisation and
    ReLU is a unit without a skip; a 2×2 maximum follows layers 2, 4, 7, 10 and 13 as long as there are 2×2 pixels. A
    deleted unit keeps its pooling, and the first one appends zero channels.

    Args:
        depth: 15; a ValueError says so where it is another.
        in_channels, classes, seed: as in `resnet`.
        width: channels of every layer; 128 in the paper.
        image_size: side length of the images ``(B, in_channels, image_size, image_size)`` in pixels.
        batch_norm: whether the convolutions are normalised.
    """
    if depth != 15:
        raise ValueError(f"there is no vgg({depth}) here: use vgg(15), the one that Veit et al. compare with")
    check_kind(*FLAG, batch_norm=batch_norm)
    with _seeded(seed, in_channels=in_channels, classes=classes, width=width, image_size=image_size):
        units, channels, size = [], in_channels, image_size
        for stage, layers in enumerate((2, 2, 3, 3, 3), start=1):
            for layer in range(layers):
                branch: list[nn.Module] = [nn.Conv2d(channels, width, 3, padding=1, bias=not batch_norm)]
                branch += [nn.BatchNorm2d(width)] if batch_norm else []
                branch.append(nn.ReLU())
                skip: list[nn.Module] = [Pad(width - channels, 1)] if width != channels else []
                if layer == layers - 1 and size > 1:
                    size //= 2
                    branch.append(nn.MaxPool2d(2))
                    skip.append(nn.MaxPool2d(2))
                shortcut = nn.Sequential(*skip) if skip else None
                options: dict[str, Any] = {"name": f"stage{stage}.conv{layer}", "stage": stage}
                units.append(Unit(nn.Sequential(*branch), shortcut, residual=False, transition=bool(skip), **options))
                channels = width
        norm = [nn.BatchNorm1d(width)] if batch_norm else []
        hidden = nn.Linear(width * size * size, width)
        head = nn.Sequential(nn.Flatten(), hidden, *norm, nn.ReLU(), nn.Linear(width, classes))
        config = {"name": "vgg15" + ("" if batch_norm else "-nobn"), "in_channels": in_channels}
        config |= {"classes": classes, "width": width, "image_size": image_size}
        return _initialize(Chain(nn.Identity(), units, head, config))


class Average(nn.Module):
    """Networks that are trained as one: the average that `unravelling.ensemble.average` takes of separate ones."""

    def __init__(self, members: Iterable[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``(B, C, H, W)`` to the log of the members' summed class probabilities, ``(B, K)``."""
        return torch.stack([member(x).log_softmax(1) for member in self.members]).logsumexp(0)


@contextmanager
def _seeded(seed: int, **sizes: int) -> Iterator[None]:
    """Draw from a seeded generator within a ``with`` block, after a look at sizes; leave the global one as it was."""
    for name, size in sizes.items():
        check_number(1, **{name: size})
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(check_number(seed=seed))  # torch.manual_seed would seed every GPU as well
        yield


def _initialize(chain: Chain) -> Chain:
    for module in chain.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
    return chain


def build(name: str, dataset: str | None = None, *, seed: int = 0, **options: Any) -> Chain:
    """Return a network by its name, such as ``resnet110``, ``resnet56-post``, ``plain20`` or ``vgg15-nobn``.

    Args:
        name: family and depth, then ``-post`` (2015 form), ``-projection``, ``-nobn`` (without batch norm), ``-stem``
            (batch norm and ReLU in the stem) or ``-wide`` (2.5 times the channels: ``resnet20-wide`` has the parameters
            of ``resnet110``); last ``-joint6`` for six such networks trained as one, the `Average` of a single unit.
        dataset: ``"digits"`` or ``"cifar10"``, which sets channels and image size, and the width of a VGG (64 or 128).
        seed: of the initial weights; members of a joint network have those of separate ones.
        options: passed to `resnet`, `plain` or `vgg`, over those of the dataset.

    Raises:
        ValueError: no such network or dataset, or an option contradicts the name.
    """
    if joint := re.fullmatch(r"(.+)-joint([1-9]\d?)", str(name)):
        members = [build(joint[1], dataset, seed=seed * int(joint[2]) + i, **options) for i in range(int(joint[2]))]
        unit = Unit(Average(members), NoSkip(name), residual=False, name="members")
        return Chain(nn.Identity(), [unit], nn.Identity(), (members[0].config or {}) | {"name": name})
    match = re.fullmatch(r"(resnet|plain|vgg)(\d+)((?:-(?:post|projection|nobn|stem|wide))*)", str(name))
    if not match:
        raise ValueError(f"unknown network {name!r}: expected a name such as resnet110, plain56-post or vgg15-nobn")
    family, depth, suffixes = match[1], int(match[2]), set(match[3].split("-")) - {""}
    allowed = {"resnet": {"post", "projection", "nobn", "stem", "wide"}, "plain": {"post"}, "vgg": {"nobn"}}[family]
    if suffixes - allowed:
        raise ValueError(f"{family} has no variant -{min(suffixes - allowed)}: it has {', '.join(sorted(allowed))}")
    if dataset is not None:
        if dataset not in list(SHAPES):
            raise ValueError(f"unknown dataset {dataset!r}: expected one of {', '.join(SHAPES)}")
        channels, size = SHAPES[dataset]
        vgg_only = {"image_size": size, "width": 64 if dataset == "digits" else 128} if family == "vgg" else {}
        options = {"in_channels": channels} | vgg_only | options
    kinds: dict[str, tuple[str, Any]] = {"post": ("preactivation", False), "projection": ("shortcut", "projection")}
    kinds |= {"nobn": ("batch_norm", False), "stem": ("norm_stem", True), "wide": ("width", 40)}
    for key, meant in (kinds[suffix] for suffix in suffixes):
        if options.setdefault(key, meant) != meant:
            what = f"{name!r} means {key}={meant!r}, not {options[key]!r}"
            raise ValueError(f"{what}: leave out the option, or the suffix of the name")
    make: dict[str, Callable[..., Chain]] = {"resnet": resnet, "plain": plain, "vgg": vgg}
    chain = make[family](depth, seed=seed, **options)
    if "wide" in suffixes and chain.config:
        chain.config["name"] += "-wide"
    return chain
