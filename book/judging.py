"""What the claims page judges with: intervals at the level at which things vary, and one way to an outcome."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import t
from unravelling.stored import DEFAULT_RECIPES, stored
from unravelling.wording import listed, mean_interval, network_label, number

COLUMNS = [
    *("id", "source", "claim", "published", "quantity", "networks", "intact_at_most", "if_missing", "if_above"),
    *("confirms", "contradicts", "open", "resampled", "rule_written", "reading", "if_confirmed", "if_contradicted"),
    *("chapter", "figure", "note"),
]
"""Of the table of claims."""
READINGS = ("reading", "", "confirms", "contradicts")
"""What the column of that name may hold."""
ALWAYS = ["id", "source", "claim", "confirms", "contradicts", "open", "rule_written", "if_confirmed", "if_contradicted"]
MEASURED = ["quantity", "if_missing", "resampled"]
"""Columns that every claim fills in, and those that a claim about networks does, too."""


def read_claims(path: Path) -> pd.DataFrame:
    """Return the table of claims, all of it text, indexed by the claims' ids.

    Raises:
        ValueError: it has other columns than `COLUMNS`, or a row is incomplete, repeats an id or holds HTML; the
            message has the line.
    """
    ids: set[str] = set()
    rows: list[dict[str, str]] = []
    with path.open(encoding="utf-8", newline="") as file:
        lines = csv.reader(file, strict=True)
        try:
            for line in lines:
                row = dict(zip(COLUMNS, line, strict=False))
                empty = [name for name in ALWAYS + MEASURED * bool(row.get("networks")) if not row.get(name)]
                faults = {
                    f"it has {len(line)} cells, not {len(COLUMNS)}": len(line) != len(COLUMNS),
                    f"the columns are not {', '.join(COLUMNS)}": not rows and line != COLUMNS,
                    f"it lacks {', '.join(empty)}": empty,
                    f"the id {row.get('id')} is there already": row.get("id") in ids,
                    "it holds HTML": any(re.search(r"<\s*/?[a-zA-Z!]", cell) for cell in line),
                    f"reading is {row.get('reading')}": row.get("reading") not in (None, *READINGS),
                }
                if wrong := [fault for fault, found in faults.items() if found]:
                    raise ValueError(f"{path}, line {lines.line_num}: {wrong[0]}; mend it")
                ids.add(row["id"])
                rows.append(row)
        except csv.Error as error:
            raise ValueError(f"{path}, line {lines.line_num}: {error}; mend it") from error
    return pd.DataFrame(rows[1:], columns=COLUMNS).set_index("id", drop=False)


class NotMeasured(Exception):
    """The stored results lack what a claim needs; the message names it."""


class Reader:
    """Reads the stored tables of one data set, and counts the networks behind what it has read.

    Attributes:
        networks: the least number of seeds of any network that was read; infinite before the first.
    """

    def __init__(self, dataset: str, load: Callable[..., pd.DataFrame] = stored) -> None:
        self.dataset, self.load, self.networks = dataset, load, math.inf

    def __call__(self, name: str, *networks: str, variant: str = "") -> pd.DataFrame:
        """Return the rows of some networks, trained by the recipe that the book shows or by a variant of it."""
        recipe = f"{DEFAULT_RECIPES[self.dataset]}{variant}"
        try:
            table = self.load(f"{self.dataset}/{name}", recipe=recipe)
            missing = [network for network in networks if network not in set(table["network"])]
        except FileNotFoundError:
            missing = list(networks)
        if missing:
            names = listed(map(network_label, missing))
            raise NotMeasured(f"the table {name} of {names}" + (f", recipe {recipe}" if variant else ""))
        table = table[table["network"].isin(networks)]
        self.networks = min(self.networks, table.groupby("network")["seed"].nunique().min())
        return table


@dataclass(frozen=True)
class Interval:
    """A value and the ends of its 95 % interval; without one the ends are infinite, and nothing is decided."""

    value: float
    low: float = -math.inf
    high: float = math.inf

    def above(self, limit: float) -> bool:
        """Return whether the whole interval is above a limit."""
        return self.low > limit

    def below(self, limit: float) -> bool:
        """Return whether the whole interval is below a limit."""
        return self.high < limit

    def within(self, low: float, high: float) -> bool:
        """Return whether the whole interval lies between two limits."""
        return self.above(low) and self.below(high)

    def clear_of(self, low: float, high: float) -> bool:
        """Return whether the interval and that between two limits have nothing in common."""
        return self.below(low) or self.above(high)


def outcome(confirms: bool, contradicts: bool) -> str:
    """Return what a rule comes to: ``"confirms"``, ``"contradicts"`` or ``"open"``; a rule that says both is wrong."""
    if confirms and contradicts:
        raise ValueError("a rule cannot confirm and contradict at once: mend it")
    return "confirms" if confirms else "contradicts" if contradicts else "open"


def unanimous(answers: Sequence[bool]) -> str:
    """Return the outcome of a question that every network answers by itself: all of them must agree."""
    return outcome(all(answers), not any(answers))


def over_networks(values: Mapping[int, float], own: Mapping[int, tuple[float, float]] | None = None) -> Interval:
    """Return the mean over seeds with its interval: Student's t from three seeds on.

    Args:
        values: one for each seed.
        own: each network's own interval, over images, batches or by a jackknife. With one or two networks the ends are
            the outermost of these, so that a limit is passed only if every network passes it; None if there is none.
    """
    numbers = pd.Series(dict(values), dtype=float)
    if not np.isfinite(numbers).all():
        return Interval(math.nan)
    if len(numbers) >= 3:
        return Interval(*map(float, mean_interval(numbers)))
    if own is None or not np.isfinite([own[seed] for seed in numbers.index]).all():
        return Interval(float(numbers.mean()))
    lows, highs = zip(*(own[seed] for seed in numbers.index), strict=True)
    return Interval(float(numbers.mean()), float(min(lows)), float(max(highs)))


def jackknife(estimate: float, left_out: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % jackknife interval of an estimate, from its values with one unit left out each time."""
    values = np.asarray(left_out, float)
    n = len(values)
    half = t.ppf(0.975, n - 1) * math.sqrt((n - 1) / n * ((values - values.mean()) ** 2).sum())
    return float(estimate - half), float(estimate + half)


def without_each_block(draws: pd.DataFrame) -> list[pd.DataFrame]:
    """Return a table of lesions once for each block, without the draws that delete this block.

    Args:
        draws: of one network, with the column ``units``: the deleted ones as a text, such as ``"3 17"``.
    """
    deleted = draws["units"].astype(str).str.split().map(frozenset)
    return [draws[[block not in units for units in deleted]] for block in sorted(frozenset().union(*deleted), key=int)]


def over_blocks(table: pd.DataFrame, statistic: Callable[[pd.DataFrame], float]) -> Interval:
    """Return a statistic of each network's draws over the networks; one or two have the jackknife over blocks."""
    values = {seed: statistic(draws) for seed, draws in table.groupby("seed")}
    own = None
    if len(values) < 3:
        own = {
            seed: jackknife(values[seed], [statistic(part) for part in without_each_block(draws)])
            for seed, draws in table.groupby("seed")
        }
    return over_networks(values, own)


def curve(table: pd.DataFrame, column: str) -> pd.Series:
    """Return the mean error of one network by the number of deletions or swaps, 0 being the intact network."""
    intact = (table["error"] - table["delta_error"]).mean()
    return pd.concat([pd.Series({0: intact}), table.groupby(column)["error"].mean().sort_index()])


def greatest_share(rises: pd.Series) -> float:
    """Return which part of the whole rise of a curve its steepest stretch holds; NaN if it does not rise."""
    whole = rises.iloc[-1] - rises.iloc[0]
    return float(rises.diff().max() / whole) if whole > 0 else math.nan


def smooth(table: pd.DataFrame, column: str) -> tuple[str, Interval]:
    """Judge whether the error grows smoothly: no fall by more than a point, no half of the rise in one stretch.

    Args:
        table: lesions with ``seed``, ``error``, ``delta_error``; one or two networks need ``units`` for an interval.
        column: that counts the lesions.

    Returns:
        The outcome, and the greatest share of the rise that one stretch holds.
    """
    networks = dict(list(table.groupby("seed")))
    curves = {seed: curve(draws, column) for seed, draws in networks.items()}
    left_out = None
    if len(networks) < 3 and "units" in table:
        left_out = {s: [curve(part, column) for part in without_each_block(draws)] for s, draws in networks.items()}

    def interval(statistic: Callable[[pd.Series], float]) -> Interval:
        values = {seed: statistic(rises) for seed, rises in curves.items()}
        own = left_out and {s: jackknife(values[s], [statistic(part) for part in left_out[s]]) for s in values}
        return over_networks(values, own)

    share = interval(greatest_share)
    steps = [interval(lambda rises, i=i: rises.diff().iloc[i]) for i in range(1, table[column].nunique() + 1)]
    falls = any(step.below(-0.01) for step in steps)
    return outcome(not falls and share.below(0.5), falls or share.above(0.5)), share


def count_times_norm(table: pd.DataFrame, shortest: int, longest: int) -> Interval:
    """Return the share of some lengths in the sum of number of paths times mean norm, the paper's measure.

    One or two networks have an interval over their sampled paths, by the delta method.

    Args:
        table: with ``seed``, ``length``, ``paths``, ``sampled_mean``, ``sampled_std`` and ``sampled``.
        shortest: of the lengths.
        longest: of the lengths.
    """
    values, own = {}, {}
    for seed, part in table[table["sampled_mean"].notna()].groupby("seed"):
        inside = part["length"].between(shortest, longest)
        sums = part["paths"] * part["sampled_mean"]
        variances = (part["paths"] * part["sampled_std"].fillna(0)) ** 2 / part["sampled"]
        share = sums[inside].sum() / sums.sum()
        slope = np.where(inside, 1 - share, -share) / sums.sum()
        half = 1.96 * math.sqrt((slope**2 * variances).sum())
        values[seed], own[seed] = share, (share - half, share + half)
    return over_networks(values, own)


def learned(table: pd.DataFrame, chance: float = 0.9) -> pd.DataFrame:
    """Return the rows of a lesion table whose network, intact, makes fewer than half as many errors as guessing."""
    return table[table["error"] - table["delta_error"] < chance / 2]


PAIRED = {"digits": "resnet110", "cifar10": "resnet56"}
"""Networks that were also trained without batch norm, as ``-nobn``."""


def without_statistics(dataset: str, load: Callable[..., pd.DataFrame] = stored) -> str:
    """Say whether a residual network without batch norm breaks as early as the same one with it, after ten deletions.

    What ten deletions add to the error is compared within seeds, which share their draws: "yes" where the 95 % interval
    of the difference lies above zero, "no" where it lies below. This was written before any such network was measured;
    that only trainings count which `learned` the task, once one of them had failed.
    """
    deep = PAIRED[dataset]
    table = load(f"{dataset}/delete_random").query("k == 10")
    tried = table.loc[table["network"] == f"{deep}-nobn", "seed"].nunique()
    table = 100 * learned(table).pivot_table(index="seed", columns="network", values="delta_error")
    able = table.reindex(columns=[deep, f"{deep}-nobn"]).dropna(subset=[f"{deep}-nobn"])
    added = able.dropna()
    if added.empty:
        return "not measured yet"
    normed, bare = added[deep], added[f"{deep}-nobn"]
    mean, low, high = mean_interval(bare - normed)
    verdict = "yes" if low > 0 else "no" if high < 0 else "not decided"
    interval = f", difference {number(mean)} ({number(low)} to {number(high)})" if len(added) > 1 else ", one seed"
    which = f"the {len(able)} of {tried} trainings that learned the task"
    which += "" if len(added) == len(able) else f", with batch norm trained from the seeds of {len(added)} of them"
    return (f"{verdict}: ten deletions add {number(bare.mean())} points without batch norm and {number(normed.mean())} "
            f"with it{interval}; {network_label(deep)}, {which}")
