"""Expanding a checkpoint on disk: decide, then write."""

import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepen.checkpoint import CONFIG, atomic_directory, check_free, fast_fingerprint
from deepen.expansion.apply import Progress, check_space, write_weights
from deepen.expansion.base_files import record_base_files
from deepen.expansion.carry import carried_files, carry
from deepen.expansion.config_json import expand_config
from deepen.expansion.layout import Init, Layout, Placement, plan_layout
from deepen.expansion.manifest import MANIFEST_NAME, Expansion, Fingerprint, NewBlockRecord
from deepen.expansion.plan import (
    Base,
    Plan,
    count_parameters,
    expanded_tensors,
    not_finite_tensors,
    open_base,
    plan_files,
)
from deepen.expansion.stages import describe_expansion, earlier_stages
from deepen.families import Zero

logger = logging.getLogger("deepen")


@dataclass(frozen=True, kw_only=True)
class PreparedCheckpoint:
    """An expanded checkpoint decided to the last byte and not yet written.

    Attributes:
        base: the base.
        plan: the weight files.
        expansion: the content of its `expansion.json`.
        warnings: what the user should know first.
    """

    base: Base
    plan: Plan
    expansion: Expansion
    warnings: tuple[str, ...] = ()

    @property
    def layout(self) -> Layout:
        """Which new block stands where."""
        return self.expansion.layout

    @property
    def config(self) -> dict[str, Any]:
        """The content of its `config.json`."""
        return expand_config(self.base.checkpoint.config, self.base.family, self.layout)

    @property
    def parameters(self) -> int:
        """Number of elements in the expanded files."""
        return count_parameters(self.plan.tensors)


@dataclass(frozen=True, kw_only=True)
class ExpandResult:
    """What was written.

    Attributes:
        directory: the expanded checkpoint.
        new_blocks: as recorded in its `expansion.json`.
        parameters: number of elements in its files.
        base_parameters: number of elements in the base's.
        bytes_written: size of its weight files.
        seconds: how long it took.
        warnings: also logged.
    """

    directory: Path
    new_blocks: tuple[NewBlockRecord, ...]
    parameters: int
    base_parameters: int
    bytes_written: int
    seconds: float
    warnings: tuple[str, ...]


def expand_checkpoint(
    base: str | Path,
    out: str | Path,
    *,
    blocks: int | None = None,
    placement: Placement = "interleaved",
    groups: int | None = None,
    after: Sequence[int] | None = None,
    init: Init = "copy",
    zero: Zero = "writes",
    overwrite: bool = False,
    shard_size: int | None = None,
    name: str | None = None,
    progress: Progress | None = None,
) -> ExpandResult:
    """Write the base with new identity blocks as an ordinary checkpoint (arXiv 2401.02415 section 3.1).

    Args:
        base: the base's directory; it is only read.
        out: the directory to create, whole or not at all.
        blocks: number of new blocks.
        placement: where they go.
        groups: number of groups for `interleaved`.
        after: explicit base blocks to stand on instead, see `deepen.expansion.plan_layout`.
        init: what new blocks are made from, see `deepen.expansion.NewBlock`.
        zero: what of them is filled, so that they add nothing.
        overwrite: replace `out`.
        shard_size: cut the weights into files of at most so many bytes; default: as the base's are.
        name: what `expansion.json` calls the base; default: `base` as given.
        progress: called with (bytes done, bytes in all).

    Raises:
        CheckpointError: the base is malformed.
        FamilyError: its family is unknown, or new blocks cannot be exact in it, or not so.
        LayoutError: the new blocks cannot be placed as asked.
        OutputError: `out` exists, overlaps the base, or does not fit the disk.
    """
    start = time.perf_counter()
    check_free(Path(out), overwrite=overwrite)
    prepared = prepare_expansion(
        base,
        blocks=blocks,
        placement=placement,
        groups=groups,
        after=after,
        init=init,
        zero=zero,
        shard_size=shard_size,
        name=name,
    )
    for warning in prepared.warnings:
        logger.warning("warning: %s", warning)
    return write_checkpoint(prepared, Path(out), overwrite=overwrite, progress=progress, start=start)


def prepare_expansion(
    base: str | Path,
    *,
    blocks: int | None = None,
    placement: Placement = "interleaved",
    groups: int | None = None,
    after: Sequence[int] | None = None,
    init: Init = "copy",
    zero: Zero = "writes",
    shard_size: int | None = None,
    name: str | None = None,
) -> PreparedCheckpoint:
    """Decide everything about an expansion and write nothing; arguments as for `expand_checkpoint`."""
    opened = open_base(base)
    layout = plan_layout(
        opened.depth, blocks=blocks, placement=placement, groups=groups, after=after, init=init, zero=zero
    )
    expansion = describe_expansion(
        layout,
        opened.family,
        opened.block_tensors,
        name or str(base),
        Fingerprint(fast=fast_fingerprint(opened.checkpoint)),
        opened.previous,
    )
    plan = plan_files(opened.checkpoint, expanded_tensors(opened, layout), shard_size=shard_size)
    warnings = tuple(_warnings(opened, layout))
    prepared = PreparedCheckpoint(base=opened, plan=plan, expansion=expansion, warnings=warnings)
    _json(prepared.config)  # what cannot be said in a config is refused before anything is written
    return prepared


def write_checkpoint(
    prepared: PreparedCheckpoint,
    out: Path,
    *,
    overwrite: bool = False,
    inside: tuple[Path, ...] = (),
    progress: Progress | None = None,
    start: float | None = None,
) -> ExpandResult:
    """Write a prepared checkpoint.

    Args:
        prepared: what to write.
        out: the directory to create.
        overwrite: replace it.
        inside: further inputs, besides the base, that `out` must not overlap.
        progress: called with (bytes done, bytes in all).
        start: `time.perf_counter()` when the work began; default: now.

    Raises:
        OutputError: `out` exists, overlaps an input, or does not fit the disk.
    """
    start = time.perf_counter() if start is None else start
    source = prepared.base.checkpoint.directory
    carried_files(source)  # a link out of the model is refused before anything is written
    check_space(out, prepared.plan.bytes_needed)
    with atomic_directory(out, overwrite=overwrite, inside=(source, *inside)) as partial:
        carry(source, partial)
        write_weights(prepared.plan, partial, progress)
        (partial / CONFIG).write_text(_json(prepared.config), "utf-8")
        if prepared.expansion.new_rows is None:  # else the base's own rows are in no file of it
            (partial / MANIFEST_NAME).write_text(_complete(prepared).to_json(), "utf-8")
    return ExpandResult(
        directory=out,
        new_blocks=prepared.expansion.new_blocks,
        parameters=prepared.parameters,
        base_parameters=prepared.base.parameters,
        bytes_written=prepared.plan.bytes_written,
        seconds=time.perf_counter() - start,
        warnings=prepared.warnings,
    )


def _complete(prepared: PreparedCheckpoint) -> Expansion:
    """Add what it takes to write the base's files again, this stage's and those of the stages before."""
    base, expansion = prepared.base, prepared.expansion
    if base.previous and base.previous.stage + 1 == expansion.stage:
        expansion = expansion.model_copy(update={"earlier": earlier_stages(base.previous)})
    files = record_base_files(base, expansion, prepared.plan)
    return expansion.model_copy(update={"base_files": files})


def _json(config: Mapping[str, Any]) -> str:
    return json.dumps(config, indent=2, ensure_ascii=False) + "\n"


def _warnings(base: Base, layout: Layout) -> list[str]:
    found = []
    if all(block.after == -1 for block in layout.new_blocks):
        found.append(
            "all new blocks stand below the first (prefix): in the paper (arXiv 2401.02415, Table 5) that "
            "collapsed to 29.36 on the language tasks and 0.81 on Unfair-ToS; it chose interleaved"
        )
    if any(block.zero == "norms" for block in layout.new_blocks):
        found.append(
            "zero norms: no gradient reaches a feed-forward behind a norm of zero, nor that norm, so half of "
            "each new block never learns (arXiv 2401.02415, section 3.2; biases apart)"
        )
    averaged = [block.init != "copy" for block in layout.new_blocks]
    if any(averaged) and not all(averaged):
        found.append("no base block stands above the topmost: the new block that copies it is a plain copy")
    if names := not_finite_tensors(base.checkpoint):
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        found.append(f"the base holds NaN or infinity in {', '.join(names[:3])}{more}")
    return found
