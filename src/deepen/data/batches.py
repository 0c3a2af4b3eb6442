"""A weighted mixture of corpora whose batch at a step is a pure function of (corpora, seed, step).

There is no loader to wind forward, so resuming at any step costs nothing.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from deepen.data.corpus import Tokens
from deepen.data.packing import Documents, Packing, PackingCounts, Window, open_windows
from deepen.data.permutation import permute
from deepen.data.tokens import digest_of


@dataclass(frozen=True)
class Batch:
    """Windows of one optimiser step.

    Attributes:
        tokens: int64 [windows, sequence_length + 1]: inputs `tokens[:, :-1]`, targets `tokens[:, 1:]`.
        sources: int64 [windows]: index of the corpus each window is from.
        positions: int64 [windows, sequence_length]: position ids of the inputs, which part the documents
            (use_cache must be False); None: the model's own.
        trained: bool [windows, sequence_length]: which targets count in the loss; None: all.
        numbers: int64 [windows]: number of each window among all windows of all corpora; None: not known.
    """

    tokens: Tokens
    sources: npt.NDArray[np.int64]
    positions: npt.NDArray[np.int64] | None = None
    trained: npt.NDArray[np.bool_] | None = None
    numbers: npt.NDArray[np.int64] | None = None

    @property
    def trained_tokens(self) -> npt.NDArray[np.int64]:
        """Targets of each window that count in the loss: int64 [windows]."""
        if self.trained is None:
            return np.full(len(self.tokens), self.tokens.shape[1] - 1, dtype=np.int64)
        return np.asarray(np.count_nonzero(self.trained, axis=1), dtype=np.int64)


class Mixture:
    """Corpora in proportion to size times weight, in a random order that changes with every epoch.

    An epoch holds round(weight × windows) windows of each corpus, at least one. Where that is fewer than the
    corpus has, the next epoch goes on with the windows that follow, so all are seen in the end.

    Attributes:
        sequence_length: tokens to predict in a window.
        sizes: windows of each corpus, once through.
        counts: windows of each corpus in one epoch.
    """

    def __init__(
        self,
        corpora: Sequence[tuple[Documents, float]],
        sequence_length: int,
        seed: int,
        *,
        packing: Packing = "stream",
        document_masks: bool = False,
    ) -> None:
        self._corpora = [corpus for corpus, _ in corpora]
        self._weights = [float(weight) for _, weight in corpora]
        self._cuts = [
            open_windows(corpus, sequence_length, packing, document_masks=document_masks)
            for corpus in self._corpora
        ]
        self.sizes = tuple(len(cuts) for cuts in self._cuts)
        self._packing, self._document_masks = packing, document_masks
        self.sequence_length = sequence_length
        self.seed = seed
        self.counts = tuple(
            max(1, _round_half_up(weight * windows))
            for weight, windows in zip(self._weights, self.sizes, strict=True)
        )
        self._ends = np.cumsum(self.counts, dtype=np.int64)

    @property
    def windows_per_epoch(self) -> int:
        """Windows after which the mixture begins again."""
        return sum(self.counts)

    @property
    def digest(self) -> str:
        """Hash of all that decides the batches: corpora, weights, sequence length, seed and packing."""
        corpora = [corpus.digest for corpus in self._corpora]
        how: list[Any] = [corpora, self._weights, self.sequence_length, self.seed]
        if self._packing != "stream" or self._document_masks:
            how += [self._packing, self._document_masks]
        return digest_of(how)

    @property
    def windows_digest(self) -> str:
        """Hash of all that decides what each window holds, whatever the order in which they come."""
        corpora = [corpus.digest for corpus in self._corpora]
        return digest_of([corpora, self.sequence_length, self._packing, self._document_masks])

    def steps(self, epochs: float, windows: int) -> int:
        """Return the steps of `windows` windows that hold `epochs` epochs, rounded up."""
        # Of 0.1 × 30 = 3.0000000000000004 three are meant.
        return max(1, math.ceil(round(epochs * self.windows_per_epoch, 6) / windows))

    def packing_counts(self) -> list[PackingCounts]:
        """Add up what the packing makes of each corpus."""
        return [cuts.counts() for cuts in self._cuts]

    def window(self, source: int, index: int) -> Window:
        """Return one window of one corpus."""
        return self._cuts[source][index]

    def starts(self, source: int, index: int) -> npt.NDArray[np.int64]:
        """Return where in a window a document, a piece of one, or padding begins."""
        return self._cuts[source].starts(index)

    def padding(self, source: int, index: int) -> int:
        """Return how many ids at the end of a window are padding."""
        return self._cuts[source].padding(index)

    def batch(self, step: int, windows: int) -> Batch:
        """Return the `windows` windows of step `step`, which are those of any process and any earlier run."""
        places = self.places(step, windows)
        cut = [self.window(source, index) for source, index in places]
        positions = [window.positions for window in cut if window.positions is not None]
        trained = [window.trained for window in cut if window.trained is not None]
        return Batch(
            tokens=np.stack([window.tokens for window in cut]),
            sources=np.asarray([source for source, _ in places], dtype=np.int64),
            positions=np.stack(positions) if positions else None,
            trained=np.stack(trained) if trained else None,
            numbers=np.asarray([sum(self.sizes[:source]) + index for source, index in places], np.int64),
        )

    def places(self, step: int, windows: int) -> list[tuple[int, int]]:
        """Return the corpus and the number in it of each window of a step."""
        samples = step * windows + np.arange(windows, dtype=np.int64)
        epochs, positions = np.divmod(samples, self.windows_per_epoch)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            positions[here] = permute(positions[here], self.windows_per_epoch, f"{self.seed}/{epoch}")
        sources = np.searchsorted(self._ends, positions, side="right")
        counts = np.asarray(self.counts, dtype=np.int64)[sources]
        local = positions - (self._ends[sources] - counts) + epochs * counts
        indices = local % np.asarray(self.sizes, dtype=np.int64)[sources]
        return list(zip(sources.tolist(), indices.tolist(), strict=True))


def _round_half_up(value: float) -> int:
    return math.floor(value + 0.5)
