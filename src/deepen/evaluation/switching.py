"""What a switch is held to: a threshold for a rate of false positives, and the tokens behind a prompt."""

import math
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from deepen.data.evaluation_text import EvaluationText
from deepen.errors import SwitchError


def conformal_threshold(advantages: NDArray[np.float64], rate: float) -> float:
    """Return a threshold that a new general prompt exceeds with a probability of at most `rate`.

    Split conformal prediction (Vovk, Gammerman and Shafer, *Algorithmic Learning in a Random World*, 2005):
    where the n prompts and a new one are exchangeable, its rank among them is uniform, so it exceeds the k-th
    largest with a probability of at most k / (n + 1).

    Args:
        advantages: the largest of any pack for each general prompt; NaN where none can be told.
        rate: between 0 and 1.

    Raises:
        SwitchError: there are too few prompts for the rate.
    """
    place = math.floor(rate * (len(advantages) + 1))
    if place < 1:
        needed = math.ceil(1 / rate) - 1
        raise SwitchError(
            f"{len(advantages)} general prompts cannot show false positives of {rate:g}; "
            f"give text for {needed} to calibrate with"
        )
    found = np.where(np.isnan(advantages), -np.inf, advantages)
    return float(np.sort(found)[-place])


def after_prompt(text: EvaluationText, prompt_tokens: int) -> EvaluationText:
    """Return a text of which only the tokens behind the first `prompt_tokens` of each window are scored.

    Windows without such tokens are left out. Bytes are not known of what is left, so they are 0.
    """
    kept = [number for number, window in enumerate(text.windows) if len(window) > prompt_tokens]
    windows = [text.windows[number] for number in kept]
    counted = [np.arange(1, len(window)) >= prompt_tokens for window in windows]
    if text.counted is not None:
        counted = [flags & text.counted[number] for flags, number in zip(counted, kept, strict=True)]
    return replace(
        text,
        windows=windows,
        document=[text.document[number] for number in kept],
        bytes=[0] * len(kept),
        counted=counted,
    )
