"""How an arm is measured: interleaved rounds, unit evaluations, and the bytes of live tensors."""

from __future__ import annotations

import itertools
import statistics
import time
import weakref
from collections.abc import Callable
from typing import Any

import pandas as pd
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from unravelling import Chain

Arms = dict[str, Callable[[], Any]]
"""What is compared, by name: the library's way is the first, and the baseline that ratios refer to the second."""


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors made in a ``with`` block that are alive at the same time; ``peak`` is their maximum.

    What one operation allocates for itself and frees again is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = function(*args, **(kwargs or {}))
        before, after = ([x for x in tree_leaves(values) if isinstance(x, torch.Tensor)] for values in (args, out))
        given = {x.untyped_storage()._cdata for x in before}
        for storage in (x.untyped_storage() for x in after):
            if storage._cdata not in self.known | given:
                self.known.add(storage._cdata)
                self.alive += storage.nbytes()
                weakref.finalize(storage, self.forget, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.alive)
        return out

    def forget(self, key: int, size: int) -> None:
        """Take off a storage that is gone."""
        self.known.discard(key)
        self.alive -= size


def branch_evaluations(chain: Chain, arm: Callable[[], Any]) -> int:
    """Return how many images went through a branch, over all branches, while ``arm`` ran."""
    images = 0

    def seen(module: Any, inputs: tuple[torch.Tensor, ...], output: Any) -> None:
        nonlocal images
        images += len(inputs[0])

    handles = [unit.branch.register_forward_hook(seen) for unit in chain.units if unit.branch is not None]
    try:
        arm()
    finally:
        for handle in handles:
            handle.remove()
    return images


def compare(
    work: str, setting: str, arms: Arms, rounds: int, *, chain: Chain | None = None, memory: bool = True
) -> pd.DataFrame:
    """Time the arms in turn, round after round, after one unmeasured round.

    Args:
        work: what is done, and ``setting``: on which network and input; both are columns.
        arms: what is compared; the second is the baseline.
        rounds: how often each of them runs.
        chain: whose branch evaluations are counted, in a run of its own; None where that means nothing.
        memory: whether a further run of each arm counts live bytes.

    Returns:
        One row an arm: ``work``, ``setting``, ``arm``, ``minimum`` and ``median`` (seconds), ``ratio`` (the baseline's
        median over the arm's: above 1 is faster), ``branch_evaluations`` (images), ``peak_bytes``, ``rounds``.
    """
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for lap, (name, arm) in itertools.product(range(rounds + 1), arms.items()):
        start = time.perf_counter()
        arm()
        if lap:
            seconds[name].append(time.perf_counter() - start)
    baseline = statistics.median(seconds[list(arms)[min(1, len(arms) - 1)]])
    rows = []
    for name, arm in arms.items():
        median = statistics.median(seconds[name])
        row = {"work": work, "setting": setting, "arm": name, "minimum": min(seconds[name]), "median": median}
        row |= {"ratio": baseline / median, "rounds": rounds}
        if chain is not None:
            row["branch_evaluations"] = branch_evaluations(chain, arm)
        if memory:
            with LiveBytes() as live:
                arm()
            row["peak_bytes"] = live.peak
        rows.append(row)
    return pd.DataFrame(rows)
