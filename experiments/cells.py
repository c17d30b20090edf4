"""Cells: one file for each measurement of one trained network, and beside it the record of how it was made."""

from __future__ import annotations

import argparse
import contextlib
import glob
import hashlib
import json
import os
import platform
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import unravelling
from filelock import FileLock, Timeout
from torch import Tensor
from unravelling.chain import check_number
from unravelling.data import check_device, check_path, read_tensors, write_atomically
from unravelling.nets import SHAPES
from unravelling.stored import KEYS
from unravelling.train import RECIPES
from unravelling.weights import header

ROOT = Path(__file__).resolve().parents[1]
_held: list[FileLock] = []  # until this process ends


def parser(description: str | None, suffix: str) -> argparse.ArgumentParser:
    """Return a parser of the options that say which network, on which device, which images, and what file to write."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--dataset", choices=SHAPES, default="digits", help="default: digits, which needs no download")
    parser.add_argument("--network", required=True, help="such as resnet110, plain20, vgg15-nobn, resnet110-post")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument("--recipe", choices=RECIPES, default="digits", help="default: digits")
    parser.add_argument("--data", metavar="FOLDER", help="where CIFAR-10 is (default: $UNRAVELLING_DATA)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, … (default: auto)")
    parser.add_argument("--threads", type=int, help="of the processor (default: what PyTorch chooses)")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help=f"to write, {suffix}")
    parser.set_defaults(suffix=suffix)
    return parser


def run(work: Callable[[argparse.Namespace], None], options: argparse.Namespace) -> int:
    """Call ``work`` with the options, whose ``device`` is resolved, and return the status for the shell.

    What ``--out`` names is not made again. SIGTERM ends the process like Ctrl-C: files that
    are being written are removed, what was written before is whole.
    """

    def stop(number: int, frame: object) -> None:
        signal.signal(number, signal.SIG_IGN)  # a second one must not disturb the cleaning up
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        follow(os.environ.get("UNRAVELLING_PARENT"))
        options.out, options.seed = check_path(out=options.out), check_number(seed=options.seed)
        if options.out.is_dir() or options.out.suffix != options.suffix:
            raise ValueError(f"--out {options.out}: expected a file, no folder, that ends with {options.suffix}")
        if options.out.exists():
            print(f"{options.out}: done already")
            return 0
        if options.threads is not None:
            if not 1 <= options.threads <= 1024:
                raise ValueError(f"--threads {options.threads}: expected 1 to 1024")
            torch.set_num_threads(options.threads)
        options.device = _device(options.device)
        torch.backends.cudnn.allow_tf32 = False  # a GPU would else round float32 to 10 bits in every convolution
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


def follow(parent: str | int | None) -> None:
    """End this process by SIGTERM when the process that started it has ended, however that happened; None: never."""

    def watch(parent: int) -> None:
        while os.getppid() == parent:
            time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(20)  # for what Python cannot interrupt
        os._exit(128 + signal.SIGTERM)

    if parent is not None:
        threading.Thread(target=watch, args=[int(parent)], daemon=True).start()


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
        **about,
    }
    content = json.dumps(record, indent=1, sort_keys=True) + "\n"
    write_atomically(path.with_suffix(".json"), lambda to: to.write_text(content, encoding="utf-8"))
    write_atomically(path, lambda to: to.write_bytes(text))


def sweep(path: Path) -> None:
    """Remove what a killed process left of a file, or of its neighbours with the same stem, that it was writing."""
    for left in path.parent.glob(f".{glob.escape(path.stem)}.*"):
        left.unlink(missing_ok=True)


def checksum(weights: Path | Mapping[str, Tensor]) -> str:
    """Return the checksum of a network's parameters and buffers, whatever the header of their file says."""
    tensors = read_tensors(weights)[1] if isinstance(weights, Path) else weights
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def origin(path: Path) -> str:
    """Return the checksum of the weights in a file or, where it is a copy in half precision, of those it was made from.

    The shipped copies of large networks are rounded so; what is measured on them belongs to the same training.
    """
    return header(path).get("source") or checksum(path)


def about_weights(path: Path, **expected: object) -> dict[str, Any]:
    """Return the header of a weights file, or raise ValueError where it is damaged or another network's."""
    found = header(path)
    found["network"] = found.get("architecture", {}).get("name")
    for name, value in expected.items():
        if found.get(name) != value:
            raise ValueError(f"{path} has {name} {found.get(name)}, not {value}: give its own weights")
    return found


def read_json(path: Path, remedy: str) -> Any:
    """Return the content of a JSON file, or raise ValueError with its line, and with what to do, where it is broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}, line {getattr(error, 'lineno', 1)} is broken ({error}): {remedy}") from error


def command(arguments: list[str]) -> str:
    """Return this script's command line, as a shell takes it, without the names of folders outside the project."""

    def general(argument: str) -> str:
        option, equals, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
        if os.sep not in value and value not in (".", "..") and not value.startswith("~"):
            return argument
        path = Path(os.path.realpath(os.path.expanduser(value)))  # pathlib would raise where there is no such place
        return option + equals + (path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else "PATH")

    return shlex.join(["python", f"experiments/{Path(sys.argv[0]).name}", *map(general, arguments)])


def commit() -> str:
    """Return the project's commit, with a plus sign when its code has changed since; "unknown" outside its repository.

    A repository further up, or another project's, is not asked.
    """

    here = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}  # a hook names another

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=ROOT, env=here, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    library = Path(unravelling.__file__).resolve().parent
    try:
        if not library.is_relative_to(ROOT) or Path(git("rev-parse", "--show-toplevel")).resolve() != ROOT:
            return "unknown"
        changed = git("status", "--porcelain", "--", "experiments", str(library))
        return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def hardware(device: str) -> str:
    """Return the processor's kind, the number of threads, and the GPU where the work was done on one."""
    gpu = f", {torch.cuda.get_device_name(device)}" if device.startswith("cuda") else ""
    return f"{platform.machine()}, {torch.get_num_threads()} threads{gpu}"


def _device(name: str) -> str:
    """Return a device that can be used; for "auto" a GPU that no other process of this project uses, if there is one.

    Where all of them are in use, that is the first.
    """
    if name != "auto":
        check_device(name)
        return name
    for number in range(torch.cuda.device_count()):
        lock = FileLock(Path(tempfile.gettempdir(), f"unravelling-{os.getuid()}-gpu{number}.lock"))
        with contextlib.suppress(Timeout):
            lock.acquire(timeout=0)
            _held.append(lock)
            return f"cuda:{number}"
    return "cuda:0" if torch.cuda.is_available() else "cpu"
