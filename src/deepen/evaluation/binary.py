"""Two models on the same right-or-wrong items: the exact test and the score interval of their difference.

Only the discordant items, which one model has right and the other wrong, say anything about the difference.
The test is McNemar's in its exact form: a fair coin decides each discordant item. The interval is the score
interval of Tango (Statistics in Medicine 17, 1998, 891–908): all differences that the score test with the
other parameter at its constrained maximum does not reject. It holds its level where Wald's does not, at few
items and few discordant ones (the exact coverages are in docs/statistics.md), and has a width even where no
item is discordant. Its ends err in 2.5 of 100 cases only about: counts jump, and at the worst share of
discordant items one end errs in up to 3.3. A verdict therefore asks the exact test as well (`exact_p`), which
no share of discordant items makes err more often.

Items that share clusters count as fewer: counts and items are divided by the design effect, as Rao and Scott
do (Biometrics 48, 1992, 577–585), and the quantile is Student's t of the clusters.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import bdtr, ndtri, stdtr, stdtrit  # type: ignore[import-untyped]

from deepen.evaluation.statistics import standard_error

_Floats = NDArray[np.float64]

_Z_975 = float(ndtri(0.975))
# Halvings of [-1, 1]: to the last bit that matters.
_HALVINGS = 50
# Shares of discordant items that are tried, and how far from their mean counts of gains are summed, in
# standard deviations: what lies beyond has less than 1e-18 of the chance.
_SHARES, _REACH = 200, 9


def mcnemar_p(gained: int, lost: int) -> float:
    """Return the exact two-sided p of McNemar's test; 1 without discordant items.

    Args:
        gained: items right under the model and wrong under the base.
        lost: items wrong under the model and right under the base.
    """
    discordant = gained + lost
    return min(1.0, 2 * float(bdtr(min(gained, lost), discordant, 0.5))) if discordant else 1.0


def score_interval(gained: float, lost: float, n: float, quantile: float = _Z_975) -> tuple[float, float]:
    """Return Tango's 95% interval of the difference of two paired proportions, `(gained - lost) / n`.

    Args:
        gained: items right under the model and wrong under the base.
        lost: items wrong under the model and right under the base.
        n: all items.
        quantile: of the score, at 97.5%.
    """
    targets = np.array([quantile, -quantile])
    low, high = np.full(2, -1.0), np.full(2, 1.0)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        # The score falls as the difference asked about rises: it is +z at the lower end, -z at the upper.
        above = _score(middle, gained, lost, n) > targets
        low, high = np.where(above, middle, low), np.where(above, high, middle)
    lower, upper = ((low + high) / 2).tolist()
    return lower, upper


def exact_p(gained: int, lost: int, n: int, difference: float) -> float:
    """Return the chance of a score at least as high as the one seen where `difference` is the truth.

    The largest one over all shares of discordant items: exact and unconditional, as Barnard's test of two
    groups, with Tango's score as the order of outcomes (Hsueh, Liu and Chen, Biometrics 57, 2001, 478–483).
    That of a score at least as low is `exact_p(lost, gained, n, -difference)`.

    Args:
        gained: items right under the model and wrong under the base.
        lost: items wrong under the model and right under the base.
        n: all items.
        difference: strictly between -1 and 1.
    """
    return score_chance(n, difference, float(_score(difference, gained, lost, n)))


def score_chance(n: int, difference: float, score: float) -> float:
    """Return the largest chance, over all shares of discordant items, of such a score or a higher one."""
    most_lost = _most_lost(n, difference, score)
    least = abs(difference)
    # Close together where few items are discordant, and the chance turns quickly.
    shares = least + (1 - least) * np.sin(np.linspace(0, np.pi / 2, _SHARES)) ** 2
    return max(_chance(most_lost, n, (share + difference) / 2, (share - difference) / 2) for share in shares)


def _most_lost(n: int, difference: float, score: float) -> NDArray[np.int64]:
    """Return for 0 … n gained the most lost whose score is not below; -1 where there is none such."""
    gained = np.arange(n + 1)
    # More losses lower the score; `low` has one high enough, or is -1.
    low, high = np.full(n + 1, -1), n + 1 - gained
    while (high - low > 1).any():
        middle = (low + high) // 2
        # Ties count as seen, whatever their last bits.
        enough = _score(difference, gained, np.maximum(middle, 0), n) >= score - 1e-9
        enough |= middle < 0
        low, high = np.where(enough, middle, low), np.where(enough, high, middle)
    return low


def _chance(most_lost: NDArray[np.int64], n: int, gain: float, loss: float) -> float:
    """Sum the chances of all outcomes of at most so many losses, by the number of gains."""
    reach = _REACH * np.sqrt(n * gain * (1 - gain)) + 20
    first, last = max(0, int(n * gain - reach)), min(n, int(n * gain + reach))
    gained = np.arange(first, last + 1)
    weights = np.diff(bdtr(gained, n, gain), prepend=0.0)
    fits = most_lost[gained] >= 0
    gained, weights = gained[fits], weights[fits]
    return float(weights @ bdtr(most_lost[gained], n - gained, min(1.0, loss / (1 - gain))))


def clustered_interval(gained: float, lost: float, n: float, units: int) -> tuple[float, float, float]:
    """Return the 95% interval of the difference, and the p of the same score test of no difference.

    Args:
        gained: items gained, over the design effect.
        lost: items lost, over the design effect.
        n: all items, over the design effect.
        units: clusters, 2 or more.
    """
    low, high = score_interval(gained, lost, n, float(stdtrit(units - 1, 0.975)))
    discordant = gained + lost
    p = 2 * float(stdtr(units - 1, -abs(gained - lost) / np.sqrt(discordant))) if discordant else 1.0
    return low, high, p


def design_effect(gained: _Floats, lost: _Floats, sizes: _Floats) -> float | None:
    """Return how many items in clusters tell as much as one alone, at least 1; None with one cluster.

    The variance of the difference between clusters, over what it would be were items independent. Without
    discordant items nothing is known of it, and a cluster counts as one item (Kish, *Survey Sampling*, 1965).

    Args:
        gained: items gained of each cluster.
        lost: items lost of each cluster.
        sizes: items of each cluster.
    """
    difference, n = gained - lost, sizes.sum()
    error = standard_error(difference, sizes)
    if error is None:
        return None
    independent = (gained.sum() + lost.sum() - difference.sum() ** 2 / n) / n**2
    return max(1.0, float(error**2 / independent if independent > 0 else (sizes**2).sum() / n))


def _score(difference: ArrayLike, gained: ArrayLike, lost: ArrayLike, n: float) -> _Floats:
    """Return the score statistic of each difference; the loss rate stands at its constrained maximum."""
    difference, gained, lost = (np.asarray(each, dtype=np.float64) for each in (difference, gained, lost))
    linear = (2 * n - gained + lost) * difference - gained - lost
    constant = -lost * difference * (1 - difference)
    rate = (np.sqrt(np.maximum(linear**2 - 8 * n * constant, 0)) - linear) / (4 * n)
    variance = n * (2 * rate + difference * (1 - difference))
    score: _Floats = (gained - lost - n * difference) / np.sqrt(np.maximum(variance, 1e-300))
    return score
