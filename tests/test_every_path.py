"""Reordering, spectra, single paths and branches left out in training, against brute force and hand counts."""

import dataclasses
import itertools
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import SMALL, images, small, snapshot
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy
from unravelling import (
    RECIPES,
    Chain,
    Recipe,
    Unit,
    build,
    digits,
    evaluate,
    fit,
    gradient_by_length,
    load,
    mean_length,
    path_gradients,
    path_norms,
    reorder,
    sample_path_gradients,
    spectrum,
)
from unravelling.lesion import evaluate_variants
from unravelling.paths import length_distribution, surviving
from unravelling.train import thinning

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "experiments"))
import measurements

RESIDUAL = [kind for kind in SMALL if kind.startswith(("pre", "post"))]
DOUBLE = torch.float64


def by_brute_force(chain, x, y):
    """G_0 … G_n as sums over all single paths, and the norms of these by length."""
    paths = path_gradients(chain, x, y)
    zero = torch.zeros_like(next(iter(paths.values())))
    lengths = range(len(chain) + 1)
    sums = torch.stack([sum((g for bits, g in paths.items() if sum(bits) == k), zero) for k in lengths])
    norms = [[g.norm().item() for bits, g in paths.items() if sum(bits) == k] for k in lengths]
    return sums, norms


def close(found, expected, tolerance=1e-12):
    return (found - expected).norm() <= tolerance * expected.norm()


# --- reordering -----------------------------------------------------------------------------------------------------


def inversions(order):
    return sum(a > b for a, b in itertools.combinations(order, 2))


def test_reordered_networks_are_evaluated_as_rebuilt_ones():
    chain, data = build("resnet20", "digits", seed=3).eval(), digits().test
    data = data.take(torch.arange(60))
    table = reorder(chain, data, [1, 3, None], 3, seed=1)
    for row in table.itertuples():
        order = list(map(int, row.order.split()))
        assert row.error == evaluate(chain.reordered(order), data)["error"]
        assert row.loss == pytest.approx(evaluate(chain.reordered(order), data)["loss"], rel=1e-6)
        pairs = math.comb(len(order), 2)
        assert row.tau == pytest.approx(1 - 2 * inversions(order) / pairs)
        movable = [[0, 1, 2], [4, 5], [7, 8]]  # units 3 and 6 are the transitions
        moved = sum(inversions([order[i] for i in stage]) for stage in movable)
        assert row.tau_within == pytest.approx(1 - 2 * moved / 5)
        assert [order[3], order[6]] == [3, 6]
        assert all(sorted(order[i] for i in stage) == stage for stage in movable)


def test_one_swap_exchanges_two_units_and_all_pairs_come_up():
    chain, data = build("resnet20", "digits").eval(), digits().test.take(torch.arange(2))
    orders = [list(map(int, order.split())) for order in reorder(chain, data, 1, 60, seed=0)["order"]]
    swapped = {tuple(i for i, unit in enumerate(order) if i != unit) for order in orders}
    assert swapped == {(0, 1), (0, 2), (1, 2), (4, 5), (7, 8)}


def test_no_swap_changes_nothing_and_a_seed_repeats():
    chain, data = build("resnet20", "digits").eval(), digits().test.take(torch.arange(20))
    before = snapshot(chain)
    still = reorder(chain, data, 0, 2)
    assert (still[["tau", "tau_within"]] == 1).all(axis=None)
    assert (still[["delta_error", "delta_loss"]] == 0).all(axis=None)
    once, again = (reorder(chain, data, [2, None], 4, seed=7) for _ in range(2))
    assert once.equals(again)
    assert snapshot(chain) == before


def test_reorderings_that_cannot_be_made():
    data = digits().test.take(torch.arange(2))
    with pytest.raises(ValueError, match="cannot swap 6 different pairs: there are 5 of equal shape"):
        reorder(build("resnet20", "digits"), data, [1, 6], 1)
    with pytest.raises(ValueError, match="no two of the 3 units can change places"):
        reorder(build("resnet8", "digits"), data, 1, 1)


# --- spectra --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SMALL)
@pytest.mark.parametrize("max_length", [0, 1, 3])
def test_a_truncated_spectrum_keeps_the_rest_together(kind, max_length):
    chain, (x, y) = small(kind, DOUBLE), images(dtype=DOUBLE)
    whole, cut = (gradient_by_length(chain, x, y, max_length=m) for m in (None, max_length))
    assert len(cut) == max_length + 2
    assert all(torch.equal(a, b) for a, b in zip(cut[:-1], whole, strict=False))
    rest = whole[max_length + 1 :].sum(0)
    assert (cut[-1] - rest).norm() <= 1e-12 * whole.sum(0).norm()


@pytest.mark.parametrize("kind", SMALL)
def test_at_the_pixels_lengths_sum_to_autograds_gradient(kind):
    chain, (x, y) = small(kind, DOUBLE), images(dtype=DOUBLE)
    pixels = x.clone().requires_grad_()
    cross_entropy(chain(pixels), y).backward()
    found = gradient_by_length(chain, x, y, at="pixels")
    assert close(found.sum(0), pixels.grad)


def test_float64_is_computed_on_a_copy():
    chain, (x, y) = small("pre"), images()
    before = snapshot(chain)
    found = gradient_by_length(chain, x, y, dtype=DOUBLE)
    assert found.dtype == DOUBLE
    assert close(found, gradient_by_length(small("pre", DOUBLE), x.double(), y), 1e-14)
    assert snapshot(chain) == before


@pytest.mark.parametrize("per_sample", [True, False])
def test_shares_and_norms_by_hand(per_sample):
    chain, (x, y) = small("post-projection", DOUBLE), images(dtype=DOUBLE)
    gradients = gradient_by_length(chain, x, y)
    table = spectrum(gradients, per_sample=per_sample)
    sums, _ = by_brute_force(chain, x, y)
    parts = range(len(x)) if per_sample else [slice(None)]
    for sample, part in enumerate(parts):
        rows = table[table["sample"] == sample] if per_sample else table
        g = sums[:, part].sum(0)
        for row in rows.itertuples():
            mine = sums[row.length, part]
            assert row.norm == pytest.approx(mine.norm().item(), rel=1e-10)
            assert row.share == pytest.approx(((g * mine).sum() / (g * g).sum()).item(), abs=1e-12)
        assert rows["share"].sum() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("kind", [*RESIDUAL, "plain"])
def test_mean_length_is_the_mean_over_the_shares(kind):
    chain, (x, y) = small(kind, DOUBLE).without(2), images(dtype=DOUBLE)
    table = spectrum(gradient_by_length(chain, x, y), per_sample=True)
    expected = (table["length"] * table["share"]).groupby(table["sample"]).sum()
    np.testing.assert_allclose(mean_length(chain, x, y).numpy(), expected, rtol=1e-9)


@pytest.mark.parametrize("kind", RESIDUAL)
def test_sampled_paths_are_paths(kind):
    chain, (x, y) = small(kind, DOUBLE), images(dtype=DOUBLE)
    _, norms = by_brute_force(chain, x, y)
    table = sample_path_gradients(chain, x, y, range(len(chain) + 1), 40, seed=1)
    for k, rows in table.groupby("length"):
        assert len(rows) == 40
        found = set(rows["norm"].round(12))
        assert found <= {round(norm, 12) for norm in norms[k]}
        assert len(found) > len(norms[k]) / 2  # 40 draws from at most 20 paths meet most of them


def test_paths_that_do_not_exist_are_refused():
    chain, (x, y) = small("pre"), images()
    with pytest.raises(ValueError, match=r"no path has length 7: this chain's have lengths 0 to 6"):
        sample_path_gradients(chain, x, y, [3, 7], 1)
    with pytest.raises(ValueError, match=r"no path has length 6: this chain's have lengths 0 to 5"):
        sample_path_gradients(chain.without(1), x, y, [6], 1)
    with pytest.raises(ValueError, match=r"no path has length 5: this chain's have lengths 6 to 6"):
        sample_path_gradients(small("plain"), x, y, [5], 1)
    with pytest.raises(ValueError, match="max_length 7 makes no sense"):
        gradient_by_length(chain, x, y, max_length=7)
    with pytest.raises(ValueError, match=r"at is 'logits'.*pixels"):
        gradient_by_length(chain, x, y, at="logits")
    with pytest.raises(ValueError, match="repeats must be at least 2, not 1"):
        path_norms(chain, x, y, 1)


@pytest.mark.parametrize(
    "function",
    [
        mean_length,
        lambda chain, x, y, loss=cross_entropy: path_norms(chain, x, y, 2, loss=loss),
        lambda chain, x, y, loss=cross_entropy: sample_path_gradients(chain, x, y, [1], 1, loss=loss),
    ],
)
def test_ill_posed_gradients_are_refused(function):
    chain, (x, y) = small("pre"), images()
    with pytest.raises(ValueError, match=r"the loss must be a real scalar, not \(3,\)"):
        function(chain, x, y, loss=lambda logits, y: cross_entropy(logits, y, reduction="none"))
    with pytest.raises(ValueError, match=r"call chain\.eval\(\) first"):
        function(chain.train(), x, y)


@pytest.mark.parametrize("kind", RESIDUAL)
def test_random_signs_agree_with_brute_force(kind):
    chain, (x, y) = small(kind, DOUBLE), images(dtype=DOUBLE)
    _, norms = by_brute_force(chain, x, y)
    table = path_norms(chain, x, y, 60, seed=2)
    assert table["paths"].tolist() == [len(some) for some in norms]
    for row, some in zip(table.itertuples(), norms, strict=True):
        exact = sum(norm**2 for norm in some)
        assert abs(row.sum_of_squares - exact) <= 4 * row.standard_error + 1e-9 * exact
        assert row.rms_norm == pytest.approx(math.sqrt(row.sum_of_squares / len(some)))
    several = [k for k, some in enumerate(norms) if len(some) > 1]
    assert (table.loc[several, "standard_error"] > 0).all()


@given(st.integers(1, 9), st.data())
def test_counts_by_listing_every_path(n, data):
    d = data.draw(st.integers(0, n))
    paths = list(itertools.product((0, 1), repeat=n))
    assert 2**n == len(paths)
    for row in length_distribution(n).itertuples():
        assert row.paths == sum(sum(bits) == row.length for bits in paths)
        assert row.share == row.paths / len(paths)
    gone = data.draw(st.permutations(range(n)))[:d]
    for row in surviving(n, d).itertuples():
        mine = [bits for bits in paths if sum(bits) == row.length]
        assert row.share == sum(not any(bits[i] for i in gone) for bits in mine) / len(mine)


def test_figures_of_the_paper_that_are_combinatorics():
    share = length_distribution(54).set_index("length")["share"]
    assert share.loc[19:35].sum() > 0.95  # Veit et al., 2016, section 5
    assert round(100 * share.loc[5:17].sum(), 2) == 0.45
    with pytest.raises(ValueError, match="cannot delete 55 of 54 units"):
        surviving(54, 55)


# --- branches left out in training ----------------------------------------------------------------------------------


def states_kept(chain, part):
    return [not unit.is_deleted for unit in part.units]


@pytest.mark.parametrize("kind", RESIDUAL)
@pytest.mark.parametrize("options", [{"active": 2}, {"survival": 0.3}])
def test_a_step_trains_the_scaled_rest_of_the_network(kind, options):
    chain, (x, _) = small(kind, DOUBLE), images(dtype=DOUBLE)
    recipe, n = Recipe("some", epochs=1, **options), len(chain)
    part = thinning(chain, recipe)(torch.Generator().manual_seed(5))
    kept = states_kept(chain, part)
    y = chain.stem(x)
    for i, unit in enumerate(chain.units):
        p = 2 / n if "active" in options else 1 - (i + 1) / n * 0.7
        y = unit.post(unit.skip(y) + kept[i] * unit.branch(y) / p)
    torch.testing.assert_close(part(x), chain.head(y), rtol=1e-6, atol=1e-9)
    assert {p.data_ptr() for p in part.parameters()} <= {p.data_ptr() for p in chain.parameters()}


def test_how_often_a_branch_takes_part():
    chain, generator = small("pre"), torch.Generator().manual_seed(0)
    n, steps = len(chain), 600
    exactly = [states_kept(chain, thinning(chain, Recipe("m", epochs=1, active=4))(generator)) for _ in range(steps)]
    assert {sum(kept) for kept in exactly} == {4}
    decaying = [
        states_kept(chain, thinning(chain, Recipe("p", epochs=1, survival=0.4))(generator)) for _ in range(steps)
    ]
    for found, p in (
        (np.mean(exactly, 0), np.full(n, 4 / n)),
        (np.mean(decaying, 0), 1 - np.arange(1, n + 1) / n * 0.6),
    ):
        assert (np.abs(found - p) <= 4 * np.sqrt(p * (1 - p) / steps) + 1e-12).all()


def test_leaving_branches_out_resumes_exactly(tmp_path):
    data = digits()
    recipe = dataclasses.replace(RECIPES["digits-short-paths"], epochs=2, batch_size=256, active=2)
    chains = [build("resnet8", "digits", seed=1) for _ in range(2)]
    whole = fit(chains[0], data, recipe, seed=4, progress=False)
    fit(chains[1], data, recipe, seed=4, checkpoint=tmp_path / "run.pt", stop_after=1, progress=False)
    parts = fit(chains[1], data, recipe, seed=4, checkpoint=tmp_path / "run.pt", progress=False)
    assert parts.equals(whole)
    states = [chain.state_dict() for chain in chains]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_recipes_that_leave_out_what_they_cannot():
    with pytest.raises(ValueError, match="both survival and active"):
        Recipe("both", epochs=1, survival=0.5, active=3)
    with pytest.raises(ValueError, match="survival 0 is not a probability above 0"):
        Recipe("none", epochs=1, survival=0)
    with pytest.raises(ValueError, match="needs 7 active units: this chain has 6"):
        thinning(small("pre"), Recipe("many", epochs=1, active=7))(torch.Generator())
    with pytest.raises(ValueError, match="this network has units without a skip"):
        thinning(small("plain"), Recipe("plain", epochs=1, active=2))(torch.Generator())
    chain = small("pre")
    assert thinning(chain, RECIPES["digits"])(torch.Generator()) is chain


# --- what later works say -------------------------------------------------------------------------------------------


def linear_chain(n, width, scale, seed):
    """A chain whose branches are random matrices, each of which keeps the length of a vector on average, scaled."""
    generator = torch.Generator().manual_seed(seed)
    units = []
    for _ in range(n):
        branch = torch.nn.Linear(width, width, bias=False, dtype=DOUBLE)
        matrix = torch.randn(width, width, generator=generator, dtype=DOUBLE)
        branch.load_state_dict({"weight": scale * matrix / math.sqrt(width)})
        units.append(Unit(branch))
    return Chain(torch.nn.Identity(), units, torch.nn.Identity()).eval()


@pytest.mark.parametrize("n", [8, 24])
@pytest.mark.parametrize("power", [0, 0.5, 1])
def test_scaled_branches_tame_the_number_of_paths(n, power):
    """Dherin and Munn, 2025: branches scaled by 1/√n or 1/n keep the sum over 2^n paths in bounds.

    Independent random branches make paths orthogonal on average, so E‖G_k‖² is the number of paths times scale^2k.
    """
    scale, draws, width = n**-power, 8, 64
    squares = torch.zeros(n + 1, dtype=DOUBLE)
    for seed in range(draws):
        chain = linear_chain(n, width, scale, seed)
        x, g = torch.randn(2, 4, width, generator=torch.Generator().manual_seed(draws + seed), dtype=DOUBLE)
        by_length = gradient_by_length(chain, x, g, lambda output, g: (output * g).sum())
        squares += by_length.flatten(1).square().sum(1) / g.square().sum() / draws
    for k in range(6):
        assert squares[k].item() == pytest.approx(math.comb(n, k) * scale ** (2 * k), rel=0.2)
    grown = squares.sum().item()
    bound = {0: 2.0**n, 0.5: math.e, 1: 1 + 2 / n}[power]
    assert grown > 0.7 * bound if power == 0 else grown < 1.1 * bound


def test_the_order_of_shuffled_blocks_is_found_again():
    """Park, 2026, in small: of all orders of a trained ResNet-20, the trained one fits the training images best."""
    chain, images_ = load("digits/resnet20-seed0"), digits().train.take(torch.arange(300))
    stages = {}
    for i, unit in enumerate(chain.units):
        if not unit.is_transition:
            stages.setdefault(unit.stage, []).append(i)
    orders = []
    for choice in itertools.product(*(itertools.permutations(stage) for stage in stages.values())):
        order = list(range(len(chain)))
        for stage, new in zip(stages.values(), choice, strict=True):
            for place, unit in zip(stage, new, strict=True):
                order[place] = unit
        orders.append(order)
    assert len(orders) == math.factorial(3) * math.factorial(2) ** 2
    np.random.default_rng(0).shuffle(orders)
    _, losses = evaluate_variants(chain, images_, orders)
    assert orders[losses.mean(1).argmin()] == list(range(len(chain)))


# --- what is stored -------------------------------------------------------------------------------------------------


def measured(name, chain, data):
    """The rows that are stored of a network, measured now."""
    measurement = measurements.TABLE[name]
    test, _ = measurement.images(chain, data)
    return measurement.function(chain, test, data, 0)


@pytest.mark.parametrize("name", ["damage", "delete_pairs", "spectrum", "lengths", "branches", "subnetworks"])
def test_stored_measurements_agree_with_measuring_by_hand(name, monkeypatch):
    monkeypatch.setattr(measurements, "ACTIVE", (4, 9))
    chain, data = build("resnet20", "digits", seed=2).eval(), digits()
    before = snapshot(chain)
    table = measured(name, chain, data)
    assert snapshot(chain) == before
    x, y = data.test.batches(500)[0]
    if name == "damage":
        with torch.no_grad():
            losses = [cross_entropy(c(x), y, reduction="none") for c in (chain, chain.without(4))]
        np.testing.assert_allclose(table["unit4"], losses[1] - losses[0], atol=1e-4)
        assert table["label"].tolist() == y.tolist()
    elif name == "delete_pairs":
        row = table.iloc[7]
        assert row["error"] == evaluate(chain.without(*map(int, row["units"].split())), data.test)["error"]
        assert len(table) == 300
    elif name == "spectrum":
        by_split = table.groupby(["split", "batch"])["share"].sum()
        assert len(by_split) == 10
        np.testing.assert_allclose(by_split, 1, atol=1e-5)
    elif name == "lengths":
        np.testing.assert_allclose(table["mean_length"][:50], mean_length(chain, x[:50], y[:50]), rtol=1e-3)
    elif name == "branches":
        unit, states = chain.units[5], chain.trace(x)
        ratio = unit.branch(states[5]).flatten(1).norm(dim=1) / states[5].flatten(1).norm(dim=1)
        assert table.loc[5, "ratio"] == pytest.approx(ratio.median().item(), rel=1e-4)
        assert table[["cosine", "descent"]].abs().le(1).all(axis=None)
    else:
        assert (table["best_error"] <= table["mean_error"]).all()
        whole = table[table["active"] == 9].iloc[0]  # all units: twenty times the network itself
        assert whole["mean_error"] == whole["averaged_error"] == evaluate(chain, data.test)["error"]
        assert whole["disagreement"] == 0 < table["disagreement"].iloc[0]


def test_stored_orders_stay_within_the_pairs_there_are():
    chain, data = build("resnet20", "digits").eval(), digits()
    small_data = dataclasses.replace(data, test=data.test.take(torch.arange(5)))
    table = measured("reorder", chain, small_data)
    assert table["swaps"].dropna().max() <= 5  # pairs of equal shape: 3 + 1 + 1
    assert table["swaps"].isna().sum() == 25
