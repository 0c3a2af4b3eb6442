"""A weighted mixture of corpora whose batch at a step is a pure function of (corpora, seed, step).

There is no loader to wind forward, so resuming at any step costs nothing.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from deepen.data.corpus import Corpus, Tokens
from deepen.data.permutation import permute
from deepen.data.tokens import digest_of


@dataclass(frozen=True)
class Batch:
    """Windows of one optimiser step.

    Attributes:
        tokens: int64 [windows, sequence_length + 1]: inputs `tokens[:, :-1]`, targets `tokens[:, 1:]`.
        sources: int64 [windows]: index of the corpus each window is from.
    """

    tokens: Tokens
    sources: npt.NDArray[np.int64]


class Mixture:
    """Corpora in proportion to size times weight, in a random order that changes with every epoch.

    An epoch holds round(weight × windows) windows of each corpus, at least one. Where that is fewer than the
    corpus has, the next epoch goes on with the windows that follow, so all are seen in the end.

    Attributes:
        sequence_length: tokens to predict in a window.
        counts: windows of each corpus in one epoch.
    """

    def __init__(self, corpora: Sequence[tuple[Corpus, float]], sequence_length: int, seed: int) -> None:
        self._corpora = [corpus for corpus, _ in corpora]
        self._weights = [float(weight) for _, weight in corpora]
        self._windows = [corpus.windows(sequence_length) for corpus in self._corpora]
        self.sequence_length = sequence_length
        self.seed = seed
        self.counts = tuple(
            max(1, _round_half_up(weight * windows))
            for weight, windows in zip(self._weights, self._windows, strict=True)
        )
        self._ends = np.cumsum(self.counts, dtype=np.int64)

    @property
    def windows_per_epoch(self) -> int:
        """Windows after which the mixture begins again."""
        return sum(self.counts)

    @property
    def digest(self) -> str:
        """Hash of all that decides the batches: corpora, weights, sequence length and seed."""
        corpora = [corpus.digest for corpus in self._corpora]
        return digest_of([corpora, self._weights, self.sequence_length, self.seed])

    def batch(self, step: int, windows: int) -> Batch:
        """Return the `windows` windows of step `step`, which are those of any process and any earlier run."""
        samples = step * windows + np.arange(windows, dtype=np.int64)
        epochs, positions = np.divmod(samples, self.windows_per_epoch)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            positions[here] = permute(positions[here], self.windows_per_epoch, f"{self.seed}/{epoch}")
        sources = np.searchsorted(self._ends, positions, side="right")
        counts = np.asarray(self.counts, dtype=np.int64)[sources]
        local = positions - (self._ends[sources] - counts) + epochs * counts
        rows = [
            self._corpora[source].window(int(index) % self._windows[source], self.sequence_length)
            for source, index in zip(sources.tolist(), local, strict=True)
        ]
        return Batch(tokens=np.stack(rows), sources=sources.astype(np.int64))


def _round_half_up(value: float) -> int:
    return math.floor(value + 0.5)
