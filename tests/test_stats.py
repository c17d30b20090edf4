"""Intervals against formulas, published values, scipy and simulation."""

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from unravelling.stats import error_difference, paired_bootstrap, seed_band, wilson


@given(st.integers(1, 10_000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_by_its_formula(counted):
    count, n = counted
    z = stats.norm.ppf(0.975)
    p = count / n
    middle = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    low, high = wilson(count, n)
    assert low == pytest.approx(middle - half, abs=1e-12)
    assert high == pytest.approx(middle + half, abs=1e-12)
    assert 0 <= low <= p <= high <= 1
    theirs = stats.binomtest(count, n).proportion_ci(0.95, "wilson")
    assert (low, high) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


@pytest.mark.parametrize(
    ("count", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_in_the_literature(count, n, low, high):
    """Table I, method 3, of Newcombe, Statistics in Medicine 17 (1998), 857-872."""
    ends = wilson(count, n)
    assert [round(float(end), 4) for end in ends] == [low, high]


def test_wilson_keeps_the_shape():
    low, high = wilson(np.array([[0, 1, 2], [3, 4, 5]]), 5)
    assert low.shape == high.shape == (2, 3)
    for index, count in np.ndenumerate(np.arange(6).reshape(2, 3)):
        assert (low[index], high[index]) == wilson(count, 5)
    assert np.shape(wilson(2, 5)[0]) == ()


@pytest.mark.parametrize(("count", "n"), [(-1, 10), (11, 10), ([1, 11], 10), (0, 0), (math.nan, 10), (0.06, 500)])
def test_wilson_of_impossible_counts(count, n):
    with pytest.raises(ValueError, match=f"^counts must be whole numbers, not shares, between 0 and {n} images$"):
        wilson(count, n)


@pytest.mark.parametrize(
    ("first", "second", "n", "low", "high"),
    [(3, 9, 10, 0.1705, 0.8090), (2, 6, 7, 0.0582, 0.8062), (0, 0, 10, -0.2775, 0.2775), (0, 10, 10, 0.6075, 1.0)],
)
def test_difference_of_errors_in_the_literature(first, second, n, low, high):
    """Table II, method 10, of Newcombe, Statistics in Medicine 17 (1998), 873-890."""
    ends = error_difference(first / n, second / n, n)
    assert [round(end, 4) for end in ends] == [low, high]
    assert error_difference(second / n, first / n, n) == pytest.approx((-ends[1], -ends[0]))


def test_difference_of_errors_nears_walds_interval():
    low, high = error_difference(0.25, 0.5, 700_000)  # √(0.1875 / 700,000 + 0.25 / 700,000) = 0.025 / √1000
    half = 1.959964 * 0.025 / math.sqrt(1000)
    assert (low, high) == pytest.approx((0.25 - half, 0.25 + half), abs=1e-5)


def test_shares_that_are_no_exact_fractions_are_counts_all_the_same():
    assert 0.29 * 100 < 29
    low, high = error_difference(0.29, 0.57, 100)
    assert low < 0.28 < high


def test_two_errors_of_zero_may_still_differ():
    low, high = error_difference(0, 0, 500)
    assert (low, high) == pytest.approx((-wilson(0, 500)[1], wilson(0, 500)[1]))
    assert high > 0.005
    with pytest.raises(ValueError, match="counts must be whole numbers, not shares, between 0 and 500 images"):
        error_difference(0.5, 1.1, 500)


def test_difference_of_errors_covers_the_true_one():
    draw = np.random.default_rng(0)
    pairs = draw.binomial(1000, [[0.3], [0.2]], (2, 2000)).T / 1000
    ends = np.array([error_difference(p, q, 1000) for p, q in pairs])
    assert ((ends[:, 0] < -0.1) & (ends[:, 1] > -0.1)).mean() == pytest.approx(0.95, abs=0.015)


def test_bootstrap_against_scipy():
    random = np.random.default_rng(0)
    for difference in (random.normal(0.3, 2, 200), random.choice([-1.0, 0, 1], 200, p=[0.05, 0.7, 0.25])):
        low, high = paired_bootstrap(difference, resamples=20_000)
        theirs = stats.bootstrap(
            (difference,), np.mean, method="percentile", n_resamples=20_000, rng=np.random.default_rng(1)
        ).confidence_interval
        width = theirs.high - theirs.low
        assert abs(low - theirs.low) < 0.05 * width
        assert abs(high - theirs.high) < 0.05 * width


def test_bootstrap_by_a_loop_over_a_thousand_resamples():
    values = np.random.default_rng(1).normal(size=7)
    drawn = np.random.default_rng(0).multinomial(7, [1 / 7] * 7, 1000)  # how often each value is in each resample
    means = [np.repeat(values, times).mean() for times in drawn]
    assert paired_bootstrap(values) == pytest.approx(np.quantile(means, [0.025, 0.975]), rel=1e-12)


def test_bootstrap_covers_the_truth_as_often_as_it_says():
    random = np.random.default_rng(2)
    simulated = random.exponential(1, (1000, 100)) - 1
    low, high = paired_bootstrap(simulated)
    covered = ((low <= 0) & (high >= 0)).mean()
    assert 0.90 <= covered <= 0.97


def test_bootstrap_rows_share_their_resamples():
    table = np.random.default_rng(3).normal(size=(4, 50))
    low, high = paired_bootstrap(table, seed=5)
    assert low.shape == high.shape == (4,)
    for i, row in enumerate(table):
        assert paired_bootstrap(row, seed=5) == (pytest.approx(low[i]), pytest.approx(high[i]))
    assert not np.allclose(low, paired_bootstrap(table, seed=6)[0])
    shifted = paired_bootstrap(table + 7, seed=5)
    assert np.allclose(shifted[0], low + 7)
    assert np.allclose(shifted[1], high + 7)


def test_bootstrap_where_nothing_changed():
    assert paired_bootstrap(np.zeros(30)) == (0, 0)


def test_seed_band_against_scipy():
    random = np.random.default_rng(4)
    table = pd.DataFrame(
        [
            {"k": k, "network": network, "seed": seed, "error": random.normal(k, 1)}
            for network in ("b", "a")
            for k in (2, 1)
            for seed in range(5)
        ]
    )
    band = seed_band(table, ["network", "k"], "error")
    assert list(band.columns) == ["network", "k", "mean", "seeds", "low", "high"]
    assert band[["network", "k"]].values.tolist() == [["b", 2], ["b", 1], ["a", 2], ["a", 1]]
    for row in band.itertuples():
        errors = table.query(f"network == {row.network!r} and k == {row.k}")["error"]
        low, high = stats.t.interval(0.95, 4, errors.mean(), stats.sem(errors))
        assert (row.mean, row.low, row.high, row.seeds) == pytest.approx((errors.mean(), low, high, 5))


def test_seed_band_of_one_seed_has_no_ends():
    table = pd.DataFrame({"k": [1, 2, 2], "error": [0.5, 0.25, 0.75]})
    band = seed_band(table, "k", "error")
    assert band["mean"].tolist() == [0.5, 0.5]
    assert band["seeds"].tolist() == [1, 2]
    assert band[["low", "high"]].isna().all(axis=1).tolist() == [True, False]
    half = 12.7062 * 0.25  # t(0.975, 1) and the standard error of two numbers half a unit apart
    assert band["high"][1] == pytest.approx(0.5 + half, rel=1e-5)


def test_a_missing_key_is_a_group_of_its_own():
    """As `reorder` leaves the number of swaps missing for a complete shuffle."""
    band = seed_band(pd.DataFrame({"swaps": [1, 1, None, None], "tau": [0.9, 0.8, 0.1, 0.2]}), "swaps", "tau")
    assert band["mean"].tolist() == pytest.approx([0.85, 0.15])
