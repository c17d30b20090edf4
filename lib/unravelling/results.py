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
from .stored import DEFAULT_RECIPES, KEYS, stored
from .wording import label, seeds

__all__ = ["DEFAULT_RECIPES", "KEYS", "commit", "hardware", "label", "seeds", "store", "stored"]


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
