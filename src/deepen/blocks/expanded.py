"""An expanded checkpoint from which blocks are taken: its record fits it, and its base is the base still."""

from dataclasses import dataclass
from pathlib import Path

from deepen.checkpoint import CONFIG, Checkpoint, fast_fingerprint
from deepen.errors import PackError
from deepen.expansion import MANIFEST_NAME, Expansion, base_name, read_expansion
from deepen.families import Family, check_tensors, family_for


@dataclass(frozen=True)
class Opened:
    """An expanded checkpoint with its record and family; its base tensors are the base's."""

    checkpoint: Checkpoint
    expansion: Expansion
    family: Family

    def in_base(self, name: str) -> str | None:
        """Return what a tensor is called in the base; None for a new block's."""
        return base_name(self.expansion, self.family, name)


def open_expanded(expanded: str | Path, loss: str) -> Opened:
    """Open an expanded checkpoint and see that its base tensors are the base's still, by fingerprint.

    Args:
        expanded: the checkpoint.
        loss: what would be lost if they are not, for the message.

    Raises:
        PackError: they are not.
        CheckpointError: it is malformed, or not an expanded checkpoint.
    """
    expansion, checkpoint = read_expansion(Path(expanded)), Checkpoint.open(expanded)
    family = family_for(checkpoint.config, checkpoint.tensors, f"{expanded}/{CONFIG}")
    depth = check_tensors(family, checkpoint.config, checkpoint.tensors, str(expanded))
    if depth != expansion.layout.depth or family.name != expansion.family:
        raise PackError(
            f"{expanded}/{MANIFEST_NAME}: describes a {expansion.family} of {expansion.layout.depth} blocks, "
            f"the checkpoint is a {family.name} of {depth}"
        )
    opened = Opened(checkpoint, expansion, family)
    if fast_fingerprint(checkpoint, opened.in_base) != expansion.base_fingerprint.fast:
        raise PackError(
            f"{expanded}: its base blocks differ from {expansion.base}'s (by fingerprint).\n"
            f"They were trained too, and {loss}: keep the whole checkpoint"
        )
    return opened
