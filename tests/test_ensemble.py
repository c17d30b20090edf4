"""Ensembles and sub-networks, against averages and subsets taken by hand."""

import itertools
import math

import numpy as np
import pytest
import torch
from helpers import images, randomized, small, snapshot
from torch.nn.functional import nll_loss, softmax
from unravelling import resnet
from unravelling.ensemble import average, disagreement, predictions, random_subnetworks, remove_members


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
        assert row.confidence == pytest.approx(probability.max(-1).values.mean().item())
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


@pytest.mark.parametrize("number", [0, -1])
def test_no_trials_and_no_members(number):
    with pytest.raises(ValueError, match=rf"^trials must be at least 1, not {number}$"):
        remove_members(*made_up(), [1], trials=number)
    with pytest.raises(ValueError, match=rf"^members must be at least 1, not {number}$"):
        random_subnetworks(small("pre"), [images(2)], 3, number)


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


def test_batches_in_another_order_for_each_member_are_refused():
    x, _ = images(8, seed=3)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, torch.arange(8) % 4), 4, shuffle=True)
    torch.manual_seed(0)
    with pytest.raises(ValueError, match=r"another order for each member: take a loader without shuffle=True$"):
        predictions([small("pre")] * 3, loader)


@pytest.mark.parametrize("labels", [[0.9, 1.9, 2.9], [True, False, True], [0, 1]])
def test_labels_that_are_no_classes_of_the_images(labels):
    logits = np.random.default_rng(0).normal(size=(2, 3, 4))
    with pytest.raises(ValueError, match=r"^labels is .* expected a whole number for each of 3 images$"):
        remove_members(logits, labels, [1])


def test_infinite_logits_have_no_average():
    logits = np.zeros((2, 3, 4))
    logits[0, 0, 0] = np.inf
    with pytest.raises(ValueError, match="not empty and finite"):
        average(logits)
