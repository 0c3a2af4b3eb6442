"""What the model will see: the ids of training windows, which are trained, where documents begin."""

from collections.abc import Sequence
from dataclasses import dataclass

from deepen.data.batches import Mixture


@dataclass(frozen=True, kw_only=True)
class Example:
    """One training window; all lists but `starts` have one entry a token.

    Attributes:
        stage: the part of the run it is trained on in, `train` or `sft`.
        source: label of the source.
        window: its number in the source.
        token_ids: `sequence_length + 1` ids; each is an input but the last, and a target but the first.
        trained: 1 where the id is a target that counts in the loss.
        positions: position ids of the inputs (the last id has none); None: 0, 1, 2, …
        starts: places at which a document, a piece of one, or padding begins.
        padding: ids at the end that are padding.
    """

    stage: str
    source: str
    window: int
    token_ids: list[int]
    trained: list[int]
    positions: list[int] | None
    starts: list[int]
    padding: int


def preview(
    mixture: Mixture, labels: Sequence[str], *, step: int, windows: int, stage: str = "train"
) -> list[Example]:
    """Return the windows of a step, cut into steps of `windows` windows as a run cuts them."""
    return [_example(mixture, labels, stage, *place) for place in mixture.places(step, windows)]


def _example(mixture: Mixture, labels: Sequence[str], stage: str, source: int, index: int) -> Example:
    window, starts = mixture.window(source, index), mixture.starts(source, index).tolist()
    length = mixture.sequence_length
    trained = [1] * length if window.trained is None else window.trained.astype(int).tolist()
    return Example(
        stage=stage,
        source=labels[source],
        window=index,
        token_ids=window.tokens.tolist(),
        trained=[0, *trained],
        positions=None if window.positions is None else window.positions.tolist(),
        starts=starts,
        padding=mixture.padding(source, index),
    )
