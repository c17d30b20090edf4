"""The one abstraction of the library: a network as a chain of units."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from numbers import Integral, Real
from operator import mul
from typing import Any, cast

import numpy as np
from torch import Tensor, nn

FLAG = (bool, np.bool_), "True or False"  # for check_kind: as an option, any text would count as True


def check_number(least: int | None = 0, /, **number: Any) -> int:
    """Return the one number given by name; raise TypeError where it is not whole, ValueError where it is too small."""
    ((name, value),) = number.items()
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be a whole number, not {value!r:.80}")
    value = int(value)
    if least is not None and value < least:
        raise ValueError(f"{name} must be at least {least}, not {value}")
    if abs(value) >= 2**63:
        raise ValueError(f"{name} must be less than 2^63, not {value}")
    return value


def check_kind(kind: Any, expected: str, /, **values: Any) -> None:
    """Raise TypeError for a value, given by name, of another kind; the message says what was ``expected``."""
    for name, value in values.items():
        if not isinstance(value, kind):
            raise TypeError(f"{name} is a {type(value).__name__}: expected {expected}")


def check_chain(chain: Any) -> Chain:
    """Return a chain as it is, or raise TypeError for anything else."""
    check_kind(Chain, "a Chain, such as unravel(model, x) returns", chain=chain)
    return chain


def listed(**values: Any) -> list:
    """Return the one argument given by name as a list, or raise TypeError or ValueError where nothing is in it."""
    ((name, value),) = values.items()
    try:
        several = list(value)
    except TypeError as error:
        raise TypeError(f"{name} is {value!r:.80}: expected several, such as a list of one") from error
    if not several:
        raise ValueError(f"{name} is empty: expected at least one member")
    return several


class Change(nn.Module):
    """A function of a tensor as a module, such as one that changes what a branch returns."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, y: Tensor) -> Tensor:
        """Map a tensor of any shape to what the function makes of it."""
        return self.function(y)


class NoSkip(nn.Module):
    """The skip of a plain unit that changes the shape of its state: there is none, so the unit cannot be deleted."""

    def __init__(self, name: str = "") -> None:
        super().__init__()
        self.name = name

    def error(self) -> ValueError:
        """Return the error that says why the unit cannot be deleted."""
        reason = "has no skip and changes the shape of its state: nothing is left in its place when it is deleted"
        return ValueError(f"the unit {self.name or 'without a name'} {reason}. Leave it in, or give it a skip")

    def forward(self, y: Tensor) -> Tensor:
        """Raise ValueError."""
        raise self.error()


def _changes_shape(skip: nn.Module) -> bool:
    """Return whether a skip says by its kind or its sizes that it changes the shape of its input."""
    for part in skip.modules():
        size = vars(part).get
        if isinstance(part, NoSkip) or size("extra_channels") or size("stride", 1) not in (1, (1,), (1, 1), (1, 1, 1)):
            return True
        if size("in_channels") != size("out_channels") or size("in_features") != size("out_features"):
            return True
    return False


class Unit(nn.Module):
    """One block of a chain: ``post(skip(y) + branch(y))``, or ``post(branch(y))`` where it is not residual.

    With an identity ``skip`` and ``post`` this is equation (1) of Veit et al. (2016), y_i = f_i(y_{i-1}) + y_{i-1}.

    Args:
        branch: the residual branch f_i, mapping ``(B, C, H, W)`` to ``(B, C', H', W')``; None for a deleted unit,
            which computes ``post(skip(y))`` alone.
        skip: the shortcut, to the same shape as the branch; the identity when None.
        post: what follows the sum; the identity when None (pre-activation), a ReLU in the 2015 networks.
        residual: whether the skip takes part in the sum. A plain unit keeps its ``skip`` for its deletion only.
        name: shown in tables, such as ``"stage2.block5"``.
        stage: number of the stage the unit belongs to, from 1.
        transition: whether the unit changes the shape of its state; when None, whether its skip does by its kind or
            sizes, such as `NoSkip` or a convolution with a stride.
    """

    def __init__(
        self, branch: nn.Module | None, skip: nn.Module | None = None, post: nn.Module | None = None, *,
        residual: bool = True, name: str = "", stage: int = 1, transition: bool | None = None,
    ) -> None:
        super().__init__()
        parts = {"branch": branch, "skip": skip, "post": post}
        check_kind(nn.Module, "Module", **{name: part for name, part in parts.items() if part is not None})
        self.branch = branch
        self.skip = nn.Identity() if skip is None else skip
        self.post = nn.Identity() if post is None else post
        self.residual = residual
        self.name = name
        self.stage = stage
        self.is_transition = _changes_shape(self.skip) if transition is None else transition
        check_kind(*FLAG, residual=residual, transition=self.is_transition)
        self.is_changed = False  # made from another unit, by deleting its branch or putting another in its place

    @property
    def has_identity_skip(self) -> bool:
        """Whether the skip hands on its input as it is."""
        return isinstance(self.skip, nn.Identity)

    @property
    def is_deleted(self) -> bool:
        """Whether the branch is gone, leaving the skip alone."""
        return self.branch is None

    @property
    def can_be_deleted(self) -> bool:
        """Whether something of the right shape is left without the branch."""
        return not isinstance(self.skip, NoSkip)

    def deleted(self) -> Unit:
        """Return a unit that shares this one's skip and post and has no branch; a ValueError without a skip."""
        if isinstance(self.skip, NoSkip):
            raise self.skip.error()
        return self._with(None)

    def scaled(self, factor: float) -> Unit:
        """Return a unit that shares this one's parts and multiplies the branch by ``factor``."""
        return self.then(Change(partial(mul, factor)))

    def then(self, change: nn.Module) -> Unit:
        """Return a unit that shares this one's parts and puts ``change`` of the branch in the branch's place."""
        return self if self.branch is None else self._with(nn.Sequential(self.branch, change))

    def split(self, c: float) -> Unit:
        """Return a unit that computes the same as the sum of c·y and a branch f(y) + (1 - c)·y, and shares its parts.

        A unit that is deleted, plain, or has a skip other than the identity is returned as it is.
        """
        if self.branch is None or not self.residual or not self.has_identity_skip:
            return self
        branch = Unit(self.branch, Change(partial(mul, 1 - c)))
        branch.skip.training = branch.post.training = self.training
        return self._with(branch, Change(partial(mul, c)))

    def _with(self, branch: nn.Module | None, skip: nn.Module | None = None) -> Unit:
        options: dict[str, Any] = {"name": self.name, "stage": self.stage, "transition": self.is_transition}
        unit = Unit(branch, skip or self.skip, self.post, residual=self.residual or branch is None, **options)
        unit.is_changed = True
        for part in filter(None, (unit, branch, skip)):  # .train() would also set the mode of shared modules
            part.training = self.training
        return unit

    def forward(self, y: Tensor) -> Tensor:
        """Map y_{i-1} of shape ``(B, C, H, W)`` to y_i of shape ``(B, C', H', W')``."""
        if self.branch is None:
            return self.post(self.skip(y))
        f = self.branch(y)
        return self.post(self.skip(y) + f if self.residual else f)

    def extra_repr(self) -> str:
        """Name the unit and its kind."""
        kind = "deleted" if self.is_deleted else "residual" if self.residual else "plain"
        return f"{self.name or 'unnamed'}, stage {self.stage}, {kind}{', transition' if self.is_transition else ''}"


class Chain(nn.Module):
    """A network as a stem, units and a head: y_0 = stem(x), y_i = units[i-1](y_{i-1}), logits = head(y_n).

    Units are numbered from 0, so that unit i computes y_{i+1} from y_i.

    Args:
        stem: maps images ``(B, C, H, W)`` to y_0.
        units: the units, in order.
        head: maps y_n to logits ``(B, K)``, or ``(B, T, K)`` for a language model.
        config: how `unravelling.nets.build` makes this network; None for any other chain.
    """

    units: Sequence[Unit]

    def __init__(self, stem: nn.Module, units: Iterable[Unit], head: nn.Module, config: dict | None = None) -> None:
        super().__init__()
        check_kind(nn.Module, "Module", stem=stem, head=head)
        check_kind(Iterable, "Iterable", units=units)
        units = list(units)
        for unit in units:
            check_kind(Unit, "Unit", unit=unit)
        self.stem = stem
        self.units = cast("Sequence[Unit]", nn.ModuleList(units))
        self.head = head
        self.config = config

    def __len__(self) -> int:
        return len(self.units)

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``(B, C, H, W)`` to logits ``(B, K)``."""
        y = self.stem(x)
        for unit in self.units:
            y = unit(y)
        return self.head(y)

    def __getattr__(self, name: str) -> Any:
        if name == "generate":
            loop = "tokens = torch.cat([tokens, chain(tokens)[:, -1:].argmax(-1)], 1)"
            raise AttributeError(f"a chain keeps no state between calls, so write generate as a loop, such as {loop}")
        return super().__getattr__(name)

    def trace(self, x: Tensor) -> list[Tensor]:
        """Return the states y_0 … y_n, n + 1 tensors, for images ``x`` of shape ``(B, C, H, W)``."""
        states = [self.stem(x)]
        for unit in self.units:
            states.append(unit(states[-1]))
        return states

    def without(self, *indices: int) -> Chain:
        """Return a chain in which the given units are deleted, y_i = post_i(skip_i(y_{i-1})).

        This is the lesion of section 4.1 of Veit et al. (2016). The new chain has the same length and shares every
        parameter; this one stays as it is.

        Raises:
            IndexError: a unit does not exist.
            ValueError: a unit is named twice.
        """
        gone = set(self.check_indices(indices))
        return self.with_units(unit.deleted() if i in gone else unit for i, unit in enumerate(self.units))

    def reordered(self, order: Sequence[int]) -> Chain:
        """Return a chain whose i-th unit is unit ``order[i]`` of this one (section 4.3 of Veit et al., 2016).

        Raises:
            IndexError: a unit does not exist.
            ValueError: ``order`` is no permutation of 0 … n-1, moves a transition unit, or one into another stage.
        """
        return self.with_units(self.units[i] for i in self.check_order(order))

    def split(self, c: float | Sequence[float]) -> Chain:
        """Return a chain that computes the same from y + f = c·y + [f + (1 - c)·y], the bracket called the branch.

        Its paths differ, its gradient does not (see `unravelling.paths.canonical_split`). Deleting one of its units
        leaves c·y. Units that are deleted or plain, or whose skip is not the identity, stay as they are.

        Args:
            c: the factor of every unit, or one for each ``(n,)``, of which NaN leaves a unit as it is.

        Raises:
            TypeError, ValueError: there are not n factors, or one is no finite number.
        """
        factors = list(c) if isinstance(c, Iterable) else [c] * len(self)
        if len(factors) != len(self):
            raise ValueError(f"c has {len(factors)} factors, but this chain has {len(self)} units: give one or all")
        for factor in factors:
            if isinstance(factor, bool) or not isinstance(factor, Real):
                raise TypeError(f"c holds {factor!r:.80}: expected numbers")
            if math.isinf(factor):
                raise ValueError(f"c holds {factor}: expected finite numbers, or NaN to leave a unit as it is")
        pairs = zip(self.units, factors, strict=True)
        return self.with_units(unit if math.isnan(factor) else unit.split(float(factor)) for unit, factor in pairs)

    def with_units(self, units: Iterable[Unit]) -> Chain:
        """Return a chain of other units between the same stem and head."""
        chain = Chain(self.stem, units, self.head, self.config)
        chain.training = chain.get_submodule("units").training = self.training  # .train() would set shared modules, too
        return chain

    def check_indices(self, indices: Sequence[int]) -> list[int]:
        """Return ``indices`` as a list, or raise IndexError for a missing and ValueError for a repeated unit."""
        checked: list[int] = []
        for i in indices if isinstance(indices, Iterable) else [indices]:
            single = isinstance(i, (Real, Tensor)) and not isinstance(i, bool) and not getattr(i, "ndim", 0)
            if not single or i % 1 != 0 or not 0 <= i < len(self):  # 2.0 will do
                raise IndexError(f"unit {i!r} does not exist: this chain has units 0 to {len(self) - 1}")
            if int(i) in checked:
                raise ValueError(f"unit {i} is named more than once: name each unit once")
            checked.append(int(i))
        return checked

    def check_order(self, order: Sequence[int]) -> list[int]:
        """Return ``order`` as a list, or raise what `reordered` raises."""
        order = listed(order=order)
        if len(order) != len(self):
            raise ValueError(f"order names {len(order)} units, but this chain has {len(self)}: name each one once")
        checked = self.check_indices(order)
        for position, i in enumerate(checked):
            here, unit = self.units[position], self.units[i]
            if position != i and (here.is_transition or unit.is_transition):
                moved = i if unit.is_transition else position
                raise ValueError(f"unit {moved} changes the shape of its input: leave it at position {moved}")
            if unit.stage != here.stage:
                place = f"at position {position}, which is in stage {here.stage}: move units within their stage only"
                raise ValueError(f"unit {i} belongs to stage {unit.stage} and does not fit {place}")
        return checked

    def __repr__(self) -> str:
        """One line: kind, units a stage, deleted units and parameters."""
        stages = "+".join(map(str, Counter(unit.stage for unit in self.units).values()))
        gone = [i for i, unit in enumerate(self.units) if unit.is_deleted]
        name = self.config["name"] if self.config else "chain"
        million = sum(p.numel() for p in self.parameters()) / 1e6
        return f"{name}: {len(self)} units ({stages}){f', deleted {gone}' * bool(gone)}, {million:.2f} M parameters"
