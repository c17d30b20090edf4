"""One function for each kind of figure: a table goes in, the Axes come out. Nothing is read, computed or said here.

Needs the optional matplotlib and seaborn. Figures are 5 inches wide with no type below 10 points, to be read on a
telephone, on a white background, to be read in dark mode. Functions draw on ``ax``, or on new axes when it is None.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import product
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from matplotlib.path import Path
from matplotlib.ticker import MaxNLocator

from .chain import FLAG, check_kind, check_number
from .stats import check_table, seed_band
from .stored import intact_error
from .wording import about, network_label

WIDTH = 5.0  # inches
_BLUE, _ORANGE, _GREEN, _, _, _, _, _GREY, *_ = sns.color_palette("colorblind")
DELETIONS = "unravelling.lesion.delete_each"
FAMILIES = {"resnet": _BLUE, "plain": _ORANGE, "vgg": _GREEN}


def use_style() -> None:
    """Set matplotlib's defaults for the book's figures."""
    sns.set_theme(context="notebook", style="ticks", palette="colorblind")
    plt.rcParams.update({"figure.figsize": (WIDTH, 3.8), "figure.dpi": 144, "figure.constrained_layout.use": True})
    plt.rcParams.update({"axes.labelsize": 11.5, "axes.titlesize": 12, "figure.labelsize": 11.5})
    plt.rcParams.update({"legend.handlelength": 1.6, "legend.handletextpad": 0.6, "legend.columnspacing": 1.2})
    plt.rcParams.update(dict.fromkeys(("font.size", "xtick.labelsize", "ytick.labelsize", "legend.fontsize"), 11))
    plt.rcParams.update(dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon"), False))
    plt.rcParams.update(dict.fromkeys(("figure.facecolor", "savefig.facecolor"), "white"))


def family_color(network: str) -> tuple[float, float, float]:
    """Return the colour that a network's family has in every figure."""
    return next((color for family, color in FAMILIES.items() if network.startswith(family)), _GREY)


def _axes(ax: Axes | None, height: float | None = None, x: pd.Series | None = None) -> Axes:
    ax = ax or plt.subplots(figsize=None if height is None else (WIDTH, height))[1]
    if x is not None and pd.api.types.is_integer_dtype(x) and ax.get_xscale() == "linear":
        ax.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True))  # no ticks between units
    return ax


def _band(ax: Axes, lines: pd.DataFrame, color: Any, alpha: float) -> None:
    """Fill the space between the first and the last column."""
    ax.fill_between(lines.index, lines.iloc[:, 0], lines.iloc[:, -1], color=color, alpha=alpha, lw=0)


def seed_lines(
    table: pd.DataFrame, x: str, value: str, *, ax: Axes | None = None, scale: float = 1, log: bool = False,
    **style: Any,
) -> Axes:
    """Draw the mean of ``value`` over seeds against ``x``, with its 95 % Student t band.

    Args:
        table: one row for each seed and ``x``.
        x, value: columns of the horizontal axis and of what is averaged.
        scale: factor on the values, such as 100 for per cent.
        log: average the logarithms, which gives the geometric mean, on a logarithmic axis; zeros are left out.
        style: passed to ``Axes.plot``, such as ``label`` and ``color``.
    """
    check_kind(*FLAG, log=log)
    check_table(table, [x, value], least=0)
    ax = _axes(ax, x=table[x])
    if log:
        table = table[table[value] > 0].assign(**{value: lambda t: np.log(t[value])})
        ax.set_yscale("log")
    band = seed_band(table, x, value).sort_values(x).set_index(x)[["low", "mean", "high"]]
    band = scale * (np.exp(band) if log else band)
    (line,) = ax.plot(band["mean"], **style)
    _band(ax, band, line.get_color(), 0.25)
    return ax


def levels(ax: Axes, *, intact: float | None = None, chance: float | None = None, color: object = _BLUE) -> Axes:
    """Draw the errors, in per cent, of the intact network as a dashed and of guessing as a dotted line."""
    for error, style in ((intact, {"color": color, "ls": "--"}), (chance, {"color": "0.4", "ls": ":"})):
        if error is not None:
            ax.axhline(100 * error, lw=1, zorder=1, **style)
    return ax


def not_measured(ax: Axes) -> Axes:
    """Say in an empty panel that there is nothing to draw yet."""
    ax.text(0.5, 0.5, "not measured yet", transform=ax.transAxes, ha="center", va="center", color="0.3")
    ax.tick_params(bottom=False, labelbottom=False)
    return ax


def side_by_side(
    draw: Callable[[pd.DataFrame, Axes], object], tables: Mapping[str, pd.DataFrame], *, rows: Sequence[str] = (),
    height: float = 3.6, legend: int = 0,
) -> Figure:
    """Draw a quantity for several data sets, a column each, under images, recipe and seeds; or say that there is none.

    Args:
        draw: draws a table on the axes that it is given.
        tables: of `unravelling.stored.both`.
        rows: networks that get a row of panels each; all in one row when empty.
        height: of a row, in inches.
        legend: columns of one legend for all panels, above them; none when 0.
    """
    shape = (max(len(rows), 1), len(tables))
    fig, axes = plt.subplots(*shape, figsize=(WIDTH, height * shape[0]), squeeze=False, sharey=True)
    for (line, network), (column, (dataset, table)) in product(enumerate(rows or [""]), enumerate(tables.items())):
        check_table(table, ["network"] if network else [], "unravelling.stored.both", least=0)
        ax = axes[line, column]
        chosen = table[table["network"] == network] if network else table
        draw(chosen, ax) if len(chosen) else not_measured(ax)
        title = about(dataset, chosen).replace(", ", "\n", 1)
        ax.set_title(f"{network_label(network)}\n{title}" if network else title, loc="left", fontsize=10.5)
        if column:
            ax.set_ylabel("")
    if len(labels := {ax.get_xlabel() for ax in axes.flat} - {""}) == 1:  # said once, where each would not fit
        fig.supxlabel(labels.pop())
        for ax in axes.flat:
            ax.set_xlabel("")
    if legend:
        found = filter(any, (ax.get_legend_handles_labels() for ax in axes.flat))
        fig.legend(*next(found, ([], [])), loc="outside upper center", ncols=legend)
    return fig


def single_deletions(
    table: pd.DataFrame, *, value: str = "error", chance: float | None = None, ax: Axes | None = None, color: Any = None
) -> Axes:
    """Draw what each single deletion does, as figure 3 of Veit et al. (2016), with intervals.

    Transition units are hollow diamonds, and beside errors there are the `levels`.

    Args:
        table: of `unravelling.lesion.delete_each`; where it has several seeds, their mean and range are drawn.
        value: what to draw: ``"error"``, ``"delta_error"`` or ``"delta_loss"``.
        chance: as in `levels`.
        color: of the points; that of the network's family when None.
    """
    labels = {"error": "test error (%)", "delta_error": "Δ error (points)", "delta_loss": "Δ loss (nats)"}
    if value not in labels:
        raise ValueError(f"value is {value!r:.80}: expected one of {', '.join(labels)}")
    check_table(table, ["unit", "stage", "is_transition", value, f"{value}_low", f"{value}_high"], DELETIONS)
    ax = _axes(ax, x=table["unit"])
    color = color or (family_color(table["network"].iloc[0]) if "network" in table else _BLUE)
    scale = 1 if value.endswith("loss") else 100
    rows = table.rename(columns={value: "middle", f"{value}_low": "low", f"{value}_high": "high"})
    if "seed" in table and table["seed"].nunique() > 1:
        seeds = table.groupby(["unit", "is_transition"], as_index=False)[value]
        rows = seeds.agg(middle="mean", low="min", high="max")
    ax.vlines(rows["unit"], scale * rows["low"], scale * rows["high"], color=color, alpha=0.5, lw=2)
    for transition, style in ((False, {"marker": "o", "mfc": color, "ms": 4}), (True, {"marker": "D", "mfc": "white"})):
        some = rows[rows["is_transition"] == transition]
        ax.plot(some["unit"], scale * some["middle"], color=color, ls="", clip_on=False, zorder=3, **style)
    levels(ax, intact=intact_error(table) if value == "error" else None, chance=chance, color=color)
    stage_boundaries(ax, table)
    ax.set(xlabel="deleted unit", ylabel=labels[value])
    if value == "error":
        ax.set_ylim(0, 100)
    return ax


def quantile_fan(
    table: pd.DataFrame, x: str, value: str, *, ax: Axes | None = None, scale: float = 1, color: Any = _BLUE,
    label: str = "",
) -> Axes:
    """Draw the median of ``value`` against ``x``, with the middle 50 % and 90 % of the rows as bands.

    Args:
        table: one row for each draw.
        x, value, scale: as in `seed_lines`.
        color: of line and bands.
        label: for the legend.
    """
    check_table(table, [x, value])
    ax = _axes(ax, x=table[x])
    q = scale * table.groupby(x)[value].quantile([0.05, 0.25, 0.5, 0.75, 0.95]).unstack()
    _band(ax, q, color, 0.15)
    _band(ax, q[[0.25, 0.75]], color, 0.3)
    ax.plot(q.index, q[0.5], "o-", color=color, ms=4, label=label)
    return ax


def stage_boundaries(ax: Axes, table: pd.DataFrame) -> Axes:
    """Mark with thin vertical lines where the stages of a table of `unravelling.lesion.delete_each` begin."""
    check_table(table, ["unit", "stage"], DELETIONS)
    for unit in table.groupby("stage")["unit"].min().to_numpy()[1:]:
        ax.axvline(unit - 0.5, color="0.8", lw=1, zorder=0)
    ax.set_xlim(-1, np.max(table["unit"]) + 1)
    return ax


def chain_diagram(n: int = 3, *, off: Iterable[int] = (), residual: bool = True, ax: Axes | None = None) -> Axes:
    """Draw a chain of n units with its skips, after figure 1 of Veit et al. (2016).

    Args:
        n: number of units, numbered from 1 as in the paper's equations.
        off: units whose branch is switched off; without skips nothing passes them.
        residual: whether there are skips.
    """
    check_kind(*FLAG, residual=residual)
    ax, off = _axes(ax, 1.6), _those_off(n, off)
    middle: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 13}
    ax.text(-0.15, 0, "$y_0$", **middle | {"ha": "right"})
    cut = False  # in a plain chain nothing arrives behind the first unit that is off
    for i in range(1, n + 1):
        left = 2 * (i - 1)
        dead = cut or i in off
        cut = dead and not residual
        _arrow(ax, (left, 0), (left + 0.5, 0), dead)
        _box(ax, (left + 0.85, 0), f"$f_{i}$", dead)
        if residual:
            ax.plot([left, left + 0.2], [0, 0], color="black", lw=1.3)
            a, b, top, r = left + 0.2, left + 1.72, 0.62, 0.15  # up, across with rounded corners, and down to the sum
            line = [(a, 0), (a, top - r), (a, top), (a + r, top), (b - r, top), (b, top), (b, top - r), (b, 0.17)]
            codes = [Path.MOVETO, Path.LINETO, *[Path.CURVE3] * 2, Path.LINETO, *[Path.CURVE3] * 2, Path.LINETO]
            style: dict[str, Any] = {"arrowstyle": "-|>", "mutation_scale": 11, "color": _BLUE, "lw": 2}
            ax.add_patch(FancyArrowPatch(path=Path(line, codes), **style))
            _arrow(ax, (left + 1.2, 0), (b - 0.14, 0), dead)
            ax.text(b, 0, "+", bbox={"boxstyle": "circle,pad=0.12", "fc": "white", "ec": "black", "lw": 1.2}, **middle)
        out = [left + (1.86 if residual else 1.18), left + 2]
        ax.plot(out, [0, 0], color="0.75" if cut else "black", ls=":" if cut else "-", lw=1.3)
        ax.text(left + 1.95, -0.42, f"$y_{i}$", **middle)
    _arrow(ax, (2 * n, 0), (2 * n + 0.3, 0), cut)
    ax.set(xlim=(-0.6, 2 * n + 0.4), ylim=(-0.6, 0.75), aspect="equal")
    ax.axis("off")
    return ax


def unravelled_diagram(n: int = 3, *, off: Iterable[int] = (), ax: Axes | None = None) -> Axes:
    """Draw the 2^n paths of a residual chain, one a row, after figure 1 of Veit et al. (2016).

    Args:
        n: number of units, at most 5.
        off: units whose branch is switched off; the paths through them are drawn dead.
    """
    if check_number(1, n=n) > 5:
        raise ValueError(f"{2**n} paths do not fit on a page: draw at most 5 units, not {n}")
    ax, off = _axes(ax, 0.42 * 2**n + 0.3), _those_off(n, off)
    paths = sorted(product((0, 1), repeat=n), key=lambda bits: (sum(bits), bits[::-1]))
    for row, bits in enumerate(paths):
        y, taken = -0.62 * row, [i for i in range(1, n + 1) if bits[i - 1]]
        dead = not off.isdisjoint(taken)
        _arrow(ax, (0, y), (2 * n + 0.1, y), dead)
        for i in taken:
            _box(ax, (2 * i - 1, y), f"$f_{i}$", dead, height=0.44)
        ax.text(2 * n + 0.3, y, f"length {len(taken)}", va="center", fontsize=11, color="0.45" if dead else "black")
    ax.text(-0.15, -0.31 * (len(paths) - 1), "input", ha="right", va="center", fontsize=12)
    ax.set(xlim=(-1.2, 2 * n + 2), ylim=(-0.62 * len(paths) + 0.2, 0.4))
    ax.axis("off")
    return ax


def _those_off(n: int, off: Iterable[int]) -> set[int]:
    check_kind(Iterable, "several units, such as [2]", off=off)
    units = {check_number(1, off=unit) for unit in off}
    if missing := units - {*range(1, check_number(1, n=n) + 1)}:
        raise ValueError(f"off holds {max(missing)}: the units of this diagram are 1 to {n}")
    return units


def _arrow(ax: Axes, start: tuple[float, float], end: tuple[float, float], dead: bool) -> None:
    style: dict[str, Any] = {"arrowstyle": "-|>", "mutation_scale": 10, "shrinkA": 0, "shrinkB": 0, "lw": 1.3}
    ax.add_patch(FancyArrowPatch(start, end, color="0.75" if dead else "black", ls=":" if dead else "-", **style))


def _box(ax: Axes, center: tuple[float, float], text: str, dead: bool, height: float = 0.6) -> None:
    style: dict[str, Any] = {"fc": "0.95", "ec": "0.75", "ls": ":"} if dead else {"fc": (*_ORANGE, 0.35), "ec": _ORANGE}
    for layer in [style | {"lw": 1.5, "zorder": 3}, *[{"fc": "white", "lw": 0}] * (not dead)]:
        corner = (center[0] - 0.3, center[1] - height / 2)
        ax.add_patch(FancyBboxPatch(corner, 0.6, height, boxstyle="round,pad=0.03", **layer))
    ax.text(*center, text, ha="center", va="center", fontsize=13, color="0.45" if dead else "black", zorder=4)
