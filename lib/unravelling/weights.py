"""Trained networks as safetensors files whose header says what they are."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import torch

from .chain import FLAG, Chain, check_chain, check_kind
from .data import check_path, read_tensors, write_tensors
from .nets import build
from .stored import data_folder

FORMAT = "unravelling/1"

OWN = ("architecture", "checksum", "dtype", "format", "versions")
"""Entries of a header that `save` writes itself."""


def save(chain: Chain, path: str | Path, *, half: bool = False, **header: Any) -> Path:
    """Write the chain's parameters and buffers, with a header that `load` can rebuild it from.

    Args:
        chain: a network made by `unravelling.nets`, without lesions.
        path: of the ``.safetensors`` file; written beside it and renamed.
        half: store matrices and kernels in half the bytes, float16; biases, scales and statistics stay as they are.
        header: what else to record, such as recipe, seed and errors; any JSON values.

    Raises:
        ValueError: the chain is no intact one of `unravelling.nets`, or ``header`` has an entry that is written anyway.
        OSError: the file could not be written; an earlier one is kept.
    """
    check_chain(chain)
    check_kind(*FLAG, half=half)
    path = check_path(path=path)
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: expected a file that ends with .safetensors")
    if taken := sorted(header.keys() & set(OWN)):
        raise ValueError(f"the header's entry {taken[0]!r} is written by save itself: choose another name")
    if chain.config is None or any(unit.is_changed or unit.is_deleted for unit in chain.units):
        raise ValueError("only an intact network made by unravelling.nets can be rebuilt from a file: save that one")
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in chain.state_dict().items()}
    floating = next((tensor.dtype for tensor in state.values() if tensor.is_floating_point()), torch.float32)
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    header |= {"format": FORMAT, "architecture": chain.config, "versions": versions}
    header["dtype"] = str(floating).removeprefix("torch.")
    if half:
        state = {name: tensor.half() if tensor.dim() > 1 else tensor for name, tensor in state.items()}
        if over := [name for name, tensor in state.items() if tensor.is_floating_point() and tensor.isinf().any()]:
            raise ValueError(f"{over[0]} is too large for float16: save it without half=True")
        header["half"] = True
    write_tensors(path, state, header)
    return path


def header(name: str | Path) -> dict[str, Any]:
    """Return the header of a weights file: architecture, versions, checksum, and what else `save` was given."""
    return _read(_locate(name))[0]


def load(name: str | Path) -> Chain:
    """Return a trained network in eval mode.

    Args:
        name: of a shipped network, such as ``"digits/resnet110-seed0"``, or the path of a ``.safetensors`` file.

    Raises:
        FileNotFoundError: there is no such file; the message lists those that there are.
        ValueError: the file is damaged, was not written by `save`, or does not fit its own architecture.
    """
    path = _locate(name)
    head, tensors = _read(path)
    try:
        config = dict(head["architecture"])
        dtype = getattr(torch, head.get("dtype", "float32"))
        chain = build(config.pop("name"), **config).to(dtype)
        for name, tensor in tensors.items():  # a copy, since what is read lies in the file
            tensors[name] = tensor.to(dtype if head.get("half") and tensor.dim() > 1 else tensor.dtype, copy=True)
        chain.load_state_dict(tensors, assign=True)
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path} does not fit the architecture in its header: {error}") from error
    return chain.to(memory_format=torch.channels_last).eval()


def _locate(name: str | Path) -> Path:
    path = check_path(name=name)
    if path.suffix == ".safetensors":
        if path.is_file():
            return path
        raise FileNotFoundError(f"no weights at {path}")
    shipped = data_folder() / "weights"
    path = shipped / f"{name}.safetensors"
    if not path.is_file():
        there = sorted(p.relative_to(shipped).with_suffix("").as_posix() for p in shipped.rglob("*.safetensors"))
        raise FileNotFoundError(f"no weights named {str(name)!r}: there are {', '.join(there) or 'none'}")
    return path


def _read(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    head, tensors = read_tensors(path)
    if head.get("format") != FORMAT:
        reason = f"its header lacks a checksum, or format {FORMAT!r}"
        raise ValueError(f"{path} was not written by unravelling.save, or is damaged: {reason}")
    return head, tensors
