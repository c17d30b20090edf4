"""Lesions: shared work gives the bits of the naive loop, at the promised cost, and changes nothing."""

import gc
import math
import re
from itertools import permutations, product

import numpy as np
import pytest
import torch
from helpers import SMALL, images, mix_modes, small, snapshot
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import batch_norm, cross_entropy
from torch.nn.modules.batchnorm import _BatchNorm
from unravelling import (
    Chain,
    Split,
    Unit,
    delete_each,
    delete_random,
    digits,
    evaluate,
    load,
    plain,
    reestimate_batch_norm,
    reorder,
    replace_branches,
    resnet,
    taylor_importance,
    vgg,
)
from unravelling.chain import Change
from unravelling.lesion import KINDS, evaluate_variants, score, variant_logits
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
    """Counts the evaluations of every branch of a chain, on one batch each, and the calls that they are made in."""

    def __init__(self, chain):
        self.chain, self.evaluated, self.calls = chain, [], []

    def __enter__(self):
        def began(stem, inputs, y):
            self.images = len(y)

        def called(i, inputs):
            self.calls.append(i)
            self.evaluated += [i] * (len(inputs[0]) // self.images)

        self.handles = [self.chain.stem.register_forward_hook(began)]
        for i, unit in enumerate(self.chain.units):
            self.handles.append(unit.branch.register_forward_hook(lambda _, inputs, f, i=i: called(i, inputs)))
        return self

    def __exit__(self, *_):
        for handle in self.handles:
            handle.remove()


def lesioned_variants(chain):
    """Units to delete, and the variants that say so: single ones, several, all, and one twice."""
    n = len(chain)
    gone = [(), *((i,) for i in range(n)), (0, 1), (1, 4), (0, 3, n - 1), tuple(range(n)), (2,)]
    return gone, [tuple(~i if i in chosen else i for i in range(n)) for chosen in gone]


@pytest.mark.parametrize("kind", SMALL)
def test_one_variant_at_a_time_gives_the_bits_of_the_naive_loop(kind):
    chain = small(kind)
    gone, variants = lesioned_variants(chain)
    logits, labels = variant_logits(chain, BATCHES, variants, max_memory=0)
    wrong, loss = evaluate_variants(chain, BATCHES, variants, max_memory=0)
    assert labels.tolist() == torch.cat([y for _, y in BATCHES]).tolist()
    assert logits.shape == (len(gone), 8, 10)
    for chosen, our_logits, our_wrong, our_loss in zip(gone, logits, wrong, loss, strict=True):
        their_logits, their_wrong, their_loss = naive(chain.without(*chosen), BATCHES)
        assert our_logits.tobytes() == their_logits.tobytes()
        assert (our_wrong == their_wrong).all()
        assert np.allclose(our_loss, their_loss, rtol=1e-12, atol=1e-15)


MEMORIES = [0, 20_000, 100_000, 2**30]
"""Bytes: room for one variant at a time, for a few, for most, and for all of a network in SMALL."""


@pytest.mark.parametrize("kind", SMALL)
def test_whatever_the_memory_the_results_are_the_same(kind):
    """To rounding: for a larger batch PyTorch may choose another kernel, so in double precision it is 1e-15 or so."""
    chain = small(kind, torch.float64)
    batches = [images(5, seed=0, dtype=torch.float64), images(3, seed=1, dtype=torch.float64)]
    _, variants = lesioned_variants(chain)
    first, labels = variant_logits(chain, batches, variants, max_memory=MEMORIES[0])
    for memory in MEMORIES[1:]:
        logits, same = variant_logits(chain, batches, variants, max_memory=memory)
        np.testing.assert_allclose(logits, first, rtol=1e-6, atol=1e-6)  # of float32, in which they are returned
        assert (labels == same).all()
        ours, theirs = (evaluate_variants(chain, batches, variants, max_memory=m) for m in (memory, 0))
        assert (ours[0] == theirs[0]).all()
        np.testing.assert_allclose(ours[1], theirs[1], rtol=1e-12)


def state_bytes(chain):
    """Bytes of all tensors that are no parameter or buffer of a chain."""
    own = {tensor.untyped_storage().data_ptr() for tensor in chain.state_dict().values()}
    kinds = torch.Tensor, torch.nn.Parameter  # and not those that tracing leaves behind, which hold nothing
    tensors = [thing for thing in gc.get_objects() if type(thing) in kinds]
    found = [tensor.untyped_storage() for tensor in tensors if tensor.layout is torch.strided]  # a sparse one has none
    return sum({s.data_ptr(): s.nbytes() for s in found if s.data_ptr() not in own}.values())


@pytest.mark.parametrize("measure", ["each", "random", "reorder"])
@pytest.mark.parametrize("memory", [*MEMORIES, 50_000, 60_000, 80_000])
def test_states_take_no_more_memory_than_allowed(memory, measure):
    chain = small("pre")
    batch = images(5)
    largest = max(y.numel() * y.element_size() for y in chain.trace(batch[0]))
    need = (len(chain) + 3) * largest  # what one variant at a time may take
    gc.collect()
    before, most, called = state_bytes(chain), 0, []

    def look(unit, inputs, output):
        nonlocal most
        most = max(most, state_bytes(chain) - before)  # states that wait, what went in and what came out
        called.append(len(inputs[0]) // 5)

    handles = [unit.register_forward_hook(look) for unit in chain.units]
    try:
        if measure == "each":
            delete_each(chain, batch, max_memory=memory)
        elif measure == "random":
            delete_random(chain, batch, [1, 2, 3], 8, max_memory=memory)
        else:
            reorder(chain, batch, [1, None], 8, max_memory=memory)
    finally:
        for handle in handles:
            handle.remove()
    assert 0 < most <= max(memory, need)
    if memory in (0, 2**30):
        assert (max(called) > 1) == (memory > 0)  # what there is room for is used


@pytest.mark.parametrize(("memory", "together"), [(9, 2), (9 - 1 / 320, 1)])
def test_states_are_stacked_from_where_they_fit(memory, together):
    """Two states that go on, the three of a walk in depth, and two of them as one batch, in and out: nine."""
    torch.manual_seed(0)
    chain = Chain(nn.Identity(), [Unit(nn.Linear(8, 8)) for _ in range(4)], nn.Identity()).double()
    x, y = torch.randn(5, 8, dtype=torch.float64), torch.arange(5)  # 320 bytes a state
    called = []
    handle = chain.units[1].register_forward_hook(lambda unit, inputs, output: called.append(len(inputs[0]) // 5))
    delete_each(chain, (x, y), max_memory=int(memory * 320))
    handle.remove()
    assert called == [together] * (2 // together)


def test_a_complete_shuffle_takes_every_order_of_a_stage_and_no_other():
    chain = resnet(20, width=2, in_channels=1, seed=0)
    orders = reorder(chain, BATCHES[:1], None, 60)["order"].str.split().map(lambda units: [int(i) for i in units])
    stages = [[i for i, u in enumerate(chain.units) if u.stage == s and not u.is_transition] for s in (1, 2, 3)]
    for members in stages:
        found = {tuple(order[i] for i in members) for order in orders}
        assert found == set(permutations(members))
    fixed = [i for i, unit in enumerate(chain.units) if unit.is_transition]
    assert all(order[i] == i for order in orders for i in fixed)


def test_with_room_every_branch_is_called_once():
    chain = small("pre")
    with Counter(chain) as counter:
        delete_each(chain, BATCHES[:1])
        assert counter.calls == list(range(len(chain)))
        counter.calls.clear()
        delete_each(chain, BATCHES[:1], max_memory=0)
        assert len(counter.calls) == len(chain) * (len(chain) + 1) // 2


def linear_chain(*parts, width=6):
    """A chain of linear units on features, or on tokens, with some more parts in its branches."""
    torch.manual_seed(0)
    units = [Unit(nn.Sequential(nn.Linear(width, width), *parts)) for _ in range(4)]
    return Chain(nn.Linear(width, width), units, nn.Linear(width, 3)).eval()


class Context(nn.Module):
    """Reads what belongs to one batch, as units of traced models do."""

    def __init__(self):
        super().__init__()
        self.context = {"mask": torch.arange(5.0)[:, None]}

    def forward(self, y):
        assert len(y) == 5
        return y * self.context["mask"]


class FirstTokens(nn.Module):
    """Mixes what lies along the first axis, where some models have their tokens."""

    def forward(self, y):
        return y.cumsum(0)


@pytest.mark.parametrize(
    ("chain", "shape"),
    [(linear_chain(Context()), (5, 6)), (linear_chain(nn.BatchNorm1d(6, track_running_stats=False)), (5, 6)),
     (linear_chain(FirstTokens()), (5, 5, 6))],
    ids=["context", "batch norm without statistics", "sequence first"],
)
def test_variants_that_would_mix_are_computed_one_at_a_time(chain, shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    y = torch.zeros(shape[:-1], dtype=torch.long)
    variants = [tuple(~i if i == j else i for i in range(4)) for j in range(-1, 4)]
    logits, _ = variant_logits(chain, (x, y), variants)
    with torch.no_grad():
        for found, gone in zip(logits, [(), (0,), (1,), (2,), (3,)], strict=True):
            assert found.tobytes() == chain.without(*gone)(x).numpy().tobytes()


def test_a_unit_of_ones_own_that_mixes_images_does_not_mix_variants():
    chain, (x, y) = small("pre"), BATCHES[0]
    own = chain.units[3].then(Change(lambda f: f.flip(0)))
    variants = [(0, 1, 2, own, 4, 5), (~0, 1, 2, own, 4, 5)]
    logits, _ = variant_logits(chain, (x, y), variants)
    whole = chain.with_units([*chain.units[:3], own, *chain.units[4:]])
    for found, gone in zip(logits, [(), (0,)], strict=True):
        with torch.no_grad():
            assert found.tobytes() == whole.without(*gone)(x).numpy().tobytes()


def test_variants_may_differ_in_length_and_repeat_units():
    chain = small("pre")
    variants = [(0, 1), (0, 1, 1), (), (0, 1, 2, 3, 4, 5), (0, 1)]
    chain.head = nn.Flatten()
    logits = [variant_logits(chain, BATCHES[0], [variant])[0][0] for variant in variants[:1]]
    x = BATCHES[0][0]
    shapes = [(0, 1), (0, 1, 1), (1, 1, ~0), (0, 1)]
    together, _ = variant_logits(chain, BATCHES[0], shapes)
    with torch.no_grad():
        for found, variant in zip(together, shapes, strict=True):
            y = chain.stem(x)
            for i in variant:
                y = chain.units[i](y) if i >= 0 else chain.units[~i].skip(y)
            np.testing.assert_allclose(found, y.flatten(1).numpy(), rtol=1e-5, atol=1e-5)
    assert (logits[0] == together[0]).all()


@pytest.mark.parametrize("kind", SMALL)
def test_a_unit_of_ones_own_takes_its_place_in_a_variant(kind):
    chain, (x, y) = small(kind), BATCHES[0]
    own = chain.units[2].scaled(0.25)
    variants = [[*range(2), own, *range(3, len(chain))], range(len(chain)), [*range(len(chain) - 1), ~(len(chain) - 1)]]
    logits, _ = variant_logits(chain, (x, y), variants, max_memory=0)
    expected = [chain.with_units([*chain.units[:2], own, *chain.units[3:]]), chain, chain.without(len(chain) - 1)]
    for found, other in zip(logits, expected, strict=True):
        assert found.tobytes() == naive(other, [(x, y)])[0].tobytes()
    assert (logits[0] != logits[1]).any()


@pytest.mark.parametrize(("variants", "error", "message"), [
    ([], ValueError, "variants is empty: expected at least one member"),
    (None, TypeError, "variants is None: expected several, such as a list of one"),
    ([3], TypeError, "variants must hold sequences of units, such as range(len(chain)): 'int' object is not iterable"),
    (["ab"], TypeError, "variants must hold sequences of units, such as range(len(chain)): "
     "'<' not supported between instances of 'str' and 'int'"),
    ([[[1]]], TypeError, "variants must hold sequences of units, such as range(len(chain)): unhashable type: 'list'"),
    ([range(7)], IndexError, "unit 6 does not exist: this chain has units 0 to 5"),
    ([[0, ~6]], IndexError, "unit 6 does not exist: this chain has units 0 to 5"),
])
@pytest.mark.parametrize("function", [evaluate_variants, variant_logits])
def test_variants_that_do_not_exist(function, variants, error, message):
    with pytest.raises(error) as caught:
        function(small("pre"), BATCHES, variants)
    assert str(caught.value) == message


EVERY = {
    "delete_each": delete_each,
    "delete_random": lambda chain, data: delete_random(chain, data, 1, 2),
    "reorder": lambda chain, data: reorder(chain, data, 1, 2),
    "replace_branches": replace_branches,
    "the mean alone": lambda chain, data: replace_branches(chain, data, "mean"),
    "taylor_importance": taylor_importance,
    "reestimate_batch_norm": reestimate_batch_norm,
    "variant_logits": lambda chain, data: variant_logits(chain, data, [range(6)]),
}
"""All functions of a chain and data."""


@pytest.mark.parametrize("function", EVERY)
@pytest.mark.parametrize("where", ["weights", "statistics"])
def test_a_network_that_computes_nan_is_refused(function, where):
    chain = small("pre")
    with torch.no_grad():
        if where == "weights":
            chain.units[2].branch[-1].weight[0] = torch.nan
        else:
            chain.units[2].branch[0].running_var[0] = torch.nan
    if function == "reestimate_batch_norm" and where == "statistics":
        assert EVERY[function](chain, BATCHES).units[2].branch[0].running_mean.isfinite().all()
        return
    with pytest.raises(ValueError, match=r"(is|are) (NaN|not finite): look for NaN .*weights"):
        EVERY[function](chain, BATCHES)


X, Y = images(4)
UNFIT = {
    "colours": [(X.repeat(1, 3, 1, 1), Y)],
    "bytes": [(X.byte(), Y)],
    "complex numbers": [(X.to(torch.complex64), Y)],
    "no pixels": [(X[..., :0], Y)],
    "another rank": [(X.flatten(), Y.repeat(64))],
    "single images": torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, Y), batch_size=None),
}


@pytest.mark.parametrize("data", UNFIT)
@pytest.mark.parametrize("function", EVERY)
def test_inputs_that_the_network_cannot_take_are_named(function, data):
    with pytest.raises(ValueError, match=r"^the network cannot take x, inputs of shape \([\d, ]+\) \w+: "):
        EVERY[function](small("pre"), UNFIT[data])


@pytest.mark.parametrize("loss", ["cross entropy", lambda: 1, lambda logits, y: None, lambda logits, y: logits,
                                  nn.CrossEntropyLoss, lambda logits, y: cross_entropy(logits, logits[0].long())])
@pytest.mark.parametrize("function", [delete_each, taylor_importance])
def test_what_is_no_loss_is_named(function, loss):
    message = r"^loss gives no number for each image of the logits of shape \(4, 10\) float32: "
    with pytest.raises(ValueError, match=message):
        function(small("pre"), (X, Y), loss=loss)


@pytest.mark.parametrize("dtype", ["bfloat16", float, torch.int64, torch.float64, torch.float32])
def test_a_type_that_there_is_no_autocast_for(dtype):  # torch would only warn, and compute as before
    with pytest.raises(TypeError, match=r"^dtype is .*: expected torch\.bfloat16 or torch\.float16, or None"):
        delete_each(small("pre"), BATCHES, dtype=dtype)


def test_importance_needs_a_gradient_and_a_branch():
    for chain, loss in ((small("pre"), lambda logits, y: 1.0), (small("pre"), lambda logits, y: logits.detach().sum()),
                        (small("pre").without(*range(6)), None)):
        with pytest.raises(ValueError, match=r"^no unit has a branch, or the loss no gradient: compute it from the"):
            taylor_importance(chain, BATCHES, loss)
    with pytest.raises(ValueError, match=r"^the gradient is not finite"):
        taylor_importance(small("pre"), BATCHES, lambda logits, y: logits.sum() * torch.nan)


def test_lower_precision_changes_errors_by_less_than_their_interval():
    chain, test = load("digits/resnet20-seed0"), digits().test
    exact, halved = delete_each(chain, test), delete_each(chain, test, dtype=torch.bfloat16)
    half = (exact["error_high"] - exact["error_low"]) / 2
    assert ((exact["error"] - halved["error"]).abs() < half).all()
    assert 0 < (exact["loss"] - halved["loss"]).abs().max() < 0.1
    assert chain(test.batches(5)[0][0]).dtype == torch.float32


def test_two_threads_and_channels_last_give_the_bits_too():
    chain = resnet(20, in_channels=1).to(memory_format=torch.channels_last).eval()
    batches = [(x.contiguous(memory_format=torch.channels_last), y) for x, y in [images(40)]]
    variants = [tuple(~j if j == i else j for j in range(9)) for i in range(9)]
    torch.set_num_threads(2)
    try:
        logits, _ = variant_logits(chain, batches, variants, max_memory=0)
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
        for memory in MEMORIES:
            delete_each(chain, BATCHES[:1], max_memory=memory)
            assert len(counter.evaluated) == n * (n + 1) // 2
            counter.evaluated.clear()
        delete_each(chain, BATCHES)
        assert len(counter.evaluated) == n * (n + 1)  # two batches
        counter.evaluated.clear()
        for i in range(n):  # the oracle counts rightly
            naive(chain.without(i), BATCHES[:1])
        assert len(counter.evaluated) == n * (n - 1)


@given(
    numbers=st.lists(st.integers(0, 9), min_size=1, max_size=3, unique=True),
    trials=st.integers(1, 6),
    seed=st.integers(0, 100),
    memory=st.sampled_from(MEMORIES),
)
def test_delete_random_evaluates_every_distinct_prefix_once(numbers, trials, seed, memory):
    chain = resnet(20, width=2, in_channels=1).eval()
    with Counter(chain) as counter:
        table = delete_random(chain, BATCHES[:1], numbers, trials, seed, max_memory=memory)
    kept = [[i not in map(int, units.split()) for i in range(9)] for units in table["units"]] + [[True] * 9]
    prefixes = {tuple(bits[: i + 1]) for bits in kept for i in range(9) if bits[i]}  # a node for each branch evaluation
    assert len(counter.evaluated) == len(prefixes)
    assert len(counter.evaluated) <= sum(map(sum, kept))


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
    replace_branches(chain, BATCHES)
    taylor_importance(chain, BATCHES)
    assert snapshot(chain) == before
    assert torch.equal(torch.get_rng_state(), state)
    assert first.equals(delete_each(small(kind), BATCHES))  # and the mode it was in made no difference


def test_the_network_stays_as_it_is_after_an_error():
    chain = small("pre").train()
    before = snapshot(chain)
    with pytest.raises(ValueError, match="the network cannot take x"):
        delete_each(chain, [(torch.zeros(2, 3, 8, 8), torch.zeros(2, dtype=torch.long))])
    assert snapshot(chain) == before


@pytest.mark.parametrize("trials", [0, -3])
@pytest.mark.parametrize("function", [delete_random, reorder])
def test_no_trials(function, trials):
    with pytest.raises(ValueError, match=rf"^trials must be at least 1, not {trials}$"):
        function(small("pre"), BATCHES, 1, trials)


@pytest.mark.parametrize("function", EVERY)
def test_what_is_no_chain(function):
    with pytest.raises(TypeError, match=r"^chain is a Linear: expected a Chain"):
        EVERY[function](nn.Linear(2, 2), BATCHES)


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


def test_labels_of_the_wrong_kind_or_number():
    x, y = images(3)
    with pytest.raises(ValueError, match=r"^the labels are a torch.FloatTensor: pass a loss that knows"):
        delete_each(small("pre"), (x, y.float()))
    with pytest.raises(ValueError, match=r"^y, the labels, have shape \(3, 2\) beside logits of shape"):
        delete_each(small("pre"), (x, y[:, None].expand(3, 2)))
    small_labels = delete_each(small("pre"), (x, torch.tensor([1, 2, 3], dtype=torch.uint8)))
    assert small_labels.equals(delete_each(small("pre"), (x, torch.tensor([1, 2, 3]))))
    with pytest.raises(ValueError, match=r"^there is a label 156: expected 0 to 9"):  # which is -100 in eight bits
        delete_each(small("pre"), (x, torch.tensor([1, 2, 156], dtype=torch.uint8)))


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
        *(
            ({"k": 1, "candidates": junk}, IndexError, f"unit {name} does not exist: this chain has units 0 to 5")
            for junk, name in [(3.5, 3.5), ([None], None), ("ab", "'a'"), ([math.nan], "nan"), ([-1], -1), (True, True)]
        ),
        (
            {"k": 1, "candidates": torch.ones(1, 2)},
            IndexError,
            "unit tensor([1., 1.]) does not exist: this chain has units 0 to 5",
        ),
    ],
)
def test_choices_that_cannot_be_made(arguments, error, message):
    with pytest.raises(error) as caught:
        delete_random(small("pre"), BATCHES, trials=2, **arguments)
    assert str(caught.value) == message


NUMBERS = {
    "k": [
        lambda v: delete_random(small("pre"), BATCHES, v, 1),
        lambda v: delete_random(small("pre"), BATCHES, [0, v], 1),
    ],
    "swaps": [lambda v: reorder(small("pre"), BATCHES, v, 1), lambda v: reorder(small("pre"), BATCHES, (None, v), 1)],
    "trials": [lambda v: delete_random(small("pre"), BATCHES, 1, v), lambda v: reorder(small("pre"), BATCHES, None, v)],
    "seed": [
        lambda v: delete_random(small("pre"), BATCHES, 1, 1, v),
        lambda v: reorder(small("pre"), BATCHES, 1, 1, v),
        lambda v: replace_branches(small("pre"), BATCHES, "mean", v),
    ],
    "max_memory": [
        lambda v: delete_each(small("pre"), BATCHES, max_memory=v),
        lambda v: variant_logits(small("pre"), BATCHES, [[0]], max_memory=v),
    ],
}
"""What calls the functions with a value for an argument that is a whole number."""


@pytest.mark.parametrize("junk", [True, np.True_, 1.0, 1.5, math.nan, -math.inf, 1j, object], ids=repr)
@pytest.mark.parametrize("name", NUMBERS)
def test_what_is_no_whole_number_is_refused_by_name(name, junk):
    for call in NUMBERS[name]:
        with pytest.raises(TypeError, match=f"^{re.escape(f'{name} must be a whole number, not {junk!r}')}$"):
            call(junk)


@pytest.mark.parametrize(
    ("name", "junk", "error", "message"),
    [
        *((name, None, TypeError, f"{name} must be a whole number, not None") for name in NUMBERS if name != "swaps"),
        *((name, "2", TypeError, f"{name} must be a whole number, not '2'") for name in NUMBERS),
        *((name, 2**63, ValueError, f"{name} must be less than 2^63, not {2**63}") for name in NUMBERS),
        ("k", -1, ValueError, "cannot delete -1 units: there are 6 to choose from"),
        ("swaps", -1, ValueError, "cannot swap -1 different pairs: there are 1 of equal shape"),
        ("trials", 0, ValueError, "trials must be at least 1, not 0"),
        ("seed", -1, ValueError, "seed must be at least 0, not -1"),
        ("max_memory", -1, ValueError, "max_memory must be at least 0, not -1"),
    ],
    ids=repr,
)
def test_numbers_that_make_no_sense_are_refused_by_name(name, junk, error, message):
    for call in NUMBERS[name]:
        with pytest.raises(error, match=f"^{re.escape(message)}$"):
            call(junk)


@pytest.mark.parametrize("name", ["k", "swaps"])
@pytest.mark.parametrize("empty", [[], "", np.zeros(0)], ids=repr)
def test_no_numbers_at_all(name, empty):
    with pytest.raises(ValueError, match=f"^{name} is empty: expected at least one member$"):
        NUMBERS[name][0](empty)


def test_pairs_that_are_swapped_are_different_ones():
    """Of two pairs, one a stage, two swaps take each once: one twice would give the old order back."""
    chain = linear_chain()
    for unit, stage in zip(chain.units, (1, 1, 2, 2), strict=True):
        unit.stage = stage
    table = reorder(chain, (torch.randn(5, 6), torch.zeros(5, dtype=torch.long)), 2, 20)
    assert set(table["order"]) == {"1 0 3 2"}


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


@pytest.mark.parametrize("batches", [[], iter([])])
def test_statistics_are_not_estimated_from_nothing(batches):
    with pytest.raises(ValueError, match=r"^there are no batches: an iterator can be used only once"):
        reestimate_batch_norm(small("pre"), batches)


@pytest.mark.parametrize("value", [math.inf, -math.inf, 1e30])
def test_statistics_of_numbers_that_are_too_large_are_refused(value):
    x = X.clone()
    x[1, 0, 3, 3] = value
    chain = small("pre")
    before = snapshot(chain)
    with pytest.raises(ValueError, match=r"^the statistics are not finite: look for NaN and for huge numbers in"):
        reestimate_batch_norm(chain, [(X, Y), (x, Y)])
    assert snapshot(chain) == before


# ---------------------------------------------------------------- other lesions than deletions


def by_hand(chain, unit, batches, replace):
    """Wrong and loss of each image where ``replace`` says what takes the place of a unit's branch."""
    logits = []
    with torch.no_grad():
        for number, (x, _) in enumerate(batches):
            y = chain.stem(x)
            for i, u in enumerate(chain.units):
                f = u.branch(y)
                f = replace(number, f) if i == unit else f
                y = u.post(u.skip(y) + f if u.residual else f)
            logits.append(chain.head(y))
    labels = torch.cat([y for _, y in batches])
    loss = cross_entropy(torch.cat(logits).double(), labels, reduction="none")
    return (torch.cat(logits).argmax(1) != labels).numpy(), loss.numpy()


def branches(chain, unit, batches):
    """The outputs of a unit's branch, for every batch."""
    return [chain.units[unit].branch(chain.trace(x)[unit]).detach() for x, _ in batches]


def check(row, chain, found):
    wrong, loss = found
    assert row.error == wrong.mean()
    assert row.loss == pytest.approx(loss.mean(), rel=1e-9)
    assert row.delta_loss == pytest.approx((loss - naive(chain, DOUBLES)[2]).mean(), rel=1e-6, abs=1e-9)


DOUBLES = [images(5, seed=0, dtype=torch.float64), images(3, seed=1, dtype=torch.float64)]


@pytest.mark.parametrize("kind", ["pre", "post-projection", "plain"])
def test_branches_are_replaced_by_their_mean_over_all_images_as_by_hand(kind):
    chain = small(kind, torch.float64)
    table = replace_branches(chain, DOUBLES, "mean")
    assert table["unit"].tolist() == list(range(len(chain)))
    for row in table.itertuples():
        mean = torch.cat(branches(chain, row.unit, DOUBLES)).mean(0)
        check(row, chain, by_hand(chain, row.unit, DOUBLES, lambda _, f, mean=mean: torch.stack([mean] * len(f))))


@pytest.mark.parametrize("kind", ["pre", "post-projection", "plain"])
def test_branches_are_replaced_by_those_of_another_image(kind):
    """Which image gets whose is not known here: one of the ways in which none keeps its own gives the row's loss."""
    chain, batch = small(kind, torch.float64), [images(3, dtype=torch.float64)]
    table = replace_branches(chain, batch, "resample", seed=4)
    rounds = [[1, 2, 0], [2, 0, 1]]  # all permutations of three without a fixed point
    used = []
    for row in table.itertuples():
        losses = [by_hand(chain, row.unit, batch, lambda _, f, order=order: f[order])[1].mean() for order in rounds]
        used.append(int(np.argmin(np.abs(np.array(losses) - row.loss))))
        assert row.loss == pytest.approx(losses[used[-1]], rel=1e-9)
        assert abs(losses[0] - losses[1]) > 1e-6 * abs(losses[0])
    assert set(used) == {0, 1}
    assert table.equals(replace_branches(chain, batch, "resample", seed=4))
    assert not table.equals(replace_branches(chain, batch, "resample", seed=5))


@pytest.mark.parametrize("kind", ["pre", "post-projection", "plain"])
def test_noise_has_the_norm_of_the_branch_for_each_image_and_is_the_same_beside_it(kind):
    chain, seen = small(kind, torch.float64), {}
    for i, unit in enumerate(chain.units):  # the next part that sees the sum tells what was added
        unit.post = Recorder(unit.post, seen.setdefault(i, []))
    n = len(chain)
    before = [chain.trace(x) for x, _ in DOUBLES]
    sums = [(states, [list(seen[i])[b] for i in range(n)]) for b, states in enumerate(before)]
    for name in ("noise", "added noise"):
        for values in seen.values():
            values.clear()
        replace_branches(chain, DOUBLES, name, max_memory=0)
        for i in range(n):
            changed = [value for value in seen[i] if not any(equal(value, sums[b][1][i]) for b in (0, 1))]
            for b, (states, intact) in enumerate(sums):
                y, unit = states[i], chain.units[i]
                f = unit.branch(y)
                skip = intact[i] - f
                kept = f if name == "added noise" else 0 * f
                noises = [value - skip - kept for value in changed if value.shape == skip.shape]
                sizes = [noise.flatten(1).norm(dim=1) / f.flatten(1).norm(dim=1) for noise in noises]
                ours = [noise for noise, size in zip(noises, sizes, strict=True) if torch.allclose(size, one(size))]
                assert len(ours) == 1, (name, i, b)
                cosine = (ours[0].flatten(1) * f.flatten(1)).sum(1) / f.flatten(1).norm(dim=1) ** 2
                assert cosine.abs().max() < 0.5  # no multiple of the branch


class Recorder(nn.Module):
    """Keeps what arrives at a unit's post."""

    def __init__(self, post, seen):
        super().__init__()
        self.post, self.seen = post, seen

    def forward(self, y):
        self.seen.append(y.detach().clone())
        return self.post(y)


def equal(a, b):
    return a.shape == b.shape and torch.allclose(a, b)


def one(values):
    return torch.ones_like(values)


def test_noise_differs_between_units_images_and_seeds_and_follows_the_seed():
    chain = small("pre", torch.float64)
    first = replace_branches(chain, DOUBLES, ["noise", "added noise"], seed=1)
    assert first.equals(replace_branches(chain, DOUBLES, ["noise", "added noise"], seed=1, max_memory=0)) or (
        np.allclose(first["loss"], replace_branches(chain, DOUBLES, ["noise", "added noise"], 1, max_memory=0)["loss"])
    )
    other = replace_branches(chain, DOUBLES, ["noise", "added noise"], seed=2)
    assert (first["loss"] != other["loss"]).all()


def test_rows_of_several_kinds_are_those_of_each():
    chain = small("pre", torch.float64)
    together = replace_branches(chain, DOUBLES)
    assert list(zip(together["kind"], together["unit"], strict=True)) == list(product(KINDS, range(len(chain))))
    assert list(together)[:5] == ["kind", "unit", "name", "stage", "is_transition"]
    assert list(together)[5:] == list(delete_each(chain, DOUBLES))[4:]
    for kind in KINDS:
        ours, alone = together[together["kind"] == kind], replace_branches(chain, DOUBLES, kind)
        np.testing.assert_allclose(ours["loss"], alone["loss"], rtol=1e-9)
        assert (alone["kind"] == kind).all()
    assert replace_branches(chain, DOUBLES, ["mean", "resample", "mean"]).equals(
        replace_branches(chain, DOUBLES, ("mean", "resample")))


def test_a_unit_without_a_branch_has_no_values():
    chain = small("pre").without(2)
    table = replace_branches(chain, BATCHES, ["mean", "noise"])
    assert table.loc[table["error"].isna(), "unit"].tolist() == [2, 2]
    importance = taylor_importance(chain, BATCHES)
    assert importance.loc[importance["importance"].isna(), "unit"].tolist() == [2]
    assert len(importance) == len(chain)


@pytest.mark.parametrize(("arguments", "data", "message"), [
    (["means"], BATCHES, "kind='means' names no way to replace a branch: "
     "choose from mean, resample, noise, added noise"),
    ([["mean", 3]], BATCHES, "kind=['mean', 3] names no way to replace a branch: "
     "choose from mean, resample, noise, added noise"),
    ([[]], BATCHES, "kind is empty: expected at least one member"),
    (["resample"], [images(1)], "a batch of one image has no other to take a branch from: pass larger batches"),
    (["mean"], iter(BATCHES), "there are no batches: an iterator can be used only once, so pass a list or a loader"),
    (["mean"], [images(2), images(2, size=16)],
     "the branches' outputs differ in size between batches: pass inputs of one size"),
])
def test_replacements_that_cannot_be_made(arguments, data, message):
    with pytest.raises(ValueError, match=f"{re.escape(message)}$"):
        replace_branches(small("pre"), data, *arguments)
    with pytest.raises(TypeError, match=r"^kind is None: expected several"):
        replace_branches(small("pre"), data, None)
    with pytest.raises(ValueError, match=r"^no unit has a branch that could be replaced$"):
        replace_branches(small("pre").without(*range(6)), BATCHES, "noise")


@pytest.mark.parametrize("kind", ["pre", "post-projection", "plain"])
def test_taylor_importance_is_the_derivative_by_finite_differences(kind):
    chain, step = small(kind, torch.float64), 1e-6
    table = taylor_importance(chain, DOUBLES)
    assert list(table)[:4] == ["unit", "name", "stage", "is_transition"]
    for row in table.itertuples():
        up, down = (
            by_hand(chain, row.unit, DOUBLES, lambda _, f, factor=factor: factor * f)[1]
            for factor in (1 + step, 1 - step)
        )
        slope = (up - down) / (2 * step)
        assert row.importance == pytest.approx(np.abs(slope).mean(), rel=1e-5, abs=1e-8)
        assert row.delta_loss == pytest.approx(-slope.mean(), rel=1e-5, abs=1e-8)
        ends = paired_bootstrap(np.abs(slope))
        assert (row.importance_low, row.importance_high) == pytest.approx(ends, rel=1e-4, abs=1e-8)


def test_taylor_importance_is_the_product_of_gradient_and_branch():
    chain, (x, y) = small("pre", torch.float64), DOUBLES[0]
    states = chain.trace(x)
    gradients = torch.autograd.grad(cross_entropy(chain.head(states[-1]), y, reduction="sum"), states[1:])
    table = taylor_importance(chain, (x, y))
    for i, unit in enumerate(chain.units):
        product_ = (gradients[i] * unit.branch(states[i])).flatten(1).sum(1)
        assert table["importance"][i] == pytest.approx(product_.abs().mean().item(), rel=1e-9)
    own = taylor_importance(chain, (x, y), loss=lambda logits, y: 3 * cross_entropy(logits, y))
    np.testing.assert_allclose(own["importance"], 3 * table["importance"], rtol=1e-9)


def test_taylor_importance_of_tokens_weighs_them_as_the_evaluation_does():
    torch.manual_seed(0)
    chain = linear_chain(nn.Tanh()).double()
    x, y = torch.randn(4, 3, 6, dtype=torch.float64), torch.randint(3, (4, 3))
    y[0, 1:] = -100
    table, step = taylor_importance(chain, (x, y)), 1e-6
    up, down = (
        evaluate_variants(chain.with_units([chain.units[0].scaled(factor), *chain.units[1:]]), (x, y), [range(4)])[1]
        for factor in (1 + step, 1 - step)
    )
    slope = ((up - down) / (2 * step))[0]
    assert table["importance"][0] == pytest.approx(np.abs(slope).mean(), rel=1e-4)
    assert table["delta_loss"][0] == pytest.approx(-slope.mean(), rel=1e-4)


# ---------------------------------------------------------------- scores


def test_scores_of_images_and_of_tokens_are_those_of_pytorch():
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(2, 4, 3, 7, generator=generator), torch.randint(7, (4, 3), generator=generator)
    expected = torch.stack([cross_entropy(part.double().movedim(-1, 1), labels, reduction="none") for part in logits])
    wrong, loss = score(logits.numpy(), labels.numpy())
    np.testing.assert_allclose(loss, expected.numpy(), rtol=1e-12)
    assert (wrong == (logits.argmax(-1) != labels).numpy()).all()
    read_only = np.broadcast_to(labels.numpy()[::-1], labels.shape)
    assert (score(logits.numpy()[:, ::-1], read_only)[1] == loss[:, ::-1]).all()
    labels[1, 2] = -100
    some, partly = score(logits.numpy(), labels.numpy())
    assert np.isnan(partly[:, 1, 2]).all()
    assert not some[:, 1, 2].any()
    assert np.isnan(partly).sum() == 2
    assert (partly == loss)[~np.isnan(partly)].all()


def test_labels_of_pixels_are_scored_as_pytorch_does():
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(2, 3, 4, 5, generator=generator), torch.randint(3, (2, 4, 5), generator=generator)
    chain = Chain(nn.Identity(), [Unit(nn.Identity())], nn.Identity())
    expected = cross_entropy(logits.double(), labels, reduction="none").mean((1, 2))
    for out in (logits, logits.movedim(1, -1)):  # classes before the pixels, or after
        wrong, loss = evaluate_variants(chain, (out, labels), [[~0]])
        assert wrong[0] == pytest.approx((logits.argmax(1) != labels).double().mean((1, 2)).numpy())
        assert loss[0] == pytest.approx(expected.numpy(), rel=1e-12)


def test_a_deletion_after_which_the_network_computes_nan_is_refused():
    """The intact network is fine; of NaN logits the first class would be chosen, and count as right for some."""
    units = [Unit(Change(lambda y: torch.full_like(y, 5.0))), Unit(Change(lambda y: (y - 3).log()))]
    chain, batch = Chain(nn.Identity(), units, nn.Linear(3, 3)).eval(), (torch.rand(6, 3), torch.arange(6) % 3)
    evaluate(chain, batch)
    with pytest.raises(ValueError, match=r"^logits are NaN: look for NaN in .* of variant 1$"):
        delete_each(chain, batch)


def test_importance_is_computed_whatever_mode_the_caller_is_in():
    chain = small("pre")
    expected = taylor_importance(chain, BATCHES)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert taylor_importance(chain, BATCHES).equals(expected)
