"""Cells: one file for each measurement of one trained network, and beside it the record of how it was made."""

from __future__ import annotations

import argparse
import glob
import hashlib
import json
import os
import platform
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path

import pandas as pd
import torch
import unravelling
from safetensors.torch import load_file
from torch import Tensor
from unravelling.data import write_atomically
from unravelling.nets import SHAPES
from unravelling.train import RECIPES

ROOT = Path(__file__).resolve().parents[1]
KEYS = ["dataset", "network", "seed", "recipe"]
"""Columns that tell the rows of a table apart."""


def parser(description: str) -> argparse.ArgumentParser:
    """Return a parser of the options that say which network, on which device, and where the images are."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--dataset", choices=SHAPES, default="digits", help="default: digits, which needs no download")
    parser.add_argument("--network", required=True, help="such as resnet110, plain20, vgg15-nobn, resnet110-post")
    parser.add_argument("--seed", type=_seed, default=0, help="default: 0")
    parser.add_argument("--recipe", choices=RECIPES, default="digits", help="default: digits")
    parser.add_argument("--data", metavar="FOLDER", help="where CIFAR-10 is (default: $UNRAVELLING_DATA)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, … (default: auto)")
    parser.add_argument("--threads", type=int, help="of the processor (default: what PyTorch chooses)")
    return parser


def run(work: Callable[[argparse.Namespace], None], options: argparse.Namespace) -> int:
    """Call ``work`` with the options, whose ``device`` is resolved, and return the status for the shell.

    SIGTERM ends the process like Ctrl-C: files that are being written are removed, what was written before is whole.
    """
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    follow_parent()
    try:
        options.device = _device(options.device)
        if options.threads is not None:
            if options.threads < 1:
                raise ValueError(f"--threads {options.threads}: at least one is needed")
            torch.set_num_threads(options.threads)
        work(options)
    except torch.OutOfMemoryError as error:
        print(f"error: {options.device} has too little memory for this one ({error})", file=sys.stderr)
        return 2
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from the last whole file", file=sys.stderr)
        return 130
    return 0


def follow_parent() -> None:
    """End with Snakemake, where that has started this process: it says so in the environment."""
    if "UNRAVELLING_PARENT" in os.environ:
        end_with(int(os.environ["UNRAVELLING_PARENT"]))


def end_with(parent: int) -> None:
    """End this process by SIGTERM when the process ``parent`` that started it has ended, however that happened."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(20)  # for what Python cannot interrupt
        os._exit(128 + signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def write(table: pd.DataFrame, path: Path, options: argparse.Namespace, about: Mapping[str, object]) -> None:
    """Write a cell: the record first, then the table, whose presence says that the cell is whole.

    Args:
        table: tidy rows; the `KEYS` of the network are put before its columns.
        path: of the ``.csv`` file; the record has the same name and the suffix ``.json``.
        options: the command line's.
        about: what the record says besides command, commit, versions and hardware.
    """
    sweep(path)
    keys = {name: getattr(options, name) for name in KEYS}
    columns = [column for column in table.columns if column not in keys]
    text = table[columns].assign(**keys)[[*KEYS, *columns]].to_csv(index=False, float_format="%.6g").encode()
    record = {
        "command": command(sys.argv[1:]),
        "commit": commit(),
        "versions": {name: version(name) for name in ("torch", "numpy", "pandas", "unravelling")},
        "hardware": hardware(options.device),
        "sha256": hashlib.sha256(text).hexdigest(),
    } | dict(about)
    content = json.dumps(record, indent=1, sort_keys=True) + "\n"
    write_atomically(path.with_suffix(".json"), lambda to: to.write_text(content, encoding="utf-8"))
    write_atomically(path, partial(_write, text))


def sweep(path: Path) -> None:
    """Remove what a killed process left of a file, or of its neighbours with the same stem, that it was writing."""
    for left in path.parent.glob(f".{glob.escape(path.stem)}.*"):
        left.unlink(missing_ok=True)


def checksum(weights: Path | Mapping[str, Tensor]) -> str:
    """Return the checksum of a network's parameters and buffers, whatever the header of their file says."""
    tensors = load_file(weights) if isinstance(weights, Path) else weights
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def command(arguments: Sequence[str]) -> str:
    """Return this script's command line, as a shell takes it, without the names of folders outside the project."""
    script = Path(sys.argv[0]).name
    return shlex.join(["python", f"experiments/{script}", *map(_without_folder, arguments)])


def commit() -> str:
    """Return the project's commit, with a plus sign when its code has changed since; "unknown" outside its repository.

    A repository further up, or another project's, is not asked.
    """
    own = Path(unravelling.__file__).resolve()

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != ROOT:
            return "unknown"
        git("ls-files", "--error-unmatch", "--", str(own))
        changed = git("status", "--porcelain", "--", "experiments", str(own.parent))
        return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def hardware(device: str) -> str:
    """Return the processor's kind, the number of threads, and the GPU where the work was done on one."""
    gpu = f", {torch.cuda.get_device_name(device)}" if device.startswith("cuda") else ""
    return f"{platform.machine()}, {torch.get_num_threads()} threads{gpu}"


def _without_folder(argument: str) -> str:
    option, equals, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
    if os.sep not in value and value not in (".", "..") and not value.startswith("~"):
        return argument
    path = Path(value).expanduser().resolve()
    return option + equals + (path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else "PATH")


def _device(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name} cannot be used ({error}): choose cpu, cuda or auto") from error
    return name


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**31:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 2147483647")
    return int(text)


def _write(content: bytes, path: Path) -> None:
    path.write_bytes(content)
