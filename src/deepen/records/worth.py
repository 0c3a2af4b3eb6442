"""What each new block is worth after training, and the path from base to model."""

from typing import Literal

from deepen.records.provenance import Provenance
from deepen.records.record import Record
from deepen.records.results import Metric


class BlockWorth(Record):
    """One new block, skipped alone.

    Attributes:
        block: its index in the expanded model.
        after: the base block it stands on.
        general: loss on general text without it (`value`) beside the whole model's (`base_value`): a positive
            `delta` is what the block is worth, a negative one what it costs.
        domain: the same on domain text.
        general_share: mean of ‖block(x) − x‖ / ‖x‖ over the tokens of general text: how much it adds.
        domain_share: the same over those of domain text.
    """

    block: int
    after: int
    general: Metric
    domain: Metric
    general_share: float
    domain_share: float


class PathPoint(Record):
    """The model with the residual writes of all new blocks scaled by one factor.

    Attributes:
        alpha: the factor: 0 is the base, 1 the model.
        general: loss on general text (`value`) beside the base's (`base_value`).
        domain: the same on domain text.
    """

    alpha: float
    general: Metric
    domain: Metric


class WorthRecord(Record):
    """What was measured of the new blocks of a model.

    Attributes:
        format_version: of this form.
        base: the base, as it was named.
        pack: the pack, as it was named; empty for an expanded checkpoint.
        fingerprint: fast, of the base.
        layout: where the new blocks stand, drawn.
        blocks: one entry a new block, by index.
        path: by ascending alpha; 0 and 1 are always among them.
        max_general_loss: largest rise of the general loss that was allowed; None: none was said.
        chosen: the alpha chosen of the path.
        rule: how, in words.
        tokens: predicted tokens of each text, by name.
        provenance: versions, hardware, digests of the texts.
    """

    format_version: Literal[1] = 1
    base: str
    pack: str
    fingerprint: str
    layout: str
    blocks: list[BlockWorth]
    path: list[PathPoint]
    max_general_loss: float | None
    chosen: float
    rule: str
    tokens: dict[str, int]
    provenance: Provenance
