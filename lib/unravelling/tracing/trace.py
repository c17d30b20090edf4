"""Trace a model: turn one forward pass into a graph of operations, in which no operation works in place.

Here is also what a model is called with, which of its outputs are the logits, and what of it is preserved meanwhile.
"""

from __future__ import annotations

import copy
import inspect
import logging
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves, tree_map

from ..batches import LABELS

IN_PLACE = {operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.imatmul}


class Unsupported(ValueError):
    """A model that no chain computes, with what was found and what to do."""


# ---------------------------------------------------------------- the model, and calling it


def arguments(x: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the positional and keyword arguments that an input stands for: a dict is keywords, less its labels."""
    if isinstance(x, Mapping):
        return (), {name: value for name, value in x.items() if name not in LABELS}
    return (tuple(x), {}) if isinstance(x, (tuple, list)) else ((x,), {})


def logits_of(output: Any) -> Any:
    """Return the logits in a model's output: itself, its ``logits`` or ``out``, or its first entry."""
    if isinstance(output, (Tensor, fx.Node)):
        return output
    for name in ("logits", "out"):
        found = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
        if found is not None:
            return found
    entries = list(output.values()) if isinstance(output, Mapping) else output
    return logits_of(entries[0]) if isinstance(entries, (tuple, list)) and entries else output


def call(model: nn.Module, x: Any) -> Any:
    """Call a model on a tensor, a tuple of arguments, or a dict of keyword arguments; return its logits."""
    args, kwargs = arguments(x)
    return logits_of(model(*args, **kwargs))


@contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode for the duration of a ``with`` block, and undo all that happens to it meanwhile.

    Attributes, buffers to the last byte, modes, and the state of the random number generators come back.
    """
    kinds = ("_parameters", "_buffers", "_modules")
    before = [(vars(m), dict(vars(m)), {k: dict(vars(m)[k]) for k in kinds}) for m in model.modules()]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    config = getattr(model, "config", None)
    cached = getattr(config, "use_cache", None)  # a cache of keys and values is no part of a forward pass
    devices = {p.device.index for p in model.parameters() if p.is_cuda} - {None}
    with torch.random.fork_rng(devices=sorted(devices)):
        try:
            model.eval()
            if config is not None and cached:
                config.use_cache = False
            yield
        finally:
            if config is not None and cached:
                config.use_cache = cached
            for now, attributes, tables in before:
                for name in [name for name in now if name not in attributes]:
                    del now[name]
                now.update(attributes)
                for kind, table in tables.items():
                    now[kind].clear()
                    now[kind].update(table)
            with torch.no_grad():
                for buffer, old in buffers:
                    if not torch.equal(buffer, old):
                        buffer.copy_(old)


# ---------------------------------------------------------------- graphs


@dataclass
class Traced:
    """A model as a graph of operations, and where the modules, parameters and buffers are that its nodes name."""

    graph: fx.Graph
    lookup: Callable[[str], Any]  # returns what a node's target names
    inputs: dict[fx.Node, str]  # the placeholders of the example's arguments, and the names of those
    output: fx.Node  # the logits
    by: str  # "torch.fx" or "torch.export"
    sizes: dict[str, tuple[int | str, ...]] = field(default_factory=dict)  # of inputs: fixed, or a name for equal ones
    replaced: dict[str, nn.Module] = field(default_factory=dict)  # copies of layers in place, which are not

    def get(self, target: Any) -> Any:
        """Return the module, parameter or buffer that a node's target names."""
        return self.replaced.get(target) or self.lookup(target)


def name_of(node: fx.Node) -> str:
    """Return the plain name of a node's operation, such as ``"add"``."""
    target = node.target
    if isinstance(target, str):
        return target
    packet = getattr(target, "overloadpacket", None)
    return packet.__name__ if packet is not None else getattr(target, "__name__", str(target))


class _Tracer(fx.Tracer):
    """Symbolic tracing that does not look into ``leaves``, nor into layers known to hold no residual addition."""

    def __init__(self, leaves: Iterable[nn.Module]) -> None:
        super().__init__()
        self.leaves = {id(module) for module in leaves}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if id(m) in self.leaves or isinstance(m, _BatchNorm):
            return True
        library = type(m).__module__
        if library.startswith("torch.nn"):
            return not isinstance(m, (nn.Sequential, nn.TransformerEncoder, nn.TransformerEncoderLayer, nn.Transformer))
        return not any(m.children()) and library.startswith(("timm.layers", "torchvision.ops"))


def trace_symbolically(model: nn.Module, x: Any, leaves: Iterable[nn.Module]) -> Traced:
    """Trace a model with torch.fx; ``leaves`` become one operation each.

    The example ``x`` tells the arguments, and all others keep their defaults; None stands for those without a default.
    """
    signature = inspect.signature(model.forward)
    kinds = {parameter.kind for parameter in signature.parameters.values()}
    if kinds & {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD} or "forward" in vars(model):
        raise TypeError("symbolic tracing needs a forward with named arguments")
    if x is None:
        given = [n for n, p in signature.parameters.items() if p.default is inspect.Parameter.empty]
    else:
        args, kwargs = arguments(x)
        bound = signature.bind(*args, **kwargs)
        given = list(bound.arguments)
        bound.apply_defaults()
    defaults = {name: p.default for name, p in signature.parameters.items() if name not in given}
    graph = _Tracer(leaves).trace(model, concrete_args=defaults or None)
    constants = {n.target: getattr(model, n.target) for n in graph.nodes if n.op == "get_attr" and "." not in n.target}
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    inputs = {n: name for n, name in zip(placeholders, signature.parameters, strict=True) if name in given}
    output = logits_of(next(node for node in graph.nodes if node.op == "output").args[0])
    if not isinstance(output, fx.Node):
        raise TypeError("the output is no tensor")

    def lookup(target: str) -> Any:
        return constants[target] if target in constants else operator.attrgetter(target)(model)

    if x is not None:
        with torch.no_grad():
            _Shapes(model, graph=graph).run(*map(_copied, bound.arguments.values()))
    return _out_of_place(Traced(graph, lookup, inputs, output, "torch.fx"))


class _Shapes(fx.Interpreter):
    """Runs a graph, and notes the shapes of all values."""

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            n.meta["shape"] = value.shape
        return value


def _copied(x: Any) -> Any:
    """Copy the tensors in an example: tracing may leave marks on them that a second attempt stumbles over."""
    return tree_map(lambda t: t.detach().clone() if isinstance(t, Tensor) else t, x)


def trace_by_export(model: nn.Module, x: Any) -> Traced:
    """Trace a model with torch.export, at sizes of the batch (and of token sequences) that stay free if they can."""
    given = arguments(x)
    if {len(t) for t in tree_leaves(given) if isinstance(t, Tensor) and t.dim()} == {1}:
        # torch.export takes a size of one for a constant, so that a batch of one is traced as one of two
        doubled = tree_map(lambda t: torch.cat([t, t]) if isinstance(t, Tensor) and t.dim() else t, given)
        try:
            traced = _export(model, *doubled)
        except Exception:
            return _export(model, *given)
        if not any(isinstance(sizes[0], int) for sizes in traced.sizes.values()):
            return traced
    return _export(model, *given)


def _export(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Traced:
    from torch.fx.experimental.symbolic_shapes import is_concrete_int  # sympy with it: as slow to import as torch

    def free_sizes(t: Any) -> Any:
        if not isinstance(t, Tensor):
            return None
        dims = range(t.dim()) if not t.is_floating_point() or t.dim() == 3 else range(min(t.dim(), 1))
        return dict.fromkeys(dims, torch.export.Dim.AUTO)

    names = list(inspect.signature(model.forward).bind(*args, **kwargs).arguments)
    before = logging.root.manager.disable
    logging.disable()  # a failure is told by its exception
    try:
        shapes = {name: free_sizes(t) for name, t in zip(names, [*args, *kwargs.values()], strict=True)}
        program = torch.export.export(model, *_copied((args, kwargs)), dynamic_shapes=shapes, strict=False)
    except Exception:
        program = torch.export.export(model, *_copied((args, kwargs)), strict=False)
    finally:
        logging.disable(before)
    module = program.module()
    with torch.no_grad():
        output = model(*args, **kwargs)
    position = next(i for i, leaf in enumerate(tree_leaves(output)) if leaf is logits_of(output))
    nodes = module.graph.nodes
    placeholders = [node for node in nodes if node.op == "placeholder"]
    names = [str(node.target) for node in placeholders]
    if not kwargs:
        names = list(inspect.signature(model.forward).parameters)[: len(placeholders)]
    inputs = dict(zip(placeholders, names, strict=True))
    _drop_casts(module.graph)
    results = tree_leaves(next(node for node in nodes if node.op == "output").args)
    sizes = {}
    for node in nodes:
        if isinstance(node.meta.get("val"), Tensor):
            node.meta["shape"] = shape = node.meta["val"].shape
            if node in inputs and (len(inputs) > 1 or any(map(is_concrete_int, shape))):
                sizes[inputs[node]] = tuple(int(size) if is_concrete_int(size) else str(size) for size in shape)
    lookup = operator.attrgetter
    traced = Traced(module.graph, lambda t: lookup(t)(module), inputs, results[position], "torch.export", sizes)
    return _out_of_place(traced)


def _drop_casts(graph: fx.Graph) -> None:
    """Remove casts to the type that a value has already: such a cast returns its argument, the stream itself."""
    for node in list(graph.nodes):
        base = node.args[0] if node.args else None
        if name_of(node) in ("to", "_to_copy") and isinstance(base, fx.Node):
            new, old = node.meta.get("val"), base.meta.get("val")
            if new is not None and old is not None and (new.dtype, new.device) == (old.dtype, old.device):
                node.replace_all_uses_with(base)


def _out_of_place(traced: Traced) -> Traced:
    """Replace operations in place by ordinary ones: what reads the overwritten value later reads the new one.

    Raises:
        Unsupported: part of a tensor is assigned to.
    """
    order = {node: i for i, node in enumerate(traced.graph.nodes)}
    for node in list(traced.graph.nodes):
        name, base = name_of(node), node.args[0] if node.args else None
        if node.op in ("placeholder", "output", "get_attr") or not isinstance(base, fx.Node):
            continue
        schema = getattr(node.target, "_schema", None)
        mutable = schema is not None and schema.is_mutable
        ends_in_place = name.endswith("_") and not name.endswith("__")
        if node.op == "call_module":
            module = traced.get(node.target)
            if not getattr(module, "inplace", False) or any(module.parameters()):
                continue
            traced.replaced[str(node.target)] = other = copy.copy(module)
            other.__dict__ = dict(vars(module), inplace=False)
        elif node.kwargs.get("inplace"):
            node.kwargs = dict(node.kwargs, inplace=False)
        elif node.target in IN_PLACE:
            node.target = getattr(operator, name[1:])
        elif node.target is operator.setitem or (mutable and name in ("copy_", "fill_")):
            if base.op == "get_attr":
                continue  # a buffer
            raise Unsupported(
                f"the forward pass assigns to a part of the tensor {base.name}: a chain cannot follow that. Write the "
                "new tensor with torch.cat or torch.where instead"
            )
        elif ends_in_place and node.op == "call_method":
            node.target = name[:-1]
        elif mutable:
            node.target = getattr(getattr(torch.ops.aten, name[:-1]), node.target._overloadname)
        elif ends_in_place and hasattr(torch, name[:-1]):
            node.target = getattr(torch, name[:-1])
        else:
            continue
        base.replace_all_uses_with(node, delete_user_cb=lambda user, node=node: order[user] > order[node])
    return traced
