"""Train one network and write its weights, with the tables of its training beside them; exact resume after any stop."""

from __future__ import annotations

import signal

if __name__ == "__main__":  # Ctrl-C while PyTorch loads ends this without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import contextlib
import json
import math
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import pandas as pd
from cells import checksum, hardware, parser, read_json, run, sweep, write
from measurements import first, has_skips, norms_in_training, spectrum_in_training
from unravelling import build, evaluate, fit, save
from unravelling.chain import Chain
from unravelling.data import Dataset, load_dataset, write_atomically
from unravelling.train import RECIPES, as_tested

SNAPSHOTS = {0, 1, 2, 4, 5, 10, 15, 20, 50, 100, 164}
"""Epochs after which the gradient by path length is measured, where a run has them."""
IN_TRAINING = {"gradient_norms": norms_in_training, "spectrum_training": spectrum_in_training}
"""What is measured on a network while it is trained."""


def main(arguments: list[str] | None = None) -> int:
    """Run a command line and return its exit status."""
    options = parser(__doc__, ".safetensors")
    options.add_argument("--compile", action="store_true", help="compile the units; takes minutes, and pays in hours")
    return run(train, options.parse_args(arguments))


def train(options: argparse.Namespace) -> None:
    """Train a network from its last checkpoint on; write the tables of the training, then the weights.

    Raises:
        ValueError: the checkpoint is corrupt and so is the one before it, or it belongs to another network, recipe,
            seed or dataset; or the loss is no longer finite.
        OSError: a file could not be written; what was written before is whole.
    """
    name = f"{options.network}-seed{options.seed}-{options.recipe}"
    checkpoint = options.out.with_name("checkpoint.pt")
    previous, progress = checkpoint.with_suffix(".previous.pt"), checkpoint.with_suffix(".epochs.json")
    recipe, data = RECIPES[options.recipe], load_dataset(options.dataset, options.data)
    chain = build(options.network, options.dataset, seed=options.seed).to(options.device)
    total = recipe.epochs or math.ceil((recipe.iterations or 0) / (len(data.train) // recipe.batch_size))
    snapshots = _snapshots(checkpoint, total, has_skips(chain))
    sweep(checkpoint)
    sweep(options.out)
    fitting = partial(fit, chain, data, recipe, seed=options.seed, progress=sys.stderr.isatty(), graph=True)
    try:
        fitting(checkpoint=checkpoint, stop_after=0)  # only reads it
    except ValueError as error:
        if not previous.exists():
            raise
        fitting(checkpoint=previous, stop_after=0)
        print(f"{error}\ngoing on from the one before it, an epoch earlier", flush=True)
        write_atomically(checkpoint, lambda to: shutil.copyfile(previous, to))
    going_on = checkpoint.exists() and progress.exists()
    epochs = read_json(progress, "delete it, and the record will lack the time so far") if going_on else []
    clock = time.perf_counter()

    def on_epoch(epoch: int, chain: Chain) -> None:
        """Measure the network in training, into files beside the checkpoint, and keep the checkpoint before it."""
        spent = round(time.perf_counter() - clock, 1), hardware(options.device)
        epochs[max(0, epoch - 1) :] = [spent] if epoch else []
        for what, files in snapshots.items():
            if epoch in files:
                table = IN_TRAINING[what](chain, data).assign(epoch=epoch)
                write_atomically(files[epoch], partial(table.to_csv, index=False))
        write_atomically(progress, lambda to: to.write_text(json.dumps(epochs)))
        if checkpoint.exists():
            write_atomically(previous, lambda to: shutil.copyfile(checkpoint, to))

    if not checkpoint.exists():
        on_epoch(0, chain)
    history = pd.DataFrame()
    with _compiled(chain, options.compile):
        while len(history) < total:
            clock = time.perf_counter()
            history = fitting(checkpoint=checkpoint, stop_after=1, on_epoch=on_epoch)
            now = history.iloc[-1]
            errors = f"errors: training {100 * now.train_error:.1f} %, validation {100 * now.validation_error:.1f} %"
            took = sum(seconds for seconds, _ in epochs[-1:])
            print(f"{name}: epoch {len(history)} of {total}, {took:.0f} s; {errors}", flush=True)
    _write(chain, data, history, snapshots, options, epochs)
    for left in (checkpoint, previous, progress, *(path for files in snapshots.values() for path in files.values())):
        left.unlink(missing_ok=True)


def _write(
    chain: Chain, data: Dataset, history: pd.DataFrame, snapshots: Mapping[str, Mapping[int, Path]],
    options: argparse.Namespace, epochs: Sequence[tuple[float, str]],
) -> None:
    """Write the tables, then the weights, whose presence says that all is there; ``epochs``: seconds and hardware."""
    start = time.perf_counter()
    some = first(data.train, 10_000)
    splits = {"train": some, "validation": data.validation, "test": data.test}
    tested = as_tested(chain, RECIPES[options.recipe])
    scores = {name: evaluate(tested, split) for name, split in splits.items()}  # refuses what has diverged
    columns = {f"{split}_{name}": scores[split][name] for split in splits for name in ("error", "loss", "images")}
    number = sum(parameter.numel() for parameter in chain.parameters())
    tables = {"training": history, "networks": pd.DataFrame([{"parameters": number} | columns])}
    for name, files in snapshots.items():
        if all(file.exists() for file in files.values()):
            table = pd.concat(map(_snapshot, files.values()))
            tables[name] = table[["epoch", *table.columns.drop("epoch")]]
    total = round(sum(seconds for seconds, _ in epochs) + time.perf_counter() - start, 1)
    about = {"data": data.label, "seconds": total, "weights": checksum(chain.state_dict())}
    about["hardware"] = "; ".join(dict.fromkeys(where for _, where in epochs)) or hardware(options.device)
    images = f"all {len(data.test)} test and {len(data.validation)} validation images, the first {len(some)} training "
    for name, table in tables.items():
        more = {"images": f"{images}images"} if name == "networks" else {}
        write(table, options.out.with_name(f"{name}.csv"), options, about | more)
    errors = {f"{split}_error": scores[split]["error"] for split in splits}
    save(chain, options.out, dataset=options.dataset, recipe=options.recipe, seed=options.seed, **errors)
    print(f"{options.out}: test error {100 * scores['test']['error']:.2f} %, {total:.0f} s", flush=True)


def _snapshot(path: Path) -> pd.DataFrame:
    with contextlib.suppress(ValueError):
        table = pd.read_csv(path)
        if not table.isna().any(axis=None):
            return table
    raise ValueError(f"{path} is broken: delete it, and go on without the table that it belongs to")


def _snapshots(checkpoint: Path, total: int, paths: bool) -> dict[str, dict[int, Path]]:
    """Return the files of each table of `IN_TRAINING`, by epoch; of networks without ``paths``, the norms alone."""
    due = {"gradient_norms": {0, 1, total // 2, total}}
    if paths:
        due["spectrum_training"] = SNAPSHOTS & {*range(total + 1)}
    return {name: {i: checkpoint.with_suffix(f".{i}.{name}.csv") for i in sorted(due[name])} for name in due}


@contextlib.contextmanager
def _compiled(chain: Chain, wanted: bool) -> Iterator[None]:
    """Compile every unit in place, so that the names of its parameters stay.

    All units share the code of `Unit.forward`, and every kind of unit, mode and batch size is one compilation of it:
    the default limit of 8 would silently let most of them run uncompiled.
    """
    if not wanted:
        yield
        return
    import torch._dynamo  # seconds, which nobody else should wait for

    with torch._dynamo.config.patch(recompile_limit=64):
        for unit in chain.units:
            unit.compile(dynamic=False)
        try:
            yield
        finally:
            for unit in chain.units:
                unit._compiled_call_impl = None


if __name__ == "__main__":
    sys.exit(main())
