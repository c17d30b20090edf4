"""The project's stored results: tidy tables of the long experiments. Only read here."""

from __future__ import annotations

import csv
from pathlib import Path

import pandas as pd

from .stats import check_table

KEYS = ["dataset", "network", "seed", "recipe"]
"""Columns that tell the rows of a table apart."""

IN_PROSE = {"digits": "the digits", "cifar10": "CIFAR-10"}
"""What prose calls a data set."""

DEFAULT_RECIPES = {"digits": "digits", "cifar10": "short"}
"""The recipe of the networks that most figures show; others are asked for by name, so that none mixes two unawares."""


def data_folder() -> Path:
    """Return ``data`` in the working directory, above it, or in the library's clone, else what a wheel brought.

    Raises FileNotFoundError where there is none.
    """
    here, library = Path.cwd(), Path(__file__).resolve().parent
    for folder in [*(clone / "data" for clone in [here, *here.parents, library.parents[1]]), library / "_stored"]:
        if (folder / "results").is_dir():
            return folder
    raise FileNotFoundError(f"no data/results in {here} or above it, or in {library}: install the library anew")


def stored(name: str, folder: str | Path | None = None, *, recipe: str | None = "default") -> pd.DataFrame:
    """Return stored results, such as ``stored("digits/delete_each")``.

    Args:
        name: data set and quantity.
        folder: that holds ``<dataset>/<quantity>.csv``; the project's ``data/results`` when None.
        recipe: by which the networks were trained; the ordinary one of the data set when ``"default"``, any when None.

    Raises FileNotFoundError where nothing is stored under this name, and ValueError where the file is broken.
    """
    root = data_folder() / "results" if folder is None else Path(folder)
    path = root / f"{name}.csv"
    if not path.is_file():
        there = sorted(p.relative_to(root).with_suffix("").as_posix() for p in root.rglob("*.csv"))
        raise FileNotFoundError(f"no stored results {name!r}: there are {', '.join(there) or 'none'}")
    try:
        _check_rows(path)
        table = pd.read_csv(path, dtype={"seed": int})
        table[KEYS]  # which all have
    except (ValueError, KeyError, csv.Error) as error:
        raise ValueError(f"{path} is broken ({error}): restore it by git, or install the library anew") from error
    recipe = DEFAULT_RECIPES.get(name.split("/")[0]) if recipe == "default" else recipe
    return table if recipe is None else table[table["recipe"] == recipe].reset_index(drop=True)


def _check_rows(path: Path) -> None:
    """Raise ValueError for a row that was cut, or that git left in a merge: pandas would fill up what it lacks."""
    *lines, rest = path.read_text(encoding="utf-8").split("\n")
    if rest:
        raise ValueError(f"line {len(lines) + 1} has no end, so that it may be cut: {rest!r:.40}")
    rows = csv.reader(lines, strict=True)
    width = len(next(rows, []))
    for row in rows:
        if len(row) not in (0, width):
            raise ValueError(f"line {rows.line_num} has {len(row)} of {width} columns: {','.join(row)!r:.40}")


def both(quantity: str, *networks: str, recipe: str | None = "default") -> dict[str, pd.DataFrame]:
    """Return stored results on the digits and on CIFAR-10, in this order; what is not stored has no rows.

    Args:
        quantity: such as ``"delete_each"``.
        networks: whose rows are wanted, all when none is named.
        recipe: as `stored` takes it.
    """
    tables = {}
    for dataset in DEFAULT_RECIPES:
        known = (data_folder() / f"results/{dataset}/{quantity}.csv").is_file()
        table = stored(f"{dataset}/{quantity}", recipe=recipe) if known else pd.DataFrame(columns=KEYS)
        tables[dataset] = table[table["network"].isin(networks)] if networks else table
    return tables


def intact_error(table: pd.DataFrame) -> float:
    """Return the mean error, as a fraction, of a lesion table's networks before any lesion."""
    check_table(table, ["error", "delta_error"], "unravelling.lesion.delete_each")
    return (table["error"] - table["delta_error"]).mean()
