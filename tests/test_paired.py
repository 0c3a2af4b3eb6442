import math

import numpy as np
import pytest
import scipy.optimize
import scipy.stats

from deepen.errors import DataError
from deepen.evaluation import PairedItems, compare_items, paired_difference
from deepen.evaluation.binary import _score, exact_p, mcnemar_p, score_interval
from deepen.evaluation.verdict import holm, settle
from deepen.records import Metric

Z = scipy.stats.norm.ppf(0.975)


def paired(values, base, task="t", **given):
    columns = {"values": np.asarray(values, float), "base": None if base is None else np.asarray(base, float)}
    return PairedItems(task=task, metric="acc", **columns, **given)


def table(gained, lost, both, neither):
    values = [1] * gained + [0] * lost + [1] * both + [0] * neither
    base = [0] * gained + [1] * lost + [1] * both + [0] * neither
    return paired(values, base)


def one(items, **given):
    return compare_items([items], **given)[0]


# Right or wrong


@pytest.mark.parametrize(("gained", "lost"), [(0, 0), (1, 0), (3, 9), (9, 3), (20, 20), (0, 14), (150, 210)])
def test_mcnemar_is_that_of_statsmodels_and_scipy(gained, lost):
    contingency = pytest.importorskip("statsmodels.stats.contingency_tables")
    expected = contingency.mcnemar([[50, gained], [lost, 40]], exact=True).pvalue
    assert mcnemar_p(gained, lost) == pytest.approx(expected)
    if gained + lost:
        assert mcnemar_p(gained, lost) == pytest.approx(scipy.stats.binomtest(gained, gained + lost).pvalue)


def constrained_score(difference, gained, lost, n):
    """Tango's statistic with its constrained maximum found numerically."""
    rest = n - gained - lost

    def unlikely(q):  # q: the chance of a loss, q + difference: of a gain
        p = q + difference
        return -(gained * math.log(p) + lost * math.log(q) + rest * math.log(max(1 - p - q, 1e-300)))

    low, high = max(0, -difference), (1 - difference) / 2
    q = scipy.optimize.minimize_scalar(unlikely, bounds=(low + 1e-12, high - 1e-12), method="bounded",
                                       options={"xatol": 1e-12}).x  # fmt: skip
    return (gained - lost - n * difference) / math.sqrt(n * (2 * q + difference * (1 - difference)))


@pytest.mark.parametrize(("gained", "lost", "n"), [(3, 9, 60), (12, 2, 30), (40, 31, 1000), (1, 1, 44)])
def test_the_score_at_the_ends_of_the_interval_is_the_quantile(gained, lost, n):
    low, high = score_interval(gained, lost, n)
    assert constrained_score(low, gained, lost, n) == pytest.approx(Z, rel=1e-4)
    assert constrained_score(high, gained, lost, n) == pytest.approx(-Z, rel=1e-4)


@pytest.mark.parametrize("n", [1, 10, 54, 1000])
def test_no_discordant_item_still_has_a_width(n):
    assert score_interval(0, 0, n) == pytest.approx((-(Z**2) / (n + Z**2), Z**2 / (n + Z**2)))


@pytest.mark.parametrize("n", [1, 7, 44])
def test_all_discordant_one_way_is_wilsons_interval(n):
    wilson = scipy.stats.binomtest(n, n).proportion_ci(method="wilson")
    assert score_interval(n, 0, n) == pytest.approx((2 * wilson.low - 1, 1), abs=1e-9)
    assert score_interval(0, n, n) == pytest.approx((-1, 1 - 2 * wilson.low), abs=1e-9)


def test_right_or_wrong_items_give_every_figure():
    found = one(table(3, 9, 50, 38))
    assert (found.task, found.metric, found.n, found.role) == ("t", "acc", 100, None)
    assert (found.value, found.base_value) == (0.53, 0.59)
    assert found.delta == pytest.approx(-0.06)
    assert found.stderr == pytest.approx(scipy.stats.sem([1] * 53 + [0] * 47))
    assert (found.ci_low, found.ci_high) == score_interval(3, 9, 100)
    assert found.p == found.p_holm == mcnemar_p(3, 9)
    assert found.higher_is_better


# Other scores


def test_scores_that_are_not_binary_get_the_bootstrap():
    generator = np.random.default_rng(0)
    values, base = generator.uniform(0, 1, 80), generator.uniform(0, 1, 80)
    found, expected = one(paired(values, base)), paired_difference(values, base, np.ones(80))
    for name in ("value", "stderr", "base_value", "delta", "ci_low", "ci_high", "p"):
        assert getattr(found, name) == getattr(expected, name)


def test_clusters_are_drawn_as_wholes():
    generator = np.random.default_rng(0)
    clusters = np.repeat(np.arange(40), generator.integers(1, 9, 40))
    shared = generator.normal(0, 1, 40)[clusters]
    base = generator.normal(0, 1, len(clusters))
    values = base + shared + generator.normal(0, 0.1, len(clusters))
    found = one(paired(values, base, clusters=clusters * 7 - 3))
    sums, sizes = np.bincount(clusters, values), np.bincount(clusters)
    expected = paired_difference(sums, np.bincount(clusters, base), sizes)
    assert found.n == len(clusters)
    assert (found.delta, found.ci_low) == pytest.approx((expected.delta, expected.ci_low))
    alone = one(paired(values, base))
    assert found.ci_high - found.ci_low > 1.5 * (alone.ci_high - alone.ci_low)
    assert one(paired(values, base, clusters=np.arange(len(values)))) == alone


def test_binary_items_in_clusters_are_not_taken_as_independent():
    generator = np.random.default_rng(1)
    clusters = np.repeat(np.arange(60), 10)
    base = np.zeros(600)
    values = (generator.random(60) < 0.2).astype(float)[clusters]
    found, alone = one(paired(values, base, clusters=clusters)), one(paired(values, base))
    assert found.ci_high - found.ci_low > 2 * (alone.ci_high - alone.ci_low)
    assert found.p > alone.p


def test_items_said_twice_tell_nothing_new():
    """An item repeated in a cluster of its own counts once: the interval is that of the single items."""
    once = table(30, 12, 600, 358)
    numbers = np.repeat(np.arange(1000), 4)
    found, alone = one(paired(once.values[numbers], once.base[numbers], clusters=numbers)), one(once)
    assert (found.ci_low, found.ci_high) == pytest.approx((alone.ci_low, alone.ci_high), rel=5e-3)
    # The score test of one proportion, 30 of 42 against a half.
    assert found.p == pytest.approx(scipy.stats.chisquare([30, 12]).pvalue, rel=0.1)
    assert found.n == 4000


@pytest.mark.parametrize("clusters", [None, np.repeat(np.arange(40), 5)])
@pytest.mark.parametrize("step", [1.0, 0.25])
def test_what_was_never_seen_to_differ_may_differ(clusters, step):
    """40 problems, or 200 in 40 clusters, all scored alike under both: a loss of some points is possible."""
    values = step * np.ones(40 if clusters is None else 200)
    found = one(paired(values, values, clusters=clusters))
    assert found.delta == 0
    assert found.ci_low < -0.05
    assert found.ci_high > 0.05
    assert (found.p, found.verdict) == (1.0, "not enough items")


def test_few_scores_that_differ_are_counted_as_wholly_lost_or_gained():
    values = np.ones(200)
    values[:4] = 0.5
    found = one(paired(values, np.ones(200)))
    low, high = score_interval(0, 2, 200, scipy.stats.t.ppf(0.975, 199))
    assert (found.ci_low, found.ci_high) == pytest.approx((low, high))
    assert found.delta == pytest.approx(-0.01)


def test_neither_the_order_of_tasks_nor_of_items_matters():
    generator = np.random.default_rng(5)
    values, base, clusters = generator.random(90), generator.random(90), generator.integers(0, 40, 90)
    order = generator.permutation(90)
    tasks = [
        table(3, 9, 50, 38),
        paired(values, base, "u", clusters=clusters),
        paired(values[::-1], base, "v"),
    ]
    shuffled = [
        paired(values[::-1][order], base[order], "v"),
        paired(values[order], base[order], "u", clusters=clusters[order]),
        tasks[0],
    ]
    assert compare_items(tasks) == compare_items(shuffled)[::-1]
    assert compare_items(tasks, seed=1) != compare_items(tasks)


# Tests together, verdicts


def test_holm_is_that_of_statsmodels():
    multitest = pytest.importorskip("statsmodels.stats.multitest")
    for seed in range(20):
        raw = np.random.default_rng(seed).random(1 + seed) ** 3
        raw[seed // 2 :: 3] = raw[0]  # ties
        np.testing.assert_allclose(holm(raw.tolist()), multitest.multipletests(raw, method="holm")[1])
    assert holm([]) == []
    assert holm([0.01, None, 0.04]) == [0.02, None, 0.04]


def test_p_is_adjusted_over_all_tasks():
    found = compare_items([table(1, 9, 50, 40), table(2, 9, 50, 39), paired([0.1, 0.7], None)])
    assert [each.p_holm for each in found] == [2 * found[0].p, max(2 * found[0].p, found[1].p), None]


@pytest.mark.parametrize(
    ("low", "high", "higher", "verdict"),
    [
        (-0.009, 0.02, True, "kept"), (-0.011, 0.02, True, "not enough items"),
        (-0.03, -0.011, True, "lost"), (-0.03, -0.009, True, "not enough items"),
        (-0.009, -0.001, True, "kept"),  # a loss for sure, and within the margin for sure
        (-0.02, 0.009, False, "kept"), (0.011, 0.03, False, "lost"), (-0.5, 0.011, False, "not enough items"),
        (None, None, True, "not enough items"),
    ],
)  # fmt: skip
def test_the_verdict_is_where_the_interval_lies(low, high, higher, verdict):
    metric = Metric(
        task="t", metric="m", value=0, stderr=None, n=100, base_value=0, delta=-0.005 if higher else 0.005,
        ci_low=low, ci_high=high, higher_is_better=higher,
    )  # fmt: skip
    found = settle(metric, margin=0.01, error=0.006, units=100, tails=lambda _: (0, 0))
    assert (found.verdict, found.margin) == (verdict, 0.01)
    assert (found.items_needed is None) == (verdict != "not enough items")
    if verdict == "not enough items":
        assert found.items_needed == math.ceil(100 * (0.006 * (Z + scipy.stats.norm.ppf(0.8)) / 0.005) ** 2)


@pytest.mark.parametrize(
    ("high", "verdict"), [(0.0089, "kept"), (0.0091, "not enough items"), (0.0099, "not enough items")]
)
def test_what_may_be_skewed_must_lie_within_the_margin_with_room_to_spare(high, verdict):
    metric = Metric(
        task="t", metric="nats_per_token", value=0, stderr=None, n=100, base_value=0, delta=0.005,
        ci_low=0.001, ci_high=high, higher_is_better=False,
    )  # fmt: skip
    # At 100 items the end that decides lies 1.25 times as far: 0.005 + 1.25 × 0.004 is just the margin.
    found = settle(metric, margin=0.01, error=0.002, units=100)
    assert found.verdict == verdict
    assert settle(metric, margin=0.01, error=0.002, units=100, tails=lambda _: (0, 0)).verdict == "kept"


def test_so_many_documents_do_decide():
    generator = np.random.default_rng(0)

    def settled(n):
        found = paired_difference(*generator.normal(3, 0.03, (2, n)), np.ones(n), resamples=400)
        metric = Metric(
            task="t", metric="nats_per_token", value=3, stderr=None, n=n, base_value=3, delta=found.delta,
            ci_low=found.ci_low, ci_high=found.ci_high, higher_is_better=False,
        )  # fmt: skip
        return settle(metric, margin=0.01, error=0.03 * math.sqrt(2 / n), units=n)

    metric = Metric(
        task="t", metric="m", value=3, stderr=None, n=40, base_value=3, delta=0, higher_is_better=False
    )
    needed = settle(metric, margin=0.01, error=0.03 * math.sqrt(2 / 40), units=40).items_needed
    assert 150 < needed < 250
    kept = sum(settled(needed).verdict == "kept" for _ in range(300))
    assert 0.74 < kept / 300 < 0.88


def test_so_many_items_do_decide():
    """With as many items as named, and the discordance seen, about 4 samples in 5 are called kept."""
    generator = np.random.default_rng(0)
    needed = one(table(12, 12, 500, 476)).items_needed
    assert 1_800 < needed < 2_200
    kept = 0
    for _ in range(400):
        gained, lost, _ = generator.multinomial(needed, [0.012, 0.012, 0.976])
        kept += score_interval(gained, lost, needed)[0] > -0.01
    assert 0.72 < kept / 400 < 0.92


def test_items_needed_are_more_than_there_are():
    generator = np.random.default_rng(3)
    for _ in range(200):
        n = int(generator.integers(1, 400))
        gained, lost, rest = generator.multinomial(n, [0.05, 0.05, 0.9])
        found = one(table(gained, lost, rest, 0))
        if found.verdict == "not enough items":
            assert found.items_needed is None or found.items_needed > n


@pytest.mark.parametrize(
    ("gained", "lost", "n", "difference"),
    [(0, 0, 30, -0.01), (3, 1, 30, -0.05), (8, 0, 30, -0.01), (2, 9, 40, 0.1), (9, 2, 25, -0.3)],
)
def test_the_exact_test_is_the_sum_over_all_outcomes(gained, lost, n, difference):
    outcomes = np.array([(a, b, n - a - b) for a in range(n + 1) for b in range(n + 1 - a)])
    ends = [constrained_score(difference, *pair, n) if min(pair) else None for pair in outcomes[:, :2]]
    seen = _score(difference, gained, lost, n)
    scores = _score(difference, outcomes[:, 0], outcomes[:, 1], n)
    # The order of the outcomes is Tango's.
    known = [place for place, end in enumerate(ends) if end is not None][:40]
    assert scores[known] == pytest.approx([ends[place] for place in known], abs=1e-4)
    rows = outcomes[scores >= seen - 1e-9]
    least = abs(difference)
    chances = [
        scipy.stats.multinomial.pmf(rows, n, [(s + difference) / 2, (s - difference) / 2, 1 - s]).sum()
        for s in np.linspace(least, 1, 300)
    ]
    assert exact_p(gained, lost, n, difference) == pytest.approx(max(chances), abs=2e-4)


def test_a_verdict_on_right_or_wrong_items_needs_the_exact_test_too():
    metric = one(table(5, 0, 25, 0), margin=0.1)
    assert metric.ci_low > -0.1
    low, high = exact_p(0, 5, 30, 0.1), exact_p(5, 0, 30, -0.1)
    assert low > 0.5
    assert metric.verdict == ("kept" if high <= 0.025 else "not enough items")


# Edges


def test_few_items_are_never_called_kept_or_lost():
    generator = np.random.default_rng(0)
    base = generator.random(29)
    for values in (base, base + 0.5, base - 0.5 + 0.01 * generator.random(29)):
        assert one(paired(values, base)).verdict == "not enough items"
    losses = 1 + np.arange(30) / 30
    assert one(paired(losses, losses)).verdict == "kept"


@pytest.mark.parametrize("value", [0.0, 1.0, 0.3])
def test_one_item(value):
    found = one(paired([value], [1.0]))
    assert (found.value, found.n, found.delta, found.stderr) == (value, 1, value - 1, None)
    assert found.verdict == "not enough items"
    assert found.p in (None, 1.0)


def test_one_cluster_has_no_interval():
    found = one(paired([0.2, 0.4, 0.9], [0.1, 0.4, 0.8], clusters=np.zeros(3, int)))
    assert found.delta == pytest.approx(0.2 / 3)
    assert found.stderr is found.ci_low is found.ci_high is found.p is found.p_holm is None
    assert (found.verdict, found.items_needed) == ("not enough items", None)


def test_equal_models():
    found = one(table(0, 0, 500, 0))
    assert (found.delta, found.p, found.verdict) == (0, 1, "kept")
    few = one(table(0, 0, 100, 0))
    assert few.verdict == "not enough items"
    assert few.items_needed > Z**2 * 99  # what no discordance at all would take


def test_without_a_base_there_is_only_the_value():
    found = one(paired([0, 1, 1, 1], None))
    assert found.value == 0.75
    assert found.stderr == pytest.approx(scipy.stats.sem([0, 1, 1, 1]))
    assert found.base_value is found.delta is found.verdict is found.margin is found.p is None


@pytest.mark.parametrize(
    ("items", "said"),
    [
        (paired([0.5, math.nan], [0.5, 0.5], "arc"), "arc: acc under the model is not a number in 1 of 2"),
        (paired([0.5, 1], [math.inf, 0.5], "arc"), "arc: acc under the base is not a number in 1 of 2"),
        (paired([0.5, 1], [0.5], "arc"), r"arc: scores shaped \(2,\), \(1,\)"),
        (paired([], [], "arc"), "arc: scores shaped"),
        (paired([1.0], [1.0], "arc", clusters=np.zeros(2, int)), "arc: scores shaped"),
    ],
)
def test_what_cannot_be_compared_is_refused(items, said):
    with pytest.raises(DataError, match=said):
        compare_items([items])


@pytest.mark.parametrize("margin", [0, -0.1, math.nan, math.inf])
def test_a_margin_is_a_positive_number(margin):
    with pytest.raises(ValueError, match="must be a positive number"):
        compare_items([table(1, 1, 1, 1)], margin=margin)
