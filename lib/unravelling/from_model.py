"""Turn somebody else's residual network into a `unravelling.chain.Chain` that shares its parameters.

    chain = unravel(torchvision.models.resnet50(), images)
    table = delete_each(chain, loader)

A model's blocks are found in one of three ways.

*By the graph.* The model is traced, by torch.fx or where that fails by torch.export, and the graph shows the additions
that make it residual (`unravelling.tracing`).

*By class.* Where no graph can be made of a block, say what its units are; `unravel` then finds the block anywhere::

    @block_units.register
    def _(block: MyBlock):
        return [Unit(branch=nn.Sequential(block.norm, block.mlp))]

*By hand.* ``units="layers.*"`` names the blocks; ``branch``, or the graph, says what each computes beside its skip.

What comes before the first unit is the stem, what follows the last is the head, and what lies between two units belongs
to one of them. A chain holds the model's own layers, so it shares their mode, too: ``chain.train()`` and
``chain.eval()`` set that of the model. Layers in place (``ReLU(inplace=True)``) are replaced by copies that are not.
"""

from __future__ import annotations

import inspect
import io
import re
import traceback
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import redirect_stderr
from functools import partial, singledispatch
from typing import Any, cast

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .batches import move, named_failure
from .chain import Chain, Change, Unit, check_kind
from .tracing import trace
from .tracing.parts import Maker, Origin, make_parts, number
from .tracing.reading import NotABlock, read
from .tracing.trace import Unsupported, call, preserved
from .verify import refuse_changing, refuse_unequal, verify

Function = Callable[[Any, Tensor], Tensor]
"""What a part of a block computes from the block and the state."""


class Call(Change):
    """A part of a block that is a function: computes ``function(block, y)``, and holds the block's parameters."""

    def __init__(self, block: nn.Module, function: Function) -> None:
        super().__init__(partial(function, block))
        self.block = block


class Unravelled(Chain):
    """A chain made by `unravel`, which can be compared with the model that it came from.

    Attributes:
        notes: reasons for which the chain's numbers may differ from the model's, and what else to know of it.
        traced_by: ``"torch.fx"`` or ``"torch.export"``.
    """

    def __init__(self, stem: nn.Module, units: Iterable[Unit], head: nn.Module, origin: Origin) -> None:
        super().__init__(stem, units, head)
        self._origin, self.notes, self.traced_by = origin, origin.notes, origin.traced_by

    def verify(self, x: Any, *, tolerance: float | None = None) -> pd.DataFrame:
        """Compare the chain with its model: logits, gradients, and every deletion with an edit of a copy of the model.

        The edit replaces what the last module of a branch returns by zeros. Where no module computes the end of a
        branch alone, there is none. Everything is compared in eval mode.

        Args:
            x: an input as the model takes it, a tensor, a tuple or a dict.
            tolerance: the largest difference allowed, as a share of the largest number compared, which for gradients
                is the largest of all parameters'; by the lowest precision in the model when None: 1e-10 in float64,
                1e-4 in float32, 0.05 in half precision.

        Returns:
            One row a kind of comparison, with ``check``, how many were ``compared`` ``of`` how many there are, how many
            are ``equal`` to the last bit, the largest ``difference`` (NaN where nothing was compared), ``tolerance``,
            and ``reason``, why numbers are not equal, or not compared.

        Raises:
            ValueError: a difference exceeds the tolerance. The message names the first unit that fails. Or nothing
                would be compared: the tolerance is no number, the input is empty, or the model returns NaN for it.
        """
        return verify(self, self._origin, x, tolerance)


@singledispatch
def block_units(block: nn.Module) -> list[Unit]:
    """Return the units of a block, which share its parameters; register the function for a class of your own.

    Args:
        block: a module that takes the state and returns the next one.

    Returns:
        The units, in order. An empty list for modules that are no block of a registered class.
    """
    return []


def unravel(
    model: nn.Module, x: Any = None, *, units: str | Iterable[str] | None = None, branch: str | Function | None = None,
    skip: str | Function | None = None, post: str | Function | None = None, stream: str | None = None,
) -> Unravelled:
    """Return a model as a chain of units, which shares its parameters. The model stays as it is.

    Hooks on layers that stay whole are called in the chain, too; one on a module that is taken apart is refused.

    Args:
        model: any network with one stream: a stem, residual blocks one after the other, and a head. In eval mode.
        x: an example input: a tensor, a tuple of arguments, or a dict of keyword arguments. With it the chain's logits
            and gradients are compared with the model's, and models that cannot be traced symbolically are traced by
            running them. The chain takes inputs of the same kind, in batches of any size.
        units: the modules that are the blocks, if they are not to be found: a pattern such as ``"layers.*"``, where
            ``*`` stands for one part of a name, or a list of names.
        branch: with ``units``, what a block computes beside its skip: a function of the block and the state, or the
            name of an attribute. When None, the block's class or its graph tells.
        skip: with ``branch``, the shortcut, likewise; the identity when None.
        post: with ``branch``, what follows the sum, likewise; nothing when None.
        stream: the input at which the stream starts, where there are several; what gives the most units when None.

    Returns:
        A chain with a method ``verify``.

    Raises:
        ValueError: no chain computes this model. The message says what was found and what to do.
    """
    check_kind(nn.Module, "a network, an nn.Module", model=model)
    while isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)) or hasattr(model, "_orig_mod"):
        model = cast("nn.Module", getattr(model, "_orig_mod", None) or model.module)  # in torch.compile, or a wrapper
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule) or "eval" in vars(module):  # which exported ones refuse
            what = f"{name or 'this model'} is a TorchScript program, or one of torch.export, whose modules are gone"
            raise Unsupported(f"{what}: use what it was made from")
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor) or (tensor.is_meta and x is not None):
            what = "has no shape yet: call the model once" if is_lazy(tensor) else "is on the device meta: load values"
            raise Unsupported(f"{name} {what} before unravel")
    if isinstance(model, Chain):
        raise ValueError("this model is a chain already")
    if branch is None and (skip is not None or post is not None):
        raise ValueError("skip and post say more about a branch: give branch, too")
    if branch is not None and units is None:
        raise ValueError('a branch belongs to named units: give units, too, such as units="layers.*"')
    if any(module.training for module in model.modules()):
        remark = "the model is in training mode: it is read as it computes in eval mode. Call model.eval() first"
        warnings.warn(remark, stacklevel=2)
    x = move(x, model)
    with preserved(model, weights=True), torch.enable_grad():
        by_hand = None if units is None else _named(model, units)
        if branch is not None:
            makers: dict[str, Maker] = dict.fromkeys(by_hand or (), lambda block: [_unit(block, branch, skip, post)])
        else:
            makers = _registered(model, by_hand)
        trace.refuse_hooks(model, layers=False)
        known = (None, []) if x is None else _outputs(model, x)
    with preserved(model), torch.enable_grad():
        chain, remarks = _first_right_chain(model, x, known, makers, by_hand, stream)
    for remark in remarks:
        warnings.warn(remark, stacklevel=2)
    return chain


def _named(model: nn.Module, units: str | Iterable[str]) -> list[str]:
    """Return the names of the modules that a pattern or a list names, in the model's order."""
    names = [name for name, _ in model.named_modules() if name]
    if isinstance(units, str):
        parts = (re.escape(part).replace(r"\*", "[^.]*").replace(r"\?", "[^.]") for part in units.split("."))
        pattern = re.compile(r"\.".join(parts))
        chosen = [name for name in names if pattern.fullmatch(name)]
    else:
        chosen = list(dict.fromkeys(units))
    missing = [name for name in chosen if name not in names]
    if missing or not chosen:
        what = f"no module is called {missing[0]!r}" if missing else f"units={units!r} names no module"
        raise ValueError(f"{what}: this model's own are {', '.join(n for n, _ in model.named_children())}")
    for a in chosen:
        if inside := [b for b in chosen if b.startswith(f"{a}.")]:
            raise ValueError(f"{inside[0]!r} lies within {a!r}: name one of them as a unit")
    return chosen


def _unit(block: nn.Module, *parts: str | Function | None) -> Unit:
    """Return a unit of branch, skip and post, each an attribute's name or a function of the block and the state."""

    def module(what: str | Function | None) -> nn.Module | None:
        if not isinstance(what, str):
            return None if what is None else Call(block, what)
        part = getattr(block, what)
        return part if isinstance(part, nn.Module) else Call(block, lambda b, y: getattr(b, what)(y))

    return Unit(*map(module, parts))


def _registered(model: nn.Module, only: Sequence[str] | None) -> dict[str, Maker]:
    """Return the names of all blocks of a registered class, outermost first."""
    found: dict[str, Maker] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{block}.") for block in found)
        if name and not inside and (only is None or name in only) and block_units(module):
            found[name] = block_units
    return found


def _outputs(model: nn.Module, x: Any) -> tuple[Tensor, list[str]]:
    """Return a model's logits, and remarks; refuse one that is called wrongly or is no function of its input."""
    args, kwargs = trace.arguments(x)
    try:
        inspect.signature(model.forward).bind(*args, **kwargs)
    except TypeError as error:
        names = ", ".join(inspect.signature(model.forward).parameters)
        what = f"the forward of {type(model).__name__} takes several inputs ({names}): {error}"
        raise Unsupported(f"{what}. Give an example of them all, as a tuple or as a dict") from error
    before, drawn = trace.dense_copies(model.named_buffers()), torch.get_rng_state()
    attributes = lambda: [{name: id(v) for name, v in vars(m).items()} for m in model.modules()]  # noqa: E731
    kept = attributes()  # numbers that are not given anew meanwhile, as `preserved` holds what they stand for
    with torch.no_grad(), named_failure(x, "the model cannot take x, the example"):
        logits = call(model, x)
    if not isinstance(logits, Tensor) or not logits.dim():
        what = f"a {type(logits).__name__}, in which there is no tensor of logits"
        what = "a single number first, such as a loss" if isinstance(logits, Tensor) else what
        raise Unsupported(f"the model returns {what}: wrap it, so that the logits come first")
    changed = [name for name, (buffer, old) in before.items() if not torch.equal(buffer, old)]
    if changed or kept != attributes() or logits.device.type != "cpu" or not torch.equal(drawn, torch.get_rng_state()):
        why = "it draws random numbers" if kept == attributes() else "each changes an attribute of its modules"
        refuse_changing(model, x, logits, f"each changes the buffer {changed[0]}" if changed else why)
    return logits, [f"a forward pass changes the buffer {n}, which the chain may leave as it is" for n in changed[:1]]


def _failure(model: nn.Module, way: str, error: Exception) -> str:
    """Say why a way of tracing failed, and in which module."""
    names = {id(module): f" in {name}" for name, module in model.named_modules() if name}
    frames = [id(frame.f_locals.get("self")) for frame, _ in traceback.walk_tb(error.__traceback__)]
    place = [names[module] for module in frames if module in names][-1:]
    return f"{way}{''.join(place)}: {next(iter(str(error).strip().splitlines()), repr(error))}"


def _first_right_chain(
    model: nn.Module, x: Any, known: tuple[Tensor | None, list[str]], makers: dict[str, Maker],
    by_hand: Sequence[str] | None, stream: str | None,
) -> tuple[Unravelled, list[str]]:
    """Try the ways of tracing until one gives a chain that computes what the model does; return it, and remarks.

    ``known`` are the model's logits for the example, and what there is to remark on that pass.
    """
    logits, remarks = known
    failures: list[str] = []
    refusal: Unsupported | None = None
    ways = ["torch.fx"] if x is None else ["torch.fx", "torch.export"]
    while ways:
        try:
            with redirect_stderr(io.StringIO()):  # torch.export and torch.fx print whole graphs where they fail
                with preserved(model), warnings.catch_warnings():  # a forward may leave proxies in its module
                    warnings.simplefilter("ignore")  # of torch and of the model, which are theirs to give in a pass
                    if ways[0] == "torch.fx":
                        traced = trace.trace_symbolically(model, x, map(model.get_submodule, makers))
                    else:
                        trace.refuse_hooks(model, layers=True)
                        traced = trace.trace_by_export(model, x)
                reading, stretches, found, notes = read(model, traced, makers, by_hand, stream)
                chain = Unravelled(*make_parts(model, x, reading, stretches, makers))
                chain.notes = [*chain.notes, *notes]
                outputs = number(chain, x)
                if logits is not None and outputs is not None:
                    refuse_unequal(chain, chain._origin, x, logits, outputs)
            return chain, remarks + found
        except NotABlock as error:
            makers = {name: maker for name, maker in makers.items() if name != str(error)}
            remarks.append(f"{error} is called with more than its state: its graph tells its units, not its class")
        except Exception as error:
            refusal = refusal or (error if isinstance(error, Unsupported) else None)
            failures.append(_failure(model, ways.pop(0), error))
    if refusal is not None:
        raise refusal
    hint = "" if x is not None else " Give an example input: unravel(model, x)."
    kinds = {parameter.kind.name for parameter in inspect.signature(model.forward).parameters.values()}
    if named := not kinds & {"VAR_POSITIONAL", "VAR_KEYWORD"}:  # others only torch.export traces, and looks into blocks
        hint += " If that happens within its blocks, register their class with block_units: those are not looked into."
    why = f"its control flow depends on the data, or it leaves PyTorch ({'; '.join(failures)})"
    remedy = "a wrapper whose forward, with named arguments, calls stem, blocks and head in turn"
    hint += f" {'Otherwise write' if named else 'Write'} {remedy}"
    raise Unsupported(f"{type(model).__name__} cannot be traced: {why}.{hint}")
