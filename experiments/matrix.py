"""The matrix of runs: what `config.yaml` asks for, row by row, and where each row's cells are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from measurements import ENSEMBLE, applicable
from unravelling import RECIPES, build
from unravelling.chain import check_number
from unravelling.nets import SHAPES

TARGETS = ("paper", "weights", "toy")
TRAINING = ("networks", "training", "gradient_norms", "spectrum_training")
"""Tables that train.py writes beside the weights."""
TEXTS = dict.fromkeys(("network", "variant", "recipe"), str)
KINDS = TEXTS | {"tier": int, "members": int, "seeds": list, "measure": list, "ship": bool}


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


def configuration() -> dict[str, Any]:
    """Return the content of `config.yaml`.

    Raises:
        ValueError: it is broken; the message has the line.
    """
    path = Path(__file__).with_name("config.yaml")
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML: mend it ({error})") from error


def rows(config: Mapping[str, Any], target: str) -> Iterator[Row]:
    """Yield the rows of a target, one of `TARGETS`, in order.

    Args:
        config: the content of `config.yaml`.
        target: one of its parts.

    Raises:
        ValueError: a recipe, network, measurement or key is unknown, or of the wrong kind.
    """
    try:
        dataset, base, lines = config[target]["dataset"], config[target]["recipe"], [*config[target]["rows"]]
    except (TypeError, LookupError) as error:
        raise ValueError(f"{target} needs dataset, recipe and rows") from error
    if dataset not in SHAPES:
        raise ValueError(f"{target}: there is no dataset {dataset}: choose {', '.join(SHAPES)}")
    for line in lines:
        if not isinstance(line, Mapping) or not {"network", "seeds"} <= set(line):
            raise ValueError(f"{target}: the row {line!r} needs network and seeds")
        for key, value in line.items():
            if key not in KINDS:
                raise ValueError(f"{target}: {key} is not known: a row has {', '.join(KINDS)}")
            if type(value) is not KINDS[key]:
                raise ValueError(f"{target}: {key} must be a {KINDS[key].__name__}, not {value!r}")
        check_number(1, members=line.get("members", 1))
        recipe = "-".join(filter(None, (line.get("recipe", base), line.get("variant"))))
        name, size = line["network"], line.get("members", 0)
        possible = tuple(ENSEMBLE) if size else _applicable(name)
        measurements = tuple(line.get("measure", possible))
        for what, asked, known in (("recipe", [recipe], RECIPES), ("measurement", measurements, possible)):
            if unknown := [one for one in asked if one not in known]:
                raise ValueError(f"{target}: there is no {what} {unknown[0]} for {name}: choose {', '.join(known)}")
        for seed in line["seeds"]:
            if type(seed) is not int or seed < 0:
                raise ValueError(f"{target}: seeds are whole numbers from 0, not {seed!r}")
            members = tuple(Row(dataset, name, seed * size + i, recipe) for i in range(size))
            network = f"{name}x{size}" if size else name
            ships = line.get("ship", False) and seed == 0
            yield Row(dataset, network, seed, recipe, measurements, members, line.get("tier", 1), ships)


@cache
def _applicable(network: str) -> tuple[str, ...]:
    return tuple(applicable(build(network, "digits")))
