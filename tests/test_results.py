"""Stored results: replaced row by row, whole at any time, and with a record of how they were made."""

import json
import multiprocessing
import re

import pandas as pd
import pytest
from unravelling import results
from unravelling.results import KEYS, label, store, stored


def rows(network="resnet8", seed=0, values=(1.0, 2.0), recipe="digits"):
    return pd.DataFrame(
        [
            {"dataset": "digits", "network": network, "seed": seed, "recipe": recipe, "unit": i, "error": value}
            for i, value in enumerate(values)
        ]
    )


def test_rows_replace_those_of_the_same_network_only(tmp_path):
    path = tmp_path / "digits" / "delete_each.csv"
    store(rows("resnet8", 1), path, "first", 1)
    store(rows("plain8", 0), path, "second", 2)
    store(rows("resnet8", 0), path, "third", 3)
    store(rows("resnet8", 0, recipe="paper"), path, "fourth", 4)
    store(rows("resnet8", 1, (7, 8, 9)), path, "fifth", 5)
    expected = pd.concat(
        [rows("plain8", 0), rows("resnet8", 0), rows("resnet8", 0, recipe="paper"), rows("resnet8", 1, (7, 8, 9))]
    )
    found = stored("digits/delete_each", tmp_path, recipe=None)
    pd.testing.assert_frame_equal(found, expected.reset_index(drop=True), check_dtype=False)
    assert list(found.columns[:4]) == KEYS


def test_numbers_keep_six_digits_and_do_not_drift(tmp_path):
    path = tmp_path / "digits" / "a.csv"
    store(rows(values=(1 / 3, 1.23456789e-9)), path, "x", 1)
    content = path.read_text()
    assert "0.333333\n" in content
    assert "1.23457e-09\n" in content
    for seed in range(1, 4):
        store(rows(seed=seed), path, "x", 1)
    assert path.read_text().startswith(content)


def test_new_columns_are_added(tmp_path):
    path = tmp_path / "digits" / "a.csv"
    store(rows(), path, "x", 1)
    store(rows(seed=1).assign(loss=3.0), path, "x", 1)
    assert stored("digits/a", tmp_path, recipe=None)["loss"].isna().tolist() == [True, True, False, False]


def test_the_record_says_how_rows_were_made(tmp_path):
    path = tmp_path / "digits" / "a.csv"
    store(rows(), path, "python -m unravelling measure", 1.26)
    store(rows(seed=1), path, "python -m unravelling measure", 2)
    record = json.loads((path.parent / "provenance.json").read_text())
    (run,) = record["a.csv"]
    assert run["command"] == "python -m unravelling measure"
    assert run["seconds"] == {"resnet8-seed0-digits": 1.3, "resnet8-seed1-digits": 2}
    assert {"torch", "numpy", "pandas", "unravelling"} == run["versions"].keys()
    assert re.fullmatch(r"[0-9a-f]{12}\+?|unknown", run["commit"])
    assert "threads" in run["hardware"]
    # measured again by another command: the earlier record of the row goes, that of the other one stays
    store(rows(), path, "another command", 3)
    record = json.loads((path.parent / "provenance.json").read_text())
    assert [run["seconds"] for run in record["a.csv"]] == [{"resnet8-seed1-digits": 2}, {"resnet8-seed0-digits": 3}]
    store(rows(seed=1), path, "another command", 5)
    store(rows(), path.with_name("b.csv"), "a third", 4)
    record = json.loads((path.parent / "provenance.json").read_text())
    assert [(run["command"], run["seconds"]) for run in record["a.csv"]] == [
        ("another command", {"resnet8-seed0-digits": 3, "resnet8-seed1-digits": 5}),
    ]
    assert record["b.csv"][0]["command"] == "a third"


def store_twenty(network, path, together):
    results.commit = lambda: "unknown"  # git has nothing to do with it
    together.wait()
    for seed in range(20):
        store(rows(network, seed, (seed / 10,)), path, "command", seed)


def test_two_processes_lose_nothing(tmp_path):
    path = tmp_path / "digits" / "a.csv"
    fork = multiprocessing.get_context("fork")
    together = fork.Barrier(2)
    processes = [fork.Process(target=store_twenty, args=(name, path, together)) for name in ("a", "b")]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    found = stored("digits/a", tmp_path, recipe=None)
    expected = [(name, seed, seed / 10) for name in ("a", "b") for seed in range(20)]
    assert list(found[["network", "seed", "error"]].itertuples(index=False, name=None)) == expected
    (run,) = json.loads((path.parent / "provenance.json").read_text())["a.csv"]
    assert len(run["seconds"]) == 40


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_write_leaves_the_earlier_file(tmp_path, monkeypatch, error):
    path = tmp_path / "digits" / "a.csv"
    store(rows(), path, "x", 1)
    before = {p.name: p.read_bytes() for p in path.parent.iterdir()}

    def full_disk(table, path, **options):
        path.write_text("dataset,netw")
        raise error

    with monkeypatch.context() as context:
        context.setattr(pd.DataFrame, "to_csv", full_disk)
        with pytest.raises(type(error)) as caught:
            store(rows(seed=1), path, "x", 1)
        if isinstance(error, OSError):
            assert "a.csv could not be written" in str(caught.value)
    assert {p.name: p.read_bytes() for p in path.parent.iterdir()} == before
    store(rows(seed=1), path, "x", 1)
    assert len(stored("digits/a", tmp_path, recipe=None)) == 4


def test_names_that_are_not_stored(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"^no stored results 'digits/a': there are none$"):
        stored("digits/a", tmp_path, recipe=None)
    store(rows(), tmp_path / "digits" / "b.csv", "x", 1)
    store(rows(), tmp_path / "cifar10" / "c.csv", "x", 1)
    with pytest.raises(FileNotFoundError, match=r"^no stored results 'digits/a': there are cifar10/c, digits/b$"):
        stored("digits/a", tmp_path, recipe=None)


def test_the_projects_own_folder_is_the_default(tmp_path, monkeypatch):
    store(rows(), tmp_path / "data" / "results" / "digits" / "b.csv", "x", 1)
    monkeypatch.chdir(tmp_path)
    pd.testing.assert_frame_equal(stored("digits/b"), rows(), check_dtype=False)


def test_recipes_are_not_mixed_unasked(tmp_path):
    for recipe in ("digits", "paper"):
        store(rows(recipe=recipe), tmp_path / "digits" / "a.csv", "made", 1)
    assert stored("digits/a", tmp_path)["recipe"].tolist() == ["digits"] * 2
    assert stored("digits/a", tmp_path, recipe="paper")["recipe"].tolist() == ["paper"] * 2
    assert sorted(stored("digits/a", tmp_path, recipe=None)["recipe"]) == ["digits"] * 2 + ["paper"] * 2


def test_the_record_names_the_copy_and_the_images_and_the_label_repeats_them(tmp_path):
    path = tmp_path / "digits" / "networks.csv"
    table = rows()
    table.attrs["images"] = "the first 3 test images"
    store(table, path, "x", 1, data="digits, written in haste")
    store(rows(seed=4), path, "x", 1)
    first, second = json.loads((path.parent / "provenance.json").read_text())["networks.csv"]
    assert (first["images"], first["data"]) == ("the first 3 test images", "digits, written in haste")
    assert "images" not in second
    assert "data" not in second
    assert label("digits", folder=tmp_path) == "digits, written in haste, recipe digits, 2 seeds"
    store(rows("plain8"), path, "x", 1)
    assert label("digits", folder=tmp_path) == "digits, written in haste, recipe digits, 1 to 2 seeds"
    store(rows(seed=7, recipe="paper"), path, "x", 1)
    assert label("digits", "paper", tmp_path) == "digits, written in haste, recipe paper, seed 7"
    assert label("digits", "short", tmp_path) == "digits, written in haste, recipe short, no network yet"
    with pytest.raises(FileNotFoundError, match=r"^no stored results 'cifar10/networks': there are digits/networks$"):
        label("cifar10", folder=tmp_path)
