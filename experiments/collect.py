"""Bring cells into the project's data: results, records, weights and the page of runs."""

from __future__ import annotations

import signal

if __name__ == "__main__":  # Ctrl-C while PyTorch loads ends this without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import contextlib
import csv
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd
from cells import KEYS, ROOT, about_weights, follow, origin, read_json
from filelock import FileLock
from matrix import TARGETS, TRAINING, Row, configuration, rows
from unravelling import load, save
from unravelling.stats import wilson
from unravelling.stored import DEFAULT_RECIPES
from unravelling.weights import OWN, header

FILE_LIMIT, LIMIT, HALF_LIMIT = 10_000_000, 40_000_000, 3_000_000
"""Bytes of one file in the data, of all of them, and of weights that are not halved in precision."""

RESTORE = "restore the file, as by git checkout"

PAGE = """# Runs

`experiments/collect.py` writes this page from `data/results/cifar10` and `experiments/config.yaml`; do not edit it. A
row is a network, a seed and a recipe, in the order of importance; a row that has not been run is pending. Rows without
a tier are stored, but no longer asked for.

Of {all} rows, {complete} are complete and {pending} pending. Images: {images}.

The test error has a 95 % Wilson interval: the chance in the test images, not in the seed. Minutes are of training and
of all measurements. A commit with a plus sign had changes on top.

| tier | network | seed | recipe | state | test error, % | hardware | minutes | commit |
|---|---|---|---|---|---|---|---|---|
"""


class Refused(ValueError):
    """A row must not go into the data; the message says why."""


def main(arguments: list[str] | None = None) -> int:
    """Run a command line and return its exit status: 1 when something asked for was refused."""
    follow(os.environ.get("UNRAVELLING_PARENT"))
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", nargs="*", type=Path, help="folders in --runs; all of config.yaml when none is given")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs", metavar="FOLDER", help="default: runs")
    parser.add_argument("--data", type=Path, default=ROOT / "data", metavar="FOLDER", help="default: data")
    options = parser.parse_args(arguments)
    try:
        config = configuration()
        known = {row.folder: row for target in reversed(TARGETS) for row in rows(config, target)}
        if unknown := [str(name) for name in options.rows if name not in known]:
            raise ValueError(f"config.yaml has no row {', '.join(unknown)}: name folders such as {next(iter(known))}")
        everything = [row for target in ("paper", "weights") for row in rows(config, target)]
        chosen = [known[name] for name in options.rows] or everything
        if not any((options.runs / row.folder).is_dir() for row in chosen):
            raise ValueError(f"{options.runs} has no run of any row asked for: say by --runs where the runs are")
        refused = collect(chosen, options.runs, options.data)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for message in refused:
        print(f"refused: {message}", file=sys.stderr)
    return 1 if refused else 0


def collect(chosen: Iterable[Row], runs: Path, data: Path) -> list[str]:
    """Bring the cells of some rows into the data, in place of their equals; nothing else there is touched.

    The outcome depends on the cells and on what is in the data alone. Done twice, it changes nothing the second time;
    killed at any moment, it is completed by the same call again.

    Args:
        chosen: the rows; cells that are not there yet are passed over.
        runs: the folder of all runs.
        data: with ``results``, ``weights`` and ``RUNS.md``; locked meanwhile, so that others wait.

    Returns:
        One message for everything that was refused.

    Raises:
        ValueError: a stored file is broken or would be too large; nothing has changed.
    """
    data.mkdir(parents=True, exist_ok=True)
    with FileLock(data.resolve() / ".lock"):
        new = data / ".new"
        shutil.rmtree(new, ignore_errors=True)  # left by a call that was killed
        try:
            refused = _prepare(chosen, runs, data, new)
        except ValueError as error:  # about what is a copy, and gone at once
            raise ValueError(str(error).replace(str(new), str(data))) from error
        else:
            _bring_in(new, data)
        finally:
            shutil.rmtree(new, ignore_errors=True)
    return refused


def runs_page(data: Path) -> str:
    """Return the page of runs: the CIFAR-10 rows that are asked for, and every one that is stored in ``data``."""
    folder = data / "results/cifar10"
    record, networks = _record(folder), _table(folder / "networks.csv")
    try:
        return _page(record, networks)
    except (LookupError, TypeError, ValueError) as error:
        what = f"{folder}/networks.csv and provenance.json do not fit together ({error!r})"
        raise ValueError(f"{what}: restore both, as by git checkout") from error


def _page(record: dict[str, list[dict[str, Any]]], networks: pd.DataFrame) -> str:
    stored = [Row("cifar10", row.network, int(row.seed), row.recipe, tier=0) for row in networks[KEYS].itertuples()]
    asked = [row for row in rows(configuration(), "paper") if not row.members]
    lines, states = [], []
    for row in [*(row for row in stored if row not in asked), *asked]:
        made = {name.removesuffix(".csv"): run for name, run in _of(row, record).items()}
        measured, evidence = made.keys() - {*TRAINING}, [""] * 4
        states.append("complete" if row.tier and measured >= {*row.measurements} else f"{len(measured)} measured")
        if row in stored:
            line = networks[_is(row, networks)].iloc[0]
            error, images = float(line["test_error"]), int(line["test_images"])
            low, high = wilson(round(error * images), images)
            spent = [sum(made[name]["seconds"][str(row)] for name in names) for names in (["networks"], measured)]
            evidence = [
                f"{100 * error:.2f} ({100 * low:.2f}–{100 * high:.2f})",
                "; ".join(dict.fromkeys(kind for run in made.values() for kind in run["hardware"].split("; "))),
                " + ".join(f"{seconds / 60:.0f}" for seconds in spent),
                ", ".join(dict.fromkeys(run["commit"] for run in made.values())),
            ]
        else:
            states[-1] = "pending"
        cells = [str(row.tier or "–"), row.network, str(row.seed), row.recipe, states[-1], *evidence]
        lines.append(f"| {' | '.join(cells)} |\n")
    copies = sorted({run["data"] for run in record.get("networks.csv", []) if "data" in run})
    counts = {"complete": states.count("complete"), "pending": states.count("pending"), "all": len(states)}
    return PAGE.format(**counts, images=" and ".join(copies) or "none yet") + "".join(lines)


def _prepare(chosen: Iterable[Row], runs: Path, data: Path, new: Path) -> list[str]:
    """Make the data as they are to be, in a folder of their own, and return what was refused."""
    for name in ("results", "weights"):
        (data / name).mkdir(exist_ok=True)
        shutil.copytree(data / name, new / name)
    refused = []
    for row in chosen:
        try:
            source = _put(row, runs, new)
            if row.ships:
                _ship(row, runs, new, source)
        except Refused as reason:
            refused.append(f"{row}: {reason}")
    sizes = {path.relative_to(new): path.stat().st_size for path in _files(new)}
    if large := [f"{path} would have {size} bytes" for path, size in sizes.items() if size > FILE_LIMIT]:
        raise ValueError(f"{large[0]}, {FILE_LIMIT} are allowed: measure less, or do not ship its weights")
    if sum(sizes.values()) > LIMIT:
        raise ValueError(f"all would have {sum(sizes.values())} bytes, {LIMIT} are allowed: ship fewer weights")
    (new / "RUNS.md").write_text(runs_page(new), encoding="utf-8")
    return refused


def _put(row: Row, runs: Path, new: Path) -> str | None:
    """Put a row's cells in the place of its stored rows, and return what its weights are; no number is rewritten."""
    cells = {}
    for name in [*TRAINING, *row.measurements]:
        path = runs / row.folder / f"{name}.csv"
        if path.is_file():
            about = _cell(path)
            if hashlib.sha256(path.read_bytes()).hexdigest() != about.pop("sha256"):
                raise Refused(f"{path} is not what was measured: delete it, and have it measured again")
            cells[path.name] = _table(path), about
            if not len(cells[path.name][0]) or not _is(row, cells[path.name][0]).all():
                what = "is about another network, seed or recipe, or holds nothing"
                raise Refused(f"{path} {what}: put it where it belongs, or measure again")
    if not cells:
        return None
    sources = {about["weights"] for _, about in cells.values()}
    if len(sources) > 1:
        raise Refused("its cells were measured on different weights: delete those of the earlier ones, measure again")
    source, shipped = sources.pop(), _shipped(row, new)
    folder = new / "results" / row.dataset
    folder.mkdir(exist_ok=True)
    record = _record(folder)
    before = {name: run.get("weights", {}).get(str(row), shipped) for name, run in _of(row, record).items()}
    if others := [name for name, weights in before.items() if name not in cells and weights != source]:
        raise Refused(
            f"what is stored of it in {', '.join(others)} belongs to other weights, and would stay behind: measure "
            "these too, or leave the stored row as it is"
        )
    for name, (table, about) in cells.items():
        stored = _table(folder / name)
        whole = pd.concat([stored[~_is(row, stored)], table]).fillna("")
        whole.assign(seed=whole["seed"].astype(int)).sort_values(KEYS, kind="stable").to_csv(folder / name, index=False)
        own = {key: {str(row): about[key]} for key in ("seconds", "weights")}
        made = [*_without(record.get(name, []), {str(row)}), about | own]
        record[name] = sorted(made, key=lambda run: min(run["seconds"]))
    (folder / "provenance.json").write_text(json.dumps(record, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return source


def _ship(row: Row, runs: Path, new: Path, measured: str | None) -> None:
    """Put a row's weights, those that its cells were measured on, into the data; in half precision where large."""
    source, path = runs / row.weights[0], new / _home(row)
    if not source.exists():
        return
    try:
        about = about_weights(source, dataset=row.dataset, network=row.network, recipe=row.recipe, seed=row.seed)
    except ValueError as error:
        raise Refused(str(error)) from error
    if (own := origin(source)) == _shipped(row, new):
        return
    if measured not in (own, None):
        raise Refused(f"{source} is not what its cells were measured on: delete those, and measure again")
    if path.exists() and (held := header(path).get("recipe")) != row.recipe:
        raise Refused(f"{_home(row)} holds recipe {held}: delete it if it may go")
    part = path.with_name("part.safetensors")
    part.parent.mkdir(parents=True, exist_ok=True)
    if source.stat().st_size > HALF_LIMIT:
        kept = {key: value for key, value in about.items() if key not in (*OWN, "network", "half")}
        save(load(source), part, half=True, **kept | {"source": own})
    else:
        shutil.copyfile(source, part)
    os.replace(part, path)


def _home(row: Row) -> Path:
    """Return where a row's weights belong; their name has no recipe where that is the dataset's ordinary one."""
    name = row.network if row.recipe == DEFAULT_RECIPES[row.dataset] else f"{row.network}-{row.recipe}"
    return Path("weights", row.dataset, f"{name}-seed{row.seed}.safetensors")


def _shipped(row: Row, data: Path) -> str | None:
    """Return the checksum of the weights that the shipped ones of a row were made from; None if there are none."""
    path = data / _home(row)
    return origin(path) if path.exists() and header(path).get("recipe") == row.recipe else None


def _of(row: Row, record: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Return how each table of a row was made."""
    return {name: run for name, made in record.items() for run in made if str(row) in run["seconds"]}


def _without(made: list[dict[str, Any]], gone: set[str]) -> list[dict[str, Any]]:
    """Return the records of a table without some rows."""
    kept = []
    for run in made:
        keys = run.keys() & {"seconds", "weights"}
        own = {key: {row: value for row, value in run[key].items() if row not in gone} for key in keys}
        kept += [run | own] if own["seconds"] else []
    return kept


def _is(row: Row, table: pd.DataFrame) -> pd.Series:
    return (table[KEYS] == [row.dataset, row.network, str(row.seed), row.recipe]).all(axis=1)


def _table(path: Path) -> pd.DataFrame:
    """Return a table of texts, exactly as it is written; one without lines where there is none."""
    if not path.exists():
        return pd.DataFrame(columns=KEYS)
    lines: list[list[str]] = []
    with path.open(encoding="utf-8", newline="") as file, contextlib.suppress(csv.Error, UnicodeDecodeError):
        for line in csv.reader(file, strict=True):
            head = lines[0] if lines else line
            sound = len(line) == len(head) and line[2].isdecimal() if lines else len({*line}) == len(line)
            if not sound or head[: len(KEYS)] != KEYS:
                break
            lines.append(line)
        else:
            if lines:
                return pd.DataFrame(lines[1:], columns=lines[0])
    raise ValueError(f"{path}, line {len(lines) + 1} is broken: {RESTORE}, or delete it")


def _cell(path: Path) -> dict[str, Any]:
    """Return the record of a cell."""
    try:
        about = read_json(path.with_suffix(".json"), "no JSON")
        kinds = {"sha256": str, "weights": str, "seconds": float | int, "hardware": str, "commit": str}
        if missing := [key for key, kind in kinds.items() if not isinstance(about.get(key), kind)]:
            raise ValueError(f"it lacks {', '.join(missing)}")
    except (ValueError, OSError, AttributeError) as error:
        raise Refused(f"the record of {path} cannot be read ({error}): delete both, measure again") from error
    return about


def _record(folder: Path) -> dict[str, list[dict[str, Any]]]:
    path = folder / "provenance.json"
    record = read_json(path, RESTORE) if path.exists() else {}
    with contextlib.suppress(AttributeError, LookupError, TypeError):
        if all(isinstance(run["seconds"], dict) for made in record.values() for run in made):
            return record
    raise ValueError(f"{path} is no record of tables: {RESTORE}")


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _bring_in(new: Path, data: Path) -> None:
    """Replace what differs, file by file, the page of runs last."""
    for path in [*_files(new / "results"), *_files(new / "weights"), new / "RUNS.md"]:
        home = data / path.relative_to(new)
        if not home.exists() or home.read_bytes() != path.read_bytes():
            home.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, home)


if __name__ == "__main__":
    sys.exit(main())
