"""How often the 95% intervals hold the truth, and how often a loss of just the margin is called kept.

    python studies/intervals/coverage.py [PART ...]

PART is binary, verdict, scores, again, clusters or binary_clusters; default: all.

Results known beforehand: paired items are drawn from distributions whose true difference is given, 2,000
times each, and every draw gets the interval and the verdict a user would get. For right-or-wrong items the
coverage is also summed exactly over all possible outcomes; the error of the verdict is only so. A part that
was computed replaces its rows in studies/records/intervals.json; the others stay.
"""

import json
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import numpy as np
from scipy.stats import multinomial, norm

from deepen.checkpoint import write_file
from deepen.evaluation.binary import score_chance, score_interval
from deepen.evaluation.paired import PairedItems, compare_items
from deepen.evaluation.statistics import Interval, paired_difference
from deepen.evaluation.verdict import settle
from deepen.records import Metric, capture_provenance

OUT = Path(__file__).resolve().parents[1] / "records" / "intervals.json"
TRIALS, SEED = 2_000, 20_260_301

# Differences of one item, of mean 0 and standard deviation 1.
SHAPES: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "normal": lambda g, n: g.normal(0, 1, n),
    "exponential": lambda g, n: g.exponential(1, n) - 1,
    "lognormal 0.5": lambda g, n: (g.lognormal(0, 0.5, n) - np.exp(0.125)) / 0.6039,
    "lognormal 1": lambda g, n: (g.lognormal(0, 1, n) - np.exp(0.5)) / 2.1612,
    "Student's t, 3": lambda g, n: g.standard_t(3, n) / np.sqrt(3),
}


def main(parts: list[str]) -> None:
    made = {part.__name__: part for part in (binary, verdict, scores, again, clusters, binary_clusters)}
    for part in parts or made:
        for number, row in enumerate(made[part]()):
            print(part, row, flush=True)
            _write(part, number, row)


def _write(part: str, number: int, row: dict[str, object]) -> None:
    """Put a row into the record; the first one of a part puts an earlier run's away."""
    record = json.loads(OUT.read_text()) if OUT.exists() else {}
    held = record[part]["rows"] if number else []
    provenance = capture_provenance(seed=SEED).model_dump(mode="json")
    record[part] = {"trials": TRIALS, "rows": [*held, row], "provenance": provenance}
    write_file(OUT, json.dumps(record, indent=1) + "\n")


def binary() -> Iterator[dict[str, object]]:
    """Right-or-wrong items: `discordance` is the share on which the two models differ."""
    for n in (30, 100, 300, 1000):
        for discordance in (0.02, 0.06, 0.15, 0.4):
            for difference in (0.0, -0.01, -0.05, 0.1):
                if abs(difference) <= discordance:
                    yield binary_row(n, discordance, difference, TRIALS)


def binary_row(n: int, discordance: float, difference: float, trials: int) -> dict[str, object]:
    chances = [(discordance + difference) / 2, (discordance - difference) / 2, 1 - discordance]
    # One state for each row, whatever rows came before.
    generator = np.random.default_rng([SEED, n, round(1000 * discordance), round(1000 + 1000 * difference)])
    drawn = generator.multinomial(n, chances, size=trials)[:, :2]
    ends = np.array([_score_interval(*pair, n) for pair in drawn.tolist()])
    covered = (ends[:, 0] <= difference) & (difference <= ends[:, 1])
    return {
        "n": n,
        "discordance": discordance,
        "difference": difference,
        "coverage": float(covered.mean()),
        "exact_coverage": exact_coverage(n, discordance, difference),
    }


def verdict() -> Iterator[dict[str, object]]:
    """Chance that a loss of just the margin is called kept, at the share of discordant items that is worst.

    `end_alone`: were the interval's end to decide; `kept`: of the verdict, which asks the exact test too.
    """
    for margin in (0.01, 0.05, 0.1):
        for n in (30, 50, 100, 200, 300, 1000, 2000):
            yield verdict_row(n, margin)


def verdict_row(n: int, margin: float) -> dict[str, object]:
    quantile = float(norm.ppf(0.975))
    # The least score that the exact test calls rare, to twelve digits.
    low, high = 0.0, 6.0
    for _ in range(40):
        middle = (low + high) / 2
        rare = score_chance(n, -margin, middle) <= 0.025
        low, high = (low, middle) if rare else (middle, high)
    alone = score_chance(n, -margin, quantile)
    return {
        "n": n,
        "margin": margin,
        "end_alone": alone,
        "kept": score_chance(n, -margin, max(quantile, high)),
    }


def exact_coverage(n: int, discordance: float, difference: float) -> float:
    """Sum the probabilities of the outcomes whose interval holds the truth (all but 1e-6 of them)."""
    chances = [(discordance + difference) / 2, (discordance - difference) / 2, 1 - discordance]
    grids = []
    for chance in chances[:2]:
        centre, spread = n * chance, 5.5 * np.sqrt(n * chance * (1 - chance)) + 6 * (chance > 0)
        grids.append(np.arange(max(0, int(centre - spread)), min(n, int(centre + spread)) + 1))
    pairs = [(a, b) for a in grids[0].tolist() for b in grids[1].tolist() if a + b <= n]
    weights = multinomial.pmf([[a, b, n - a - b] for a, b in pairs], n, chances)
    # Outcomes too rare to matter are not looked at; they count as missed.
    held = [
        weight
        for (a, b), weight in zip(pairs, weights.tolist(), strict=True)
        if weight > 1e-9 and (ends := _score_interval(a, b, n))[0] <= difference <= ends[1]
    ]
    return float(np.sum(held))


@cache
def _score_interval(gained: int, lost: int, n: int) -> tuple[float, float]:
    return score_interval(gained, lost, n)


def scores() -> Iterator[dict[str, object]]:
    """Items with a score: the difference has the shape named, mean 0 and standard deviation 1."""
    for n in (10, 30, 100, 300):
        for shape in SHAPES:
            yield score_row(shape, n, TRIALS, 2_000 if n < 300 else 600)
    for shape in ("normal", "exponential"):
        yield score_row(shape, 1000, TRIALS, 600)


def again() -> Iterator[dict[str, object]]:
    """The one row of `scores` above 97%, drawn anew and more often."""
    yield {"trials": 10_000, **score_row("exponential", 100, 10_000, 600, seed=SEED + 1)}


def score_row(shape: str, n: int, trials: int, resamples: int, *, seed: int = SEED) -> dict[str, object]:
    generator = np.random.default_rng([seed, n, list(SHAPES).index(shape)])
    found = []
    for trial in range(trials):
        drawn = SHAPES[shape](generator, n)
        found.append(paired_difference(drawn, np.zeros(n), np.ones(n), seed=trial, resamples=resamples))
    return {"n": n, "shape": shape, **_summary(found)}


def clusters() -> Iterator[dict[str, object]]:
    """Items that share something with the others of their cluster; clusters hold 1 to 15 items."""
    for n in (10, 30, 100, 300):
        for shape in ("normal", "exponential", "lognormal 1"):
            yield cluster_row(shape, n, TRIALS, 2_000 if n < 300 else 600)


def cluster_row(shape: str, n: int, trials: int, resamples: int) -> dict[str, object]:
    generator = np.random.default_rng([SEED, n, 100 + list(SHAPES).index(shape)])
    found = []
    for trial in range(trials):
        sizes = generator.integers(1, 16, n)
        sums = sizes * SHAPES[shape](generator, n) + np.sqrt(sizes) * generator.normal(0, 1, n)
        found.append(paired_difference(sums, np.zeros(n), sizes, seed=trial, resamples=resamples))
    return {"clusters": n, "shape": shape, **_summary(found)}


def binary_clusters() -> Iterator[dict[str, object]]:
    """Right-or-wrong items in clusters of 1 to 8; in `alike` of the clusters all items have one outcome."""
    for n in (30, 100, 300):
        for discordance, difference in ((0.02, -0.01), (0.06, -0.01), (0.15, -0.05)):
            for alike in (0.0, 0.3):
                yield binary_cluster_row(n, discordance, difference, alike, TRIALS)


def binary_cluster_row(
    n: int, discordance: float, difference: float, alike: float, trials: int
) -> dict[str, object]:
    chances = [(discordance + difference) / 2, (discordance - difference) / 2, 1 - discordance]
    state = [SEED, n, round(1000 * discordance), round(1000 + 1000 * difference), round(10 * alike)]
    generator = np.random.default_rng(state)
    held, kept = 0, 0
    for _ in range(trials):
        clusters = np.repeat(np.arange(n), generator.integers(1, 9, n))
        outcomes = generator.choice([1, -1, 0], p=chances, size=len(clusters))
        shared = generator.choice([1, -1, 0], p=chances, size=n)
        outcomes = np.where((generator.random(n) < alike)[clusters], shared[clusters], outcomes)
        columns = {"values": (outcomes > 0) * 1.0, "base": (outcomes < 0) * 1.0, "clusters": clusters}
        items = PairedItems(task="t", metric="acc", **columns)
        (found,) = compare_items([items], margin=-difference)
        held += found.ci_low <= difference <= found.ci_high
        kept += found.verdict == "kept"
    row = {"clusters": n, "discordance": discordance, "difference": difference, "alike": alike}
    return {**row, "coverage": held / trials, "called_kept_at_the_margin": kept / trials}


def _summary(found: list[Interval]) -> dict[str, float]:
    """Coverage, the share of intervals wholly below and wholly above the truth, and that called kept.

    Kept is wrong: the true loss is just the margin. The long tail is one of losses, or one of gains.
    """
    low, high = np.array([(each.ci_low, each.ci_high) for each in found]).T
    return {
        "coverage": float(((low <= 0) & (high >= 0)).mean()),
        "wholly_below": float((high < 0).mean()),
        "wholly_above": float((low > 0).mean()),
        "called_kept_long_tail_of_losses": float(np.mean([_is_kept(each, False) for each in found])),
        "called_kept_long_tail_of_gains": float(np.mean([_is_kept(each, True) for each in found])),
    }


def _is_kept(found: Interval, higher_is_better: bool) -> bool:
    """Settle an interval of a true difference of 0, moved to a true loss of just the margin."""
    margin, loss = 1.0, -1.0 if higher_is_better else 1.0
    metric = Metric(
        task="t",
        metric="m",
        value=0,
        stderr=None,
        n=found.n,
        base_value=0,
        delta=found.delta + loss,
        ci_low=found.ci_low + loss,
        ci_high=found.ci_high + loss,
        higher_is_better=higher_is_better,
    )
    return settle(metric, margin=margin, error=found.error, units=found.n).verdict == "kept"


if __name__ == "__main__":
    main(sys.argv[1:])
