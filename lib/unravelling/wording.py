"""Numbers in sentences: what stored tables and measurements say, in Markdown. Every function returns text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd

from .stats import seed_band, wilson
from .stored import DEFAULT_RECIPES, data_label, intact_error, stored

PAPER = "`make paper`"
"""The command that makes the results on CIFAR-10."""


def network_label(network: str) -> str:
    """Return a network's name as prose writes it, such as ResNet-110 for ``"resnet110"``."""
    family = next((name for name in ("ResNet", "plain", "VGG") if network.startswith(name.lower())), None)
    if family is None:
        return network
    depth, _, variant = network[len(family) :].partition("-")
    return f"{family}-{depth} { {'nobn': 'without batch norm', 'post': 'of 2015'}.get(variant, variant)}".strip()


def listed(items: Iterable[object], nothing: str = "none") -> str:
    """Return items as prose lists them: "a, b and c"."""
    *most, last = map(str, items) if (items := list(items)) else [nothing]
    return f"{', '.join(most)} and {last}" if most else last


def seeds(table: pd.DataFrame) -> str:
    """Return how many training runs stand behind the rows of each network, such as ``"seed 0"`` or ``"1 to 3 seeds"``.

    Args:
        table: of one data set, with the columns ``network``, ``recipe`` and ``seed``, not empty.
    """
    if table["seed"].nunique() == 1:
        return f"seed {int(table['seed'].iloc[0])}"
    runs = table.groupby(["network", "recipe"])["seed"].nunique()
    return span(runs, "d", unit=" seed" if runs.max() == 1 else " seeds")


def about(dataset: str, table: pd.DataFrame) -> str:
    """Return which images a table is about, and by what recipe and from how many seeds its networks were trained."""
    if table.empty:
        return {"cifar10": "CIFAR-10"}.get(dataset, dataset)
    recipes = sorted(table["recipe"].unique())
    copies = sorted({data_label(dataset, recipe=recipe) for recipe in recipes})
    return f"{listed(copies)}, recipe {listed(recipes)}, {seeds(table)}"


def label(dataset: str, recipe: str = "default") -> str:
    """Return what all networks of a data set and recipe are: `about` of the stored table ``networks``."""
    recipe = DEFAULT_RECIPES[dataset] if recipe == "default" else recipe
    table = stored(f"{dataset}/networks", recipe=recipe)
    return about(dataset, table) if len(table) else f"{about(dataset, table)}, recipe {recipe}, no network yet"


def pending(tables: Mapping[str, pd.DataFrame], *networks: str) -> str:
    """Return a sentence that names the networks which a data set lacks and the command for them, or nothing.

    Args:
        tables: of `unravelling.stored.both`.
        networks: that a figure wants.
    """
    sentences = []
    for dataset, table in tables.items():
        if gaps := [network_label(name) for name in networks if name not in set(table["network"])]:
            name = {"cifar10": "CIFAR-10"}.get(dataset, f"the {dataset}")
            sentences.append(f"Not measured yet on {name}: {', '.join(gaps)}; {PAPER} does that.")
    return " ".join(sentences)


def one_seed(table: pd.DataFrame) -> str:
    """Return the sentence that says why numbers lack an interval over seeds, once a paragraph; nothing if none does."""
    runs = table.groupby(["network", "recipe"])["seed"].nunique()
    if runs.min() > 1:
        return ""
    return "One seed: no interval over seeds." if runs.max() == 1 else "Where no interval is given, there is one seed."


def paragraphs(tables: Mapping[str, pd.DataFrame], say: Callable[[pd.DataFrame], str], *networks: str) -> str:
    """Return a paragraph for each data set that has rows, then what is `pending`.

    Each opens with `about` in bold, the intact error and the number of images where the table tells them, and ends
    with `one_seed`.

    Args:
        tables: of `unravelling.stored.both`.
        say: gets a table, returns its sentences.
        networks: that the paragraphs want.
    """
    texts = []
    for dataset, table in tables.items():
        if len(table):
            single = "delta_error" in table and table["network"].nunique() == 1
            facts = [f"{percent(intact_error(table))} intact"] if single else []
            facts += [f"{table['images'].max():,.0f} images"] if "images" in table else []
            opening = f"**{about(dataset, table)}**" + (f" ({', '.join(facts)})" if facts else "")
            texts.append(f"{opening}: {say(table)} {one_seed(table)}".strip())
    return "\n\n".join([*texts, pending(tables, *networks)]).strip()


def mean_interval(values: Any) -> tuple[float, float, float]:
    """Return the mean of some values and its 95 % Student t interval, whose ends are NaN for a single value."""
    table = pd.DataFrame({"all": 0, "value": np.atleast_1d(np.asarray(values, float))})
    return tuple(seed_band(table, "all", "value").iloc[0][["mean", "low", "high"]])


def over_seeds(values: Any, *, scale: float = 100, unit: str = " %", digits: int = 1) -> str:
    """Return a mean in words, with its 95 % Student t interval where there are several seeds.

    Args:
        values: one for each seed.
        scale: factor on the values, such as 100 for per cent.
        unit: what follows the numbers.
        digits: behind the decimal point.
    """
    mean, low, high = (number(scale * end, f".{digits}f") for end in mean_interval(values))
    many = np.size(values)
    return f"{mean}{unit}" + (f" (95 % interval over {many} seeds {low} to {high})" if many > 1 else "")


def percent(values: Any, digits: int = 1) -> str:
    """Return a share in per cent; for several, their mean and 95 % Student t interval, cut off at 0 and 100 %.

    Args:
        values: fractions, one or several.
        digits: behind the decimal point.
    """
    mean, *ends = (100 * end for end in mean_interval(values))
    low, high = (number(end, f".{digits}f") for end in np.clip(ends, 0, 100))
    return f"{number(mean, f'.{digits}f')} %" + (f" ({low} to {high})" if np.size(values) > 1 else "")


def points(values: Any, digits: int = 1, sign: str = "") -> str:
    """Return a difference of shares in percentage points, with ``sign="+"`` always signed; several as in `percent`."""
    mean, low, high = (number(100 * end, f"{sign}.{digits}f") for end in mean_interval(values))
    return f"{mean} points" + (f" ({low} to {high})" if np.size(values) > 1 else "")


def span(values: Any, form: str = ".1f", *, scale: float = 1, unit: str = "") -> str:
    """Return the least and the greatest value in words, or the one that there is: "1.2 to 3.4 %".

    Args:
        values: not empty.
        form: of each number, as ``format`` takes it.
        scale: factor on the values.
        unit: what follows the numbers.
    """
    low, high = (number(scale * end, form) for end in (np.min(values), np.max(values)))
    return (low if low == high else f"{low} to {high}") + unit


def number(value: float, form: str = ".1f") -> str:
    """Return a number with a true minus sign, and none before a zero."""
    text = format(value, form)
    return text.replace("-", "−") if any(digit in text for digit in "123456789n") else text.replace("-", "")


def rounded(value: float) -> str:
    """Return a number by its two leading digits, with commas between thousands."""
    return f"{float(f'{value:.2g}'):,.0f}" if abs(value) >= 10 else number(value, ".2g")


def share(count: float, images: float, *, of: str = "") -> str:
    """Return a share of images in words with its 95 % Wilson interval, "1.4 % of 500 test images (…)".

    Args:
        count: images counted, such as the wrong ones.
        images: in all.
        of: what kind of images they are, such as ``"test images"``; their number is left out when empty.
    """
    low, high = wilson(round(count), int(images))
    many = f" of {images:,.0f} {of}" if of else ""
    return f"{100 * count / images:.1f} %{many} (95 % Wilson interval {100 * low:.1f} to {100 * high:.1f})"


def error(table: pd.DataFrame, split: str = "test") -> str:
    """Return the error of one network over its seeds, or with Wilson's interval over images when there is one seed.

    Args:
        table: rows of the stored table ``networks``, one for each seed.
        split: of the images: ``"train"``, ``"validation"`` or ``"test"``.
    """
    errors, images = table[f"{split}_error"], table[f"{split}_images"].iloc[0]
    if len(table) == 1:
        return share(errors.iloc[0] * images, images, of=f"{split} images")
    return f"{over_seeds(errors)} of {images:,} {split} images"
