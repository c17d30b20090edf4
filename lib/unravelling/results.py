"""Measured results as tidy CSV files, with the record of how each was made beside them."""

from __future__ import annotations

import json
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from filelock import FileLock

from .data import write_atomically
from .weights import data_folder

KEYS = ["dataset", "network", "seed", "recipe"]
"""Columns that tell the rows of a table apart."""


DEFAULT_RECIPES = {"digits": "digits", "cifar10": "brief"}
"""The recipe of the networks that most figures show; others are asked for by name, so that none mixes two unawares."""


def stored(name: str, folder: str | Path | None = None, *, recipe: str | None = "default") -> pd.DataFrame:
    """Return stored results, such as ``stored("digits/delete_each")``.

    Args:
        name: dataset and quantity.
        folder: that holds ``<dataset>/<quantity>.csv``; the project's ``data/results`` when None.
        recipe: rows of networks trained by this recipe; by the ordinary one of the dataset when ``"default"``, by any
            when None.

    Raises:
        FileNotFoundError: nothing is stored under this name; the message lists what is.
    """
    root = data_folder() / "results" if folder is None else Path(folder)
    path = root / f"{name}.csv"
    if not path.is_file():
        there = sorted(p.relative_to(root).with_suffix("").as_posix() for p in root.rglob("*.csv"))
        raise FileNotFoundError(f"no stored results {name!r}: there are {', '.join(there) or 'none'}")
    table = pd.read_csv(path)
    if recipe == "default":
        recipe = DEFAULT_RECIPES.get(name.split("/")[0])
    return table if recipe is None else table[table["recipe"] == recipe].reset_index(drop=True)


def label(dataset: str, recipe: str = "default", folder: str | Path | None = None) -> str:
    """Return what stored results of a dataset are about, such as ``"CIFAR-10 (JPEG-75 copy), recipe brief, seed 0"``.

    Args:
        dataset: ``"digits"`` or ``"cifar10"``.
        recipe: of the networks; the ordinary one of the dataset when ``"default"``.
        folder: as in `stored`.

    Raises:
        FileNotFoundError: nothing is stored for this dataset.
    """
    recipe = DEFAULT_RECIPES[dataset] if recipe == "default" else recipe
    networks = stored(f"{dataset}/networks", folder, recipe=recipe)
    root = data_folder() / "results" if folder is None else Path(folder)
    record = json.loads((root / dataset / "provenance.json").read_text())
    copies = {run["data"] for runs in record.values() for run in runs if "data" in run}
    name = " and ".join(sorted(copies)) or dataset
    return f"{name}, recipe {recipe}, {seeds(networks) if len(networks) else 'no network yet'}"


def seeds(table: pd.DataFrame) -> str:
    """Return how many training runs stand behind the rows of each network, such as ``"seed 0"`` or ``"1 to 3 seeds"``.

    Args:
        table: of one dataset, with the columns ``network``, ``recipe`` and ``seed``, not empty.
    """
    if table["seed"].nunique() == 1:
        return f"seed {int(table['seed'].iloc[0])}"
    counts = table.groupby(["network", "recipe"])["seed"].nunique()
    low, high = counts.min(), counts.max()
    return f"{high} seeds" if low == high else f"{low} to {high} seeds"


def store(table: pd.DataFrame, path: str | Path, command: str, seconds: float, data: str | None = None) -> None:
    """Add the rows of one network to a CSV file, in place of its earlier rows, and record how they were made.

    The file is replaced in one step and under a lock: it is complete at any time, and several processes may write it.

    Args:
        table: rows of one dataset, network, seed and recipe, which are its first columns. What ``table.attrs`` says of
            the ``images`` and the ``weights`` goes into the record.
        path: the CSV file; ``provenance.json`` is kept beside it.
        command: that measured the rows.
        seconds: the measurement took.
        data: which copy of the images was used, `unravelling.data.Dataset.label`.
    """
    about = {"data": data} | {name: table.attrs.get(name) for name in ("images", "weights")}
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    key = tuple(table[KEYS].iloc[0])
    with FileLock(path.parent / ".lock"):
        if path.exists():
            old = pd.read_csv(path)
            other = (old[KEYS] != pd.Series(dict(zip(KEYS, key, strict=True)))).any(axis=1)
            table = pd.concat([old[other], table])
        table = table.sort_values(KEYS, kind="stable")
        write_atomically(path, lambda temporary: table.to_csv(temporary, index=False, float_format="%.6g"))
        _record(path, f"{key[1]}-seed{key[2]}-{key[3]}", command, seconds, about)


def _record(path: Path, row: str, command: str, seconds: float, about: dict[str, str | None]) -> None:
    """Note in provenance.json, grouped by what runs have in common, how ``row`` of the file was made."""
    file = path.parent / "provenance.json"
    record = json.loads(file.read_text()) if file.exists() else {}
    runs = [
        run | {"seconds": {k: v for k, v in run["seconds"].items() if k != row}} for run in record.get(path.name, [])
    ]
    made: dict[str, Any] = {key: value for key, value in about.items() if value} | {
        "command": command,
        "commit": commit(),
        "versions": {name: version(name) for name in ("torch", "numpy", "pandas", "unravelling")},
        "hardware": hardware(),
    }
    same = next((run for run in runs if run == made | {"seconds": run["seconds"]}), None)
    if same is None:
        runs.append(same := made | {"seconds": {}})
    same["seconds"][row] = round(seconds, 1)
    record[path.name] = [run for run in runs if run["seconds"]]
    write_atomically(file, lambda temporary: temporary.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n"))


def hardware() -> str:
    """Return the processor's kind, the number of threads, and the GPU if there is one."""
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{platform.machine()}, {torch.get_num_threads()} threads{gpu}"


def commit() -> str:
    """Return the commit of the library's source, with a plus sign when its files differ from it."""
    folder = Path(__file__).parent

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", ".") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
