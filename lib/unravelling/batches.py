"""What a batch may be, and how it reaches a network: device, type, labels and mode."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves

from .chain import FLAG, check_kind
from .data import Dataset, Split

Batches = Iterable[Any]
"""Batches of inputs, pairs ``(x, y)`` of inputs and labels, as a ``DataLoader`` gives them, or dicts with ``labels``.

Inputs are normalised images ``(B, C, H, W)`` with labels ``(B,)``, or tokens ``(B, T)`` with labels ``(B, T)``, of
which -100 are ignored; whatever the chain takes. A single batch will do.
"""

LABELS = ("labels", "label")
"""Entries of a dict that are labels, not inputs."""

IGNORED = -100
"""The label of a token that counts for nothing, as in `torch.nn.functional.cross_entropy`."""

NOTHING = f"every label is {IGNORED}, which counts for nothing: nothing is left to score"


def device_of(module: nn.Module) -> torch.device:
    """Return the device of a module's parameters; the CPU where it has none."""
    return next((p.device for p in module.parameters()), torch.device("cpu"))


def move(x: Any, module: nn.Module) -> Any:
    """Bring the tensors in an input to a module's device, and floating ones to the type of its parameters.

    Args:
        x: a tensor or an array, or some in a dict, a list or a tuple, named or not. Other things stay as they are.
        module: the network; without floating parameters, it leaves the type as it is.
    """
    if isinstance(x, Mapping):
        return {name: move(value, module) for name, value in x.items()}
    if isinstance(x, (tuple, list)):
        values = [move(value, module) for value in x]
        return type(x)(*values) if hasattr(x, "_fields") else type(x)(values)
    if isinstance(x, np.ndarray):
        x = torch.from_numpy(x.astype(x.dtype.newbyteorder("="), order="C"))  # torch knows no other layouts
    if not isinstance(x, Tensor):
        return x
    x = x.clone() if x.is_inference() and not torch.is_inference_mode_enabled() else x  # so that gradients can flow
    dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), x.dtype)
    x = x.to(dtype) if x.is_floating_point() else x  # first, since a device may lack the old type
    return x.to(device_of(module))


def can_stack(chain: nn.Module, images: int, y: Any) -> bool:
    """Return whether several states like ``y`` can make up one batch: images come first in them and do not mix."""
    if not isinstance(y, Tensor) or y.dim() not in (2, 4) or len(y) != images:  # sequences may come first instead
        return False
    mixing = any(isinstance(part, _BatchNorm) and part.running_mean is None for part in chain.modules())
    return not mixing and not any(hasattr(part, "context") for part in chain.modules())  # which the stem left


def check_labels(logits: Tensor, labels: Any) -> None:
    """Raise TypeError or ValueError unless labels ``(…)`` are classes for logits ``(…, K)``, or -100."""
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.is_complex():
        kind = f"has the type {labels.dtype}" if isinstance(labels, Tensor) else f"is a {type(labels).__name__}"
        raise TypeError(f"y, the labels, {kind}: expected a tensor of classes, such as y.long()")
    if not labels.dim() or labels.shape != logits.shape[:-1]:
        shapes = f"{tuple(labels.shape)} beside logits of shape {tuple(logits.shape)}"
        raise ValueError(f"y, the labels, have shape {shapes}: expected one label for each image or token")
    labels = labels.long()  # in eight bits -100 is 156
    foreign = labels[(labels != IGNORED) & ((labels < 0) | (labels >= logits.shape[-1]))]
    if len(foreign):
        raise ValueError(f"there is a label {foreign[0]}: expected 0 to {logits.shape[-1] - 1}, or -100 to ignore it")


def class_last(logits: Tensor, labels: Any) -> Tensor:
    """Return logits ``(…, K)``: the classes of segmentation, ``(B, K, H, W)`` for labels ``(B, H, W)``, are moved."""
    moved = isinstance(labels, Tensor) and labels.dim() > 2 and logits.shape[:1] + logits.shape[2:] == labels.shape
    return logits.movedim(1, -1) if moved else logits


def scores(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return what is wrong, the cross-entropy (nats) and which labels count, each ``(…)``, of logits ``(…, K)``.

    A label of -100 is neither wrong nor a loss. Raises what `check_labels` does.
    """
    check_labels(logits, labels)
    labels = labels.long()
    kept = labels != IGNORED
    losses = logits.logsumexp(-1) - logits.gather(-1, torch.where(kept, labels, 0)[..., None])[..., 0]
    return (logits.argmax(-1) != labels) & kept, torch.where(kept, losses, 0), kept


@contextmanager
def named_failure(x: Any, what: str = "the network cannot take x, inputs") -> Iterator[None]:
    """Say in a ``with`` block what cannot be done with ``x``, tensors of some shape (ValueError): torch says less."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, ValueError, LookupError, ArithmeticError, AssertionError, AttributeError) as error:
        tensors = (leaf for leaf in tree_leaves(x) if isinstance(leaf, Tensor))
        shapes = ", ".join(f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')}" for t in tensors)
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(f"{what} of shape {shapes or '()'}: {reason}") from error


def inputs_and_labels(chain: nn.Module, batch: Any, *, labels: bool = True) -> tuple[Any, Any]:
    """Return inputs and labels of a batch, on the chain's device.

    Args:
        chain: the network. Where its stem has ``shift_labels``, since it was made from a model for causal language
            modelling, the labels in a dict are the tokens themselves, shifted by one, as by the model's own loss.
        batch: a pair of inputs and labels, or a dict of inputs with ``labels`` or ``label``.
        labels: whether there must be labels; without, None stands for them, and inputs may come alone.

    Raises:
        TypeError, ValueError: a dict has no labels, or something else is no pair; or inputs are no tensors, none, not
            as many as the labels, or hold NaN.
    """
    check_kind(*FLAG, labels=labels)
    several, x, y = isinstance(batch, (tuple, list)), batch, None
    if isinstance(batch, Mapping):
        x = {key: value for key, value in batch.items() if key not in LABELS}
        y = next((batch[name] for name in LABELS if name in batch), None)
        if labels and y is None:
            raise ValueError(f"the batch has {', '.join(map(str, batch))}, but no labels: put them under 'labels'")
    elif labels and not (several and len(batch) == 2):
        kind = type(batch).__name__ + (f" of {len(batch)}" if several else "")
        raise ValueError(f"a batch is a {kind}: expected a pair of inputs and labels, or a dict with 'labels'")
    elif several and batch:
        x, y = batch[0], batch[-1]
    check_kind(nn.Module, "a network, an nn.Module", chain=chain)
    if device_of(chain).type == "meta":
        raise ValueError("the network's weights are on the device meta, where they have no values: load them first")
    try:
        x, y = move((x, y if labels else None), chain)
    except (TypeError, NotImplementedError) as error:
        raise TypeError(f"x, the inputs, or y, the labels, cannot be brought to the network: {error}") from error
    tensors = [leaf for leaf in tree_leaves(x) if isinstance(leaf, Tensor)]
    lengths = [len(part) for part in (x, y) if isinstance(part, Tensor) and part.dim()]
    if not tensors and (isinstance(x, (Split, Dataset)) or not hasattr(x, "to")):
        kind = type(x).__name__
        raise TypeError(f"x, the inputs, is a {kind} without a tensor: expected a batch, such as images (B, C, H, W)")
    if 0 in lengths:
        raise ValueError("a batch holds no images: leave it out")
    if any(tensor.isnan().any() for tensor in tensors if tensor.is_floating_point()):
        raise ValueError("x, the inputs, hold NaN: leave such images out, or look for a division by zero before")
    if len(set(lengths)) > 1:
        raise ValueError(f"there are {lengths[0]} inputs, but {lengths[1]} labels: expected one y for each x")
    shift = isinstance(batch, Mapping) and getattr(getattr(chain, "stem", None), "shift_labels", False)
    if shift and isinstance(y, Tensor) and y.dim() == 2:
        y = torch.cat([y[:, 1:], torch.full_like(y[:, :1], IGNORED)], 1)
    return x, y


def iterate(chain: nn.Module, data: Split | Batches, *, labels: bool = True) -> Iterator[tuple[Any, Any]]:
    """Yield inputs and labels of every batch, on the chain's device and in its type.

    Args:
        chain: the network.
        data: a split, cut into batches of 500; a loader or a list of batches; or one, a pair (tuple or list) or a dict.
        labels: as in `inputs_and_labels`.

    Raises:
        TypeError: ``data`` is no source of batches, such as a `~unravelling.data.Dataset`.
        ValueError: there is no batch, one is empty, or it lacks its labels.
    """
    array = (Tensor, np.ndarray)
    if isinstance(data, Split):
        data = data.batches(device=device_of(chain))
    elif isinstance(data, (Mapping, *array)) or (
        isinstance(data, (tuple, list)) and len(data) == 2 and any(isinstance(part, array) for part in data)
        and not (isinstance(data[1], Tensor) and data[1].dim() > 3 and data[1].is_floating_point())  # batches of images
    ):
        data = [data]
    if isinstance(data, Dataset) or not isinstance(data, Iterable):
        instead = "one of its splits, such as data.test" if isinstance(data, Dataset) else "a split, or batches"
        raise TypeError(f"a {type(data).__name__} holds no batches: pass {instead}")
    empty = True
    for batch in data:
        yield inputs_and_labels(chain, batch, labels=labels)
        empty = False
    if empty:
        raise ValueError("there are no batches: an iterator can be used only once, so pass a list or a loader")


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Put a module into eval mode for the duration of a ``with`` block, then give each part its own mode back."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training
