"""Make the modules of a chain out of the stretches of a traced model. They share the model's parameters and layers.

Values that the units need besides the stream, such as an attention mask or position numbers, do not descend from the
stream: the stem computes them and leaves them in a `Context` for the units.
"""

from __future__ import annotations

import copy
import inspect
import logging
import operator
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate
from torch.nn.functional import cross_entropy

from ..batches import device_of
from ..chain import Chain, NoSkip, Unit
from .reading import Reading, Stretch, Terms, place
from .trace import Traced, Unsupported, arguments, call

Maker = Callable[[nn.Module], Sequence[Unit]]
"""Returns the units of a block."""


class Context:
    """What the stem leaves for the units and the head besides y_0: filled anew whenever the stem is called."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}

    def __deepcopy__(self, memo: dict) -> Context:
        return Context()  # values with a gradient cannot be copied

    def __getitem__(self, name: str) -> Any:
        if name not in self.values:
            remedy = "call the whole chain, or its stem, on the input first"
            raise RuntimeError(f"this part needs {name!r} from the stem: {remedy}")
        return self.values[name]


class Code(fx.GraphModule):
    """Operations as a module that follows ``.to()``: types and devices named in it change with its parameters."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Code:
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
    """A skip, a branch, a post or a head that reads values from the context."""

    def __init__(self, code: Code, context: Context, names: Iterable[str]) -> None:
        super().__init__()
        self.code, self.context, self.names = code, context, tuple(names)

    def forward(self, y: Tensor) -> Tensor:
        """Map a state to what the part computes from it."""
        return self.code(y, *(self.context[name] for name in self.names))


class Stem(nn.Module):
    """The stem of a model with several inputs, or whose units read a context: takes a tensor, a tuple or a dict.

    Its ``code`` computes y_0 and the context's values, which go there under their ``names``, from the ``inputs`` of
    these names; ``sizes`` and ``guards`` are those of the trace. With ``shift_labels``, the labels in a dict are the
    tokens themselves, to be compared with the logits before them.
    """

    def __init__(
        self, code: Code, inputs: Iterable[str], context: Context, names: Iterable[str],
        sizes: Mapping[str, tuple[int | str, ...]], guards: Callable[..., Any] | None, shift_labels: bool,
    ) -> None:
        super().__init__()
        self.code, self.context, self.sizes, self.guards = code, context, dict(sizes), guards
        self.inputs, self.names, self.shift_labels = tuple(inputs), tuple(names), shift_labels

    def forward(self, x: Any) -> Tensor:
        """Map an input, as the model takes it, to y_0."""
        args, kwargs = arguments(x)
        given = dict(zip(self.inputs, args, strict=False)) | kwargs
        wrong = sorted(set(given) ^ set(self.inputs))
        if wrong or len(args) > len(self.inputs):
            one, other = ", ".join(self.inputs), ", ".join(wrong) or "their number"
            what = f"this chain was made from an input with {one}, and this one differs in {other}"
            raise ValueError(f"{what}: unravel the model with an example of such inputs")
        known: dict[str, int] = {}
        for name, sizes in self.sizes.items():
            found = tuple(given[name].shape)
            expected = [known.setdefault(s, f) if isinstance(s, str) else s for s, f in zip(sizes, found, strict=False)]
            if len(found) != len(sizes) or list(found) != expected:
                traced = ", ".join("any" if isinstance(size, str) else str(size) for size in sizes)
                what = f"{name} has size {found}, and torch.export traced this chain for ({traced})"
                example = "an example of the new size, in which all inputs belong to the same batch"
                raise ValueError(f"{what}: unravel the model with {example}")
        values = [given[name] for name in self.inputs]
        try:
            if self.guards is not None:
                self.guards(*values)
        except AssertionError as error:
            what = f"torch.export traced this chain for inputs of other sizes ({error})"
            remedy = "the forward pass decides by them. Unravel the model with an example of the new size"
            raise ValueError(f"{what}: {remedy}") from error
        result = self.code(*values)
        y, *values = result if isinstance(result, tuple) else (result,)
        self.context.values = dict(zip(self.names, values, strict=True))
        return y


@dataclass
class Origin:
    """Where a chain comes from, and for each unit the modules, and which of their calls, that it is compared with."""

    model: nn.Module
    traced_by: str  # "torch.fx" or "torch.export"
    notes: list[str] = field(default_factory=list)  # why the chain's numbers may differ in the last bits
    outputs: list[tuple[str, int] | None] = field(default_factory=list)  # what returns the next state
    zeros: list[list[tuple[str, int]]] = field(default_factory=list)  # what gives zeros where the branch is deleted

    def __deepcopy__(self, memo: dict) -> Origin:
        return replace(self, model=copy.deepcopy(self.model, memo))  # whose parameters are those of the copied chain


def make_parts(
    model: nn.Module, x: Any, reading: Reading, stretches: Sequence[Stretch], makers: Mapping[str, Maker]
) -> tuple[nn.Module, list[Unit], nn.Module, Origin]:
    """Return stem, units and head, and their origin: the stem is made last, since it has to serve all the others.

    The ``makers`` make the units of the blocks of these names, a graph in which ``stretches`` were found all others.
    Unsupported is raised where a unit needs more of an earlier one than its state.
    """
    builder = _Builder(reading)
    origin = Origin(model, reading.traced.by)
    names = {id(module): name for name, module in model.named_modules()}
    units: list[Unit] = []
    for stretch in stretches:
        if stretch.block:
            made = builder.block_units(stretch, makers[stretch.block](model.get_submodule(stretch.block)))
            call = int(stretch.owner.partition("@")[2] or 0)
            origin.zeros += [[(end, call)] if (end := _last_module(unit, names)) else [] for unit in made]
        else:
            made = [builder.unit(stretch)]
            origin.zeros.append(stretch.zeros)
            if not stretch.exact:
                note = "its sum is computed in another order, or with its factors in the branch"
                origin.notes.append(f"{stretch.name}: {note}")
        units += made
        origin.outputs += [None] * (len(made) - 1) + [stretch.output]
    output, first = reading.traced.output, stretches[0].state
    head = builder.part([(output, 1.0)], stretches[-1].post) or nn.Identity()
    late = [node for node in builder.carried if reading.latest[node] > reading.order[first]]
    if late and reading.share_shapes(late, first):
        return make_parts(model, x, reading, stretches, makers)
    if late:
        what = f"what {place(reading, late[0])} computes from the state of one unit is used by a later one"
        raise Unsupported(f"skips cross: {what}, which no chain of units does")
    several = len(reading.traced.inputs) > 1 or (x is not None and not isinstance(x, Tensor))
    stem = builder.stem(first, several, _shifts_labels(model, x))
    for module in [*stem.modules(), *head.modules(), *(part for unit in units for part in unit.modules())]:
        if id(module) not in names:
            module.training = False
    return stem, units, head, origin


def _last_module(unit: Unit, names: Mapping[int, str]) -> str | None:
    """Return the name of the model's module that returns a unit's whole branch, or None."""
    last = unit.branch
    while isinstance(last, nn.Sequential) and len(last) and id(last) not in names:
        last = last[-1]
    return names.get(id(last)) if unit.residual else None


def _shifts_labels(model: nn.Module, x: Any) -> bool:
    """Whether a model, or the Hugging Face model in a wrapper, compares each token with the logits before it.

    Its own loss for the example tells, where it takes labels; else the kind of loss that its forward calls.
    """
    classes = ((m, {cls.__module__.rpartition(".")[0] for cls in type(m).__mro__}) for m in model.modules())
    known = [m for m, homes in classes if any(home.startswith("transformers.models.") for home in homes)]
    if not known:
        return False
    args, kwargs = arguments(x)
    with suppress(Exception), torch.no_grad(), ExitStack() as stack:
        stack.callback(logging.disable, logging.root.manager.disable)
        logging.disable(logging.WARNING)  # transformers warns of a configuration that names no loss
        logits = call(model, x).cpu().float()
        labels = torch.randint(logits.shape[-1], logits.shape[:2], generator=torch.Generator().manual_seed(0))
        own = model(*args, **kwargs, labels=labels.to(device_of(model))).loss.item()
        plain = cross_entropy(logits.flatten(0, 1), labels.flatten()).item()
        shifted = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()).item()
        return abs(own - shifted) < abs(own - plain)
    source = inspect.getsource(type(known[0]).forward)
    return getattr(known[0], "loss_type", None) in ("ForCausalLM", None) and "loss_function" in source


def number(chain: Chain, x: Any) -> Tensor | None:
    """Make names unique, measure which units change the shape of the state, and begin a stage at each of these.

    Returns the logits for the example, None without one.
    """
    seen: Counter[str] = Counter()
    with torch.no_grad():
        y, stage = None if x is None else chain.stem(x), 1
        for i, unit in enumerate(chain.units):
            seen[unit.name] += 1
            if seen[unit.name] > 1:
                unit.name = f"{unit.name}#{seen[unit.name]}"
            if y is not None:
                before, y = y.shape, unit(y)
                unit.is_transition = y.shape != before
                if unit.is_transition and not unit.residual and isinstance(unit.skip, nn.Identity):
                    unit.skip = NoSkip(unit.name)
            unit.stage = stage = stage + (unit.is_transition and i > 0)
        return None if y is None else chain.head(y)


class _Builder:
    """Makes modules of nodes, and keeps account of what the stem has to carry for them."""

    def __init__(self, reading: Reading) -> None:
        self.reading: Reading = reading
        self.traced: Traced = reading.traced
        self.context = Context()
        self.carried: dict[fx.Node, None] = {}  # an ordered set

    def unit(self, stretch: Stretch) -> Unit:
        """Return the unit of a residual sum, or a plain one."""
        residual = bool(stretch.branch)
        skip = self.part(stretch.skip or [(stretch.start, 1.0)], stretch.state)
        branch = self.part(stretch.branch or [(stretch.end, 1.0)], stretch.state)
        return Unit(branch, skip, self.part([(stretch.post, 1.0)], stretch.end), residual=residual, name=stretch.name)

    def block_units(self, stretch: Stretch, units: Sequence[Unit]) -> list[Unit]:
        """Name the units that were made of a block, and add what prepares them and what follows."""
        for i, unit in enumerate(units):
            own = unit.name or (str(i) if len(units) > 1 else "")
            unit.name = f"{stretch.name}.{own}" if own else stretch.name
        before = self.part([(stretch.start, 1.0)], stretch.state)
        after = self.part([(stretch.post, 1.0)], stretch.end)
        first, last = units[0], units[-1]
        if before is not None:
            first.branch, first.skip = _sequence(before, first.branch), _sequence(before, first.skip)
        if after is not None:
            last.post = _sequence(last.post, after)
        return list(units)

    def part(self, terms: Terms, start: fx.Node) -> nn.Module | None:
        """Return a module that computes a sum of terms from the value at the cut ``start``; None for the identity."""
        if terms == [(start, 1.0)]:
            return None
        order, outside = self._slice([node for node, _ in terms], start)
        modules = self._modules(order, terms, start)
        if modules:
            return _sequence(*modules)
        graph = fx.Graph()
        copies = {start: graph.placeholder("y")}
        copies |= {node: graph.placeholder(f"context_{node.name}") for node in outside}
        self.carried.update(dict.fromkeys(outside))
        _copy(graph, order, copies)
        total: fx.Node | None = None
        for node, factor in terms:
            value = copies[node]
            if factor == -1:
                value = graph.call_function(torch.neg, (value,))
            elif factor != 1:
                value = graph.call_function(operator.mul, (value, factor))
            total = value if total is None else graph.call_function(operator.add, (total, value))
        graph.output(total)
        code = self._code(graph)
        return Part(code, self.context, [node.name for node in outside]) if outside else code

    def stem(self, state: fx.Node, several: bool, shift_labels: bool) -> nn.Module:
        """Return the module that computes y_0, and all that the parts made so far carry in the context."""
        inputs = self.traced.inputs
        traced, whole = self.traced, self.reading.source is self.reading.entry
        if whole and not self.carried and not several and not traced.sizes and traced.guards is None:
            return self.part([(state, 1.0)], self.reading.source) or nn.Identity()
        order, _ = self._slice([state, *self.carried], None)
        graph = fx.Graph()
        copies = {node: graph.placeholder(name) for node, name in inputs.items()}
        _copy(graph, [node for node in order if node not in copies], copies)
        carried = tuple(copies[node] for node in self.carried)
        graph.output((copies[state], *carried) if carried else copies[state])
        values = [node.name for node in self.carried]
        code = self._code(graph)
        return Stem(code, inputs.values(), self.context, values, traced.sizes, traced.guards, shift_labels)

    def _slice(self, ends: Iterable[fx.Node], start: fx.Node | None) -> tuple[list[fx.Node], list[fx.Node]]:
        """Return the nodes to compute ``ends`` from ``start``, in order, and those that have to come from outside."""
        order, latest, constant = self.reading.order, self.reading.latest, self.reading.constant
        found: dict[fx.Node, bool] = {}
        todo = list(ends)
        while todo:
            node = todo.pop()
            if node is not start and node not in found:
                later = start is None or constant[node] or latest[node] >= order[start]
                found[node] = later and (start is None or node.op != "placeholder")
                todo += node.all_input_nodes if found[node] else []
        nodes = sorted(found, key=order.__getitem__)
        return [node for node in nodes if found[node]], [node for node in nodes if not found[node]]

    def _modules(self, order: Sequence[fx.Node], terms: Terms, start: fx.Node) -> list[nn.Module]:
        """Return the modules that are called one after the other, if that is all that happens."""
        previous = start
        for node in order:
            if node.op != "call_module" or node.args != (previous,) or node.kwargs:
                return []
            previous = node
        return [self.traced.get(node.target) for node in order] if terms == [(previous, 1.0)] else []

    def _code(self, graph: fx.Graph) -> Code:
        named = {str(node.target) for node in graph.nodes if node.op in ("get_attr", "call_module")}
        return Code({target: self.traced.get(target) for target in named}, graph)


def _copy(graph: fx.Graph, order: Iterable[fx.Node], copies: dict[fx.Node, fx.Node]) -> None:
    for node in order:
        copies[node] = graph.node_copy(node, copies.__getitem__)
        copies[node].meta = {}


def _sequence(*parts: nn.Module | None) -> nn.Module:
    modules = [part for part in parts if part is not None and not isinstance(part, nn.Identity)]
    return modules[0] if len(modules) == 1 else nn.Sequential(*modules) if modules else nn.Identity()
