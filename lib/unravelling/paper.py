"""Runs at paper scale: the matrix of networks, seeds and recipes, what is left of it, and the way into ``data/``."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from filelock import FileLock, Timeout

from . import results, weights
from .data import Dataset, write_atomically
from .nets import build
from .results import KEYS
from .runs import (
    Place,
    Row,
    applicable,
    cells,
    claim,
    epochs,
    made,
    measure_row,
    measured,
    progress,
    record,
    scores,
    train_row,
    weights_path,
)
from .stats import wilson
from .train import RECIPES, evaluate, fit

MATRIX = (
    (1, "resnet110", "", (0,)),
    (1, "vgg15", "", (0,)),
    (1, "vgg15-narrow", "", (0,)),
    (1, "resnet56", "", (0,)),
    (1, "plain56", "", (0,)),
    (1, "resnet20", "", (0, 1, 2)),
    (1, "plain20", "", (0, 1, 2)),
    (2, "resnet110", "", (1, 2)),
    (2, "vgg15", "", (1, 2)),
    (2, "vgg15-nobn", "", (0,)),
    (2, "plain110", "", (0,)),
    (3, "resnet110", "-short-paths", (0, 1, 2)),
    (3, "resnet110", "-stochastic-depth", (0, 1, 2)),
    (3, "resnet56", "", (1, 2)),
    (3, "resnet110-post", "", (0,)),
)
"""Group, network, variant of the recipe and seeds, the most important first; group 4 is five seeds of everything."""

SEEDS = range(5)
SCALES = ("brief", "short", "paper")
FILE_LIMIT, FOLDER_LIMIT, HALF_LIMIT = 10_000_000, 40_000_000, 3_000_000
"""Bytes of one file in ``data/``, of all of it, and of weights that are not halved in precision."""

COST: dict[str, Callable[[int, int, int], float]] = {
    "intact": lambda n, full, part: 2 * full + 3000,
    "delete_each": lambda n, full, part: full * n / 2,
    "delete_random": lambda n, full, part: part * 550,
    "delete_reestimated": lambda n, full, part: 55 * (part + 5000),
    "delete_pairs": lambda n, full, part: part * 200,
    "damage": lambda n, full, part: part * n / 2,
    "reorder": lambda n, full, part: part * 200,
    "spectrum": lambda n, full, part: 1.5 * n * (640 if full < 1280 else 2560),
    "path_norms": lambda n, full, part: 9000 * n,
    "lengths": lambda n, full, part: 1.5 * part * n,
    "branches": lambda n, full, part: 6 * full,
    "batch_norm_shift": lambda n, full, part: n * (part + 3000),
    "subnetworks": lambda n, full, part: part * 250,
}
"""About how many forward passes of one image a measurement takes, for n units, all test images and a part of them."""


def matrix(recipe: str, dataset: str = "cifar10") -> list[Row]:
    """Return the rows of a recipe in the order of their importance; group 3 trains by variants of the recipe."""
    rows = [
        Row(dataset, network, seed, recipe + variant, group)
        for group, network, variant, seeds in MATRIX
        for seed in seeds
    ]
    kinds = dict.fromkeys((network, variant) for _, network, variant, _ in MATRIX)
    more = [Row(dataset, network, seed, recipe + variant, 4) for network, variant in kinds for seed in SEEDS]
    return rows + [row for row in more if row not in rows]


def select(
    dataset: str,
    recipe: str,
    groups: Iterable[int] | None = None,
    networks: Sequence[str] | None = None,
    seeds: Iterable[int] | None = None,
) -> list[Row]:
    """Return the rows to work on: those of the matrix that match, and networks outside of it that are named.

    Args:
        dataset: of all rows.
        recipe: of the rows, but for the variants of group 3.
        groups: of the matrix; all when None, and group 1 alone for the brief recipe.
        networks: names; all of the matrix when None.
        seeds: all of the matrix when None; 0 for a network outside of it.

    Raises:
        ValueError: no row matches, or the recipe has no variant that a row of group 3 needs.
    """
    if groups is None and recipe == "brief" and not networks:
        groups = (1,)
    wanted = None if seeds is None else set(seeds)
    chosen = None if groups is None else set(groups)
    rows = [
        row
        for row in matrix(recipe, dataset)
        if (chosen is None or row.group in chosen)
        and (networks is None or row.network in networks)
        and (wanted is None or row.seed in wanted)
        and row.recipe in RECIPES
    ]
    known = {network for _, network, _, _ in MATRIX}
    for network in networks or ():
        build(network, dataset)  # an unknown name fails before the first hour, not after it
        if network not in known:
            rows += [Row(dataset, network, seed, recipe) for seed in sorted(wanted or {0})]
    if not rows:
        raise ValueError("no row of the matrix matches: choose other --groups, --networks or --seeds")
    return rows


class Limit:
    """A time limit, and estimates of what still fits into it.

    Estimates come from the durations on record for this hardware; where there are none, from a few steps and forward
    passes of the network, timed here once and kept in ``timings.json``.

    Args:
        data: the dataset.
        place: where the rows are worked on.
        deadline: seconds since 1970; none when infinite.
    """

    def __init__(self, data: Dataset, place: Place, deadline: float = math.inf) -> None:
        self.data, self.place, self.deadline = data, place, deadline

    def left(self) -> float:
        """Return the seconds that are left."""
        return self.deadline - time.time()

    def fits(self, seconds: float) -> bool:
        """Return whether something that takes so long can be begun."""
        return seconds <= self.left()

    def epochs(self, row: Row, done: int, total: int, seconds: Sequence[float]) -> int | None:
        """Return how many epochs to train before the next look at the clock, None if not even one fits.

        Half of those that fit, so that an epoch that takes longer than its predecessors is noticed in time. 0 means
        that all are done and scoring the network fits.
        """
        if done >= total:
            return 0 if self.fits(self._scoring(row)) else None
        each = max(seconds[-3:]) if seconds else self.epoch(row)
        fitting = int(min(max(self.left(), 0) / max(each, 1e-9), 2 * total))
        return min(total - done, max(1, fitting // 2)) if fitting else None

    def epoch(self, row: Row) -> float:
        """Return about how many seconds an epoch takes."""
        total = epochs(RECIPES[row.recipe], len(self.data.train))
        on_record = self._on_record("networks", rf"{re.escape(row.network)}-seed\d+-{re.escape(row.recipe)}")
        if on_record is not None:
            return on_record / total
        step, forward = self._timing(row)
        steps = len(self.data.train) // RECIPES[row.recipe].batch_size
        return steps * step + (len(self.data.validation) + 3 * 256) * forward

    def training(self, row: Row) -> float:
        """Return about how many seconds the rest of the row's training takes."""
        total = epochs(RECIPES[row.recipe], len(self.data.train))
        seconds = progress(row, self.place).get("seconds", [])
        each = sum(seconds) / len(seconds) if seconds else self.epoch(row)
        return (total - len(seconds)) * each + self._scoring(row)

    def measurement(self, row: Row, what: str) -> float:
        """Return about how many seconds a measurement of the row takes."""
        on_record = self._on_record(what, rf"{re.escape(row.network)}-seed\d+-.*")
        if on_record is not None:
            return on_record
        full = len(self.data.test)
        cost = COST.get(what, lambda n, full, part: n * part)
        return cost(_units(row), full, min(full, 1000)) * self._timing(row)[1]

    def _scoring(self, row: Row) -> float:
        images = min(10_000, len(self.data.train)) + len(self.data.validation) + len(self.data.test)
        return images * self._timing(row)[1]

    def _on_record(self, what: str, pattern: str) -> float | None:
        runs = record(self.place.results(self.data.name)).get(f"{what}.csv", [])
        here = [run["seconds"] for run in runs if run["hardware"] == results.hardware()]
        found = [value for seconds in here for name, value in seconds.items() if re.fullmatch(pattern, name)]
        return sum(found) / len(found) if found else None

    def _timing(self, row: Row) -> tuple[float, float]:
        """Return the seconds of a training step and of one image's forward pass."""
        file = self.place.out / "timings.json"
        name = f"{row.dataset} {row.network} {row.recipe} {results.hardware()}"
        known = json.loads(file.read_text()) if file.exists() else {}
        if name not in known:
            known[name] = _time_steps(row, self.data, self.place.device)
            write_atomically(file, lambda to: to.write_text(json.dumps(known, indent=1)))
        return tuple(known[name])


def describe(row: Row, folder: Path, under_way: dict) -> str:
    """Return the state of a row, from the CSV files of its dataset and what is known of a training under way."""
    if not measured(row, folder, "networks"):
        if not under_way:
            return "pending"
        return f"training, epoch {under_way['epoch']} of {under_way['epochs']}"
    names = applicable(row.network, row.dataset)
    done = sum(measured(row, folder, what) for what in names)
    return "complete" if done == len(names) else f"trained, {done} of {len(names)} measured" if done else "trained"


def status(rows: Sequence[Row], place: Place, limit: Limit | None = None) -> str:
    """Return a table of rows: what is done, what remains and, by ``limit``, about how long that takes one by one."""
    folder, commit = place.results(rows[0].dataset), results.commit()
    lines, whole = [], 0.0
    for row in rows:
        state = describe(row, folder, _under_way(row, place))
        seconds = 0.0
        if limit is not None and state != "complete":
            seconds += 0 if place.weights(row) else limit.training(row)
            names = applicable(row.network, row.dataset)
            seconds += sum(limit.measurement(row, what) for what in names if not measured(row, folder, what))
        whole += seconds
        rest = f"about {duration(seconds)}" if seconds else ""
        lines.append(f"{row.group or '-'}  {row!s:<40} {state:<28} {rest}".rstrip())
        makers = {run["commit"] for what in _files(folder) if (run := made(row, folder, what))}
        if makers - {commit}:
            lines.append(f"   made by commit {', '.join(sorted(makers))}; this is {commit}")
    complete = sum("complete" in line.split() for line in lines)
    lines.append(f"{complete} of {len(rows)} rows are complete")
    if whole:
        lines[-1] += (
            f"; the rest takes about {duration(whole)} on this machine, one row after the other (an estimate: from "
            "durations on record for this hardware, or from a few steps timed here)"
        )
    return "\n".join(lines)


def work(
    rows: Sequence[Row], data: Dataset, place: Place, limit: Limit | None, *, remeasure: bool = False
) -> list[str]:
    """Train and measure every row that no other process is at, the most important first.

    Args:
        rows: in this order.
        data: their dataset.
        place: where.
        limit: a time limit, if any; what would not fit is left, and the next row that fits is taken.
        remeasure: whether results of other commits are measured again.

    Returns:
        One message for each row that failed; the others went on. A full disk stops them all (OSError).
    """
    failed = []
    for row in rows:
        try:
            with claim(row, place, wait=False):
                folder = place.results(row.dataset)
                if describe(row, folder, {}) == "complete" and not remeasure:
                    print(f"{row}: complete", flush=True)
                elif train_row(row, data, place, limit):
                    measure_row(row, data, place, None, limit, remeasure=remeasure)
        except Timeout:
            print(f"{row}: another process works on it: skipped", flush=True)
        except ValueError as error:
            failed.append(f"{row}: {error}")
            print(f"{row}: failed: {error}", file=sys.stderr, flush=True)
    return failed


def side_by_side(arguments: Sequence[str], jobs: int, deadline: float) -> int:
    """Run ``jobs`` processes of this command line, which share the rows and the cores, and return the worst status."""
    threads = max(1, torch.get_num_threads() // jobs)
    command = [sys.executable, "-m", "unravelling", *arguments, "--worker", str(deadline)]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    workers = [subprocess.Popen(command, env=environment) for _ in range(jobs)]
    try:
        return max((abs(worker.wait()) for worker in workers), default=0)
    except BaseException:
        for worker in workers:
            worker.terminate()
        for worker in workers:
            worker.wait()
        raise


def adopt(place: Place, source: Path, dataset: str) -> None:
    """Copy published rows that are not in ``place`` into it, so that they count as done and are gone on with."""
    folder = source / "results" / dataset
    mine = set(_rows(place.results(dataset)))
    rows = [row for row in _rows(folder) if row not in mine]
    for path, text in _merged(folder, place.results(dataset), rows).items():
        write_atomically(path, partial(_write, text.encode()))
    for row in rows:
        path, home = weights_path(row, source / "weights"), weights_path(row, place.out / "weights")
        if path.exists() and weights.header(path).get("recipe") == row.recipe:
            write_atomically(home, partial(shutil.copyfile, path))


def publish(place: Place, target: Path, dataset: str) -> list[str]:
    """Copy what is finished into ``target`` and write its page of runs.

    A row takes the place of a stored one only if its scores are finite and nothing that is stored would be lost: the
    same network, or all the measurements of the stored one. Weights of seed 0 go along, but for recipes that leave
    branches out: no chapter loads those, and the room is scarce.

    Args:
        place: where the rows were worked on.
        target: such as the project's ``data``; at most 40 MB, 10 MB a file.
        dataset: of the rows.

    Returns:
        One message for everything that was refused.
    """
    source, folder = place.results(dataset), target / "results" / dataset
    with FileLock(_made(place.out / "locks") / "publish.lock"):
        refused, rows = [], []
        for row in _rows(source):
            reason = _objection(row, source, folder)
            refused += [f"{row}: {reason}"] if reason else []
            rows += [] if reason else [row]
        accepted: dict[Path, bytes] = {}
        for path, text in _merged(source, folder, rows).items():
            content = text.encode()
            reason = _too_large(target, accepted | {path: content}, path)
            if reason:
                refused.append(reason)
            else:
                accepted[path] = content
        lost = {path.name for path in _merged(source, folder, rows)} - {path.name for path in accepted}
        if lost - {"provenance.json"}:  # the record must not speak of rows that are not there
            accepted |= {p: t.encode() for p, t in _merged(source, folder, rows, lost).items() if p.suffix == ".json"}
        for row in sorted(rows, key=lambda row: (row.group or 9, row.network)):
            trained, recipe = place.weights(row), RECIPES.get(row.recipe)
            thinned = recipe is not None and (recipe.active, recipe.survival) != (None, None)
            if row.seed == 0 and trained is not None and not thinned:
                home = weights_path(row, target / "weights")
                content = _shippable(trained, place.out)
                reason = _too_large(target, accepted | {home: content}, home)
                if reason:
                    refused.append(reason)
                else:
                    accepted[home] = content
        accepted |= _unfinished(place, folder, dataset)
        for path, content in accepted.items():
            if not path.exists() or path.read_bytes() != content:
                write_atomically(path, partial(_write, content))
        page = target / ("RUNS.md" if dataset == "cifar10" else f"RUNS-{dataset}.md")
        text = runs_page(target / "results", dataset)
        write_atomically(page, lambda to: to.write_text(text, encoding="utf-8"))
    return refused


def runs_page(folder: Path, dataset: str = "cifar10") -> str:
    """Return the page of runs: the matrix and every row's state, from the files in ``<folder>/<dataset>`` alone."""
    folder = Path(folder) / dataset
    here = _rows(folder)
    going = cells(folder / "unfinished.csv")
    under_way = {Row(dataset, r["network"], int(r["seed"]), r["recipe"]): r for r in going.to_dict("records")}
    here += [row for row in under_way if row not in here]
    planned = [row for scale in SCALES for row in matrix(scale, dataset)] if dataset == "cifar10" else []
    planned = [row for row in planned if row.group == 1 or not row.recipe.startswith("brief") or row in here]
    rows = planned + [row for row in here if row not in planned]
    # pending rows that differ in their seeds alone share a line
    lines: list[tuple[Row, list[int], str]] = []
    for row in rows:
        state = describe(row, folder, under_way.get(row, {}))
        first, seeds, before = lines[-1] if lines else (row, [], "")
        same = replace(first, seed=0) == replace(row, seed=0) and first.group == row.group
        if same and state == before == "pending":
            seeds.append(row.seed)
        else:
            lines.append((row, [row.seed], state))
    copies = sorted({data for row in rows if (data := made(row, folder, "networks").get("data"))})
    states = [describe(row, folder, under_way.get(row, {})) for row in rows]
    text = [
        "# Runs",
        "",
        "`make paper` writes this page from the files in "
        f"`data/results/{dataset}`; do not edit it. A row is a network, a seed and a recipe, listed in the order of "
        "importance; a row that has not been run is pending.",
        "",
        f"Of {len(rows)} rows, {states.count('complete')} are complete and {states.count('pending')} pending."
        + (f" Images: {' and '.join(copies)}." if copies else ""),
        "",
        "The test error has a 95 % Wilson interval: the chance in the test images, not in the seed. Durations are of "
        "training and of all measurements. A commit with a plus sign had changes on top.",
        "",
        "| group | network | seed | recipe | state | test error, % | hardware | training + measuring | commit |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row, seeds, state in lines:
        several = len(seeds) > 2 and seeds == list(range(seeds[0], seeds[-1] + 1))
        seed = f"{seeds[0]}–{seeds[-1]}" if several else ", ".join(map(str, seeds))
        values = [str(row.group or "–"), row.network, seed, row.recipe, state, *_evidence(row, folder)]
        text.append("| " + " | ".join(values) + " |")
    return "\n".join(text) + "\n"


def duration(seconds: float) -> str:
    """Return a time to two digits or so: 45 s, 12 min, 3.4 h, 2.1 days."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"


def without_paths(command: str) -> str:
    """Return a command line without the folders that exist on one machine only, for the record."""
    words, kept = iter(shlex.split(command)), []
    for word in words:
        if word in ("--out", "--data", "--publish"):
            next(words, None)
        elif not word.startswith(("--out=", "--data=", "--publish=")):
            kept.append(word)
    return shlex.join(kept)


def _evidence(row: Row, folder: Path) -> list[str]:
    """Return error, hardware, duration and commits of a row as text."""
    line = scores(row, folder)
    if not line:
        return ["", "", "", ""]
    error, images = float(line["test_error"]), int(line["test_images"])
    low, high = wilson(round(error * images), images)
    trained = made(row, folder, "networks")
    others = [made(row, folder, what) for what in applicable(row.network, row.dataset) if measured(row, folder, what)]
    spent = [sum(run.get("seconds", 0) for run in some) for some in ([trained], others) if some]
    runs = [run for run in [trained, *others] if run]
    return [
        f"{100 * error:.2f} ({100 * low:.2f}–{100 * high:.2f})",
        "; ".join(dict.fromkeys(run["hardware"] for run in runs)),
        " + ".join(map(duration, spent)),
        ", ".join(dict.fromkeys(run["commit"] for run in runs)),
    ]


def _objection(row: Row, source: Path, folder: Path) -> str | None:
    """Return why a row must not be published, None if it may."""
    ours, stored = scores(row, source), scores(row, folder)
    if not all(math.isfinite(float(ours[f"{split}_loss"] or "nan")) for split in ("train", "validation", "test")):
        return "its losses are not finite: not published"
    if stored in ({}, ours):
        return None
    lost = [what for what in _files(folder) if measured(row, folder, what) and not measured(row, source, what)]
    if lost:
        return f"the stored row is of another training, and this one lacks {', '.join(lost)}: the stored one is kept"
    return None


def _too_large(target: Path, new: dict[Path, bytes], path: Path) -> str | None:
    """Return why a file must not join the others that are about to be written, None if it may."""
    size = len(new[path])
    if size > FILE_LIMIT:
        return f"{path.name} would have {size / 1e6:.1f} MB, and {FILE_LIMIT / 1e6:.0f} are allowed: not published"
    old = sum(p.stat().st_size for p in target.rglob("*") if p.is_file() and p not in new)
    total = old + sum(map(len, new.values()))
    if total > FOLDER_LIMIT:
        return (
            f"with {path.name} {target} would have {total / 1e6:.1f} MB, and {FOLDER_LIMIT / 1e6:.0f} are allowed: "
            "not published"
        )
    return None


def _shippable(path: Path, scratch: Path) -> bytes:
    """Return a weights file, in half precision where it is large."""
    if path.stat().st_size <= HALF_LIMIT:
        return path.read_bytes()
    half = scratch / "half.safetensors"
    header = {k: v for k, v in weights.header(path).items() if k != "half"}
    content = weights.save(weights.load(path), half, half=True, **header).read_bytes()
    half.unlink()
    return content


def _merged(source: Path, target: Path, rows: Sequence[Row], without: Iterable[str] = ()) -> dict[Path, str]:
    """Return the CSV files and the record of ``target`` with ``rows`` of ``source``; no number is rewritten."""
    if not rows:
        return {}
    old = json.loads(path.read_text()) if (path := target / "provenance.json").exists() else {}
    files = {}
    for what in _files(source):
        here = [row for row in rows if measured(row, source, what)]
        if not here or f"{what}.csv" in without:
            continue
        keys = {tuple(map(str, row.key.values())) for row in here}
        new, stored = cells(source / f"{what}.csv"), cells(target / f"{what}.csv")
        parts = [
            part[part[KEYS].apply(tuple, axis=1).isin(keys) == mine]
            for part, mine in ((stored, False), (new, True))
            if len(part)
        ]
        table = pd.concat(parts, ignore_index=True).fillna("")
        order = table[KEYS].assign(seed=table["seed"].astype(int)).sort_values(KEYS, kind="stable")
        files[target / f"{what}.csv"] = table.loc[order.index].to_csv(index=False)
        runs = old.get(f"{what}.csv", [])
        names = {str(row) for row in here}
        runs = [run | {"seconds": {k: v for k, v in run["seconds"].items() if k not in names}} for run in runs]
        for row in here:
            run = made(row, source, what)
            if not run:
                continue
            about = {k: v for k, v in run.items() if k != "seconds"} | {"command": without_paths(run["command"])}
            same = next((run for run in runs if run == about | {"seconds": run["seconds"]}), None)
            if same is None:
                runs.append(same := about | {"seconds": {}})
            same["seconds"][str(row)] = run["seconds"]
        old[f"{what}.csv"] = [run for run in runs if run["seconds"]]
    return files | {path: json.dumps(old, indent=1, sort_keys=True) + "\n"}


def _unfinished(place: Place, folder: Path, dataset: str) -> dict[Path, bytes]:
    """Return the table of trainings under way, here and as published; nothing if there is none and was none."""
    finished = set(_rows(folder)) | set(_rows(place.results(dataset)))
    path = folder / "unfinished.csv"
    going = {tuple(r[k] for k in KEYS): r for r in cells(path).to_dict("records")}
    for file in place.checkpoint(Row(dataset, "", 0, "")).parent.glob("*.progress"):
        match = re.fullmatch(r"(.+)-seed(\d+)-(.+)", file.stem)
        if match:
            key = (dataset, match[1], match[2], match[3])
            note = _under_way(Row(dataset, match[1], int(match[2]), match[3]), place)
            going[key] = dict(zip(KEYS, key, strict=True)) | note
    rows = [r for key, r in sorted(going.items()) if Row(key[0], key[1], int(key[2]), key[3]) not in finished]
    if not rows and not path.exists():
        return {}
    table = pd.DataFrame(rows, columns=[*KEYS, "epoch", "epochs"])
    return {path: table.to_csv(index=False).encode()}


def _under_way(row: Row, place: Place) -> dict:
    note = progress(row, place)
    return {"epoch": len(note["seconds"]), "epochs": note["epochs"]} if note else {}


def _rows(folder: Path) -> list[Row]:
    """Return the trained rows of a folder of CSV files, with their groups, in the order of the matrix."""
    table = cells(folder / "networks.csv")
    found = [Row(d, n, int(s), r) for d, n, s, r in table.reindex(columns=KEYS).itertuples(index=False)]
    ranked = {row: (i, row) for i, row in enumerate(r for scale in SCALES for r in matrix(scale))}
    return [row for _, row in sorted((ranked.get(row, (len(ranked), row)) for row in found), key=lambda pair: pair[0])]


def _files(folder: Path) -> list[str]:
    return sorted(path.stem for path in folder.glob("*.csv") if path.stem != "unfinished")


def _write(content: bytes, path: Path) -> None:
    path.write_bytes(content)


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _units(row: Row) -> int:
    return len(build(row.network, row.dataset))


def _time_steps(row: Row, data: Dataset, device: str) -> list[float]:
    """Time training steps and forward passes of a network that is thrown away, the second time they run."""
    recipe = RECIPES[row.recipe]
    chain = build(row.network, row.dataset).to(device)
    few = data.validation.take(torch.arange(min(len(data.validation), 10)))

    def seconds(steps: int) -> float:
        images = data.train.take(torch.arange(steps * recipe.batch_size) % len(data.train))
        short = replace(recipe, epochs=1, iterations=None, warmup=0)
        start = time.perf_counter()
        fit(chain, replace(data, train=images, validation=few), short, progress=False)
        return time.perf_counter() - start

    seconds(1)
    count, taken = 2, seconds(2)
    if taken < 1:
        count, taken = 20, seconds(20)
    images = data.test.take(torch.arange(min(len(data.test), 100 if device == "cpu" else 2000)))
    evaluate(chain, few)
    start = time.perf_counter()
    evaluate(chain, images)
    return [taken / count, (time.perf_counter() - start) / len(images)]
