"""How often the 95% intervals hold the truth, and how often a loss of just the margin is called kept.

    python studies/intervals/coverage.py [PART ...]     PART: binary, scores, again, clusters; default: all

Results known beforehand: paired items are drawn from distributions whose true difference is given, 2,000
times each, and every draw gets the interval and the verdict a user would get. For right-or-wrong items the
coverage is also summed exactly over all possible outcomes. A part that was computed replaces its rows in
studies/records/intervals.json; the others stay.
"""

import json
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import numpy as np
from scipy.stats import multinomial

from deepen.checkpoint import write_file
from deepen.evaluation.binary import score_interval
from deepen.evaluation.statistics import paired_difference
from deepen.records import capture_provenance

OUT = Path(__file__).resolve().parents[1] / "records" / "intervals.json"
TRIALS, SEED = 2_000, 20_260_301
MARGINS = (0.01, 0.05)

# Differences of one item, of mean 0 and standard deviation 1.
SHAPES: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "normal": lambda g, n: g.normal(0, 1, n),
    "exponential": lambda g, n: g.exponential(1, n) - 1,
    "lognormal 0.5": lambda g, n: (g.lognormal(0, 0.5, n) - np.exp(0.125)) / 0.6039,
    "lognormal 1": lambda g, n: (g.lognormal(0, 1, n) - np.exp(0.5)) / 2.1612,
    "Student's t, 3": lambda g, n: g.standard_t(3, n) / np.sqrt(3),
}


def main(parts: list[str]) -> None:
    made = {"binary": binary, "scores": scores, "again": again, "clusters": clusters}
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
        **_called_kept(ends[:, 0], difference),
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
    for n in (30, 100, 300):
        for shape in SHAPES:
            yield score_row(shape, n, TRIALS, 2_000 if n < 300 else 600)
    for shape in ("normal", "exponential"):
        yield score_row(shape, 1000, TRIALS, 600)


def again() -> Iterator[dict[str, object]]:
    """The one row of `scores` above 97%, drawn anew and more often."""
    yield {"trials": 10_000, **score_row("exponential", 100, 10_000, 600, seed=SEED + 1)}


def score_row(shape: str, n: int, trials: int, resamples: int, *, seed: int = SEED) -> dict[str, object]:
    generator = np.random.default_rng([seed, n, list(SHAPES).index(shape)])
    ends = np.empty((trials, 2))
    for trial in range(trials):
        drawn = SHAPES[shape](generator, n)
        found = paired_difference(drawn, np.zeros(n), np.ones(n), seed=trial, resamples=resamples)
        ends[trial] = found.ci_low, found.ci_high
    return {"n": n, "shape": shape, **_summary(ends)}


def clusters() -> Iterator[dict[str, object]]:
    """Items that share something with the others of their cluster; clusters hold 1 to 15 items."""
    for n in (30, 100, 300):
        for shape in ("normal", "exponential", "lognormal 1"):
            yield cluster_row(shape, n, TRIALS, 2_000 if n < 300 else 600)


def cluster_row(shape: str, n: int, trials: int, resamples: int) -> dict[str, object]:
    generator = np.random.default_rng([SEED, n, 100 + list(SHAPES).index(shape)])
    ends = np.empty((trials, 2))
    for trial in range(trials):
        sizes = generator.integers(1, 16, n)
        sums = sizes * SHAPES[shape](generator, n) + np.sqrt(sizes) * generator.normal(0, 1, n)
        found = paired_difference(sums, np.zeros(n), sizes, seed=trial, resamples=resamples)
        ends[trial] = found.ci_low, found.ci_high
    return {"clusters": n, "shape": shape, **_summary(ends)}


def _summary(ends: np.ndarray) -> dict[str, float]:
    """Coverage, and the share of intervals wholly below and wholly above the truth.

    Of a score that should be low, an interval wholly below calls kept what lost just the margin.
    """
    low, high = ends.T
    return {
        "coverage": float(((low <= 0) & (high >= 0)).mean()),
        "wholly_below": float((high < 0).mean()),
        "wholly_above": float((low > 0).mean()),
    }


def _called_kept(low: np.ndarray, difference: float) -> dict[str, float]:
    """Share called kept where the true loss is just the margin."""
    return {"called_kept_at_the_margin": float((low > difference).mean())} if -difference in MARGINS else {}


if __name__ == "__main__":
    main(sys.argv[1:])
