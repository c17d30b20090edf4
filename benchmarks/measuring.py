"""How an arm is measured: interleaved rounds, unit evaluations, and the bytes of live tensors."""

from __future__ import annotations

import contextlib
import itertools
import statistics
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
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


@contextlib.contextmanager
def counting(chain: Chain | None) -> Iterator[Counter[str]]:
    """Count under ``images`` how many images go through a branch, over all branches, in a ``with`` block."""
    counted: Counter[str] = Counter()

    def seen(module: Any, inputs: tuple[torch.Tensor, ...], output: Any) -> None:
        counted["images"] += len(inputs[0])

    branches = [unit.branch for unit in chain.units if unit.branch is not None] if chain else []
    handles = [branch.register_forward_hook(seen) for branch in branches]
    try:
        yield counted
    finally:
        for handle in handles:
            handle.remove()


def compare(work: str, setting: str, arms: Arms, rounds: int, *, chain: Chain | None = None) -> pd.DataFrame:
    """Run every arm once to count, then time the arms in turn, round after round.

    Args:
        work: what is done, and ``setting``: on which network and input; both are columns.
        arms: what is compared; the second is the baseline.
        rounds: how often each of them runs.
        chain: whose branch evaluations and live bytes are counted; None where they mean nothing.

    Returns:
        One row an arm: ``work``, ``setting``, ``arm``, ``minimum`` and ``median`` (seconds), ``ratio`` (the baseline's
        median over the arm's: above 1 is faster), ``branch_evaluations`` (images), ``peak_bytes``, ``rounds``.
    """
    rows: dict[str, dict[str, Any]] = {}
    for name, arm in arms.items():
        rows[name] = {"work": work, "setting": setting, "arm": name}
        with counting(chain) as counted, LiveBytes() if chain else contextlib.nullcontext() as live:
            arm()
        if live:
            # none where the arm ran another chain, or none of a branch
            rows[name] |= {"branch_evaluations": counted["images"] or None, "peak_bytes": live.peak}
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for _, (name, arm) in itertools.product(range(rounds), arms.items()):
        start = time.perf_counter()
        arm()
        seconds[name].append(time.perf_counter() - start)
    baseline = statistics.median(seconds[list(arms)[1]])
    for name, row in rows.items():
        median = statistics.median(seconds[name])
        row |= {"minimum": min(seconds[name]), "median": median, "ratio": baseline / median, "rounds": rounds}
    return pd.DataFrame(list(rows.values()))
