"""What the figures draw, read back from their axes."""

from itertools import product

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from scipy import stats
from unravelling import plots


@pytest.fixture(autouse=True)
def closed(tmp_path, monkeypatch):
    """A project without results, since figures read nothing but what titles say of images; and no figure left open."""
    (tmp_path / "data/results").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    yield
    plt.close("all")


def rows(dataset, networks, seeds, recipe):
    keys = [(dataset, name, seed, recipe, unit) for name in networks for seed in range(seeds) for unit in range(4)]
    table = pd.DataFrame(keys, columns=["dataset", "network", "seed", "recipe", "unit"])
    return table.assign(error=0.1 * table["unit"] + 0.2, delta_error=0.1 * table["unit"])


@pytest.fixture
def tables():
    cifar10 = rows("cifar10", ["resnet110"], 1, "short")
    return {"digits": rows("digits", ["resnet110", "plain20"], 3, "digits"), "cifar10": cifar10}


def line(table, ax):
    ax.plot(table["unit"], table["error"], label="some")


def test_side_by_side_draws_what_there_is_and_says_what_there_is_not(tables):
    fig = plots.side_by_side(line, tables, rows=["resnet110", "plain20"])
    drawn = [(len(ax.lines), [text.get_text() for text in ax.texts]) for ax in fig.axes]
    assert drawn == [(1, []), (1, []), (1, []), (0, ["not measured yet"])]
    assert [ax.get_title(loc="left") for ax in fig.axes] == [
        "ResNet-110\ndigits\nrecipe digits, 3 seeds", "ResNet-110\nCIFAR-10\nrecipe short, seed 0",
        "plain-20\ndigits\nrecipe digits, 3 seeds", "plain-20\nCIFAR-10"]
    assert len(fig.axes[0].lines[0].get_xdata()) == 12


@pytest.mark.parametrize("missing", [[], ["digits"], ["digits", "cifar10"]])
def test_one_legend_serves_all_panels(tables, missing):
    for name in missing:
        tables[name] = tables[name].iloc[:0]
    fig = plots.side_by_side(line, tables, legend=2)
    assert [text.get_text() for text in fig.legends[0].get_texts()] == (["some"] if len(missing) < 2 else [])
    assert plots.side_by_side(line, tables).legends == []


def test_what_all_axes_say_is_said_once(tables):
    def labelled(name):
        return lambda table, ax: ax.set(xlabel=name or table["dataset"].iloc[0], ylabel="error (%)")

    fig = plots.side_by_side(labelled("unit"), tables)
    assert [ax.get_xlabel() for ax in fig.axes] == ["", ""]
    assert fig.get_supxlabel() == "unit"
    fig = plots.side_by_side(labelled(""), tables)
    assert [ax.get_xlabel() for ax in fig.axes] == ["digits", "cifar10"]
    assert not fig.get_supxlabel()
    assert [ax.get_ylabel() for ax in fig.axes] == ["error (%)", ""]


@pytest.mark.parametrize(("x", "whole"), [([0, 1, 2], True), ([0.0, 0.5, 1.0], False)])
def test_between_units_there_are_no_ticks(x, whole):
    table = pd.DataFrame({"x": x * 2, "seed": [0] * 3 + [1] * 3, "error": 0.1})
    for ax in (plots.seed_lines(table, "x", "error"), plots.quantile_fan(table, "x", "error")):
        assert all(tick == round(tick) for tick in ax.get_xticks()) is whole
    ax = plt.subplots()[1]
    ax.set_xscale("log")
    plots.seed_lines(table[table["x"] > 0], "x", "error", ax=ax)
    assert isinstance(ax.xaxis.get_major_locator(), matplotlib.ticker.LogLocator)


def test_seed_lines_draw_the_mean_and_its_interval():
    table = pd.DataFrame({"epoch": [0, 0, 0, 1, 1, 1], "error": [0.1, 0.2, 0.4, 0.1, 0.1, 0.1]})
    ax = plots.seed_lines(table, "epoch", "error", scale=100, label="seeds")
    (drawn,) = ax.lines
    np.testing.assert_allclose(drawn.get_ydata(), [100 * 0.7 / 3, 10])
    low, high = stats.t.interval(0.95, 2, 0.7 / 3, stats.sem([0.1, 0.2, 0.4]))
    corners = ax.collections[0].get_paths()[0].vertices
    at_0 = corners[corners[:, 0] == 0, 1]
    np.testing.assert_allclose([at_0.min(), at_0.max()], [100 * low, 100 * high])


def test_seed_lines_of_logarithms_draw_the_geometric_mean_and_leave_out_zeros():
    table = pd.DataFrame({"length": [0, 0, 1, 1, 2], "norm": [1e-9, 1e-3, 4, 1, 0.0]})
    ax = plots.seed_lines(table, "length", "norm", log=True)
    np.testing.assert_allclose(ax.lines[0].get_ydata(), [1e-6, 2])
    assert ax.get_yscale() == "log"
    assert (table["norm"] == [1e-9, 1e-3, 4, 1, 0]).all(), "the caller's table is left alone"


def deletions(**more):
    table = pd.DataFrame({"unit": range(3), "stage": [1, 1, 2], "is_transition": [False, False, True]} | more)
    table["error"], table["delta_error"] = [0.9, 0.2, 0.3], [0.8, 0.1, 0.2]
    return table.assign(error_low=table["error"] - 0.05, error_high=table["error"] + 0.05)


def test_single_deletions_of_one_network_have_its_intervals_and_levels():
    ax = plots.single_deletions(deletions(), chance=0.9)
    points = {tuple(line.get_xydata().ravel().round(6)) for line in ax.lines[:2]}
    assert points == {(0, 90, 1, 20), (2, 30)}
    (bars,) = ax.collections
    assert sorted(bar[:, 1].tolist() for bar in bars.get_segments()) == [
        pytest.approx(ends) for ends in ([15, 25], [25, 35], [85, 95])]
    levels = {line.get_linestyle(): line.get_ydata()[0] for line in ax.lines[2:4]}
    assert levels == {"--": pytest.approx(10), ":": 90}
    assert ax.lines[4].get_xdata() == [1.5, 1.5], "stage 2 begins between units 1 and 2"


def test_single_deletions_over_seeds_have_the_range_and_the_colour_of_the_family():
    both = pd.concat([deletions(network="plain20", seed=0), deletions(network="plain20", seed=1)])
    both["error"] += 0.1 * both["seed"]
    ax = plots.single_deletions(both)
    assert ax.collections[0].get_segments()[2][:, 1].tolist() == pytest.approx([30, 40])
    assert tuple(ax.collections[0].get_color()[0][:3]) == plots.family_color("plain20")
    assert ax.lines[1].get_ydata() == pytest.approx([35])


def test_what_deletions_add_has_no_level_of_the_intact_network():
    table = deletions().assign(delta_error_low=0.0, delta_error_high=1.0)
    ax = plots.single_deletions(table, value="delta_error")
    assert [line.get_linestyle() for line in ax.lines].count("--") == 0
    assert ax.get_ylabel() == "Δ error (points)"


DRAWN = {
    "seed_lines": (lambda table: plots.seed_lines(table, "unit", "error"), ["unit", "error"], ""),
    "quantile_fan": (lambda table: plots.quantile_fan(table, "unit", "error"), ["unit", "error"], ""),
    "single_deletions": (plots.single_deletions, [*deletions()], r"\. Take one of unravelling\.lesion\.delete_each"),
    "stage_boundaries": (
        lambda table: plots.stage_boundaries(plt.subplots()[1], table), ["unit", "stage"],
        r"\. Take one of unravelling\.lesion\.delete_each"),
    "side_by_side": (
        lambda table: plots.side_by_side(line, {"digits": table}, rows=["resnet110"]), ["network", "seed", "recipe"],
        r"\. Take one of unravelling\.stored\.(both|stored)"),
}  # fmt: skip


@pytest.mark.parametrize("function", DRAWN)
def test_what_a_table_lacks_is_named_with_what_makes_such_a_table(function):
    draw, columns, source = DRAWN[function]
    table = deletions(network="resnet110", seed=0, recipe="digits")
    draw(table)
    for column in columns:
        with pytest.raises(ValueError, match=f"^there is no column '{column}'.* in the table: it has .*{source}$"):
            draw(table.drop(columns=column))
    with pytest.raises(TypeError, match="is a list: expected a DataFrame"):
        draw([1])
    if function not in ("seed_lines", "side_by_side"):  # which draw nothing, or say so
        with pytest.raises(ValueError, match=f"^the table has no rows: expected at least one{source}$"):
            draw(table[:0])


def test_single_deletions_draw_what_they_have_a_label_for():
    with pytest.raises(ValueError, match=r"^value is 'loss': expected one of error, delta_error, delta_loss"):
        plots.single_deletions(deletions().assign(loss=1.0), value="loss")
    with pytest.raises(ValueError, match=r"^there is no column 'delta_error_low', 'delta_error_high' in the table"):
        plots.single_deletions(deletions(), value="delta_error")


def test_quantile_fan_draws_the_median_between_two_bands():
    table = pd.DataFrame({"k": 1, "error": np.arange(101) / 100})
    ax = plots.quantile_fan(table, "k", "error", scale=100)
    assert ax.lines[0].get_ydata().tolist() == [50]
    ends = [[c.get_paths()[0].vertices[:, 1].min(), c.get_paths()[0].vertices[:, 1].max()] for c in ax.collections]
    np.testing.assert_allclose(ends, [[5, 95], [25, 75]])


def test_diagrams_draw_every_path_and_refuse_what_does_not_fit():
    ax = plots.unravelled_diagram(3, off=[2])
    lengths = [text.get_text() for text in ax.texts if text.get_text().startswith("length")]
    assert lengths == ["length 0"] + ["length 1"] * 3 + ["length 2"] * 3 + ["length 3"]
    with pytest.raises(ValueError, match="64 paths do not fit on a page: draw at most 5 units, not 6"):
        plots.unravelled_diagram(6)
    for draw, off in product((plots.chain_diagram, plots.unravelled_diagram), ([0], [4], ["2"], 2, "2")):
        with pytest.raises((TypeError, ValueError), match=r"^off (must be|holds|is)"):
            draw(3, off=off)
    chain = plots.chain_diagram(3)
    assert [text.get_text() for text in chain.texts].count("+") == 3
    assert [text.get_text() for text in plots.chain_diagram(3, residual=False).texts].count("+") == 0
