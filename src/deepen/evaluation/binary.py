"""Two models on the same right-or-wrong items: the exact test and the score interval of their difference.

Only the discordant items, which one model has right and the other wrong, say anything about the difference.
The test is McNemar's in its exact form: a fair coin decides each discordant item. The interval is the score
interval of Tango (Statistics in Medicine 17, 1998, 891–908): all differences that the score test with the
other parameter at its constrained maximum does not reject. It holds its level where Wald's does not, at few
items and few discordant ones (the exact coverages are in docs/statistics.md), and has a width even where no
item is discordant.
"""

import numpy as np
from numpy.typing import NDArray
from scipy.special import bdtr, ndtri  # type: ignore[import-untyped]

_Z_975 = float(ndtri(0.975))
# Halvings of [-1, 1]: to the last bit that matters.
_HALVINGS = 50


def mcnemar_p(gained: int, lost: int) -> float:
    """Return the exact two-sided p of McNemar's test; 1 without discordant items.

    Args:
        gained: items right under the model and wrong under the base.
        lost: items wrong under the model and right under the base.
    """
    discordant = gained + lost
    return min(1.0, 2 * float(bdtr(min(gained, lost), discordant, 0.5))) if discordant else 1.0


def score_interval(gained: int, lost: int, n: int) -> tuple[float, float]:
    """Return Tango's 95% interval of the difference of two paired proportions, `(gained - lost) / n`.

    Args:
        gained: items right under the model and wrong under the base.
        lost: items wrong under the model and right under the base.
        n: all items.
    """
    targets = np.array([_Z_975, -_Z_975])
    low, high = np.full(2, -1.0), np.full(2, 1.0)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        # The score falls as the difference asked about rises: it is +z at the lower end, -z at the upper.
        above = _score(middle, gained, lost, n) > targets
        low, high = np.where(above, middle, low), np.where(above, high, middle)
    lower, upper = ((low + high) / 2).tolist()
    return lower, upper


def _score(difference: NDArray[np.float64], gained: int, lost: int, n: int) -> NDArray[np.float64]:
    """Return the score statistic of each difference; the loss rate stands at its constrained maximum."""
    linear = (2 * n - gained + lost) * difference - gained - lost
    constant = -lost * difference * (1 - difference)
    rate = (np.sqrt(np.maximum(linear**2 - 8 * n * constant, 0)) - linear) / (4 * n)
    variance = n * (2 * rate + difference * (1 - difference))
    score: NDArray[np.float64] = (gained - lost - n * difference) / np.sqrt(np.maximum(variance, 1e-300))
    return score
