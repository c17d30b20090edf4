"""The figures that set data sets side by side, on stored results of a made-up project."""

import json

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import pandas as pd
import pytest
from scipy import stats
from unravelling import plots


@pytest.fixture
def project(tmp_path, monkeypatch):
    """Results of two digits networks with three seeds, and of one CIFAR-10 network with one."""
    rows = {
        "digits": [("resnet110", seed, "digits", unit) for seed in range(3) for unit in range(4)]
        + [("plain20", seed, "digits", unit) for seed in range(2) for unit in range(2)],
        "cifar10": [("resnet110", 0, "brief", unit) for unit in range(4)] + [("resnet110", 7, "paper", 0)],
    }
    for dataset, some in rows.items():
        folder = tmp_path / "data/results" / dataset
        folder.mkdir(parents=True)
        table = pd.DataFrame(some, columns=["network", "seed", "recipe", "unit"])
        table.insert(0, "dataset", dataset)
        table["error"] = 0.1 * table["unit"]
        table.to_csv(folder / "delete_each.csv", index=False)
        table.to_csv(folder / "networks.csv", index=False)
        run = {"data": "CIFAR-10 (JPEG-75 copy)"} if dataset == "cifar10" else {}
        (folder / "provenance.json").write_text(json.dumps({"networks.csv": [run]}))
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    plt.close("all")


def line(table, ax):
    ax.plot(table["unit"], table["error"])


def test_both_reads_one_recipe_and_the_networks_asked_for(project):
    tables = plots.both("delete_each", "resnet110")
    assert list(tables) == ["digits", "cifar10"]
    assert [len(table) for table in tables.values()] == [12, 4]
    assert [len(table) for table in plots.both("delete_each").values()] == [16, 4]
    assert set(plots.both("delete_each", recipe="paper")["cifar10"]["seed"]) == {7}


def test_what_is_not_stored_has_no_rows_but_the_columns_of_a_network(project):
    tables = plots.both("reorder", "resnet110")
    assert all(table.empty and {"network", "seed", "recipe"} <= set(table) for table in tables.values())


def test_pending_names_what_is_missing_where_and_the_command(project):
    tables = plots.both("delete_each", "resnet110", "plain20")
    text = plots.pending(tables, "resnet110", "plain20")
    assert text == f"Not measured yet on CIFAR-10: plain-20; {plots.PAPER} does that."
    assert plots.pending(tables, "resnet110") == ""


def test_a_narrow_variant_stands_in_only_where_its_network_is_missing(project):
    path = project / "data/results/cifar10/delete_each.csv"
    table = pd.read_csv(path)
    narrow = table.assign(network="plain20-narrow")
    pd.concat([table, narrow]).to_csv(path, index=False)
    tables = plots.both("delete_each", "plain20")
    assert set(tables["digits"]["network"]) == {"plain20"}
    assert set(tables["cifar10"]["network"]) == {"plain20-narrow"}
    assert plots.pending(tables, "plain20") == ""
    fig = plots.side_by_side(line, tables, rows=["plain20"])
    assert [ax.get_title(loc="left").split("\n")[0] for ax in fig.axes] == ["plain-20", "plain-20 narrow"]
    pd.concat([table, narrow, table.assign(network="plain20")]).to_csv(path, index=False)
    assert set(plots.both("delete_each", "plain20")["cifar10"]["network"]) == {"plain20"}


@pytest.mark.parametrize(
    ("networks", "digits", "cifar10"),
    [
        (["resnet110"], "digits, recipe digits, 3 seeds", "CIFAR-10 (JPEG-75 copy), recipe brief, seed 0"),
        (["resnet110", "plain20"], "digits, recipe digits, 2 to 3 seeds",
         "CIFAR-10 (JPEG-75 copy), recipe brief, seed 0"),
        (["plain20"], "digits, recipe digits, 2 seeds", "CIFAR-10"),
    ],
)
def test_describe_says_images_recipe_and_seeds(project, networks, digits, cifar10):
    tables = plots.both("delete_each", *networks)
    assert {name: plots.describe(name, table) for name, table in tables.items()} == {
        "digits": digits, "cifar10": cifar10}


def test_side_by_side_draws_what_there_is_and_says_what_there_is_not(project):
    tables = plots.both("delete_each", "resnet110", "plain20")
    fig = plots.side_by_side(line, tables, rows=["resnet110", "plain20"])
    drawn = [(len(ax.lines), [text.get_text() for text in ax.texts]) for ax in fig.axes]
    assert drawn == [(1, []), (1, []), (1, []), (0, ["not measured yet"])]
    titles = [ax.get_title(loc="left") for ax in fig.axes]
    assert titles[1] == "ResNet-110\nCIFAR-10 (JPEG-75 copy)\nrecipe brief, seed 0"
    assert titles[3] == "plain-20\nCIFAR-10"


def test_side_by_side_works_without_any_result(tmp_path, monkeypatch):
    (tmp_path / "data/results").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    fig = plots.side_by_side(line, plots.both("delete_each"))
    assert [ax.get_title(loc="left") for ax in fig.axes] == ["digits", "CIFAR-10"]
    plt.close(fig)


def test_over_seeds_gives_the_t_interval_of_several_seeds_and_none_of_one():
    values = [0.1, 0.2, 0.4]
    low, high = stats.t.interval(0.95, 2, sum(values) / 3, stats.sem(values))
    expected = f"23.3 % (95 % interval over 3 seeds −{abs(100 * low):.1f} to {100 * high:.1f})"
    assert plots.over_seeds(pd.Series(values)) == expected
    assert plots.over_seeds([2.5], scale=1, unit=" blocks") == "2.5 blocks (one seed: no interval over seeds)"
