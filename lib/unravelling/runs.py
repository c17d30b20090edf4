"""One row of results: a network that is trained by a recipe from a seed, and then measured; resumable, one owner."""

from __future__ import annotations

import json
import math
import shutil
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from filelock import FileLock, Timeout
from torch.nn.modules.batchnorm import _BatchNorm

from . import measure, results, weights
from .chain import Chain
from .data import Dataset, write_atomically
from .distributed import first
from .nets import build
from .paths import gradient_norms
from .results import DEFAULT_RECIPES, KEYS, store
from .train import RECIPES, Recipe, evaluate, fit

if TYPE_CHECKING:
    from .paper import Limit

SNAPSHOTS = {0, 1, 2, 4, 5, 10, 15, 20, 50, 100, 164}
"""Epochs after which the gradient by path length is measured, where a run has them."""


@dataclass(frozen=True)
class Row:
    """A network, the seed and the recipe it is trained with; ``group`` is its rank in the matrix, 0 outside of it."""

    dataset: str
    network: str
    seed: int
    recipe: str
    group: int = field(default=0, compare=False)

    def __str__(self) -> str:
        return f"{self.network}-seed{self.seed}-{self.recipe}"

    @property
    def key(self) -> dict[str, str | int]:
        """The row's values of the columns `unravelling.results.KEYS`."""
        return {name: getattr(self, name) for name in KEYS}


@dataclass(frozen=True)
class Place:
    """Where rows are worked on.

    Attributes:
        out: folder for weights, results, checkpoints and locks.
        device: such as ``"cpu"`` or ``"cuda"``.
        command: the command line, for the record.
        progress: whether a bar shows the training steps.
    """

    out: Path
    device: str = "cpu"
    command: str = ""
    progress: bool = True

    def results(self, dataset: str) -> Path:
        """Return the folder of the dataset's CSV files."""
        return self.out / "results" / dataset

    def checkpoint(self, row: Row) -> Path:
        """Return the path of the row's checkpoint; what else a training leaves lies beside it, with other suffixes."""
        return self.out / "checkpoints" / row.dataset / f"{row}.pt"

    def weights(self, row: Row) -> Path | None:
        """Return the path of the row's weights, None if there are none.

        Raises:
            ValueError: the file of this name holds a network of another recipe.
        """
        return find_weights(row, self.out / "weights")


def weights_path(row: Row, folder: Path) -> Path:
    """Return where a row's weights belong: the recipe is part of the name unless it is the dataset's ordinary one."""
    variant = "" if row.recipe == DEFAULT_RECIPES[row.dataset] else f"-{row.recipe}"
    return folder / row.dataset / f"{row.network}{variant}-seed{row.seed}.safetensors"


def find_weights(row: Row, folder: Path) -> Path | None:
    """Return the path of the row's weights in a folder, under the name with or without the recipe, or None.

    Raises:
        ValueError: the file where they belong holds a network of another recipe.
    """
    home = weights_path(row, folder)
    names = (f"{row.network}-{row.recipe}-seed{row.seed}", f"{row.network}-seed{row.seed}")
    found = {path: weights.header(path).get("recipe") for name in names if (path := home.with_stem(name)).exists()}
    match = next((path for path, recipe in found.items() if recipe == row.recipe), None)
    if match is None and home in found:
        raise ValueError(
            f"{home} was trained with recipe {found[home]}, not {row.recipe}: choose another --recipe or --out"
        )
    return match


@contextmanager
def claim(row: Row, place: Place, *, wait: bool = True) -> Iterator[None]:
    """Keep other processes off a row; the operating system ends the claim of a process that is killed.

    Raises:
        Timeout: another process has the row, and ``wait`` is False.
    """
    path = place.out / "locks" / f"{row.dataset}-{row}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path, is_singleton=True)  # of one process, which may claim twice

    def acquire() -> None:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if not wait:
                raise
            print(f"{row}: another process works on it: waiting for it", flush=True)
            lock.acquire()

    first(acquire)
    try:
        yield
    finally:
        lock.release()


def epochs(recipe: Recipe, images: int) -> int:
    """Return how many epochs a recipe takes on a number of training images; the last may be cut short."""
    return recipe.epochs or math.ceil((recipe.iterations or 0) / (images // recipe.batch_size))


@cache
def applicable(network: str, dataset: str) -> tuple[str, ...]:
    """Return the measurements that make sense for a network: paths need skips, re-estimation needs batch norm."""
    chain = build(network, dataset)
    left_out: set[str] = set()
    if not all(unit.residual for unit in chain.units):
        left_out |= {"spectrum", "path_norms", "lengths", "branches", "subnetworks"}
    if not any(isinstance(module, _BatchNorm) for module in chain.modules()):
        left_out |= {"delete_reestimated", "batch_norm_shift"}
    if len(chain) < min(measure.ACTIVE):
        left_out.add("subnetworks")
    if len(chain) < 5:
        left_out |= {"reorder", "delete_pairs"}
    return tuple(what for what in measure.MEASUREMENTS if what not in left_out)


def measured(row: Row, folder: Path, what: str) -> bool:
    """Return whether the folder of CSV files has the row in ``<what>.csv``."""
    path = folder / f"{what}.csv"
    return path.exists() and tuple(row.key.values()) in _keys(path, _stamp(path))


def record(folder: Path) -> dict[str, list[dict]]:
    """Return what ``provenance.json`` in a folder of CSV files says; nothing if there is none."""
    path = folder / "provenance.json"
    return _json(path, _stamp(path)) if path.exists() else {}


def made(row: Row, folder: Path, what: str) -> dict:
    """Return the record of how a row of ``<what>.csv`` was made, with its own ``seconds``; empty if there is none."""
    runs = (run for run in record(folder).get(f"{what}.csv", []) if str(row) in run["seconds"])
    return next((run | {"seconds": run["seconds"][str(row)]} for run in runs), {})


def cells(path: Path) -> pd.DataFrame:
    """Return a CSV file with every cell as it is written; an empty table if there is none."""
    return pd.read_csv(path, dtype=str, keep_default_na=False) if path.exists() else pd.DataFrame()


def scores(row: Row, folder: Path) -> dict[str, str]:
    """Return the row's line of ``networks.csv`` as it is written; empty if it has not been trained."""
    lines = cells(folder / "networks.csv").to_dict("records")
    return next((line for line in lines if [line[name] for name in KEYS] == [str(v) for v in row.key.values()]), {})


def progress(row: Row, place: Place) -> dict:
    """Return ``epochs`` and the list ``seconds``, one number for each epoch done, of a training under way; or {}."""
    path = place.checkpoint(row).with_suffix(".progress")
    return json.loads(path.read_text()) if path.exists() else {}


def train_row(row: Row, data: Dataset, place: Place, limit: Limit | None = None) -> bool:
    """Train a row's network from its last checkpoint on; store weights, scores and training curves.

    Args:
        row: what to train.
        data: the row's dataset.
        place: where, and on which device.
        limit: a time limit; an epoch that would not fit into it is not begun.

    Returns:
        Whether the network is trained now; False if the limit came first.

    Raises:
        ValueError: the checkpoint is corrupt and there is no earlier one, or belongs to another recipe; or the loss is
            no longer finite.
        OSError: a file could not be written; what was stored before is whole.
    """
    path = place.weights(row)
    if path is not None:
        print(f"{row}: done already ({path})")
        return True
    with claim(row, place):
        path = place.weights(row)
        if path is not None:
            print(f"{row}: trained by another process in the meantime ({path})")
            return True
        return _train(row, data, place, limit)


def measure_row(
    row: Row,
    data: Dataset,
    place: Place,
    what: list[str] | None = None,
    limit: Limit | None = None,
    *,
    remeasure: bool = False,
) -> bool:
    """Measure a trained network and store the results, one file after the other.

    Args:
        row: whose network.
        data: its dataset.
        place: where its weights are and the results go.
        what: names from `unravelling.measure.MEASUREMENTS`; all that apply when None.
        limit: a time limit; a measurement that would not fit into it is not begun.
        remeasure: whether results of another commit of the library are measured again.

    Returns:
        Whether all is measured now.

    Raises:
        FileNotFoundError: the network has not been trained.
    """
    path = place.weights(row)
    if path is None:
        raise FileNotFoundError(f"no weights at {weights_path(row, place.out / 'weights')}: train them first")
    folder = place.results(row.dataset)
    chain = weights.load(path).to(place.device)
    complete = True
    with claim(row, place):
        for name in what or applicable(row.network, row.dataset):
            if first(partial(measured, row, folder, name)):
                commit = made(row, folder, name).get("commit")
                if not remeasure or commit == results.commit():
                    print(f"{row}: {name} done already")
                    continue
                print(f"{row}: {name} was measured by commit {commit}: again")
            if limit is not None and not limit.fits(seconds := limit.measurement(row, name)):
                print(f"{row}: {name} takes about {seconds:.0f} s, more than is left: not begun", flush=True)
                complete = False
                continue
            start = time.perf_counter()
            found = measure.MEASUREMENTS[name](chain, data, row.seed)
            if found.empty:
                raise ValueError(f"{name} does not apply to {row.network}: it gives no rows")
            seconds = time.perf_counter() - start
            if weights.header(path).get("half"):  # published to save space, adopted elsewhere and gone on with
                found.attrs["weights"] = "stored in half precision"
            _store(found, row, data, place, name, seconds)
            print(f"{row}: {name}, {seconds:.0f} s", flush=True)
    return complete


def _train(row: Row, data: Dataset, place: Place, limit: Limit | None) -> bool:
    recipe = RECIPES[row.recipe]
    checkpoint = place.checkpoint(row)
    first(lambda: _mend(checkpoint))
    chain = build(row.network, row.dataset, seed=row.seed).to(place.device)
    fixed = data.train.take(torch.arange(min(256, len(data.train)))).batches(256, place.device)[0]
    total = epochs(recipe, len(data.train))
    clock = time.perf_counter()
    seconds: list[float] = progress(row, place).get("seconds", []) if checkpoint.exists() else []

    def on_epoch(epoch: int, chain: Chain) -> None:
        """Measure the network during training, into files beside the checkpoint, and keep the checkpoint before it."""
        nonlocal clock
        chain.train()
        tables = {"gradient_norms": gradient_norms(chain, *fixed)}
        if epoch in SNAPSHOTS and all(unit.residual for unit in chain.units):
            tables["spectrum_training"] = measure.spectrum_now(chain, data)
        files = {checkpoint.with_suffix(f".{epoch}.{what}"): table for what, table in tables.items()}
        if epoch:
            seconds[epoch - 1 :] = [round(time.perf_counter() - clock, 1)]
        note = json.dumps({"epochs": total, "seconds": seconds})

        def write() -> None:
            for path, table in files.items():
                table.insert(0, "epoch", epoch)
                write_atomically(path, partial(table.to_csv, index=False))
            write_atomically(checkpoint.with_suffix(".progress"), lambda to: to.write_text(note))
            if checkpoint.exists():
                write_atomically(_previous(checkpoint), lambda to: shutil.copyfile(checkpoint, to))

        first(write)
        clock = time.perf_counter()
        if epoch and not place.progress:
            print(f"{row}: epoch {epoch} of {total}, {seconds[-1]:.0f} s", flush=True)

    if not checkpoint.exists():
        on_epoch(0, chain)
    history: pd.DataFrame | None = None
    while history is None or len(history) < total:
        now = None
        if limit is not None:
            done = len(seconds) if history is None else len(history)
            now = limit.epochs(row, done, total, seconds)
            if now is None:
                print(f"{row}: stopped at epoch {done} of {total}: the next would not fit", flush=True)
                return False
        history = fit(
            chain,
            data,
            recipe,
            seed=row.seed,
            checkpoint=checkpoint,
            stop_after=now,
            on_epoch=on_epoch,
            progress=place.progress,
        )
    infinite = history.loc[~history["train_loss"].map(math.isfinite), "epoch"]
    if len(infinite):
        raise ValueError(f"{row} diverged: its training loss is not finite in epoch {infinite.iloc[0]}; nothing stored")
    start = time.perf_counter()
    some = min(10_000, len(data.train))
    splits = {"train": data.train.take(torch.arange(some)), "validation": data.validation, "test": data.test}
    score = {name: evaluate(chain, split) for name, split in splits.items()}
    spent = sum(seconds) + time.perf_counter() - start
    columns = {f"{split}_{name}": score[split][name] for split in splits for name in ("error", "loss", "images")}
    summary = pd.DataFrame([{"parameters": sum(p.numel() for p in chain.parameters())} | columns])
    summary.attrs["images"] = (
        f"all {len(data.test)} test and {len(data.validation)} validation images, the first {some} training images"
    )
    folder = place.results(row.dataset)
    before = scores(row, folder)
    _store(summary, row, data, place, "networks", spent)
    if before and scores(row, folder) != before:
        first(lambda: _forget(row, folder))
    _store(history, row, data, place, "training", spent)
    for what, chosen in (
        ("gradient_norms", {0, 1, len(history) // 2, len(history)}),
        ("spectrum_training", SNAPSHOTS & {0, *history["epoch"]}),
    ):
        files = [checkpoint.with_suffix(f".{epoch}.{what}") for epoch in sorted(chosen)]
        if files[0].exists():
            _store(pd.concat([pd.read_csv(file) for file in files]), row, data, place, what, spent)
    path = weights_path(row, place.out / "weights")
    errors: dict[str, Any] = {f"{split}_error": score[split]["error"] for split in splits}

    def finish() -> None:
        weights.save(chain, path, dataset=row.dataset, recipe=row.recipe, seed=row.seed, **errors)
        for left in checkpoint.parent.glob(f"{checkpoint.stem}.*"):
            left.unlink()

    first(finish)
    print(f"{row}: test error {100 * score['test']['error']:.2f} %, {spent:.0f} s, {path}", flush=True)
    return True


def _mend(checkpoint: Path) -> None:
    """Put the checkpoint of the epoch before in the place of one that cannot be read."""
    for left in checkpoint.parent.glob(f".{checkpoint.stem}.*"):
        left.unlink()  # the unfinished file of a process that was killed
    previous = _previous(checkpoint)
    if checkpoint.exists() and not _whole(checkpoint) and previous.exists() and _whole(previous):
        print(f"checkpoint {checkpoint} is corrupt: going on from the one before it, an epoch earlier", flush=True)
        write_atomically(checkpoint, lambda to: shutil.copyfile(previous, to))


def _previous(checkpoint: Path) -> Path:
    return checkpoint.with_suffix(".previous.pt")


def _whole(path: Path) -> bool:
    """Return whether every part of a checkpoint has its checksum, which torch.load does not look at."""
    try:
        with zipfile.ZipFile(path) as file:
            return file.testzip() is None
    except (zipfile.BadZipFile, EOFError, OSError, NotImplementedError):
        return False


def _store(table: pd.DataFrame, row: Row, data: Dataset, place: Place, what: str, seconds: float) -> None:
    columns = [column for column in table.columns if column not in KEYS]
    keyed = table[columns].assign(**row.key)[[*KEYS, *columns]]
    keyed.attrs = table.attrs
    path = place.results(row.dataset) / f"{what}.csv"
    first(lambda: store(keyed, path, place.command, seconds, data=data.label))


def _forget(row: Row, folder: Path) -> None:
    """Remove what was measured on an earlier network of the row: its weights are gone, and the new ones differ."""
    for what in measure.MEASUREMENTS:
        if measured(row, folder, what):
            print(f"{row}: trained anew with another result, so {what} of the earlier network is dropped", flush=True)
            path = folder / f"{what}.csv"
            with FileLock(folder / ".lock"):
                all_rows = cells(path)
                rest = all_rows[(all_rows[KEYS] != pd.Series(row.key).astype(str)).any(axis=1)]
                write_atomically(path, partial(rest.to_csv, index=False))


@cache
def _keys(path: Path, stamp: tuple) -> set[tuple]:
    return set(pd.read_csv(path, usecols=KEYS)[KEYS].drop_duplicates().itertuples(index=False, name=None))


@cache
def _json(path: Path, stamp: tuple) -> dict:
    return json.loads(path.read_text())


def _stamp(path: Path) -> tuple:
    """Return what changes when a file is replaced."""
    status = path.stat()
    return status.st_mtime_ns, status.st_size, status.st_ino
