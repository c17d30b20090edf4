"""Measure one trained network in one way, or several trained networks together, and write one cell."""

from __future__ import annotations

import signal

if __name__ == "__main__":  # Ctrl-C while PyTorch loads ends this without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import sys
import time
from pathlib import Path

from cells import about_weights, checksum, origin, parser, run, write
from measurements import ENSEMBLE, TABLE, is_joint
from unravelling import load
from unravelling.data import load_dataset
from unravelling.train import RECIPES, as_tested


def main(arguments: list[str] | None = None) -> int:
    """Run a command line and return its exit status."""
    options = parser(__doc__, ".csv")
    options.add_argument("--what", required=True, choices=TABLE | ENSEMBLE, help="the measurement")
    options.add_argument("--weights", required=True, nargs="+", type=Path, metavar="FILE", help="that train.py wrote")
    return run(measure, options.parse_args(arguments))


def measure(options: argparse.Namespace) -> None:
    """Measure the networks and write the results.

    Raises:
        ValueError: the measurement does not apply to the network, or the weights are another network's.
        OSError: a file could not be read or written.
    """
    together, number = options.what in ENSEMBLE, len({path.resolve() for path in options.weights})
    if len(options.weights) > 1 and not together:
        raise ValueError(f"{options.what} takes one network: give --weights one file")
    asked = {"dataset": options.dataset, "recipe": options.recipe}
    asked |= {"seed": options.seed, "network": options.network} if number == 1 else {}
    for path in options.weights:
        member = about_weights(path, **asked)["network"]
        if number > 1 and options.network != (wanted := f"{member}x{number}"):
            raise ValueError(f"--network {options.network}: {number} different files with {member} are {wanted}")
    data, chains = load_dataset(options.dataset, options.data), [load(path) for path in options.weights]
    chains = [as_tested(chain.to(options.device), RECIPES[options.recipe]) for chain in chains]
    if together and number == 1 and not is_joint(chains[0]):
        raise ValueError("an ensemble takes several networks, or one whose members were trained as one")
    measurement = (TABLE | ENSEMBLE)[options.what]
    if not all(map(measurement.applies, chains)):
        raise ValueError(f"{options.what} does not apply to {options.network}: paths need skips, statistics batch norm")
    test, words = measurement.images(chains[0], data)
    start = time.perf_counter()
    table = measurement.function(chains if together else chains[0], test, data, options.seed)
    seconds = round(time.perf_counter() - start, 1)
    weights, own = (" ".join(map(of, options.weights)) for of in (origin, checksum))
    about = {"data": data.label, "images": words + measurement.note, "seconds": seconds, "weights": weights}
    write(table, options.out, options, about | ({"halved": own} if own != weights else {}))
    print(f"{options.network}-seed{options.seed}-{options.recipe}: {options.what}, {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    sys.exit(main())
