"""Turn somebody else's residual network into a `unravelling.chain.Chain` that shares its parameters.

    chain = unravel(torchvision.models.resnet50(), images)
    table = delete_each(chain, loader)

A model's blocks are recognised in one of three ways.

*By class.* `block_units` maps a block to its units. It knows the blocks of torchvision's and timm's ResNets, vision
transformers, ConvNeXts and inverted residuals, and PyTorch's transformer encoder layer. A block of your own takes three
lines, after which `unravel` finds it anywhere::

    @block_units.register
    def _(block: MyBlock):
        return [Unit(branch=nn.Sequential(block.norm, block.mlp))]

*By the graph.* All other models are traced, by torch.fx or where that fails by torch.export, and `unravelling.graph`
finds the additions that make them residual.

*By hand.* ``units="layers.*"`` names the modules that are the blocks; ``branch`` says what each computes beside its
skip, or the graph does.

What comes before the first unit is the stem, what follows the last is the head, and what lies between two units belongs
to one of them. A chain holds the model's own layers, so it shares their mode, too: ``chain.train()`` and
``chain.eval()`` set that of the model. Layers in place (``ReLU(inplace=True)``) are replaced by copies that are not.
"""

from __future__ import annotations

import inspect
import operator
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import singledispatch
from typing import Any

import pandas as pd
import torch
from torch import Tensor, fx, nn

from . import graph as graphs
from .batches import eval_mode, move
from .chain import Chain, NoSkip, Unit
from .graph import Builder, Context, Key, Reading, Sum, Traced, Unsupported, arguments, logits_of, preserved, run

Function = Callable[..., Any]


class Call(nn.Module):
    """A part of a block that is a function: computes ``function(block, y)``, and holds the block's parameters."""

    def __init__(self, block: nn.Module, function: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.block, self.function = block, function

    def forward(self, y: Tensor) -> Tensor:
        """Map a state to what the function makes of it."""
        return self.function(self.block, y)


# ---------------------------------------------------------------- blocks by class


@singledispatch
def block_units(block: nn.Module) -> list[Unit]:
    """Return the units of a block, which share its parameters; register the function for a class of your own.

    Args:
        block: a module that takes the state and returns the next one.

    Returns:
        The units, in order. An empty list for modules that are no block of a known class.
    """
    return []


def _fresh(activation: nn.Module) -> nn.Module:
    """Return an activation that does not work in place."""
    if not getattr(activation, "inplace", False) or any(activation.parameters()):
        return activation
    copy = activation.__new__(type(activation))
    copy.__dict__ = dict(vars(activation), inplace=False)
    return copy


def _sequence(*parts: nn.Module | None) -> nn.Module:
    modules = [_fresh(part) for part in parts if part is not None]
    return modules[0] if len(modules) == 1 else nn.Sequential(*modules)


def _torchvision_basic(block: Any) -> list[Unit]:
    branch = _sequence(block.conv1, block.bn1, block.relu, block.conv2, block.bn2)
    return [Unit(branch, block.downsample, _fresh(block.relu))]


def _torchvision_bottleneck(block: Any) -> list[Unit]:
    b = block
    branch = _sequence(b.conv1, b.bn1, b.relu, b.conv2, b.bn2, b.relu, b.conv3, b.bn3)
    return [Unit(branch, b.downsample, _fresh(b.relu))]


def _attend(attention: Any, y: Tensor) -> Tensor:
    return attention(y, y, y, need_weights=False)[0]


def _torchvision_encoder(block: Any) -> list[Unit]:
    attention = nn.Sequential(block.ln_1, Call(block.self_attention, _attend), block.dropout)
    return [Unit(attention, name="attention"), Unit(nn.Sequential(block.ln_2, block.mlp), name="mlp")]


def _torchvision_convnext(block: Any) -> list[Unit]:
    scaled = Call(block, lambda b, y: b.layer_scale * b.block(y))
    return [Unit(nn.Sequential(scaled, block.stochastic_depth))]


def _torchvision_inverted(block: Any) -> list[Unit]:
    layers = block.conv if hasattr(block, "conv") else block.block
    if not block.use_res_connect:
        return [Unit(layers, residual=False)]
    return [Unit(_sequence(layers, getattr(block, "stochastic_depth", None)))]


def _timm_basic(block: Any) -> list[Unit]:
    b = block
    parts = (b.conv1, b.bn1, b.drop_block, b.act1, b.aa, b.conv2, b.bn2, b.se, b.drop_path)
    return [Unit(_sequence(*parts), b.downsample, _fresh(b.act2))]


def _timm_bottleneck(block: Any) -> list[Unit]:
    b = block
    parts = (b.conv1, b.bn1, b.act1, b.conv2, b.bn2, b.drop_block, b.act2, b.aa, b.conv3, b.bn3, b.se, b.drop_path)
    return [Unit(_sequence(*parts), b.downsample, _fresh(b.act3))]


def _timm_preactivation(block: Any) -> list[Unit]:
    b = block
    branch = _sequence(b.norm1, b.conv1, b.norm2, b.conv2, b.norm3, b.conv3, b.drop_path)
    return [Unit(branch, None if b.downsample is None else nn.Sequential(b.norm1, b.downsample))]


def _timm_vit(block: Any) -> list[Unit]:
    attention = nn.Sequential(block.norm1, block.attn, block.ls1, block.drop_path1)
    mlp = nn.Sequential(block.norm2, block.mlp, block.ls2, block.drop_path2)
    return [Unit(attention, name="attn"), Unit(mlp, name="mlp")]


def _timm_convnext_layers(block: Any, y: Tensor) -> Tensor:
    y = block.conv_dw(y)
    if block.use_conv_mlp:
        y = block.mlp(block.norm(y))
    else:
        y = block.mlp(block.norm(y.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
    return y if block.gamma is None else y.mul(block.gamma.reshape(1, -1, 1, 1))


def _timm_convnext(block: Any) -> list[Unit]:
    branch = nn.Sequential(Call(block, _timm_convnext_layers), block.drop_path)
    return [Unit(branch, None if isinstance(block.shortcut, nn.Identity) else block.shortcut)]


def _timm_efficientnet(*names: str) -> Callable[[Any], list[Unit]]:
    def units(block: Any) -> list[Unit]:
        names_here = [*names, "drop_path"] if block.has_skip else names
        return [Unit(_sequence(*(getattr(block, name, None) for name in names_here)), residual=block.has_skip)]

    return units


def _encoder_layer(block: nn.TransformerEncoderLayer) -> list[Unit]:
    def attend(b: Any, y: Tensor) -> Tensor:
        return b._sa_block(b.norm1(y) if b.norm_first else y, None, None)

    def feed(b: Any, y: Tensor) -> Tensor:
        return b._ff_block(b.norm2(y) if b.norm_first else y)

    posts = (None, None) if block.norm_first else (block.norm1, block.norm2)
    names = ("attention", "mlp")
    return [Unit(Call(block, f), None, p, name=n) for f, p, n in zip((attend, feed), posts, names, strict=True)]


_TIMM_BLOCKS = "timm.models._efficientnet_blocks"
KNOWN: dict[str, Callable[[Any], list[Unit]]] = {
    "torch.nn.modules.transformer.TransformerEncoderLayer": _encoder_layer,
    "torchvision.models.resnet.BasicBlock": _torchvision_basic,
    "torchvision.models.resnet.Bottleneck": _torchvision_bottleneck,
    "torchvision.models.vision_transformer.EncoderBlock": _torchvision_encoder,
    "torchvision.models.convnext.CNBlock": _torchvision_convnext,
    "torchvision.models.mobilenetv2.InvertedResidual": _torchvision_inverted,
    "torchvision.models.mobilenetv3.InvertedResidual": _torchvision_inverted,
    "torchvision.models.efficientnet.MBConv": _torchvision_inverted,
    "torchvision.models.efficientnet.FusedMBConv": _torchvision_inverted,
    "timm.models.resnet.BasicBlock": _timm_basic,
    "timm.models.resnet.Bottleneck": _timm_bottleneck,
    "timm.models.resnetv2.PreActBottleneck": _timm_preactivation,
    "timm.models.vision_transformer.Block": _timm_vit,
    "timm.models.convnext.ConvNeXtBlock": _timm_convnext,
    f"{_TIMM_BLOCKS}.DepthwiseSeparableConv": _timm_efficientnet(
        *("conv_s2d", "bn_s2d", "conv_dw", "bn1", "aa", "se", "conv_pw", "bn2")
    ),
    f"{_TIMM_BLOCKS}.InvertedResidual": _timm_efficientnet(
        *("conv_s2d", "bn_s2d", "conv_pw", "bn1", "conv_dw", "bn2", "aa", "se", "conv_pwl", "bn3")
    ),
    f"{_TIMM_BLOCKS}.EdgeResidual": _timm_efficientnet("conv_exp", "bn1", "aa", "se", "conv_pwl", "bn2"),
}
"""Blocks of other libraries by the full names of their classes, none of which has to be installed."""


def _register_known(model: nn.Module) -> None:
    """Register those of the known classes that a model has, or has subclasses of with the same forward."""
    for cls in {type(module) for module in model.modules()}:
        for base in cls.__mro__:
            units = KNOWN.get(f"{base.__module__}.{base.__qualname__}")
            if (
                units is not None
                and base not in block_units.registry
                and base is getattr(sys.modules.get(base.__module__), base.__qualname__, None)
            ):
                block_units.register(base)(units)


def _units_by_class(block: nn.Module) -> list[Unit]:
    """Return the units of a block, unless its class has another forward than the one whose units are known."""
    handler = block_units.dispatch(type(block))
    base = next((c for c in type(block).__mro__ if block_units.registry.get(c) is handler), type(block))
    known = f"{base.__module__}.{base.__qualname__}" in KNOWN
    if known and (getattr(base, "forward", None) is not type(block).forward or "forward" in vars(block)):
        return []
    return handler(block)


# ---------------------------------------------------------------- blocks by hand


def _modules_by_hand(model: nn.Module, units: str | Iterable[str]) -> list[str]:
    """Return the names of the modules that a pattern or a list names, in the model's order."""
    names = [name for name, _ in model.named_modules() if name]
    if isinstance(units, str):
        parts = (re.escape(part).replace(r"\*", "[^.]*").replace(r"\?", "[^.]") for part in units.split("."))
        pattern = re.compile(r"\.".join(parts))
        chosen = [name for name in names if pattern.fullmatch(name)]
    else:
        chosen = list(units)
    missing = [name for name in chosen if name not in names]
    if missing or not chosen:
        what = f"no module is called {missing[0]!r}" if missing else f"units={units!r} names no module"
        raise ValueError(f"{what}: this model's own are {', '.join(n for n, _ in model.named_children())}")
    for a in chosen:
        if inside := [b for b in chosen if b.startswith(f"{a}.")]:
            raise ValueError(f"{inside[0]!r} lies within {a!r}: name one of them as a unit")
    return chosen


def _function(block: nn.Module, what: str | Function | None) -> nn.Module | None:
    """Return a part of a block that is given as an attribute's name or as a function of the block and the state."""
    if what is None:
        return None
    if isinstance(what, str):
        part = getattr(block, what)
        return part if isinstance(part, nn.Module) else Call(block, lambda b, y, name=what: getattr(b, name)(y))
    return Call(block, what)


# ---------------------------------------------------------------- unravel


class Unravelled(Chain):
    """A chain made by `unravel`, which can be compared with the model that it came from.

    Attributes:
        notes: reasons for which the chain's numbers may differ from the model's in the last bits.
        traced_by: ``"torch.fx"`` or ``"torch.export"``.
    """

    def __init__(self, stem: nn.Module, units: Iterable[Unit], head: nn.Module, origin: Origin) -> None:
        super().__init__(stem, units, head)
        self._origin = origin
        self.notes = origin.notes
        self.traced_by = origin.traced_by

    def verify(self, x: Any, *, tolerance: float | None = None) -> pd.DataFrame:
        """Compare the chain with its model: logits, gradients, and every deletion with an edit of a copy of the model.

        The edit replaces what the last module of a branch returns by zeros. Where no module computes the end of a
        branch alone, there is none. Everything is compared in eval mode.

        Args:
            x: an input as the model takes it, a tensor, a tuple or a dict.
            tolerance: the largest difference allowed, as a share of the largest number compared; by the type of the
                numbers when None: 1e-10 in float64, 1e-4 in float32, 0.05 in half precision.

        Returns:
            One row a kind of comparison, with ``check``, how many were ``compared``, how many are ``equal`` to the last
            bit, the largest ``difference`` (as a share of the largest number compared), ``tolerance``, and ``reason``,
            why numbers are not equal.

        Raises:
            ValueError: a difference exceeds the tolerance. The message names the first unit that fails.
        """
        return verify(self, self._origin, x, tolerance)


class Origin:
    """Where a chain comes from. It is not copied with the chain."""

    def __init__(self, model: nn.Module, traced_by: str) -> None:
        self.model, self.traced_by = model, traced_by
        self.notes: list[str] = []
        self.ends: list[
            tuple[str, int] | None
        ] = []  # for each unit the module, and its call, that returns the next state
        self.branches: list[list[tuple[str, int]]] = []  # and those whose zeros delete the branch

    def __deepcopy__(self, memo: dict) -> Origin:
        return self


def unravel(
    model: nn.Module,
    x: Any = None,
    *,
    units: str | Iterable[str] | None = None,
    branch: str | Function | None = None,
    skip: str | Function | None = None,
    post: str | Function | None = None,
) -> Unravelled:
    """Return a model as a chain of units, which shares its parameters. The model stays as it is.

    Args:
        model: any network with one stream: a stem, residual blocks one after the other, and a head. In eval mode.
        x: an example input: a tensor, a tuple of arguments, or a dict of keyword arguments. With it the chain is
            compared with the model, and models that cannot be traced symbolically are traced by running them. The chain
            takes inputs of the same kind, in batches of any size.
        units: the modules that are the blocks, if they are not to be found: a pattern such as ``"layers.*"``, where
            ``*`` stands for one part of a name, or a list of names.
        branch: with ``units``, what a block computes beside its skip: a function of the block and the state, or the
            name of an attribute. When None, the block's class or its graph tells.
        skip: with ``branch``, the shortcut, likewise; the identity when None.
        post: with ``branch``, what follows the sum, likewise; nothing when None.

    Returns:
        A chain with a method ``verify``.

    Raises:
        ValueError: no chain computes this model. The message says what was found and what to do.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"unravel takes a torch.nn.Module, not a {type(model).__name__}")
    if isinstance(model, Chain):
        raise ValueError("this model is a chain already")
    if branch is None and (skip is not None or post is not None):
        raise ValueError("skip and post say more about a branch: give branch, too")
    if branch is not None and units is None:
        raise ValueError('a branch belongs to named units: give units, too, such as units="layers.*"')
    if any(module.training for module in model.modules()):
        warnings.warn(
            "the model is in training mode: it is read as it computes in eval mode. Call model.eval() first",
            stacklevel=2,
        )
    x = move(x, model)
    with preserved(model):
        expected = None if x is None else _check_inputs(model, x)
        _register_known(model)
        by_hand = None if units is None else _modules_by_hand(model, units)
        if branch is not None and by_hand is not None:
            parts = (branch, skip, post)

            def hand_units(block: nn.Module) -> list[Unit]:
                made = [_function(block, part) for part in parts]
                return [Unit(made[0], *made[1:])]

            blocks: dict[str, Maker] = {name: hand_units for name in by_hand}
        else:
            blocks = _find_blocks(model, by_hand)
        chain = _build(model, x, expected, blocks, by_hand)
    return chain


def _check_inputs(model: nn.Module, x: Any) -> Tensor:
    """Return a model's logits, or refuse one that is called wrongly or is no function of its input."""
    args, kwargs = arguments(x)
    try:
        inspect.signature(model.forward).bind(*args, **kwargs)
    except TypeError as error:
        names = ", ".join(inspect.signature(model.forward).parameters)
        raise Unsupported(
            f"the forward of {type(model).__name__} takes several inputs ({names}): {error}. Give an example of them "
            "all, as a tuple or as a dict"
        ) from error
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with torch.no_grad():
        first = logits_of(run(model, x))
        changed = [name for name, b in model.named_buffers() if not torch.equal(b, before[name])]
        second = logits_of(run(model, x))
    if not isinstance(first, Tensor):
        raise Unsupported(f"the model returns a {type(first).__name__}, in which there is no tensor of logits")
    if not torch.equal(first, second) and not (first.isnan() == second.isnan()).all():
        changed = changed or ["nothing that is stored"]
    if not torch.allclose(first, second, equal_nan=True):
        why = f"each changes the buffer {changed[0]}" if changed else "it draws random numbers"
        raise Unsupported(
            f"two forward passes on the same input give different logits: {why}. A chain needs a forward pass in eval "
            "mode that depends on nothing but its input"
        )
    if changed:
        warnings.warn(
            f"a forward pass changes the buffer {changed[0]}, which the chain may leave as it is", stacklevel=4
        )
    return first


Maker = Callable[[nn.Module], list[Unit]]


def _find_blocks(model: nn.Module, only: Sequence[str] | None) -> dict[str, Maker]:
    """Return the names of all blocks of a known class, outermost first."""
    found: dict[str, Maker] = {}
    for name, module in model.named_modules():
        if any(name.startswith(f"{block}.") for block in found) or (only is not None and name not in only):
            continue
        if name and _units_by_class(module):
            found[name] = _units_by_class
    return found


def _build(
    model: nn.Module, x: Any, expected: Tensor | None, blocks: dict[str, Maker], by_hand: Sequence[str] | None
) -> Unravelled:
    """Try the ways of tracing until one gives a chain that computes what the model does."""
    reasons: list[str] = []
    refusal: Unsupported | None = None
    for way in ("torch.fx", "torch.export"):
        if way == "torch.export" and x is None:
            continue
        left = dict(blocks)
        while True:
            try:
                if way == "torch.fx":
                    traced = graphs.trace_symbolically(model, x, [model.get_submodule(name) for name in left])
                else:
                    traced = graphs.trace_by_export(model, x)
            except Exception as error:
                reasons.append(f"{way}: {str(error).strip().splitlines()[0] if str(error).strip() else error!r}")
                break
            try:
                chain = _assemble(model, x, traced, left, by_hand)
                if expected is not None:
                    _compare(chain, x, expected)
                return chain
            except _NotABlock as error:
                del left[error.name]
            except Unsupported as error:
                refusal = refusal or error
                break
    if refusal is not None:
        raise refusal
    hint = "" if x is not None else " Give an example input: unravel(model, x)."
    raise Unsupported(
        f"{type(model).__name__} cannot be traced: its control flow depends on the data, or it leaves PyTorch "
        f"({'; '.join(reasons)}).{hint} If that happens within its blocks, register their class with block_units: "
        "they are not looked into then. Otherwise write a wrapper whose forward calls stem, blocks and head in turn"
    )


class _NotABlock(Exception):
    """A module of a known class that is called in an unusual way, so that its graph has to tell."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


class _Piece:
    """A stretch of the stream that becomes one unit, or several."""

    def __init__(self, start: fx.Node, end: fx.Node, owner: Key, units: list[Unit] | None = None) -> None:
        self.start, self.end, self.owner, self.units = start, end, owner, units
        self.sum: Sum | None = None
        self.post = end  # where the last unit's state is, after what follows the sum


def _assemble(
    model: nn.Module, x: Any, traced: Traced, blocks: dict[str, Maker], by_hand: Sequence[str] | None
) -> Unravelled:
    graphs.out_of_place(traced)
    reading = Reading(traced)
    if x is not None:
        reading.measure(model, x)
    pieces, found = _pieces(model, reading, blocks, by_hand)
    if not pieces:
        raise Unsupported(_nothing_found(model, reading, found))
    for message in found:
        warnings.warn(message, stacklevel=5)
    others = [name for node, name in traced.inputs.items() if node is not reading.source and node.users]
    if others:
        warnings.warn(
            f"the model takes several inputs: the stream starts at {traced.inputs[reading.source]!r}, and "
            f"{', '.join(map(repr, others))} is handed to the units beside it",
            stacklevel=5,
        )
    _share_out(reading, pieces)
    return _chain(model, x, reading, pieces)


def _pieces(
    model: nn.Module, reading: Reading, blocks: dict[str, Maker], by_hand: Sequence[str] | None
) -> tuple[list[_Piece], list[str]]:
    """Return the stretches that become units, in order, and what else was found."""
    cuts = {node: i for i, node in enumerate(reading.cuts)}
    pieces: list[_Piece] = []
    found: list[str] = []
    calls = {entry: None for node in reading.cuts for entry in reading.stack(node)}
    for key, name in calls:
        if name not in blocks:
            continue
        region = reading.region(key)
        if region is None or region[0] not in cuts or region[1] not in cuts or not _takes_the_state_alone(reading, key):
            raise _NotABlock(name)
        pieces.append(_Piece(*region, key, _named(blocks[name](model.get_submodule(name)), name)))
    taken = {node for piece in pieces for node in reading.cuts[cuts[piece.start] + 1 : cuts[piece.end] + 1]}
    for start, end in zip(reading.cuts, reading.cuts[1:], strict=False):
        if end in taken or not any(node is not start for node in end.all_input_nodes if node in reading.active):
            continue
        read = graphs.residual_sum(reading, start, end)
        if isinstance(read, str):
            found.append(read)
        elif read is None:
            if name := _merges(reading, start, end):
                found.append(name)
        else:
            piece = _Piece(start, end, reading.owner(end))
            piece.sum = read
            pieces.append(piece)
            if read.inner:
                found.append(
                    f"the branch that ends at {end.name} (in {piece.owner or 'the forward of the model'}) holds "
                    f"{read.inner} residual additions of its own: they count as one unit. To look into it, unravel the "
                    "part of the model within"
                )
    if by_hand is not None:
        pieces = _within(reading, pieces, by_hand, cuts)
    pieces.sort(key=lambda piece: reading.order[piece.end])
    return pieces if by_hand is not None else _with_plain(model, reading, pieces), found


def _takes_the_state_alone(reading: Reading, key: Key) -> bool:
    """Whether a call of a block has no other argument than the state that could matter, and returns one tensor."""
    inside = [node for node in reading.order if reading.under(node, key)]
    for node in inside:
        if node.op == "call_module" and reading.stack(node)[-1][0] == key:  # the block itself, not looked into
            others = [*node.args[1:], *node.kwargs.values()]
            if any(value is not None and value is not False for value in others):
                return False
        for arg in node.all_input_nodes:
            foreign = arg not in inside and arg not in reading.active
            if foreign and not reading.constant[arg] and not graphs.name_of(arg).startswith("sym_"):
                return False
    return not any(user.target is operator.getitem for n in inside for user in n.users if user not in inside)


def _named(units: list[Unit], name: str) -> list[Unit]:
    for i, unit in enumerate(units):
        own = unit.name or (str(i) if len(units) > 1 else "")
        unit.name = f"{name}.{own}" if own else name
    return units


def _merges(reading: Reading, start: fx.Node, end: fx.Node) -> str:
    """Say that a long way around residual blocks, or concatenation, is not a matter of units."""
    if graphs.name_of(end) not in graphs.MERGES:
        return ""
    inside = reading.between(start, end)
    sums = sum(graphs.operands(node, reading.active) is not None for node in inside)
    if not sums:
        return ""
    return (
        f"{sums} additions lie within ways that are concatenated at {end.name}, as in a U-Net or a cross-stage "
        "network: they are no units of the chain"
    )


def _nothing_found(model: nn.Module, reading: Reading, found: Sequence[str]) -> str:
    nodes = sorted(reading.active, key=reading.order.__getitem__)
    joins = [
        n for n in nodes if graphs.name_of(n) in graphs.MERGES and len([a for a in n.all_input_nodes if a in nodes]) > 1
    ]
    sums = [node for node in nodes if graphs.operands(node, reading.active) is not None]
    name = type(model).__name__
    if found:
        return f"no chain of residual units computes {name}: {'; '.join(found)}"
    if joins:
        return (
            f"{name} has no residual unit, but {len(joins)} concatenations (the first is {joins[0].name}), as a "
            "DenseNet or a U-Net has: its states grow, and no chain of skip + branch computes them. Unravel a part "
            'that is residual, or name plain units by hand: units="layers.*"'
        )
    if sums:
        return (
            f"{name} has {len(sums)} additions, but no chain of residual units: their skips cross or overlap, or no "
            f"operand is a skip (the first is {sums[0].name}). Say which modules are the blocks: units=…, branch=…"
        )
    return (
        f"{name} has no skip: no addition joins a value with what is computed from it. To take a plain network apart, "
        'name its units by hand: units="features.*"'
    )


def _within(reading: Reading, pieces: list[_Piece], names: Sequence[str], cuts: Mapping[fx.Node, int]) -> list[_Piece]:
    """Keep the pieces within the modules named by hand; a module without any is a plain unit."""
    kept = []
    for name in names:
        calls = dict.fromkeys(key for node in reading.active for key, own in reading.stack(node) if own == name)
        if not calls:
            raise Unsupported(f"the forward pass does not call {name!r}, or the stream does not go through it")
        for key in calls:
            inside = [piece for piece in pieces if reading.under(piece.end, key)]
            if not inside:
                region = reading.region(key)
                if region is None or region[0] not in cuts or region[1] not in cuts:
                    raise Unsupported(
                        f"{name!r} is no unit: a unit takes one state and returns the next, and other ways lead past it"
                    )
                piece = _Piece(*region, key)
                inside = [piece]
            kept += inside
    return kept


def _with_plain(model: nn.Module, reading: Reading, pieces: list[_Piece]) -> list[_Piece]:
    """Add a plain unit for every block without a skip whose class is that of a residual one."""
    names = {name for piece in pieces for key, name in reading.stack(piece.end) if key == piece.owner}
    classes = {type(model.get_submodule(name)) for name in names} - {nn.Sequential, nn.ModuleList}
    owners = {piece.owner for piece in pieces}
    calls = {entry: None for node in reading.cuts for entry in reading.stack(node)}
    for key, name in calls:
        if key in owners or type(model.get_submodule(name)) not in classes:
            continue
        region = reading.region(key)
        if region is None or any(reading.under(piece.end, key) for piece in pieces):
            continue
        if all(node in reading.cuts for node in region):
            pieces.append(_Piece(*region, key))
    return sorted(pieces, key=lambda piece: reading.order[piece.end])


def _share_out(reading: Reading, pieces: list[_Piece]) -> None:
    """Decide for what lies between two pieces whether it follows the first sum or prepares the second unit."""
    cuts = {node: i for i, node in enumerate(reading.cuts)}
    same_owner = len({piece.owner for piece in pieces}) == 1 and len(pieces) > 1
    posts: list[list[Any]] = []
    for i, piece in enumerate(pieces):
        after = pieces[i + 1] if i + 1 < len(pieces) else None
        glue = reading.cuts[cuts[piece.end] + 1 : cuts[after.start] + 1 if after else None]
        for node in glue:
            if after is None:
                position = len(_post(reading, piece, cuts))
                usual = posts and all(post == posts[0] for post in posts) and position < len(posts[0])
                if piece.owner and not same_owner:
                    follows = reading.under(node, piece.owner)
                else:
                    follows = bool(usual) and _operation(reading, node) == posts[0][position]
            elif piece.owner == after.owner or not piece.owner:
                own = reading.under(node, after.owner) and bool(after.owner) and piece.owner != after.owner
                shapes = reading.shapes
                light = not reading.weights([node], least=1)
                same = shapes.get(node) == shapes.get(piece.end) if shapes else light
                follows = not own and same and reading.under(node, piece.owner)
            else:
                follows = reading.under(node, piece.owner)
            if not follows:
                break
            piece.post = node
        posts.append([_operation(reading, node) for node in _post(reading, piece, cuts)])


def _post(reading: Reading, piece: _Piece, cuts: Mapping[fx.Node, int]) -> list[fx.Node]:
    return reading.cuts[cuts[piece.end] + 1 : cuts[piece.post] + 1]


def _operation(reading: Reading, node: fx.Node) -> Any:
    return type(reading.traced.get(str(node.target))) if node.op == "call_module" else node.target


def _first_state(reading: Reading, pieces: Sequence[_Piece]) -> fx.Node:
    """Return y_0: the first unit's input, before what its own module does to it."""
    first, cuts = pieces[0], reading.cuts
    i = cuts.index(first.start)
    while i > 0 and first.owner and first.units is None and reading.under(cuts[i], first.owner):
        i -= 1
    return cuts[i]


def _chain(model: nn.Module, x: Any, reading: Reading, pieces: Sequence[_Piece]) -> Unravelled:
    """Make the modules: units from the pieces, then the head, and last the stem, which has to serve them all."""
    context = Context()
    builder = Builder(reading, context)
    origin = Origin(model, reading.traced.by)
    state = first = _first_state(reading, pieces)
    units: list[Unit] = []
    for piece in pieces:
        made = _units(builder, piece, state)
        if piece.units is None:
            made[0].name = _name(reading, piece, pieces)
        units += made
        origin.ends += [None] * (len(made) - 1) + [reading.ends(piece.post)]
        origin.branches += _branch_ends(model, reading, piece, made)
        if piece.sum is not None and not piece.sum.exact:
            origin.notes.append(
                f"{made[0].name}: its sum is computed in another order, or with its factors in the branch"
            )
        state = piece.post
    head = builder.part([(reading.traced.output, 1.0)], state) or nn.Identity()
    late = [node for node in builder.carried if reading.latest[node] > reading.order[first]]
    if late:
        raise Unsupported(
            f"skips cross: {late[0].name} is computed from the state of one unit and used by a later one, which no "
            "chain of units does"
        )
    wrap = len(reading.traced.inputs) > 1 or (x is not None and not isinstance(x, Tensor))
    stem = builder.stem(first, wrap, getattr(model, "loss_type", None) == "ForCausalLM" or _is_causal(model))
    chain = Unravelled(stem, units, head, origin)
    known = {id(module) for module in model.modules()}
    for module in chain.modules():
        if id(module) not in known:
            module.training = False
    _finish(chain, x)
    return chain


def _is_causal(model: nn.Module) -> bool:
    return type(model).__module__.startswith("transformers.") and type(model).__name__.endswith(
        ("ForCausalLM", "LMHeadModel")
    )


def _units(builder: Builder, piece: _Piece, state: fx.Node) -> list[Unit]:
    """Return a piece's units, with what comes before and after it in their skips, branches and posts."""
    post = builder.part([(piece.post, 1.0)], piece.end)
    if piece.sum is not None:
        skip, branch = builder.part(piece.sum.skip, state), builder.part(piece.sum.branch, state)
        return [Unit(branch, skip, post)]
    if piece.units is None:
        return [
            Unit(
                builder.part([(piece.end, 1.0)], state), builder.part([(piece.start, 1.0)], state), post, residual=False
            )
        ]
    prefix = builder.part([(piece.start, 1.0)], state)
    first, last = piece.units[0], piece.units[-1]
    if prefix is not None:
        first.branch, first.skip = _sequence(prefix, first.branch), _sequence(prefix, *_parts(first.skip))
    if post is not None:
        last.post = _sequence(*_parts(last.post), post)
    return piece.units


def _parts(module: nn.Module) -> list[nn.Module]:
    return [] if isinstance(module, nn.Identity) else [module]


def _name(reading: Reading, piece: _Piece, pieces: Sequence[_Piece]) -> str:
    """Return a unit's name: that of its module, and of the layer in it where the module holds several units."""
    owner = piece.owner.partition("@")[0]
    if piece.sum is None or (owner and [p.owner for p in pieces].count(piece.owner) == 1):
        return owner
    members = {n for node, _ in piece.sum.branch for n in reading.between(piece.start, node)}
    nodes = sorted(members, key=lambda node: reading.order[node])
    names = [[n for _, n in reading.stack(node)] for node in nodes if reading.weights([node])]
    below = [[n for n in stack if n != owner and n.startswith(f"{owner}." if owner else "")] for stack in names]
    first = [stack[0] for stack in below if stack]
    if first and not owner and "." not in first[-1]:
        # the model's own loop over a list: the entry, not the list
        return next((n for n in below[-1] if "." in n), first[-1]) if below[-1] else first[-1]
    return first[-1] if first else f"{owner}.{piece.end.name}" if owner else piece.end.name


def _branch_ends(
    model: nn.Module, reading: Reading, piece: _Piece, units: Sequence[Unit]
) -> list[list[tuple[str, int]]]:
    """Return, for each unit, the modules whose zeros delete its branch; none where there are no such modules."""
    if piece.sum is not None:
        ends = [reading.ends(node, outside=piece.end) for node, _ in _terms(reading, piece.sum)]
        return [[end for end in ends if end is not None] if all(ends) else []]
    names = {id(module): name for name, module in model.named_modules()}
    number = int(piece.owner.partition("@")[2] or 0)
    found: list[list[tuple[str, int]]] = []
    for unit in units:
        last = unit.branch
        while isinstance(last, nn.Sequential) and len(last) and id(last) not in names:
            last = last[-1]
        whole = piece.units is not None and unit.residual and id(last) in names
        found.append([(names[id(last)], number)] if whole else [])
    return found


def _terms(reading: Reading, total: Sum) -> graphs.Terms:
    """Return what a branch adds up."""
    terms, todo = [], list(total.branch)
    while todo:
        node, factor = todo.pop()
        pair = graphs.operands(node, reading.active) if reading.ends(node, outside=total.end) is None else None
        todo += pair or []
        terms += [] if pair else [(node, factor)]
    return terms


def _finish(chain: Unravelled, x: Any) -> None:
    """Make names unique, and number the stages: one begins where the shape of the state changes."""
    seen: dict[str, int] = {}
    for unit in chain.units:
        seen[unit.name] = seen.get(unit.name, 0) + 1
        if seen[unit.name] > 1:
            unit.name = f"{unit.name}#{seen[unit.name]}"
    shapes = None
    if x is not None:
        with torch.no_grad():
            shapes = [state.shape for state in chain.trace(x)]
    stage = 1
    for i, unit in enumerate(chain.units):
        changes = shapes[i + 1] != shapes[i] if shapes is not None else unit.is_transition
        stage += changes and i > 0
        unit.stage = stage
        if shapes is not None and not unit.residual and not unit.is_transition and changes:
            unit.skip = NoSkip(unit.name)


# ---------------------------------------------------------------- comparing


TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}


def _difference(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference, as a share of the largest number."""
    if found.shape != expected.shape:
        return float("inf")
    if torch.equal(found, expected):
        return 0.0
    found, expected = found.double(), expected.double()
    same = (found == expected) | (found.isnan() & expected.isnan())
    gap = torch.where(same, 0.0, (found - expected).abs()).max().item()
    scale = expected[expected.isfinite()].abs().max().item() if expected.isfinite().any() else 0.0
    return gap / scale if scale else (float("inf") if gap else 0.0)


def _compare(chain: Unravelled, x: Any, expected: Tensor) -> None:
    """Raise Unsupported where a new chain computes other logits than its model."""
    with torch.no_grad():
        logits = chain(x)
    if _difference(logits, expected) > TOLERANCE.get(expected.dtype, 0.05):
        raise Unsupported(_first_difference(chain, chain._origin, x))


def _calls(model: nn.Module, x: Any, names: Iterable[str], zero: Iterable[tuple[str, int]] = ()) -> tuple[Any, dict]:
    """Run a model with hooks, gone afterwards; return logits, and what the named modules returned each time."""
    outputs: dict[str, list[Any]] = {name: [] for name in names}
    zeros = set(zero)
    handles = []

    def hook(name: str) -> Function:
        def catch(module: nn.Module, args: Any, output: Any) -> Any:
            call = len(outputs[name])
            value = output[0] if isinstance(output, (tuple, list)) else output
            outputs[name].append(value.detach().clone() if isinstance(value, Tensor) else value)
            if (name, call) not in zeros:
                return None
            return (
                type(output)((torch.zeros_like(value), *output[1:])) if value is not output else torch.zeros_like(value)
            )

        return catch

    try:
        for name in outputs:
            handles.append(model.get_submodule(name).register_forward_hook(hook(name)))
        with torch.no_grad():
            return logits_of(run(model, x)), outputs
    finally:
        for handle in handles:
            handle.remove()


def _first_difference(chain: Chain, origin: Origin, x: Any) -> str:
    """Name the first unit after which the chain's state is not the model's."""
    ends = [end for end in origin.ends if end is not None]
    with preserved(origin.model), torch.no_grad():
        _, outputs = _calls(origin.model, x, {name for name, _ in ends})
        states = chain.trace(x)
    last = "the stem"
    since = 0
    for i, (unit, end) in enumerate(zip(chain.units, origin.ends, strict=True)):
        if end is None or len(outputs[end[0]]) <= end[1]:
            continue
        expected = outputs[end[0]][end[1]]
        gap = _difference(states[i + 1], expected)
        if gap > TOLERANCE.get(expected.dtype, 0.05):
            where = (
                f"unit {i} ({unit.name})"
                if since == i
                else f"units {since} to {i} ({chain.units[since].name} to {unit.name})"
            )
            hint = ""
            if unit.branch is not None and unit.residual:
                with torch.no_grad():
                    if _difference(unit.branch(states[i]), expected) < 1e-3:
                        hint = ": its branch returns what the whole block does, so it contains the stream already"
            return (
                f"the chain differs from the model first at {where}, by {gap:.2g} of the largest number after "
                f"{last}{hint}. Say by hand what the block computes: units=…, branch=…"
            )
        last, since = f"unit {i} ({unit.name})", i + 1
    return f"the chain differs from the model after {last}, where no module's output can be compared"


def verify(chain: Chain, origin: Origin, x: Any, tolerance: float | None = None) -> pd.DataFrame:
    """Compare a chain with the model it came from; see `Unravelled.verify`."""
    model = origin.model
    x = move(x, model)
    rows: list[dict[str, Any]] = []

    def compare(check: str, found: Tensor, expected: Tensor, where: str = "") -> None:
        allowed = TOLERANCE.get(expected.dtype, 0.05) if tolerance is None else tolerance
        gap = _difference(found, expected)
        rows.append({"check": check, "equal": torch.equal(found, expected), "difference": gap, "tolerance": allowed})
        if gap > allowed:
            if check == "logits":
                raise ValueError(_first_difference(chain, origin, x))
            raise ValueError(
                f"{check} {where} differs from the model's by {gap:.2g} of its largest number ({allowed:g} is allowed)"
            )

    with preserved(model), eval_mode(chain):
        names = {name for ends in origin.branches for name, _ in ends}
        expected, outputs = _calls(model, x, names)
        with torch.no_grad():
            compare("logits", chain(x), expected)
        found_gradients = _gradients(chain, model, x)
        for (kind, name), gradient in _gradients(model, model, x).items():
            found = found_gradients[kind, name]
            given = gradient if found is None else found
            if given is not None:  # a missing one counts as zeros
                found, gradient = (torch.zeros_like(given) if g is None else g for g in (found, gradient))
                compare(f"gradient at the {kind}", found, gradient, where=name)
        for i, ends in enumerate(origin.branches):
            if not ends or any(len(outputs[name]) <= call for name, call in ends):
                continue
            with torch.no_grad():
                found = chain.without(i)(x)
            edited, _ = _calls(model, x, {name for name, _ in ends}, ends)
            compare("deletion", found, edited, f"of unit {i} ({chain.units[i].name})")
    groups = pd.DataFrame(rows).groupby("check", sort=False)
    table = groups.agg(
        compared=("equal", "size"),
        equal=("equal", "sum"),
        difference=("difference", "max"),
        tolerance=("tolerance", "max"),
    ).reset_index()
    why = "; ".join(origin.notes) or "the same operations in another order, or by other kernels"
    return table.assign(reason=[why if row.equal < row.compared else "" for row in table.itertuples()])


def _gradients(module: nn.Module, model: nn.Module, x: Any) -> dict[tuple[str, str], Tensor | None]:
    """Return the gradients of a random combination of the logits at the input and at the model's parameters."""
    args, kwargs = arguments(x)

    def leaf(t: Any) -> Any:
        return t.detach().clone().requires_grad_() if isinstance(t, Tensor) and t.is_floating_point() else t

    args, kwargs = tuple(map(leaf, args)), {name: leaf(t) for name, t in kwargs.items()}
    inputs = {("input", str(name)): t for name, t in [*enumerate(args), *kwargs.items()]}
    leaves = {key: t for key, t in inputs.items() if isinstance(t, Tensor) and t.requires_grad}
    leaves |= {("parameters", name): p for name, p in model.named_parameters() if p.requires_grad}
    given = kwargs if isinstance(x, Mapping) else args if isinstance(x, (tuple, list)) else args[0]
    with torch.enable_grad():
        logits = logits_of(run(module, given)) if module is model else module(given)
    if not logits.requires_grad or not leaves:
        return {}
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    total = (logits * weights.to(logits)).sum()
    return dict(zip(leaves, torch.autograd.grad(total, list(leaves.values()), allow_unused=True), strict=True))
