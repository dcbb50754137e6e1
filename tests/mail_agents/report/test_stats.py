import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from mail_agents.errors import InvalidInputError
from mail_agents.report import stats


def test_wilson_golden_value():
    low, high = stats.wilson_interval(42, 50)
    assert (round(low, 2), round(high, 2)) == (0.71, 0.92)


@given(st.integers(1, 300).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_equals_scipy_and_stays_inside(case):
    successes, n = case
    low, high = stats.wilson_interval(successes, n)
    reference = scipy.stats.binomtest(successes, n).proportion_ci(method="wilson")
    assert low == pytest.approx(reference.low, abs=1e-9)
    assert high == pytest.approx(reference.high, abs=1e-9)
    assert 0 <= low <= successes / n <= high <= 1
    assert low < high


@pytest.mark.parametrize(("successes", "n"), [(0, 0), (3, 2), (-1, 5)])
def test_wilson_refuses_impossible_counts(successes, n):
    with pytest.raises(InvalidInputError, match="successes"):
        stats.wilson_interval(successes, n)


@pytest.mark.parametrize("confidence", [0, 1, 95])
def test_confidence_is_a_share(confidence):
    with pytest.raises(InvalidInputError, match="between 0 and 1"):
        stats.wilson_interval(1, 2, confidence)


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=40))
def test_iqm_is_scipys_trimmed_mean(values):
    assert stats.iqm(values) == pytest.approx(scipy.stats.trim_mean(values, 0.25), abs=1e-9)


def test_stratified_bootstrap_resamples_runs_within_tasks():
    # Every run agrees on each task: whatever is resampled, the result is the same.
    scores = np.tile([0.0, 0.2, 0.8, 1.0], (5, 1))
    estimate = stats.stratified_bootstrap_iqm(scores)
    assert estimate == stats.Estimate(0.5, 0.5, 0.5)
    # Resampling over tasks as well would give this one a width of almost 1.


def test_stratified_bootstrap_covers_a_spread_and_repeats_itself():
    scores = np.random.default_rng(0).random((10, 4))
    first = stats.stratified_bootstrap_iqm(scores)
    assert first == stats.stratified_bootstrap_iqm(scores)
    assert first.low < first.value < first.high
    assert first.high - first.low < 0.5


def test_bootstrap_mean_is_close_to_the_normal_interval():
    values = np.random.default_rng(1).normal(3, 2, 200)
    estimate = stats.bootstrap_mean(values)
    half = 1.96 * values.std() / np.sqrt(200)
    assert estimate.value == pytest.approx(values.mean())
    assert estimate.low == pytest.approx(values.mean() - half, abs=0.05)
    assert estimate.high == pytest.approx(values.mean() + half, abs=0.05)


@pytest.mark.parametrize("values", [[], [1.0, np.nan], [[1.0, 2.0]]])
def test_bootstrap_mean_refuses(values):
    with pytest.raises(InvalidInputError, match="finite"):
        stats.bootstrap_mean(values)


def test_mcnemar_is_the_binomial_test_on_discordant_episodes():
    first = [True] * 10 + [True] * 8 + [False] * 2 + [False] * 5
    second = [True] * 10 + [False] * 8 + [True] * 2 + [False] * 5
    result = stats.mcnemar_exact(first, second)
    assert (result.both, result.only_first, result.only_second, result.neither) == (10, 8, 2, 5)
    assert result.n == 25
    assert result.p_value == pytest.approx(0.109375)  # 2 * P(X >= 8), X ~ Bin(10, 1/2)
    assert result.difference.value == pytest.approx(6 / 25)
    # Bonett and Price: (9 - 3) / 27 +- 1.96 sqrt((12/27 - (6/27)^2) / 27)
    half = 1.959964 * np.sqrt((12 / 27 - (6 / 27) ** 2) / 27)
    assert result.difference.low == pytest.approx(6 / 27 - half, abs=1e-6)
    assert result.difference.high == pytest.approx(6 / 27 + half, abs=1e-6)


def test_agents_that_never_differ_still_have_an_interval():
    result = stats.mcnemar_exact([True] * 20, [True] * 20)
    assert result.p_value == 1
    assert result.difference.low < 0 < result.difference.high


@pytest.mark.parametrize(("first", "second"), [([True], [True, False]), ([], [])])
def test_mcnemar_refuses_unpaired_outcomes(first, second):
    with pytest.raises(InvalidInputError, match="equally long"):
        stats.mcnemar_exact(first, second)


def test_holm_golden_values():
    assert stats.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert stats.holm([0.9, 0.8]) == [1.0, 1.0]
    assert stats.holm([]) == []


def test_mean_over_seeds_has_the_sample_standard_deviation():
    estimate = stats.mean_over_seeds([1.0, 2.0, 6.0])
    assert estimate.value == 3
    assert estimate.spread == pytest.approx(np.sqrt(7))  # (4 + 1 + 9) / 2
    assert (estimate.low, estimate.high) == pytest.approx((3 - np.sqrt(7), 3 + np.sqrt(7)))
    with pytest.raises(InvalidInputError, match="two seeds"):
        stats.mean_over_seeds([1.0])


def test_groups_weigh_the_same_however_many_values_they_have():
    estimate = stats.stratified_bootstrap_mean([[0.0] * 100, [4.0]])
    assert (estimate.value, estimate.low, estimate.high) == (2, 2, 2)
    one = stats.stratified_bootstrap_mean([[0.0, 1.0, 2.0, 5.0]])
    assert one.value == 2
    assert one.low < 2 < one.high
    with pytest.raises(InvalidInputError, match="at least one group"):
        stats.stratified_bootstrap_mean([])
    with pytest.raises(InvalidInputError, match="finite"):
        stats.stratified_bootstrap_mean([[1.0], []])


def test_performance_profile_counts_runs_above():
    scores = [[0.0, 50.0], [100.0, 50.0]]
    share, low, high = stats.performance_profile(scores, [-1.0, 0.0, 50.0, 99.0, 100.0])
    assert share.tolist() == [1, 0.75, 0.25, 0.25, 0]
    assert (low <= share).all()
    assert (share <= high).all()
    assert (low[0], high[0], low[-1], high[-1]) == (1, 1, 0, 0)
    # Only the first task differs between runs: half of the mass is certain.
    assert (low[1], high[1]) == (0.5, 1)
    again = stats.performance_profile(scores, [0.0])
    assert again[1][0] == low[1]


@given(st.lists(st.lists(st.floats(-50, 150), min_size=3, max_size=3), min_size=1, max_size=5))
def test_performance_profile_falls_from_one_to_zero(scores):
    share, low, high = stats.performance_profile(scores, np.linspace(-51, 151, 9), resamples=20)
    assert share[0] == 1
    assert share[-1] == 0
    assert (np.diff(share) <= 0).all()
    assert ((low >= 0) & (high <= 1)).all()
