"""Placement, layout, the record, the byte-exact expansion of a checkpoint, and its check. No torch.

Read in this order: `layout` (where new blocks go), `plan` (every output byte, as data), `apply` (writing
them), `manifest` (the record), `expand` (all of it), `verify` (the check).
"""

from deepen.expansion.apply import Progress, check_space, write_weights
from deepen.expansion.expand import (
    ExpandResult,
    PreparedCheckpoint,
    expand_checkpoint,
    prepare_expansion,
    write_checkpoint,
)
from deepen.expansion.layout import Layout, NewBlock, Placement, plan_layout
from deepen.expansion.manifest import (
    MANIFEST_NAME,
    Expansion,
    Fingerprint,
    NewBlockRecord,
    base_name,
    describe_expansion,
    expand_config,
    read_expansion,
)
from deepen.expansion.plan import (
    Base,
    Copy,
    Fill,
    Plan,
    PlannedFile,
    PlannedTensor,
    aligned,
    count_parameters,
    expanded_tensors,
    open_base,
    plan_files,
)
from deepen.expansion.verify import Verification, verify_bytes

__all__ = [
    "MANIFEST_NAME",
    "Base",
    "Copy",
    "ExpandResult",
    "Expansion",
    "Fill",
    "Fingerprint",
    "Layout",
    "NewBlock",
    "NewBlockRecord",
    "Placement",
    "Plan",
    "PlannedFile",
    "PlannedTensor",
    "PreparedCheckpoint",
    "Progress",
    "Verification",
    "aligned",
    "base_name",
    "check_space",
    "count_parameters",
    "describe_expansion",
    "expand_checkpoint",
    "expand_config",
    "expanded_tensors",
    "open_base",
    "plan_files",
    "plan_layout",
    "prepare_expansion",
    "read_expansion",
    "verify_bytes",
    "write_checkpoint",
    "write_weights",
]
