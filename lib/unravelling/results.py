"""Measured results as tidy CSV files, with the record of how each was made beside them."""

from __future__ import annotations

import json
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

import pandas as pd
import torch
from filelock import FileLock

from .data import write_atomically
from .weights import data_folder

KEYS = ["dataset", "network", "seed", "recipe"]


DEFAULT_RECIPES = {"digits": "digits", "cifar10": "short"}
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


def store(table: pd.DataFrame, path: str | Path, command: str, seconds: float) -> None:
    """Add the rows of one network to a CSV file, in place of its earlier rows, and record how they were made.

    The file is replaced in one step and under a lock: it is complete at any time, and several processes may write it.

    Args:
        table: rows of one dataset, network, seed and recipe, which are its first columns.
        path: the CSV file; ``provenance.json`` is kept beside it.
        command: that measured the rows.
        seconds: the measurement took.
    """
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
        _record(path, f"{key[1]}-seed{key[2]}-{key[3]}", command, seconds)


def _record(path: Path, row: str, command: str, seconds: float) -> None:
    """Note in provenance.json, grouped by what runs have in common, how ``row`` of the file was made."""
    file = path.parent / "provenance.json"
    record = json.loads(file.read_text()) if file.exists() else {}
    runs = [
        run | {"seconds": {k: v for k, v in run["seconds"].items() if k != row}} for run in record.get(path.name, [])
    ]
    made = {
        "command": command,
        "commit": _commit(),
        "versions": {name: version(name) for name in ("torch", "numpy", "pandas", "unravelling")},
        "hardware": f"{platform.machine()}, {torch.get_num_threads()} threads"
        + (f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""),
    }
    same = next((run for run in runs if all(run[k] == v for k, v in made.items())), None)
    if same is None:
        runs.append(same := made | {"seconds": {}})
    same["seconds"][row] = round(seconds, 1)
    record[path.name] = [run for run in runs if run["seconds"]]
    write_atomically(file, lambda temporary: temporary.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n"))


def _commit() -> str:
    """Return the commit of the library's source, with a plus sign when its files differ from it."""
    folder = Path(__file__).parent

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", ".") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
