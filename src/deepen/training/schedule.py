import math
from typing import Literal


def learning_rate(
    step: int, *, steps: int, peak: float, warmup: float, final: float, shape: Literal["cosine", "constant"]
) -> float:
    """Learning rate of optimiser step `step`, a pure function.

    Args:
        step: number of the step, 0 to steps − 1.
        steps: steps of the whole run.
        peak: highest rate, reached at the end of the warm-up.
        warmup: share of the steps over which the rate rises linearly from 0 (exclusive).
        final: where the cosine ends, as a share of the peak.
        shape: `cosine` or `constant` after the warm-up.
    """
    rising = math.ceil(warmup * steps)
    if step < rising:
        return peak * (step + 1) / rising
    if shape == "constant":
        return peak
    done = (step - rising) / max(1, steps - rising - 1)
    return peak * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))
