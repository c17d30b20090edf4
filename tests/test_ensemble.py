"""Ensembles, sub-networks and batch-norm shifts, against averages, subsets and moments taken by hand."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from helpers import images, randomized, small, snapshot
from torch import nn
from torch.nn.functional import nll_loss, softmax
from unravelling import Chain, Dataset, Unit, build, digits, measure, resnet, save
from unravelling import __main__ as cli
from unravelling.data import Split
from unravelling.ensemble import average, disagreement, predictions, random_subnetworks, remove_members
from unravelling.results import KEYS, stored


def made_up(members=4, count=40, classes=5, seed=0):
    random = np.random.default_rng(seed)
    logits = random.normal(0, 2, (members, count, classes)).astype(np.float32)
    return logits, random.integers(0, classes, count)


def mean_probability(logits):
    return softmax(torch.from_numpy(logits).double(), -1).mean(0)


def test_predictions_are_the_networks_own_outputs():
    chains = [randomized(resnet(8, width=4, in_channels=1, seed=seed), seed) for seed in range(3)]
    x, y = images(6)
    logits, labels = predictions(chains, [(x[:4], y[:4]), (x[4:], y[4:])])
    with torch.no_grad():
        expected = torch.stack([torch.cat([chain(x[:4]), chain(x[4:])]) for chain in chains])
    assert np.array_equal(logits, expected.numpy())
    assert labels.tolist() == y.tolist()
    with pytest.raises(ValueError, match="at least one member"):
        predictions([], [(x, y)])


def test_the_average_is_of_probabilities():
    logits, _ = made_up()
    assert np.allclose(np.exp(average(logits)), mean_probability(logits).numpy(), rtol=1e-12)
    one = np.array([[[0.0, math.log(3)]]]), np.array([[[0.0, -math.log(4)]]])  # 1/4, 3/4 and 4/5, 1/5
    assert np.allclose(np.exp(average(np.concatenate(one))), [[0.525, 0.475]])
    assert np.isfinite(average(np.array([[[1e4, 0.0]], [[0.0, 1e4]]]))).all()


def test_every_way_to_remove_members_is_tried_once():
    logits, labels = made_up()
    table = remove_members(logits, labels, range(4))
    subsets = [set(s) for left in (4, 3, 2, 1) for s in itertools.combinations(range(4), left)]
    assert [set(map(int, kept.split())) for kept in table["kept"]] == subsets
    whole = mean_probability(logits).argmax(-1).numpy() != labels
    for row, subset in zip(table.itertuples(), subsets, strict=True):
        probability = mean_probability(logits[sorted(subset)])
        wrong = probability.argmax(-1).numpy() != labels
        assert row.removed == 4 - len(subset)
        assert row.error == pytest.approx(wrong.mean())
        assert row.delta_error == pytest.approx(wrong.mean() - whole.mean())
        assert row.loss == pytest.approx(nll_loss(probability.log(), torch.from_numpy(labels)).item())
        votes = logits[sorted(subset)].argmax(-1)
        pairs = [(a != b).mean() for a, b in itertools.combinations(votes, 2)]
        assert row.disagreement == pytest.approx(np.mean(pairs)) if pairs else math.isnan(row.disagreement)


def test_members_can_be_removed_at_random():
    logits, labels = made_up(members=5)
    table = remove_members(logits, labels, [1, 3], trials=8, seed=4)
    every = remove_members(logits, labels, range(5)).set_index("kept")
    assert table["removed"].tolist() == [1] * 8 + [3] * 8
    assert (table["error"].to_numpy() == every.loc[table["kept"], "error"].to_numpy()).all()
    assert table.loc[table["removed"] == 3, "kept"].nunique() > 1
    assert table.equals(remove_members(logits, labels, [1, 3], trials=8, seed=4))
    for number in (5, -1):
        with pytest.raises(ValueError, match=f"cannot remove {number} of 5 members"):
            remove_members(logits, labels, [number])


def test_disagreement_is_the_mean_over_pairs():
    logits, _ = made_up(members=6)
    votes = logits.argmax(-1)
    pairs = [(votes[a] != votes[b]).mean() for a in range(6) for b in range(a)]
    assert disagreement(logits) == pytest.approx(np.mean(pairs))
    assert disagreement(logits[[0, 0, 0]]) == 0
    with pytest.raises(ValueError, match="at least two"):
        disagreement(logits[:1])


@pytest.mark.parametrize("active", [0, 1, 4, 6])
def test_random_subnetworks_are_lesions_of_the_right_size(active):
    chain, (x, y) = small("pre"), images(4)
    before = snapshot(chain)
    logits, labels = random_subnetworks(chain, [(x, y)], active, 12, seed=1)
    assert snapshot(chain) == before
    assert labels.tolist() == y.tolist()
    with torch.no_grad():
        lesions = {gone: chain.without(*gone)(x).numpy() for gone in itertools.combinations(range(6), 6 - active)}
    matches = [{gone for gone, expected in lesions.items() if np.array_equal(expected, found)} for found in logits]
    assert all(matches)
    assert len(set(map(frozenset, matches))) > 1 or active in (0, 6)


def test_more_active_units_than_there_are():
    with pytest.raises(ValueError, match="cannot keep 7 units: this chain has 6"):
        random_subnetworks(small("pre"), [images(2)], 7, 2)


def test_subnetworks_reports_members_and_their_average(monkeypatch):
    monkeypatch.setattr(measure, "ACTIVE", (2, 6, 9))
    chain, data = small("pre"), digits()
    table = measure.subnetworks(chain, data, 3)
    assert table["active"].tolist() == [2, 6]
    logits, labels = random_subnetworks(chain, data.test, 2, 20, 3)
    errors = [(member.argmax(-1) != labels).mean() for member in logits]
    together = (mean_probability(logits).argmax(-1).numpy() != labels).mean()
    row = table.iloc[0]
    assert (row["mean_error"], row["best_error"]) == pytest.approx((np.mean(errors), min(errors)))
    assert (row["averaged_error"], row["disagreement"]) == pytest.approx((together, disagreement(logits)))
    assert table["disagreement"][1] == 0  # all 20 are the whole network


# --- batch-norm shift -------------------------------------------------------------------------------------------------


class Constant(nn.Module):
    def forward(self, y):
        return torch.full_like(y, 3.0)


class Zero(nn.Module):
    def forward(self, y):
        return torch.zeros_like(y)


class Same(nn.Module):
    def forward(self, y):
        return y


def tiny_data():
    generator = torch.Generator().manual_seed(0)
    splits = []
    for count in (60, 20, 30):
        pixels = torch.randint(0, 256, (count, 1, 4, 4), generator=generator, dtype=torch.uint8)
        splits.append(Split(pixels, torch.arange(count) % 3, torch.tensor([120.0]), torch.tensor([70.0])))
    return Dataset("tiny", *splits, classes=("a", "b", "c"))


def test_the_shift_is_what_the_states_moments_say():
    head = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    chain = Chain(nn.Identity(), [Unit(Zero()), Unit(Constant()), Unit(Same())], head).eval()
    data = tiny_data()
    table = measure.batch_norm_shift(chain, data, 0)
    x = data.train.batches(60)[0][0]
    std = x.std(correction=0).item()
    mean = x.mean().item()
    # without unit 1, y_2 moves by 3 and y_3, twice y_2, by 6; their spreads, std and 2 std, stay
    second = math.sqrt(((3 / std) ** 2 + (6 / (2 * std)) ** 2) / 2)
    # without unit 2, y_3 = 2 (x + 3) becomes x + 3: mean and spread halve
    third = math.hypot(mean + 3, std) / (2 * std)
    assert table["shift"].tolist() == pytest.approx([0, second, third], rel=1e-3, abs=1e-6)
    test, labels = data.test.batches(30)[0]
    with torch.no_grad():
        loss = [nn.functional.cross_entropy(c(test), labels).item() for c in (chain, chain.without(1))]
    assert table["delta_loss"][1] == pytest.approx(loss[1] - loss[0], abs=1e-5)
    assert table["reestimated_delta_loss"].tolist() == pytest.approx(table["delta_loss"].tolist(), abs=1e-6)  # no norms


def test_statistics_are_renewed_in_the_intact_network_too():
    chain, data = small("pre"), digits()
    for branch in (unit.branch for unit in chain.units):  # branches that add nothing: deleting them changes nothing
        nn.init.zeros_(branch[-1].weight)
    before = snapshot(chain)
    table = measure.batch_norm_shift(chain, data, 0)
    assert snapshot(chain) == before
    assert table["unit"].tolist() == [0, 1, 2, 3, 4, 5]
    assert np.abs(table[["shift", "delta_loss", "reestimated_delta_loss"]]).max(axis=None) < 1e-6


# --- the command line -------------------------------------------------------------------------------------------------


@pytest.fixture
def runs(tmp_path):
    """A folder with four untrained networks, saved as ``train`` would."""
    for seed in range(4):
        chain = randomized(build("resnet8", "digits", seed=seed), seed)
        path = tmp_path / f"weights/digits/resnet8-seed{seed}.safetensors"
        save(chain, path, recipe="digits" if seed < 3 else "short")
    return tmp_path


def main(out, *arguments):
    return cli.main(["ensemble", "resnet8", *arguments, "--out", str(out), "--device", "cpu"])


def test_ensembles_from_the_shell(runs, capsys):
    for _ in range(2):  # the second run replaces the rows of the first
        assert main(runs, "--seeds", "2,0,1", "--size", "3") == 0
    assert "resnet8x3, ensemble 0: error" in capsys.readouterr().out
    assert main(runs, "--seeds", "0-2", "--size", "1") == 0
    table = stored("digits/ensemble", runs / "results", recipe=None)
    assert [*table.columns[:6]] == [*KEYS, "removed", "trial"]
    assert table.groupby(["network", "seed"]).size().to_dict() == {
        ("resnet8x1", 0): 1, ("resnet8x1", 1): 1, ("resnet8x1", 2): 1, ("resnet8x3", 0): 7,
    }  # fmt: skip
    data = digits().test
    x, y = data.batches(len(data))[0]
    chains = [randomized(build("resnet8", "digits", seed=seed), seed) for seed in (2, 0, 1)]
    with torch.no_grad():
        probabilities = torch.stack([softmax(chain(x).double(), -1) for chain in chains])
    for row in table[table["network"] == "resnet8x3"].itertuples():
        mean = probabilities[[int(member) for member in str(row.kept).split()]].mean(0)
        assert row.error == pytest.approx((mean.argmax(1) != y).double().mean().item(), abs=1e-3)
        assert row.loss == pytest.approx(nll_loss(mean.log(), y).item(), rel=1e-4)
    record = json.loads((runs / "results/digits/provenance.json").read_text())["ensemble.csv"]
    assert record[0]["command"].startswith("python -m unravelling ensemble resnet8 --seeds 2,0,1 --size 3")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--seeds", "0-2", "--size", "2"), "3 seeds do not make ensembles of 2"),
        (("--seeds", "0-2", "--size", "0"), "3 seeds do not make ensembles of 0"),
        (("--seeds", "0-1,7", "--size", "3"), "resnet8-seed7.safetensors"),
        (("--seeds", "2,3", "--size", "2"), "was trained with recipe short, not digits"),
    ],
)
def test_what_is_not_an_ensemble(runs, capsys, arguments, message):
    assert main(runs, *arguments) == 2
    assert message in capsys.readouterr().err
    assert not (runs / "results").exists()
