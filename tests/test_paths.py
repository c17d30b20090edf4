"""Path gradients against autograd through forward passes written by hand, in float64."""

import copy
import math
from itertools import product

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import SMALL, images, mix_modes, randomized, shortcut_by_hand, small, snapshot, states_by_hand
from hypothesis import given
from hypothesis import strategies as st
from timm.layers import DropPath
from torch import nn
from torch.autograd import grad
from torch.nn.functional import cross_entropy, relu
from torchvision.ops import StochasticDepth
from unravelling import (
    Chain,
    Unit,
    canonical_split,
    evaluate,
    gradient_by_length,
    gradient_norms,
    mean_length,
    path_gradients,
    path_norms,
    paths,
    plain,
    resnet,
    sample_path_gradients,
    spectrum,
    weight_spectrum,
)
from unravelling.chain import Change

KINDS = {
    "pre": lambda depth, seed: resnet(depth, width=3, in_channels=1, seed=seed),
    "post": lambda depth, seed: resnet(depth, width=3, in_channels=1, seed=seed, preactivation=False),
    "pre-projection": lambda depth, seed: resnet(depth, width=3, in_channels=1, seed=seed, shortcut="projection"),
    "post-projection": lambda depth, seed: resnet(
        depth, width=3, in_channels=1, seed=seed, preactivation=False, shortcut="projection"
    ),
    "plain": lambda depth, seed: plain(depth, width=3, in_channels=1, seed=seed),
    "plain-post": lambda depth, seed: plain(depth, width=3, in_channels=1, seed=seed, preactivation=False),
}


@st.composite
def cases(draw, depths=(8, 14)):
    """A kind, its intact chain with random statistics, the units to delete, images and labels."""
    kind = draw(st.sampled_from(sorted(KINDS)))
    depth = draw(st.sampled_from(depths))
    seed = draw(st.integers(0, 1000))
    chain = randomized(KINDS[kind](depth, seed), seed, torch.float64)
    gone = tuple(sorted(draw(st.sets(st.integers(0, len(chain) - 1), max_size=len(chain) - 1))))
    return kind, chain, gone, *images(2, seed, torch.float64)


def gate(value, factor):
    """Keep the value and scale its gradient."""
    return value.detach() + factor * (value - value.detach())


def gated_gradient(kind, chain, gone, x, y, through_skip, through_branch):
    """The gradient at y_0 by one backward pass, the Jacobian of every skip and branch scaled by a number of its own."""
    first = state = chain.stem(x).detach().requires_grad_()
    for i, unit in enumerate(chain.units):
        f = state
        for layer in unit.branch:
            f = layer(f)
        skip = gate(shortcut_by_hand(unit, state, f.shape), through_skip[i])
        f = gate(f, through_branch[i])
        state = skip if i in gone else f if kind.startswith("plain") else skip + f
        state = relu(state) if "post" in kind else state
    return grad(cross_entropy(chain.head(state), y), first)[0]


def ways(kind, chain, gone):
    """For every unit, the bits that a path can have there."""
    return [(0,) if i in gone else (1,) if kind.startswith("plain") else (0, 1) for i in range(len(chain))]


def brute_force(kind, chain, gone, x, y):
    return {
        bits: gated_gradient(kind, chain, gone, x, y, [1 - bit for bit in bits], bits)
        for bits in product(*ways(kind, chain, gone))
    }


def whole_gradient(chain, x, y):
    first = chain.stem(x).detach().requires_grad_()
    state = first
    for unit in chain.units:
        state = unit(state)
    return grad(cross_entropy(chain.head(state), y), first)[0]


def close(a, b, scale=None, tolerance=1e-12):
    scale = b.norm() if scale is None else scale
    return (a - b).norm() <= tolerance * scale


# ---------------------------------------------------------------- all paths


@given(cases())
def test_paths_sum_to_autograds_gradient(case):
    kind, chain, gone, x, y = case
    lesioned = chain.without(*gone)
    paths = path_gradients(lesioned, x, y)
    assert paths.keys() == set(product(*ways(kind, chain, gone)))
    expected = whole_gradient(lesioned, x, y)
    assert expected.norm() > 0
    assert close(sum(paths.values()), expected)


@given(cases(depths=(8,)))
def test_every_path_by_a_backward_pass_of_its_own(case):
    kind, chain, gone, x, y = case
    paths = path_gradients(chain.without(*gone), x, y)
    expected = brute_force(kind, chain, gone, x, y)
    scale = max(g.norm() for g in expected.values())
    assert paths.keys() == expected.keys()
    for bits, g in expected.items():
        assert close(paths[bits], g, scale), bits


# ---------------------------------------------------------------- by length


@given(cases())
def test_lengths_sum_to_autograds_gradient(case):
    _, chain, gone, x, y = case
    lesioned = chain.without(*gone)
    by_length = gradient_by_length(lesioned, x, y)
    assert len(by_length) == len(chain) + 1
    assert close(sum(by_length), whole_gradient(lesioned, x, y))


@given(cases(depths=(8,)))
def test_every_length_is_the_sum_of_its_paths(case):
    kind, chain, gone, x, y = case
    by_length = gradient_by_length(chain.without(*gone), x, y)
    paths = brute_force(kind, chain, gone, x, y)
    scale = max(g.norm() for g in paths.values())
    for k, g in enumerate(by_length):
        expected = sum((p for bits, p in paths.items() if sum(bits) == k), torch.zeros_like(g))
        assert close(g, expected, scale), k


@given(cases(depths=(8, 14, 20)), st.floats(-2, 2))
def test_lengths_are_the_coefficients_of_the_gated_gradient(case, z):
    kind, chain, gone, x, y = case
    n = len(chain)
    by_length = gradient_by_length(chain.without(*gone), x, y)
    terms = [z**k * g for k, g in enumerate(by_length)]
    expected = gated_gradient(kind, chain, gone, x, y, [1] * n, [z] * n)
    assert close(sum(terms), expected, max(term.norm() for term in terms))


def test_a_plain_network_has_one_length_and_a_deleted_one_another():
    chain, (x, y) = small("plain", torch.float64), images(dtype=torch.float64)
    by_length = gradient_by_length(chain.without(1, 3), x, y)
    assert [bool(g.any()) for g in by_length] == [False] * 4 + [True] + [False] * 2
    table = path_norms(chain.without(1, 3), x, y, 2)  # of one path, whose sign cancels
    norm = whole_gradient(chain.without(1, 3), x, y).norm().item()
    assert table["sum_of_squares"].tolist() == pytest.approx([0, 0, 0, 0, norm**2, 0, 0], rel=1e-12)
    assert table["rms_norm"].tolist() == pytest.approx([0, 0, 0, 0, norm, 0, 0], rel=1e-12)
    nothing_left = gradient_by_length(chain.without(*range(6)), x, y)
    assert [bool(g.any()) for g in nothing_left] == [True] + [False] * 6


def test_a_54_unit_network_in_float64():
    chain = randomized(resnet(110, width=2, in_channels=1), dtype=torch.float64)
    x, y = images(2, dtype=torch.float64)
    by_length = gradient_by_length(chain, x, y)
    assert len(by_length) == 55
    assert close(sum(by_length), whole_gradient(chain, x, y), max(g.norm() for g in by_length))


class Counted(torch.autograd.Function):
    """The identity, counting its backward passes."""

    passes = images = 0

    @staticmethod
    def forward(ctx, y):
        return y.clone()

    @staticmethod
    def backward(ctx, g):
        Counted.passes += 1
        Counted.images += len(g)
        return g


class CountedBranch(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, y):
        return self.linear(Counted.apply(y))


CASES = [(1, 0, 1), (2, 0, 3), (20, 0, 210), (7, 3 * 48, 12), (20, 2**19, 20)]


@pytest.mark.parametrize(("n", "memory", "passes"), CASES)
def test_lengths_take_half_of_n_squared_branch_products_of_which_some_go_together(monkeypatch, n, memory, passes):
    monkeypatch.setattr("unravelling.paths.STACKED", memory)
    chain = Chain(nn.Linear(3, 3), [Unit(CountedBranch()) for _ in range(n)], nn.Linear(3, 3)).eval()
    Counted.passes = Counted.images = 0
    gradient_by_length(chain, torch.randn(4, 3), torch.tensor([0, 1, 2, 0]))
    assert Counted.passes == passes
    filled = 2 + 1 + 2 if memory == 3 * 48 else 0  # of 4, 5 and 7 gradients, three at a time
    assert Counted.images == 4 * (n * (n + 1) // 2 + filled)


@pytest.mark.parametrize("copies", range(2, 9))
def test_no_gradient_changes_places_where_some_fill_a_batch_up(monkeypatch, copies):
    chain, (x, y) = small("pre", torch.float64), images(dtype=torch.float64)
    expected = [sum(path for bits, path in path_gradients(chain, x, y).items() if sum(bits) == k) for k in range(7)]
    monkeypatch.setattr("unravelling.paths.STACKED", copies * chain.stem(x).nbytes)
    for found, g in zip(gradient_by_length(chain, x, y), expected, strict=True):
        assert close(found, g)


@given(cases(), st.integers(0, 6))
def test_gradients_that_go_through_a_branch_together_are_those_that_go_alone(case, copies):
    _, chain, gone, x, y = case
    chain = chain.without(*gone)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("unravelling.paths.STACKED", 0)
        alone, signed = gradient_by_length(chain, x, y), path_norms(chain, x, y, 2)
        patch.setattr("unravelling.paths.STACKED", copies * chain.stem(x).nbytes)
        together = gradient_by_length(chain, x, y)
        assert (together - alone).abs().max() <= 1e-12 * alone.abs().max()
        pd.testing.assert_frame_equal(path_norms(chain, x, y, 2), signed, rtol=1e-9)


def test_gradients_of_images_that_mix_go_through_a_branch_alone():
    parts = [nn.Linear(3, 3), nn.BatchNorm1d(3, track_running_stats=False), nn.Tanh()]
    chain = Chain(nn.Identity(), [Unit(nn.Sequential(*copy.deepcopy(parts))) for _ in range(4)], nn.Linear(3, 3))
    x, y = images(5, size=3, dtype=torch.float64)[0][:, 0, 0], torch.tensor([0, 1, 2, 0, 1])
    chain = chain.double().eval()
    paths = path_gradients(chain, x, y)
    for k, g in enumerate(gradient_by_length(chain, x, y)):
        assert close(g, sum(path for bits, path in paths.items() if sum(bits) == k))


def test_a_batch_may_be_given_in_one_piece():
    chain, (x, y) = small("pre", torch.float64), images(dtype=torch.float64)
    for at in ("stem", "pixels"):
        assert torch.equal(gradient_by_length(chain, (x, y), at=at), gradient_by_length(chain, x, y, at=at))


# ---------------------------------------------------------------- norms of the gradient


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", SMALL)
def test_gradient_norms_by_hand(kind, training):
    chain, (x, y) = small(kind, torch.float64).train(training), images(5, dtype=torch.float64)
    before = snapshot(chain)
    table = gradient_norms(chain, x, y)
    assert snapshot(chain) == before
    assert not x.requires_grad
    oracle = copy.deepcopy(chain)
    states = states_by_hand(kind, oracle, x.clone().requires_grad_())
    gradients = grad(cross_entropy(oracle.head(states[-1]), y), states)
    expected = [math.sqrt((g.numpy() ** 2).sum()) for g in gradients]
    assert table["state"].tolist() == list(range(len(chain) + 1))
    assert table["gradient_norm"].tolist() == pytest.approx(expected, rel=1e-10)
    if training and "nobn" not in kind:
        assert snapshot(oracle) != before, "the oracle does not move the running statistics"


def test_gradient_norms_of_a_lesioned_network():
    chain, (x, y) = small("pre", torch.float64), images(dtype=torch.float64)
    norms = gradient_norms(chain.without(1, 2), x, y)["gradient_norm"]
    states = states_by_hand("pre", chain, x, gone=(1, 2))
    gradients = grad(cross_entropy(chain.head(states[-1]), y), states)
    assert norms.tolist() == pytest.approx([g.norm().item() for g in gradients], rel=1e-10)
    assert norms[1] == norms[2]  # nothing happens in a deleted unit without padding


def test_another_loss():
    chain, (x, y) = small("pre", torch.float64), images(dtype=torch.float64)

    def loss(logits, labels):
        return (logits[:, 0] * (1 + labels)).sum()

    first = chain.stem(x).detach().requires_grad_()
    state = first
    for unit in chain.units:
        state = unit(state)
    expected = grad(loss(chain.head(state), y), first)[0]
    assert close(sum(gradient_by_length(chain, x, y, loss)), expected)
    assert close(sum(path_gradients(chain, x, y, loss).values()), expected)
    assert gradient_norms(chain, x, y, loss)["gradient_norm"][0] == pytest.approx(expected.norm().item(), rel=1e-10)


# ---------------------------------------------------------------- at the weights


def weight_gradients(chain, x, y, gone=()):
    """The ordinary gradient at the weights of every branch, in one vector each; None for a deleted unit."""
    copied = copy.deepcopy(chain).requires_grad_()
    cross_entropy(copied.without(*gone)(x), y).backward()
    return [
        None if i in gone else torch.cat([p.grad.flatten() for p in unit.branch.parameters()])
        for i, unit in enumerate(copied.units)
    ]


def weight_paths(kind, chain, gone, x, y):
    """For every unit and length, the gradient at the branch's weights, one backward pass for each path above it."""
    found = {}
    for i, unit in enumerate(chain.units):
        if i in gone:
            continue
        weights = [p.requires_grad_() for p in unit.branch.parameters()]
        above = ways(kind, chain, gone)[i + 1 :]
        for bits in product(*above):
            state, into = chain.stem(x).detach(), [0] * i + [1] + list(bits)
            for j, (other, bit) in enumerate(zip(chain.units, into, strict=True)):
                f = other.branch(state)
                skip = gate(shortcut_by_hand(other, state, f.shape), 1 - bit)
                f = gate(f, bit)
                state = skip if j in gone else f if kind.startswith("plain") else skip + f
                state = relu(state) if "post" in kind else state
            g = torch.cat([p.flatten() for p in grad(cross_entropy(chain.head(state), y), weights)])
            key = i, 1 + sum(bits)
            found[key] = found.get(key, 0) + g
    return found


@given(cases(depths=(8,)))
def test_the_spectrum_at_the_weights_by_a_backward_pass_for_every_path(case):
    kind, chain, gone, x, y = case
    chain.requires_grad_(False)  # frozen weights have a gradient, too
    table = weight_spectrum(chain.without(*gone), x, y)
    assert not any(p.requires_grad for p in chain.parameters())
    expected = weight_paths(kind, chain, gone, x, y)
    whole = weight_gradients(chain, x, y, gone)
    total = sum((g**2).sum() for g in whole if g is not None)
    assert set(zip(table["unit"], table["length"], strict=True)) == expected.keys()
    for row in table.itertuples():
        part = expected[row.unit, row.length]
        assert row.norm == pytest.approx(part.norm().item(), rel=1e-9, abs=1e-12 * total.sqrt().item())
        assert row.share == pytest.approx((part @ whole[row.unit] / total).item(), rel=1e-9, abs=1e-12)
    assert table["share"].sum() == pytest.approx(1)


@given(cases(depths=(8, 14)))
def test_shares_of_a_units_weights_sum_to_autograds(case):
    _, chain, gone, x, y = case
    shares = weight_spectrum(chain.without(*gone), x, y).groupby("unit")["share"].sum()
    whole = {i: (g**2).sum().item() for i, g in enumerate(weight_gradients(chain, x, y, gone)) if g is not None}
    assert shares.to_dict() == pytest.approx({i: square / sum(whole.values()) for i, square in whole.items()})


def test_the_spectrum_at_the_weights_changes_nothing():
    chain, (x, y) = small("pre"), images()
    before = snapshot(chain)
    weight_spectrum(chain, x, y, batch_statistics=True)
    assert snapshot(chain) == before


def test_branches_without_weights_of_their_own():
    linear, (x, y) = nn.Linear(3, 3), (torch.randn(2, 3), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"^two branches share weights"):
        weight_spectrum(Chain(nn.Identity(), [Unit(linear), Unit(linear)], nn.Identity()), x, y)
    with pytest.raises(ValueError, match=r"^no branch has weights"):
        weight_spectrum(Chain(linear, [Unit(nn.Tanh())], nn.Identity()), x, y)
    some = weight_spectrum(Chain(nn.Identity(), [Unit(nn.Tanh()), Unit(linear)], nn.Identity()), x, y)
    assert some.query("unit == 0")["norm"].eq(0).all()
    assert some.query("unit == 1")["share"].sum() == pytest.approx(1)


# ---------------------------------------------------------------- batch norm as in training


@pytest.mark.parametrize("kind", ["pre", "post-projection", "plain"])
def test_spectra_with_the_batchs_own_statistics(kind):
    chain, (x, y) = small(kind, torch.float64), images(5, dtype=torch.float64)
    training = copy.deepcopy(chain).train()
    first = training.stem(x).detach().requires_grad_()
    state = first
    for unit in training.units:
        state = unit(state)
    expected = grad(cross_entropy(training.head(state), y), first)[0]
    before = snapshot(chain)
    for mode in (False, True):
        found = gradient_by_length(chain.train(mode), x, y, batch_statistics=True)
        assert close(sum(found), expected)
        assert snapshot(chain.eval()) == before
    assert not close(sum(gradient_by_length(chain, x, y)), expected, tolerance=1e-3)
    shares = weight_spectrum(chain, x, y, batch_statistics=True).groupby("unit")["share"].sum()
    whole = [(g**2).sum().item() for g in weight_gradients(copy.deepcopy(chain).train(), x, y)]
    assert shares.tolist() == pytest.approx([square / sum(whole) for square in whole])


def test_lengths_with_the_batchs_own_statistics_by_brute_force():
    chain, (x, y) = randomized(KINDS["pre"](8, 1), 1, torch.float64), images(4, dtype=torch.float64)
    found = gradient_by_length(chain, x, y, batch_statistics=True)
    paths = brute_force("pre", copy.deepcopy(chain).train(), (), x, y)
    for k, g in enumerate(found):
        expected = sum(p for bits, p in paths.items() if sum(bits) == k)
        assert close(g, expected, max(p.norm() for p in paths.values())), k


# ---------------------------------------------------------------- another split of skip and branch


@pytest.mark.parametrize("kind", ["pre", "post", "pre-projection"])
def test_canonical_split_against_the_whole_jacobian(kind):
    chain = randomized(KINDS[kind](14, 3), 3, torch.float64)
    for unit in chain.units[::3]:
        unit.branch = Unit(unit.branch, Change(lambda y: -0.3 * y))  # a trace away from 0
    x, y = images(2, dtype=torch.float64)
    table = canonical_split(chain.without(1), x, samples=40, seed=1)
    assert table["unit"].tolist() == list(range(6))
    assert table["name"].tolist() == [unit.name for unit in chain.units]
    nothing = [i == 1 or not unit.has_identity_skip for i, unit in enumerate(chain.units)]
    assert table["c"].isna().tolist() == table["standard_error"].isna().tolist() == nothing
    assert 0 < sum(nothing) < 6
    for row in table.dropna().itertuples():
        state, branch = chain.without(1).trace(x)[row.unit], chain.units[row.unit].branch
        jacobian = torch.autograd.functional.jacobian(branch, state)
        size = state[0].numel()
        traces = [jacobian[i, ..., i, :, :, :].reshape(size, size).trace() for i in range(len(x))]
        exact = 1 + sum(traces).item() / len(x) / size
        assert 0 < row.standard_error < 0.05
        assert abs(row.c - exact) < 4 * row.standard_error
        assert abs(exact - 1) > 10 * row.standard_error or row.unit % 3, "the oracle cannot tell c from 1"
    assert canonical_split(chain.without(1), (x, y), samples=40, seed=1).equals(table)
    assert not canonical_split(chain.without(1), x, samples=40, seed=2).equals(table)


def test_the_probes_scatter_as_much_as_they_say():
    chain, (x, _) = randomized(KINDS["pre"](8, 3), 3, torch.float64), images(1, dtype=torch.float64)
    many = [canonical_split(chain, x, samples=4, seed=seed).loc[0] for seed in range(60)]
    scatter = np.std([row["c"] for row in many], ddof=1)
    assert scatter == pytest.approx(np.sqrt(np.mean([row["standard_error"] ** 2 for row in many])), rel=0.35)


@pytest.mark.parametrize("kind", SMALL)
def test_a_split_is_the_same_function_by_other_paths(kind):
    chain, (x, y) = small(kind, torch.float64), images(dtype=torch.float64)
    before = snapshot(chain)
    factors = [0.5, math.nan, 1.5, 1, -2, 0.9, *[0.7] * 7][: len(chain)]
    for c in (0.9, np.float64(1.1), factors):
        other = chain.split(c)
        assert torch.allclose(other(x), chain(x), rtol=1e-10, atol=1e-12)
        assert {id(p) for p in other.parameters()} == {id(p) for p in chain.parameters()}
        assert not any(part.training for part in other.modules() if part is not other.units)
        ours, theirs = gradient_by_length(other, x, y), gradient_by_length(chain, x, y)
        assert close(sum(ours), sum(theirs))
        residual = any(unit.residual and unit.has_identity_skip for unit in chain.units)
        assert close(ours[0], theirs[0], sum(theirs).norm()) == (not residual)
    assert snapshot(chain) == before


def test_a_split_by_hand():
    """y + 3y = 0.5 y + 3.5 y: lengths 1, 3 become 0.5, 3.5."""
    unit = Unit(nn.Linear(1, 1, bias=False), name="a", stage=2)
    nn.init.constant_(unit.branch.weight, 3)
    chain = Chain(nn.Identity(), [unit, unit.deleted()], nn.Identity())
    x, y = torch.ones(1, 1), torch.ones(1)
    by_length = gradient_by_length(chain.split(0.5), x, y, lambda logits, y: logits.sum())
    assert by_length.flatten().tolist() == [0.5, 3.5, 0]
    assert chain.split(0.5).without(0)(x).item() == 0.5
    assert chain.split([0.5, 7])(x).item() == 4
    assert (chain.split(0.5).units[0].name, chain.split(0.5).units[0].stage) == ("a", 2)
    assert canonical_split(chain, x, 2)["c"].tolist() == [4, pytest.approx(math.nan, nan_ok=True)]


def test_the_standard_error_of_a_trace_by_hand():
    """Of two estimates it is half their difference, so both are known, and with the mean of three the third."""
    torch.manual_seed(0)
    chain, x = Chain(nn.Identity(), [Unit(nn.Linear(5, 5))], nn.Identity()).double(), torch.randn(3, 5).double()
    two, three = (canonical_split(chain, x, samples, seed=0).iloc[0] for samples in (2, 3))
    values = [two["c"] - two["standard_error"], two["c"] + two["standard_error"], 3 * three["c"] - 2 * two["c"]]
    assert three["standard_error"] == pytest.approx(np.std(values, ddof=1) / math.sqrt(3))


@pytest.mark.parametrize(
    ("c", "error", "message"),
    [
        ([1.0], ValueError, "c has 1 factors, but this chain has 6 units: give one or all"),
        ("abcdef", TypeError, "c holds 'a': expected numbers"),
        (None, TypeError, "c holds None: expected numbers"),
        (math.inf, ValueError, "c holds inf: expected finite numbers, or NaN to leave a unit as it is"),
    ],
)
def test_factors_that_make_no_sense(c, error, message):
    with pytest.raises(error, match=f"^{message}$"):
        small("pre").split(c)


# ---------------------------------------------------------------- nothing changes, and what is refused


@pytest.mark.parametrize("kind", SMALL)
def test_nothing_changes(kind):
    chain, (x, y) = small(kind), images()
    for part in chain.modules():
        part.training = False
    chain.training = chain.units.training = True  # the containers' own mode matters to no forward pass
    before, x_before = snapshot(chain), x.clone()
    gradient_by_length(chain, x, y)
    if len(chain) <= 12:
        path_gradients(chain, x, y)
    gradient_norms(chain, x, y)
    assert snapshot(chain) == before
    assert torch.equal(x, x_before)
    assert not x.requires_grad


def test_images_stay_as_they_are_where_they_are_every_state():
    chain = Chain(nn.Identity(), [Unit(nn.Linear(3, 3)).deleted()], nn.Linear(3, 3)).eval()
    x, y = torch.randn(2, 3), torch.tensor([0, 1])
    gradient_by_length(chain, x, y)
    path_gradients(chain, x, y)
    gradient_norms(chain, x, y)
    assert not x.requires_grad


@pytest.mark.parametrize("function", [gradient_by_length, path_gradients])
def test_batch_norm_in_training_mode_is_refused(function):
    chain, (x, y) = small("pre"), images()
    mix_modes(chain)
    before = snapshot(chain)
    with pytest.raises(ValueError, match=r"^batch norm is in training mode, .*: call chain\.eval\(\) first$"):
        function(chain, x, y)
    assert snapshot(chain) == before


def call(function, chain, x, y):
    return function(chain, x, y, **ARGUMENTS.get(function, {}))


ARGUMENTS = {path_norms: {"repeats": 2}, sample_path_gradients: {"lengths": [1], "samples": 2}}
FUNCTIONS = [gradient_by_length, path_gradients, mean_length, path_norms, sample_path_gradients, weight_spectrum]


class OwnNoise(nn.Module):
    """Randomness of one's own, in training mode alone."""

    def forward(self, y):
        return y + torch.randn_like(y) if self.training else y


RANDOM = {
    "dropout": lambda: nn.Dropout(0.5),
    "StochasticDepth": lambda: StochasticDepth(0.5, "row"),
    "DropPath": lambda: DropPath(0.5),
    "RReLU": lambda: nn.RReLU(),
    "of one's own": OwnNoise,
}


@pytest.mark.parametrize("kind", RANDOM)
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("place", ["stem", "branch", "head"])
def test_whatever_draws_random_numbers_is_refused(place, function, kind):
    torch.manual_seed(0)  # an RReLU that sees positive numbers alone draws none
    noise = RANDOM[kind]().train()
    parts = {key: nn.Sequential(nn.Linear(4, 4), *[noise] * (key == place)) for key in ("stem", "branch", "head")}
    chain = Chain(parts["stem"], [Unit(parts["branch"]), Unit(nn.Linear(4, 4))], parts["head"])
    x, y = torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 0, 1])
    before = torch.get_rng_state()
    with pytest.raises(ValueError, match=r"^the network draws random numbers, .*: call chain\.eval\(\) first$"):
        call(function, chain, x, y)
    assert torch.equal(torch.get_rng_state(), before)
    chain.eval()
    first, second = (torch.tensor(np.asarray(flat(call(function, chain, x, y)))) for _ in range(2))
    assert torch.equal(first, second)


def flat(result):
    return torch.stack([*result.values()]) if isinstance(result, dict) else result


def test_noise_with_probability_zero_is_none():
    chain = Chain(nn.Dropout(0), [Unit(nn.Linear(4, 4)), Unit(StochasticDepth(0, "row"))], nn.Linear(4, 4)).train()
    x, y = torch.randn(3, 4), torch.tensor([0, 1, 2])
    assert close(sum(gradient_by_length(chain, x, y)), whole_gradient(chain, x, y), tolerance=1e-5)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_states_may_change_their_rank(function):
    """Images become vectors on the way: the functions give what they give where the stem has done so already."""
    torch.manual_seed(0)
    linear = [nn.Linear(8, 8).double() for _ in range(3)]
    flatten = Unit(nn.Flatten(), nn.Flatten(), residual=False)
    units = [Unit(layer) for layer in linear]
    square = nn.Unflatten(1, (2, 2, 2))
    x, y = torch.randn(5, 8, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 0])
    changing = Chain(square, [Unit(nn.Sequential(nn.Flatten(), linear[0], square)), flatten, *units[1:]], nn.Identity())
    same = Chain(nn.Identity(), [units[0], Unit(nn.Identity(), residual=False), *units[1:]], nn.Identity())
    arguments = {path_norms: {"repeats": 4}, sample_path_gradients: {"lengths": [1, 2, 4], "samples": 3}}
    found, expected = (function(chain, x, y, **arguments.get(function, {})) for chain in (changing, same))
    if isinstance(expected, pd.DataFrame):
        pd.testing.assert_frame_equal(found, expected)
    else:
        assert close(flat(found).flatten(), flat(expected).flatten())


@pytest.mark.parametrize("samples", [0, -2])
def test_no_samples(samples):
    chain, (x, y) = small("pre"), images()
    with pytest.raises(ValueError, match=rf"^samples must be at least 1, not {samples}$"):
        sample_path_gradients(chain, x, y, [1], samples)


class NoFloat64(torch.Tensor):
    """A tensor of a device without float64, as Apple's GPUs have none; on the CPU it is an ordinary one."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        result = super().__torch_function__(func, types, args, kwargs)
        if func is torch.Tensor.cpu:
            return result.as_subclass(torch.Tensor)
        assert not (isinstance(result, NoFloat64) and result.dtype == torch.float64), f"{func} made float64"
        return result


@pytest.mark.parametrize("function", [*FUNCTIONS, gradient_norms, evaluate, spectrum])
def test_a_device_without_float64_will_do(function):
    chain, (x, y) = small("pre"), images()
    if function is spectrum:
        x, y, function = gradient_by_length(chain, x, y), None, lambda chain, x, y: spectrum(x)
    elif function is evaluate:
        function = lambda chain, x, y: evaluate(chain, (x, y))  # noqa: E731
    expected, found = (call(function, chain, given, y) for given in (x, x.as_subclass(NoFloat64)))
    with pytest.raises(AssertionError, match="made float64"):
        x.as_subclass(NoFloat64).double()
    if isinstance(expected, torch.Tensor):
        assert torch.equal(found.cpu(), expected)
    elif isinstance(expected, pd.DataFrame):
        pd.testing.assert_frame_equal(found, expected)
    else:
        assert all(torch.equal(torch.as_tensor(found[key]).cpu(), torch.as_tensor(expected[key])) for key in expected)


@pytest.mark.parametrize("function", [gradient_by_length, path_gradients, gradient_norms])
def test_a_loss_that_is_no_scalar_is_refused(function):
    chain, (x, y) = small("pre"), images(3)
    if function is gradient_norms:
        chain.train()
    before = snapshot(chain)
    with pytest.raises(ValueError, match=r"^the loss must be a real scalar, not \(3,\) of torch.*: average or sum it$"):
        function(chain, x, y, lambda logits, labels: cross_entropy(logits, labels, reduction="none"))
    assert snapshot(chain) == before


@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 4), (2, 3, 4, 5)], ids=str)
def test_probabilities_are_labels_of_images_and_pixels_but_not_of_texts(shape):
    """With three axes it would be open which one the classes lie along."""
    logits, labels = torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64).softmax(1)
    if len(shape) == 3:
        with pytest.raises(TypeError, match=r"^y, the labels, has the type torch\.float64: expected a tensor"):
            paths.cross_entropy(logits, labels)
    else:
        expected = -(labels * logits.log_softmax(1)).sum(1).mean()
        assert paths.cross_entropy(logits, labels).item() == pytest.approx(expected.item(), rel=1e-12)


def test_too_many_paths_are_refused():
    chain, (x, y) = small("vgg"), images()
    with pytest.raises(ValueError, match=r"^13 units make 2\^13 paths: use gradient_by_length for more than 12$"):
        path_gradients(chain, x, y)


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_what_is_not_finite_is_refused(value):
    chain, (x, y) = small("pre"), images(4)
    with pytest.raises(ValueError, match=r"^the loss is NaN or infinite: look for NaN"):
        gradient_norms(chain, x, y, lambda logits, y: logits.sum() * value)
    with pytest.raises(ValueError, match="holds NaN or inf"):
        spectrum(torch.full((3, 2, 4), value))
    with torch.no_grad():
        chain.units[0].branch[2].weight.fill_(value)
    with pytest.raises(ValueError, match=r"^the network's states are NaN or infinite"):
        canonical_split(chain, x)


def test_complex_states_are_refused():
    """Half of a complex number would otherwise be left out of every norm."""
    def linear():
        return nn.Linear(5, 5, dtype=torch.complex64)

    chain = Chain(linear(), [Unit(linear())], nn.Sequential(linear(), Change(torch.abs)))
    with pytest.raises(TypeError, match=r"^the states are complex"), torch.random.fork_rng():
        gradient_norms(chain, torch.randn(4, 5, dtype=torch.complex64), torch.arange(4))
