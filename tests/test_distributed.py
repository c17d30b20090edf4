"""Two processes over gloo against one: training, resume, batch norm, measurements and faults."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import unravelling
from helpers import SMALL, mix_modes, small, snapshot
from torch import nn
from torch.nn.functional import batch_norm
from unravelling import Chain, Dataset, Recipe, delete_each, delete_random, digits, distributed, evaluate, fit, resnet
from unravelling.__main__ import main
from unravelling.lesion import variant_logits

WORLD = 2
digits_recipe = unravelling.RECIPES["digits"]
RECIPES = {
    "whole": Recipe("whole", epochs=2, batch_size=32, lr=0.1, crop=1, flip=True),
    "uneven": Recipe("uneven", iterations=4, batch_size=33, lr=0.1, schedule="steps", milestones=(0.5,)),
    "active": Recipe("active", epochs=2, batch_size=32, lr=0.1, crop=1, active=2),
    "survival": Recipe("survival", epochs=2, batch_size=32, lr=0.1, survival=0.3),
    "bfloat16": Recipe("bfloat16", epochs=1, batch_size=32, lr=0.1, precision="bfloat16"),
}
BATCH_NORMS = {  # shape of the whole batch, and whether weight and bias, and running statistics, are given
    "images": ((7, 3, 4, 5), True, True),
    "vectors": ((7, 3), True, True),
    "bare": ((8, 2, 3, 3), False, False),
}


def cut():
    whole = digits()
    parts = (whole.train.take(torch.arange(100)), whole.validation.take(torch.arange(45)), whole.test)
    return Dataset("digits", *parts[:2], parts[2].take(torch.arange(101)), whole.classes)


class Double(nn.Module):
    def forward(self, x):
        return x.double()


def net(seed=0, double=True):
    """A small network, in double precision so that nothing but a mistake can make two runs differ visibly."""
    chain = resnet(8, width=4, in_channels=1, seed=seed)
    return Chain(nn.Sequential(Double(), chain.stem), chain.units, chain.head).double() if double else chain


def state_of(chain):
    return {name: tensor.detach().clone() for name, tensor in chain.state_dict().items()}


def trained(name, **options):
    double = name not in ("single", "bfloat16")
    chain = net(options.pop("net_seed", 0), double)
    history = fit(chain, cut(), RECIPES.get(name, RECIPES["whole"]), seed=3, progress=False, **options)
    return {"state": state_of(chain), "history": history.to_dict("list")}


def batch_norm_case(name, dtype, images):
    """Batch norm of some images of a batch, the gradients of their loss, and the running statistics after it."""
    shape, affine, tracked = BATCH_NORMS[name]
    generator = torch.Generator().manual_seed(1)
    x, factors = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)[images] for _ in range(2))
    x = (3 + x).requires_grad_()
    wide = torch.promote_types(dtype, torch.float32)
    weight, bias = (torch.rand(shape[1], generator=generator).to(wide).requires_grad_() for _ in range(2))
    running = [torch.rand(shape[1], generator=generator).to(wide) for _ in range(2)] if tracked else [None, None]
    y = batch_norm(x, *running, *((weight, bias) if affine else ()), training=True, momentum=0.3, eps=1e-3)
    (y * factors).sum().backward()
    return {"y": y.detach(), "x": x.grad, "affine": [weight.grad, bias.grad] if affine else [], "running": running}


def lesions(data):
    chain = small("pre")
    wrong = {kind: evaluate(small(kind), data.test) for kind in SMALL}
    logits = variant_logits(chain, data.test, [range(6), [0, ~1, 2, 3, 4, 5], [0, 1, ~2, 3, 4, 5]])
    few = variant_logits(chain, data.test.take(torch.arange(1)), [range(6)])
    return {
        "evaluate": wrong,
        "plain batches": evaluate(chain, data.test.batches(40)),
        "few": evaluate(chain, data.test.take(torch.arange(1))),
        "logits": [torch.from_numpy(array) for array in (*logits, *few)],
        "delete_each": delete_each(chain, data.test).to_dict("list"),
        "delete_random": delete_random(chain, data.test, [1, 3], trials=3, seed=5).to_dict("list"),
    }


def shares(data):
    """How many images a measurement of one process is given, and the labels that all of them get back."""
    sizes = []

    def measure(chain, split, factor):
        sizes.append(len(split))
        return factor * np.zeros((1, len(split), 1)), split.labels.numpy()

    logits, labels = distributed.sharded(measure)(None, data.test, factor=1)
    return [sizes, logits.shape[1], labels.tolist()]


def caught(function):
    try:
        function()
    except (ValueError, OSError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def fault(recipe, seed=3, **options):
    return caught(lambda: fit(net(), cut(), recipe, seed=seed, progress=False, **options))


def full_disk(state, path):
    path.write_bytes(b"half a")
    raise OSError(28, "No space left on device")


def shell(folder):
    """Train and measure from the command line, with a recipe that is short enough for a test."""
    unravelling.RECIPES["digits"] = replace(digits_recipe, epochs=2, lr=1e-3)  # so that rounding stays small
    common = ["resnet8", "--out", str(folder), "--device", "cpu"]
    codes = [main(["train", *common]), main(["measure", *common, "--what", "intact", "delete_each"])]
    unravelling.RECIPES["digits"] = digits_recipe
    return codes


def work(folder):
    """All that one of the two processes does; it stores what it saw."""
    torch.set_num_threads(1)
    found = {}
    with distributed.processes("cpu") as device:
        number = distributed.rank()
        found["ranks"] = [device, distributed.world(), number, distributed.gather(number)]
        print("from the first process only")
        found["first"] = distributed.first(lambda: [number])
        found["first fails"] = caught(lambda: distributed.first(lambda: int("x")))
        for name in (*RECIPES, "single"):
            found[name] = trained(name, net_seed=number)  # the first process's weights count
        trained("whole", checkpoint=folder / "two.pt", stop_after=1)
        found["one then two"] = trained("whole", checkpoint=folder / "one.pt", net_seed=5)
        for name, dtype in BATCH_NORM_CASES:
            images = torch.arange(BATCH_NORMS[name][0][0]).tensor_split(WORLD)[number]
            with distributed.SyncedBatchNorm():
                found[f"{name} {dtype}"] = batch_norm_case(name, dtype, images)
        chain = small("pre")
        mix_modes(chain)
        before = snapshot(chain)
        evaluate(chain, cut().test)
        found["untouched"] = snapshot(chain) == before
        found["lesions"] = lesions(cut())
        found["shares"] = shares(cut())
        found["small batch"] = fault(Recipe("x", epochs=1, batch_size=1))
        found["other seed"] = fault(RECIPES["whole"], seed=number)
        found["other checkpoint"] = fault(RECIPES["uneven"], checkpoint=folder / "one.pt")
        save, torch.save = torch.save, full_disk
        found["full disk"] = fault(RECIPES["whole"], checkpoint=folder / "full.pt")
        torch.save = save
        found["shell"] = shell(folder / "two")
    torch.save(found, folder / f"{number}.pt")


def torchrun(*arguments, cwd):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={WORLD}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=os.environ | {"OMP_NUM_THREADS": "1"})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of the checkpoints, in which one process has started and two have gone on, and the other way."""
    path = tmp_path_factory.mktemp("pair")
    trained("whole", checkpoint=path / "one.pt", stop_after=1)
    done = torchrun(__file__, str(path), cwd=path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("from the first process only") == 1
    return path


@pytest.fixture(scope="module")
def pair(folder):
    """What each of the two processes found."""
    return [torch.load(folder / f"{number}.pt", weights_only=True) for number in range(WORLD)]


def close(ours, theirs, **tolerance):
    """Whether two nested states are equal; floating-point numbers up to a tolerance."""
    if isinstance(ours, torch.Tensor) and ours.is_floating_point():
        torch.testing.assert_close(ours, theirs, equal_nan=True, **tolerance)
    elif isinstance(ours, torch.Tensor):
        assert torch.equal(ours, theirs)
    elif isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        for key in ours:
            close(ours[key], theirs[key], **tolerance)
    elif isinstance(ours, (list, tuple)):
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs, strict=True):
            close(a, b, **tolerance)
    elif isinstance(ours, float):
        assert ours == pytest.approx(theirs, rel=tolerance["rtol"], abs=tolerance["atol"], nan_ok=True)
    else:
        assert ours == theirs


# ---------------------------------------------------------------- training


@pytest.mark.parametrize("name", ["whole", "active", "survival"])
def test_two_processes_train_as_one_in_double_precision(pair, name):
    alone = trained(name)
    assert alone["history"]["train_loss"][-1] < alone["history"]["train_loss"][0]
    close(pair[0][name]["state"], alone["state"], rtol=1e-12, atol=1e-12)
    close(pair[0][name]["history"], alone["history"], rtol=1e-6, atol=0)  # losses are added up in float32


def test_slices_of_different_sizes(pair):
    alone = trained("uneven")  # 33 images, cut in 17 and 16; the loss is float32, and so are its weights
    close(pair[0]["uneven"]["state"], alone["state"], rtol=1e-5, atol=1e-6)
    close(pair[0]["uneven"]["history"], alone["history"], rtol=1e-5, atol=0)


def test_two_processes_train_as_one_in_single_precision(pair):
    close(pair[0]["single"]["state"], trained("single")["state"], rtol=1e-5, atol=1e-5)


def test_all_processes_end_with_the_same_bits(pair):
    for name in (*RECIPES, "single", "one then two"):
        close(pair[0][name]["state"], pair[1][name]["state"], rtol=0, atol=0)
        close(pair[0][name]["history"], pair[1][name]["history"], rtol=0, atol=0)


def test_bfloat16_learns_with_two_processes(pair):
    one, two = trained("bfloat16"), pair[0]["bfloat16"]
    close(two["history"], one["history"], rtol=0.05, atol=0.05)
    assert {tensor.dtype for tensor in two["state"].values()} == {torch.float32, torch.int64}


def test_a_run_goes_on_with_another_number_of_processes(pair, folder):
    alone = trained("whole")
    close(pair[0]["one then two"], alone, rtol=1e-5, atol=1e-9)
    close(trained("whole", checkpoint=folder / "two.pt", net_seed=7), alone, rtol=1e-5, atol=1e-9)


# ---------------------------------------------------------------- batch norm

BATCH_NORM_CASES = [(name, dtype) for name in BATCH_NORMS for dtype in (torch.float64, torch.float32, torch.bfloat16)]


@pytest.mark.parametrize(("name", "dtype"), BATCH_NORM_CASES)
def test_batch_norm_over_two_processes_is_that_of_the_whole_batch(pair, name, dtype):
    whole = batch_norm_case(name, dtype, torch.arange(BATCH_NORMS[name][0][0]))
    parts = [found[f"{name} {dtype}"] for found in pair]
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.02}[dtype]
    tolerance = {"rtol": tolerance, "atol": tolerance}
    for quantity in ("y", "x"):
        close(torch.cat([part[quantity] for part in parts]), whole[quantity], **tolerance)
    for part in parts:
        close(part["running"], whole["running"], **tolerance)
    for gradients in zip(whole["affine"], *(part["affine"] for part in parts), strict=True):
        close(sum(gradients[1:]), gradients[0], **tolerance)


def test_batch_norm_in_eval_mode_and_alone_is_pytorch_s():
    x = torch.randn(5, 3, 4, 4)
    for training in (True, False):
        norm, other = (nn.BatchNorm2d(3).train(training) for _ in range(2))
        with distributed.SyncedBatchNorm():
            y = norm(x)
        torch.testing.assert_close(y, other(x))
        close(norm.state_dict(), dict(other.state_dict()), rtol=1e-6, atol=1e-6)


# ---------------------------------------------------------------- measurements


def test_a_shared_test_set_gives_the_same_tables(pair):
    alone = lesions(cut())
    for found in pair:
        close(found["lesions"], alone, rtol=1e-4, atol=1e-5)
    tables = [pd.DataFrame(found["lesions"]["delete_each"]) for found in pair]
    assert tables[0]["error"].tolist() == delete_each(small("pre"), cut().test)["error"].tolist()
    assert len(tables[0]) == 6
    assert tables[0]["images"].eq(101).all()
    assert np.isfinite(tables[0]["delta_loss"]).all()


def test_each_process_gets_its_share_and_all_get_the_whole(pair):
    labels = cut().test.labels.tolist()
    assert shares(cut()) == [[101], 101, labels]
    assert [found["shares"] for found in pair] == [[[51], 101, labels], [[50], 101, labels]]


def test_measuring_changes_nothing(pair):
    assert [found["untouched"] for found in pair] == [True, True]


def test_the_command_line_stores_the_same_files_once(pair, folder, capsys):
    assert [found["shell"] for found in pair] == [[0, 0], [0, 0]]
    assert shell(folder / "one") == [0, 0]
    assert "delete_each" in capsys.readouterr().out
    stored = {path.relative_to(folder / "one") for path in (folder / "one").rglob("*.*") if path.suffix != ".lock"}
    assert stored == {
        path.relative_to(folder / "two") for path in (folder / "two").rglob("*.*") if path.suffix != ".lock"
    }
    tables = [path for path in stored if path.suffix == ".csv"]
    assert {"networks.csv", "training.csv", "delete_each.csv"} <= {path.name for path in tables}
    for path in tables:
        one, two = (pd.read_csv(folder / count / path) for count in ("one", "two"))
        pd.testing.assert_frame_equal(two, one, rtol=1e-2, atol=1e-3)
    weights = (unravelling.load(next((folder / count).rglob("*.safetensors"))) for count in ("one", "two"))
    one, two = (chain.state_dict() for chain in weights)
    close(two, one, rtol=1e-2, atol=1e-3)


# ---------------------------------------------------------------- processes and faults


def test_every_process_knows_its_place(pair):
    assert [found["ranks"] for found in pair] == [["cpu", 2, 0, [0, 1]], ["cpu", 2, 1, [0, 1]]]
    assert [found["first"] for found in pair] == [[0], [0]]


def test_a_fault_of_the_first_process_reaches_all(pair):
    for found in pair:
        assert found["first fails"] == "ValueError: invalid literal for int() with base 10: 'x'"
        assert found["other checkpoint"].startswith("ValueError: checkpoint ")
        assert "one.pt belongs to another recipe" in found["other checkpoint"]
        assert "full.pt could not be written" in found["full disk"]


def test_a_full_disk_leaves_nothing_behind(pair, folder):
    assert not list(folder.glob("*full*"))


def test_processes_that_cannot_work_together_are_refused(pair):
    for number, found in enumerate(pair):
        assert found["small batch"] == "ValueError: 2 processes cannot share batches of 1 images: start fewer"
        assert found["other seed"] == (
            f"ValueError: process {1 - number} has another seed than process {number}: start all of them alike"
        )


@pytest.mark.parametrize(
    ("device", "message"),
    [("cuda:1", "device cuda:1: torchrun gives each process a GPU of its own"), ("cuda", "process 3 of this machine")],
)
def test_a_device_that_torchrun_cannot_give(monkeypatch, device, message):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match=message), distributed.processes(device):
        pytest.fail("joined")


@pytest.mark.parametrize(("gpus", "device"), [(True, "cuda"), (False, "cpu")])
def test_without_torchrun_there_is_one_process(monkeypatch, gpus, device):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus)
    with distributed.processes("auto") as found:
        assert (found, distributed.world(), distributed.rank(), distributed.gather("a")) == (device, 1, 0, ["a"])
    with distributed.processes("cuda:1") as found:
        assert found == "cuda:1"


if __name__ == "__main__":
    work(Path(sys.argv[1]))
