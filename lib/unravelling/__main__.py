"""The long runs, from a shell: ``python -m unravelling train …``, ``measure …``, ``ensemble …`` and ``paper …``."""

from __future__ import annotations

import argparse
import math
import re
import sys
import time
from functools import partial
from pathlib import Path

import torch

from . import distributed, ensemble, paper, runs, weights
from .data import load_dataset
from .measure import MEASUREMENTS
from .nets import SHAPES, build
from .results import DEFAULT_RECIPES, KEYS, store
from .runs import Place, Row
from .train import RECIPES


def main(arguments: list[str] | None = None) -> int:
    """Run a command line and return its exit status."""
    start = time.time()
    arguments = sys.argv[1:] if arguments is None else arguments
    options = _parser().parse_args(arguments)
    options.line = paper.without_paths("python -m unravelling " + " ".join(arguments).split(" --worker")[0])
    options.arguments = arguments
    options.deadline = options.worker or start + options.budget if options.run is _paper else math.inf
    torch.set_flush_denormal(True)
    try:
        with distributed.processes(options.device) as options.device:
            for network in options.networks or ():
                build(network, options.dataset)  # an unknown name fails before the first hour, not after it
            return options.run(options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; the same command continues after the last finished epoch or measurement", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m unravelling",
        description="Train the networks of the book and measure them. train, measure and paper can be stopped at any "
        "time and continue where they were; what is done is skipped. ensemble takes seconds and starts anew.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    place = argparse.ArgumentParser(add_help=False)
    place.add_argument("--data", metavar="FOLDER", help="where CIFAR-10 is (default: $UNRAVELLING_DATA)")
    place.add_argument(
        "--out", type=Path, default=Path("_build/runs"), help="folder for weights, results and checkpoints"
    )
    place.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, … (default: auto)")
    common = argparse.ArgumentParser(add_help=False, parents=[place])
    common.add_argument("networks", nargs="+", help="such as resnet110, plain20, vgg15, vgg15-nobn, resnet56-post")
    common.add_argument("--dataset", choices=SHAPES, default="digits", help="default: digits, which needs no download")
    common.add_argument("--seeds", type=_seeds, default=[0], help="such as 0, 0-4 or 0,2 (default: 0)")
    common.add_argument(
        "--recipe", choices=RECIPES, help=f"default: {', '.join(f'{r} for {d}' for d, r in DEFAULT_RECIPES.items())}"
    )
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
    whole = commands.add_parser(
        "paper",
        parents=[place],
        help="train and measure the matrix of networks, seeds and recipes",
        description="Train and measure every row of a matrix of networks, seeds and recipes, the most important first; "
        "say what is done, what remains and about how long it takes.",
    )
    whole.add_argument("--dataset", choices=SHAPES, default="cifar10", help="default: cifar10; digits to rehearse")
    whole.add_argument("--recipe", choices=RECIPES, help="default: paper on a GPU, short on a CPU; brief is shorter")
    whole.add_argument("--groups", type=_seeds, help="of rows, such as 1 or 1,2 (default: all; brief: 1)")
    whole.add_argument("--networks", nargs="+", help="such as resnet110 plain20 (default: those of the matrix)")
    whole.add_argument("--seeds", type=_seeds, help="such as 0 or 0-4 (default: those of the matrix)")
    whole.add_argument("--status", "--dry-run", action="store_true", help="say what is done and what remains, and stop")
    whole.add_argument(
        "--budget", type=_budget, default=math.inf, help="stop before this time is over: 90s, 25m, 2h (default: never)"
    )
    whole.add_argument("--jobs", type=int, default=1, help="processes that share the rows and the cores (default: 1)")
    whole.add_argument("--remeasure", action="store_true", help="measure again what another commit has measured")
    whole.add_argument(
        "--publish",
        type=Path,
        metavar="FOLDER",
        help="copy finished rows here in the end, and count those there as done",
    )
    whole.add_argument("--worker", type=float, help=argparse.SUPPRESS)
    whole.set_defaults(run=_paper)
    return parser


def _rows(options: argparse.Namespace) -> list[Row]:
    recipe = options.recipe or DEFAULT_RECIPES[options.dataset]
    return [Row(options.dataset, network, seed, recipe) for network in options.networks for seed in options.seeds]


def _train(options: argparse.Namespace) -> int:
    data, place = load_dataset(options.dataset, options.data), Place(options.out, options.device, options.line)
    for row in _rows(options):
        runs.train_row(row, data, place)
    return 0


def _measure(options: argparse.Namespace) -> int:
    data, place = load_dataset(options.dataset, options.data), Place(options.out, options.device, options.line)
    for row in _rows(options):
        if not options.what:
            known = runs.applicable(row.network, row.dataset)
            print(*(f"{row}: {name} does not apply\n" for name in MEASUREMENTS if name not in known), sep="", end="")
        runs.measure_row(row, data, place, options.what)
    return 0


def _ensemble(options: argparse.Namespace) -> int:
    """Store the removal of members as ensemble.csv; its column ``seed`` counts the ensembles, which share no member."""
    data, size, rows = load_dataset(options.dataset, options.data), options.size, _rows(options)
    if size < 1 or len(options.seeds) % size:
        raise ValueError(
            f"{len(options.seeds)} seeds do not make ensembles of {size}: choose another --size or --seeds"
        )
    place = Place(options.out, options.device, options.line)
    for start in range(0, len(rows), size):
        clock = time.perf_counter()
        replicate = start % len(options.seeds) // size
        chains = [weights.load(_trained(row, place)).to(options.device) for row in rows[start : start + size]]
        table = ensemble.remove_members(*ensemble.predictions(chains, data.test), range(size))
        joint = Row(options.dataset, f"{rows[start].network}x{size}", replicate, rows[start].recipe)
        keyed = table.assign(**joint.key)[[*KEYS, *table.columns]]
        path, seconds = place.results(options.dataset) / "ensemble.csv", time.perf_counter() - clock
        distributed.first(partial(store, keyed, path, options.line, seconds, data=data.label))
        print(f"{joint.network}, ensemble {replicate}: error {100 * table['error'][0]:.2f} %")
    return 0


def _paper(options: argparse.Namespace) -> int:
    if distributed.world() > 1:
        raise ValueError("paper runs whole rows side by side, with --jobs: with torchrun, start train and measure")
    if options.jobs < 1:
        raise ValueError(f"--jobs {options.jobs}: at least one process is needed")
    recipe = options.recipe or ("paper" if options.device.startswith("cuda") else "short")
    rows = paper.select(options.dataset, recipe, options.groups, options.networks, options.seeds)
    idle = options.deadline <= time.time()  # --budget 0s publishes what there is, and needs no images
    data = None if idle else load_dataset(options.dataset, options.data)
    alone = options.worker is None and options.jobs == 1
    place = Place(options.out, options.device, options.line, progress=alone and sys.stderr.isatty())
    limit = None if data is None else paper.Limit(data, place, options.deadline)
    if options.worker is None:
        if options.publish:
            paper.adopt(place, options.publish, options.dataset)
        images = data.label if data else options.dataset
        print(f"{images}, recipe {recipe}, {options.device}, {torch.get_num_threads()} threads, {options.out}")
        print(paper.status(rows, place, None if idle else limit), flush=True)
        if options.status:
            return 0
    failed: list[str] = []
    code = 0
    try:
        if options.jobs > 1 and options.worker is None and not idle:
            code = paper.side_by_side(options.arguments, options.jobs, options.deadline)
        elif data is not None:
            assert data is not None
            some = None if options.deadline == math.inf else limit
            failed = paper.work(rows, data, place, some, remeasure=options.remeasure)
    finally:
        if options.worker is None and options.publish:
            for refusal in paper.publish(place, options.publish, options.dataset):
                print(f"not published: {refusal}")
    if options.worker is None:
        print(paper.status(rows, place), flush=True)
    return 2 if failed else code


def _trained(row: Row, place: Place) -> Path:
    path = place.weights(row)
    if path is None:
        raise FileNotFoundError(f"no weights at {runs.weights_path(row, place.out / 'weights')}: train them first")
    return path


def _budget(text: str) -> float:
    """Read 90s, 25m or 2h as seconds."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not a time such as 90s, 25m or 2h")
    return float(match[1]) * {"s": 1, "m": 60, "h": 3600}[match[2]]


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
