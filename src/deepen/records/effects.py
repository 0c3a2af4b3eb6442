"""What each new block does to the residual stream, and to what could be predicted from it."""

from typing import Literal

from deepen.records.provenance import Provenance
from deepen.records.record import Record
from deepen.records.results import Metric, Role


class TokenEffect(Record):
    """One token of a text, wherever it is the true next one.

    Attributes:
        token: its text.
        count: how often it is predicted in the text.
        gain: mean change of its log-probability from below to above the block, in nats; positive: the block
            makes it likelier.
        context: what precedes it where its log-probability changes most.
        context_gain: the change there.
        before: the most likely token there, read off the stream below the block.
        after: the same above the block.
    """

    token: str
    count: int
    gain: float
    context: str
    context_gain: float
    before: str
    after: str


class TextEffect(Record):
    """One new block on one text; means are over predicted tokens.

    Attributes:
        task: name of the text.
        role: `general` or `domain`.
        share: mean of ‖block(x) − x‖ / ‖x‖: how much the block writes beside what is there.
        changed: share of tokens whose most likely prediction differs below and above the block.
        loss: −log p of the text read off the stream above the block (`value`) and below it (`base_value`) by
            the model's own final norm and head; a negative `delta`: the block makes the text likelier.
        tokens: those whose log-probability, summed over the text, the block changes most; most first.
    """

    task: str
    role: Role
    share: float
    changed: float
    loss: Metric
    tokens: list[TokenEffect]


class BlockEffects(Record):
    """One new block.

    Attributes:
        block: its index in the expanded model.
        after: the base block it stands on.
        texts: what it does to each text.
    """

    block: int
    after: int
    texts: list[TextEffect]


class EffectsRecord(Record):
    """`evaluation/effects.json`: what the new blocks of a model do.

    Attributes:
        format_version: of this form.
        model: what was measured, as it was named.
        base: its base, as its record names it.
        fingerprint: fast, of the base.
        layout: where the new blocks stand, drawn.
        blocks: one entry a new block, by index.
        tokens: predicted tokens of each text, by name.
        provenance: versions, hardware, digests of the texts.
    """

    format_version: Literal[1] = 1
    model: str
    base: str
    fingerprint: str
    layout: str
    blocks: list[BlockEffects]
    tokens: dict[str, int]
    provenance: Provenance
