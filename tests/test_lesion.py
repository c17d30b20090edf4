"""Lesions: shared work gives the bits of the naive loop, at the promised cost, and changes nothing."""

import numpy as np
import pytest
import torch
from helpers import SMALL, images, mix_modes, small, snapshot
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import batch_norm, cross_entropy
from torch.nn.modules.batchnorm import _BatchNorm
from unravelling import (
    Split,
    delete_each,
    delete_random,
    evaluate,
    plain,
    reestimate_batch_norm,
    reorder,
    resnet,
    vgg,
)
from unravelling.lesion import evaluate_variants, variant_logits
from unravelling.stats import paired_bootstrap, wilson

BATCHES = [images(5, seed=0), images(3, seed=1)]


def naive(chain, batches):
    """Logits and results of one network, batch by batch: what a reader would write."""
    chain.eval()
    with torch.no_grad():
        logits = [chain(x) for x, _ in batches]
    labels = torch.cat([y for _, y in batches])
    logits = torch.cat(logits)
    loss = cross_entropy(logits.double(), labels, reduction="none")
    return logits.numpy(), (logits.argmax(1) != labels).numpy(), loss.numpy()


def lesions(table, chain):
    """The lesioned networks that the rows of a table speak of."""
    if "units" in table:
        return [chain.without(*map(int, units.split())) for units in table["units"]]
    return [chain.without(unit) for unit in table["unit"]]


class Counter:
    """Counts the calls of every branch of a chain."""

    def __init__(self, chain):
        self.chain, self.calls = chain, []

    def __enter__(self):
        self.handles = [
            unit.branch.register_forward_hook(lambda *_, i=i: self.calls.append(i))
            for i, unit in enumerate(self.chain.units)
        ]
        return self

    def __exit__(self, *_):
        for handle in self.handles:
            handle.remove()


@pytest.mark.parametrize("kind", SMALL)
def test_shared_work_gives_the_bits_of_the_naive_loop(kind):
    chain = small(kind)
    n = len(chain)
    intact = tuple(range(n))
    gone = [(), *((i,) for i in range(n)), (0, 1), (1, 4), (0, 3, n - 1), intact, (2,)]
    variants = [tuple(~i if i in chosen else i for i in intact) for chosen in gone]
    logits, labels = variant_logits(chain, BATCHES, variants)
    wrong, loss = evaluate_variants(chain, BATCHES, variants)
    assert labels.tolist() == torch.cat([y for _, y in BATCHES]).tolist()
    assert logits.shape == (len(gone), 8, 10)
    for chosen, our_logits, our_wrong, our_loss in zip(gone, logits, wrong, loss, strict=True):
        their_logits, their_wrong, their_loss = naive(chain.without(*chosen), BATCHES)
        assert our_logits.tobytes() == their_logits.tobytes()
        assert (our_wrong == their_wrong).all()
        assert np.allclose(our_loss, their_loss, rtol=1e-12, atol=1e-15)


def test_two_threads_and_channels_last_give_the_bits_too():
    chain = resnet(20, in_channels=1).to(memory_format=torch.channels_last).eval()
    batches = [(x.contiguous(memory_format=torch.channels_last), y) for x, y in [images(40)]]
    variants = [tuple(~j if j == i else j for j in range(9)) for i in range(9)]
    torch.set_num_threads(2)
    try:
        logits, _ = variant_logits(chain, batches, variants)
        for i in range(9):
            assert logits[i].tobytes() == naive(chain.without(i), batches)[0].tobytes()
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("kind", SMALL)
@pytest.mark.parametrize("measure", ["each", "random"])
def test_every_column_by_hand(kind, measure):
    chain = small(kind)
    table = delete_each(chain, BATCHES) if measure == "each" else delete_random(chain, BATCHES, [1, 3], 4, seed=1)
    intact_wrong, intact_loss = naive(chain, BATCHES)[1:]
    assert len(table) == (len(chain) if measure == "each" else 8)
    for row, lesioned in zip(table.itertuples(), lesions(table, chain), strict=True):
        wrong, loss = naive(lesioned, BATCHES)[1:]
        assert row.images == 8
        assert row.error == wrong.mean()
        assert row.loss == pytest.approx(loss.mean(), rel=1e-12)
        assert (row.error_low, row.error_high) == wilson(int(wrong.sum()), 8)
        for name, difference in (
            ("delta_error", wrong.astype(float) - intact_wrong),
            ("delta_loss", loss - intact_loss),
        ):
            assert getattr(row, name) == pytest.approx(difference.mean(), rel=1e-9, abs=1e-12)
            low, high = getattr(row, f"{name}_low"), getattr(row, f"{name}_high")
            assert (low, high) == pytest.approx(paired_bootstrap(difference), rel=1e-9, abs=1e-12)
            assert low <= getattr(row, name) <= high
    assert table["delta_loss"].abs().max() > 0
    if measure == "each":
        assert table["unit"].tolist() == list(range(len(chain)))
        assert table["name"].tolist() == [unit.name for unit in chain.units]
        assert table["stage"].tolist() == [unit.stage for unit in chain.units]
        assert table["is_transition"].tolist() == [unit.is_transition for unit in chain.units]


def test_a_split_is_evaluated_as_evaluate_does():
    chain = small("pre")
    random = torch.Generator().manual_seed(0)
    split = Split(
        torch.randint(17, (30, 1, 8, 8), generator=random).to(torch.uint8),
        torch.randint(10, (30,), generator=random),
        torch.tensor([8.0]),
        torch.tensor([5.0]),
    )
    table = delete_each(chain, split)
    for row in table.itertuples():
        scores = evaluate(chain.without(row.unit), split)
        assert (row.error, row.images) == (scores["error"], 30)
        assert row.loss == pytest.approx(scores["loss"], rel=1e-12)
        assert row.delta_error == pytest.approx(scores["error"] - evaluate(chain, split)["error"])


def test_batches_may_come_from_a_generator():
    chain = small("pre")
    assert delete_each(chain, (batch for batch in BATCHES)).equals(delete_each(chain, BATCHES))


@pytest.mark.parametrize(
    "chain",
    [
        resnet(8, width=2, in_channels=1),
        resnet(32, width=2, in_channels=1, preactivation=False),
        plain(20, width=2, in_channels=1),
        vgg(15, width=2, in_channels=1, image_size=8),
    ],
    ids=repr,
)
def test_delete_each_takes_half_of_the_naive_branch_evaluations(chain):
    n = len(chain)
    with Counter(chain.eval()) as counter:
        delete_each(chain, BATCHES[:1])
        assert len(counter.calls) == n * (n + 1) // 2
        counter.calls.clear()
        delete_each(chain, BATCHES)
        assert len(counter.calls) == n * (n + 1)  # two batches
        counter.calls.clear()
        for i in range(n):  # the oracle counts rightly
            naive(chain.without(i), BATCHES[:1])
        assert len(counter.calls) == n * (n - 1)


@given(
    numbers=st.lists(st.integers(0, 9), min_size=1, max_size=3, unique=True),
    trials=st.integers(1, 6),
    seed=st.integers(0, 100),
)
def test_delete_random_evaluates_every_distinct_prefix_once(numbers, trials, seed):
    chain = resnet(20, width=2, in_channels=1).eval()
    with Counter(chain) as counter:
        table = delete_random(chain, BATCHES[:1], numbers, trials, seed)
    kept = [[i not in map(int, units.split()) for i in range(9)] for units in table["units"]] + [[True] * 9]
    prefixes = {tuple(bits[: i + 1]) for bits in kept for i in range(9) if bits[i]}  # a node for each branch evaluation
    assert len(counter.calls) == len(prefixes)
    assert len(counter.calls) <= sum(map(sum, kept))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", SMALL)
def test_the_network_stays_as_it_is(kind, training):
    chain = small(kind)
    mix_modes(chain)
    chain.training = training
    before = snapshot(chain)
    state = torch.get_rng_state()
    first = delete_each(chain, BATCHES)
    delete_random(chain, BATCHES, 2, 3)
    reestimate_batch_norm(chain.without(1), BATCHES)
    assert snapshot(chain) == before
    assert torch.equal(torch.get_rng_state(), state)
    assert first.equals(delete_each(small(kind), BATCHES))  # and the mode it was in made no difference


def test_the_network_stays_as_it_is_after_an_error():
    chain = small("pre").train()
    before = snapshot(chain)
    with pytest.raises(RuntimeError):
        delete_each(chain, [(torch.zeros(2, 3, 8, 8), torch.zeros(2, dtype=torch.long))])
    assert snapshot(chain) == before


@pytest.mark.parametrize("trials", [0, -3])
@pytest.mark.parametrize("function", [delete_random, reorder])
def test_no_trials(function, trials):
    with pytest.raises(ValueError, match=rf"^trials must be at least 1, not {trials}$"):
        function(small("pre"), BATCHES, 1, trials)


@pytest.mark.parametrize("label", [-1, 10])
def test_a_label_that_is_no_class(label):
    x, y = images(3)
    y[1] = label
    with pytest.raises(ValueError, match=rf"^there is a label {label}: expected 0 to 9, or -100 to ignore it$"):
        delete_each(small("pre"), (x, y))


def test_nothing_but_ignored_labels():
    x, y = images(3)
    with pytest.raises(ValueError, match=r"^every label is -100, which counts for nothing"):
        delete_each(small("pre"), (x, torch.full_like(y, -100)))


def test_labels_that_only_a_loss_understands():
    x, y = images(3)
    batch = [(x, {"class": y})]
    with pytest.raises(ValueError, match=r"^the labels are a dict: pass a loss that knows what to do with them$"):
        delete_each(small("pre"), batch)
    table = delete_each(small("pre"), batch, loss=lambda logits, y: cross_entropy(logits, y["class"]))
    assert table["loss"].to_numpy() == pytest.approx(delete_each(small("pre"), (x, y))["loss"].to_numpy(), rel=1e-5)
    assert table["error"].isna().all()


def test_ignored_images_count_for_nothing():
    chain, (x, y) = small("pre"), images(5)
    some = y.clone()
    some[[1, 3]] = -100
    table = delete_each(chain, [(x[:2], some[:2]), (x[2:], some[2:])])
    kept = [0, 2, 4]
    expected = delete_each(chain, (x[kept], y[kept]))
    assert table["error"].to_numpy() == pytest.approx(expected["error"].to_numpy())
    assert table["loss"].to_numpy() == pytest.approx(expected["loss"].to_numpy(), rel=1e-5)


# ---------------------------------------------------------------- random choices


def test_choices_are_distinct_units_and_follow_the_seed():
    chain = small("pre")
    table = delete_random(chain, BATCHES, [0, 2, 6], 20, seed=3)
    assert table["k"].tolist() == [0] * 20 + [2] * 20 + [6] * 20
    assert table["trial"].tolist() == list(range(20)) * 3
    for row in table.itertuples():
        gone = [int(i) for i in row.units.split()]
        assert gone == sorted(set(gone))
        assert len(gone) == row.k
    assert set(table["units"][table["k"] == 6]) == {"0 1 2 3 4 5"}
    assert (table[["delta_error", "delta_loss"]][table["k"] == 0] == 0).all(axis=None)
    assert table.equals(delete_random(chain, BATCHES, [0, 2, 6], 20, seed=3))
    assert table["units"].tolist() != delete_random(chain, BATCHES, [0, 2, 6], 20, seed=4)["units"].tolist()


def test_every_choice_is_equally_likely():
    chain = small("pre")
    table = delete_random(chain, [images(1)], 2, 3000)
    counts = table["units"].value_counts()
    assert len(counts) == 15
    assert ((counts - 200).abs() < 5 * 200**0.5).all()


def test_only_candidates_are_deleted():
    chain = small("pre")
    table = delete_random(chain, BATCHES, 2, 30, candidates=[1, 3, 5])
    assert set(table["units"]) == {"1 3", "1 5", "3 5"}


@pytest.mark.parametrize("k", [np.int64(2), np.array([2]), range(2, 3), (2,)])
def test_k_may_come_from_numpy_or_be_any_sequence(k):
    chain = small("pre")
    assert delete_random(chain, BATCHES, k, 3).equals(delete_random(chain, BATCHES, 2, 3))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"k": 7}, ValueError, "cannot delete 7 units: there are 6 to choose from"),
        ({"k": [1, 7]}, ValueError, "cannot delete 7 units: there are 6 to choose from"),
        ({"k": -1}, ValueError, "cannot delete -1 units: there are 6 to choose from"),
        ({"k": 3, "candidates": [0, 1]}, ValueError, "cannot delete 3 units: there are 2 to choose from"),
        ({"k": 1, "candidates": [6]}, IndexError, "unit 6 does not exist: this chain has units 0 to 5"),
        ({"k": 1, "candidates": [2, 2]}, ValueError, "unit 2 is named more than once: name each unit once"),
    ],
)
def test_choices_that_cannot_be_made(arguments, error, message):
    with pytest.raises(error) as caught:
        delete_random(small("pre"), BATCHES, trials=2, **arguments)
    assert str(caught.value) == message


# ---------------------------------------------------------------- batch norm


@pytest.mark.parametrize("kind", ["pre", "post-projection", "plain"])
def test_statistics_are_reestimated_as_by_hand(kind):
    chain = small(kind, torch.float64)
    lesioned = chain.without(1, 3)
    batches = [images(6, seed=s, dtype=torch.float64) for s in range(3)]
    healed = reestimate_batch_norm(lesioned, batches)

    # what every batch norm sees when all before it normalise by the batch, recorded by a function written anew
    seen = {}

    def by_batch(name, layer):
        def forward(x):
            axes = [axis for axis in range(x.dim()) if axis != 1]
            seen.setdefault(name, []).append((x.mean(axes), x.var(axes, correction=1)))
            return batch_norm(x, None, None, layer.weight, layer.bias, training=True, eps=layer.eps)

        return forward

    layers = {name: part for name, part in lesioned.named_modules() if isinstance(part, _BatchNorm)}
    assert len(layers) >= 9
    with torch.no_grad():
        try:
            for name, layer in layers.items():
                layer.forward = by_batch(name, layer)
            for x, _ in batches:
                lesioned(x)
        finally:
            for layer in layers.values():
                del layer.forward
    ours = dict(healed.named_modules())
    for name, layer in layers.items():
        mean = sum(m for m, _ in seen[name]) / 3
        variance = sum(v for _, v in seen[name]) / 3
        assert torch.allclose(ours[name].running_mean, mean, rtol=1e-10, atol=1e-12), name
        assert torch.allclose(ours[name].running_var, variance, rtol=1e-10, atol=1e-12), name
        assert not torch.allclose(layer.running_var, variance, rtol=1e-3), name
    theirs = dict(lesioned.named_parameters())
    for name, parameter in healed.named_parameters():
        assert torch.equal(parameter, theirs[name])
        assert parameter.data_ptr() != theirs[name].data_ptr()
    assert not any(part.training for part in healed.modules())
    assert [unit.is_deleted for unit in healed.units] == [unit.is_deleted for unit in lesioned.units]
