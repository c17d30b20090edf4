"""Read a graph: find its residual additions, and divide the stream into the stretches that become units.

The *stream* is all that flows from the main input to the logits. A *cut* is a value that all of it must pass. Between
two neighbouring cuts lies one operation, or a *bead*: parallel ways from the first cut to the second. A bead that ends
in an addition is a residual unit if one operand is the skip and another, the branch, holds weights. What lies between
two beads belongs to the unit before it (a ReLU or a norm after the sum), to the unit after it (a norm and a ReLU before
both ways, which each of them then computes for itself), to the stem or to the head.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from .trace import Traced, Unsupported, name_of

ADD = {operator.add, operator.iadd, torch.add, torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor, "add", "__add__"}
SUB = {operator.sub, operator.isub, torch.sub, torch.ops.aten.sub.Tensor, torch.ops.aten.sub_.Tensor, "sub", "__sub__"}
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
SKIPS = ("skip", "shortcut", "downsample", "identity", "residual")

Key = str
"""One call of a module: its name, and ``@1`` and so on for later calls."""

Terms = list[tuple[fx.Node, float]]
"""Nodes, and the factors they enter a sum with."""


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
    model: nn.Module, traced: Traced, blocks: Collection[str], by_hand: Sequence[str] | None
) -> tuple[Reading, list[Stretch], list[str]]:
    """Divide a traced model's stream into stretches.

    Args:
        model: the model.
        traced: its graph.
        blocks: names of modules whose units are known; NotABlock is raised for one that takes more than the state.
        by_hand: names of the modules that are the units, if a user named them.

    Returns:
        The reading of the graph, the stretches in order, and what a user should be told. Unsupported if none is found.
    """
    reading = Reading(traced)
    stretches = _blocks(reading, blocks)
    taken = {node for s in stretches for node in reading.cuts_after(s.start, s.end)}
    found, remarks = _sums(reading, taken)
    stretches += found
    stretches = _with_plain(model, reading, stretches) if by_hand is None else _within(reading, stretches, by_hand)
    stretches.sort(key=lambda stretch: reading.order[stretch.end])
    if not stretches:
        raise Unsupported(_nothing_found(model, reading, remarks))
    others = [name for node, name in traced.inputs.items() if node is not reading.source and node.users]
    if others:
        remarks.append(
            f"the model takes several inputs: the stream starts at {traced.inputs[reading.source]!r}, and "
            f"{', '.join(map(repr, others))} is handed to the units beside it"
        )
    _share_out(reading, stretches)
    for stretch in stretches:
        stretch.output = reading.output(stretch.post)
        stretch.name = stretch.name or _name(reading, stretch, stretches)
        zeros = [reading.output(node, outside=stretch.end) for node in _addends(reading, stretch)]
        stretch.zeros = [end for end in zeros if end is not None] if all(zeros) else []
    return reading, stretches, remarks


class Reading:
    """What is known of a traced model: where the stream runs, its cuts, and which module computes what."""

    def __init__(self, traced: Traced) -> None:
        self.traced = traced
        nodes = list(traced.graph.nodes)
        self.order = {node: i for i, node in enumerate(nodes)}
        self.stacks = {node: list(self._stack(node)) for node in nodes}
        self.calls: dict[Key, set[fx.Node]] = {}
        for node in nodes:
            for key, _ in self.stacks[node]:
                self.calls.setdefault(key, set()).add(node)
        used = [node for node in traced.inputs if node.users]
        if not used:
            raise Unsupported("the model uses none of its inputs")
        preferred = ("inputs_embeds", "input_ids", "pixel_values")
        self.source = next((n for name in preferred for n in used if traced.inputs[n] == name), used[0])
        self.active = self._active(nodes)
        if traced.output not in self.active:
            raise Unsupported(f"the logits do not depend on the input {traced.inputs[self.source]!r}")
        # for every node, the position of the last stream node that it depends on, and whether it depends on no input
        self.latest: dict[fx.Node, int] = {}
        self.constant: dict[fx.Node, bool] = {}
        for node in nodes:
            args = node.all_input_nodes
            own = self.order[node] if node in self.active else -1
            self.latest[node] = max([own, *(self.latest[arg] for arg in args)])
            self.constant[node] = node.op != "placeholder" and all(self.constant[arg] for arg in args)
        self.cuts = self._cuts()
        self.place = {node: i for i, node in enumerate(self.cuts)}

    def _active(self, nodes: Sequence[fx.Node]) -> set[fx.Node]:
        """Return the stream: nodes that data flows through from the main input, and on to the logits."""
        reached = {self.source}
        for node in nodes:
            name = name_of(node)
            shape = name == "getattr" and node.args[1] in SHAPES
            ends = shape or name in NO_DATA or "assert" in name or "guard" in name
            if name == "to" and torch.bool in (*node.args, *node.kwargs.values()):
                ends = True
            if not ends and any(arg in reached for arg in node.all_input_nodes):
                reached.add(node)
        live = {self.traced.output}
        for node in reversed(nodes):
            if node in live:
                live.update(arg for arg in node.all_input_nodes if arg in reached)
        return reached & live

    def _cuts(self) -> list[fx.Node]:
        stream = sorted(self.active, key=self.order.__getitem__)
        last_use = {n: max((self.order[u] for u in n.users if u in self.active), default=self.order[n]) for n in stream}
        cuts, open_until = [], -1
        for node in stream:
            if open_until <= self.order[node]:
                cuts.append(node)
            open_until = max(open_until, last_use[node])
        return cuts

    @staticmethod
    def _stack(node: fx.Node) -> Iterator[tuple[Key, str]]:
        """Yield the module calls around a node, outermost first, with the modules' names."""
        for key, (name, _) in (node.meta.get("nn_module_stack") or {}).items():
            name = str(name).removeprefix("L['self'].").partition("@")[0]
            if name and not name.startswith(("_empty", "L['self']")):
                number = str(key).partition("@")[2]
                yield (f"{name}@{number}" if number else name), name

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
        return [arg for arg in node.all_input_nodes if arg in self.active]

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
                attributes = [a for arg in node.all_input_nodes for a in self._attributes(arg)]
                parameters = [p for p in attributes if isinstance(p, nn.Parameter)]
            found.update(id(p) for p in parameters if p.dim() >= least)
        return found

    def _attributes(self, node: fx.Node) -> Iterator[Any]:
        if node.op == "get_attr":
            yield self.traced.get(node.target)
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
        inside = self.calls[key] & self.active
        enters = {arg for node in inside for arg in self.stream_args(node)} - inside
        output = self.traced.output
        leaves = {n for n in inside if n is output or any(u in self.active and u not in inside for u in n.users)}
        return (enters.pop(), leaves.pop()) if len(enters) == len(leaves) == 1 else None

    def cut_region(self, key: Key) -> tuple[fx.Node, fx.Node] | None:
        """Return the region of a module call if it starts and ends at cuts, else None."""
        region = self.region(key)
        return region if region is not None and all(node in self.place for node in region) else None

    def output(self, node: fx.Node, outside: fx.Node | None = None) -> tuple[str, int] | None:
        """Return the module, and which of its calls, that returns a node's value and does not hold ``outside``."""
        for key, name in self.stacks[node]:
            if outside is not None and self.under(outside, key):
                continue
            region = self.region(key)
            if region is not None and region[1] is node:
                return name, int(key.partition("@")[2] or 0)
        return None

    def operands(self, node: fx.Node) -> Terms | None:
        """Return the two operands of an addition or subtraction of values of the stream, with their factors."""
        kind = node.target if node.op == "call_function" else name_of(node) if node.op == "call_method" else None
        if kind not in ADD | SUB:
            return None
        args = [*node.args, node.kwargs.get("other", node.kwargs.get("value"))][:2]
        nodes = [arg for arg in args if isinstance(arg, fx.Node) and arg in self.active]
        alpha = node.kwargs.get("alpha", 1) or 1
        if len(nodes) < 2 or not isinstance(alpha, (int, float)):
            return None
        return [(nodes[0], 1.0), (nodes[1], -float(alpha) if kind in SUB else float(alpha))]


# ---------------------------------------------------------------- finding stretches


def _blocks(reading: Reading, blocks: Collection[str]) -> list[Stretch]:
    """Return the stretches of the calls of known blocks."""
    found = []
    for key, name in reading.cut_calls().items():
        if name in blocks:
            region = reading.cut_region(key)
            if region is None or not _takes_the_state_alone(reading, key):
                raise NotABlock(name)
            found.append(Stretch(*region, key, block=name, name=name))
    return found


def _takes_the_state_alone(reading: Reading, key: Key) -> bool:
    """Whether a call of a block has no other argument than the state that could matter, and returns one tensor."""
    inside = reading.calls[key]
    for node in inside:
        others = [
            value for value in [*node.args[1:], *node.kwargs.values()] if value is not None and value is not False
        ]
        if others and node.op == "call_module" and reading.owner(node) == key:  # the block itself, not looked into
            return False
        for arg in node.all_input_nodes:
            foreign = arg not in inside and arg not in reading.active
            if foreign and not reading.constant[arg] and not name_of(arg).startswith("sym_"):
                return False
    return not any(user.target is operator.getitem for n in inside for user in n.users if user not in inside)


def _sums(reading: Reading, taken: set[fx.Node]) -> tuple[list[Stretch], list[str]]:
    """Return the residual additions outside the cuts that are taken, and what a user should be told of others."""
    found, remarks = [], []
    for start, end in zip(reading.cuts, reading.cuts[1:], strict=False):
        if end in taken or all(arg is start for arg in reading.stream_args(end)):
            continue
        read = _residual_sum(reading, start, end)
        if isinstance(read, str):
            remarks.append(read)
        elif read is not None:
            found.append(read)
            if inner := sum(_inner_sums(reading, start, node) for node, _ in read.branch):
                remarks.append(
                    f"the branch that ends at {end.name} (in {read.owner or 'the forward of the model'}) holds "
                    f"{inner} residual additions of its own: they count as one unit. To look into it, unravel the part "
                    "of the model within"
                )
        elif name_of(end) in MERGES:
            inside = reading.between(start, end)
            if sums := sum(reading.operands(node) is not None for node in inside):
                remarks.append(
                    f"{sums} additions lie within ways that are concatenated at {end.name}, as in a U-Net or a "
                    "cross-stage network: they are no units of the chain"
                )
    return found, remarks


def _residual_sum(reading: Reading, start: fx.Node, end: fx.Node) -> Stretch | str | None:
    """Read a bead as a residual addition; None if it is none, or a sentence why it looks like one but is not."""
    direct = reading.operands(end)
    if direct is None:
        return None

    def flatten(node: fx.Node, factor: float) -> Terms:
        inner = reading.operands(node) if reading.order[node] > reading.order[start] else None
        if inner is None or len([u for u in node.users if u in reading.active]) > 1:
            return [(node, factor)]
        return [term for operand, own in inner for term in flatten(operand, factor * own)]

    terms = [term for operand, factor in direct for term in flatten(operand, factor)]
    ways = [reading.between(start, node) if node is not start else set() for node, _ in terms]
    skips = [i for i, (node, _) in enumerate(terms) if node is start]
    if not skips:  # no identity: the way with the fewest weights, or the one that is called a skip
        weights = [len(reading.weights(way)) for way in ways]
        skips = [i for i, weight in enumerate(weights) if weight == min(weights)]
        if len(skips) != 1:
            names = [{n.rpartition(".")[2].lower() for node in way for _, n in reading.stacks[node]} for way in ways]
            skips = [i for i, own in enumerate(names) if any(word in name for name in own for word in SKIPS)]
        if len(skips) != 1:
            return None
    branches = [i for i in range(len(terms)) if i not in skips]
    skip_way, branch_way = ({n for i in some for n in ways[i]} for some in (skips, branches))
    if not reading.weights(branch_way, least=1):
        return None
    if reading.weights(skip_way & branch_way, least=1):
        shared = sorted(n.name for n in skip_way & branch_way if reading.weights([n], least=1))
        return (
            f"the skips that end at {end.name} cross those of other blocks: both operands of this sum hold the weights "
            f"of {', '.join(shared[:3])}"
        )
    skip, branch, exact = [terms[i] for i in skips], [terms[i] for i in branches], False
    for (operand, factor), (other, sign) in (direct, direct[::-1]):
        if not exact and [(operand, factor)] == skip and abs(factor) == abs(sign) == 1:
            branch, exact = [(other, sign)], True
    return Stretch(start, end, reading.owner(end), skip, branch, exact=exact)


def _inner_sums(reading: Reading, start: fx.Node, end: fx.Node) -> int:
    """Count the additions of a value to itself, transformed with weights, on the ways to a branch's end."""
    count = 0
    for node in reading.between(start, end):
        if pair := reading.operands(node):
            early, late = sorted((operand for operand, _ in pair), key=reading.order.__getitem__)
            way = reading.between(early, late)
            count += any(early in n.all_input_nodes for n in way) and bool(reading.weights(way))
    return count


def _within(reading: Reading, stretches: list[Stretch], names: Sequence[str]) -> list[Stretch]:
    """Keep the stretches within the modules named by hand; a module without any is a plain unit."""
    kept = []
    for name in names:
        calls = [key for key in reading.calls if key.partition("@")[0] == name and reading.calls[key] & reading.active]
        if not calls:
            raise Unsupported(f"the forward pass does not call {name!r}, or the stream does not go through it")
        for key in calls:
            inside = [stretch for stretch in stretches if reading.under(stretch.end, key)]
            region = reading.cut_region(key)
            if not inside and region is None:
                raise Unsupported(
                    f"{name!r} is no unit: a unit takes one state and returns the next, and other ways lead past it"
                )
            kept += inside if region is None else inside or [Stretch(*region, key)]
    return kept


def _with_plain(model: nn.Module, reading: Reading, stretches: list[Stretch]) -> list[Stretch]:
    """Add a plain unit for every block without a skip whose class is that of a residual one."""
    owners = {stretch.owner for stretch in stretches} - {""}
    classes = {type(model.get_submodule(key.partition("@")[0])) for key in owners} - {nn.Sequential, nn.ModuleList}
    plain = []
    for key, name in reading.cut_calls().items():
        if key not in owners and type(model.get_submodule(name)) in classes:
            region = reading.cut_region(key)
            if region is not None and not any(reading.under(stretch.end, key) for stretch in stretches):
                plain.append(Stretch(*region, key))
    return stretches + plain


def _nothing_found(model: nn.Module, reading: Reading, remarks: Sequence[str]) -> str:
    nodes = sorted(reading.active, key=reading.order.__getitem__)
    joins = [n for n in nodes if name_of(n) in MERGES and len(reading.stream_args(n)) > 1]
    sums = [node for node in nodes if reading.operands(node) is not None]
    name = type(model).__name__
    if remarks:
        return f"no chain of residual units computes {name}: {'; '.join(remarks)}"
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


# ---------------------------------------------------------------- states and names


def _share_out(reading: Reading, stretches: list[Stretch]) -> None:
    """Decide for what lies between two stretches whether it follows the first sum or prepares the second unit."""
    one_owner = len({stretch.owner for stretch in stretches}) == 1 and len(stretches) > 1
    posts: list[list[Any]] = []
    for stretch, after in zip(stretches, [*stretches[1:], None], strict=True):
        post: list[Any] = []
        for node in reading.cuts_after(stretch.end, after.start if after else None):
            operation = type(reading.traced.get(node.target)) if node.op == "call_module" else node.target
            follows = reading.under(node, stretch.owner)
            if after is None and (one_owner or not stretch.owner):  # as after all the other units
                usual = posts and all(other == posts[0] for other in posts) and len(post) < len(posts[0])
                follows = bool(usual) and operation == posts[0][len(post)]
            elif after is not None and (stretch.owner == after.owner or not stretch.owner):
                prepares = bool(after.owner) and stretch.owner != after.owner and reading.under(node, after.owner)
                follows = follows and not prepares and _same_shape(reading, node, stretch.end)
            if not follows:
                break
            stretch.post = node
            post.append(operation)
        posts.append(post)
    first = stretches[0]
    i = reading.place[first.start]
    while i > 0 and first.owner and not first.block and reading.under(reading.cuts[i], first.owner):
        i -= 1
    states = [reading.cuts[i], *(stretch.post for stretch in stretches)]
    for stretch, state in zip(stretches, states, strict=False):
        stretch.state = state


def _same_shape(reading: Reading, node: fx.Node, other: fx.Node) -> bool:
    """Whether two values have the same shape, or where that is not known, the first is computed without weights."""
    if "shape" in other.meta:
        return node.meta.get("shape") == other.meta["shape"]
    return not reading.weights([node], least=1)


def _name(reading: Reading, stretch: Stretch, stretches: Sequence[Stretch]) -> str:
    """Return a unit's name: that of its module, and of the layer in it where the module holds several units."""
    owner = stretch.owner.partition("@")[0]
    if not stretch.branch or (owner and [other.owner for other in stretches].count(stretch.owner) == 1):
        return owner
    members = {n for node, _ in stretch.branch for n in reading.between(stretch.start, node)}
    nodes = [node for node in sorted(members, key=reading.order.__getitem__) if reading.weights([node])]
    prefix = f"{owner}." if owner else ""
    below = [[n for _, n in reading.stacks[node] if n != owner and n.startswith(prefix)] for node in nodes]
    first = [names[0] for names in below if names]
    if first and not owner and "." not in first[-1]:  # the model's own loop over a list: the entry, not the list
        return next((name for name in below[-1] if "." in name), first[-1])
    return first[-1] if first else f"{prefix}{stretch.end.name}"


def _addends(reading: Reading, stretch: Stretch) -> list[fx.Node]:
    """Return what a branch adds up, as far as no module returns the sum."""
    addends, todo = [], [node for node, _ in stretch.branch]
    while todo:
        node = todo.pop()
        pair = None if reading.output(node, outside=stretch.end) else reading.operands(node)
        todo += [operand for operand, _ in pair or []]
        addends += [] if pair else [node]
    return addends
