"""Several processes that train or measure one network together, as ``torchrun`` starts them.

Every process runs the same program. ``fit`` and what measures a ``Split`` give each process its share of the
images and hand all of them the whole result; without `processes`, or with one process, nothing here does anything.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, distributed
from torch.nn.functional import batch_norm
from torch.overrides import TorchFunctionMode

from .data import Split

T = TypeVar("T")


def world() -> int:
    """Return how many processes work together; 1 outside of `processes`."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def rank() -> int:
    """Return the number of this process, from 0."""
    return distributed.get_rank() if world() > 1 else 0


@contextmanager
def processes(device: str = "auto") -> Iterator[str]:
    """Join the processes that torchrun started, and yield the device of this one; without torchrun, resolve ``auto``.

    GPUs talk over nccl, process i of a machine on ``cuda:i``; CPUs over gloo. Only the first process prints.

    Args:
        device: ``"cpu"``, ``"cuda"``, ``"auto"``, or, without torchrun, any other such as ``"cuda:1"``.

    Raises:
        ValueError: the machine has fewer GPUs than processes, or a process asks for a certain GPU.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield device
        return
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device {device}: torchrun gives each process a GPU of its own; choose cuda or cpu")
    if device == "cuda":
        local, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if local >= gpus:
            raise ValueError(f"process {local} of this machine finds {gpus} GPUs: use torchrun --nproc-per-node {gpus}")
        device = f"cuda:{local}"
        torch.cuda.set_device(local)
    if world() > 1:  # within another such block; a group cannot be joined twice
        yield device
        return
    distributed.init_process_group("gloo" if device == "cpu" else "nccl")
    try:
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere if rank() else sys.stdout):
            yield device
    finally:
        distributed.destroy_process_group()


def first(function: Callable[[], T]) -> T:
    """Call a function in the first process only, and return its result, or raise its error, in every one.

    For what must happen once, such as writing a file, and for decisions that must not differ, such as those of a clock.
    It starts when all processes have come here, and they go on when it is done.
    """
    if world() == 1:
        return function()
    distributed.barrier()
    outcome: list[Any] = [None, None]
    if rank() == 0:
        try:
            outcome[0] = function()
        except Exception as error:  # or the others would wait for ever
            outcome[1] = error
    distributed.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def gather(value: T) -> list[T]:
    """Return the values of all processes, in order, in each of them; they are pickled on the way."""
    values = [value] * world()
    if world() > 1:
        distributed.all_gather_object(values, value)
    return values


def total(tensor: Tensor) -> Tensor:
    """Return the sum of all processes' tensors; its gradient is the sum of all processes' gradients."""
    return _Total.apply(tensor) if world() > 1 else tensor


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        tensor = tensor.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(tensor)
        return tensor

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _Total.apply(gradient)


def share(split: Split) -> Split:
    """Return the run of a split's images that this process is to work on; all of them where it is alone."""
    return split.take(torch.arange(len(split)).tensor_split(world())[rank()]) if world() > 1 else split


def sharded(function: Callable[..., tuple[np.ndarray, np.ndarray]]) -> Callable[..., tuple[np.ndarray, np.ndarray]]:
    """Let each process compute its `share` of a split, and give all of them the whole, in the order of the images.

    Args:
        function: of a chain, a split or batches, and variants, like `unravelling.lesion.variant_logits`. Batches, which
            need not have a length, are computed by every process.
    """

    @functools.wraps(function)
    def shared(chain: Any, data: Any, *arguments: Any, **options: Any) -> tuple[np.ndarray, np.ndarray]:
        if world() == 1 or not isinstance(data, Split):
            return function(chain, data, *arguments, **options)
        logits, labels = zip(*gather(function(chain, share(data), *arguments, **options)), strict=True)
        return np.concatenate(logits, 1), np.concatenate(labels)

    return shared


class SyncedBatchNorm(TorchFunctionMode):
    """While active, batch norm in training mode takes its moments over the batches of all processes together.

    PyTorch's own SyncBatchNorm does so on GPUs only, and replaces the modules; here they stay as they are.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call ``func``, or for batch norm what takes its place."""
        return (_synced_batch_norm if func is batch_norm else func)(*args, **(kwargs or {}))


def _synced_batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if not training:
        return batch_norm(x, running_mean, running_var, weight, bias, False, momentum, eps)
    y = x.to(torch.promote_types(x.dtype, torch.float32))
    reduced, shape = [0, *range(2, x.dim())], (1, -1, *[1] * (x.dim() - 2))
    sums = total(torch.cat([y.sum(reduced), y.new_tensor([y.numel() / y.shape[1]])]))
    mean, count = sums[:-1] / sums[-1], sums[-1].detach()
    y = y - mean.view(shape)
    var = total(y.square().sum(reduced)) / count  # of what is centred already: a difference of squares cancels
    with torch.no_grad():
        if running_mean is not None and running_var is not None:
            running_mean.lerp_(mean, momentum)
            running_var.lerp_(var * count / (count - 1), momentum)
    scale = (var + eps).rsqrt() if weight is None else (var + eps).rsqrt() * weight
    y = y * scale.view(shape)
    return (y if bias is None else y + bias.view(shape)).to(x.dtype)
