"""Figures that answer back: HTML with its data, script and style inside, so that it works wherever outputs are shown.

The static figures beside them show the same on paper, without a script, and in a notebook that is not trusted yet.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from IPython.display import HTML
from judging import learned
from unravelling.data import digits
from unravelling.stored import both, intact_error
from unravelling.wording import network_label

STATIC = Path(__file__).resolve().parent / "_static"
LIMIT = 150_000
"""The most bytes of data that one figure may hold."""

FALLBACK = "This interactive figure needs JavaScript. The figures around it show the same results."

CODES = "".join(chr(c) for c in range(ord("0"), ord("z") + 1) if chr(c).isalnum())
"""One character a unit, so that a draw of thirty units takes thirty bytes."""

DATASETS = {"digits": ("Digits", "digits"), "cifar10": ("CIFAR-10", "CIFAR-10")}


def figure(name: str, data: Any, label: str, hint: str) -> HTML:
    """Return a figure of ``_static/interactive.js`` as HTML that needs nothing else.

    Args:
        name: of the figure, as in ``_static/interactive-<name>.js``.
        data: what the script reads, made of what JSON knows.
        label: what a screen reader calls the figure.
        hint: what there is to do, in one sentence above the figure.

    Raises:
        ValueError: the data are larger than `LIMIT`, or hold a number that JSON lacks.
    """
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    # Inside a script element only "<" can end it or open a comment, and in JSON it occurs in strings alone.
    text = text.replace("<", "\\u003c")
    if len(text.encode()) > LIMIT:
        raise ValueError(f"{name} has {len(text.encode()):,} bytes of data, at most {LIMIT:,} are wanted: show less")
    files = "interactive.css", "interactive.js", f"interactive-{name}.js"
    style, shared, own = ((STATIC / file).read_text(encoding="utf-8") for file in files)
    return HTML(
        f'<div class="unravelling" data-figure="{name}" role="group" aria-label="{label}" '
        f'data-hint="{escape(hint)}">\n<p class="unravelling-fallback">{FALLBACK}</p>\n'
        f'<script type="application/json">{text}</script>\n</div>\n'
        f"<style>\n{style}</style>\n"
        f'<script>\n(() => {{\n"use strict";\n{shared}{own}}})();\n</script>'
    )


def lesion_bench() -> HTML:
    """Return the strip of blocks that shows what each deletion costs, from the stored results of both data sets.

    The first mode deletes one unit: mean and range of the error over the trainings, or the 95 % Wilson interval where
    there is one. The second steps through stored draws of several units, each with its error before and after batch
    norm collected new statistics (Veit et al., 2016, sections 4.1 and 4.2), beside that of the intact network, before
    and after. Trainings that failed are left out.
    """
    datasets, singles, draws, wholes = [], both("delete_each"), both("delete_reestimated"), both("intact")
    for dataset, (label, text) in DATASETS.items():
        tried = singles[dataset].groupby("network")["seed"].nunique()
        networks = [
            {
                "name": name,
                "label": _bench_label(name, rows["seed"].nunique(), tried[name]),
                "seeds": int(rows["seed"].nunique()),
                "intact": _thousandths(intact_error(rows)),
                "units": _units(rows),
                "draws": _draws(draws[dataset].query("network == @name"), wholes[dataset].query("network == @name")),
            }
            for name, rows in (learned(singles[dataset]) if len(tried) else singles[dataset]).groupby("network")
        ]
        # ResNet-110 first: it is the network that the book is about
        networks.sort(key=lambda network: (network["name"] != "resnet110", network["label"]))
        if networks:
            datasets.append({"label": label, "text": text, "networks": networks})
    return figure(
        "lesion_bench",
        {"datasets": datasets, "codes": CODES, "chance": 0.9},
        "Lesion bench",
        "Delete one unit (point, tap or use the arrow keys), or draw several and give the network new statistics.",
    )


def unravelled_network(n: int = 3) -> HTML:
    """Return a chain of up to six blocks whose branches can be switched off, with its formula and all its paths.

    What is left of the paths of each length is counted. Forward and gradient have a formula each, the expansion of
    equation (5) and the product of ``1 + J`` (Veit et al., 2016, section 3), and only the second is a sum over paths.

    Args:
        n: blocks at first, from 1 to 6.

    Raises:
        ValueError: there are fewer or more.
    """
    if not 1 <= n <= 6:
        raise ValueError(f"{n} blocks: expected 1 to 6, for every block doubles the paths that are listed")
    return figure(
        "unravelled_network",
        {"n": n, "most": 6},
        "Unravelled network",
        "Switch branches off, in the drawing or by the buttons: which paths are left?",
    )


def path_lengths() -> HTML:
    """Return the count of paths by length, what one path carries, and their product, for any depth and any decay.

    The exact spectrum of the stored networks in training, the mean over seeds of the shares of the gradient, can be
    laid over the product. The shaded lengths are those that the paper calls effective (Veit et al., 2016, section 4.4).
    """
    exact = []
    for dataset, (label, text) in DATASETS.items():
        rows = both("spectrum_training")[dataset].query("network == 'resnet110'")
        if len(rows):
            mean = rows.groupby(["epoch", "length"])["share"].mean().unstack()
            stops = [[int(epoch), [float(f"{share:.4g}") for share in shares]] for epoch, shares in mean.iterrows()]
            seeds = int(rows["seed"].nunique())
            exact.append({"label": label, "text": text, "seeds": seeds, "n": mean.shape[1] - 1, "stops": stops})
    return figure(
        "path_lengths",
        {"n": 54, "decay": 0.26, "band": [5, 17], "exact": exact},
        "Path lengths",
        "Move depth and decay: which lengths are many, and which carry something?",
    )


def reordering() -> HTML:
    """Return a strip of blocks to move within their stages, beside the errors of the stored orders.

    An order is shown with Kendall's τ, overall and within stages (Veit et al., 2016, section 4.3). The stored orders
    that lie nearest to it are found by τ, for the table does not say which units moved.
    """
    networks = []
    for dataset, (_, text) in DATASETS.items():
        orders = both("reorder")[dataset]
        for name, rows in orders.groupby("network"):
            kinds = both("delete_each")[dataset].query("network == @name").drop_duplicates("unit").sort_values("unit")
            pairs = rows[["tau", "error"]].to_numpy()
            networks.append(
                {
                    "label": f"{network_label(name)} on {text}",
                    "stages": [0 if row.is_transition else int(row.stage) for row in kinds.itertuples()],
                    "intact": round(1000 * intact_error(rows), 2),
                    "orders": [[float(tau), round(1000 * float(error), 2)] for tau, error in pairs],
                }
            )
    networks.sort(key=lambda network: "ResNet-110" not in str(network["label"]))
    return figure(
        "reordering",
        {"networks": networks},
        "Reordering",
        "Choose a unit and move it: drag it, or use the buttons.",
    )


def damage_map(seed: int = 0, reestimated: tuple[Sequence[int], np.ndarray] | None = None) -> HTML:
    """Return the damage of every deletion in a stored ResNet-110 to every test digit, with the digits themselves.

    Shown are loss and margin, the log odds of the true class, with and without the unit. The margin is what is stored
    in the page, in steps of 1/500, and the loss follows from it; so is the re-estimated damage.

    Args:
        seed: of the network.
        reestimated: some units, and what the deletion of each takes from the margin of each test image, ``(N, units)``,
            when batch norm is re-estimated before and after; the switch for it is left out when None.

    Raises:
        ValueError: there are no rows of this seed, their labels are not those of the test digits, or the re-estimated
            damage has another shape.
    """
    rows = both("damage")["digits"].query("network == 'resnet110' and seed == @seed")
    if rows.empty:
        raise ValueError(f"no damage of a ResNet-110 of seed {seed} is stored: choose one of digits/damage.csv")
    data, step = digits(), 1 / 500
    test, pixels = data.test, data.test.images.numpy().astype(float)
    if rows["label"].tolist() != test.labels.tolist():
        raise ValueError("digits/damage is not about the test digits, or not in their order: measure it again")
    losses = rows.filter(regex=r"^unit\d+$").dropna(axis=1).to_numpy()  # what each deletion adds
    intact = rows["loss"].to_numpy()[:, None]
    losses = np.maximum(np.concatenate([intact, intact + losses], axis=1), 1e-9)
    margins = -(losses + np.log(-np.expm1(-losses)))  # log odds, for large losses as well
    content: dict[str, Any] = {
        "network": f"ResNet-110, seed {seed}",
        "units": margins.shape[1] - 1,
        "step": step,
        "labels": test.labels.tolist(),
        "classes": list(data.classes),
        "side": test.images.shape[-1],
        "margins": _packed(margins, step),
        "pixels": base64.b64encode(np.rint(255 * pixels / pixels.max()).astype("u1").tobytes()).decode(),
    }
    if reestimated is not None:
        units, damage = list(map(int, reestimated[0])), np.asarray(reestimated[1])
        if damage.shape != (len(test), len(units)):
            raise ValueError(f"re-estimated damage of shape {damage.shape}: expected {(len(test), len(units))}")
        content["reestimated"] = {"units": units, "damage": _packed(damage, step)}
    return figure(
        "damage_map",
        content,
        "Damage map",
        "Point at a cell, or move by the arrow keys: what does this image lose without this unit?",
    )


def _packed(values: np.ndarray, step: float) -> str:
    """Return numbers as multiples of a step, two bytes each, in base 64: a third of what they take as text."""
    steps = np.rint(values / step)
    if not (np.abs(steps) < 2**15).all():
        raise ValueError(f"values of up to {np.abs(values).max():.4g} do not fit into two bytes: take larger steps")
    return base64.b64encode(steps.astype("<i2").tobytes()).decode()


def _bench_label(name: str, runs: int, tried: int) -> str:
    """Return a network's label, with the number of trainings that learned the task where some did not."""
    return network_label(name) + (f" ({runs} of {tried} trainings)" if runs < tried else "")


def _thousandths(error: float) -> int:
    """Return an error in thousandths of a per cent: whole numbers are shorter."""
    return round(100_000 * float(error))


def _units(rows: pd.DataFrame) -> list[list[int]]:
    """Return for each unit its error, the ends of its interval, its stage, and whether it is a transition."""
    several = rows["seed"].nunique() > 1
    units = []
    for _, unit in rows.groupby("unit"):
        errors, first = unit["error"], unit.iloc[0]
        ends = (errors.min(), errors.max()) if several else (first["error_low"], first["error_high"])
        numbers = [_thousandths(value) for value in (errors.mean(), *ends)]
        units.append([*numbers, int(first["stage"]), int(first["is_transition"])])
    return units


def _draws(rows: pd.DataFrame, whole: pd.DataFrame) -> list[list[Any]]:
    """Return each draw as number, seed, codes of the deleted units, error before and after, and intact error likewise.

    The draws may be on fewer images than the intact network with new statistics, of which the change is taken
    therefore. Where that is not stored, the last number is left out.
    """
    change = {row.seed: row.reestimated_error - row.error for row in whole.itertuples()}
    draws = []
    for row in rows.sort_values(["k", "seed", "trial"]).itertuples():
        intact = row.error - row.delta_error
        errors = [row.error, row.reestimated_error, intact]
        errors += [intact + change[row.seed]] if row.seed in change else []
        units = "".join(CODES[int(unit)] for unit in str(row.units).split())
        draws.append([int(row.k), int(row.seed), units, *map(_thousandths, errors)])
    return draws
