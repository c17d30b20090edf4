"""The matrix of runs: what `config.yaml` asks for, row by row, and where each row's cells are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from measurements import applicable
from unravelling import RECIPES, build

TRAINING = ("networks", "training", "gradient_norms", "spectrum_training")
"""Tables that train.py writes beside the weights."""


@dataclass(frozen=True)
class Row:
    """A network, the seed and the recipe it is trained with; several networks for an ensemble.

    Attributes:
        measurements: that are asked for.
        members: the rows of an ensemble's members; none for one network.
        tier: how important the row is, from 1.
        ships: whether its weights go into the project's data.
    """

    dataset: str
    network: str
    seed: int
    recipe: str
    measurements: tuple[str, ...] = field(default=(), compare=False)
    members: tuple[Row, ...] = field(default=(), compare=False)
    tier: int = field(default=1, compare=False)
    ships: bool = field(default=False, compare=False)

    def __str__(self) -> str:
        return f"{self.network}-seed{self.seed}-{self.recipe}"

    @property
    def folder(self) -> Path:
        """Where the row's cells are, within the folder of all runs."""
        return Path(self.dataset, self.recipe, f"{self.network}-seed{self.seed}")

    @property
    def weights(self) -> list[Path]:
        """The weights that the row's measurements take, within the folder of all runs."""
        return [row.folder / "weights.safetensors" for row in self.members or (self,)]

    @property
    def cells(self) -> list[Path]:
        """The row's measurements, within the folder of all runs."""
        return [self.folder / f"{name}.csv" for name in self.measurements]


def rows(config: Mapping[str, Any], target: str) -> Iterator[Row]:
    """Yield the rows of a target, in order.

    Args:
        config: the content of `config.yaml`.
        target: ``"paper"``, ``"weights"`` or ``"toy"``.

    Raises:
        ValueError: a recipe, a network or a key is unknown.
    """
    known = {"tier", "network", "variant", "recipe", "seeds", "measure", "ship", "members"}
    dataset, base, lines = (config[target][key] for key in ("dataset", "recipe", "rows"))
    for line in lines:
        if unknown := set(line) - known:
            raise ValueError(
                f"{target}: {', '.join(sorted(unknown))} is not known: a row has {', '.join(sorted(known))}"
            )
        recipe = line.get("recipe") or "-".join(filter(None, (base, line.get("variant"))))
        if recipe not in RECIPES:
            raise ValueError(f"{target}: there is no recipe {recipe}: choose one of {', '.join(RECIPES)}")
        name, size = line["network"], line.get("members", 0)
        measurements = tuple(line.get("measure", _applicable(name, dataset)))
        for seed in line["seeds"]:
            members = tuple(Row(dataset, name, seed * size + i, recipe) for i in range(size))
            network = f"{name}x{size}" if size else name
            ships = line.get("ship", False) and seed == 0
            yield Row(dataset, network, seed, recipe, measurements, members, line.get("tier", 1), ships)


@cache
def _applicable(network: str, dataset: str) -> tuple[str, ...]:
    return tuple(applicable(build(network, dataset)))
