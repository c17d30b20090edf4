"""The command line: help, a small run from training to results, and what bad input gets."""

import json
import re
import shutil
import subprocess
import sys

import pandas as pd
import pytest
import torch
from unravelling import RECIPES, Recipe, build, delete_each, digits, evaluate, fit, gradient_norms, load, measure, runs
from unravelling import __main__ as cli
from unravelling import train as train_module
from unravelling.results import KEYS, stored
from unravelling.weights import header

LESIONS = ("delete_each", "delete_random", "delete_reestimated")
TINY = Recipe("tiny", epochs=2, batch_size=256, lr=0.05, crop=1)


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(RECIPES, "tiny", TINY)
    monkeypatch.setattr(measure, "TRIALS", 3)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder in which resnet8 has been trained and measured."""
    out = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(RECIPES, "tiny", TINY)
        patch.setattr(measure, "TRIALS", 3)
        assert main("train", "resnet8", out=out) == 0
        assert main("measure", "resnet8", "--what", *LESIONS, out=out) == 0
    return out


def main(command, *arguments, out, recipe="tiny"):
    return cli.main([command, *arguments, "--recipe", recipe, "--out", str(out), "--device", "cpu"])


def files(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_help_names_every_command_and_option(capsys):
    for command, words in {
        (): ["train", "measure", "paper", "continue where they were"],
        ("train",): ["networks", "--dataset", "--data", "--seeds", "--recipe", "--out", "--device", "cifar10"],
        ("paper",): [
            "--recipe",
            "--groups",
            "--networks",
            "--status",
            "--budget",
            "--jobs",
            "--remeasure",
            "--publish",
        ],
        ("measure",): ["--what", "delete_each", "delete_random", "delete_reestimated", "--seeds", "--out"],
    }.items():
        with pytest.raises(SystemExit) as caught:
            cli.main([*command, "--help"])
        assert caught.value.code == 0
        text = capsys.readouterr().out
        assert text.startswith("usage: python -m unravelling")
        for word in words:
            assert word in text, word
    for option in re.findall(r"^  (--\w+)", text, re.MULTILINE):  # each has a line that explains it
        assert re.search(rf"^  {option}.*\s{{2,}}\S|^  {option}.*\n\s{{10,}}\S", text, re.MULTILINE), option


def test_python_m_unravelling_starts_it():
    done = subprocess.run([sys.executable, "-m", "unravelling", "--help"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "measure" in done.stdout


def test_training_from_the_shell_is_training(trained):
    chain = build("resnet8", "digits", seed=0)
    history = fit(chain, digits(), TINY, seed=0, progress=False)
    shipped = load(trained / "weights" / "digits" / "resnet8-tiny-seed0.safetensors")
    assert all(torch.equal(tensor, shipped.state_dict()[name]) for name, tensor in chain.state_dict().items())
    curves = stored("digits/training", trained / "results", recipe=None)
    assert list(curves.columns) == [*KEYS, *history.columns]
    assert (curves[KEYS] == ["digits", "resnet8", 0, "tiny"]).all(axis=None)
    pd.testing.assert_frame_equal(curves[history.columns], history, rtol=1e-5)
    row = stored("digits/networks", trained / "results", recipe=None).iloc[0]
    head = header(trained / "weights" / "digits" / "resnet8-tiny-seed0.safetensors")
    for split in ("train", "validation", "test"):
        scores = evaluate(chain, getattr(digits(), split))
        assert row[f"{split}_error"] == pytest.approx(scores["error"], rel=1e-5)
        assert row[f"{split}_images"] == scores["images"]
        assert head[f"{split}_error"] == scores["error"]
    assert row["parameters"] == sum(p.numel() for p in chain.parameters())
    assert (head["dataset"], head["recipe"], head["seed"]) == ("digits", "tiny", 0)


def test_gradient_norms_are_stored_from_initialisation_to_the_end(trained):
    norms = stored("digits/gradient_norms", trained / "results", recipe=None)
    assert sorted(set(norms["epoch"])) == [0, 1, 2]
    (batch,) = digits().train.take(torch.arange(256)).batches(256)
    ends = {0: build("resnet8", "digits"), 2: load(trained / "weights" / "digits" / "resnet8-tiny-seed0.safetensors")}
    for epoch, chain in ends.items():
        expected = gradient_norms(chain.train(), *batch)
        found = norms[norms["epoch"] == epoch].reset_index()
        pd.testing.assert_frame_equal(found[expected.columns], expected, rtol=1e-4)


def test_measuring_from_the_shell_is_measuring(trained):
    chain = load(trained / "weights" / "digits" / "resnet8-tiny-seed0.safetensors")
    table = delete_each(chain, digits().test)
    found = stored("digits/delete_each", trained / "results", recipe=None)
    pd.testing.assert_frame_equal(found[table.columns], table, rtol=1e-5, check_dtype=False)
    drawn = stored("digits/delete_random", trained / "results", recipe=None)
    assert drawn["k"].tolist() == [1] * 3 + [2] * 3
    healed = stored("digits/delete_reestimated", trained / "results", recipe=None)
    assert healed["k"].tolist() == [1] * 5 + [2] * 5
    assert healed["reestimated_error"].between(0, 1).all()
    for row in healed.itertuples():
        lesioned = chain.without(*map(int, str(row.units).split()))
        assert evaluate(lesioned, digits().test)["error"] == pytest.approx(row.error, rel=1e-5)


def test_the_record_names_the_command(trained):
    record = json.loads((trained / "results" / "digits" / "provenance.json").read_text())
    assert record["networks.csv"][0]["command"].startswith("python -m unravelling train resnet8 --recipe tiny")
    assert record["delete_each.csv"][0]["command"].startswith("python -m unravelling measure resnet8")


def test_checkpoints_are_gone_when_a_run_is_done(trained):
    assert not [path for path in files(trained) if "checkpoint" in path]


def test_what_is_done_is_skipped(trained, capsys, monkeypatch):
    monkeypatch.setattr(runs, "fit", lambda *a, **k: pytest.fail("done again"))
    for name in LESIONS:
        monkeypatch.setitem(measure.MEASUREMENTS, name, lambda *a, **k: pytest.fail("done again"))
    before = files(trained)
    assert main("train", "resnet8", out=trained) == 0
    assert main("measure", "resnet8", "--what", *LESIONS, out=trained) == 0
    assert files(trained) == before
    text = capsys.readouterr().out
    assert text.count("done already") == 4


def test_several_networks_and_seeds(tmp_path, monkeypatch):
    monkeypatch.setitem(RECIPES, "tiny", Recipe("tiny", epochs=1, batch_size=512))
    assert main("train", "resnet8", "plain8", "--seeds", "0,2-3", out=tmp_path) == 0
    networks = stored("digits/networks", tmp_path / "results", recipe=None)
    expected = [(name, seed) for name in ("plain8", "resnet8") for seed in (0, 2, 3)]
    assert list(networks[["network", "seed"]].itertuples(index=False, name=None)) == expected
    chain = build("plain8", "digits", seed=3)
    fit(chain, digits(), RECIPES["tiny"], seed=3, progress=False)
    shipped = load(tmp_path / "weights" / "digits" / "plain8-tiny-seed3.safetensors").state_dict()
    assert all(torch.equal(tensor, shipped[name]) for name, tensor in chain.state_dict().items())
    assert main("measure", "resnet8", "plain8", "--seeds", "0,2-3", "--what", "delete_each", out=tmp_path) == 0
    table = stored("digits/delete_each", tmp_path / "results", recipe=None)
    assert len(table) == 2 * 3 * 3
    assert not (tmp_path / "results" / "digits" / "delete_random.csv").exists()


@pytest.mark.parametrize("calls", [1, 7])
def test_an_interrupted_run_continues(trained, tmp_path, monkeypatch, capsys, calls):
    counted = []
    original = train_module.cross_entropy

    def interrupted(*arguments, **options):
        counted.append(1)
        if len(counted) > calls:
            raise KeyboardInterrupt
        return original(*arguments, **options)

    with monkeypatch.context() as context:
        context.setattr(train_module, "cross_entropy", interrupted)
        assert main("train", "resnet8", out=tmp_path) == 130
    assert "the same command continues" in capsys.readouterr().err
    assert not (tmp_path / "weights").exists()
    assert main("train", "resnet8", out=tmp_path) == 0
    assert main("measure", "resnet8", "--what", "delete_each", out=tmp_path) == 0
    ours, theirs = files(tmp_path), files(trained)
    for name in ("weights/digits/resnet8-tiny-seed0.safetensors", *(f"results/digits/{n}.csv" for n in (
        "networks", "training", "gradient_norms", "delete_each"
    ))):  # fmt: skip
        assert ours[name] == theirs[name], name


def test_an_interrupted_measurement_continues(trained, tmp_path, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    for name, content in files(trained).items():
        if name.startswith("weights"):
            (tmp_path / name).parent.mkdir(parents=True)
            (tmp_path / name).write_bytes(content)
    with monkeypatch.context() as context:
        context.setitem(measure.MEASUREMENTS, "delete_random", interrupted)
        assert main("measure", "resnet8", "--what", *LESIONS, out=tmp_path) == 130
    assert {path.name for path in (tmp_path / "results" / "digits").glob("*.csv")} == {"delete_each.csv"}
    assert main("measure", "resnet8", "--what", *LESIONS, out=tmp_path) == 0
    ours, theirs = files(tmp_path), files(trained)
    for name in LESIONS:
        assert ours[f"results/digits/{name}.csv"] == theirs[f"results/digits/{name}.csv"]


def test_without_a_choice_all_that_applies_is_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(RECIPES, "tiny", Recipe("tiny", epochs=1, batch_size=512))
    assert main("train", "plain8", out=tmp_path) == 0
    with monkeypatch.context() as context:
        context.setattr(runs, "applicable", lambda network, dataset: ("delete_each",))
        assert main("measure", "plain8", out=tmp_path) == 0
    assert "plain8-seed0-tiny: spectrum does not apply" in capsys.readouterr().out
    results = {path.stem for path in (tmp_path / "results" / "digits").glob("*.csv")}
    assert results == {"networks", "training", "gradient_norms", "delete_each"}
    assert main("measure", "plain8", "--what", "subnetworks", out=tmp_path) == 2
    assert "error: subnetworks does not apply to plain8: it gives no rows" in capsys.readouterr().err


def test_a_full_disk_is_an_error_message(tmp_path, monkeypatch, capsys):
    def full_disk(state, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    assert main("train", "resnet8", out=tmp_path) == 2
    assert re.search(r"\rerror: .*resnet8-seed0-tiny\.pt could not be written .*No space left", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "alexnet"], "error: unknown network 'alexnet': expected a name such as resnet110, plain56-post"),
        (["train", "resnet8", "resnet9"], "error: depth 9 is not 6n + 2: use a depth such as 8, 20, 56 or 110"),
        (["train", "resnet8", "--dataset", "cifar10"], "error: where is CIFAR-10? Pass cifar10(root) or set UNRAVELL"),
        (["train", "resnet8", "--dataset", "cifar10", "--data", "/nowhere"], "error: no CIFAR-10 at /nowhere: expect"),
        (["measure", "resnet8"], "error: no weights at "),
        (["train", "resnet8", "--seeds", "x"], "argument --seeds: 'x' is not a list of seeds such as 0, 0-4 or 0,2"),
        (["train", "resnet8", "--seeds", "0,,2"], "argument --seeds: '0,,2' is not a list of seeds"),
        (["train", "resnet8", "--seeds", "3-"], "argument --seeds: '3-' is not a list of seeds"),
        (["train", "resnet8", "--seeds", "4-2"], "argument --seeds: '4-2' is not a list of seeds"),
        (["train", "resnet8", "--seeds=-1"], "argument --seeds: '-1' is not a list of seeds"),
        (["train", "resnet8", "--dataset", "mnist"], "argument --dataset: invalid choice: 'mnist'"),
        (["train", "resnet8", "--recipe", "long"], "argument --recipe: invalid choice: 'long'"),
        (["measure", "resnet8", "--what", "weight"], "argument --what: invalid choice: 'weight'"),
        (["train"], "the following arguments are required: networks"),
        ([], "the following arguments are required: command"),
    ],
)
def test_bad_input_gets_a_message_and_status_2(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        status = cli.main(arguments)
    except SystemExit as exit:
        status = exit.code
    captured = capsys.readouterr()
    assert status == 2
    assert message in captured.err
    assert "Traceback" not in captured.err + captured.out
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["train", "measure"])
def test_weights_of_another_recipe_are_not_mixed_in(trained, tmp_path, capsys, command):
    folder = tmp_path / "weights" / "digits"
    folder.mkdir(parents=True)
    shutil.copy(trained / "weights" / "digits" / "resnet8-tiny-seed0.safetensors", folder / "resnet8-seed0.safetensors")
    before = files(tmp_path)
    assert main(command, "resnet8", out=tmp_path, recipe="digits") == 2
    message = r"resnet8-seed0\.safetensors was trained with recipe tiny, not digits: choose another --recipe or --out$"
    assert re.search(message, capsys.readouterr().err)
    assert files(tmp_path) == before
