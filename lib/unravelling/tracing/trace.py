"""Trace a model: turn one forward pass into a graph of operations, in which no operation works in place.

Here is also what a model is called with, which of its outputs are the logits, and what of it is preserved meanwhile.
"""

from __future__ import annotations

import builtins
import copy
import inspect
import logging
import operator
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial, reduce
from typing import Any, cast
from unittest.mock import patch

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves, tree_map_only, tree_unflatten

from ..batches import LABELS


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
    """Return a model's logits for an input, of which it is handed a copy, since it may overwrite it."""
    args, kwargs = tree_map_only(Tensor, torch.clone, arguments(x))
    return logits_of(model(*args, **kwargs))


@contextmanager
def preserved(model: nn.Module, weights: bool = False) -> Iterator[None]:
    """Put a model into eval mode for the duration of a ``with`` block, and undo all that happens to it meanwhile.

    Attributes and the tensors, lists and dicts among them, buffers to the last byte, modes, and the state of the random
    number generators come back; with ``weights``, of which there is a copy then, parameters as well, and Unsupported is
    raised after a block in which one changed.
    """
    parts = [part for m in model.modules() for part in (vars(m), *vars(m).values()) if isinstance(part, (dict, list))]
    before, parameters = [copy.copy(part) for part in parts], dense_copies(model.named_parameters() if weights else ())
    buffers, plain = dense_copies(model.named_buffers()), dense_copies(_plain(model))
    configs = [getattr(m, "config", None) for m in model.modules()]
    devices = {p.device.index for p in model.parameters() if p.is_cuda} - {None}
    with torch.random.fork_rng(devices=sorted(devices)), ExitStack() as stack:
        for config in configs:
            if getattr(config, "use_cache", False):  # of keys and values: no part of a pass
                stack.enter_context(patch.object(config, "use_cache", False))
        try:
            model.eval()
            yield
        finally:
            for part, entries in zip(parts, before, strict=True):
                part.clear()
                (part.update if isinstance(part, dict) else part.extend)(entries)
            same = partial(torch.isclose, rtol=0, atol=0, equal_nan=True)
            changed = [name for name, (p, old) in parameters.items() if not (torch.equal(p, old) or same(p, old).all())]
            for tensor, old in [*buffers.values(), *plain.values(), *(parameters[name] for name in changed)]:
                if not torch.equal(tensor, old):
                    tensor.data.copy_(old)
            if changed:
                what = f"changes the parameter {changed[0]}, as where LoRA is merged or weights are rescaled once"
                remedy = "call model.eval(), then the model once, before unravel"
                raise Unsupported(f"eval mode, or a forward pass in it, {what}: {remedy}")


def _plain(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors among a model's attributes, and in lists and dicts there, that are no buffers, by number."""
    values = [v for m in model.modules() for name, v in vars(m).items() if name not in ("_parameters", "_buffers")]
    yield from ((str(i), t) for i, t in enumerate(tree_leaves(values)) if isinstance(t, Tensor) and not t.requires_grad)


def dense_copies(named: Iterable[tuple[str, Tensor]]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the dense tensors that have values, by name, each with a copy: others cannot be compared."""
    dense = {name: t for name, t in named if t.layout == torch.strided and not t.is_meta}
    return {name: (tensor, tensor.detach().clone()) for name, tensor in dense.items()}


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
    guards: Callable[..., Any] | None = None  # raises AssertionError for inputs that the graph is not right for
    replaced: dict[str, nn.Module] = field(default_factory=dict)  # copies of layers in place, which are not

    def get(self, target: Any) -> Any:
        """Return the module, parameter or buffer that a node's target names."""
        return self.replaced.get(target) or self.lookup(target)

    def copy(self) -> tuple[Traced, dict[fx.Node, fx.Node]]:
        """Return the same with a graph of its own, whose node stands for which one of this."""
        graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        for node in self.graph.nodes:
            copies[node] = graph.node_copy(node, copies.__getitem__)
        inputs = {copies[node]: name for node, name in self.inputs.items()}
        return replace(self, graph=graph, inputs=inputs, output=copies[self.output]), copies


def name_of(node: fx.Node) -> str:
    """Return the plain name of a node's operation, such as ``"add"``."""
    target = node.target
    if isinstance(target, str):
        return target
    packet = getattr(target, "overloadpacket", None)
    return packet.__name__ if packet is not None else getattr(target, "__name__", str(target))


def calls_of(node: fx.Node) -> Iterator[tuple[str, str]]:
    """Yield the module calls around a node, outermost first, each as its key and the name of the module."""
    for key, (name, _) in (node.meta.get("nn_module_stack") or {}).items():
        name = str(name).removeprefix("L['self'].").partition("@")[0]
        if name and not name.startswith(("_empty", "L['self']")):
            number = str(key).partition("@")[2]
            yield (f"{name}@{number}" if number else name), name


def _is_layer(m: nn.Module) -> bool:
    """Whether a module is a layer of a library, parametrized or not, known to hold no residual addition."""
    library = next(k.__module__ for k in type(m).__mro__ if not k.__module__.startswith("torch.nn.utils"))
    if library.startswith("torch.nn.modules") or isinstance(m, _BatchNorm):
        return not isinstance(m, nn.Sequential) and "Transformer" not in type(m).__name__
    return not any(m.children()) and library.startswith(("timm.layers", "torchvision.ops"))


def refuse_hooks(model: nn.Module, *, layers: bool) -> None:
    """Raise Unsupported for a hook on a module that a chain takes apart, where the hook would never be called.

    Hooks on layers that stay whole are called in the chain as in the model, unless ``layers`` are taken apart, too.
    Those of `torch.nn.utils`, such as ``weight_norm``, belong to the layer, those of transformers change nothing.
    """
    tables = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    for name, module in model.named_modules():
        hooks = [hook for table in tables for hook in getattr(module, table).values()]
        home = lambda hook: getattr(hook, "__module__", type(hook).__module__)  # noqa: E731
        own = [hook for hook in hooks if not home(hook).startswith(("torch.nn.utils", "transformers."))]
        if own and (layers or not _is_layer(module)):
            what = f"{name or 'the model'} has a hook ({getattr(own[0], '__name__', type(own[0]).__name__)})"
            why = "which a chain would not call, since it takes that module apart"
            remedy = "Remove it (handle.remove()) before unravel, and put hooks on the chain's parts instead"
            raise Unsupported(f"{what}, {why}. {remedy}: chain.units[0].register_forward_hook(…)")


class _Proxy(fx.Proxy):
    """A proxy that may be assigned to in part, and that notes which operators work in place."""

    def __setitem__(self, index: Any, value: Any) -> None:
        before = fx.Proxy(self.node, self.tracer)
        self.node = self.tracer.create_proxy("call_function", assigned, (before, index, value), {}).node


def _recorded(operation: Callable[..., Any]) -> Callable[..., fx.Proxy]:
    return lambda proxy, value: proxy.tracer.create_proxy("call_function", operation, (proxy, value), {})


IN_PLACE = ("iadd", "isub", "imul", "itruediv", "imatmul")
for _name in IN_PLACE:
    setattr(_Proxy, f"__{_name}__", _recorded(getattr(operator, _name)))


def assigned(x: Tensor, index: Any, value: Any) -> Tensor:
    """Return a copy of a tensor in which a part is replaced."""
    x = x.clone()
    x[index] = value
    return x


def scattered(x: Tensor, value: Any, dim: int = 0, *ends: int | None) -> Tensor:
    """Return a copy of a tensor in which a slice is replaced, as ``aten.slice_scatter``, of complex numbers, too."""
    return assigned(x, (slice(None),) * (dim % x.dim()) + (slice(*ends) if ends else slice(None),), value)


def copied(x: Tensor, value: Tensor, *_: Any) -> Tensor:
    """Return a value in the shape, type and layout of another one, as ``aten.copy`` does, which has no derivative."""
    return torch.empty_like(x).copy_(value)


def identity(x: Tensor) -> Tensor:
    """Return a value as it is: it stands for a state where other operations read the same value, too."""
    return x


class _Tracer(fx.Tracer):
    """Symbolic tracing that does not look into ``leaves``, nor into layers known to hold no residual addition."""

    def __init__(self, leaves: Iterable[nn.Module]) -> None:
        super().__init__()
        self.leaves = {id(module) for module in leaves}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return id(m) in self.leaves or _is_layer(m)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)


def _length(x: Any, length: Callable[[Any], int] = len) -> Any:
    """Return the length of anything, which for a tensor while it is traced is a size that stays free."""
    if isinstance(x, fx.Proxy):
        return x.size(0)
    return x.shape[0] if isinstance(x, Tensor) and x.dim() else length(x)


@contextmanager
def _lengths_and_masks() -> Iterator[None]:
    """Let a tensor's ``len`` stay free, and nn.Transformer not ask numbers, for speed alone, if the mask is causal."""
    hint = lambda mask, is_causal=None, size=None: is_causal is True  # noqa: E731
    module = nn.modules.module  # hooks of all modules would be called with proxies
    with patch.object(builtins, "len", _length), \
         patch.dict(module._global_forward_hooks, clear=True), \
         patch.dict(module._global_forward_pre_hooks, clear=True), \
         patch.object(torch, "is_tensor", lambda x: isinstance(x, (Tensor, fx.Proxy))), \
         patch.object(nn.modules.transformer, "_detect_is_causal_mask", hint, create=True):
        yield


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
    with _lengths_and_masks():
        graph = _Tracer(leaves).trace(model, concrete_args=defaults or None)
    constants = {n.target: getattr(model, n.target) for n in graph.nodes if n.op == "get_attr" and "." not in n.target}
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    inputs = {n: name for n, name in zip(placeholders, signature.parameters, strict=True) if name in given}
    output = logits_of(_fields(next(node for node in graph.nodes if node.op == "output").args[0]))
    if not isinstance(output, fx.Node):
        raise TypeError("the output is no tensor")

    def lookup(target: str) -> Any:
        return constants[target] if target in constants else operator.attrgetter(target)(model)

    if x is not None:
        with torch.no_grad():
            _Shapes(model, graph=graph).run(*map(_copied, bound.arguments.values()))
    return _out_of_place(Traced(graph, lookup, inputs, output, "torch.fx"))


def _fields(output: Any) -> Any:
    """Return what a dataclass or a named tuple, which torch.fx takes for a call, is made of."""
    kind = output.target if isinstance(output, fx.Node) and output.op == "call_function" else None
    names = getattr(kind, "_fields", None) or list(getattr(kind, "__dataclass_fields__", ()))
    return dict(zip(names, output.args, strict=False)) | output.kwargs if names else output


class _Shapes(fx.Interpreter):
    """Runs a graph, and notes the shapes of all values."""

    extra_traceback = False

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            n.meta |= {"shape": value.shape, "dtype": value.dtype}
        return value


def _copied(x: Any) -> Any:
    """Copy the tensors in an example: tracing may leave marks on them that a second attempt stumbles over."""
    return tree_map_only(Tensor, lambda t: t.detach().clone(), x)


def trace_by_export(model: nn.Module, x: Any) -> Traced:
    """Trace a model with torch.export, at sizes of the batch (and of token sequences) that stay free if they can."""
    given = arguments(x)
    if {len(t) for t in tree_leaves(given) if isinstance(t, Tensor) and t.dim()} == {1}:
        # torch.export takes a size of one for a constant, so that a batch of one is traced as one of two
        doubled = tree_map_only(Tensor, lambda t: torch.cat([t, t]) if t.dim() else t, given)
        with suppress(Exception):
            traced = _export(model, *doubled)
            if not any(isinstance(sizes[0], int) for sizes in traced.sizes.values()):
                return traced
    return _export(model, *given)


def _export(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Traced:
    from torch.fx.experimental.symbolic_shapes import is_concrete_int  # sympy with it: as slow to import as torch

    before = logging.root.manager.disable
    logging.disable()  # a failure is told by its exception
    try:
        with _lengths_and_masks():
            copies, shapes = _copied((args, kwargs)), torch.export.ShapesCollection()
            for t in tree_leaves(copies):
                if isinstance(t, Tensor):
                    shapes[t] = dict.fromkeys(free_dims(t), torch.export.Dim.AUTO)
            program = torch.export.export(model, *copies, dynamic_shapes=shapes, strict=False)
    except Exception:
        with _lengths_and_masks():
            program = torch.export.export(model, *_copied((args, kwargs)), strict=False)
    finally:
        logging.disable(before)
    writes = [getattr(getattr(node.target, "_schema", None), "is_mutable", False) for node in program.graph.nodes]
    if any(writes) or any(name_of(node) == "wrap_with_autocast" for node in program.graph.nodes):
        program = program.run_decompositions({})  # as plain operations, none of which writes to a tensor
    module = program.module()
    instead = {torch.ops.aten.copy.default: copied, torch.ops.aten.view.default: torch.ops.aten.reshape.default}
    instead[torch.ops.aten.slice_scatter.default] = scattered
    for node in module.graph.nodes:  # with gradients, attention may lay out its results so that no view is possible
        node.target = instead.get(node.target, node.target)
    nodes = module.graph.nodes
    placeholders = [node for node in nodes if node.op == "placeholder"]
    names = [str(node.target) for node in placeholders]
    parameters = list(inspect.signature(model.forward).parameters.values())[: len(placeholders)]
    if not kwargs and len(parameters) == len(placeholders) and parameters[-1].kind != inspect.Parameter.VAR_POSITIONAL:
        names = [parameter.name for parameter in parameters]
    inputs = dict(zip(placeholders, names, strict=True))
    guards = getattr(getattr(module, "_guards_fn", None), "forward", None)
    try:
        if guards is not None:
            guards(*tree_leaves((args, kwargs)))
    except Exception:  # it cannot say its own names, as with **kwargs
        guards = None
    _drop_casts(module.graph)
    results = tree_leaves(next(node for node in nodes if node.op == "output").args)
    output = logits_of(tree_unflatten(results, program.call_spec.out_spec))
    sizes = {}
    for node in nodes:
        if isinstance(node.meta.get("val"), Tensor):
            node.meta |= {"shape": node.meta["val"].shape, "dtype": node.meta["val"].dtype}
            shape = node.meta["shape"]
            if node in inputs and (len(inputs) > 1 or any(map(is_concrete_int, shape))):
                sizes[inputs[node]] = tuple(int(size) if is_concrete_int(size) else str(size) for size in shape)
    lookup = operator.attrgetter
    traced = Traced(module.graph, lambda t: lookup(t)(module), inputs, output, "torch.export", sizes, guards)
    return _out_of_place(traced)


def free_dims(t: Tensor) -> range:
    """Return which sizes of an input are to stay free: the batch, and that of sequences."""
    return range(t.dim() if not t.is_floating_point() or t.dim() == 3 else min(t.dim(), 1))


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

    Unsupported is raised where it is read by another name.
    """
    order = {node: i for i, node in enumerate(traced.graph.nodes)}
    for node in list(traced.graph.nodes):
        name, base = name_of(node), node.args[0] if node.args else None
        if node.op in ("placeholder", "output", "get_attr") or not isinstance(base, fx.Node):
            continue
        ends_in_place = name.endswith("_") and not name.endswith("__")
        where = ["the forward pass", *(inner for _, inner in calls_of(node))][-1]
        if node.op == "call_module":
            module = traced.get(node.target)
            if not getattr(module, "inplace", False) or any(module.parameters()):
                continue
            traced.replaced[str(node.target)] = other = copy.copy(module)
            other.__dict__ = dict(vars(module), inplace=False)
        elif node.kwargs.get("inplace"):
            node.kwargs = dict(node.kwargs, inplace=False)
        elif name in IN_PLACE:
            node.target = getattr(operator, name[1:])
        elif ends_in_place:
            node.target = name[:-1] if node.op == "call_method" else getattr(torch, name[:-1], node.target)
        else:
            continue
        base.replace_all_uses_with(node, delete_user_cb=lambda user, node=node: order[user] > order[node])
        if not node.users and base.op != "get_attr":
            what = f"{where} writes to a tensor in place and reads it by another name, as through a view"
            raise Unsupported(f"{what}: a chain cannot follow that. Write y = y + … instead")
    return traced


FUSED = {"lerp", "addcmul", "addcdiv", "addmm", "baddbmm", "index_add", "scatter_add"}
"""Operations that add a multiple of their first argument to what they make of zeros in its place."""


def split_sums(traced: Traced, stream: Collection[fx.Node]) -> bool:
    """Write additions that are part of an operation on two values of the stream as ones of their own; tell if any is.

    Such are those of ``FUSED``, the sum or mean over a stack, and the 0 of Python's ``sum``.
    """
    graph, stream, found = traced.graph, set(stream), False
    for node in [node for node in graph.nodes if node in stream]:

        def call(function: Callable[..., Any], *args: Any, node: fx.Node = node) -> fx.Node:
            with graph.inserting_before(node):
                new = graph.call_function(function, args)
            new.meta = dict(node.meta, split=True)
            return new

        name, options = name_of(node), dict(node.kwargs)
        args = [*([options.pop("input")] if "input" in options else []), *node.args]
        active = [isinstance(arg, fx.Node) and arg in stream for arg in (*args, *options.values())]
        stack = next((a for a in args[:1] if name in ("sum", "mean") and name_of(a) == "stack"), None)
        if name == "add" and len(args) > 1 and args[0] == 0 and isinstance(args[1], fx.Node):
            new = args[1]
        elif stack is not None:
            over = [*args[1:], *options.values()]
            along = [*stack.args[1:], *stack.kwargs.values(), 0][0]
            if over not in ([along], [[along]]):
                continue
            terms = cast("list[fx.Node]", stack.args[0])
            new = reduce(partial(call, torch.add), terms)
            new = call(operator.truediv, new, len(terms)) if name == "mean" else new
        elif name in FUSED and active[0] and any(active[1:]):
            kept = options.get("beta", 1)
            kept = call(operator.sub, 1, [*args, *options.values()][2]) if name == "lerp" else kept
            zeros = call(torch.zeros_like, args[0])
            with graph.inserting_before(node):
                added = graph.node_copy(node)
            added.args, added.kwargs, added.meta = (zeros, *args[1:]), options, dict(node.meta, split=True)
            new = call(torch.add, args[0] if kept == 1 else call(torch.mul, args[0], kept), added)
        else:
            continue
        found = True
        stream.add(new)
        node.replace_all_uses_with(new)
        traced.output = new if node is traced.output else traced.output
        graph.erase_node(node)
    return found
