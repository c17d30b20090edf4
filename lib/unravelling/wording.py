"""Numbers in sentences: what stored tables and measurements say, in Markdown. Every function returns text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd

from .chain import FLAG, check_kind
from .chain import listed as members
from .stats import check_table, seed_band, wilson
from .stored import DEFAULT_RECIPES, IN_PROSE, KEYS, intact_error, stored

PAPER = "`make paper`"
"""The command that makes the results on CIFAR-10."""


def network_label(network: str) -> str:
    """Return a network's name as prose writes it, such as ResNet-110 for ``"resnet110"``."""
    for family in ("ResNet", "plain", "VGG"):
        if network.startswith(family.lower()):
            depth, _, variant = network[len(family) :].partition("-")
            known = {"nobn": "without batch norm", "post": "of 2015", "joint6": "times six, as one"}
            known["stem"] = "with batch norm in the stem"
            return f"{family}-{depth} {known.get(variant, variant)}".strip()
    return network


def listed(items: Iterable[object], nothing: str = "none") -> str:
    """Return items as prose lists them: "a, b and c"."""
    *most, last = map(str, items) if (items := list(items)) else [nothing]
    return f"{', '.join(most)} and {last}" if most else last


def seeds(table: pd.DataFrame) -> str:
    """Return how many runs stand behind each network and recipe of a table: ``"seed 0"``, ``"1 to 3 seeds"``."""
    check_table(table, ["seed"], "unravelling.stored.stored")
    if table["seed"].nunique() == 1:
        return f"seed {int(table['seed'].iloc[0])}"
    check_table(table, KEYS[1:], "unravelling.stored.stored")
    runs = table.groupby(["network", "recipe"])["seed"].nunique()
    return span(runs, "d", unit=" seed" if runs.max() == 1 else " seeds")


def about(dataset: str, table: pd.DataFrame) -> str:
    """Return which images a table is about, and by what recipe and from how many seeds its networks were trained."""
    images = IN_PROSE.get(dataset, dataset).removeprefix("the ")
    check_table(table, [] if getattr(table, "empty", False) else KEYS[1:], "unravelling.stored.stored", least=0)
    return images if table.empty else f"{images}, recipe {listed(sorted(table['recipe'].unique()))}, {seeds(table)}"


def label(dataset: str, recipe: str = "default") -> str:
    """Return what all networks of a data set and recipe are: `about` of the stored table ``networks``."""
    recipe = DEFAULT_RECIPES[dataset] if recipe == "default" else recipe
    table = stored(f"{dataset}/networks", recipe=recipe)
    return about(dataset, table) + ("" if len(table) else f", recipe {recipe}, no network yet")


def pending(tables: Mapping[str, pd.DataFrame], *networks: str) -> str:
    """Return a sentence that names the networks which tables of `unravelling.stored.both` lack, and the command."""
    sentences = []
    for dataset, table in tables.items():
        check_table(table, ["network"], "unravelling.stored.both", least=0)
        if gaps := ", ".join(network_label(name) for name in networks if name not in set(table["network"])):
            where = f"{IN_PROSE[dataset]}, recipe {DEFAULT_RECIPES[dataset]}"
            sentences.append(f"Not measured yet on {where}: {gaps}; {PAPER} does that.")
    return " ".join(sentences)


def one_seed(table: pd.DataFrame) -> str:
    """Return the sentence that says why numbers lack an interval over seeds, once a paragraph; nothing if none does."""
    check_table(table, KEYS[1:], "unravelling.stored.stored")
    runs = table.groupby(["network", "recipe"])["seed"].nunique()
    if runs.min() > 1:
        return ""
    return "One seed: no interval over seeds." if runs.max() == 1 else "Where no interval is given, there is one seed."


def _facts(table: pd.DataFrame) -> str:
    """Return the intact error and the number of images of a table, in brackets, where it has them."""
    single = "delta_error" in table and table["network"].nunique() == 1
    facts = [f"{percent(intact_error(table))} intact"] if single else []
    facts += [f"{table['images'].max():,.0f} images"] if "images" in table else []
    return f" ({', '.join(facts)})" if facts else ""


def paragraphs(tables: Mapping[str, pd.DataFrame], say: Callable[[pd.DataFrame], str], *networks: str) -> str:
    """Return a paragraph for each data set that has rows, then what is `pending`.

    Each opens with `about` in bold, the intact error and the number of images if there are any; ends with `one_seed`.

    Args:
        tables: of `unravelling.stored.both`.
        say: gets a table, returns its sentences.
        networks: that the paragraphs want.
    """
    texts = [f"**{about(dataset, table)}**{_facts(table)}: {say(table)} {one_seed(table)}".strip()
             for dataset, table in tables.items() if len(table)]
    return "\n\n".join([*texts, pending(tables, *networks)]).strip()


def side_by_side(tables: Mapping[str, pd.DataFrame], say: Callable[[pd.DataFrame], dict[str, str]],
                 *networks: str) -> str:
    """Return a table with a line for each quantity and a column for each data set that has rows; then as `paragraphs`.

    Args:
        tables: of `unravelling.stored.both`.
        say: gets a table, returns what it says of each quantity.
        networks: that the table wants.
    """
    columns = {about(dataset, table) + _facts(table): say(table) for dataset, table in tables.items() if len(table)}
    quantities = dict.fromkeys(name for column in columns.values() for name in column)
    lines = [["", *columns], [":--", *["--:"] * len(columns)]]
    lines += [[name, *(column.get(name, "–") for column in columns.values())] for name in quantities]
    remarks = dict.fromkeys(one_seed(table) for table in tables.values() if len(table))
    rows = "\n".join(f"| {' | '.join(line)} |" for line in lines if columns)
    return "\n\n".join(text for text in (rows, *remarks, pending(tables, *networks)) if text)


def mean_interval(values: Any) -> tuple[float, float, float]:
    """Return the mean of some values and its 95 % Student t interval, whose ends are NaN for a single value."""
    table = pd.DataFrame({"all": 0, "value": members(values=np.atleast_1d(np.asarray(values, float)))})
    return tuple(seed_band(table, "all", "value").iloc[0][["mean", "low", "high"]])


def _mean(values: Any, form: str, unit: str, name: str = "", ends: tuple[float, float] = (-np.inf, np.inf)) -> str:
    """Return a mean with its unit and, of several values, the interval, as far as it lies between two ends."""
    mean, *interval = mean_interval(values)
    low, high = (number(end, form) for end in np.clip(interval, *ends))
    return f"{number(mean, form)}{unit}" + (f" ({name}{low} to {high})" if np.size(values) > 1 else "")


def over_seeds(values: Any, *, scale: float = 100, unit: str = " %", digits: int = 1) -> str:
    """Return a mean in words, times ``scale``, with its 95 % Student t interval where there are several seeds."""
    name = f"95 % interval over {np.sum(pd.notna(values))} seeds "
    return _mean(scale * np.asarray(values), f".{digits}f", unit, name)


def percent(values: Any, digits: int = 1) -> str:
    """Return a fraction in per cent; for several, their mean and 95 % Student t interval, cut off at 0 and 100 %."""
    return _mean(100 * np.asarray(values), f".{digits}f", " %", ends=(0, 100))


def points(values: Any, digits: int = 1, sign: str = "") -> str:
    """Return a difference of shares in percentage points, with ``sign="+"`` always signed; several as in `percent`."""
    return _mean(100 * np.asarray(values), f"{sign}.{digits}f", " points")


def span(values: Any, form: str = ".1f", *, scale: float = 1, unit: str = "") -> str:
    """Return the least and the greatest value, times ``scale``, or the one that there is: "1.2 to 3.4 %"."""
    values = members(values=np.atleast_1d(values))
    low, high = (number(scale * end, form) for end in (np.min(values), np.max(values)))
    return (low if low == high else f"{low} to {high}") + unit


def number(value: float, form: str = ".1f") -> str:
    """Return a number with a true minus sign, and none before a zero."""
    value = float(f"{value:.12g}") if isinstance(value, float) else value  # 8.65 may come as 8.649999999999999
    text = format(value, form)
    return text.replace("-", "−") if any(digit in text for digit in "123456789n") else text.replace("-", "")


def rounded(value: float) -> str:
    """Return a number by its two leading digits, with commas between thousands."""
    return f"{float(f'{value:.2g}'):,.0f}" if abs(value) >= 10 else number(value, ".2g")


def share(count: float, images: float, *, of: str = "") -> str:
    """Return a share of images with its 95 % Wilson interval: "1.4 % (…)", or "1.4 % of 500 test images (…)"."""
    if not np.isclose(count, np.rint(count), rtol=1e-5):  # of an error, six digits are stored
        raise ValueError(f"count is {count}: expected a number of images, not a share of them")
    low, high = wilson(round(count), int(images))
    many = f" of {images:,.0f} {of}" if of else ""
    return f"{number(100 * count / images)} %{many} (95 % Wilson interval {100 * low:.1f} to {100 * high:.1f})"


def error(table: pd.DataFrame, split: str = "test", *, brief: bool = False) -> str:
    """Return the error of one network over its seeds, or with Wilson's interval over images when there is one seed.

    Args:
        table: rows of the stored table ``networks``, one for each seed.
        split: of the images: ``"train"``, ``"validation"`` or ``"test"``.
        brief: give the interval alone, for a text that says which intervals these are.
    """
    check_kind(*FLAG, brief=brief)
    check_table(table, ["seed", f"{split}_error", f"{split}_images"], "unravelling.stored.stored")
    if table["seed"].duplicated().any():
        raise ValueError("several rows of the table have one seed: choose those of one network and recipe")
    errors, images = table[f"{split}_error"], table[f"{split}_images"].iloc[0]
    of = "" if brief else f"{'training' if split == 'train' else split} images"
    if len(table) == 1:
        text = share(errors.iloc[0] * images, images, of=of)
        return text.replace("95 % Wilson interval ", "") if brief else text
    return percent(errors) if brief else f"{over_seeds(errors)} of {images:,} {of}"
