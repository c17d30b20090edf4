"""Runs at paper scale, rehearsed on digits and on a few CIFAR-10 images: the matrix, every fault, and publishing."""

import json
import math
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from unravelling import RECIPES, Recipe, build, cifar10, digits, fit, load, measure, paper, results, runs, weights
from unravelling import __main__ as cli
from unravelling.data import CIFAR10_CLASSES
from unravelling.runs import Place, Row

ROOT = Path(__file__).resolve().parents[1]
TINY = Recipe("tiny", epochs=3, batch_size=256, lr=0.05, crop=1)
ROW = Row("digits", "resnet8", 0, "tiny")
SOME = ("intact", "delete_each")


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    rehearse(monkeypatch)


def rehearse(patch):
    patch.setitem(RECIPES, "tiny", TINY)
    patch.setitem(RECIPES, "other", Recipe("other", epochs=1, batch_size=512))
    patch.setattr(runs, "applicable", lambda network, dataset: SOME)
    patch.setattr(paper, "applicable", lambda network, dataset: SOME)
    patch.setattr(results, "commit", lambda: "aaa")
    patch.setattr(paper, "_time_steps", lambda row, data, device: [0.5, 0.01])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder in which the row has been trained and measured without an interruption."""
    out = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        rehearse(patch)
        assert command(out) == 0
    return out


def command(out, *arguments, networks=("resnet8",), recipe="tiny", dataset="digits"):
    line = ["paper", "--dataset", dataset, "--recipe", recipe, "--device", "cpu", "--out", str(out), *arguments]
    return cli.main([*line, *(["--networks", *networks] if networks else [])])


def files(folder, *but):
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {name: content for name, content in found.items() if not name.startswith(("locks", "timings", *but))}


def same_tensors(a, b):
    a, b = load(a).state_dict(), load(b).state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def shipped(out, name="resnet8-tiny-seed0"):
    return out / "weights" / "digits" / f"{name}.safetensors"


class Epochs:
    """A limit that lets so many epochs pass, and so many measurements."""

    def __init__(self, epochs, measurements=0):
        self.left, self.measurements = epochs, measurements

    def epochs(self, row, done, total, seconds):
        self.left -= 1
        return 1 if self.left >= 0 else None

    def measurement(self, row, what):
        self.measurements -= 1
        return -self.measurements

    def fits(self, seconds):
        return seconds <= 0


def some_epochs(out, epochs):
    """Train for so many epochs and stop."""
    assert not runs.train_row(ROW, digits(), Place(out, progress=False), Epochs(epochs))
    return Place(out).checkpoint(ROW)


def python(code, *arguments):
    """Start a Python process in which the recipe is known too."""
    prefix = (
        "import os, signal, sys, torch\n"
        "from unravelling import RECIPES, Recipe, paper, runs, train, __main__ as cli\n"
        "from unravelling.runs import Place, Row, claim\n"
        f"from pathlib import Path\ntorch.set_num_threads(1)\nRECIPES['tiny'] = {TINY!r}\n"
        f"paper.applicable = runs.applicable = lambda *names: {SOME}\nrow = {ROW!r}\n"
        "paper._time_steps = lambda *arguments: [0.5, 0.01]\n"
    )
    words = [sys.executable, "-c", prefix + code, *map(str, arguments)]
    return subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )


RUN = "['paper', '--dataset', 'digits', '--networks', 'resnet8', '--recipe', 'tiny', '--out', sys.argv[1]]"


# ---------------------------------------------------------------- the matrix


def test_the_matrix_in_order_of_importance():
    rows = [(row.group, row.network, row.recipe, row.seed) for row in paper.matrix("short")]
    assert rows[:12] == [
        (1, "resnet110", "short", 0),
        (1, "vgg15", "short", 0),
        (1, "vgg15-narrow", "short", 0),
        (1, "resnet56", "short", 0),
        (1, "plain56", "short", 0),
        *[(1, "resnet20", "short", seed) for seed in range(3)],
        *[(1, "plain20", "short", seed) for seed in range(3)],
        (2, "resnet110", "short", 1),
    ]
    assert [row[0] for row in rows] == sorted(row[0] for row in rows)
    assert len({row[1:] for row in rows}) == len(rows)
    seeds = pd.DataFrame(rows).groupby([1, 2])[3].apply(sorted)
    assert all(found == [0, 1, 2, 3, 4] for found in seeds)
    third = [row[1:] for row in rows if row[0] == 3]
    assert third == [
        *[("resnet110", "short-short-paths", seed) for seed in range(3)],
        *[("resnet110", "short-stochastic-depth", seed) for seed in range(3)],
        *[("resnet56", "short", seed) for seed in (1, 2)],
        ("resnet110-post", "short", 0),
    ]
    assert all(len(build(network, "cifar10", width=2)) for network in {row[1] for row in rows})
    for scale in paper.SCALES:
        assert {row.recipe for row in paper.matrix(scale)} <= set(RECIPES)
    assert RECIPES["paper-short-paths"].active == 23


def test_rows_are_chosen():
    assert paper.select("cifar10", "paper") == paper.matrix("paper")
    assert {row.group for row in paper.select("cifar10", "brief")} == {1}
    assert {row.group for row in paper.select("cifar10", "brief", groups=[2, 3])} == {2, 3}
    found = paper.select("cifar10", "short", networks=["resnet110", "resnet8"], seeds=[0, 3])
    assert found[0] == Row("cifar10", "resnet110", 0, "short", 1)
    assert found[-2:] == [Row("cifar10", "resnet8", seed, "short") for seed in (0, 3)]
    assert {(row.network, row.seed) for row in found} == {(n, s) for n in ("resnet110", "resnet8") for s in (0, 3)}
    with pytest.raises(ValueError, match="no row of the matrix matches"):
        paper.select("cifar10", "short", seeds=[9])
    with pytest.raises(ValueError, match="unknown network 'alexnet'"):
        paper.select("cifar10", "short", networks=["alexnet"])


@pytest.mark.parametrize("network", ["resnet8", "resnet20-post", "plain20", "vgg15", "vgg15-nobn"])
def test_what_applies_gives_rows(network, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(measure, "TRIALS", 1)
    data = digits()
    small = data.__class__("digits", *(s.take(torch.arange(12)) for s in (data.train,) * 3), data.classes, "digits")
    chain = build(network, "digits", width=2).eval()
    names = runs.applicable(network, "digits")
    paths = {"spectrum", "path_norms", "lengths", "branches"}
    assert paths <= set(names) if network.startswith("resnet") else not paths & set(names)
    assert ("batch_norm_shift" in names) == (network != "vgg15-nobn")
    assert ("subnetworks" in names) == (len(chain) >= min(measure.ACTIVE) and network.startswith("resnet"))
    for what in set(names) - {"path_norms", "delete_pairs", "reorder"}:
        assert len(measure.MEASUREMENTS[what](chain, small, 0)), what


# ---------------------------------------------------------------- running


def test_it_trains_and_measures_as_the_other_commands_do(finished, tmp_path):
    common = ["resnet8", "--recipe", "tiny", "--out", str(tmp_path), "--device", "cpu"]
    assert cli.main(["train", *common]) == 0
    assert cli.main(["measure", *common]) == 0
    ours, theirs = files(finished), files(tmp_path)
    assert ours.keys() == theirs.keys()
    for name in ours:
        if not name.endswith("provenance.json"):
            assert ours[name] == theirs[name], name


def test_what_is_done_is_not_done_again(finished, capsys, monkeypatch):
    monkeypatch.setattr(runs, "fit", lambda *a, **k: pytest.fail("trained again"))
    for what in SOME:
        monkeypatch.setitem(measure.MEASUREMENTS, what, lambda *a, **k: pytest.fail("measured again"))
    before = files(finished)
    assert command(finished) == 0
    assert "resnet8-seed0-tiny: complete" in capsys.readouterr().out
    assert files(finished) == before


def test_the_status_says_what_is_done_what_remains_and_begins_nothing(finished, tmp_path, capsys):
    assert command(tmp_path, "--status", networks=["resnet8", "plain8"]) == 0
    text = capsys.readouterr().out
    assert text.count("pending") == 2
    assert "0 of 2 rows are complete; the rest takes about" in text
    assert "an estimate" in text
    assert not files(tmp_path)
    some_epochs(tmp_path, 2)
    assert command(tmp_path, "--dry-run") == 0
    assert "training, epoch 2 of 3" in capsys.readouterr().out
    assert command(finished, "--status") == 0
    assert "1 of 1 rows are complete\n" in capsys.readouterr().out


def test_steps_and_forward_passes_are_timed(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setitem(RECIPES, "tiny", TINY)
    calls = []
    original = torch.optim.SGD.step
    monkeypatch.setattr(torch.optim.SGD, "step", lambda *a, **k: calls.append(1) or original(*a, **k))
    clock = iter(range(100))
    monkeypatch.setattr(paper.time, "perf_counter", lambda: next(clock))
    step, forward = paper._time_steps(ROW, digits(), "cpu")
    # every timed piece takes one tick: two steps after one to warm up, then one pass of 100 images
    assert (len(calls), step, forward) == (3, 1 / 2, 1 / 100)


def test_estimates_come_from_the_record_where_there_is_one(finished, monkeypatch):
    monkeypatch.setattr(paper.Limit, "_timing", lambda *a: pytest.fail("timed although there is a record"))
    limit = paper.Limit(digits(), Place(finished))
    record = json.loads((finished / "results/digits/provenance.json").read_text())
    (run,) = record["networks.csv"]
    other = Row("digits", "resnet8", 5, "tiny")
    assert limit.epoch(other) == pytest.approx(run["seconds"][str(ROW)] / 3)
    assert limit.measurement(other, "intact") == record["intact.csv"][0]["seconds"][str(ROW)]
    monkeypatch.setattr(paper.Limit, "_timing", lambda *a: [2.0, 0.5])
    new = Row("digits", "plain8", 0, "tiny")
    assert limit.epoch(new) == pytest.approx(4 * 2 + (200 + 768) * 0.5)
    assert limit.measurement(new, "delete_each") == pytest.approx(500 * 3 / 2 * 0.5)


@pytest.mark.parametrize(
    ("left", "done", "seconds", "expected"),
    [
        (100, 0, [], 5),  # ten fit: five, and then a look at the clock
        (100, 18, [], 2),
        (25, 3, [10, 10], 1),
        (9.9, 3, [10, 10], None),
        (45, 3, [10, 20], 1),
        (19, 3, [10, 20], None),
        (1, 20, [], 0),
        (0.5, 20, [], None),
        (-5, 0, [], None),
    ],
)
def test_an_epoch_that_would_not_fit_is_not_begun(left, done, seconds, expected, tmp_path, monkeypatch):
    limit = paper.Limit(digits(), Place(tmp_path))
    monkeypatch.setattr(limit, "left", lambda: left)
    monkeypatch.setattr(limit, "epoch", lambda row: 10)
    monkeypatch.setattr(limit, "_scoring", lambda row: 1)
    assert limit.epochs(ROW, done, 20, seconds) == expected


def test_a_limit_stops_after_an_epoch_and_the_rest_gives_the_same_bits(finished, tmp_path, capsys):
    some_epochs(tmp_path, 2)
    assert "stopped at epoch 2 of 3" in capsys.readouterr().out
    assert not (tmp_path / "weights").exists()
    assert command(tmp_path) == 0
    assert same_tensors(shipped(tmp_path), shipped(finished))
    ours, theirs = files(tmp_path), files(finished)
    assert ours.keys() == theirs.keys()
    assert ours["results/digits/training.csv"] == theirs["results/digits/training.csv"]


def test_a_measurement_that_would_not_fit_is_not_begun(finished, tmp_path, capsys):
    shutil.copytree(finished / "weights", tmp_path / "weights")
    assert not runs.measure_row(ROW, digits(), Place(tmp_path), limit=Epochs(0, measurements=1))
    assert "delete_each takes about 1 s, more than is left: not begun" in capsys.readouterr().out
    assert {path.name for path in tmp_path.glob("results/digits/*.csv")} == {"intact.csv"}
    assert runs.measure_row(ROW, digits(), Place(tmp_path))


def test_a_budget_that_is_over_begins_nothing(tmp_path, capsys):
    assert command(tmp_path, "--budget", "0s") == 0
    assert "0 of 1 rows are complete" in capsys.readouterr().out
    assert not files(tmp_path)
    assert [cli._budget(text) for text in ("90s", "25m", "1.5h")] == [90, 1500, 5400]
    with pytest.raises(SystemExit):
        command(tmp_path, "--budget", "soon")
    assert "'soon' is not a time such as 90s, 25m or 2h" in capsys.readouterr().err


def test_jobs_share_the_rows(tmp_path, capfd):
    assert command(tmp_path, "--jobs", "2", "--seeds", "0-1", networks=["resnet8"], recipe="brief") == 0
    text = capfd.readouterr().out
    assert [text.count(f"resnet8-seed{seed}-brief: test error") for seed in (0, 1)] == [1, 1]
    assert "2 of 2 rows are complete" in text
    chain = build("resnet8", "digits", seed=1)
    fit(chain, digits(), RECIPES["brief"], seed=1, progress=False)
    found = load(shipped(tmp_path, "resnet8-brief-seed1")).state_dict()
    assert all(torch.equal(tensor, found[name]) for name, tensor in chain.state_dict().items())
    record = json.loads((tmp_path / "results/digits/provenance.json").read_text())
    assert "--worker" not in record["networks.csv"][0]["command"]


def test_torchrun_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cli.distributed, "world", lambda: 2)
    assert command(tmp_path) == 2
    assert "with torchrun, start train and measure" in capsys.readouterr().err


# ---------------------------------------------------------------- faults


def test_a_process_killed_in_the_middle_of_an_epoch_goes_on_to_the_same_bits(finished, tmp_path):
    killer = (
        "original, calls = train.cross_entropy, []\n"
        "def killed(*arguments, **options):\n"
        "    if Place(Path(sys.argv[1])).checkpoint(row).exists(): calls.append(1)\n"
        # in each epoch four steps and a look at the validation images: this is in the third epoch
        "    if len(calls) == 8: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return original(*arguments, **options)\n"
        f"train.cross_entropy = killed\ncli.main({RUN})\n"
    )
    process = python(killer, tmp_path)
    process.communicate()
    assert process.returncode == -9
    checkpoint = Place(tmp_path).checkpoint(ROW)
    assert len(torch.load(checkpoint, weights_only=True)["history"]) == 2
    checkpoint.with_name(f".{checkpoint.name}.4711").write_bytes(b"left behind")
    assert command(tmp_path) == 0  # its claim went with it
    assert same_tensors(shipped(tmp_path), shipped(finished))
    assert files(tmp_path).keys() == files(finished).keys()


def test_a_full_disk_costs_no_more_than_the_epoch(finished, tmp_path):
    checkpoint = some_epochs(tmp_path, 1)
    before = checkpoint.read_bytes()
    full = (
        f"import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\nsys.exit(cli.main({RUN}))\n"
    )
    process = python(full, tmp_path)
    _, text = process.communicate()
    assert process.returncode == 2
    assert "could not be written" in text
    assert "Traceback" not in text
    assert checkpoint.read_bytes() == before
    assert command(tmp_path) == 0
    assert same_tensors(shipped(tmp_path), shipped(finished))


def truncated(path):
    path.write_bytes(path.read_bytes()[:-1000])


def garbage(path):
    path.write_bytes(b"\x00" * 1000)


def flipped(path):
    """Change one byte of a tensor, which torch.load would not notice."""
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as file:
        largest = max(file.infolist(), key=lambda info: info.file_size)
    content[largest.header_offset + largest.file_size // 2] ^= 255
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [truncated, garbage, flipped])
def test_a_corrupt_checkpoint_costs_one_epoch(damage, finished, tmp_path, capsys):
    checkpoint = some_epochs(tmp_path, 2)
    damage(checkpoint)
    assert command(tmp_path) == 0
    text = capsys.readouterr().out
    assert f"checkpoint {checkpoint} is corrupt: going on from the one before it" in text
    assert "epoch 2 of 3" in text.partition("is corrupt")[2]
    assert same_tensors(shipped(tmp_path), shipped(finished))


def test_a_corrupt_checkpoint_without_a_predecessor_is_named_and_left_and_the_others_go_on(tmp_path, capsys):
    checkpoint = some_epochs(tmp_path, 1)
    garbage(checkpoint)
    before = checkpoint.read_bytes()
    assert command(tmp_path, networks=["resnet8", "plain8"]) == 2
    assert f"resnet8-seed0-tiny: failed: checkpoint {checkpoint} cannot be read" in capsys.readouterr().err
    assert checkpoint.read_bytes() == before
    assert shipped(tmp_path, "plain8-tiny-seed0").exists()
    assert set(pd.read_csv(tmp_path / "results/digits/networks.csv")["network"]) == {"plain8"}


def test_a_checkpoint_of_another_recipe_is_refused(tmp_path, capsys):
    checkpoint = some_epochs(tmp_path, 1)
    shutil.copy(checkpoint, checkpoint.with_name("resnet8-seed0-other.pt"))
    assert command(tmp_path, recipe="other") == 2
    assert "belongs to another recipe" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()


def test_rows_of_two_recipes_lie_side_by_side(finished, tmp_path):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    before = pd.read_csv(tmp_path / "results/digits/delete_each.csv")
    assert command(tmp_path, recipe="other") == 0
    table = pd.read_csv(tmp_path / "results/digits/delete_each.csv")
    assert table["recipe"].value_counts().to_dict() == {"tiny": 3, "other": 3}
    pd.testing.assert_frame_equal(table[table["recipe"] == "tiny"].reset_index(drop=True), before)
    assert not same_tensors(shipped(tmp_path), shipped(tmp_path, "resnet8-other-seed0"))


def test_a_row_that_another_process_has_is_skipped_and_said(tmp_path, capsys):
    holder = python(
        "with claim(row, Place(Path(sys.argv[1]))):\n    print('mine', flush=True)\n    input()\n", tmp_path
    )
    try:
        assert holder.stdout.readline() == "mine\n"
        assert command(tmp_path, networks=["resnet8", "plain8"], recipe="tiny") == 0
        text = capsys.readouterr().out
        assert "resnet8-seed0-tiny: another process works on it: skipped" in text
        assert not shipped(tmp_path).exists()
        assert shipped(tmp_path, "plain8-tiny-seed0").exists()
    finally:
        holder.kill()
        holder.communicate()


def test_train_waits_for_a_row_until_the_other_process_is_gone(finished, tmp_path):
    holder = python(
        "with claim(row, Place(Path(sys.argv[1]))):\n    print('mine', flush=True)\n    input()\n", tmp_path
    )
    assert holder.stdout.readline() == "mine\n"
    words = RUN.replace("paper", "train").replace("'--networks', ", "")
    second = python(f"sys.exit(cli.main({words}))\n", tmp_path)
    assert second.stdout.readline() == "resnet8-seed0-tiny: another process works on it: waiting for it\n"
    holder.kill()
    holder.communicate()
    second.communicate()
    assert second.returncode == 0
    assert same_tensors(shipped(tmp_path), shipped(finished))


def test_results_of_another_commit_are_listed_and_measured_again_on_demand(finished, tmp_path, capsys, monkeypatch):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    monkeypatch.setattr(results, "commit", lambda: "bbb")
    before = files(tmp_path)
    assert command(tmp_path) == 0
    assert "made by commit aaa; this is bbb" in capsys.readouterr().out
    assert files(tmp_path) == before
    assert command(tmp_path, "--remeasure") == 0
    assert "intact was measured by commit aaa: again" in capsys.readouterr().out
    record = json.loads((tmp_path / "results/digits/provenance.json").read_text())
    commits = {name: [run["commit"] for run in found] for name, found in record.items()}
    assert commits["intact.csv"] == commits["delete_each.csv"] == ["bbb"]
    assert commits["networks.csv"] == ["aaa"]
    assert command(tmp_path, "--remeasure") == 0
    assert "intact done already" in capsys.readouterr().out


def test_a_failed_measurement_leaves_what_is_stored(finished, tmp_path, monkeypatch, capsys):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    monkeypatch.setattr(results, "commit", lambda: "bbb")

    def failing(*arguments):
        raise ValueError("no such luck")

    monkeypatch.setitem(measure.MEASUREMENTS, "intact", failing)
    before = files(tmp_path)
    assert command(tmp_path, "--remeasure") == 2
    assert "resnet8-seed0-tiny: failed: no such luck" in capsys.readouterr().err
    assert files(tmp_path) == before


def test_a_training_that_diverges_is_not_stored(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(RECIPES, "tiny", Recipe("tiny", epochs=2, batch_size=256, lr=1e30))
    assert command(tmp_path) == 2
    assert "resnet8-seed0-tiny diverged: its training loss is not finite" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()
    assert not (tmp_path / "weights").exists()


def test_measurements_of_a_lost_network_are_dropped_when_the_new_one_differs(finished, tmp_path, capsys, monkeypatch):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    shipped(tmp_path).unlink()
    monkeypatch.setattr(runs, "measure_row", lambda *a, **k: True)
    assert runs.train_row(ROW, digits(), Place(tmp_path))
    assert runs.measured(ROW, tmp_path / "results/digits", "intact"), "the same bits: nothing to drop"
    shipped(tmp_path).unlink()
    monkeypatch.setitem(RECIPES, "tiny", Recipe("tiny", epochs=1, batch_size=256, lr=0.01))
    assert runs.train_row(ROW, digits(), Place(tmp_path))
    assert not runs.measured(ROW, tmp_path / "results/digits", "intact")
    assert "intact of the earlier network is dropped" in capsys.readouterr().out


# ---------------------------------------------------------------- a few CIFAR-10 images


@pytest.fixture
def images(tmp_path, monkeypatch):
    """The layout of CIFAR-10 with 30 and 4 images a class."""
    random = np.random.default_rng(0)
    for split, size in (("train", 30), ("test", 4)):
        for name in CIFAR10_CLASSES:
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for i in range(size):
                Image.fromarray(random.integers(256, size=(32, 32, 3), dtype=np.uint8)).save(folder / f"{i:04}.png")
    monkeypatch.setattr(cli, "load_dataset", lambda name, root: cifar10(root, per_class=(30, 4)))
    monkeypatch.setitem(RECIPES, "tiny", Recipe("tiny", epochs=1, batch_size=64, crop=4, flip=True))
    return tmp_path / "images"


def test_cifar10_from_images_to_the_page(images, tmp_path):
    out, data = tmp_path / "out", tmp_path / "data"
    assert command(out, "--data", str(images), "--publish", str(data), dataset="cifar10") == 0
    row = Row("cifar10", "resnet8", 0, "tiny")
    page = (data / "RUNS.md").read_text()
    assert "| – | resnet8 | 0 | tiny | complete |" in page
    assert "| 1 | resnet110 | 0 | brief | pending |" in page
    assert same_tensors(runs.weights_path(row, data / "weights"), runs.weights_path(row, out / "weights"))
    record = (data / "results/cifar10/provenance.json").read_text()
    assert str(tmp_path) not in record
    assert '"data": "CIFAR-10"' in record


def test_a_missing_image_is_named_before_anything_begins(images, tmp_path, capsys):
    (images / "test" / "cat" / "0002.png").unlink()
    assert command(tmp_path / "out", "--data", str(images), dataset="cifar10") == 2
    assert "3 images in test/cat, expected 4: is the copy complete?" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- publishing


def publish(out, data):
    return paper.publish(Place(out), data, "digits")


def test_publishing_merges_rows_and_leaves_the_others_as_they_are(finished, tmp_path):
    stored = tmp_path / "results/digits"
    stored.mkdir(parents=True)
    table = pd.read_csv(finished / "results/digits/intact.csv").assign(seed=7, error=0.125)
    results.store(table, stored / "intact.csv", "by hand", 3)
    line = (stored / "intact.csv").read_text().splitlines()[1]
    assert publish(finished, tmp_path) == []
    lines = (stored / "intact.csv").read_text().splitlines()
    assert lines[2] == line
    assert lines[:2] == (finished / "results/digits/intact.csv").read_text().splitlines()
    record = json.loads((stored / "provenance.json").read_text())
    assert {name for run in record["intact.csv"] for name in run["seconds"]} == {str(ROW), "resnet8-seed7-tiny"}
    assert shipped(tmp_path).read_bytes() == shipped(finished).read_bytes()
    assert "| – | resnet8 | 0 | tiny | complete |" in (tmp_path / "RUNS-digits.md").read_text()
    before = {path: path.stat().st_mtime_ns for path in stored.glob("*")}
    assert publish(finished, tmp_path) == []
    assert {path: path.stat().st_mtime_ns for path in stored.glob("*")} == before, "nothing new, nothing written"


def changed(finished, folder, **columns):
    """Copy the finished folder, with other scores in networks.csv."""
    shutil.copytree(finished, folder)
    path = folder / "results/digits/networks.csv"
    pd.read_csv(path).assign(**columns).to_csv(path, index=False)
    return folder


def test_a_stored_row_is_not_replaced_by_a_partial_or_failed_one(finished, tmp_path):
    data = tmp_path / "data"
    assert publish(finished, data) == []
    before = files(data)
    partial = changed(finished, tmp_path / "partial", test_loss=0.5)
    (partial / "results/digits/intact.csv").unlink()
    (reason,) = publish(partial, data)
    assert reason.startswith("resnet8-seed0-tiny: the stored row is of another training, and this one lacks intact")
    (reason,) = publish(changed(finished, tmp_path / "failed", validation_loss=math.nan), data)
    assert reason == "resnet8-seed0-tiny: its losses are not finite: not published"
    assert files(data) == before
    assert publish(changed(finished, tmp_path / "whole", test_loss=0.5), data) == []
    assert pd.read_csv(data / "results/digits/networks.csv")["test_loss"].tolist() == [0.5]


def test_what_is_trained_but_not_yet_measured_is_published_so_far(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "out")
    (tmp_path / "out/results/digits/intact.csv").unlink()
    assert publish(tmp_path / "out", tmp_path / "data") == []
    assert "| trained, 1 of 2 measured |" in (tmp_path / "data/RUNS-digits.md").read_text()
    assert publish(finished, tmp_path / "data") == []
    assert "| complete |" in (tmp_path / "data/RUNS-digits.md").read_text()


def test_a_file_that_would_be_too_large_is_refused(finished, tmp_path, monkeypatch):
    size = shipped(finished).stat().st_size
    monkeypatch.setattr(paper, "HALF_LIMIT", size - 1)
    monkeypatch.setattr(paper, "FILE_LIMIT", size - 1)
    assert publish(finished, tmp_path / "half") == []
    half = shipped(tmp_path / "half")
    assert half.stat().st_size < 0.6 * size
    assert weights.header(half)["test_error"] == weights.header(shipped(finished))["test_error"]
    whole, rounded = load(shipped(finished)).state_dict(), load(half).state_dict()
    assert all(torch.allclose(whole[name].double(), rounded[name].double(), rtol=1e-3, atol=1e-6) for name in whole)
    monkeypatch.setattr(paper, "FILE_LIMIT", 10_000)
    (reason,) = publish(finished, tmp_path / "none")
    assert reason.startswith("resnet8-tiny-seed0.safetensors would have 0.")
    assert not (tmp_path / "none/weights").exists()
    limit = (finished / "results/digits/intact.csv").stat().st_size - 1
    monkeypatch.setattr(paper, "FILE_LIMIT", limit)
    reasons = publish(finished, tmp_path / "less")
    assert any(reason.startswith("intact.csv would have") for reason in reasons)
    record = json.loads((tmp_path / "less/results/digits/provenance.json").read_text())
    written = {path.name for path in (tmp_path / "less/results/digits").glob("*.csv")}
    assert "intact.csv" not in written
    assert set(record) == written, "the record speaks of what is there"


def test_networks_trained_with_branches_left_out_are_published_without_their_weights(finished, tmp_path, monkeypatch):
    monkeypatch.setitem(RECIPES, "tiny", replace(TINY, active=2))
    assert publish(finished, tmp_path) == []
    assert not shipped(tmp_path).exists()
    assert "| – | resnet8 | 0 | tiny | complete |" in (tmp_path / "RUNS-digits.md").read_text()


def test_a_folder_that_would_be_too_large_is_refused(finished, tmp_path, monkeypatch):
    (tmp_path / "other").write_bytes(bytes(50_000))
    size = shipped(finished).stat().st_size
    monkeypatch.setattr(paper, "FOLDER_LIMIT", size + 50_000)
    (reason,) = publish(finished, tmp_path)
    assert "resnet8-tiny-seed0.safetensors" in reason
    assert not shipped(tmp_path).exists()
    assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) < size + 50_000


def test_published_rows_count_as_done_elsewhere(finished, tmp_path, monkeypatch, capsys):
    publish(finished, tmp_path / "data")
    monkeypatch.setattr(runs, "fit", lambda *a, **k: pytest.fail("trained again"))
    before = files(tmp_path / "data")
    assert command(tmp_path / "out", "--publish", str(tmp_path / "data")) == 0
    assert "resnet8-seed0-tiny: complete" in capsys.readouterr().out
    assert files(tmp_path / "data") == before
    assert same_tensors(shipped(tmp_path / "out"), shipped(finished))


def test_published_weights_in_half_precision_are_gone_on_with_and_said_to_be(finished, tmp_path, monkeypatch):
    shutil.copytree(finished, tmp_path / "out")
    (tmp_path / "out/results/digits/intact.csv").unlink()
    monkeypatch.setattr(paper, "HALF_LIMIT", 0)
    assert publish(tmp_path / "out", tmp_path / "data") == []
    published = shipped(tmp_path / "data").read_bytes()
    monkeypatch.setattr(runs, "fit", lambda *a, **k: pytest.fail("trained again"))
    assert command(tmp_path / "elsewhere", "--publish", str(tmp_path / "data")) == 0
    record = json.loads((tmp_path / "data/results/digits/provenance.json").read_text())
    noted = {name: [run.get("weights") for run in found] for name, found in record.items()}
    assert noted["intact.csv"] == ["stored in half precision"]
    assert noted["delete_each.csv"] == noted["networks.csv"] == [None]
    assert shipped(tmp_path / "data").read_bytes() == published


def test_a_training_under_way_shows_on_the_page_until_it_is_done(finished, tmp_path):
    out, data = tmp_path / "out", tmp_path / "data"
    some_epochs(out, 2)
    assert publish(out, data) == []
    assert "| – | resnet8 | 0 | tiny | training, epoch 2 of 3 |" in (data / "RUNS-digits.md").read_text()
    assert publish(finished, data) == []
    assert "training, epoch" not in (data / "RUNS-digits.md").read_text()


# ---------------------------------------------------------------- the page


def test_the_page_by_hand(tmp_path):
    folder = tmp_path / "cifar10"
    key = {"dataset": "cifar10", "network": "resnet110", "seed": 0, "recipe": "brief"}
    scores = {f"{s}_{n}": v for s in ("train", "test") for n, v in (("error", 0.25), ("loss", 1.0), ("images", 10_000))}
    results.store(pd.DataFrame([key | scores]), folder / "networks.csv", "x", 2700, data="CIFAR-10 (JPEG-75 copy)")
    results.store(pd.DataFrame([key | {"error": 0.25}]), folder / "intact.csv", "x", 30)
    page = paper.runs_page(tmp_path)
    (line,) = [line for line in page.splitlines() if "1 of 2 measured" in line]
    hardware = results.hardware()
    # Wilson: (p + z²/2n ± z √(p(1-p)/n + z²/4n²)) / (1 + z²/n) = 0.2416 to 0.2586
    assert line == (
        "| 1 | resnet110 | 0 | brief | trained, 1 of 2 measured | 25.00 (24.16–25.86) | "
        f"{hardware} | 45 min + 30 s | aaa |"
    )
    assert "Images: CIFAR-10 (JPEG-75 copy)." in page
    assert "| 1 | resnet20 | 0–2 | paper | pending |" in page
    assert "| 2 | resnet110 | 1, 2 | short | pending |" in page
    pending = [line for line in page.splitlines() if "| pending |" in line]
    assert not any("| 2 |" in line and "brief" in line for line in pending)


def test_the_committed_page_is_what_the_committed_data_give(monkeypatch):
    monkeypatch.undo()
    committed = (ROOT / "data/RUNS.md").read_text(encoding="utf-8")
    assert committed == paper.runs_page(ROOT / "data/results"), (
        "data/RUNS.md is stale: python -m unravelling paper --budget 0s --publish data"
    )


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(4.4, "4 s"), (89, "89 s"), (90, "2 min"), (2700, "45 min"), (7200, "2.0 h"), (864000, "10.0 days")],
)
def test_durations(seconds, text):
    assert paper.duration(seconds) == text


def test_folders_of_one_machine_stay_out_of_the_record():
    line = "python -m unravelling paper --data /a/b --groups 1,2 --out=/c --out 'd e' --publish f --recipe brief"
    assert paper.without_paths(line) == "python -m unravelling paper --groups 1,2 --recipe brief"
