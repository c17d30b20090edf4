"""The graph half of `unravelling.unravel`: trace a model, find its residual additions, and cut it at its states.

A *cut* is a value through which everything must pass that flows from the input to the logits. Between two neighbouring
cuts lies one operation, or a *bead*: parallel ways from the first cut to the second. A bead that ends in an addition is
a residual unit if one operand is the skip and another, the branch, holds weights. What lies between beads belongs to
the unit before it (a ReLU or a norm after the sum), to the unit after it (a norm and a ReLU before both ways, which
each of them then computes for itself), to the stem or to the head.

Values that later blocks need besides the stream, such as an attention mask or position numbers, do not descend from the
stream: the stem computes them and leaves them in a `Context` for the units.
"""

from __future__ import annotations

import copy
import inspect
import logging
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves, tree_map

from .batches import LABELS, eval_mode

ADD = {operator.add, operator.iadd, torch.add, torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor, "add", "__add__"}
SUB = {operator.sub, operator.isub, torch.sub, torch.ops.aten.sub.Tensor, torch.ops.aten.sub_.Tensor, "sub", "__sub__"}
OUT_OF_PLACE = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
    operator.imatmul: operator.matmul,
}
MERGES = {"cat", "concat", "concatenate", "stack"}
SHAPES = {"shape", "device", "dtype", "ndim", "is_cuda", "layout", "requires_grad"}
NO_DATA = {  # operations whose result carries no gradient of their operand
    *("size", "dim", "numel", "stride", "sym_size", "sym_numel", "sym_stride", "len", "is_floating_point"),
    *("new_zeros", "new_ones", "new_full", "new_empty", "new_tensor"),
    *("zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like", "arange"),
    *("eq", "ne", "lt", "le", "gt", "ge", "__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__", "is_", "is_not"),
    *("logical_not", "logical_and", "logical_or", "isnan", "isinf", "argmax", "argmin", "bool", "long", "int"),
    *("__and__", "__or__", "__invert__", "bitwise_and", "bitwise_or", "bitwise_not", "any", "all"),
}


class Unsupported(ValueError):
    """A model that no chain computes, with what was found and what to do."""


# ---------------------------------------------------------------- the model, and calling it


def arguments(x: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the positional and keyword arguments that an input stands for: a dict is keywords, less its labels."""
    if isinstance(x, Mapping):
        return (), {name: value for name, value in x.items() if name not in LABELS}
    return (tuple(x), {}) if isinstance(x, (tuple, list)) else ((x,), {})


def run(model: nn.Module, x: Any) -> Any:
    """Call a model on a tensor, a tuple of arguments, or a dict of keyword arguments."""
    args, kwargs = arguments(x)
    return model(*args, **kwargs)


def logits_of(output: Any) -> Any:
    """Return the logits in a model's output: itself, its ``logits`` or ``out``, or its first entry."""
    for name in ("logits", "out"):
        if isinstance(output, Mapping) and name in output:
            return output[name]
        if not isinstance(output, (Tensor, fx.Node)) and hasattr(output, name):
            return getattr(output, name)
    if isinstance(output, (tuple, list)) and output:
        return logits_of(output[0])
    if isinstance(output, Mapping) and output:
        return logits_of(next(iter(output.values())))
    return output


@contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode for the duration of a ``with`` block, and undo all that happens to it meanwhile.

    Attributes, buffers to the last byte, modes, and the state of the random number generators come back.
    """
    modules = list(model.modules())
    attributes = [dict(vars(module)) for module in modules]
    tables = [{k: dict(v) for k, v in vars(m).items() if k in ("_parameters", "_buffers", "_modules")} for m in modules]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    config = getattr(model, "config", None)
    cached = getattr(config, "use_cache", None)  # a cache of keys and values is no part of a forward pass
    devices = {p.device.index for p in model.parameters() if p.is_cuda}
    with torch.random.fork_rng(devices=[d for d in devices if d is not None]), eval_mode(model):
        try:
            if config is not None and cached:
                config.use_cache = False
            yield
        finally:
            if config is not None and cached:
                config.use_cache = cached
            for module, before, inner in zip(modules, attributes, tables, strict=True):
                now = vars(module)
                for name in [name for name in now if name not in before]:
                    del now[name]
                for name, value in before.items():
                    if now.get(name) is not value and name != "training":
                        now[name] = value
                for name, table in inner.items():
                    if (
                        now[name] != table
                        if name != "_buffers"
                        else any(now[name].get(k) is not table[k] for k in table)
                    ):
                        now[name].clear()
                        now[name].update(table)
            with torch.no_grad():
                for buffer, before_bytes in buffers:
                    if not torch.equal(buffer, before_bytes):
                        buffer.copy_(before_bytes)


# ---------------------------------------------------------------- tracing


@dataclass
class Traced:
    """A model as a graph of operations, with whatever the nodes refer to."""

    graph: fx.Graph
    lookup: Callable[[str], Any]
    inputs: dict[fx.Node, str]  # placeholders, and the arguments they stand for
    output: fx.Node
    by: str
    sizes: dict[str, tuple[int | None, ...]] = field(default_factory=dict)  # what tracing took for constants
    replaced: dict[str, nn.Module] = field(default_factory=dict)

    def get(self, target: str) -> Any:
        """Return the module, parameter or buffer that a node's target names."""
        return self.replaced.get(target, None) or self.lookup(target)


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
    """Trace a model with torch.fx; arguments that ``x`` does not give keep their defaults."""
    signature = inspect.signature(model.forward)
    kinds = {parameter.kind for parameter in signature.parameters.values()}
    if kinds & {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD} or "forward" in vars(model):
        raise TypeError("symbolic tracing needs a forward with named arguments")
    if x is None:
        given = [n for n, p in signature.parameters.items() if p.default is inspect.Parameter.empty]
    else:
        args, kwargs = arguments(x)
        given = list(signature.bind(*args, **kwargs).arguments)
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

    return Traced(graph, lookup, inputs, output, "torch.fx")


def trace_by_export(model: nn.Module, x: Any) -> Traced:
    """Trace a model with torch.export, at sizes of the batch (and of token sequences) that stay free if they can."""
    traced = _export(model, *tree_map(_two, arguments(x)))
    if any(sizes[0] is not None for sizes in traced.sizes.values()):  # then it must not be twice that of the example
        traced = _export(model, *arguments(x))
    return traced


def _export(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Traced:
    from torch.fx.experimental.symbolic_shapes import is_concrete_int  # sympy with it: as slow to import as torch

    free = torch.export.Dim.AUTO

    def free_sizes(t: Any) -> Any:
        if not isinstance(t, Tensor):
            return None
        dims = range(t.dim()) if not t.is_floating_point() or t.dim() == 3 else range(min(t.dim(), 1))
        return dict.fromkeys(dims, free)

    loggers = ("torch.fx.experimental.symbolic_shapes", "torch.export", "torch._export.non_strict_utils")
    with _quiet(*loggers):  # a failure is told by its exception
        try:
            names = list(inspect.signature(model.forward).bind(*args, **kwargs).arguments)
            shapes = {name: free_sizes(t) for name, t in zip(names, [*args, *kwargs.values()], strict=True)}
            program = torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)
        except Exception:
            program = torch.export.export(model, args, kwargs, strict=False)
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
    for node, name in inputs.items():
        shape = getattr(node.meta.get("val"), "shape", ())
        if any(map(is_concrete_int, shape)):
            sizes[name] = tuple(int(size) if is_concrete_int(size) else None for size in shape)
    lookup = operator.attrgetter
    return Traced(module.graph, lambda t: lookup(t)(module), inputs, results[position], "torch.export", sizes)


@contextmanager
def _quiet(*names: str) -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in names]
    before = [logger.disabled for logger in loggers]
    for logger in loggers:
        logger.disabled = True
    try:
        yield
    finally:
        for logger, disabled in zip(loggers, before, strict=True):
            logger.disabled = disabled


def _drop_casts(graph: fx.Graph) -> None:
    """Remove casts to the type that a value has already: such a cast returns its argument, the stream itself."""
    for node in list(graph.nodes):
        base = node.args[0] if node.args else None
        if name_of(node) not in ("to", "_to_copy") or not isinstance(base, fx.Node):
            continue
        new, old = node.meta.get("val"), base.meta.get("val")
        if new is not None and old is not None and (new.dtype, new.device) == (old.dtype, old.device):
            node.replace_all_uses_with(base)


def _two(t: Any) -> Any:
    """Repeat a batch of one: torch.export would take its size for a constant."""
    return torch.cat([t, t]) if isinstance(t, Tensor) and t.dim() and len(t) == 1 else t


# ---------------------------------------------------------------- reading a graph


def name_of(node: fx.Node) -> str:
    """Return the plain name of a node's operation, such as ``"add"``."""
    target = node.target
    if isinstance(target, str):
        return target
    packet = getattr(target, "overloadpacket", None)
    return packet.__name__ if packet is not None else getattr(target, "__name__", str(target))


def out_of_place(traced: Traced) -> None:
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
        if node.op == "call_module":
            module = traced.get(str(node.target))
            if not getattr(module, "inplace", False) or any(module.parameters()):
                continue
            module = copy.copy(module)
            module.__dict__ = dict(vars(module), inplace=False)
            traced.replaced[str(node.target)] = module
        elif node.kwargs.get("inplace"):
            node.kwargs = dict(node.kwargs, inplace=False)
        elif node.target in OUT_OF_PLACE:
            node.target = OUT_OF_PLACE[node.target]
        elif node.target is operator.setitem or (
            schema is not None and schema.is_mutable and name in ("copy_", "fill_")
        ):
            if base.op == "get_attr":
                continue  # a buffer
            raise Unsupported(
                f"the forward pass assigns to a part of the tensor {base.name}: a chain cannot follow that. Write the "
                "new tensor with torch.cat or torch.where instead"
            )
        elif name.endswith("_") and not name.endswith("__") and node.op == "call_method":
            node.target = name[:-1]
        elif schema is not None and schema.is_mutable:
            node.target = getattr(getattr(torch.ops.aten, name[:-1]), node.target._overloadname)
        elif name.endswith("_") and not name.endswith("__") and hasattr(torch, name[:-1]):
            node.target = getattr(torch, name[:-1])
        else:
            continue
        base.replace_all_uses_with(node, delete_user_cb=lambda user, node=node: order[user] > order[node])


Key = str
"""One call of a module: its name, and ``@1`` and so on for later calls."""


class Reading:
    """What is known of a traced model: where the stream runs, its cuts, and which module computes what."""

    def __init__(self, traced: Traced, main: str | None = None) -> None:
        self.traced = traced
        nodes = list(traced.graph.nodes)
        self.order = {node: i for i, node in enumerate(nodes)}
        self.source = self._source(main)
        self.active = self._active(nodes)
        if traced.output not in self.active:
            raise Unsupported(f"the logits do not depend on the input {traced.inputs[self.source]!r}")
        self.latest, self.constant = self._ancestors(nodes)
        self.cuts = self._cuts()
        self.shapes: dict[fx.Node, torch.Size] = {}

    def _source(self, main: str | None) -> fx.Node:
        inputs = self.traced.inputs
        preferred = (main, "inputs_embeds", "input_ids", "pixel_values")
        used = [node for node in inputs if node.users]
        if not used:
            raise Unsupported("the model uses none of its inputs")
        return next((n for name in preferred for n in used if inputs[n] == name), used[0])

    def _active(self, nodes: Sequence[fx.Node]) -> set[fx.Node]:
        """Return the stream: nodes that data flows through from the main input, and on to the logits."""
        reached = {self.source}
        for node in nodes:
            name = name_of(node)
            shape = name == "getattr" and node.args[1] in SHAPES
            cut = shape or name in NO_DATA or "assert" in name or "guard" in name
            if name == "to" and torch.bool in (*node.args, *node.kwargs.values()):
                cut = True
            if not cut and any(arg in reached for arg in node.all_input_nodes):
                reached.add(node)
        live = {self.traced.output}
        for node in reversed(nodes):
            if node in live:
                live.update(arg for arg in node.all_input_nodes if arg in reached)
        return reached & live

    def _ancestors(self, nodes: Sequence[fx.Node]) -> tuple[dict[fx.Node, int], dict[fx.Node, bool]]:
        """Return for every node the position of the last stream node it depends on, and whether on no input at all."""
        latest: dict[fx.Node, int] = {}
        constant: dict[fx.Node, bool] = {}
        for node in nodes:
            args = node.all_input_nodes
            own = self.order[node] if node in self.active else -1
            latest[node] = max([own, *(latest[arg] for arg in args)])
            constant[node] = node.op != "placeholder" and all(constant[arg] for arg in args)
        return latest, constant

    def _cuts(self) -> list[fx.Node]:
        stream = sorted(self.active, key=self.order.__getitem__)
        last_use = {n: max((self.order[u] for u in n.users if u in self.active), default=self.order[n]) for n in stream}
        cuts, open_until = [], -1
        for node in stream:
            if open_until <= self.order[node]:
                cuts.append(node)
            open_until = max(open_until, last_use[node])
        return cuts

    def stack(self, node: fx.Node) -> list[tuple[Key, str]]:
        """Return the module calls around a node, outermost first, with the modules' names."""
        stack = (node.meta.get("nn_module_stack") or {}).items()
        entries = []
        for key, (name, _) in stack:
            name = str(name).removeprefix("L['self'].").partition("@")[0]
            if name and not name.startswith(("_empty", "L['self']")):
                number = str(key).partition("@")[2]
                entries.append((f"{name}@{number}" if number else name, name))
        return entries

    def owner(self, node: fx.Node) -> Key:
        """Return the innermost module call around an operation; the empty string for the model's own forward."""
        stack = self.stack(node)
        return stack[-1][0] if stack else ""

    def under(self, node: fx.Node, key: Key) -> bool:
        """Whether a node is computed within a module call."""
        return not key or any(key == entry for entry, _ in self.stack(node))

    def weights(self, nodes: Iterable[fx.Node], least: int = 2) -> set[int]:
        """Return the parameters of ``least`` dimensions that nodes of the stream use, by identity."""
        found: set[int] = set()
        for node in nodes:
            if node.op == "call_module":
                parameters = list(self.traced.get(str(node.target)).parameters())
            else:
                attributes = [a for arg in node.all_input_nodes for a in self._attributes(arg)]
                parameters = [p for p in attributes if isinstance(p, nn.Parameter)]
            found.update(id(p) for p in parameters if p.dim() >= least)
        return found

    def _attributes(self, node: fx.Node) -> Iterator[Any]:
        if node.op == "get_attr":
            yield self.traced.get(str(node.target))
        elif node not in self.active and self.constant[node]:
            for arg in node.all_input_nodes:
                yield from self._attributes(arg)

    def between(self, start: fx.Node, end: fx.Node) -> set[fx.Node]:
        """Return the nodes of the stream on the ways from ``start``, exclusive, to ``end``, inclusive."""
        found, todo = set(), [end]
        while todo:
            node = todo.pop()
            if node in self.active and node not in found and self.order[node] > self.order[start]:
                found.add(node)
                todo.extend(node.all_input_nodes)
        return found

    def region(self, key: Key) -> tuple[fx.Node, fx.Node] | None:
        """Return where the stream enters and leaves a module call, or None unless it does so at one place each."""
        inside = {node for node in self.active if self.under(node, key)}
        enters = {arg for node in inside for arg in node.all_input_nodes if arg in self.active} - inside
        leaves = {
            n for n in inside if n is self.traced.output or any(u in self.active and u not in inside for u in n.users)
        }
        return (enters.pop(), leaves.pop()) if len(enters) == len(leaves) == 1 else None

    def ends(self, node: fx.Node, outside: fx.Node | None = None) -> tuple[str, int] | None:
        """Return the module, and which of its calls, that outputs a node's value and does not hold ``outside``."""
        for key, name in self.stack(node):
            if outside is not None and self.under(outside, key):
                continue
            region = self.region(key)
            if region is not None and region[1] is node:
                return name, int(key.partition("@")[2] or 0)
        return None

    def measure(self, model: nn.Module, x: Any) -> None:
        """Note the shapes of the values at the cuts, from one forward pass."""
        if self.traced.by == "torch.export":
            self.shapes = {node: node.meta["val"].shape for node in self.cuts if "val" in node.meta}
            return
        shapes, cuts = self.shapes, set(self.cuts)

        class Shapes(fx.Interpreter):
            def run_node(self, n: fx.Node) -> Any:
                value = super().run_node(n)
                if n in cuts and isinstance(value, Tensor):
                    shapes[n] = value.shape
                return value

        args, kwargs = arguments(x)
        bound = inspect.signature(model.forward).bind(*args, **kwargs)
        bound.apply_defaults()
        with torch.no_grad():
            Shapes(model, graph=self.traced.graph).run(*bound.arguments.values())


# ---------------------------------------------------------------- residual additions

Terms = list[tuple[fx.Node, float]]
"""Nodes, and the factors they enter a sum with."""


@dataclass
class Sum:
    """A residual addition: it starts at the cut ``start``, and ``end`` is skip + branch."""

    start: fx.Node
    end: fx.Node
    skip: Terms
    branch: Terms
    exact: bool
    inner: int  # residual additions within the branch


def operands(node: fx.Node, active: set[fx.Node]) -> Terms | None:
    """Return the two operands of an addition or subtraction of values of the stream, with their factors."""
    kind = node.target if node.op == "call_function" else name_of(node) if node.op == "call_method" else None
    if kind not in ADD | SUB:
        return None
    args = [*node.args, node.kwargs.get("other", node.kwargs.get("value"))][:2]
    nodes = [arg for arg in args if isinstance(arg, fx.Node) and arg in active]
    if len(nodes) < 2:
        return None
    alpha = node.kwargs.get("alpha", 1) or 1
    if not isinstance(alpha, (int, float)):
        return None
    return [(nodes[0], 1.0), (nodes[1], -float(alpha) if kind in SUB else float(alpha))]


def residual_sum(reading: Reading, start: fx.Node, end: fx.Node) -> Sum | str | None:
    """Read a bead as a residual addition; None if it is none, or a sentence why it looks like one but is not."""
    direct = operands(end, reading.active)
    if direct is None:
        return None

    def flatten(node: fx.Node, factor: float) -> Terms:
        inner = operands(node, reading.active) if node is not start else None
        if inner is None or len([u for u in node.users if u in reading.active]) > 1:
            return [(node, factor)]
        if reading.order[node] <= reading.order[start]:
            return [(node, factor)]
        return [term for operand, own in inner for term in flatten(operand, factor * own)]

    terms = [term for operand, factor in direct for term in flatten(operand, factor)]
    ways = [reading.between(start, node) if node is not start else set() for node, _ in terms]
    weighty = [len(reading.weights(way)) for way in ways]
    skips = [i for i, (node, _) in enumerate(terms) if node is start]
    if not skips:  # no identity: the way with the fewest weights, or the one that is called a skip
        least = [i for i, weight in enumerate(weighty) if weight == min(weighty)]
        named = [i for i, way in enumerate(ways) if any(_called_skip(reading, node) for node in way)]
        skips = least if len(least) == 1 else named
        if len(skips) != 1:
            return None
    branches = [i for i in range(len(terms)) if i not in skips]
    if not reading.weights({n for i in branches for n in ways[i]}, least=1):
        return None
    shared = {n for i in skips for n in ways[i]} & {n for i in branches for n in ways[i]}
    if reading.weights(shared, least=1):
        return (
            f"the skips that end at {end.name} cross those of other blocks: both operands of this sum hold the weights "
            f"of {', '.join(sorted({n.name for n in shared if reading.weights([n], least=1)})[:3])}"
        )
    skip, branch = [terms[i] for i in skips], [terms[i] for i in branches]
    exact = False
    for (operand, factor), (other, sign) in (direct, direct[::-1]):
        if [(operand, factor)] == skip and abs(factor) == abs(sign) == 1:
            branch, exact = [(other, sign)], True
            break
    inner = sum(_inner(reading, start, node) for node, _ in branch)
    return Sum(start, end, skip, branch, exact, inner)


def _called_skip(reading: Reading, node: fx.Node) -> bool:
    names = [name.rpartition(".")[2].lower() for _, name in reading.stack(node)]
    return any(word in name for name in names for word in ("skip", "shortcut", "downsample", "identity", "residual"))


def _inner(reading: Reading, start: fx.Node, end: fx.Node) -> int:
    """Count the additions of a value to itself, transformed with weights, on the ways to a branch's end."""
    count = 0
    for node in reading.between(start, end):
        pair = operands(node, reading.active)
        if pair is not None:
            (a, _), (b, _) = pair
            early, late = sorted((a, b), key=reading.order.__getitem__)
            way = reading.between(early, late)
            if any(early in n.all_input_nodes for n in way) and reading.weights(way):
                count += 1
    return count


# ---------------------------------------------------------------- parts


class Context:
    """What the stem leaves for the units and the head besides y_0: filled anew whenever the stem is called."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        if name not in self.values:
            raise RuntimeError(
                f"this part needs {name!r} from the stem: call the whole chain, or its stem, on the input first"
            )
        return self.values[name]


class Piece(fx.GraphModule):
    """A traced piece of a model that follows ``.to()``: types and devices in it change with its parameters."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Piece:
        def follow(value: Any) -> Any:
            if isinstance(value, torch.dtype) and value.is_floating_point:
                return fn(torch.empty(0, dtype=value)).dtype
            return fn(torch.empty(0, device=value)).device if isinstance(value, torch.device) else value

        super()._apply(fn, recurse)
        for node in self.graph.nodes:
            node.args, node.kwargs = map_aggregate(node.args, follow), map_aggregate(node.kwargs, follow)
        self.recompile()
        return self


class Part(nn.Module):
    """A piece of a traced model that reads values from the context."""

    def __init__(self, graph: fx.GraphModule, context: Context, names: Sequence[str]) -> None:
        super().__init__()
        self.graph, self.context, self.names = graph, context, tuple(names)

    def forward(self, y: Tensor) -> Tensor:
        """Map a state to what the piece computes from it."""
        return self.graph(y, *(self.context[name] for name in self.names))


class Stem(nn.Module):
    """The stem of a model with several inputs, or whose units read a context: takes a tensor, a tuple or a dict.

    Args:
        graph: computes y_0 and the context's values from the inputs.
        inputs: names of the inputs.
        used: those that the graph takes.
        context: where the values go.
        names: of the values.
        sizes: of inputs, as far as the graph takes them for constants: it would compute something else at others.
        shift_labels: whether the labels in a dict are the tokens themselves, to be compared with the logits before
        them.
    """

    def __init__(
        self,
        graph: fx.GraphModule,
        inputs: Sequence[str],
        used: Sequence[str],
        context: Context,
        names: Sequence[str],
        sizes: Mapping[str, tuple[int | None, ...]],
        shift_labels: bool,
    ) -> None:
        super().__init__()
        self.graph, self.context, self.sizes = graph, context, dict(sizes)
        self.inputs, self.used, self.names = tuple(inputs), tuple(used), tuple(names)
        self.shift_labels = shift_labels

    def forward(self, x: Any) -> Tensor:
        """Map an input, as the model takes it, to y_0."""
        args, kwargs = arguments(x)
        given = dict(zip(self.inputs, args, strict=False)) | kwargs
        wrong = sorted(set(given) ^ set(self.inputs))
        if wrong or len(args) > len(self.inputs):
            raise ValueError(
                f"this chain was made from an input with {', '.join(self.inputs)}, and this one differs in "
                f"{', '.join(wrong) or 'their number'}: unravel the model with an example of such inputs"
            )
        for name, sizes in self.sizes.items():
            found = tuple(given[name].shape)
            if len(found) != len(sizes) or any(s not in (None, f) for s, f in zip(sizes, found, strict=True)):
                traced = ", ".join("any" if size is None else str(size) for size in sizes)
                raise ValueError(
                    f"{name} has size {found}, and torch.export traced this chain for ({traced}): unravel the model "
                    "with an example of the new size"
                )
        result = self.graph(*(given[name] for name in self.used))
        y, *values = result if isinstance(result, tuple) else (result,)
        self.context.values = dict(zip(self.names, values, strict=True))
        return y


class Builder:
    """Makes modules out of pieces of a traced model. They share the model's parameters and modules."""

    def __init__(self, reading: Reading, context: Context) -> None:
        self.reading, self.traced, self.context = reading, reading.traced, context
        self.carried: dict[fx.Node, None] = {}  # an ordered set

    def part(self, terms: Terms, start: fx.Node) -> nn.Module | None:
        """Return a module that computes a sum of terms from the value at the cut ``start``; None for the identity."""
        if terms == [(start, 1.0)]:
            return None
        order, outside = self._slice([node for node, _ in terms], start)
        modules = self._modules(order, terms, start)
        if modules is not None:
            return modules[0] if len(modules) == 1 else nn.Sequential(*modules)
        graph = fx.Graph()
        copies = {start: graph.placeholder("y")}
        for node in outside:
            copies[node] = graph.placeholder(f"context_{node.name}")
        self.carried.update(dict.fromkeys(outside))
        self._copy(graph, order, copies)
        total: fx.Node | None = None
        for node, factor in terms:
            value = copies[node]
            if factor == -1:
                value = graph.call_function(torch.neg, (value,))
            elif factor != 1:
                value = graph.call_function(operator.mul, (value, factor))
            total = value if total is None else graph.call_function(operator.add, (total, value))
        graph.output(total)
        module = self._module(graph)
        return Part(module, self.context, [node.name for node in outside]) if outside else module

    def stem(self, state: fx.Node, wrap: bool, shift_labels: bool) -> nn.Module:
        """Return the module that computes y_0, and all that the parts made so far carry in the context."""
        names = list(self.traced.inputs.values())
        if not self.carried and not wrap and not self.traced.sizes:
            return self.part([(state, 1.0)], self.reading.source) or nn.Identity()
        order, _ = self._slice([state, *self.carried], None)
        graph = fx.Graph()
        used = [node for node in self.traced.inputs if node in order]
        copies = {node: graph.placeholder(self.traced.inputs[node]) for node in used}
        self._copy(graph, [node for node in order if node not in copies], copies)
        carried = tuple(copies[node] for node in self.carried)
        graph.output((copies[state], *carried) if carried else copies[state])
        values = [node.name for node in self.carried]
        used_names = [self.traced.inputs[node] for node in used]
        return Stem(self._module(graph), names, used_names, self.context, values, self.traced.sizes, shift_labels)

    def _slice(self, ends: Iterable[fx.Node], start: fx.Node | None) -> tuple[list[fx.Node], list[fx.Node]]:
        """Return the nodes to compute ``ends`` from ``start``, in order, and those that have to come from outside."""
        reading = self.reading
        first = -1 if start is None else reading.order[start]
        inside: set[fx.Node] = set()
        outside: set[fx.Node] = set()
        todo = list(ends)
        while todo:
            node = todo.pop()
            if node is start or node in inside or node in outside:
                continue
            if start is None or reading.constant[node] or reading.latest[node] >= first:
                if node.op == "placeholder" and start is not None:
                    outside.add(node)
                else:
                    inside.add(node)
                    todo.extend(node.all_input_nodes)
            else:
                outside.add(node)
        return (sorted(nodes, key=reading.order.__getitem__) for nodes in (inside, outside))  # type: ignore[return-value]

    def _modules(self, order: Sequence[fx.Node], terms: Terms, start: fx.Node) -> list[nn.Module] | None:
        """Return the modules that are called one after the other, if that is all that happens."""
        previous = start
        for node in order:
            if node.op != "call_module" or node.args != (previous,) or node.kwargs:
                return None
            previous = node
        return [self.traced.get(str(node.target)) for node in order] if terms == [(previous, 1.0)] else None

    @staticmethod
    def _copy(graph: fx.Graph, order: Iterable[fx.Node], copies: dict[fx.Node, fx.Node]) -> None:
        for node in order:
            copies[node] = graph.node_copy(node, copies.__getitem__)
            copies[node].meta = {}

    def _module(self, graph: fx.Graph) -> fx.GraphModule:
        root = {
            str(n.target): self.traced.get(str(n.target)) for n in graph.nodes if n.op in ("get_attr", "call_module")
        }
        return Piece(root, graph)
