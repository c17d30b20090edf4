"""The long runs, from a shell: ``python -m unravelling train …``, ``measure …`` and ``ensemble …``."""

from __future__ import annotations

import argparse
import re
import sys
import time
from pathlib import Path

import pandas as pd
import torch

from . import ensemble, measure, weights
from .chain import Chain
from .data import Dataset, load_dataset
from .measure import MEASUREMENTS
from .nets import SHAPES, build
from .paths import gradient_norms
from .results import DEFAULT_RECIPES, KEYS, store
from .train import RECIPES, evaluate, fit

SNAPSHOTS = {0, 1, 2, 4, 5, 10, 15, 20, 50, 100, 164}
"""Epochs after which the gradient by path length is measured, where a run has them."""


def main(arguments: list[str] | None = None) -> int:
    """Run a command line and return its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m unravelling",
        description="Train the networks of the book and measure them. train and measure can be stopped at any time and "
        "continue where they were; what is done is skipped. ensemble takes seconds and starts anew.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("networks", nargs="+", help="such as resnet110, plain20, vgg15, vgg15-nobn, resnet56-post")
    common.add_argument("--dataset", choices=SHAPES, default="digits", help="default: digits, which needs no download")
    common.add_argument("--data", metavar="FOLDER", help="where CIFAR-10 is (default: $UNRAVELLING_DATA)")
    common.add_argument("--seeds", type=_seeds, default=[0], help="such as 0, 0-4 or 0,2 (default: 0)")
    common.add_argument("--recipe", choices=RECIPES, help="default: digits for digits, short for cifar10")
    common.add_argument(
        "--out", type=Path, default=Path("_build/runs"), help="folder for weights, results and checkpoints"
    )
    common.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, … (default: auto)")
    train = commands.add_parser(
        "train", parents=[common], help="train networks", description="Train networks; write weights and curves."
    )
    train.set_defaults(run=_train)
    measuring = commands.add_parser(
        "measure",
        parents=[common],
        help="measure trained networks",
        description="Measure networks that train has made.",
    )
    measuring.add_argument("--what", nargs="+", choices=MEASUREMENTS, help="default: all that apply")
    measuring.set_defaults(run=_measure)
    joining = commands.add_parser(
        "ensemble",
        parents=[common],
        help="measure ensembles of trained networks",
        description="Average networks that train has made, in groups of --size seeds; remove members in every way.",
    )
    joining.add_argument("--size", type=int, default=6, help="members of an ensemble (default: 6)")
    joining.set_defaults(run=_ensemble)
    options = parser.parse_args(arguments)
    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    options.recipe = options.recipe or DEFAULT_RECIPES[options.dataset]
    options.line = "python -m unravelling " + " ".join(sys.argv[1:] if arguments is None else arguments)
    torch.set_flush_denormal(True)
    try:
        for network in options.networks:
            build(network, options.dataset)  # an unknown name fails before the first hour, not after it
        data = load_dataset(options.dataset, options.data)
        options.copy = data.label
        for network in options.networks:
            if options.run is _ensemble:
                _ensemble(options, data, network)
                continue
            for seed in options.seeds:
                options.run(options, data, network, seed)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; the same command continues after the last finished epoch or measurement", file=sys.stderr)
        return 130
    return 0


def _train(options: argparse.Namespace, data: Dataset, network: str, seed: int) -> None:
    run = f"{network}-seed{seed}"
    path = _weights_path(options, network, seed)
    if path.exists():
        _check_recipe(path, options)
        print(f"{run}: done already ({path})")
        return
    results = options.out / "results" / options.dataset
    checkpoint = options.out / "checkpoints" / options.dataset / f"{run}-{options.recipe}.pt"
    chain = build(network, options.dataset, seed=seed).to(options.device)
    fixed = data.train.take(torch.arange(256)).batches(256, options.device)[0]
    recipe = RECIPES[options.recipe]

    def snapshot(epoch: int, chain: Chain) -> None:
        """Measure the network during training, into a file beside the checkpoint."""
        chain.train()
        tables = {"gradient_norms": gradient_norms(chain, *fixed)}
        if epoch in SNAPSHOTS and all(unit.residual for unit in chain.units):
            tables["spectrum_training"] = measure.spectrum_now(chain, data)
        for what, table in tables.items():
            table.insert(0, "epoch", epoch)
            path = checkpoint.with_suffix(f".{epoch}.{what}")
            path.parent.mkdir(parents=True, exist_ok=True)
            table.to_csv(path, index=False)

    start = time.perf_counter()
    if not checkpoint.exists():
        snapshot(0, chain)
    history = fit(chain, data, recipe, seed=seed, checkpoint=checkpoint, on_epoch=snapshot)
    seconds = time.perf_counter() - start
    splits = {"train": data.train.take(torch.arange(min(10_000, len(data.train)))), "validation": data.validation}
    scores = {name: evaluate(chain, split) for name, split in (splits | {"test": data.test}).items()}
    key = dict(zip(KEYS, (options.dataset, network, seed, options.recipe), strict=True))
    summary = {
        f"{split}_{name}": score[name] for split, score in scores.items() for name in ("error", "loss", "images")
    }
    parameters = sum(p.numel() for p in chain.parameters())
    _store(pd.DataFrame([key | {"parameters": parameters} | summary]), results / "networks.csv", key, options, seconds)
    _store(history, results / "training.csv", key, options, seconds)
    for what, epochs in (
        ("gradient_norms", {0, 1, len(history) // 2, len(history)}),
        ("spectrum_training", SNAPSHOTS & {0, *history["epoch"]}),
    ):
        files = [checkpoint.with_suffix(f".{epoch}.{what}") for epoch in sorted(epochs)]
        if files[0].exists():
            table = pd.concat([pd.read_csv(file) for file in files])
            _store(table, results / f"{what}.csv", key, options, seconds)
    errors = {f"{split}_error": score["error"] for split, score in scores.items()}
    weights.save(chain, path, dataset=options.dataset, recipe=options.recipe, seed=seed, **errors)
    for left in checkpoint.parent.glob(f"{checkpoint.stem}.*"):
        left.unlink()
    print(f"{run}: test error {100 * scores['test']['error']:.2f} %, {seconds:.0f} s, {path}")


def _measure(options: argparse.Namespace, data: Dataset, network: str, seed: int) -> None:
    path = _weights_path(options, network, seed)
    chain = weights.load(path).to(options.device)
    _check_recipe(path, options)
    key = dict(zip(KEYS, (options.dataset, network, seed, options.recipe), strict=True))
    for what in options.what or MEASUREMENTS:
        path = options.out / "results" / options.dataset / f"{what}.csv"
        if path.exists() and (pd.read_csv(path, usecols=KEYS) == pd.Series(key)).all(axis=1).any():
            print(f"{network}-seed{seed}: {what} done already")
            continue
        start = time.perf_counter()
        try:
            table = MEASUREMENTS[what](chain, data, seed)
        except ValueError as error:
            if options.what:
                raise
            print(f"{network}-seed{seed}: {what} does not apply: {error}")
            continue
        seconds = time.perf_counter() - start
        _store(table, path, key, options, seconds)
        print(f"{network}-seed{seed}: {what}, {seconds:.0f} s")


def _ensemble(options: argparse.Namespace, data: Dataset, network: str) -> None:
    """Store the removal of members as ensemble.csv; its column ``seed`` counts the ensembles, which share no member."""
    size = options.size
    if size < 1 or len(options.seeds) % size:
        raise ValueError(
            f"{len(options.seeds)} seeds do not make ensembles of {size}: choose another --size or --seeds"
        )
    for replicate, start in enumerate(range(0, len(options.seeds), size)):
        clock = time.perf_counter()
        paths = [_weights_path(options, network, seed) for seed in options.seeds[start : start + size]]
        chains = [weights.load(path).to(options.device) for path in paths]
        for path in paths:
            _check_recipe(path, options)
        table = ensemble.remove_members(*ensemble.predictions(chains, data.test), range(size))
        key = dict(zip(KEYS, (options.dataset, f"{network}x{size}", replicate, options.recipe), strict=True))
        path = options.out / "results" / options.dataset / "ensemble.csv"
        _store(table, path, key, options, time.perf_counter() - clock)
        print(f"{network}x{size}, ensemble {replicate}: error {100 * table['error'][0]:.2f} %")


def _weights_path(options: argparse.Namespace, network: str, seed: int) -> Path:
    variant = "" if options.recipe == DEFAULT_RECIPES[options.dataset] else f"-{options.recipe}"
    return options.out / "weights" / options.dataset / f"{network}{variant}-seed{seed}.safetensors"


def _check_recipe(path: Path, options: argparse.Namespace) -> None:
    recipe = weights.header(path).get("recipe")
    if recipe != options.recipe:
        raise ValueError(
            f"{path} was trained with recipe {recipe}, not {options.recipe}: choose another --recipe or --out"
        )


def _store(table: pd.DataFrame, path: Path, key: dict, options: argparse.Namespace, seconds: float) -> None:
    columns = [column for column in table.columns if column not in KEYS]
    store(table[columns].assign(**key)[[*KEYS, *columns]], path, options.line, seconds, options.copy)


def _seeds(text: str) -> list[int]:
    """Read 3, 0-4 or 0,2."""
    seeds: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if not match or int(match[2] or match[1]) < int(match[1]):
            raise argparse.ArgumentTypeError(f"{text!r} is not a list of seeds such as 0, 0-4 or 0,2")
        seeds += range(int(match[1]), int(match[2] or match[1]) + 1)
    return seeds


if __name__ == "__main__":
    sys.exit(main())
