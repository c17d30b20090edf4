"""Training: hand computations, exact resume, and faults that must cost no more than the epoch they hit."""

import contextlib
import dataclasses
import json
import math
import os
import pickle
import resource
import traceback
from collections import Counter
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import images, mix_modes, small, snapshot
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from unravelling import (
    RECIPES,
    Chain,
    Dataset,
    Recipe,
    Split,
    build,
    cifar10,
    digits,
    evaluate,
    fit,
    load,
    resnet,
    save,
)
from unravelling import train as train_module
from unravelling.data import checksum, load_dataset
from unravelling.train import as_tested, thinning
from unravelling.weights import header

TINY = Recipe("tiny", epochs=2, batch_size=32, lr=0.1, crop=1, flip=True)


class Untouchable:
    """A test split that nothing may look at."""

    def __getattribute__(self, name):
        raise AssertionError(f"training looked at the test split ({name})")

    def __len__(self):
        raise AssertionError("training looked at the test split (len)")


@pytest.fixture(scope="module")
def data():
    whole = digits()
    train, validation = whole.train.take(torch.arange(100)), whole.validation.take(torch.arange(40))
    return Dataset("digits", train, validation, Untouchable(), whole.classes)


def net(seed=0):
    return resnet(8, width=4, in_channels=1, seed=seed)


def run(data, recipe=TINY, seed=0, net_seed=0, **options):
    chain = net(net_seed)
    return chain, fit(chain, data, recipe, seed=seed, progress=False, **options)


def same_bits(a, b):
    """Whether two nested states hold the same bytes."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_bits(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same_bits, a, b))
    return a == b


def outcome(function, *arguments):
    """What a function returns, and the message of the ValueError that it raises."""
    try:
        return function(*arguments), ""
    except ValueError as error:
        return None, str(error)


# ---------------------------------------------------------------- recipes


def test_one_cycle_by_hand():
    recipe = Recipe("x", epochs=1, lr=2.0)
    # a quarter of 8 steps up to the peak, and down to zero at step 8, which is never taken
    cos30 = math.sqrt(3) / 2
    expected = [1.0, 2.0, 2.0, 1 + cos30, 1.5, 1.0, 0.5, 1 - cos30]
    assert [recipe.lr_at(step, 8) for step in range(8)] == pytest.approx(expected)
    assert [recipe.lr_at(step, total) for total in (1, 3) for step in range(total)] == [2.0] * 4


def test_steps_by_hand():
    paper = RECIPES["paper"]
    assert (paper.iterations, paper.batch_size, paper.momentum, paper.weight_decay) == (64_000, 128, 0.9, 1e-4)
    expected = {0: 0.01, 399: 0.01, 400: 0.1, 31_999: 0.1, 32_000: 0.01, 47_999: 0.01, 48_000: 0.001, 63_999: 0.001}
    assert {step: paper.lr_at(step, 64_000) for step in expected} == pytest.approx(expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "recipe 'x' needs either epochs or iterations"),
        ({"epochs": 1, "iterations": 1}, "recipe 'x' needs either epochs or iterations"),
        ({"epochs": 0}, "epochs must be at least 1, not 0"),
        ({"iterations": -5}, "iterations must be at least 1, not -5"),
        ({"epochs": 1, "batch_size": 0}, "batch_size must be at least 1, not 0"),
        ({"epochs": 1, "schedule": "cosine"}, "recipe 'x': schedule 'cosine' is not one of onecycle, steps"),
        ({"epochs": 1, "precision": "int8"}, "recipe 'x': precision 'int8' is not one of float32, bfloat16, auto"),
        ({"epochs": 1, "nesterov": "no"}, "recipe 'x': nesterov, flip, bagged and rescale must be True or False"),
        ({"epochs": 1, "flip": None}, "recipe 'x': nesterov, flip, bagged and rescale must be True or False"),
        ({"epochs": 1, "rescale": 0}, "recipe 'x': nesterov, flip, bagged and rescale must be True or False"),
    ],
)
def test_recipes_that_make_no_sense(options, message):
    with pytest.raises((ValueError, TypeError), match=r"recipe|must be") as caught:
        Recipe("x", **options)
    assert str(caught.value) == message


# ---------------------------------------------------------------- what training does


def test_training_a_linear_model_by_hand(data):
    """Softmax regression has a gradient that one can write down; momentum and weight decay are two lines more."""
    recipe = Recipe("x", epochs=3, batch_size=32, lr=0.05, momentum=0.8, weight_decay=0.01, crop=1)
    linear = nn.Linear(64, 10)
    weight, bias = (p.detach().double().numpy().copy() for p in linear.parameters())
    chain = Chain(nn.Flatten(), [], linear)
    history = fit(chain, data, recipe, seed=7, progress=False)

    generator = torch.Generator().manual_seed(7)
    speed = [np.zeros_like(weight), np.zeros_like(bias)]
    step, total = 0, 3 * (100 // 32)
    for epoch in range(3):
        losses, wrong = [], 0
        for x, y in data.train.shuffled(32, generator, crop=1):
            x, y = x.double().flatten(1).numpy(), y.numpy()
            logits = x @ weight.T + bias
            logits -= logits.max(1, keepdims=True)
            p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
            losses += [-math.log(p[i, y[i]]) for i in range(32)]
            wrong += sum(p[i].argmax() != y[i] for i in range(32))
            p[np.arange(32), y] -= 1
            lr = recipe.lr_at(step, total)
            for parameter, gradient, v in zip([weight, bias], [p.T @ x / 32, p.mean(0)], speed, strict=True):
                v *= 0.8
                v += gradient + 0.01 * parameter
                parameter -= lr * v
            step += 1
        row = history.iloc[epoch]
        assert (row["epoch"], row["lr"]) == (epoch + 1, lr)
        assert row["train_loss"] == pytest.approx(np.mean(losses), rel=1e-5)
        assert row["train_error"] == pytest.approx(wrong / 96)
    assert np.allclose(linear.weight.detach().numpy(), weight, rtol=1e-4, atol=1e-6)
    assert np.allclose(linear.bias.detach().numpy(), bias, rtol=1e-4, atol=1e-6)
    scores = evaluate(chain, data.validation)
    assert history["validation_loss"].iloc[-1] == scores["loss"]
    assert history["validation_error"].iloc[-1] == scores["error"]


@pytest.mark.parametrize("training", [True, False])
def test_evaluate_equals_the_loop_by_hand(data, training):
    chain = small("post")
    mix_modes(chain)
    chain.training = training
    before = snapshot(chain)
    scores = evaluate(chain, data.validation)
    assert snapshot(chain) == before
    chain.eval()
    wrong, loss = 0, 0.0
    for x, y in zip(data.validation.normalize(data.validation.images), data.validation.labels, strict=True):
        logits = chain(x[None])[0].double().tolist()
        wrong += logits.index(max(logits)) != y
        loss += math.log(sum(math.exp(z) for z in logits)) - logits[y]
    assert (scores["wrong"], scores["images"]) == (wrong, 40)
    assert scores["error"] == wrong / 40
    assert scores["loss"] == pytest.approx(loss / 40, rel=1e-5)
    batches = data.validation.batches(7)
    assert evaluate(chain, batches) == pytest.approx(scores, rel=1e-6)
    x, y = data.validation.batches(40)[0]
    ignored = torch.cat([y, torch.full((2,), -100)])
    for form in ((x, y), [x, y], [(x, y)], [{"x": x}["x"], y], (torch.cat([x, x[:2]]), ignored)):
        assert evaluate(chain, form) == pytest.approx(scores, rel=1e-6)


def test_evaluate_counts_tokens():
    logits = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[1, 2, -100, 4, 5], [6, -100, 1, 2, 3]])
    scores = evaluate(nn.Identity(), [(logits, labels)])
    pairs = [(z.double(), int(y)) for z, y in zip(logits.flatten(0, 1), labels.flatten(), strict=True) if y >= 0]
    assert scores["images"] == len(pairs) == 8
    assert scores["wrong"] == sum(int(z.argmax()) != y for z, y in pairs)
    assert scores["loss"] == pytest.approx(sum(float(z.exp().sum().log() - z[y]) for z, y in pairs) / 8)


@pytest.mark.parametrize(
    ("data", "message"),
    [([], "there are no batches"), (iter([]), "there are no batches"),
     ([(torch.zeros(2, 64), torch.full((2,), -100))], "nothing is left to score")],
)  # fmt: skip
def test_nothing_to_evaluate(data, message):
    with pytest.raises(ValueError, match=message):
        evaluate(nn.Linear(64, 10), data)


def test_the_network_learns_and_ends_in_eval_mode(data):
    chain, history = run(data, Recipe("x", epochs=12, batch_size=25, lr=0.1))
    assert list(history.columns) == [
        "epoch", "lr", "train_loss", "train_error", "validation_loss", "validation_error",
    ]  # fmt: skip
    assert history["epoch"].tolist() == list(range(1, 13))
    assert history["train_loss"].iloc[-1] < 0.5 * history["train_loss"].iloc[0]
    assert not any(part.training for part in chain.modules())


def test_iterations_can_end_within_an_epoch(data, monkeypatch):
    rates = []
    step = torch.optim.SGD.step
    monkeypatch.setattr(torch.optim.SGD, "step", lambda self: rates.append(self.param_groups[0]["lr"]) or step(self))
    recipe = Recipe("x", iterations=5, batch_size=32, schedule="steps", milestones=(0.6,), lr=0.1, warmup=1)
    _, history = run(data, recipe)  # 3 steps an epoch
    assert rates == pytest.approx([0.01, 0.1, 0.1, 0.01, 0.01])
    assert history["lr"].tolist() == pytest.approx([0.1, 0.01])


def test_on_epoch_sees_every_epoch(data):
    seen = []
    chain, _ = run(data, on_epoch=lambda epoch, chain: seen.append((epoch, chain)))
    assert seen == [(1, chain), (2, chain)]


def test_seeds_decide_the_run(data):
    (a, first), (b, again), (_, other) = run(data, seed=1), run(data, seed=1), run(data, seed=2)
    assert same_bits(a.state_dict(), b.state_dict())
    pd.testing.assert_frame_equal(first, again, check_exact=True)
    assert first["train_loss"].tolist() != other["train_loss"].tolist()


def test_bfloat16_computes_in_bfloat16_and_keeps_float32_parameters(data):
    seen = []
    chain = net()
    chain.units[0].register_forward_hook(lambda module, x, y: seen.append((module.training, y.dtype)))
    history = fit(chain, data, Recipe("x", epochs=1, batch_size=32, precision="bfloat16"), progress=False)
    assert {dtype for training, dtype in seen if training} == {torch.bfloat16}
    assert {dtype for training, dtype in seen if not training} == {torch.float32}
    assert {p.dtype for p in chain.parameters()} == {torch.float32}
    assert history["train_loss"].notna().all()


@pytest.mark.parametrize("fast", [True, False])
def test_auto_computes_in_bfloat16_where_the_processor_is_faster_in_it(data, monkeypatch, fast):
    """It is by matrix units; with its vector instructions alone, a step takes half as long again as in float32."""
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: fast, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True, raising=False)
    seen = set()
    chain = net()
    chain.units[0].register_forward_hook(lambda module, x, y: seen.add(y.dtype) if module.training else None)
    fit(chain, data, Recipe("x", epochs=1, batch_size=32, precision="auto"), progress=False)
    assert seen == {torch.bfloat16 if fast else torch.float32}


def test_the_loss_is_computed_in_float32(data, monkeypatch):
    seen = []
    original = train_module.cross_entropy
    monkeypatch.setattr(train_module, "cross_entropy", lambda z, y, **k: seen.append(z.dtype) or original(z, y, **k))
    run(data, Recipe("x", epochs=1, batch_size=32, precision="bfloat16"))
    assert set(seen) == {torch.float32}


@pytest.mark.parametrize("before", [False, True])
def test_denormal_numbers_are_flushed_in_training_alone(data, before):
    tiny, seen = torch.tensor([1e-40]), []
    able = torch.set_flush_denormal(before)  # False where the CPU cannot

    def flushed(*_):
        seen.append((tiny * 1).item() == 0)
        if len(seen) == 3:
            raise ZeroDivisionError

    run(data, stop_after=1, on_epoch=flushed)
    flushed()
    with pytest.raises(ZeroDivisionError):
        run(data, stop_after=1, on_epoch=flushed)
    flushed()
    assert seen == [able, able and before, able, able and before]


def test_the_mode_that_the_network_is_in_makes_no_difference(data):
    (a, first), evaluated = run(data), net().eval()
    second = fit(evaluated, data, TINY, progress=False, on_epoch=lambda epoch, chain: chain.eval())
    pd.testing.assert_frame_equal(first, second, check_exact=True)
    assert same_bits(a.state_dict(), evaluated.state_dict())


def test_a_batch_larger_than_the_training_split(data):
    for length in ({"epochs": 2}, {"iterations": 10}):
        with pytest.raises(ValueError, match=r"^a batch of 101 images needs at least as many: this split has 100$"):
            run(data, Recipe("x", batch_size=101, **length))


# ---------------------------------------------------------------- branches left out, scaled then or later


@pytest.mark.parametrize("options", [{"active": 2}, {"survival": 0.3}])
def test_branches_that_are_not_rescaled_in_training_are_at_test_time(options):
    chain, (x, _) = small("pre"), images()
    recipe = Recipe("x", epochs=1, rescale=False, **options)
    with torch.no_grad():
        part, tested = thinning(chain, recipe)(torch.Generator().manual_seed(5)), as_tested(chain, recipe)
        states = zip(chain.trace(x)[:-1], chain.units, part.units, tested.units, strict=True)
        for i, (y, unit, thin, test) in enumerate(states):
            f = unit(y) - unit.skip(y)
            p = 2 / 6 if "active" in options else 1 - (i + 1) / 6 * 0.7
            expected = 0 * f if thin.is_deleted else f
            assert torch.allclose(thin(y) - unit.skip(y), expected, atol=1e-5)
            assert torch.allclose(test(y) - unit.skip(y), p * f, atol=1e-5)
    assert 0 < sum(unit.is_deleted for unit in part.units) < 6
    assert {p.data_ptr() for p in tested.parameters()} == {p.data_ptr() for p in chain.parameters()}
    for other in (dataclasses.replace(recipe, rescale=True), TINY):
        assert as_tested(chain, other) is chain


def test_the_history_shows_the_network_as_it_is_tested(data):
    recipe = Recipe("x", epochs=1, batch_size=32, active=2, rescale=False)
    chain, history = run(data, recipe)
    assert history["validation_loss"].iloc[-1] == evaluate(as_tested(chain, recipe), data.validation)["loss"]
    assert history["validation_loss"].iloc[-1] != evaluate(chain, data.validation)["loss"]


@pytest.mark.parametrize("name", ["digits", "short", "paper"])
def test_variants_differ_from_their_recipe_in_what_they_leave_out(name):
    fields = {"active": None, "survival": None, "rescale": True, "bagged": False}
    for variant, changes in {
        "short-paths": {"active": 23},
        "short-paths-unscaled": {"active": 23, "rescale": False},
        "stochastic-depth": {"survival": 0.5},
        "bagged": {"bagged": True},
    }.items():
        recipe = RECIPES[f"{name}-{variant}"]
        assert recipe.name == f"{name}-{variant}"
        assert {key: getattr(recipe, key) for key in fields} == fields | changes
        assert dataclasses.replace(recipe, name=name, **fields) == RECIPES[name]
        assert recipe.nesterov == (name == "short")


class Recorder(nn.Module):
    """A stem that keeps what it is given in training."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x):
        self.seen += [image.numpy().tobytes() for image in x] if self.training else []
        return x.flatten(1)


def test_a_bag_is_drawn_with_replacement_once(data, tmp_path):
    recipe = Recipe("x", epochs=4, batch_size=50, bagged=True)
    ordinary = {image.numpy().tobytes() for image in data.train.normalize(data.train.images)}
    bags = {}
    for seed in (0, 1):
        for stop in (4, 1):  # an interrupted training draws the same bag
            stem = Recorder()
            chain = Chain(stem, [], nn.Linear(64, 10))
            path = tmp_path / f"{seed}-{stop}.pt"
            for _ in range(4 // stop):
                fit(chain, data, recipe, seed=seed, checkpoint=path, stop_after=stop, progress=False)
            epochs = [Counter(stem.seen[start : start + 100]) for start in range(0, 400, 100)]
            assert epochs[0] == epochs[1] == epochs[2] == epochs[3]
            bags[seed, stop] = epochs[0]
    assert bags[0, 4] == bags[0, 1] != bags[1, 4] == bags[1, 1]
    for bag in bags.values():
        assert set(bag) < ordinary
        assert 50 < len(bag) < 76  # of 100 images 63 on average, give or take 3
        assert max(bag.values()) > 2


# ---------------------------------------------------------------- resume


@pytest.mark.parametrize(
    "recipe",
    [
        TINY,
        Recipe("bf16", epochs=2, batch_size=32, lr=0.1, crop=1, precision="bfloat16"),
        Recipe("iterations", iterations=5, batch_size=32, schedule="steps", milestones=(0.6,), warmup=1, flip=True),
    ],
    ids=lambda recipe: recipe.name,
)
def test_two_epochs_are_one_and_a_resumed_one_to_the_last_bit(data, tmp_path, recipe):
    straight, history = run(data, recipe, checkpoint=tmp_path / "straight.pt")
    run(data, recipe, checkpoint=tmp_path / "parts.pt", stop_after=1)
    half = torch.load(tmp_path / "parts.pt", weights_only=True)
    assert len(half["history"]) == 1
    resumed, whole = run(data, recipe, checkpoint=tmp_path / "parts.pt", net_seed=9)  # other weights, to be replaced
    assert same_bits(straight.state_dict(), resumed.state_dict())
    pd.testing.assert_frame_equal(history, whole, check_exact=True)
    a, b = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("straight", "parts"))
    assert same_bits(a, b)  # momentum and generator too
    momentum = [state["momentum_buffer"] for state in b["optimizer"]["state"].values()]
    assert len(momentum) == len(list(straight.parameters()))
    assert all(v.any() for v in momentum)
    # without checkpoints the result is the same
    plainly, _ = run(data, recipe)
    assert same_bits(plainly.state_dict(), straight.state_dict())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_steps_that_a_graph_repeats_on_a_gpu_are_the_same_steps(data, tmp_path, precision):
    recipe = dataclasses.replace(TINY, batch_size=8, precision=precision)
    histories = [
        fit(net().cuda(), data, recipe, progress=False, graph=graph, checkpoint=tmp_path / f"{graph}.pt")
        for graph in (False, True)
    ]
    losses = [history["train_loss"].tolist() for history in histories]
    assert losses[0] == pytest.approx(losses[1], rel=0.005)  # cuDNN may add up in another order from run to run
    here = fit(net(1), data, recipe, progress=False, checkpoint=tmp_path / "True.pt")  # on the processor
    pd.testing.assert_frame_equal(here, histories[1], check_exact=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("options", [{"active": 2}, {"survival": 0.5, "rescale": False}])
def test_a_gpu_leaves_the_same_branches_out(data, options):
    recipe = dataclasses.replace(TINY, **options)
    here, there = (fit(net().to(device), data, recipe, progress=False) for device in ("cpu", "cuda"))
    assert there["train_loss"].tolist() == pytest.approx(here["train_loss"].tolist(), rel=0.005)


def test_without_a_gpu_there_is_no_graph(data):
    chains = [net(), net()]
    for chain, graph in zip(chains, (False, True), strict=True):
        fit(chain, data, TINY, progress=False, graph=graph)
    assert same_bits(*(chain.state_dict() for chain in chains))


def test_numbers_of_numpy_train_and_are_kept_as_any(data, tmp_path):
    numbers = {name: np.int64(getattr(TINY, name)) for name in ("epochs", "batch_size", "crop", "warmup")}
    theirs, _ = run(data, dataclasses.replace(TINY, **numbers), np.int64(3), checkpoint=tmp_path / "a.pt", stop_after=1)
    ours, _ = run(data, TINY, 3, checkpoint=tmp_path / "a.pt", stop_after=0)
    assert same_bits(theirs.state_dict(), ours.state_dict())


def test_a_network_of_another_type_is_trained_in_it_and_is_another_one(data, tmp_path):
    chains = [net().to(dtype) for dtype in (torch.float64, torch.float32)]
    histories = [fit(chain, data, TINY, progress=False, checkpoint=tmp_path / f"{i}.pt")
                 for i, chain in enumerate(chains)]  # fmt: skip
    assert {p.dtype for p in chains[0].parameters()} == {torch.float64}
    assert histories[0]["train_loss"].tolist() == pytest.approx(histories[1]["train_loss"].tolist(), rel=0.02)
    for i, chain in enumerate(reversed(chains)):
        with pytest.raises(ValueError, match="belongs to another network"):
            fit(chain, data, TINY, progress=False, checkpoint=tmp_path / f"{i}.pt")


def test_networks_that_cannot_be_trained(data):
    for chain in (net().requires_grad_(False), Chain(nn.Flatten(), [], nn.ReLU())):
        with pytest.raises(ValueError, match=r"^no parameter of the network can be trained"):
            fit(chain, data, TINY, progress=False)


def test_a_pipe_is_no_checkpoint(data, tmp_path):
    os.mkfifo(tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"^checkpoint .*a\.pt cannot be read \(it is no file\): delete it"):
        run(data, checkpoint=tmp_path / "a.pt")
    os.mkdir(tmp_path / "b.pt")
    with pytest.raises(ValueError, match=r"^checkpoint .*b\.pt cannot be read \(it is no file\): delete it"):
        run(data, checkpoint=tmp_path / "b.pt")


def test_a_finished_run_is_not_repeated(data, tmp_path, monkeypatch):
    chain, history = run(data, checkpoint=tmp_path / "a.pt")
    monkeypatch.setattr(type(data.train), "shuffled", lambda *a, **k: pytest.fail("trained again"))
    again, same = run(data, checkpoint=tmp_path / "a.pt", net_seed=3)
    assert same_bits(chain.state_dict(), again.state_dict())
    pd.testing.assert_frame_equal(history, same, check_exact=True)


@pytest.fixture
def checkpoint(data, tmp_path):
    path = tmp_path / "folder" / "a.pt"
    run(data, checkpoint=path, stop_after=1)
    return path


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("recipe", {"recipe": Recipe("tiny", epochs=3, batch_size=32, lr=0.1, crop=1, flip=True)}),
        ("recipe", {"recipe": Recipe("tiny", epochs=2, batch_size=32, lr=0.1, crop=1, flip=True, survival=0.9)}),
        ("recipe", {"recipe": Recipe("tiny", epochs=2, batch_size=32, lr=0.2, crop=1, flip=True)}),
        ("seed", {"seed": 1}),
        ("network", {"chain": resnet(14, width=4, in_channels=1)}),
        ("network", {"chain": resnet(8, width=5, in_channels=1)}),
        ("network", {"chain": resnet(8, width=4, in_channels=1, preactivation=False)}),
        ("data", {"take": torch.arange(1, 101)}),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_by_name(data, checkpoint, what, change):
    chain = change.get("chain", net())
    if "take" in change:
        whole = digits()
        data = Dataset("digits", whole.train.take(change["take"]), data.validation, data.test, data.classes)
    before, content = snapshot(chain), checkpoint.read_bytes()
    with pytest.raises(ValueError, match=rf"^checkpoint .*a\.pt belongs to another {what} \(.*delete it to train"):
        fit(chain, data, change.get("recipe", TINY), seed=change.get("seed", 0), checkpoint=checkpoint, progress=False)
    assert snapshot(chain) == before
    assert checkpoint.read_bytes() == content


def test_a_flipped_bit_in_a_checkpoint_is_noticed(data, checkpoint):
    content = checkpoint.read_bytes()
    (weight, *_) = (t for t in torch.load(checkpoint, weights_only=True)["chain"].values() if t.numel() > 30)
    at = content.index(weight.flatten()[:8].numpy().tobytes())
    for byte, bit in ((0, 0), (11, 6), (30, 3)):
        checkpoint.write_bytes(content[: at + byte] + bytes([content[at + byte] ^ 1 << bit]) + content[at + byte + 1 :])
        with pytest.raises(ValueError, match=r"^checkpoint .* cannot be read \(.*\): delete it to train"):
            run(data, checkpoint=checkpoint)
    checkpoint.write_bytes(content)
    assert finished_as_if_nothing_happened(data, checkpoint)


@pytest.mark.parametrize("epochs", [1, 2])
def test_one_wrong_bit_anywhere_in_a_checkpoint_is_noticed_or_changes_nothing(data, tmp_path, epochs):
    """Some bytes of a zip file, such as its times, say nothing of the content."""
    path, small_net = tmp_path / "a.pt", resnet(8, width=1, in_channels=1)
    fit(small_net, data, TINY, checkpoint=path, stop_after=epochs, progress=False)
    content, whole = path.read_bytes(), torch.load(path, weights_only=True)
    identity = json.loads(whole["identity"])
    random, noticed = np.random.default_rng(epochs), 0
    tensors = [content.index(v.numpy().tobytes()) for v in whole["chain"].values() if v.dim() == 2]
    places = [*tensors, *random.integers(len(content), size=400)]
    for number, at in enumerate(places):
        wrong = bytearray(content)
        wrong[at] ^= 1 << random.integers(8)
        path.write_bytes(wrong)
        read, message = outcome(train_module._read, path, identity)
        if message:
            assert message.startswith(f"checkpoint {path} ")
            noticed += 1
        else:
            assert number >= len(tensors)
            assert same_bits(read, {name: value for name, value in whole.items() if name != "checksum"})
    assert noticed > 200


@pytest.mark.parametrize("lost", train_module.PARTS)
def test_a_checkpoint_without_a_part_is_named(data, checkpoint, lost):
    state = torch.load(checkpoint, weights_only=True)
    del state[lost]
    if lost != "checksum":
        state["checksum"] = checksum({name: value for name, value in state.items() if name != "checksum"})
    torch.save(state, checkpoint)
    with pytest.raises(ValueError, match=rf"cannot be read \(it lacks {lost}: was it written by fit\?\): delete it"):
        run(data, checkpoint=checkpoint)


def test_a_foreign_state_dict_is_no_checkpoint(data, checkpoint):
    for foreign in (net().state_dict(), [1, 2], torch.zeros(3), {"identity": "{}"}):
        torch.save(foreign, checkpoint)
        with pytest.raises(ValueError, match=r"^checkpoint .*a\.pt cannot be read \(.*written by fit\?\): delete"):
            run(data, checkpoint=checkpoint)


def test_a_checkpoint_from_before_a_field_of_the_recipe_goes_on(data, checkpoint):
    state = torch.load(checkpoint, weights_only=True)
    identity = json.loads(state["identity"])
    del identity["recipe"]["rescale"], identity["recipe"]["nesterov"], state["checksum"]
    state["identity"] = json.dumps(identity)
    torch.save(state | {"checksum": checksum(state)}, checkpoint)
    assert finished_as_if_nothing_happened(data, checkpoint)
    with pytest.raises(ValueError, match="belongs to another recipe"):
        run(data, dataclasses.replace(TINY, nesterov=True), checkpoint=checkpoint)


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.99])
def test_a_truncated_checkpoint_is_named(data, checkpoint, share):
    content = checkpoint.read_bytes()
    checkpoint.write_bytes(content[: int(share * len(content))])
    chain = net()
    before = snapshot(chain)
    with pytest.raises(ValueError, match=r"^checkpoint .*a\.pt cannot be read \((.|\n)*\): delete it to train"):
        fit(chain, data, TINY, checkpoint=checkpoint, progress=False)
    assert snapshot(chain) == before


def test_a_checkpoint_cannot_run_code(data, checkpoint, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    for write in (
        lambda: checkpoint.write_bytes(pickle.dumps(Evil(), protocol=2)),
        lambda: torch.save(Evil(), checkpoint),
    ):
        write()
        with pytest.raises(ValueError, match="cannot be read"):
            run(data, checkpoint=checkpoint)
        assert not (tmp_path / "executed").exists()


def finished_as_if_nothing_happened(data, checkpoint):
    resumed, history = run(data, checkpoint=checkpoint, net_seed=9)
    straight, expected = run(data)
    pd.testing.assert_frame_equal(history, expected, check_exact=True)
    return same_bits(resumed.state_dict(), straight.state_dict())


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("file write failed")])
def test_a_full_disk_leaves_the_last_checkpoint(data, checkpoint, monkeypatch, error):
    content = checkpoint.read_bytes()

    def full_disk(state, path):
        path.write_bytes(content[: len(content) // 2])
        raise error

    with monkeypatch.context() as context:
        context.setattr(torch, "save", full_disk)
        with pytest.raises(OSError, match=r"a\.pt could not be written \(.*\): is the disk full\?"):
            run(data, checkpoint=checkpoint)
    assert checkpoint.read_bytes() == content
    assert [path.name for path in checkpoint.parent.iterdir()] == ["a.pt"]
    assert finished_as_if_nothing_happened(data, checkpoint)


def test_a_real_limit_on_the_size_of_files(data, checkpoint):
    """The operating system refuses to write more, as on a full disk, and torch reports it in its own way."""
    content = checkpoint.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(content) // 2, hard))
    try:
        with pytest.raises(OSError, match=r"a\.pt could not be written"):
            run(data, checkpoint=checkpoint)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert checkpoint.read_bytes() == content
    assert [path.name for path in checkpoint.parent.iterdir()] == ["a.pt"]
    assert finished_as_if_nothing_happened(data, checkpoint)


@pytest.mark.parametrize("when", ["in the middle of an epoch", "while the checkpoint is written"])
def test_an_interrupt_leaves_the_last_checkpoint(data, checkpoint, monkeypatch, when):
    content = checkpoint.read_bytes()
    calls = []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*arguments)

    def half_written(state, path):
        path.write_bytes(content[:100])
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        if when.startswith("in"):
            original = train_module.cross_entropy
            context.setattr(train_module, "cross_entropy", interrupted)
        else:
            context.setattr(torch, "save", half_written)
        with pytest.raises(KeyboardInterrupt):
            run(data, checkpoint=checkpoint)
    assert checkpoint.read_bytes() == content
    assert [path.name for path in checkpoint.parent.iterdir()] == ["a.pt"]
    assert finished_as_if_nothing_happened(data, checkpoint)


def test_the_bar_leaves_nothing_behind(data, capsys):
    fit(net(), data, TINY)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.endswith("\r")
    assert captured.err.rsplit("\r", 2)[-2].strip() == ""


# ---------------------------------------------------------------- arguments at the door


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"chain": nn.Linear(64, 10)}, TypeError, "chain is a Linear: expected a Chain, such"),
        ({"data": digits().train}, TypeError, "data is a Split: expected a Dataset"),
        ({"recipe": "digits"}, TypeError, "recipe is a str: expected a Recipe"),
        ({"stop_after": -1}, ValueError, "stop_after must be at least 0, not -1"),
        ({"seed": 1.5}, TypeError, "seed must be a whole number, not 1.5"),
        ({"seed": -1}, ValueError, "seed must be at least 0, not -1"),
        ({"chain": Chain(nn.Flatten(), [], nn.Linear(64, 9))}, ValueError,
         r"the network returns \(32, 9\) for 32 images of 10 classes: expected \(B, K\)"),
        ({"chain": resnet(8, width=4)}, ValueError, r"the network cannot take x, inputs of shape \(32, 1, 8, 8\)"),
        ({"chain": Chain(nn.Conv2d(1, 1, 1), [], nn.Identity())}, ValueError,
         r"the network returns \(32, 1, 8, 8\) for 32"),
    ],
)  # fmt: skip
def test_what_fit_refuses(data, changes, error, message):
    arguments = {"chain": net(), "data": data, "recipe": TINY, "seed": 0, "stop_after": None} | changes
    with pytest.raises(error, match=f"^{message}"):
        fit(**arguments, progress=False)


def test_a_dataset_with_too_few_classes_or_no_images_to_validate(data):
    with pytest.raises(ValueError, match=r"^a label is beyond the 9 classes of the dataset 'digits'$"):
        run(dataclasses.replace(data, classes=data.classes[:9]))
    with pytest.raises(ValueError, match=r"^data\.validation holds no images"):
        run(dataclasses.replace(data, validation=data.validation.take(torch.arange(0))))


@pytest.mark.parametrize("label", [10, -1, -101])
def test_labels_that_are_no_classes_are_not_scored(data, label):
    x, y = data.validation.batches(40)[0]
    y = y.clone()
    y[3] = label
    with pytest.raises(ValueError, match=r"0 to 9"):
        evaluate(net(), (x, y))


def test_a_network_that_returns_nan_is_not_scored(data):
    chain = net()
    with torch.no_grad():
        next(chain.parameters()).fill_(math.nan)
    with pytest.raises(ValueError, match=r"^logits are NaN or infinite: look at weights and inputs, or the training"):
        evaluate(chain, data.validation)


@pytest.mark.parametrize("values", [[math.inf], [-math.inf], [math.inf, 0.0], [math.nan, 0.0]])
def test_logits_that_give_no_loss_are_not_scored(values):
    class Head(nn.Module):
        def forward(self, y):
            return torch.tensor(values).repeat(len(y), 2)

    chain = net()
    chain.head = Head()
    with pytest.raises(ValueError, match=r"^logits are NaN or infinite"):
        evaluate(chain, (images(3)[0], torch.zeros(3).long()))


def test_a_class_that_is_ruled_out_is_no_fault():
    class Head(nn.Module):
        def forward(self, y):
            return torch.tensor([[-math.inf, 0.0, 0.0]]).repeat(len(y), 1)

    chain = net()
    chain.head = Head()
    assert evaluate(chain, (images(3)[0], torch.ones(3).long()))["loss"] == pytest.approx(math.log(2))


JUNK = [
    None, -1, 0, 1.5, math.nan, math.inf, "x", "", b"x", [], {}, (), object(), True, 2**70, Path("nowhere"), "cuda:77",
    nn.Identity(), np.zeros(3), torch.zeros(0), torch.ones(2).long(), torch.full((2, 1, 8, 8), math.nan),
    torch.zeros(2, 3, 8, 8).double(),
]  # fmt: skip


def calls(data, folder):
    """Public functions, each with arguments that it takes."""
    split, generator = data.validation, torch.Generator()
    x, y = split.batches(8)[0]
    chain = net()
    path = save(net(), folder / "a.safetensors")
    fields = dataclasses.asdict(TINY)
    return [
        (Recipe, {key: fields[key] for key in fields if key not in ("nesterov", "flip", "rescale")}),
        (partial(fit, progress=False), {"chain": chain, "data": data, "recipe": dataclasses.replace(TINY, epochs=1),
                                        "seed": 0, "stop_after": 1, "checkpoint": folder / "a.pt"}),
        (evaluate, {"chain": chain, "data": (x, y)}),
        (lambda x, y: evaluate(chain, (x, y)), {"x": x, "y": y}),
        (save, {"chain": chain, "path": folder / "b.safetensors", "seed": 0}),
        (load, {"name": path}),
        (header, {"name": path}),
        (Split, {name: getattr(split, name) for name in ("images", "labels", "mean", "std")}),
        (split.normalize, {"images": split.images}),
        (split.batches, {"size": 10, "device": "cpu"}),
        (lambda **some: list(split.shuffled(generator=generator, **some)), {"size": 10, "crop": 1, "device": "cpu"}),
        (split.take, {"chosen": torch.tensor([1])}),
        (split.stratified, {"per_class": 1}),
        (load_dataset, {"name": "digits", "root": None}),
        (cifar10, {"root": folder, "cache": folder / "cache", "per_class": (2, 1)}),
    ]  # fmt: skip


@given(choice=st.data())
@settings(max_examples=300, suppress_health_check=list(HealthCheck))
def test_wrong_arguments_are_refused_by_the_library_itself(data, tmp_path, monkeypatch, choice):
    """An error is raised in a line of ours, which names what was wrong, and no score is NaN."""
    monkeypatch.chdir(tmp_path)
    with TemporaryDirectory(dir=tmp_path) as folder:
        function, arguments = choice.draw(st.sampled_from(calls(data, Path(folder))))
        name = choice.draw(st.sampled_from(sorted(arguments)))
        wrong = choice.draw(st.sampled_from(JUNK))
        result, problem = None, None
        try:
            result = function(**arguments | {name: wrong})
        except (ValueError, TypeError, OSError) as error:
            problem = error
    if problem is not None:
        *_, last = traceback.extract_tb(problem.__traceback__)
        assert Path(last.filename).parent.name == "unravelling", f"{name}={wrong!r}: {problem!r} from {last}"
        assert len(str(problem)) > 20
    elif isinstance(result, dict):
        assert all(value == value for value in result.values()), f"{name}={wrong!r} gives {result}"


@pytest.mark.parametrize("milestones", [(32_000,), (0.5, 1.5), ("0.5",), (math.nan,)])
def test_milestones_are_fractions_of_the_run(milestones):
    with pytest.raises(ValueError, match=r"milestones .* are not fractions of the run$"):
        Recipe("steps", iterations=10, schedule="steps", milestones=milestones)


def test_training_goes_on_where_the_caller_has_turned_gradients_off():
    recipe, data = Recipe("x", iterations=2, batch_size=64), digits()
    weights = []
    for mode in (contextlib.nullcontext, torch.no_grad, torch.inference_mode):
        chain = build("resnet8", "digits", seed=0)
        with mode():
            fit(chain, data, recipe, seed=0)
        weights.append(torch.cat([p.detach().flatten() for p in chain.parameters()]))
    assert torch.equal(weights[0], weights[1])
    assert torch.equal(weights[0], weights[2])
