"""Intervals: for a share of images, for a paired difference, and over seeds."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from .chain import check_kind, check_number


def _numbers(name: str, values: object) -> np.ndarray:
    """Return an array of numbers, or raise TypeError for anything else."""
    try:
        array = np.asarray(values)
        array = array.astype(float) if array.dtype == object and array.ndim else array  # as columns of mixed origin are
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} is no array of numbers: {error}") from error
    if array.dtype.kind not in "biuf":
        raise TypeError(f"{name} is {values!r:.80}: expected numbers")
    return array


def wilson(count: np.ndarray | int, images: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the Wilson interval of a share, such as an error.

    Args:
        count: images counted, such as the wrong ones; a number or an array of any shape.
        images: images in all.

    Returns:
        The lower and upper ends as fractions, in the shape of ``count``.

    Raises TypeError or ValueError where a count is no whole number from 0 to ``images``, or an argument makes no sense.
    """
    from scipy.special import ndtri  # imported when needed, as everywhere: scipy doubles the time of the import

    count = _numbers("count", count)
    if _numbers("images", images).ndim or not 1 <= images < np.inf or (np.rint(count).clip(0, images) != count).any():
        raise ValueError(f"counts must be whole numbers, not shares, between 0 and {images} images")
    share, z = count / images, ndtri(0.975)
    middle = (share + z**2 / (2 * images)) / (1 + z**2 / images)
    half = z / (1 + z**2 / images) * np.sqrt(share * (1 - share) / images + z**2 / (4 * images**2))
    return np.clip(middle - half, 0, share), np.clip(middle + half, share, 1)


def error_difference(first: float, second: float, images: int) -> tuple[float, float]:
    """Return the interval of ``second - first``, two errors on test images, as if they were independent.

    Newcombe's hybrid score interval (Statistics in Medicine 17, 1998, 873–890, method 10), made of the two Wilson
    intervals, so that two errors of 0 leave room for a difference. Networks tested on the same images err on the same
    hard ones, which makes it too wide rather than too narrow.

    Args:
        first, second: error of one network and of the other, as fractions; a ValueError outside 0 to 1.
        images: how many each was tested on.
    """
    given = {"first": first, "second": second, "images": images}
    if any(_numbers(name, value).size != 1 for name, value in given.items()):
        raise ValueError("first, second and images must be one number each")
    (low, low_2), (high, high_2) = wilson(np.rint(np.array([first, second]) * images), images)
    below, above = np.hypot(second - low_2, high - first), np.hypot(high_2 - second, first - low)
    return float(second - first - below), float(second - first + above)


def paired_bootstrap(difference: np.ndarray, resamples: int = 1000, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return the percentile bootstrap interval of the mean of paired differences, resampling images.

    Where no image changed at all the interval is the single point 0; `wilson` then says how rare a change may still be.

    Args:
        difference: one value an image, ``(…, images)``; the same resamples serve all rows.
        resamples: how many.
        seed: of the resamples.

    Raises TypeError or ValueError where there is no value, or an argument is of the wrong kind or size.
    """
    difference = _numbers("difference", difference)
    check_number(1, resamples=resamples)
    random = np.random.default_rng(check_number(seed=seed))
    if not difference.ndim or not difference.shape[-1]:
        raise ValueError(f"difference has shape {difference.shape}: expected at least one value, (…, images)")
    images = difference.shape[-1]
    weights = random.multinomial(images, np.full(images, 1 / images), resamples) / images
    low, high = np.quantile(difference @ weights.T, [0.025, 0.975], axis=-1)
    return low, high


def check_table(table: Any, columns: Sequence[Any], source: str = "", *, least: int = 1) -> None:
    """Raise TypeError or ValueError unless a table has some columns, and rows, of which there are ``least``.

    The message names what is missing, what there is, and the function that such tables come from, the ``source``.
    """
    check_kind(pd.DataFrame, "a DataFrame", table=table)
    hint = f". Take one of {source}" if source else ""
    if missing := [name for name in columns if not isinstance(name, Hashable) or name not in table.columns]:
        names, there = ", ".join(f"{name!r:.80}" for name in missing), ", ".join(map(str, table)) or "none"
        raise ValueError(f"there is no column {names} in the table: it has {there}{hint}")
    if len(table) < least:
        raise ValueError(f"the table has no rows: expected at least one{hint}")


def seed_band(table: pd.DataFrame, by: str | Sequence[str], value: str) -> pd.DataFrame:
    """Return mean and Student t interval of ``value`` over the rows of each group, which are taken to be the seeds.

    Args:
        table: one row for each seed and group.
        by: column or columns that define the groups.
        value: column to average.

    Returns:
        The columns of ``by``, then ``mean``, ``seeds`` (no missing values), ``low`` and ``high``, NaN for one seed.

    Raises TypeError or ValueError where the table lacks a column, or ``value`` holds no numbers.
    """
    from scipy.stats import t

    columns = [by] if isinstance(by, str) else list(by) if isinstance(by, Sequence) else []
    if not columns:
        raise TypeError(f"by is {by!r:.80}: expected a column or several")
    check_table(table, [*columns, value], least=0)
    _numbers(f"the column {value}", table[value])
    groups = table.groupby(columns, sort=False, dropna=False)[value]
    band = groups.agg(mean="mean", std="std", seeds="count").reset_index()
    half = t.ppf(0.975, np.maximum(band["seeds"] - 1, 1)) * band["std"] / np.sqrt(band["seeds"])
    band["low"], band["high"] = band["mean"] - half, band["mean"] + half
    return band.drop(columns="std")
