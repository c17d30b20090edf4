"""Stored results as a reader loads them, on the folder of a made-up project."""

from pathlib import Path

import pandas as pd
import pytest
from unravelling.stored import DEFAULT_RECIPES, KEYS, both, data_folder, intact_error, stored

ROOT = Path(__file__).resolve().parents[1]


def rows(*keys, dataset="digits"):
    """Two units of each (network, seed, recipe)."""
    table = pd.DataFrame([(dataset, *key, unit, 0.1 * unit) for key in keys for unit in range(2)])
    return table.set_axis([*KEYS, "unit", "error"], axis=1)


@pytest.fixture
def project(tmp_path, monkeypatch):
    """Networks of two recipes on both data sets; the working directory lies within the project."""
    tables = {
        "digits": rows(("resnet110", 0, "digits"), ("resnet110", 1, "digits"), ("resnet110", 0, "digits-short-paths")),
        "cifar10": rows(("resnet110", 0, "short"), ("vgg15", 0, "short"), ("plain20", 7, "paper")),
    }
    for dataset, table in tables.items():
        folder = tmp_path / "data/results" / dataset
        folder.mkdir(parents=True)
        table.assign(dataset=dataset).to_csv(folder / "delete_each.csv", index=False)
    (tmp_path / "book").mkdir()
    monkeypatch.chdir(tmp_path / "book")
    return tmp_path


def keys(table):
    return sorted(set(table[["network", "seed", "recipe"]].itertuples(index=False, name=None)))


def test_recipes_are_not_mixed_unasked(project):
    assert keys(stored("digits/delete_each")) == [("resnet110", 0, "digits"), ("resnet110", 1, "digits")]
    assert keys(stored("digits/delete_each", recipe="digits-short-paths")) == [("resnet110", 0, "digits-short-paths")]
    assert len(stored("digits/delete_each", recipe=None)) == 6
    assert stored("cifar10/delete_each", recipe="paper").index.tolist() == [0, 1]


def test_a_folder_of_ones_own_is_read_instead(project, tmp_path):
    (tmp_path / "mine/digits").mkdir(parents=True)
    mine = rows(("plain8", 3, "digits"))
    mine.to_csv(tmp_path / "mine/digits/delete_each.csv", index=False)
    pd.testing.assert_frame_equal(stored("digits/delete_each", tmp_path / "mine"), mine)
    assert set(stored("digits/delete_each")["network"]) == {"resnet110"}


@pytest.mark.parametrize(
    "content",
    [b"", b"\xff\xfe", b"<<<<<<< HEAD\n", b"a,b\n1,2\n", b"dataset,network,seed,recipe\n1,2,3,4\n1,2,3,4,5\n",
     b'dataset,network,seed,recipe\n"a'],
)  # fmt: skip
def test_a_broken_table_is_named(project, content):
    path = project / "data/results/digits/delete_each.csv"
    path.write_bytes(content)
    for call in (lambda: stored("digits/delete_each"), lambda: both("delete_each")):
        with pytest.raises(ValueError, match=rf"^{path} is broken \((.|\n)+\): restore it by git, or install"):
            call()


BEFORE, AFTER = "digits,resnet110,0,digits,0,0.0\n", "digits,resnet110,0,digits,1,0.1\n"


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (f"<<<<<<< HEAD\n{BEFORE}=======\n{AFTER}>>>>>>> a, b, c, d, e\n", "2 has 1 of 6 columns: '<<<<<<< HEAD'"),
        (f"{BEFORE}=======\n{AFTER}", "3 has 1 of 6 columns: '======='"),
        (f"{BEFORE}{AFTER}>>>>>>> a, b, c\n", "4 has 3 of 6 columns: '>>>>>>> a, b, c'"),
        (f"{BEFORE}digits,resnet110,0,digits,1\n", "3 has 5 of 6 columns"),
        (BEFORE + AFTER[:-1], "3 has no end, so that it may be cut: 'digits,resnet110,0,digits,1,0.1'"),
        (BEFORE + AFTER[:-9], "3 has no end, so that it may be cut: 'digits,resnet110,0,digi'"),
    ],
)
def test_a_table_that_was_cut_or_holds_a_conflict_is_named_with_its_line(project, content, line):
    path = project / "data/results/digits/delete_each.csv"
    path.write_text(f"{','.join(KEYS)},unit,error\n{content}")
    with pytest.raises(ValueError, match=rf"^{path} is broken \(line {line}.*\): restore it by git, or install"):
        stored("digits/delete_each")


def test_a_header_within_the_table_or_a_seed_that_is_none_is_found(project):
    path = project / "data/results/digits/delete_each.csv"
    head = f"{','.join(KEYS)},unit,error\n"
    for row in (head, BEFORE.replace(",0,", ",,", 1)):
        path.write_text(head + BEFORE + row)
        with pytest.raises(ValueError, match=rf"^{path} is broken \(.+\): restore it by git"):
            stored("digits/delete_each")
    path.write_bytes((head + BEFORE + AFTER).replace("\n", "\r\n").encode())
    assert stored("digits/delete_each")["error"].tolist() == [0.0, 0.1], "a clone on Windows"
    path.write_text(f"{head}\n")
    assert stored("digits/delete_each").empty, "a blank line is no row"


def test_names_that_are_not_stored_are_answered_with_those_that_are(project, tmp_path):
    there = "there are cifar10/delete_each, digits/delete_each$"
    with pytest.raises(FileNotFoundError, match=f"^no stored results 'digits/reorder': {there}"):
        stored("digits/reorder")
    with pytest.raises(FileNotFoundError, match=r"^no stored results 'digits/a': there are none$"):
        stored("digits/a", tmp_path / "book")


def test_the_data_folder_is_found_from_below_it_beside_the_source_or_in_it(project, tmp_path_factory, monkeypatch):
    assert data_folder() == project / "data"
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    monkeypatch.chdir(elsewhere)
    assert data_folder() == ROOT / "data"
    monkeypatch.setattr("unravelling.stored.__file__", str(elsewhere / "site-packages/unravelling/stored.py"))
    with pytest.raises(FileNotFoundError, match=f"^no data/results in {elsewhere} or above it.*: install"):
        data_folder()
    (elsewhere / "site-packages/unravelling/_stored/results").mkdir(parents=True)
    assert data_folder() == elsewhere / "site-packages/unravelling/_stored"


def test_both_reads_one_recipe_of_the_networks_asked_for_in_the_same_order(project):
    tables = both("delete_each", "resnet110")
    assert list(tables) == ["digits", "cifar10"] == list(DEFAULT_RECIPES)
    assert [keys(table) for table in tables.values()] == [
        [("resnet110", 0, "digits"), ("resnet110", 1, "digits")], [("resnet110", 0, "short")]]
    assert [len(table) for table in both("delete_each").values()] == [4, 4]
    assert keys(both("delete_each", recipe="paper")["cifar10"]) == [("plain20", 7, "paper")]


def test_what_is_not_stored_has_no_rows_but_the_columns_of_a_network(project):
    for table in [*both("reorder", "resnet110").values(), both("delete_each", "plain32")["digits"]]:
        assert table.empty
        assert set(KEYS) <= set(table)


def test_the_intact_error_is_the_mean_before_the_lesions():
    table = pd.DataFrame({"error": [0.5, 0.9, 0.3], "delta_error": [0.4, 0.8, 0.1]})
    assert intact_error(table) == pytest.approx((0.1 + 0.1 + 0.2) / 3)


@pytest.mark.parametrize("dataset", DEFAULT_RECIPES)
def test_what_the_project_stores_has_keys(dataset, monkeypatch):
    monkeypatch.chdir(ROOT)
    for path in sorted((ROOT / "data/results" / dataset).glob("*.csv")):
        table = stored(f"{dataset}/{path.stem}", recipe=None)
        assert list(table.columns[:4]) == KEYS
        assert set(table["dataset"]) == {dataset}
