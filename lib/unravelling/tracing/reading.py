"""Read a graph: find its residual additions, and divide the stream into the stretches that become units.

The *stream* is all that flows from the main input to the logits. A *cut* is a value that all of it must pass. Between
two neighbouring cuts lies one operation, or a *bead*: parallel ways from the first cut to the second. A bead that ends
in an addition is a residual unit if one operand is the skip and another, the branch, holds weights. What lies between
two beads belongs to the unit before it (a ReLU or a norm after the sum), to the unit after it (a norm and a ReLU before
both ways, which each of them then computes for itself), to the stem or to the head.
"""

from __future__ import annotations

import operator
from bisect import bisect_left
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import permutations, product
from typing import Any, cast

import torch
from torch import fx, nn

from .trace import Traced, Unsupported, calls_of, identity, name_of, split_sums

SUMS = {"add": 1.0, "__add__": 1.0, "sub": -1.0, "__sub__": -1.0, "subtract": -1.0, "rsub": -1.0}
MERGES = ("cat", "concat", "concatenate", "stack", "hstack", "vstack", "dstack", "column_stack")
SUMMED = {"sum", "mean", "einsum", "matmul", "__matmul__", "bmm", "mv", "tensordot", "nansum", "cumsum", "avg_pool1d"}
SCATTERED = {"scatter_reduce": ("sum", "mean"), "index_reduce": ("mean",), "index_put": (True,)}  # and how they add
NOTHING = ("identity", "contiguous", "clone", "alias", "dropout")
KEEP_ZEROS = {  # operations that return zeros for zeros
    *("mul", "__mul__", "div", "truediv", "neg", "square", "relu", "gelu", "silu", "tanh", "matmul", "sum", "mean"),
    *("view", "reshape", "flatten", "unflatten", "permute", "transpose", "movedim", "squeeze", "unsqueeze", "expand"),
    *("getitem", "slice", "select", "narrow", "chunk", "split", "split_with_sizes", "unbind", "roll", "flip", "repeat"),
    *("to", "_to_copy", "type_as", "float", "contiguous", "clone", "alias", "dropout", "identity", "interpolate"),
    *("t", "mT", "numpy_T", "swapaxes"),
}
SHAPES = {"shape", "device", "dtype", "ndim", "is_cuda", "layout", "requires_grad"}
NO_DATA = {  # operations whose result carries no gradient of their operand
    *("size", "dim", "numel", "stride", "sym_size", "sym_numel", "sym_stride", "len", "is_floating_point"),
    *("new_zeros", "new_ones", "new_full", "new_empty", "new_tensor"),
    *("zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like", "arange"),
    *("eq", "ne", "lt", "le", "gt", "ge", "__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__", "is_", "is_not"),
    *("logical_not", "logical_and", "logical_or", "isnan", "isinf", "argmax", "argmin", "bool", "long", "int"),
    *("__and__", "__or__", "__invert__", "bitwise_and", "bitwise_or", "bitwise_not", "any", "all"),
}
LIKE_ANOTHER = ("type_as", "expand_as", "view_as", "reshape_as", "to")  # whose second argument is no data
PREFERRED = ("inputs_embeds", "input_ids", "pixel_values")
SKIPS = ("skip", "shortcut", "downsample", "identity", "residual")

Key = str
"""One call of a module: its name, and ``@1`` and so on for later calls."""

Terms = list[tuple[fx.Node, float]]
"""Nodes, and the factors they enter a sum with."""

Sums = dict[fx.Node, tuple[fx.Node, bool, bool]]
"""Additions of two values that descend from one, each with that one, whether it is one of them, and has weights."""


@dataclass
class Stretch:
    """A stretch of the stream that becomes a unit, or the several units of a block."""

    start: fx.Node  # the cut at which its ways part
    end: fx.Node  # the cut at which they meet: skip + branch, or what a block or a plain layer returns
    owner: Key  # the call whose forward computes the end; empty for the model's own
    skip: Terms = field(default_factory=list)  # the terms of the sum that are the skip
    branch: Terms = field(default_factory=list)  # its other terms; empty for a block and for a plain layer
    block: str = ""  # name of the module, if its units are known by its class or by hand
    exact: bool = True  # whether skip + branch are the very operands of the model's last addition
    exact_skip: bool = True  # whether the skip is the start itself
    state: fx.Node = None  # type: ignore[assignment]  # the cut before the unit, and before what prepares both ways
    post: fx.Node = None  # type: ignore[assignment]  # the cut after it, and after what follows the sum
    name: str = ""
    output: tuple[str, int] | None = None  # the module, and which of its calls, that returns the next state
    zeros: list[tuple[str, int]] = field(default_factory=list)  # those whose zeros delete the branch

    def __post_init__(self) -> None:
        self.state, self.post = self.start, self.end


class NotABlock(Exception):
    """A registered block, by its name, that is called with more than its state, so that its graph has to tell."""


def read(
    model: nn.Module, traced: Traced, blocks: Collection[str], by_hand: Sequence[str] | None, stream: str | None = None
) -> tuple[Reading, list[Stretch], list[str], list[str]]:
    """Return a reading of a traced model, its stretches in order, what to warn a user of, and what is worth a note.

    The ``blocks`` are modules whose units are known, by name, those ``by_hand`` the ones that a user named, ``stream``
    the input that the stream starts at, which is the one that gives the most units when None. Unsupported is raised if
    no stretch is found, NotABlock for a block that takes more than the state.
    """
    used = [node for node in traced.inputs if node.users]
    if not used:
        raise Unsupported("the model uses none of its inputs")
    names = [traced.inputs[node] for node in used]
    if stream is not None and stream not in names:
        raise Unsupported(f"stream={stream!r} names no input that the model uses: these are {', '.join(names)}")
    best: tuple[Reading, list[Stretch], list[str]] | None = None
    found = best
    refusal = Unsupported("")
    sources = sorted(used, key=lambda node: traced.inputs[node] not in PREFERRED)
    for source, held in product(sources, (False, True)):
        name = traced.inputs[source]
        if name != stream and (stream is not None or (best is not None and "mask" in name)):
            continue
        if held and found is not None and not _lost(*found[:2]):
            continue
        own, copies = traced.copy()  # which a reading changes
        try:
            found = _read_from(model, Reading(own, copies[source]), blocks, by_hand, held)
        except Unsupported as error:
            found, refusal = None, refusal if str(refusal) else error
            continue
        if len(found[1]) > max(len(best[1]) if best else 0, held):
            best = found
    if best is None:
        raise refusal
    reading, stretches, warnings = best
    _share_out(reading, stretches)
    for stretch in stretches:
        stretch.output = reading.output(stretch.post)
        stretch.name = _name(reading, stretch, stretches)
        stretch.zeros = _zeros(reading, stretch)
    serious, notes = _account(reading, stretches)
    warnings += notes[:1] if serious and by_hand is None else []
    if beside := reading.beside():
        warnings.append(
            f"{beside} more addition{'s lead' if beside > 1 else ' leads'} to other outputs of the model than the one "
            "taken for its logits: for a chain to another one, unravel a wrapper that returns it alone"
        )
    if reading.holds:
        notes.append("later units read values from within the first: the stem computes them, so that they outlast it")
    data, first = reading.data_from(reading.entry), reading.order[stretches[0].state]
    read_later = {arg for node in reading.active if reading.order[node] > first for arg in node.all_input_nodes}
    if any(reading.order[node] != first and reading.latest[node] <= first for node in read_later & data):
        notes.append("units or the head also read y_0, or what it came from: path gradients hold that fixed")
    functions = {name_of(node) for node in reading.active if node.op != "call_module"}
    if fixed := sorted(name for name in functions if "dropout" in name or "batch_norm" in name):
        notes.append(f"{', '.join(fixed)}: computed as in eval mode, even where the chain is in training mode")
    start = reading.traced.inputs[reading.entry]
    others = [name for name in names if name != start]
    if others:
        told = f"the stream starts at {start!r}, and the units are handed {', '.join(map(repr, others))} beside it"
        notes.append(told)
        floating = {traced.inputs[n] for n in used if "dtype" in n.meta and n.meta["dtype"].is_floating_point}
        if stream is None and any(name in floating and "mask" not in name for name in others):
            warnings.append(f"the model takes several inputs: {told}. stream=… starts it elsewhere")
    return reading, stretches, warnings, notes


def _read_from(
    model: nn.Module, reading: Reading, blocks: Collection[str], by_hand: Sequence[str] | None, held: bool = False
) -> tuple[Reading, list[Stretch], list[str]]:
    """Find stretches from one input on, or along a long way that holds most additions; for ``held`` see `holding`."""
    reading = reading.holding() if held else reading
    stretches, causes = _stretches(model, reading, blocks, by_hand)
    best = reading, stretches, causes
    for _ in range(0 if by_hand is not None else 4):  # a long skip may lie within another
        inner = _begins_within(reading, stretches)
        if inner is None:
            break
        reading, _ = reading.rerooted(*inner)
        stretches, causes = _stretches(model, reading, blocks, by_hand)
        if len(stretches) > max(1, len(best[1])):
            best = reading, stretches, causes
    reading, stretches, causes = best
    if not stretches:
        raise Unsupported(_nothing_found(model, reading, causes))
    warnings = _told(reading, causes)
    computed = [s for s in stretches if s.skip and s.branch and not s.exact_skip]
    loaded = [s for s in computed if reading.weights(n for node, _ in s.skip for n in reading.between(s.start, node))]
    loaded = [s for s in loaded if _same_shape(reading, s.end, s.start)]
    if len(loaded) > len(stretches) / 2:
        what = "a layer with weights of its own, as LoRA has its base layer, or a mixture of streams"
        where = f"{what} (the first in {place(reading, loaded[0].end)})"
        number = f"{len(loaded)} of {len(stretches)} units"
        warnings.append(f"{number} have no identity beside their branch, but {where}: a deletion leaves that layer")
    return reading, stretches, warnings


def _stretches(
    model: nn.Module, reading: Reading, blocks: Collection[str], by_hand: Sequence[str] | None
) -> tuple[list[Stretch], dict[str, list[fx.Node]]]:
    stretches = _blocks(reading, blocks)
    taken = {node for s in stretches for node in reading.cuts_after(s.start, s.end)}
    found, causes = _sums(reading, taken)
    stretches += found
    stretches = _with_plain(model, reading, stretches) if by_hand is None else _within(reading, stretches, by_hand)
    return sorted(stretches, key=lambda stretch: reading.order[stretch.end]), causes


def _told(reading: Reading, causes: dict[str, list[fx.Node]]) -> list[str]:
    often = {text: f"{len(ends)} times, first" if len(ends) > 1 else "once," for text, ends in causes.items()}
    return [f"{text} ({often[text]} in {place(reading, ends[0])})" for text, ends in causes.items()]


def _data(node: fx.Node) -> list[fx.Node]:
    """Return the arguments of a node whose numbers it depends on."""
    return node.all_input_nodes[:1] if name_of(node) in LIKE_ANOTHER else node.all_input_nodes


def _is_shape(node: fx.Node) -> bool:
    return name_of(node) == "getattr" and node.args[1] in SHAPES


def place(reading: Reading, node: fx.Node) -> str:
    """Return the name of the module whose forward computes a node."""
    return reading.owner(node).partition("@")[0] or "the forward of the model"


class Reading:
    """What is known of a traced model: where the stream runs, its cuts, and which module computes what."""

    def __init__(self, traced: Traced, source: fx.Node, entry: fx.Node | None = None) -> None:
        self.traced, self.source, self.holds = traced, source, False
        self.entry = source if entry is None else entry
        self.known: Sums = {}  # in the reading of a longer stream
        self._survey()
        if traced.output not in self.active:
            raise Unsupported(f"the logits do not depend on the input {traced.inputs.get(source, source.name)!r}")
        if split_sums(traced, self.active):
            self._survey()
        self.cuts = [traced.output]
        while self.cuts[-1] is not source:
            self.cuts.append(self.dominator[self.cuts[-1]])
        self.cuts.reverse()
        self.place = {node: i for i, node in enumerate(self.cuts)}
        self.sums = self._sums()

    def _survey(self) -> None:
        nodes = list(self.traced.graph.nodes)
        self.order = {node: i for i, node in enumerate(nodes)}
        self.stacks = {node: list(calls_of(node)) for node in nodes}
        self.calls: dict[Key, set[fx.Node]] = {}
        for node in nodes:
            for key, _ in self.stacks[node]:
                self.calls.setdefault(key, set()).add(node)
        self.reached = self.data_from(self.source)
        self.active = self._leading_to({self.traced.output})  # the stream
        # for every node, the position of the last stream node that it depends on, and whether it depends on no input
        self.latest: dict[fx.Node, int] = {}
        self.constant: dict[fx.Node, bool] = {}
        self.fixed: dict[fx.Node, bool] = {}  # whether it depends on no input but by its sizes
        self.dominator: dict[fx.Node, fx.Node] = {self.source: self.source}  # the last node that all ways here pass
        for node in nodes:
            args = node.all_input_nodes
            own = self.order[node] if node in self.active else -1
            self.latest[node] = max([own, *(self.latest[arg] for arg in args)])
            self.constant[node] = node.op != "placeholder" and all(self.constant[arg] for arg in args)
            size = name_of(node) in ("size", "sym_size", "len") or _is_shape(node)
            self.fixed[node] = size or (node.op != "placeholder" and all(self.fixed[arg] for arg in args))
            if node in self.active and node is not self.source:
                common, *others = self.stream_args(node)
                for other in others:
                    while common is not other:
                        if self.order[common] > self.order[other]:
                            common = self.dominator[common]
                        else:
                            other = self.dominator[other]
                self.dominator[node] = common

    def rerooted(self, start: fx.Node, end: fx.Node) -> tuple[Reading, dict[fx.Node, fx.Node]]:
        """Return a reading of the stream that leaves ``start`` for ``end`` alone: its other ways belong to the stem.

        It is that of a copy of the graph, whose nodes are returned by those of this one.
        """
        traced, copies = self.traced.copy()
        with traced.graph.inserting_after(copies[start]):
            state = traced.graph.call_function(identity, (copies[start],))
        state.meta = {key: value for key, value in start.meta.items() if key != "nn_module_stack"}
        for user in start.users.keys() & self.between(start, end):
            copies[user].replace_input_with(copies[start], state)
        reading, known = Reading(traced, state, copies[self.entry]), self.known | self.sums
        reading.known = {copies[n]: (copies[early], skip, loaded) for n, (early, skip, loaded) in known.items()}
        return reading, copies

    def holding(self) -> Reading:
        """Return a reading from the start of an early sum on, in which the stem computes all that other ways bring.

        So it does what is read on the way to that sum and after it, as the values of a transformer's first attention
        where all layers add them to theirs. Unsupported where nothing changes, or what is held is the sum's branch.
        """
        clear = [(end, early) for end, (early, skip, weighted) in self.sums.items() if skip and weighted]
        for first, start in clear[:3]:
            way = self.between(start, first)
            late = {n: [user for user in n.users if user in self.active - way] for n in way - {first}}
            needed = {n for node, users in late.items() if users for n in self.between(start, node)}
            ends = [arg for arg in self.stream_args(first) if arg is not start]
            for node in ends:  # whose zeros are those of the branch: where it is deleted, they would outlast it
                args = self.stream_args(node) if name_of(node) in KEEP_ZEROS else []
                ends += args if len(args) == 1 and args[0] is not start else []
            if (needed or start not in self.place) and not any(map(late.get, ends)):
                break
        else:
            raise Unsupported("")
        held: dict[fx.Node, fx.Node] = {}
        for node in sorted(needed, key=self.order.__getitem__):
            with self.traced.graph.inserting_after(node):
                held[node] = self.traced.graph.node_copy(node, lambda arg: held.get(arg, arg))
            for user in late[node]:
                user.replace_input_with(node, held[node])
        reading, copies = self.rerooted(start, self.traced.output)
        reading.holds = bool(held)
        later = {user for users in late.values() for user in users if copies[user] in reading.place}
        if any(self.sums[user][1] for user in later & self.sums.keys()):  # skips cross
            raise Unsupported("")
        return reading

    def share_shapes(self, late: Iterable[fx.Node], first: fx.Node) -> bool:
        """Let values that depend on the shape of a later state alone be computed from one before ``first`` like it."""
        sizes = {n: [str(size) for size in n.meta["shape"]] for n in self.order if "shape" in n.meta}
        early = [n for n in sizes if self.latest[n] <= self.order[first]]
        todo, changed = list(late), False
        while todo:
            node = todo.pop()
            for arg in node.all_input_nodes:
                if arg not in self.active:
                    todo.append(arg)
                elif self.order[arg] > self.order[first] and node not in self.active:
                    alike = [n for n in early if n in self.active and sizes[n] == sizes.get(arg)]
                    alike = [n for n in alike if n.meta.get("dtype") == arg.meta.get("dtype")]
                    if alike:
                        node.replace_input_with(arg, alike[-1])
                    elif name_of(node) == "sym_size":
                        size = sizes[arg][cast(int, node.args[1])]
                        other = next((n for n in early if size in sizes[n]), None)
                        if other is None:
                            return False
                        node.args = (other, sizes[other].index(size))
                    else:
                        return False
                    changed = True
        self._survey()
        return changed

    def data_from(self, source: fx.Node) -> set[fx.Node]:
        """Return the nodes that data flows to from a node, itself among them."""
        reached = {source}
        for node in self.traced.graph.nodes:
            name = name_of(node)
            to_bool = name == "to" and torch.bool in (*node.args, *node.kwargs.values())
            ends = _is_shape(node) or to_bool or name in NO_DATA or "assert" in name or "guard" in name
            if not ends and any(arg in reached for arg in _data(node)):
                reached.add(node)
        return reached

    def _leading_to(self, ends: set[fx.Node]) -> set[fx.Node]:
        """Return the nodes that data flows through from the main input to one of some ends."""
        live = set(ends)
        for node in reversed(self.traced.graph.nodes):
            if node in live:
                live.update(arg for arg in _data(node) if arg in self.reached)
        return self.reached & live

    def beside(self) -> int:
        """Return how many sums of a state and what is computed from it lead to other outputs than the logits alone."""
        others = self._leading_to({n for n in self.reached if any(user.op == "output" for user in n.users)})
        pairs = [others & {*_data(node)} for node in others - self.active if name_of(node) in SUMS]
        return sum(any(a in self._leading_to({b}) for a, b in permutations(pair, 2)) for pair in pairs)

    def cuts_after(self, start: fx.Node, end: fx.Node | None) -> list[fx.Node]:
        """Return the cuts from one, exclusive, to another, inclusive; to the last one if that is None."""
        return self.cuts[self.place[start] + 1 : self.place[end] + 1 if end is not None else None]

    def owner(self, node: fx.Node) -> Key:
        """Return the innermost module call around an operation; the empty string for the model's own forward."""
        return self.stacks[node][-1][0] if self.stacks[node] else ""

    def under(self, node: fx.Node, key: Key) -> bool:
        """Whether a node is computed within a module call."""
        return not key or node in self.calls[key]

    def stream_args(self, node: fx.Node) -> list[fx.Node]:
        """Return those arguments of a node that belong to the stream."""
        return [arg for arg in _data(node) if arg in self.active]

    def cut_calls(self) -> dict[Key, str]:
        """Return the module calls in which there are cuts, with the modules' names, in order."""
        return {key: name for node in self.cuts for key, name in self.stacks[node]}

    def weights(self, nodes: Iterable[fx.Node], least: int = 2) -> set[int]:
        """Return the parameters of ``least`` dimensions that nodes of the stream use, by identity."""
        found: set[int] = set()
        for node in nodes:
            if node.op == "call_module":
                parameters = list(self.traced.get(node.target).parameters())
            else:
                attributes = [a for arg in node.all_input_nodes for a in self.attributes(arg)]
                parameters = [p for p in map(self.traced.get, attributes) if isinstance(p, nn.Parameter)]
            found.update(id(p) for p in parameters if sum(size > 1 for size in p.shape) >= least or least == 1)
        return found

    def attributes(self, node: fx.Node) -> Iterator[str]:
        """Yield the names of the parameters and buffers that a value outside the stream is computed from."""
        if node.op == "get_attr":
            yield str(node.target)
        elif self.fixed[node]:
            for arg in node.all_input_nodes:
                yield from self.attributes(arg)

    def between(self, start: fx.Node, end: fx.Node) -> set[fx.Node]:
        """Return the nodes of the stream on the ways from ``start``, exclusive, to ``end``, inclusive."""
        found, todo = set(), [end]
        while todo:
            node = todo.pop()
            if node in self.active and node not in found and self.order[node] > self.order[start]:
                found.add(node)
                todo.extend(_data(node))
        return found

    def region(self, key: Key, at_cuts: bool = False) -> tuple[fx.Node, fx.Node] | None:
        """Return where the stream enters and leaves a module call; None unless at one place each, or ``at_cuts``."""
        inside = self.calls[key] & self.active
        enters = {arg for node in inside for arg in self.stream_args(node)} - inside
        output = self.traced.output
        leaves = {n for n in inside if n is output or any(u in self.active and u not in inside for u in n.users)}
        if len(enters) != 1 or len(leaves) != 1 or (at_cuts and not (enters | leaves) <= self.place.keys()):
            return None
        return enters.pop(), leaves.pop()

    def output(self, node: fx.Node, outside: fx.Node | None = None) -> tuple[str, int] | None:
        """Return the module, and which of its calls, that returns a node's value and does not hold ``outside``."""
        first = node.target is operator.getitem and node.args[1] == 0  # of several that it returns, as an LSTM does
        ends = [node, node.args[0]] if first else [node]
        for key, name in [call for end in ends[::-1] for call in self.stacks[end]]:
            if outside is not None and self.under(outside, key):
                continue
            region = self.region(key)
            if region is not None and region[1] in ends:
                return name, int(key.partition("@")[2] or 0)
        return None

    def operands(self, node: fx.Node) -> Terms | None:
        """Return the two operands of an addition or subtraction of values of the stream, with their factors."""
        sign = SUMS.get(name_of(node)) if node.op in ("call_function", "call_method") else None
        first = [node.kwargs["input"]] if "input" in node.kwargs else []
        args = [*first, *node.args, node.kwargs.get("other", node.kwargs.get("value"))][:2]
        args = args[::-1] if name_of(node) == "rsub" else args
        nodes = [arg for arg in args if isinstance(arg, fx.Node) and arg in self.active]
        alpha = node.kwargs.get("alpha", 1) or 1
        if sign is None or len(nodes) < 2 or not isinstance(alpha, (int, float)):
            return None
        return [(nodes[0], 1.0), (nodes[1], sign * alpha)]

    def itself(self, node: fx.Node) -> fx.Node:
        """Return the value that a node hands on as it is, through an ``nn.Identity`` or a dropout in eval mode."""
        while node.op != "placeholder" and node is not self.source and len(self.stream_args(node)) == 1:
            layer = self.traced.get(node.target) if node.op == "call_module" else None
            if not isinstance(layer, (nn.Identity, nn.modules.dropout._DropoutNd)) and name_of(node) not in NOTHING:
                break
            node = self.stream_args(node)[0]
        return node

    def _stacked(self, node: fx.Node) -> list[fx.Node]:
        """Return the values that a node adds up in another form: by a stack that is summed later, or by scattering."""
        name, values, options = name_of(node), self.stream_args(node), [*node.args, *node.kwargs.values()]
        if name in SCATTERED:
            return values if any(how in options for how in SCATTERED[name]) else []
        later = {name_of(n) for user in node.users for n in (user, *user.users)}  # itself, or what is times weights
        if name in ("cat", "concat", "concatenate"):  # along an axis of their own, which they have before or get after
            if "sum" in later and later & {"view", "reshape", "unflatten"}:
                return values
            values = [n for n in values if name_of(n) == "unsqueeze" or (name_of(n) == "getitem" and n.args[1] is None)]
            values = [cast("fx.Node", n.args[0]) for n in values]
        elif name.startswith("_foreach_add"):
            return values
        elif name != "stack":
            return []
        return values if later & SUMMED else []

    def _sums(self) -> Sums:
        """Return the additions of two values that descend from one: that one, whether it is one of them, has weights.

        Sums without weights of values that are both computed count for nothing, such as those in a rotation.
        """
        found = {}
        for node in sorted(self.active, key=self.order.__getitem__):
            pair, name = self.operands(node), name_of(node)
            values = self._stacked(node) if pair is None else [operand for operand, _ in pair]
            if len(set(values)) < 2:
                continue
            early, *_, late = sorted(map(self.itself, values), key=self.order.__getitem__)
            way = self.between(early, late)
            if SUMS.get(name, 1) < 0 and not self.weights(way, least=1):
                continue
            if any(early in _data(n) for n in way):
                found[node] = early, True, bool(self.weights(way))
            elif pair and self.weights(self.between(self.dominator[node], node), least=1):
                found[node] = self.dominator[node], False, True
        return found


# ---------------------------------------------------------------- finding stretches


def _blocks(reading: Reading, blocks: Collection[str]) -> list[Stretch]:
    """Return the stretches of the calls of known blocks."""
    found = []
    for key, name in reading.cut_calls().items():
        if name in blocks:
            region = reading.region(key, at_cuts=True)
            if region is None or not _takes_the_state_alone(reading, key):
                raise NotABlock(name)
            found.append(Stretch(*region, key, block=name))
    return found


def _takes_the_state_alone(reading: Reading, key: Key) -> bool:
    """Whether a call of a block has no other argument than the state that could matter, and returns one tensor."""
    inside = reading.calls[key]
    for node in inside:
        given = [*node.args[1:], *node.kwargs.values()]
        others = [value for value in given if value is not None and value is not False]
        if others and node.op == "call_module" and reading.owner(node) == key:  # the block itself, not looked into
            return False
        for arg in node.all_input_nodes:
            foreign = arg not in inside and arg not in reading.active
            if foreign and not reading.constant[arg] and not name_of(arg).startswith("sym_"):
                return False
    return not any(user.target is operator.getitem for n in inside for user in n.users if user not in inside)


def _sums(reading: Reading, taken: set[fx.Node]) -> tuple[list[Stretch], dict[str, list[fx.Node]]]:
    """Return the residual additions outside the cuts that are taken, and where others look like some, by the cause."""
    found: list[Stretch] = []
    causes: dict[str, list[fx.Node]] = {}
    for start, end in zip(reading.cuts, reading.cuts[1:], strict=False):
        if end in taken or all(arg is start for arg in reading.stream_args(end)):
            continue
        read = _residual_sum(reading, start, end)
        if isinstance(read, str):
            causes.setdefault(read, []).append(end)
        elif read is not None:
            found.append(read)
    return found, causes


def _residual_sum(reading: Reading, start: fx.Node, end: fx.Node) -> Stretch | str | None:
    """Read a bead as a residual addition; None if it is none, or a sentence why it looks like one but is not."""
    direct, numbers = reading.operands(end), start.meta.get("dtype", torch.float32)
    if direct is None or not (numbers.is_floating_point or numbers.is_complex):  # tokens have no gradient
        return None

    def is_start(node: fx.Node) -> bool:
        return reading.itself(node) is reading.itself(start)

    def flatten(pair: Terms, factor: float) -> Terms:
        terms: Terms = []
        for node, own in pair:
            inner = reading.operands(node) if reading.order[node] > reading.order[start] else None
            shared = len([user for user in node.users if user in reading.active]) > 1
            if inner is None or shared or any(is_start(other) for other, _ in pair):  # the skip is found at this level
                terms.append((node, factor * own))
            else:
                terms += flatten(inner, factor * own)
        return terms

    terms = flatten(direct, 1.0)
    ways = [reading.between(start, node) if node is not start else set() for node, _ in terms]
    skips = exact = [i for i, (node, _) in enumerate(terms) if is_start(node)]
    if not skips:  # no identity: the way with the fewest weights, or the one that is called a skip
        weights = [len(reading.weights(way)) for way in ways]
        skips = [i for i, weight in enumerate(weights) if weight == min(weights)]
        if len(skips) != 1:
            names = [{n.rpartition(".")[2].lower() for node in way for _, n in reading.stacks[node]} for way in ways]
            skips = [i for i, own in enumerate(names) if any(word in name for name in own for word in SKIPS)]
        if len(skips) != 1:  # or one operation, such as a projection, or a mixture of streams
            skips = [i for i, way in enumerate(ways) if len(way) == 1 < max(map(len, ways))]
        if len(skips) != 1:
            return None
    branches = [i for i in range(len(terms)) if i not in skips]
    skip_way, branch_way = ({n for i in some for n in ways[i]} for some in (skips, branches))
    added = exact and all(terms[i][1] > 0 for i in branches)  # where nothing has weights, x - mean(x) is a norm's
    if not branches or not (added or reading.weights(branch_way, least=1)):
        return None
    if all(_smaller(terms[i][0], end) for i in skips):  # not what a deletion leaves
        return None
    if reading.weights(skip_way & branch_way, least=1):
        if all(name_of(reading.itself(node)) in ("mul", "__mul__") for node, _ in terms):
            what = "the weights of the gate decide how much of the skip and of the branch comes in"
            return f"a sum is gated, as in a highway network: {what}, so that there is no skip to be left alone"
        return "skips cross, or several streams run beside each other: both operands of a sum hold the same weights"
    skip, branch, same = [terms[i] for i in skips], [terms[i] for i in branches], False
    for (operand, factor), (other, sign) in (direct, direct[::-1]):
        if not same and [(operand, factor)] == skip and abs(factor) == abs(sign) == 1:
            branch, same = [(other, sign)], not end.meta.get("split")
    return Stretch(start, end, reading.owner(end), skip, branch, exact=same, exact_skip=bool(exact))


def _begins_within(reading: Reading, stretches: list[Stretch]) -> tuple[fx.Node, fx.Node] | None:
    """Return where the first addition starts and ends that one long skip, or way beside, keeps from being a unit.

    So it is where all that are no units lie between two neighbouring cuts, and are no fewer than the units.
    """
    lost = {node: found for node, found in _lost(reading, stretches).items() if node in reading.sums}
    cuts = [reading.order[cut] for cut in reading.cuts]
    beads = {bisect_left(cuts, reading.order[node]) for node in lost}
    if len(beads) != 1 or len(lost) < max(2, len([s for s in stretches if s.branch])):
        return None
    clear = {node: found for node, found in lost.items() if found[1]} or lost
    spans = {node: reading.between(start, node) for node, (start, *_) in clear.items()}
    outer = [node for node in spans if not any(node in span for other, span in spans.items() if other is not node)]
    return (clear[outer[0]][0], outer[0]) if outer else None


def _lost(reading: Reading, stretches: list[Stretch]) -> Sums:
    """Return the additions that are part of no unit's sum."""
    summed: set[fx.Node] = set()
    for s in stretches:
        if s.branch:
            ways = [reading.between(s.start, node) for node, _ in [*s.skip, *s.branch] if node is not s.start]
            summed |= reading.between(s.start, s.end).difference(*ways)
    return {node: found for node, found in (reading.known | reading.sums).items() if node not in summed}


def _account(reading: Reading, stretches: list[Stretch]) -> tuple[bool, list[str]]:
    """Say which additions became no units and where they are, if any; and whether that matters: they hold weights."""
    lost = _lost(reading, stretches)
    if not lost:
        return False, []
    places: Counter[str] = Counter()
    units, weighted = sum(bool(s.branch) for s in stretches), [skip for _, skip, loaded in lost.values() if loaded]
    for node in lost:
        before = [s for s in stretches if reading.order[s.end] <= reading.order[node]]
        around = next((s for s in stretches if node in reading.between(s.start, s.end)), None)
        if around is not None:
            places[f"{'the branch of ' if around.branch else ''}{around.name}"] += 1
        elif len(before) in (0, len(stretches)):
            places["the head" if before else "the stem"] += 1
        else:
            places[f"what follows {before[-1].name}"] += 1
    told = [f"{name} ({number})" for name, number in places.most_common(4)]
    more = f" and {len(places) - 4} other places" if len(places) > 4 else ""
    text = f"{units} of {units + len(lost)} additions became units; the rest lie in {', '.join(told)}{more}"
    serious = any(weighted) or units < 2 <= len(weighted)
    if serious:
        text += ". To look into a part, unravel that part of the model alone"
    return serious, [text]


def _within(reading: Reading, stretches: list[Stretch], names: Sequence[str]) -> list[Stretch]:
    """Keep the stretches within the modules named by hand; a module without any is a plain unit."""
    kept = []
    for name in names:
        calls = [key for key in reading.calls if key.partition("@")[0] == name and reading.calls[key] & reading.active]
        if not calls:
            raise Unsupported(f"the forward pass does not call {name!r}, or the stream does not go through it")
        for key in calls:
            inside = [stretch for stretch in stretches if reading.under(stretch.end, key)]
            region = reading.region(key, at_cuts=True)
            if not inside and region is None:
                what = "a unit takes one state and returns the next, and other ways lead past it"
                raise Unsupported(f"{name!r} is no unit: {what}")
            kept += inside if region is None else inside or [Stretch(*region, key)]
    return kept


def _with_plain(model: nn.Module, reading: Reading, stretches: list[Stretch]) -> list[Stretch]:
    """Add a plain unit for every block without a skip whose class is that of a residual one."""
    owners = {stretch.owner for stretch in stretches} - {""}
    classes = {type(model.get_submodule(key.partition("@")[0])) for key in owners} - {nn.Sequential, nn.ModuleList}
    plain = []
    for key, name in reading.cut_calls().items():
        if key not in owners and type(model.get_submodule(name)) in classes:
            region = reading.region(key, at_cuts=True)
            if region is not None and not any(reading.under(stretch.end, key) for stretch in stretches):
                plain.append(Stretch(*region, key))
    return stretches + plain


def _nothing_found(model: nn.Module, reading: Reading, causes: dict[str, list[fx.Node]]) -> str:
    nodes = sorted(reading.active, key=reading.order.__getitem__)
    joins = [n for n in nodes if name_of(n) in MERGES and len(reading.stream_args(n)) > 1]
    sums = [node for node in nodes if node in reading.sums or reading.operands(node) is not None]
    name = type(model).__name__
    if any(name_of(node) == "wrap_with_set_grad_enabled" for node in nodes):
        return f"{name} computes its stream under torch.no_grad(), where torch.export does not look: leave that out"
    if causes:
        return (
            f"no chain of residual units computes {name}: {'; '.join(_told(reading, causes))}. Unravel a part without "
            "such sums, or keep streams that belong together in one tensor"
        )
    if joins and not any(weighted for *_, weighted in reading.sums.values()):
        what = f"{len(joins)} concatenation{'s' * (len(joins) > 1)} (the first in {place(reading, joins[0])})"
        why = f"{what}, as a DenseNet, a U-Net or a ShuffleNet has: no chain of skip + branch computes them"
        remedy = 'Unravel a part that is residual, or name plain units by hand: units="layers.*"'
        return f"{name} has no residual unit, but {why}. {remedy}"
    if sums and all(reading.operands(node) is None for node in sums):
        where = f"{len(sums)} times, first in {place(reading, sums[0])}"
        what = f"{name} adds a state to its branch by a sum over a stack, or by scattering ({where})"
        return f"{what}: write x + f(x), or say what each block computes: units=…, branch=…, skip=…"
    if sums:
        number = f"{len(sums)} addition{'s' * (len(sums) > 1)}"
        after = (next(cut for cut in reading.cuts if reading.order[cut] >= reading.order[node]) for node in sums)
        joined = all({*joins} & {cut, *reading.between(node, cut)} for node, cut in zip(sums, after, strict=True))
        where = "they lie on some of the ways alone that a concatenation joins, or " if joined else ""
        where += "their skips cross or overlap, as where several streams run beside each other, or no operand is a skip"
        remedy = f"Say which modules are the blocks: units=…, branch=…{', or unravel a part alone' * joined}"
        what = f"{name} has {number}, but no chain of residual units: {where}"
        return f"{what} (the first in {place(reading, sums[0])}). {remedy}"
    what = f"{name} has no skip: no addition joins a value with what is computed from it"
    return f'{what}. To take a plain network apart, name its units by hand: units="features.*"'


# ---------------------------------------------------------------- states and names


def _share_out(reading: Reading, stretches: list[Stretch]) -> None:
    """Decide for what lies between two stretches whether it follows the first sum or prepares the second unit.

    It prepares it if it belongs to the second unit's own module, or if it brings no weights and changes the shape.
    """
    one_owner = len({stretch.owner for stretch in stretches}) == 1 and len(stretches) > 1
    posts: list[list[Any]] = []
    first, state = stretches[0], stretches[0].start
    for stretch, after in zip(stretches, [*stretches[1:], None], strict=True):
        follow: list[fx.Node] = []
        for node in reading.cuts_after(stretch.end, after.start if after else None):
            follows = bool(stretch.owner) and reading.under(node, stretch.owner)
            if after is not None:
                prepares = bool(after.owner) and stretch.owner != after.owner and reading.under(node, after.owner)
                follows = follows or not prepares
            elif one_owner or not follows:  # as after all the other units
                usual = posts and all(other == posts[0] for other in posts) and len(follow) < len(posts[0])
                follows = bool(usual) and _operation(reading, node) == posts[0][len(follow)]
            if not follows:
                break
            follow.append(node)
        if after is not None and stretch.branch:
            same = [i for i, node in enumerate([stretch.end, *follow]) if _same_shape(reading, node, state)]
            keep = max(same, default=len(follow))
            last = [stretch.end, *follow][keep]
            if follow and not reading.weights(reading.between(last, follow[-1]), least=1):
                follow = follow[:keep]
        posts.append([_operation(reading, node) for node in follow])
        stretch.post = state = follow[-1] if follow else stretch.end
    i = reading.place[first.start]
    network = len(stretches) > 1 and all(reading.under(stretch.end, first.owner) for stretch in stretches)
    while i > 0 and first.owner and not (network or first.block) and reading.under(reading.cuts[i], first.owner):
        i -= 1
    states = [reading.cuts[i], *(stretch.post for stretch in stretches)]
    for stretch, state in zip(stretches, states, strict=False):
        stretch.state = state


def _operation(reading: Reading, node: fx.Node) -> Any:
    return type(reading.traced.get(node.target)) if node.op == "call_module" else node.target


def _same_shape(reading: Reading, node: fx.Node, other: fx.Node) -> bool:
    """Whether two values have the same shape, or where that is not known, the first is computed without weights."""
    if "shape" in other.meta:
        return str(node.meta.get("shape")) == str(other.meta["shape"])
    return not reading.weights([node], least=1)


def _smaller(node: fx.Node, other: fx.Node) -> bool:
    """Whether a value is known to have fewer elements than another one that it is part of the sum of."""
    sizes, others = node.meta.get("shape", ()), other.meta.get("shape", ())
    pairs = zip(sizes, others, strict=False)
    return len(sizes) < len(others) or any(isinstance(a, int) and isinstance(b, int) and a != b for a, b in pairs)


def _name(reading: Reading, stretch: Stretch, stretches: Sequence[Stretch]) -> str:
    """Return a unit's name: that of its module, and of the layer in it where the module holds several units."""
    owner = stretch.owner.partition("@")[0]
    if not stretch.branch or (owner and [other.owner for other in stretches].count(stretch.owner) == 1):
        return owner
    members = {n for node, _ in stretch.branch for n in reading.between(stretch.start, node)}
    inside = sorted(members, key=reading.order.__getitem__)
    prefix = f"{owner}." if owner else ""
    stacks = {node: [n for _, n in reading.stacks[node] if n != owner and n.startswith(prefix)] for node in inside}
    below = [names for node, names in stacks.items() if reading.weights([node])]
    first = [names[0] for names in below if names]
    mixers = [names[0] for node, names in stacks.items() if names and node.op != "call_module"]
    own = [target for node in inside for arg in node.all_input_nodes for target in reading.attributes(arg)]
    return [f"{prefix}{stretch.end.name}", *own, *mixers, *first][-1]


def _zeros(reading: Reading, stretch: Stretch) -> list[tuple[str, int]]:
    """Return the modules, and which of their calls, whose zeros are zeros of the whole branch; none where none are.

    They return what it adds up, or what that is a multiple, a view or another function of that keeps zeros.
    """
    found, todo = [], [node for node, _ in stretch.branch]
    skip = {n for node, _ in stretch.skip for n in reading.between(stretch.start, node)}
    while todo:
        node = todo.pop()
        if reading.order[node] <= reading.order[stretch.start]:
            return []  # the state itself, as in pool(x) - x, whose zeros would delete more than the branch
        end = reading.output(node, outside=stretch.end) if node not in skip else None
        if end is not None:
            found.append(end)
            continue
        pair = reading.operands(node)
        name = name_of(node)
        if pair is None and (name in KEEP_ZEROS or "split" in node.meta):
            divisor = [*node.args, *node.kwargs.values()][2 if name == "addcdiv" else 1] if "div" in name else None
            factors = [n for n in reading.stream_args(node) if n is not divisor]
            factors = [n for n in factors if reading.order[n] > reading.order[stretch.start]]
            outputs = [n for n in factors if reading.output(n, outside=stretch.end)]
            pair = [(n, 1.0) for n in (outputs or factors)[:1]]
        if not pair:
            return []
        todo += [operand for operand, _ in pair]
    return found
