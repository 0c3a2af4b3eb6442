"""How much each block of a base matters, measured: where new blocks may stand is decided from it."""

from typing import Literal

from deepen.records.provenance import Provenance
from deepen.records.record import Record


class BlockImportance(Record):
    """One block of the base.

    Attributes:
        block: its number.
        general: by how much the loss on general text rises when the block is skipped, in nats per token.
        domain: the same on domain text; None where none was given.
        cosine: mean cosine between what enters and what leaves the block, over the tokens of general text.
        gradient: sum of |weight × gradient| of the general loss over its parameters, in nats per token.
    """

    block: int
    general: float
    domain: float | None
    cosine: float
    gradient: float


class ImportanceRecord(Record):
    """What was measured of a base.

    Attributes:
        format_version: of this form.
        model: the base, as it was named.
        fingerprint: fast, of the base: a record of another base is refused.
        general: the base's own loss on general text, in nats per token.
        domain: the same on domain text.
        tokens: predicted tokens of each text, by name.
        blocks: one entry a block, by number.
        provenance: versions, hardware, digests of the texts.
    """

    format_version: Literal[1] = 1
    model: str
    fingerprint: str
    general: float
    domain: float | None
    tokens: dict[str, int]
    blocks: list[BlockImportance]
    provenance: Provenance

    @property
    def scores(self) -> list[float]:
        """How much general ability loses by each block beyond what the domain does: least first is asked."""
        return [each.general - (each.domain or 0.0) for each in self.blocks]
