"""The long runs: training that resumes, cells, the collector that touches nothing else, and Snakemake being killed."""
# ruff: noqa: E402 (the scripts are found by path)

import argparse
import hashlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from unravelling import RECIPES, Dataset, build, digits, evaluate, load, save
from unravelling.data import write_tensors

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "experiments"))

import cells
import collect
import matrix
import measure
import measurements
import train
import yaml
from filelock import FileLock, Timeout

HEAD = "dataset,network,seed,recipe"
CONFIG = yaml.safe_load((ROOT / "experiments/config.yaml").read_text(encoding="utf-8"))
TOY = list(matrix.rows(CONFIG, "toy"))
needs_snakemake = pytest.mark.skipif(
    importlib.util.find_spec("snakemake") is None, reason="Snakemake is not installed: see experiments/requirements.txt"
)


@pytest.fixture(autouse=True)
def _process_as_it_was():
    handler, threads = signal.getsignal(signal.SIGTERM), torch.get_num_threads()
    yield
    signal.signal(signal.SIGTERM, handler)
    torch.set_num_threads(threads)


def words(row, *more):
    return ["--network", row.network, "--seed", str(row.seed), "--threads", "1", *map(str, more)]


def trained(runs, row=TOY[0]):
    """Train a row in this process, and measure it."""
    folder = runs / row.folder
    assert train.main(words(row, "--out", folder / "weights.safetensors")) == 0
    for name in row.measurements:
        weights = folder / "weights.safetensors"
        assert measure.main(words(row, "--what", name, "--weights", weights, "--out", folder / f"{name}.csv")) == 0
    return runs


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Both rows of the toy matrix after an epoch; in a folder that no shell takes without quotes."""
    folder = tmp_path_factory.mktemp("it's a folder")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(RECIPES, "digits", replace(RECIPES["digits"], epochs=1))
        for row in TOY:
            trained(folder, row)
    return folder


def contents(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


@pytest.fixture
def data(tmp_path):
    """A copy of the project's results, and one file of weights."""
    folder = tmp_path / "data"
    shutil.copytree(ROOT / "data/results", folder / "results")
    (folder / "weights/digits").mkdir(parents=True)
    shutil.copy(ROOT / "data/weights/digits/resnet20-seed0.safetensors", folder / "weights/digits")
    shutil.copy(ROOT / "data/RUNS.md", folder)
    return folder


# the matrix


def test_every_row_of_the_matrix_can_be_built_and_measured_as_asked():
    for target in ("paper", "weights", "toy"):
        rows = list(matrix.rows(CONFIG, target))
        assert len(set(rows)) == len(rows)
        for network, dataset in {(row.network, row.dataset) for row in rows if not row.members}:
            known = measurements.applicable(build(network, dataset))
            assert all(set(row.measurements) <= set(known) for row in rows if row.network == network)
    tiers = [row.tier for row in matrix.rows(CONFIG, "paper")]
    assert tiers == sorted(tiers)


def test_ensembles_share_no_member():
    rows = [row for row in matrix.rows(CONFIG, "weights") if row.members]
    for recipe in ("digits", "digits-bagged"):
        own = [row for row in rows if row.recipe == recipe]
        assert [(row.network, row.seed) for row in own] == [("resnet20x6", i) for i in range(5)]
        assert sorted(member.seed for row in own for member in row.members) == list(range(30))
        assert {member.recipe for row in own for member in row.members} == {recipe}


@pytest.mark.parametrize(
    ("line", "recipe"),
    [
        ({}, "digits"),
        ({"variant": "bagged"}, "digits-bagged"),
        ({"recipe": "short"}, "short"),
        ({"recipe": "short", "variant": "bagged"}, "short-bagged"),
    ],
)
def test_a_variant_is_of_the_recipe_of_its_own_row(line, recipe):
    line |= {"network": "resnet8", "seeds": [0], "members": 2}
    (row,) = matrix.rows({"paper": {"dataset": "digits", "recipe": "digits", "rows": [line]}}, "paper")
    assert [one.recipe for one in (row, *row.members)] == [recipe] * 3
    assert row.folder.parts == ("digits", recipe, "resnet8x2-seed0")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"recipe": "none"}, "no recipe none"),
        ({"sed": [1]}, "sed is not"),
        ({"seeds": 3}, "seeds must be a list, not 3"),
        ({"seeds": ["0-4"]}, "whole numbers from 0, not '0-4'"),
        ({"ship": "yes"}, "ship must be a bool, not 'yes'"),
        ({"network": "resnet9"}, "9"),
        ({"network": "rasnet8"}, "unknown network 'rasnet8'"),
        ({"measure": ["delete_all"]}, "no measurement delete_all for resnet8: choose intact, "),
        ({"network": "plain8", "measure": ["spectrum"]}, "no measurement spectrum for plain8"),
        ({"members": 0}, "members must be at least 1, not 0"),
        ({"members": -1}, "members must be at least 1, not -1"),
    ],
)
def test_a_row_that_makes_no_sense_is_named(line, message):
    config = {"paper": {"dataset": "digits", "recipe": "digits", "rows": [{"network": "resnet8", "seeds": [0]} | line]}}
    with pytest.raises(ValueError, match=message):
        list(matrix.rows(config, "paper"))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "paper needs dataset, recipe and rows"),
        ([], "paper needs dataset, recipe and rows"),
        ({"paper": None}, "paper needs dataset, recipe and rows"),
        ({"paper": {"dataset": "digits", "recipe": "digits"}}, "paper needs dataset, recipe and rows"),
        ({"paper": {"dataset": "digits", "recipe": "digits", "rows": None}}, "paper needs dataset, recipe and rows"),
        ({"paper": {"dataset": "mnist", "recipe": "digits", "rows": []}}, "there is no dataset mnist: choose digits,"),
        ({"paper": {"dataset": "digits", "recipe": "digits", "rows": ["a"]}}, "the row 'a' needs network and seeds"),
        ({"paper": {"dataset": "digits", "recipe": "digits", "rows": [{"network": "resnet8"}]}}, "needs network and"),
    ],
)
def test_a_matrix_that_lacks_something_is_named(config, message):
    with pytest.raises(ValueError, match=message):
        list(matrix.rows(config, "paper"))


# measurements


@pytest.mark.parametrize("network", ["resnet14", "plain14", "vgg15-nobn"])
def test_what_applies_gives_rows_and_says_on_which_images(network, monkeypatch):
    monkeypatch.setattr(measurements, "TRIALS", 2)
    monkeypatch.setattr(measurements, "K", (1, 3))
    monkeypatch.setattr(measurements, "SWAPS", (1, None))
    monkeypatch.setattr(measurements, "ACTIVE", (4, 6))
    assert "damage" not in measurements.applicable(build(network, "digits"))
    monkeypatch.setattr(measurements, "DEEP", 6)
    whole, few = digits(), torch.arange(20)
    data = Dataset("digits", whole.train.take(few), whole.validation, whole.test.take(few), whole.classes, "digits")
    chain = build(network, "digits").eval()
    names = measurements.applicable(chain)
    assert {"intact", "delete_each", "damage"} <= set(names)
    assert ("spectrum" in names) == network.startswith("resnet")
    assert ("delete_reestimated" in names) == ("nobn" not in network)
    for name in names:
        measurement = measurements.TABLE[name]
        test, words = measurement.images(chain, data)
        assert len(measurement.function(chain, test, data, 0)), name
        assert "images" in words


def test_parts_of_a_variance_add_up():
    block, image = torch.randn(7).double().numpy(), torch.randn(40, 1).double().numpy()
    sums = measurements.variance_parts(block + image)
    assert sums["interaction"] == pytest.approx(0, abs=1e-12)
    assert sums["block"] / sums["image"] == pytest.approx(block.var() / image.var())
    products = measurements.variance_parts((block - block.mean()) * (image - image.mean()))
    assert products["interaction"] == pytest.approx(1)
    assert products["size"] == pytest.approx(block.std() * image.std())
    any_table = measurements.variance_parts(torch.randn(40, 7).double().numpy())
    assert sum(any_table[name] for name in ("block", "image", "interaction")) == pytest.approx(1)


def test_variance_of_damage_leaves_out_the_unit_that_costs_the_most():
    chain, data = build("resnet14", "digits", seed=1), digits()
    chain = measurements.lesion.reestimate_batch_norm(chain, data.train.take(torch.arange(100)))
    test = data.test.take(torch.arange(50))
    with torch.no_grad():
        for parameter in chain.units[2].branch.parameters():
            parameter.mul_(3)
    table = measurements.variance_of_damage(chain, test, data, 0)
    assert list(table["statistics"].unique()) == ["trained", "re-estimated"]
    damage = measurements.damage_by_image(chain, test, data, 0).filter(like="unit").to_numpy()
    on_loss = table.query("statistics == 'trained' and scale == 'loss'")
    assert on_loss["without"].tolist() == ["", int(damage.mean(0).argmax())]
    assert on_loss["size"].iloc[0] == pytest.approx((damage**2).mean() ** 0.5)
    others = np.delete(damage, damage.mean(0).argmax(), axis=1)
    assert on_loss["size"].iloc[1] == pytest.approx((others**2).mean() ** 0.5)


def test_margins_of_losses_that_are_beyond_every_exponential(monkeypatch):
    before, after = np.array([1.0, 800, 0]), np.array([[2.0, 900, 1e-12], [720, 5000, 3], [710, 1, 800]])
    monkeypatch.setattr(measurements, "_losses", lambda chain, test: (before, after))
    with np.errstate(over="raise", divide="raise", invalid="raise"):
        table = measurements.variance_of_damage(build("resnet8-nobn", "digits"), None, None, 0)

    def margin(losses):  # log(exp(loss) - 1) is the loss itself where it is large; none is taken for less than 1e-9
        return np.array([-loss if loss > 40 else -np.log(np.expm1(max(loss, 1e-9))) for loss in losses])

    damage = np.stack([margin(before) - margin(losses) for losses in after], 1)
    found = table.query("scale == 'margin' and without == ''")
    assert found["size"].item() == pytest.approx((damage**2).mean() ** 0.5)
    assert found["block"].item() == pytest.approx(measurements.variance_parts(damage)["block"])


@pytest.mark.parametrize("network", ["resnet14", "resnet14-post"])
def test_descent_is_at_the_sum_before_a_relu(network):
    chain, data = build(network, "digits", seed=1), digits()
    chain = measurements.lesion.reestimate_batch_norm(chain, data.train.take(torch.arange(100)))
    test = data.test.take(torch.arange(30))
    table = measurements.size_and_direction(chain, test, data, 0)
    ((x, y),) = test.batches()
    for i, unit in enumerate(chain.units):
        state = chain.trace(x)[i].detach()
        f, skip = unit.branch(state).detach(), unit.skip(state).detach()

        def loss(total, unit=unit, i=i):
            state = unit.post(total)
            for later in chain.units[i + 1 :]:
                state = later(state)
            return torch.nn.functional.cross_entropy(chain.head(state), y, reduction="sum")

        gradient = torch.func.grad(loss)(f + skip)
        cosine = [torch.nn.functional.cosine_similarity(f.flatten(1), g.flatten(1)).mean() for g in (-gradient, skip)]
        assert table.loc[i, ["descent", "cosine"]].tolist() == pytest.approx([c.item() for c in cosine], abs=1e-5)


def test_spectra_at_the_weights_share_one_gradient():
    chain, data = build("resnet8", "digits", seed=1), digits()
    chain = measurements.lesion.reestimate_batch_norm(chain, data.train.take(torch.arange(100)))
    few = data.test.take(torch.arange(70))
    table = measurements.spectrum_of_batches(chain, few, replace(data, train=few), 0, at_weights=True)
    x, y = few.batches(64)[0]
    by_length = measurements.paths.weight_spectrum(chain, x, y).groupby("length")
    first = table.query("split == 'test' and batch == 0")
    assert first["share"].sum() == pytest.approx(1)
    assert first["share"].tolist() == pytest.approx(by_length["share"].sum().tolist())
    assert first["norm"].tolist() == pytest.approx([np.linalg.norm(norms) for _, norms in by_length["norm"]])
    assert table.groupby("split")["batch"].unique().map(list).to_dict() == {"test": [0, 1], "train": [0, 1]}


def test_thousands_of_lesions_use_a_fixed_part_of_a_large_test_split():
    chain, data = build("resnet8", "digits"), digits()
    assert measurements.some(chain, data)[1] == "all 500 test images"
    few = torch.cat([torch.nonzero(data.test.labels == label).flatten()[:1].expand(210) for label in range(10)])
    many = Dataset("digits", data.train, data.validation, data.test.take(few), data.classes, "digits")
    part, words = measurements.some(chain, many)
    assert part.labels.bincount().tolist() == [100] * 10
    assert words == "the first 100 test images of every class"


def test_a_measurement_that_does_not_apply_or_weights_of_another_network_are_refused(runs, tmp_path, capsys):
    weights = runs / TOY[0].folder / "weights.safetensors"
    ask = ["--weights", str(weights), "--out", str(tmp_path / "cell.csv"), "--what"]
    assert measure.main(["--network", "resnet8", *ask, "subnetworks"]) == 2
    assert measure.main(["--network", "resnet8", "--seed", "1", *ask, "intact"]) == 2
    assert measure.main(["--network", "resnet20", *ask, "intact"]) == 2
    said = capsys.readouterr().err
    assert all(text in said for text in ("does not apply to resnet8", "has seed 0, not 1", "has network resnet8, not"))
    assert not list(tmp_path.iterdir())
    write_tensors(tmp_path / "bare.safetensors", {"weight": torch.zeros(1)}, {"format": "unravelling/1"})
    ask[1] = str(tmp_path / "bare.safetensors")
    assert measure.main(["--network", "resnet8", *ask, "intact"]) == 2
    assert "bare.safetensors has dataset None, not digits" in capsys.readouterr().err


def test_several_networks_make_one_cell(runs, tmp_path):
    files = [str(runs / row.folder / "weights.safetensors") for row in TOY]
    out = tmp_path / "ensemble.csv"
    assert measure.main(["--network", "resnet8x2", "--what", "ensemble", "--weights", *files, "--out", str(out)]) == 0
    table = pd.read_csv(out)
    assert table.groupby("removed").size().to_dict() == {0: 1, 1: 2}
    alone = [pd.read_csv(runs / row.folder / "intact.csv")["error"].item() for row in TOY]
    assert sorted(table.query("removed == 1")["error"]) == pytest.approx(sorted(alone))
    assert json.loads(out.with_suffix(".json").read_text())["weights"] == " ".join(
        cells.checksum(Path(f)) for f in files
    )


@pytest.mark.parametrize(
    ("network", "number", "message"),
    [
        ("nonsense", 2, "2 different files with resnet8 are resnet8x2"),
        ("resnet8x3", 2, "2 different files with resnet8 are resnet8x2"),
        ("resnet8x2", 1, "has network resnet8, not resnet8x2"),
        ("resnet8", 1, "takes several networks, or one whose members were trained as one"),
    ],
)
def test_an_ensemble_is_called_what_it_is(runs, tmp_path, capsys, network, number, message):
    files = [str(runs / row.folder / "weights.safetensors") for row in TOY][:number]
    files += files[:1] * (number == 1)  # the same one twice
    asked = ["--network", network, "--what", "ensemble", "--weights", *files, "--out", str(tmp_path / "cell.csv")]
    assert measure.main(asked) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_members_of_a_joint_network_make_the_same_table(tmp_path):
    joint, test = build("resnet8-joint2", "digits", width=2), digits().test
    table = measurements.without_members([joint], test)
    separate = [build("resnet8", "digits", width=2, seed=seed) for seed in (0, 1)]
    pd.testing.assert_frame_equal(table, measurements.without_members(separate, test))
    assert table["error"][0] == evaluate(joint, test)["error"]
    assert measurements.applicable(joint) == ["ensemble"]


def test_a_joint_network_is_measured_under_its_own_seed(tmp_path, capsys):
    about = {"dataset": "digits", "recipe": "digits", "seed": 0}
    joint = save(build("resnet8-joint2", "digits"), tmp_path / "w.safetensors", **about)
    asked = ["--network", "resnet8-joint2", "--what", "ensemble", "--weights", str(joint), "--out"]
    assert measure.main([*asked, str(tmp_path / "cell.csv"), "--seed", "1"]) == 2
    assert "has seed 0, not 1" in capsys.readouterr().err
    assert measure.main([*asked, str(tmp_path / "cell.csv")]) == 0


# training and cells


def test_a_cell_says_how_it_was_made(runs):
    folder = runs / TOY[0].folder
    record = json.loads((folder / "intact.json").read_text())
    chain = load(folder / "weights.safetensors")
    assert record["weights"] == cells.checksum(chain.state_dict()) == cells.checksum(folder / "weights.safetensors")
    assert record["images"] == "all 500 test images; statistics from 1000 training images"
    assert record["hardware"].endswith("1 threads")
    assert "it's" not in json.dumps(record)
    table = pd.read_csv(folder / "intact.csv")
    assert list(table.columns[:4]) == cells.KEYS
    scores = pd.read_csv(folder / "networks.csv")
    assert table["error"].item() == scores["test_error"].item()
    assert sorted(p.name for p in folder.iterdir() if p.suffix not in (".csv", ".json")) == ["weights.safetensors"]


def test_one_line_an_epoch_and_what_is_done_is_left(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(RECIPES, "digits", replace(RECIPES["digits"], epochs=2))
    trained(tmp_path)
    assert [line for line in capsys.readouterr().out.splitlines() if "epoch" in line and " of 2, " in line][1:]
    before = contents(tmp_path)
    trained(tmp_path)
    assert capsys.readouterr().out.count("done already") == 2
    assert contents(tmp_path) == before


def test_a_damaged_checkpoint_costs_one_epoch(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(RECIPES, "digits", replace(RECIPES["digits"], epochs=3))
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    trained(whole)
    checkpoint, kept = broken / TOY[0].folder / "checkpoint.pt", train._write

    def stop(*arguments):
        raise OSError("the disk is full")

    monkeypatch.setattr(train, "_write", stop)
    out = broken / TOY[0].folder / "weights.safetensors"
    assert train.main(words(TOY[0], "--out", out)) == 2
    monkeypatch.setattr(train, "_write", kept)
    content = bytearray(checkpoint.read_bytes())
    content[len(content) // 2] ^= 1
    checkpoint.write_bytes(content)
    (checkpoint.parent / ".checkpoint.pt.123").write_text("half")
    previous = checkpoint.with_suffix(".previous.pt")
    whole_before = previous.read_bytes()
    previous.write_bytes(whole_before[:-1000])
    assert train.main(words(TOY[0], "--out", out)) == 2
    assert "checkpoint.previous.pt cannot be read" in capsys.readouterr().err
    assert checkpoint.read_bytes() == content  # for whoever can save it
    previous.write_bytes(whole_before)
    trained(broken)
    said = capsys.readouterr().out
    assert "going on from the one before it" in said
    tables = [{k: v for k, v in contents(folder).items() if not k.endswith(".json")} for folder in (whole, broken)]
    assert tables[0] == tables[1]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A row that was stopped between its last epoch and its tables."""
    folder = tmp_path_factory.mktemp("stopped")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(RECIPES, "digits", replace(RECIPES["digits"], epochs=1))
        patch.setattr(train, "_write", lambda *arguments: (_ for _ in ()).throw(OSError("the disk is full")))
        assert train.main(words(TOY[0], "--out", folder / "weights.safetensors")) == 2
    return folder


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("checkpoint.epochs.json", b"[1, "),
        ("checkpoint.epochs.json", b"\xff"),
        ("checkpoint.1.gradient_norms.csv", b""),
        ("checkpoint.1.gradient_norms.csv", b"\xff\xfe\0"),
        ("checkpoint.1.gradient_norms.csv", b"state,gradient_norm,epoch\n0,0.5,1\n1,0."),
        ("checkpoint.0.spectrum_training.csv", b"a,b\n1,2\n3,4,5\n"),
    ],
)
def test_a_broken_file_beside_the_checkpoint_is_named(name, content, stopped, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(RECIPES, "digits", replace(RECIPES["digits"], epochs=1))
    shutil.copytree(stopped, tmp_path / "row")
    (tmp_path / "row" / name).write_bytes(content)
    assert train.main(words(TOY[0], "--out", tmp_path / "row/weights.safetensors")) == 2
    said = capsys.readouterr().err
    assert f"{name}" in said
    assert "broken" in said
    assert "delete" in said
    (tmp_path / "row" / name).unlink()  # as it says
    assert train.main(words(TOY[0], "--out", tmp_path / "row/weights.safetensors")) == 0


def test_a_training_that_diverges_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(RECIPES, "digits", replace(RECIPES["digits"], epochs=1, lr=1e30))
    assert train.main(words(TOY[0], "--out", tmp_path / "weights.safetensors")) == 2
    assert "diverged" in capsys.readouterr().err
    assert not [path for path in tmp_path.iterdir() if not path.name.startswith("checkpoint.")]


def test_the_record_names_the_hardware_of_every_epoch(stopped, tmp_path, monkeypatch):
    monkeypatch.setitem(RECIPES, "digits", replace(RECIPES["digits"], epochs=1))
    shutil.copytree(stopped, tmp_path / "row")
    progress = tmp_path / "row/checkpoint.epochs.json"
    (seconds, here) = json.loads(progress.read_text())[0]
    progress.write_text(json.dumps([(1000, "another machine"), (seconds, here)]))
    assert train.main(words(TOY[0], "--out", tmp_path / "row/weights.safetensors")) == 0
    record = json.loads((tmp_path / "row/training.json").read_text())
    assert record["hardware"] == f"another machine; {here}"
    assert 1000 < record["seconds"] < 1000 + 600


def test_units_are_compiled_for_the_training_alone(monkeypatch):
    import torch._dynamo

    chain, asked = build("resnet8", "digits"), []
    names, limit = list(chain.state_dict()), torch._dynamo.config.recompile_limit
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **options: asked.append(module))
    with train._compiled(chain, True):
        assert asked == list(chain.units)
        assert torch._dynamo.config.recompile_limit == 64
        assert list(chain.state_dict()) == names
    assert torch._dynamo.config.recompile_limit == limit


def test_commands_are_quoted_and_name_no_folder_of_one_machine(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/train.py"])
    inside = str(ROOT / "runs/it's here/w.safetensors")
    text = cells.command(["--out", "/net/it's there/w", "--data=/secret", "--checkpoint", inside, "--network", "a b"])
    expected = ["python", "experiments/train.py", "--out", "PATH", "--data=PATH", "--checkpoint"]
    assert shlex.split(text) == [*expected, "runs/it's here/w.safetensors", "--network", "a b"]


def test_paths_that_lead_nowhere_are_no_end_of_a_long_run(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    text = cells.command(["--data=~nobody-of-this-name/x", "--data", f"{tmp_path}/loop/x", "--out", "~/x", "--seed="])
    assert text == "python experiments/train.py --data=PATH --data PATH --out PATH --seed="


def test_the_commit_is_of_this_project_alone(tmp_path, monkeypatch):
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@example.org", "-C", str(tmp_path)]
    subprocess.run([*git, "init", "--quiet"], check=True, timeout=60)
    subprocess.run([*git, "commit", "--quiet", "--allow-empty", "-m", "x"], check=True, timeout=60)
    inner = tmp_path / "project"
    inner.mkdir()
    for folder in (inner, tmp_path.resolve()):  # beneath another project's repository; one that lacks our files
        monkeypatch.setattr(cells, "ROOT", folder)
        assert cells.commit() == "unknown"
    monkeypatch.undo()
    own = cells.commit()
    monkeypatch.setenv("GIT_DIR", str(tmp_path / ".git"))  # as in a hook of another repository
    assert cells.commit() == own


def test_the_commit_says_when_code_has_changed_since(tmp_path, monkeypatch):
    project = tmp_path.resolve()
    library = project / "lib/unravelling/__init__.py"
    library.parent.mkdir(parents=True)
    library.write_text("")
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@example.org", "-C", str(project)]
    for words_ in (["init", "--quiet"], ["add", "lib"], ["commit", "--quiet", "-m", "x"]):
        subprocess.run([*git, *words_], check=True, timeout=60)
    monkeypatch.setattr(cells, "ROOT", project)
    monkeypatch.setattr(cells.unravelling, "__file__", str(library))
    (project / "notes.txt").write_text("no code")
    clean = cells.commit()
    assert len(clean) == 12
    (library.parent / "new.py").write_text("")
    assert cells.commit() == f"{clean}+"


def test_the_record_is_there_before_its_table(tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(cells, "write_atomically", lambda path, write: written.append(path.name))
    options = cells.parser("", ".csv").parse_args(["--network", "resnet8", "--device", "cpu", "--out", "cell.csv"])
    cells.write(pd.DataFrame({"error": [0.5]}), tmp_path / "cell.csv", options, {})
    assert written == ["cell.json", "cell.csv"]


def test_jobs_share_the_gpus_out(monkeypatch):
    number = 100 + os.getpid() % 1000  # locks that no other test holds
    monkeypatch.setattr(torch.cuda, "device_count", lambda: number + 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cells, "range", lambda count: range(number, count), raising=False)
    monkeypatch.setattr(cells, "_held", [])
    assert [cells._device("auto") for _ in range(3)] == [f"cuda:{number}", f"cuda:{number + 1}", "cuda:0"]
    for lock in cells._held:
        lock.release()
    assert cells._device("auto") == f"cuda:{number}"


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--device", "cuda:99"),
        ("--device", "tpu"),
        ("--device", ""),
        ("--device", "hpu"),
        ("--device", "meta"),
        ("--threads", "0"),
        ("--threads", "99999999999"),
        ("--seed", "-1"),
        ("--seed", "99999999999999999999"),
        ("--data", "~nobody-of-this-name/images"),
        ("--out", "w.pt"),
        ("--out", ""),
        ("--out", "."),
        ("--network", "rasnet8"),
        ("--data", "nowhere"),
    ],
)
def test_bad_input_gets_a_message_and_status_2(option, value, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = {"--network": "resnet8", "--out": str(tmp_path / "w.safetensors"), "--dataset": "digits"}
    options |= {option: value} | ({"--dataset": "cifar10"} if option == "--data" else {})
    assert train.main([word for pair in options.items() for word in pair]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert value in said
    assert not list(tmp_path.iterdir())


def test_a_folder_is_no_file(tmp_path, capsys):
    (tmp_path / "w.safetensors").mkdir()
    assert train.main(words(TOY[0], "--out", tmp_path / "w.safetensors")) == 2
    assert "expected a file, no folder" in capsys.readouterr().err


@pytest.mark.parametrize("seed", ["0-3", "1.5", ""])
def test_a_seed_is_one_number(seed, capsys):
    with pytest.raises(SystemExit, match="2"):
        train.main(["--network", "resnet8", f"--seed={seed}", "--out", "w.safetensors"])
    assert f"--seed: invalid int value: {seed!r}" in capsys.readouterr().err


@pytest.mark.parametrize("content", [None, b"no weights"])
def test_weights_that_cannot_be_read_are_named(content, tmp_path, capsys):
    file = tmp_path / "w.safetensors"
    if content:
        file.write_bytes(content)
    out = tmp_path / "cell.csv"
    assert measure.main(words(TOY[0], "--what", "intact", "--weights", file, "--out", out)) == 2
    assert "w.safetensors" in capsys.readouterr().err


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="nothing says that a process loads PyTorch")
@pytest.mark.parametrize("script", ["train", "measure", "collect"])
def test_ctrl_c_while_pytorch_loads_needs_no_traceback(script):
    command = [sys.executable, ROOT / f"experiments/{script}.py", "--help"]
    started = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    until(lambda: "libtorch" in Path(f"/proc/{started.pid}/maps").read_text())
    started.send_signal(signal.SIGINT)
    said, _ = started.communicate(timeout=60)
    assert started.returncode == -signal.SIGINT
    assert said == ""


# the collector


def test_rows_go_in_and_nothing_else_is_touched(runs, data):
    networks, before = data / "results/digits/networks.csv", contents(data)
    same_name = "digits,resnet8,0,digits-short-paths," + ",".join("1" * 10)  # another recipe
    networks.write_bytes(networks.read_bytes() + same_name.encode() + b"\n")
    os.link(networks, data / "link")
    assert collect.collect(TOY, runs, data) == []
    assert (data / "link").read_text().endswith(same_name + "\n")  # the old file is replaced, not written into
    (data / "link").unlink()
    after = contents(data)
    assert same_name in after["results/digits/networks.csv"].decode().splitlines()
    for name, content in before.items():
        if name.endswith(".csv"):
            old, new = content.decode().splitlines(), after[name].decode().splitlines()
            assert [line for line in new if ",resnet8," not in line] == old, name
        elif name not in ("results/digits/provenance.json", "RUNS.md"):
            assert after[name] == content, name
    old, new = (json.loads(c["results/digits/provenance.json"]) for c in (before, after))
    for name, made in old.items():
        assert all(run in new[name] for run in made)
    stored = pd.read_csv(networks).query("network == 'resnet8' and recipe == 'digits'")
    assert stored["test_error"].tolist() == [pd.read_csv(runs / r.folder / "networks.csv").test_error[0] for r in TOY]
    made = [run for run in new["intact.csv"] if "resnet8-seed1-digits" in run["seconds"]]
    assert made[0]["weights"]["resnet8-seed1-digits"] == cells.checksum(runs / TOY[1].folder / "weights.safetensors")
    assert set(after) - set(before) == {"weights/digits/resnet8-seed0.safetensors"}


def test_weights_that_are_damaged_or_not_the_measured_ones_stay_outside(runs, tmp_path):
    own = tmp_path / "runs" / TOY[0].folder / "weights.safetensors"
    shutil.copytree(runs, tmp_path / "runs")
    content = own.read_bytes()
    about = {"dataset": "digits", "recipe": "digits", "seed": 0}
    other = save(build("resnet8", "digits", seed=9), tmp_path / "o.safetensors", **about)
    for bad, message in (
        (content[:-50] + bytes([content[-50] ^ 1]) + content[-49:], "weights.safetensors is damaged: its content does"),
        (b"junk", "weights.safetensors is truncated or no safetensors file"),
        ((runs / TOY[1].folder / "weights.safetensors").read_bytes(), "weights.safetensors has seed 1, not 0"),
        (other.read_bytes(), "weights.safetensors is not what its cells were measured on"),
    ):
        own.write_bytes(bad)
        (refused,) = collect.collect(TOY, tmp_path / "runs", tmp_path / "data")
        assert message in refused
        assert not list((tmp_path / "data/weights").rglob("*.safetensors"))
    own.write_bytes(content)
    assert collect.collect(TOY, tmp_path / "runs", tmp_path / "data") == []
    assert (tmp_path / "data/weights/digits/resnet8-seed0.safetensors").read_bytes() == content


def test_twice_is_once_and_the_order_does_not_matter(runs, tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    collect.collect(TOY, runs, one)
    first = contents(one)
    stamps = {path: path.stat().st_mtime_ns for path in one.rglob("*.*")}
    assert collect.collect(TOY, runs, one) == []
    assert {path: path.stat().st_mtime_ns for path in one.rglob("*.*")} == stamps
    for row in reversed(TOY):
        collect.collect([row], runs, other)
    assert contents(other) == first


def test_killed_at_any_write_the_next_call_completes_it(runs, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def dying(number, function):
        count = iter(range(10**6))

        def call(*arguments, **options):
            if next(count) == number:
                raise Killed
            return function(*arguments, **options)

        return call

    collect.collect(TOY[:1], runs, tmp_path / "before")
    before = contents(tmp_path / "before")
    shutil.copytree(tmp_path / "before", tmp_path / "after")
    collect.collect(TOY, runs, tmp_path / "after")
    after = contents(tmp_path / "after")
    moments = 0
    writes = ((Path, "write_text"), (pd.DataFrame, "to_csv"), (os, "replace"), (Path, "unlink"), (shutil, "rmtree"))
    for owner, name in writes:
        for number in range(100):
            folder = tmp_path / f"{name}{number}"
            shutil.copytree(tmp_path / "before", folder)
            with monkeypatch.context() as patch:
                patch.setattr(owner, name, dying(number, getattr(owner, name)))
                try:
                    collect.collect(TOY, runs, folder)
                    break
                except Killed:
                    moments += 1
            seen = {k: v for k, v in contents(folder).items() if not k.startswith(".")}
            assert all(content in (before.get(path), after[path]) for path, content in seen.items())
            collect.collect(TOY, runs, folder)
            assert contents(folder) == after
    assert moments > 10


def test_results_on_other_weights_are_refused_by_name(runs, tmp_path, monkeypatch):
    monkeypatch.setitem(RECIPES, "digits", replace(RECIPES["digits"], epochs=2))
    data, again = tmp_path / "data", tmp_path / "again"
    collect.collect(TOY, runs, data)
    before = contents(data)
    trained(again, replace(TOY[0], measurements=()))
    (refused,) = collect.collect(TOY, again, data)
    assert "intact.csv belongs to other weights" in refused
    assert contents(data) == before
    cell = runs / TOY[0].folder
    for suffix in ("csv", "json"):
        shutil.copy(cell / f"intact.{suffix}", again / TOY[0].folder)
    (refused,) = collect.collect(TOY, again, data)
    assert "measured on different weights" in refused
    assert contents(data) == before
    (again / TOY[0].folder / "intact.csv").unlink()
    trained(again)
    assert collect.collect(TOY[:1], again, data) == []  # all that was stored of the row is measured anew
    assert cells.checksum(data / "weights/digits/resnet8-seed0.safetensors") != cells.checksum(
        cell / "weights.safetensors"
    )


def test_cells_of_another_row_are_refused(runs, tmp_path):
    shutil.copytree(runs / TOY[1].folder, tmp_path / "runs" / TOY[0].folder)
    (refused,) = collect.collect(TOY, tmp_path / "runs", tmp_path / "data")
    assert "networks.csv is about another network, seed or recipe" in refused
    assert set(contents(tmp_path / "data")) == {"RUNS.md"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("results/digits/intact.csv", "dataset,network,seed,recipe,error\ndigits,resnet8,0", r"intact\.csv, line 2 is"),
        ("results/digits/intact.csv", "<<<<<<< HEAD\n", r"intact\.csv, line 1 is broken: restore the file"),
        ("results/digits/intact.csv", "", r"intact\.csv, line 1 is broken"),
        ("results/digits/intact.csv", HEAD + ",error,error\n", r"intact\.csv, line 1 is broken"),
        ("results/digits/intact.csv", HEAD + "\n\udcff\n", r"intact\.csv, line \d is broken"),
        ("results/digits/intact.csv", HEAD + '\ndigits,resnet8,0,digits\ndigits,resnet8,"0', r"intact\.csv, line 3 is"),
        ("results/digits/intact.csv", HEAD + "\ndigits,resnet8,x,digits\n", r"intact\.csv, line 2 is broken"),
        ("results/digits/intact.csv", HEAD + f"\n{'a' * 200_000},b,1,c\n", r"intact\.csv, line 2 is broken"),
        ("results/cifar10/networks.csv", HEAD + "\ncifar10,resnet20,0,short\n", r"cifar10/networks\.csv and prov"),
        ("results/cifar10/networks.csv", HEAD + ",test_error,test_images\ncifar10,resnet20,0,short,0.1,9\n",
         r"cifar10/networks\.csv and provenance\.json do not fit together .*restore both, as by git checkout"),
        ("results/cifar10/networks.csv", HEAD + "\ndigits,resnet20,0,short\n", r"cifar10/networks\.csv and proven"),
        ("results/digits/provenance.json", '{\n "a.csv": [\n', r"provenance\.json, line 3 is broken .*: restore"),
        ("results/digits/provenance.json", "\udcff", r"provenance\.json, line 1 is broken .*: restore"),
        ("results/digits/provenance.json", "[]", r"provenance\.json is no record of tables: restore"),
        ("results/digits/provenance.json", '{"a.csv": 3}', r"provenance\.json is no record of tables: restore"),
        ("results/digits/provenance.json", '{"a.csv": [{}]}', r"provenance\.json is no record of tables: restore"),
    ],
)  # fmt: skip
def test_a_broken_file_is_named_with_its_line_and_nothing_changes(name, content, message, runs, tmp_path):
    path = tmp_path / "data" / name
    path.parent.mkdir(parents=True)
    path.write_text(content, errors="surrogateescape")
    with pytest.raises(ValueError, match=message) as caught:
        collect.collect(TOY, runs, tmp_path / "data")
    assert str(path.parent) in str(caught.value), "where it is, and not where it was copied to"
    assert contents(tmp_path / "data") == {name: content.encode(errors="surrogateescape")}


@pytest.mark.parametrize(
    "content",
    ['{"sha256": ', "{}", "[]", "3", None, {"seconds": "1"}, {"seconds": None}, {"weights": ["a"]}, {"hardware": 3}],
)
def test_a_cell_without_its_record_is_refused(content, runs, tmp_path):
    shutil.copytree(runs, tmp_path / "runs")
    record = tmp_path / "runs" / TOY[0].folder / "intact.json"
    if isinstance(content, dict):
        content = json.dumps(json.loads(record.read_text()) | content)
    record.write_text(content) if content else record.unlink()
    (refused,) = collect.collect(TOY, tmp_path / "runs", tmp_path / "data")
    assert "intact.csv" in refused
    assert "delete both, measure again" in refused


def test_a_cell_without_rows_is_refused_and_a_pipe_is_none(runs, tmp_path):
    shutil.copytree(runs, tmp_path / "runs")
    path = tmp_path / "runs" / TOY[0].folder / "intact.csv"
    path.write_text(path.read_text().splitlines()[0] + "\n")
    record = json.loads(path.with_suffix(".json").read_text())
    path.with_suffix(".json").write_text(json.dumps(record | {"sha256": hashlib.sha256(path.read_bytes()).hexdigest()}))
    (refused,) = collect.collect(TOY[:1], tmp_path / "runs", tmp_path / "data")
    assert "intact.csv is about another network, seed or recipe, or holds nothing" in refused
    path.unlink()
    os.mkfifo(path)
    assert collect.collect(TOY[:1], tmp_path / "runs", tmp_path / "data") == []
    assert not (tmp_path / "data/results/digits/intact.csv").exists()


def test_rows_may_be_named_as_a_shell_completes_them_and_runs_must_be_there(runs, tmp_path, capsys):
    where = ["--data", str(tmp_path / "data"), "--runs"]
    assert collect.main([f"{TOY[0].folder}/", *where, str(runs)]) == 0
    assert "resnet8,0," in (tmp_path / "data/results/digits/intact.csv").read_text()
    assert collect.main([f"{TOY[0].folder}", *where, str(tmp_path / "nowhere")]) == 2
    assert f"{tmp_path / 'nowhere'} has no run of any row asked for" in capsys.readouterr().err
    assert collect.main([f"{TOY[0].folder}9", *where, str(runs)]) == 2
    assert "config.yaml has no row" in capsys.readouterr().err


def test_a_broken_configuration_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(matrix, "__file__", str(tmp_path / "matrix.py"))
    (tmp_path / "config.yaml").write_text("paper:\n  rows: [\n")
    assert collect.main(["--runs", str(tmp_path), "--data", str(tmp_path / "data")]) == 2
    said = capsys.readouterr().err
    assert "config.yaml" in said
    assert "line 3" in said


def test_a_cell_that_was_changed_is_named(runs, tmp_path):
    shutil.copytree(runs, tmp_path / "runs")
    path = tmp_path / "runs" / TOY[0].folder / "intact.csv"
    path.write_text(path.read_text().replace("500", "501"))
    (refused,) = collect.collect(TOY[:1], tmp_path / "runs", tmp_path / "data")
    assert "intact.csv is not what was measured" in refused
    assert set(contents(tmp_path / "data")) == {"RUNS.md"}


def test_weights_are_halved_where_large_and_refused_where_too_large(runs, tmp_path, monkeypatch):
    path = tmp_path / "data/weights/digits/resnet8-seed0.safetensors"
    for limit, named in (("LIMIT", "all would have"), ("FILE_LIMIT", "resnet8-seed0.safetensors would have")):
        with monkeypatch.context() as patch:
            patch.setattr(collect, limit, 10_000)
            with pytest.raises(ValueError, match=named):
                collect.collect(TOY, runs, tmp_path / "data")
        assert not contents(tmp_path / "data")
    assert collect.collect(TOY, runs, tmp_path / "full") == []
    full = contents(tmp_path / "full")
    monkeypatch.setattr(collect, "HALF_LIMIT", 10_000)
    assert collect.collect(TOY, runs, tmp_path / "full") == []
    assert contents(tmp_path / "full") == full  # the same network stays as it was shipped
    assert collect.collect(TOY, runs, tmp_path / "data") == []
    source = runs / TOY[0].folder / "weights.safetensors"
    assert collect.header(path)["half"] is True
    assert collect.header(path)["source"] == cells.checksum(source)
    assert path.stat().st_size < 0.6 * source.stat().st_size
    before = contents(tmp_path / "data")
    assert collect.collect(TOY, runs, tmp_path / "data") == []
    assert contents(tmp_path / "data") == before


def test_a_copy_in_half_precision_is_measured_as_what_it_was_made_from(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(collect, "HALF_LIMIT", 10_000)
    folder, copied = runs / TOY[0].folder, tmp_path / "runs" / TOY[0].folder
    collect.collect(TOY[:1], runs, tmp_path / "data")
    copied.mkdir(parents=True)
    shutil.copy(tmp_path / "data/weights/digits/resnet8-seed0.safetensors", copied / "weights.safetensors")
    asked = ["--what", "intact", "--weights", copied / "weights.safetensors", "--out", copied / "intact.csv"]
    assert measure.main(words(TOY[0], *asked)) == 0
    record = json.loads((copied / "intact.json").read_text())
    assert record["weights"] == cells.checksum(folder / "weights.safetensors")
    assert record["halved"] == cells.checksum(copied / "weights.safetensors") != record["weights"]
    assert "halved" not in json.loads((folder / "intact.json").read_text())
    assert collect.collect(TOY[:1], tmp_path / "runs", tmp_path / "data") == []  # beside the tables of its training
    assert collect.collect(TOY[:1], tmp_path / "runs", tmp_path / "anew") == []
    home = "weights/digits/resnet8-seed0.safetensors"
    assert (tmp_path / "data" / home).read_bytes() == (tmp_path / "anew" / home).read_bytes()


def test_weights_of_another_recipe_stay(runs, data):
    home = data / "weights/digits/resnet8-seed0.safetensors"
    save(build("resnet8", "digits"), home, recipe="short", seed=0)
    content = home.read_bytes()
    (refused,) = collect.collect(TOY, runs, data)
    assert "holds recipe short: delete it if it may go" in refused
    assert home.read_bytes() == content


def test_a_folder_without_runs_is_named(runs, tmp_path, capsys):
    assert collect.main(["--runs", str(runs / "digits"), "--data", str(tmp_path / "data")]) == 2
    assert "has no run of any row asked for: say by --runs where the runs are" in capsys.readouterr().err


def test_two_collectors_wait_for_each_other(runs, tmp_path):
    (tmp_path / "data").mkdir()
    with FileLock(tmp_path / "data/.lock"):
        other = threading.Thread(target=collect.collect, args=(TOY, runs, tmp_path / "data"))
        other.start()
        other.join(1)
        assert other.is_alive()
        assert not contents(tmp_path / "data")
        meanwhile = tmp_path / "data/results/digits/meanwhile.csv"
        meanwhile.parent.mkdir(parents=True)
        meanwhile.write_text("dataset,network,seed,recipe\n")
    other.join(60)
    assert "RUNS.md" in contents(tmp_path / "data")
    assert meanwhile.exists()  # the collector looked only when it had the lock


def test_a_page_names_each_kind_of_hardware_once():
    row = matrix.Row("cifar10", "resnet20", 0, "short")
    kinds = {"networks": "a GPU; 8 threads", "intact": "8 threads", "reorder": "8 threads; 2 threads"}
    record = {
        f"{name}.csv": [{"seconds": {str(row): 60.0}, "hardware": hardware, "commit": "c", "data": "CIFAR-10"}]
        for name, hardware in kinds.items()
    }
    networks = pd.DataFrame([["cifar10", "resnet20", "0", "short", "0.1", "1000"]])
    networks.columns = [*cells.KEYS, "test_error", "test_images"]
    (line,) = [line for line in collect._page(record, networks).splitlines() if "| resnet20 | 0 | short |" in line]
    assert line.split(" | ")[6:] == ["a GPU; 8 threads; 2 threads", "1 + 2", "c |"]


def test_the_committed_page_is_what_the_committed_data_give():
    page = collect.runs_page(ROOT / "data")
    assert (ROOT / "data/RUNS.md").read_text(encoding="utf-8") == page
    assert "| 1 | resnet110 | 0 | short |" in page


@pytest.mark.parametrize("dataset", ["digits", "cifar10"])
def test_results_name_the_weights_they_were_measured_on(dataset):
    record = json.loads((ROOT / "data/results" / dataset / "provenance.json").read_text(encoding="utf-8"))
    known = {str(row): row for target in matrix.TARGETS for row in matrix.rows(CONFIG, target)}
    for name, made in record.items():
        for run in made:
            if run["command"].startswith("python experiments/"):  # older ones have no checksum
                assert set(run["weights"]) == set(run["seconds"]), name
            for row, weights in run.get("weights", {}).items():
                shipped = collect._shipped(known[row], ROOT / "data") if row in known else None
                assert shipped in (None, weights), (name, row)


# Snakemake


def snakemake(folder, *words, **more):
    config = ["--config", f"runs={folder / 'runs'}", f"data={folder / 'data'}"]
    command = [
        sys.executable,
        "-m",
        "snakemake",
        "-s",
        ROOT / "experiments/Snakefile",
        "--directory",
        folder,
        "-c",
        "2",
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "lib"), "OMP_NUM_THREADS": "1"}
    environment.pop("MAKELEVEL", None)
    return subprocess.Popen(
        [*map(str, command), *map(str, words), *config],
        env=environment | more,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # signals reach Snakemake alone, as from another terminal
    )


def until(condition, seconds=240):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened in time"
        time.sleep(0.02)


def epochs_of(row):
    progress = row / "checkpoint.epochs.json"
    return len(json.loads(progress.read_text())) if progress.exists() else 0


@needs_snakemake
@pytest.mark.parametrize("first", [0, 1])
def test_a_row_is_collected_with_what_it_asks_for_wherever_it_is_a_member(first, tmp_path):
    lines = [{"network": "resnet8", "seeds": [0], "measure": ["intact"]}]
    lines.insert(first, {"network": "resnet8", "seeds": [0], "members": 2, "measure": ["ensemble"]})
    other = tmp_path / "other.yaml"
    other.write_text(yaml.safe_dump({"toy": {"rows": lines}}))
    said, _ = snakemake(tmp_path, "toy", "--configfile", other, "--dry-run", "--quiet", "host").communicate(timeout=240)
    collected = re.findall(r"rule collect:\s+input: (.*)\n\s+output: .*/(\S+)/collected", said)
    wanted = {name: {Path(path).name for path in paths.split(", ")} for paths, name in collected}
    assert wanted["resnet8-seed0"] == {"weights.safetensors", "intact.csv"}, said
    assert wanted["resnet8x2-seed0"] == {"weights.safetensors", "ensemble.csv"}
    assert len(re.findall(r"^rule train:", said, re.M)) == 2


@needs_snakemake
def test_killed_in_every_way_it_leaves_no_orphan_and_ends_with_the_same_bytes(tmp_path):
    import psutil

    folder = tmp_path / "it's a place"
    folder.mkdir()
    row = folder / "runs" / TOY[0].folder
    (folder / "runs").mkdir()
    with FileLock(folder / "runs/.lock"):
        second = snakemake(folder, row / "collected")
        assert "another run is at work" in second.communicate(timeout=240)[0]
    assert second.returncode
    assert not row.exists()
    for kind in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        before, started = epochs_of(row), snakemake(folder, row / "collected")
        until(lambda before=before: epochs_of(row) > before)
        children = psutil.Process(started.pid).children(recursive=True)
        assert any("train.py" in " ".join(child.cmdline()) for child in children)
        with pytest.raises(Timeout):  # held for as long as the run lasts
            FileLock(folder / "runs/.lock").acquire(timeout=0)
        started.send_signal(kind)
        started.wait(120)
        _, alive = psutil.wait_procs(children, timeout=60)
        assert not alive
        assert not list(row.glob(".*"))  # no half file
        with FileLock(folder / "runs/.lock", timeout=0):
            pass
        if (row / "weights.safetensors").exists():  # this process stalled, and the training was through before a signal
            break
    finished = snakemake(folder, row / "collected")
    said, _ = finished.communicate(timeout=240)
    assert finished.returncode == 0, said
    expected, found = contents(trained(tmp_path / "runs")), contents(folder / "runs")
    for name, content in expected.items():
        if not name.endswith(".json"):
            assert found.pop(name) == content, name
    assert {Path(name).name for name in found if not name.endswith(".json")} == {"collected"}
    assert pd.read_csv(folder / "data/results/digits/intact.csv")["seed"].tolist() == [0]
    assert str(folder) not in (folder / "data/results/digits/provenance.json").read_text()
    for gone in (False, True):  # what is there is not made again for a time stamp; what is missing is, though collected
        os.utime(row / "weights.safetensors")
        if gone:
            (row / "intact.csv").unlink()
        said, _ = snakemake(folder, "toy", "--dry-run").communicate(timeout=240)
        assert re.search(r"^measure +(\d)", said, re.M)[1] == str(1 + gone), said  # one is the other row's


@needs_snakemake
@pytest.mark.parametrize(("profile", "plugin"), [("slurm", "slurm"), ("kubernetes", "cluster_generic")])
def test_the_profiles_of_clusters_are_understood(profile, plugin, tmp_path):
    if importlib.util.find_spec(f"snakemake_executor_plugin_{plugin}") is None:
        pytest.skip(f"Snakemake's executor {plugin} is not installed: see experiments/requirements.txt")
    where, nowhere = ROOT / "experiments/profiles" / profile, {"UNRAVELLING_DATA": str(tmp_path / "nowhere")}
    started = snakemake(tmp_path, "tier1", "--workflow-profile", where, "--dry-run", **nowhere)
    said, _ = started.communicate(timeout=240)
    assert started.returncode == 0, said
    asked = [row for row in matrix.rows(CONFIG, "paper") if row.tier == 1]
    assert said.count("gpu=1") == sum(1 + len(row.measurements) for row in asked)


@pytest.mark.parametrize("profile", ["slurm", "kubernetes"])
def test_clusters_differ_from_one_machine_in_where_jobs_run_alone(profile):
    here, there = (
        yaml.safe_load((ROOT / f"experiments/profiles/{name}/config.yaml").read_text()) for name in ("default", profile)
    )
    shared = set(here) - {"cores", "quiet"}
    assert {name: there[name] for name in shared} == {name: here[name] for name in shared}


def test_a_pod_runs_the_script_of_a_job(tmp_path):
    script, kubectl = ROOT / "experiments/profiles/kubernetes/pod.sh", tmp_path / "kubectl"
    kubectl.write_text(
        f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n[ $1 = create ] && cat > {tmp_path}/pod; printf Failed\n'
    )
    kubectl.chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "UNRAVELLING_DATA": "/net/images"}

    def pod(*words):
        command = [script, *words]
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    name = pod("submit", "train", "2", "8000", "1", "/net/it's a job.sh")
    asked = yaml.safe_load((tmp_path / "pod").read_text())
    (container,) = asked["spec"]["containers"]
    assert asked["metadata"]["name"] == name
    assert container["command"] == ["bash", "/net/it's a job.sh"]
    assert container["workingDir"] == str(tmp_path)
    assert container["resources"] == {"requests": {"cpu": 2, "memory": "8000M"}, "limits": {"nvidia.com/gpu": 1}}
    assert pod("status", name) == "failed"
    assert f"delete pod {name}" in (tmp_path / "asked").read_text()


def test_float32_is_not_rounded_in_the_convolutions_of_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    options, seen = argparse.Namespace(out=tmp_path / "a.csv", threads=None, device="cpu", seed=0, suffix=".csv"), []
    assert cells.run(lambda _: seen.append(torch.backends.cudnn.allow_tf32), options) == 0
    assert seen == [False]


def test_only_its_own_files_are_removed_after_a_training(tmp_path, monkeypatch):
    monkeypatch.setitem(RECIPES, "digits", replace(RECIPES["digits"], epochs=1))
    monkeypatch.chdir(tmp_path)
    others = {"checkpoint.onnx", "checkpoint.1.csv", "checkpoint.previous", "model.pt"}
    for name in others:
        Path(name).touch()
    assert train.main(words(TOY[0], "--out", "model.safetensors")) == 0
    there = {path.name for path in tmp_path.iterdir()}
    tables = {f"{name}.{kind}" for name in matrix.TRAINING for kind in ("csv", "json")}
    assert there - tables == others | {"model.safetensors"}


def test_the_home_folder_is_found_wherever_it_is_written(runs, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    weights = runs / TOY[0].folder / "weights.safetensors"
    assert measure.main(words(TOY[0], "--what", "intact", "--weights", weights, "--out=~/cell.csv")) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"cell.csv", "cell.json"}
