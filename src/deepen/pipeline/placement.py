"""Where a recipe's new blocks go."""

from pathlib import Path

from deepen.config import ExpandSection
from deepen.errors import DataError
from deepen.expansion import Layout, least_important, plan_layout
from deepen.records import ImportanceRecord, read_record


def place_blocks(expand: ExpandSection, depth: int, fingerprint: str) -> Layout:
    """Decide where a recipe's new blocks go.

    Args:
        expand: what was asked.
        depth: blocks of the base.
        fingerprint: the base's, fast.

    Raises:
        LayoutError: they cannot be placed so.
        DataError: the record of importance cannot be read, or is of another base.
    """
    if expand.placement != "importance":
        return plan_layout(
            depth,
            blocks=expand.blocks,
            placement=expand.placement,
            groups=expand.groups,
            after=expand.after,
            init=expand.init,
            zero=expand.zero,
        )
    assert expand.importance is not None  # the recipe has both
    assert expand.blocks is not None
    record = read_record(Path(expand.importance), ImportanceRecord)
    if record.fingerprint != fingerprint:
        raise DataError(
            f"{expand.importance}: was measured on {record.model} with fingerprint "
            f"{record.fingerprint[:16]}…,\nnot on this base, with {fingerprint[:16]}…"
        )
    after = least_important(record.scores, expand.blocks)
    return plan_layout(depth, after=after, init=expand.init, zero=expand.zero)
