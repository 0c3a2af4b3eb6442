"""Placement, layout, the record, the byte-exact expansion of a checkpoint, and its check. No torch.

Read in this order: `layout` (where new blocks go), `plan` (every output byte, as data), `apply` (writing
them), `manifest` (the record), `expand` (all of it), `verify` (the check).
"""

from deepen.expansion.apply import Progress, check_space, write_weights
from deepen.expansion.base_files import (
    WrittenFile,
    file_digest,
    file_header,
    held_tensors,
    plan_base,
    record_adopted_files,
    record_file,
    recorded_text,
    reduce_config,
    restored_file,
)
from deepen.expansion.carry import carried_files, carry
from deepen.expansion.config_json import expand_config
from deepen.expansion.expand import (
    ExpandResult,
    PreparedCheckpoint,
    expand_checkpoint,
    prepare_expansion,
    write_checkpoint,
)
from deepen.expansion.layout import Init, Layout, NewBlock, Placement, least_important, plan_layout
from deepen.expansion.manifest import (
    MANIFEST_NAME,
    AveragedPack,
    EarlierStage,
    Expansion,
    FileRecord,
    Files,
    Fingerprint,
    NewBlockRecord,
    NewRows,
    read_expansion,
)
from deepen.expansion.plan import (
    Base,
    Plan,
    PlannedFile,
    PlannedTensor,
    aligned,
    count_parameters,
    expanded_tensors,
    held_tensor,
    open_base,
    plan_files,
)
from deepen.expansion.rows import ROWS_PREFIX, Run, Tables, find_tables, with_last_rows
from deepen.expansion.sources import Copy, Fill, Mean
from deepen.expansion.stages import (
    base_name,
    describe_expansion,
    earlier_stages,
    moved_block,
    previous_expansion,
    with_blocks,
)
from deepen.expansion.verify import Verification, verify_bytes

__all__ = [
    "MANIFEST_NAME",
    "ROWS_PREFIX",
    "AveragedPack",
    "Base",
    "Copy",
    "EarlierStage",
    "ExpandResult",
    "Expansion",
    "FileRecord",
    "Files",
    "Fill",
    "Fingerprint",
    "Init",
    "Layout",
    "Mean",
    "NewBlock",
    "NewBlockRecord",
    "NewRows",
    "Placement",
    "Plan",
    "PlannedFile",
    "PlannedTensor",
    "PreparedCheckpoint",
    "Progress",
    "Run",
    "Tables",
    "Verification",
    "WrittenFile",
    "aligned",
    "base_name",
    "carried_files",
    "carry",
    "check_space",
    "count_parameters",
    "describe_expansion",
    "earlier_stages",
    "expand_checkpoint",
    "expand_config",
    "expanded_tensors",
    "file_digest",
    "file_header",
    "find_tables",
    "held_tensor",
    "held_tensors",
    "least_important",
    "moved_block",
    "open_base",
    "plan_base",
    "plan_files",
    "plan_layout",
    "prepare_expansion",
    "previous_expansion",
    "read_expansion",
    "record_adopted_files",
    "record_file",
    "recorded_text",
    "reduce_config",
    "restored_file",
    "verify_bytes",
    "with_blocks",
    "with_last_rows",
    "write_checkpoint",
    "write_weights",
]
