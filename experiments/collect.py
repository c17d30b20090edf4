"""Bring cells into the project's data: results, records, weights and the page of runs, as a whole or not at all."""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from cells import KEYS, ROOT, checksum, follow_parent
from filelock import FileLock
from matrix import TRAINING, Row, rows
from unravelling import load, save
from unravelling.stats import wilson
from unravelling.weights import header

FILE_LIMIT, FOLDER_LIMIT, HALF_LIMIT = 10_000_000, 40_000_000, 3_000_000
"""Bytes of one file in the data, of all of them, and of weights that are not halved in precision."""
SHIPPED_PLAIN = {"digits": "digits", "cifar10": "brief"}
"""The recipe of each dataset whose weights have no recipe in their names."""

Content = dict[Path, bytes | None]
"""What files of the data will hold, by their path in it; None for one that goes."""


def main(arguments: list[str] | None = None) -> int:
    """Run a command line and return its exit status: 1 when something asked for was refused."""
    follow_parent()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", nargs="*", help="folders in --runs; all that config.yaml names when none is given")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs", metavar="FOLDER", help="default: runs")
    parser.add_argument("--data", type=Path, default=ROOT / "data", metavar="FOLDER", help="default: data")
    parser.add_argument("--drop", metavar="RECIPE", help="remove all results and weights of this recipe")
    options = parser.parse_args(arguments)
    config = yaml.safe_load((Path(__file__).parent / "config.yaml").read_text(encoding="utf-8"))
    known = {str(row.folder): row for target in ("toy", "weights", "paper") for row in rows(config, target)}
    project = {row for target in ("paper", "weights") for row in rows(config, target)}
    try:
        if unknown := [name for name in options.rows if name not in known]:
            raise ValueError(f"config.yaml has no row {', '.join(unknown)}: name folders such as {next(iter(known))}")
        chosen = [known[name] for name in options.rows] or [row for row in known.values() if row in project]
        refused = collect(chosen, options.runs, options.data, drop=options.drop)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for message in refused:
        print(f"refused: {message}", file=sys.stderr)
    return 1 if refused else 0


def collect(chosen: Iterable[Row], runs: Path, data: Path, *, drop: str | None = None) -> list[str]:
    """Bring the cells of some rows into the data, in place of their equals; nothing else there is touched.

    The outcome depends on the cells and on what is in the data alone. Done twice, it changes nothing the second time;
    killed at any moment, it is completed or undone by the next call.

    Args:
        chosen: the rows; cells that are not there yet are passed over.
        runs: the folder of all runs.
        data: with ``results``, ``weights`` and ``RUNS.md``; locked meanwhile, so that others wait.
        drop: a recipe whose rows and weights are removed first.

    Returns:
        One message for everything that was refused.
    """
    data = data.resolve()
    data.mkdir(parents=True, exist_ok=True)
    with FileLock(data / ".lock"):
        _complete(data)
        new: Content = {}
        refused: list[str] = []
        if drop:
            _drop(drop, data, new)
        for row in chosen:
            if cells := _cells(row, runs):
                reason = _objection(row, cells, data, new)
                if reason is None:
                    _put(row, cells, data, new)
                    reason = _ship(row, runs, data, new) if row.ships else None
                refused += [f"{row}: {reason}"] if reason else []
        for path in [path for path, content in new.items() if content is not None and len(content) > FILE_LIMIT]:
            raise ValueError(f"{path} would have {len(new[path]) / 1e6:.1f} MB, {FILE_LIMIT / 1e6:.0f} are allowed")
        new[Path("RUNS.md")] = runs_page(data, new).encode()
        _replace(data, new)
    return refused


def runs_page(data: Path, new: Mapping[Path, bytes | None] | None = None) -> str:
    """Return the page of runs: the CIFAR-10 rows that are asked for, and every one that is stored.

    Args:
        data: with ``results``.
        new: what files in it are about to hold.
    """
    new = new or {}
    config = yaml.safe_load((Path(__file__).parent / "config.yaml").read_text(encoding="utf-8"))
    folder = Path("results", "cifar10")
    record = _record(folder, data, new)
    scores = {_key(line): line for line in _table(folder / "networks.csv", data, new).to_dict("records")}
    asked = {row: row for row in rows(config, "paper") if not row.members}
    stored = [row for key in scores if (row := Row(key[0], key[1], int(key[2]), key[3])) not in asked]
    lines, before = [], None
    counts = {"complete": 0, "pending": 0}
    for row in [*stored, *asked]:
        made = {name: run for name, runs in record.items() for run in runs if str(row) in run["seconds"]}
        measured = [name.removesuffix(".csv") for name in made if name.removesuffix(".csv") not in TRAINING]
        asking = asked[row].measurements if row in asked else ()
        if _key(row) not in scores:
            state = "pending"
        elif row in asked and set(asking) <= set(measured):
            state = "complete"
        else:
            state = f"trained, {len(measured)}{f' of {len(asking)}' if asking else ''} measured"
        counts[state] = counts.get(state, 0) + 1
        kind = (row.tier if row in asked else "–", row.network, row.recipe, state)
        if state == "pending" and before == kind:  # such rows differ in their seeds alone: they share a line
            lines[-1][2] += f", {row.seed}"
            continue
        before = kind
        cell = [str(kind[0]), row.network, str(row.seed), row.recipe, state]
        lines.append([*cell, *(_evidence(row, scores[_key(row)], made) if _key(row) in scores else [""] * 4)])
    copies = sorted({run["data"] for run in record.get("networks.csv", []) if "data" in run})
    text = [
        "# Runs",
        "",
        "`experiments/collect.py` writes this page from `data/results/cifar10` and `experiments/config.yaml`; do not "
        "edit it. A row is a network, a seed and a recipe, in the order of importance; a row that has not been run is "
        "pending. Rows without a tier are stored, but no longer asked for.",
        "",
        f"Of {len(stored) + len(asked)} rows, {counts['complete']} are complete and {counts['pending']} pending."
        + (f" Images: {' and '.join(copies)}." if copies else ""),
        "",
        "The test error has a 95 % Wilson interval: the chance in the test images, not in the seed. Durations are of "
        "training and of all measurements. A commit with a plus sign had changes on top.",
        "",
        "| tier | network | seed | recipe | state | test error, % | hardware | training + measuring | commit |",
        "|---|---|---|---|---|---|---|---|---|",
        *(f"| {' | '.join(line)} |" for line in lines),
    ]
    return "\n".join(text) + "\n"


def duration(seconds: float) -> str:
    """Return a time to two digits or so: 45 s, 12 min, 3.4 h, 2.1 days."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"


def _evidence(row: Row, line: Mapping[str, str], made: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return error, hardware, durations and commits of a row as text."""
    error, images = float(line["test_error"]), int(line["test_images"])
    low, high = wilson(round(error * images), images)
    spent = [made["networks.csv"]["seconds"][str(row)]] if "networks.csv" in made else []
    others = [run["seconds"][str(row)] for name, run in made.items() if name.removesuffix(".csv") not in TRAINING]
    spent += [sum(others)] if others else []
    return [
        f"{100 * error:.2f} ({100 * low:.2f}–{100 * high:.2f})",
        "; ".join(dict.fromkeys(run["hardware"] for run in made.values())),
        " + ".join(map(duration, spent)),
        ", ".join(dict.fromkeys(run["commit"] for run in made.values())),
    ]


def _cells(row: Row, runs: Path) -> dict[str, tuple[str, dict[str, Any]]]:
    """Return the row's cells that are there: each one's table as it is written, and its record.

    Raises:
        ValueError: a table is not the one that its record speaks of.
    """
    found = {}
    for name in [*TRAINING, *row.measurements]:
        path = runs / row.folder / f"{name}.csv"
        if not path.exists():
            continue
        content, record = path.read_bytes(), json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        if hashlib.sha256(content).hexdigest() != record.pop("sha256"):
            raise ValueError(f"{path} is not what was measured: delete it, and have it measured again")
        found[name] = content.decode(), record
    return found


def _objection(row: Row, cells: Mapping[str, tuple[str, dict]], data: Path, new: Content) -> str | None:
    """Return why a row must not go into the data, None if it may."""
    sources = {record["weights"] for _, record in cells.values()}
    if len(sources) > 1:
        return "its cells were measured on different weights: delete those of the earlier ones, and measure again"
    if "networks" in cells:
        line = pd.read_csv(io.StringIO(cells["networks"][0])).iloc[0]
        if not all(math.isfinite(line[f"{split}_loss"]) for split in ("train", "validation", "test")):
            return "its losses are not finite"
    folder, source = Path("results", row.dataset), sources.pop()
    if "networks" not in cells and not row.members and source != _shipped(row, data):
        return "its networks.csv is missing: train it again"
    others = []
    for name, made in _record(folder, data, new).items():
        run = next((run for run in made if str(row) in run["seconds"]), None)
        if run and name.removesuffix(".csv") not in cells and (_weights(run, row) or _shipped(row, data)) != source:
            others.append(name)
    if others:
        return (
            f"what is stored of it in {', '.join(others)} belongs to other weights, and would stay behind: measure "
            "these too, or leave the stored row as it is"
        )
    return None


def _put(row: Row, cells: Mapping[str, tuple[str, dict]], data: Path, new: Content) -> None:
    """Put a row's cells in the place of its stored rows; no number is rewritten."""
    folder = Path("results", row.dataset)
    before = _record(folder, data, new)
    for name, (text, record) in cells.items():
        path = folder / f"{name}.csv"
        stored, table = _table(path, data, new), pd.read_csv(io.StringIO(text), dtype=str, keep_default_na=False)
        if len(stored):
            stored = stored[(stored[KEYS] != [row.dataset, row.network, str(row.seed), row.recipe]).any(axis=1)]
            table = pd.concat([stored, table], ignore_index=True).fillna("")
        _set(path, _sorted(table), data, new)
        before[path.name] = _noted(before.get(path.name, []), row, record)
    _set(folder / "provenance.json", json.dumps(before, indent=1, sort_keys=True) + "\n", data, new)


def _noted(runs: list[dict[str, Any]], row: Row, record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the records of a file with that of a row; rows that were made alike share one."""
    runs = _without(runs, {str(row)})
    about = {name: value for name, value in record.items() if name not in ("seconds", "weights")}
    own = {f"{row.network}-seed{row.seed}": "NETWORK-seedSEED", f"--network {row.network} ": "--network NETWORK "}
    for old, general in (own | {f"--seed {row.seed} ": "--seed SEED "}).items():
        about["command"] = about["command"].replace(old, general)
    same = next((run for run in runs if about == {k: run[k] for k in run if k not in ("seconds", "weights")}), None)
    if same is None or isinstance(same.get("weights"), str):
        runs.append(same := about | {"seconds": {}, "weights": {}})
    same["seconds"][str(row)] = record["seconds"]
    same.setdefault("weights", {})[str(row)] = record["weights"]
    return sorted(runs, key=lambda run: min(run["seconds"]))


def _without(runs: Iterable[Mapping[str, Any]], gone: set[str]) -> list[dict[str, Any]]:
    kept = []
    for run in runs:
        run = dict(run)
        for name in ("seconds", "weights"):
            if isinstance(run.get(name), dict):
                run[name] = {row: value for row, value in run[name].items() if row not in gone}
        kept += [run] if run["seconds"] else []
    return kept


def _weights(run: Mapping[str, Any], row: Row) -> str | None:
    """Return the checksum of the weights that a stored row was measured on; None where the record is older than it."""
    weights = run.get("weights")
    return weights.get(str(row)) if isinstance(weights, dict) else None


def _home(row: Row) -> Path:
    name = row.network if row.recipe == SHIPPED_PLAIN[row.dataset] else f"{row.network}-{row.recipe}"
    return Path("weights", row.dataset, f"{name}-seed{row.seed}.safetensors")


def _shipped(row: Row, data: Path) -> str | None:
    """Return the checksum of the weights that the shipped ones of a row were made from; None if there are none."""
    path = data / _home(row)
    about = header(path) if path.exists() else {}
    return about.get("source") or checksum(path) if about.get("recipe") == row.recipe else None


def _ship(row: Row, runs: Path, data: Path, new: Content) -> str | None:
    """Put a row's weights into the data, in half precision where they are large; return why not if they may not go."""
    source, path = runs / row.weights[0], _home(row)
    about = header(source)
    if (data / path).exists() and new.get(path, b"") is not None:
        there = header(data / path)
        if there.get("recipe") != row.recipe:
            return f"{path} holds recipe {there.get('recipe')}: drop that recipe first"
        if checksum(source) == _shipped(row, data):
            return None
    content = source.read_bytes()
    if len(content) > HALF_LIMIT:
        with tempfile.TemporaryDirectory() as scratch:
            half = save(load(source), Path(scratch, "half.safetensors"), half=True, source=checksum(source), **about)
            content = half.read_bytes()
    size = sum(len(c) for c in new.values() if c) + len(content)
    size += sum(f.stat().st_size for f in _files(data) if f.relative_to(data) not in new | {path: b""})
    if len(content) > FILE_LIMIT or size > FOLDER_LIMIT:
        return (
            f"its weights have {len(content) / 1e6:.1f} MB, all of data would have {size / 1e6:.1f}: too much to ship"
        )
    new[path] = content
    return None


def _drop(recipe: str, data: Path, new: Content) -> None:
    for folder in sorted((data / "results").glob("*")):
        inside = folder.relative_to(data)
        for path in sorted(folder.glob("*.csv")):
            table = _table(inside / path.name, data, new)
            _set(inside / path.name, _sorted(table[table["recipe"] != recipe]), data, new)
        record = _record(inside, data, new)
        for name, made in record.items():
            gone = {
                row for run in made for row in run["seconds"] if row.partition("-seed")[2].split("-", 1)[1] == recipe
            }
            record[name] = _without(made, gone)
        record = {name: made for name, made in record.items() if made}
        _set(inside / "provenance.json", json.dumps(record, indent=1, sort_keys=True) + "\n", data, new)
    for path in sorted((data / "weights").rglob("*.safetensors")):
        if header(path).get("recipe") == recipe:
            new[path.relative_to(data)] = None


def _sorted(table: pd.DataFrame) -> str:
    if not len(table):
        return ""
    order = table[KEYS].assign(seed=table["seed"].astype(int)).sort_values(KEYS, kind="stable")
    return table.loc[order.index].to_csv(index=False)


def _set(path: Path, text: str, data: Path, new: Content) -> None:
    """Note what a file is to hold, if that differs from what it holds; an empty one goes."""
    content = text.encode() or None
    old = (data / path).read_bytes() if (data / path).exists() else None
    if content == old:
        new.pop(path, None)
    else:
        new[path] = content


def _text(path: Path, data: Path, new: Mapping[Path, bytes | None]) -> str:
    content = new[path] if path in new else (data / path).read_bytes() if (data / path).exists() else None
    return (content or b"").decode()


def _table(path: Path, data: Path, new: Mapping[Path, bytes | None]) -> pd.DataFrame:
    text = _text(path, data, new)
    return pd.read_csv(io.StringIO(text), dtype=str, keep_default_na=False) if text else pd.DataFrame(columns=KEYS)


def _record(folder: Path, data: Path, new: Mapping[Path, bytes | None]) -> dict[str, list[dict[str, Any]]]:
    return json.loads(_text(folder / "provenance.json", data, new) or "{}")


def _key(row: Row | Mapping[str, str]) -> tuple[str, ...]:
    return tuple(row[k] if isinstance(row, Mapping) else str(getattr(row, k)) for k in KEYS)


def _files(folder: Path) -> list[Path]:
    hidden = [path for path in folder.rglob("*") if path.is_file()]
    return [path for path in hidden if not any(part.startswith(".") for part in path.relative_to(folder).parts)]


def _replace(data: Path, new: Content) -> None:
    """Write all files aside, then note that they are whole, then rename them."""
    new = {path: content for path, content in new.items() if not _same(data / path, content)}
    if not new:
        return
    aside = data / ".new"
    for path, content in new.items():
        if content is not None:
            (aside / path).parent.mkdir(parents=True, exist_ok=True)
            (aside / path).write_bytes(content)
    (aside / "gone.json").write_text(json.dumps([path.as_posix() for path, content in new.items() if content is None]))
    os.replace(aside, data / ".whole")
    _complete(data)


def _complete(data: Path) -> None:
    """Finish what a killed call had written completely, and remove what it had not."""
    whole = data / ".whole"
    if whole.exists():
        gone = whole / "gone.json"
        for path in json.loads(gone.read_text()) if gone.exists() else []:
            (data / path).unlink(missing_ok=True)
        for path in sorted(path for path in whole.rglob("*") if path.is_file() and path != gone):
            home = data / path.relative_to(whole)
            home.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, home)
        shutil.rmtree(whole)
    shutil.rmtree(data / ".new", ignore_errors=True)


def _same(path: Path, content: bytes | None) -> bool:
    return (path.read_bytes() if path.exists() else None) == content


if __name__ == "__main__":
    sys.exit(main())
