import math

import numpy as np
import pytest
import scipy.stats

from deepen.evaluation.statistics import paired_difference, standard_error


def skewed_items(n, generator):
    """Documents of log-normal length whose difference per token is skewed, long documents weighing most."""
    tokens = np.ceil(generator.lognormal(5, 1, n))
    base = tokens * generator.gamma(9, 1 / 3, n)
    return base + tokens * (0.2 * generator.gamma(1, 1, n) - 0.3), base, tokens


def skewed_windows(n, generator):
    base = generator.normal(400, 50, n)
    return base + 20 * generator.exponential(1, n) - 10, base, np.full(n, 128.0)


# Per token: the mean of 0.2·gamma(1) − 0.3, and 20·exponential − 10 in 128 tokens.
@pytest.mark.parametrize(("draw", "truth"), [(skewed_items, -0.1), (skewed_windows, 10 / 128)])
@pytest.mark.parametrize("n", [30, 80, 200])
def test_the_interval_covers_the_truth_95_times_in_100(draw, truth, n):
    generator = np.random.default_rng(n)
    trials = 800
    covered = 0
    for seed in range(trials):
        found = paired_difference(*draw(n, generator), seed=seed, resamples=600)
        covered += found.ci_low <= truth <= found.ci_high
    # 93–97%, give or take one standard error of this simulation.
    assert 0.93 - 0.008 <= covered / trials <= 0.97 + 0.008


def test_the_percentile_interval_would_not():
    # Why the method is what it is: scipy's own percentile bootstrap on the same data covers far less.
    generator = np.random.default_rng(30)
    covered = 0
    for _ in range(300):
        nll, base, tokens = skewed_items(30, generator)
        interval = scipy.stats.bootstrap(
            (nll - base, tokens),
            lambda amount, weight, axis=-1: amount.sum(axis) / weight.sum(axis),
            paired=True,
            n_resamples=300,
            method="percentile",
            rng=generator,
        ).confidence_interval
        covered += interval.low <= -0.1 <= interval.high
    assert covered / 300 < 0.925


def test_values_are_ratios_of_sums():
    nll, base, tokens = skewed_items(50, np.random.default_rng(0))
    found = paired_difference(nll, base, tokens)
    assert found.value == pytest.approx(nll.sum() / tokens.sum())
    assert found.base_value == pytest.approx(base.sum() / tokens.sum())
    assert found.delta == pytest.approx(found.value - found.base_value)
    assert found.n == 50
    assert found.ci_low < found.delta < found.ci_high


def test_bits_are_nats_over_ln_2():
    nll, base, size = skewed_items(50, np.random.default_rng(0))
    nats, bits = paired_difference(nll, base, size), paired_difference(nll, base, size * math.log(2))
    for name in ("value", "base_value", "delta", "stderr", "ci_low", "ci_high"):
        assert getattr(bits, name) == pytest.approx(getattr(nats, name) / math.log(2))


@pytest.mark.parametrize("n", [2, 3, 5, 7])
def test_few_items_of_one_size_get_the_t_interval(n):
    generator = np.random.default_rng(n)
    nll, base = generator.gamma(9, 1, n), generator.gamma(9, 1, n)
    found = paired_difference(nll, base, np.ones(n))
    expected = scipy.stats.ttest_rel(nll, base).confidence_interval(0.95)
    assert (found.ci_low, found.ci_high) == pytest.approx((expected.low, expected.high), rel=1e-4)
    assert found.stderr == pytest.approx(scipy.stats.sem(nll))


def test_many_plain_items_get_nearly_the_t_interval():
    generator = np.random.default_rng(0)
    nll, base = generator.normal(9, 1, 400), generator.normal(9, 1, 400)
    found = paired_difference(nll, base, np.ones(400))
    expected = scipy.stats.ttest_rel(nll, base).confidence_interval(0.95)
    width = expected.high - expected.low
    assert (found.ci_low, found.ci_high) == pytest.approx((expected.low, expected.high), abs=0.04 * width)


def test_many_skewed_items_get_nearly_the_interval_of_scipy():
    nll, base, tokens = skewed_items(1500, np.random.default_rng(3))
    found = paired_difference(nll, base, tokens)
    expected = scipy.stats.bootstrap(
        (nll - base, tokens),
        lambda amount, weight, axis=-1: amount.sum(axis) / weight.sum(axis),
        paired=True,
        n_resamples=3000,
        method="BCa",
        rng=np.random.default_rng(0),
    ).confidence_interval
    width = expected.high - expected.low
    assert (found.ci_low, found.ci_high) == pytest.approx((expected.low, expected.high), abs=0.1 * width)


def test_the_standard_error_is_the_jackknife():
    nll, _, tokens = skewed_items(40, np.random.default_rng(5))
    left_out = [np.delete(nll, i).sum() / np.delete(tokens, i).sum() for i in range(40)]
    expected = np.sqrt(39 / 40 * np.sum((left_out - nll.sum() / tokens.sum()) ** 2))
    # Deviations from the ratio itself or from the jackknife's mean differ in second order only.
    assert standard_error(nll, tokens) == pytest.approx(expected, rel=1e-9)


def test_pairing_is_what_makes_the_interval_narrow():
    nll, base, tokens = skewed_items(100, np.random.default_rng(0))
    paired = paired_difference(nll, base, tokens)
    unpaired = 2 * 1.96 * math.hypot(paired.stderr, standard_error(base, tokens))
    assert paired.ci_high - paired.ci_low < 0.5 * unpaired


def test_one_item_has_no_interval():
    found = paired_difference([6.0], [9.0], [3])
    assert (found.value, found.base_value, found.delta, found.n) == (2.0, 3.0, -1.0, 1)
    assert found.stderr is found.ci_low is found.ci_high is None


def test_equal_models_have_an_empty_interval():
    nll, _, tokens = skewed_items(40, np.random.default_rng(0))
    found = paired_difference(nll, nll, tokens)
    assert found.delta == found.ci_low == found.ci_high == 0


def test_one_item_that_differs_does_not_prove_anything():
    nll = np.zeros(40)
    nll[7] = 5.0
    found = paired_difference(nll, np.zeros(40), np.ones(40))
    assert found.ci_low < 0 < found.ci_high
    assert math.isfinite(found.ci_low)
    assert math.isfinite(found.ci_high)


def test_two_items_that_differ_among_equal_ones_blow_up_nothing():
    """Draws without them have no spread but the rounding of sums, which is no standard error."""
    tokens, difference = np.full(47, 193.0), np.zeros(47)
    difference[[21, 28]] = 11.877120738887868, 3.80984695979015
    base = np.random.default_rng(5).normal(270, 40, 47)
    found = paired_difference(base + difference, base, tokens)
    farthest = difference.sum() / tokens.min()
    assert -farthest < found.ci_low < found.delta < found.ci_high < farthest


def test_equal_seeds_give_equal_intervals():
    items = skewed_items(60, np.random.default_rng(0))
    assert paired_difference(*items, seed=4) == paired_difference(*items, seed=4)
    assert paired_difference(*items, seed=4) != paired_difference(*items, seed=5)


def test_the_order_of_the_items_does_not_matter():
    nll, base, tokens = skewed_items(60, np.random.default_rng(0))
    order = np.random.default_rng(1).permutation(60)
    assert paired_difference(nll, base, tokens) == paired_difference(nll[order], base[order], tokens[order])


def test_p_and_interval_agree_and_p_is_that_of_the_t_test_on_plain_items():
    generator = np.random.default_rng(2)
    for shift in (0.0, 0.04, 0.08, 0.12):
        nll, base = generator.normal(9, 1, 400), generator.normal(9 + shift, 1, 400)
        found = paired_difference(nll, base, np.ones(400))
        assert (found.p < 0.05) == (not found.ci_low <= 0 <= found.ci_high)
        assert found.p == pytest.approx(scipy.stats.ttest_rel(nll, base).pvalue, abs=0.03)
    few = paired_difference(nll[:5], base[:5], np.ones(5))
    assert few.p == pytest.approx(scipy.stats.ttest_rel(nll[:5], base[:5]).pvalue)


def test_items_that_all_differ_alike_have_the_p_of_the_sign_test():
    found = paired_difference(np.ones(12), np.full(12, 1.5), np.ones(12))
    assert found.ci_low == found.ci_high == found.delta == -0.5
    assert found.p == pytest.approx(scipy.stats.binomtest(0, 12).pvalue)
    assert paired_difference(np.ones(12), np.ones(12), np.ones(12)).p == 1


def test_swapping_the_models_mirrors_the_interval():
    nll, base, tokens = skewed_items(60, np.random.default_rng(0))
    there, back = paired_difference(nll, base, tokens), paired_difference(base, nll, tokens)
    mirrored = (-there.delta, -there.ci_high, -there.ci_low)
    assert (back.delta, back.ci_low, back.ci_high) == pytest.approx(mirrored)


@pytest.mark.parametrize(
    ("nll", "base", "weights"),
    [([], [], []), ([1.0], [1.0, 2.0], [1.0]), ([1.0], [1.0], [0.0]), ([[1.0]], [[1.0]], [[1.0]])],
)
def test_what_has_no_ratio_is_refused(nll, base, weights):
    with pytest.raises(ValueError, match="no ratio"):
        paired_difference(nll, base, weights)


def test_memory_stays_small_for_many_items():
    import tracemalloc

    n = 100_000
    items = skewed_items(n, np.random.default_rng(0))
    tracemalloc.start()
    paired_difference(*items, resamples=20)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40e6
