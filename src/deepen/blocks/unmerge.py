"""New blocks off an expanded checkpoint, which leaves the base."""

import json
import logging
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepen.blocks.expanded import Opened, open_expanded
from deepen.checkpoint import CONFIG, INDEX, atomic_directory, check_free
from deepen.expansion import (
    MANIFEST_NAME,
    FileRecord,
    NewBlockRecord,
    Plan,
    PlannedFile,
    Progress,
    carried_files,
    carry,
    check_space,
    file_digest,
    held_tensors,
    plan_base,
    previous_expansion,
    recorded_text,
    reduce_config,
    restored_file,
    write_weights,
)

logger = logging.getLogger("deepen")


@dataclass(frozen=True, kw_only=True)
class UnmergeResult:
    """What was written.

    Attributes:
        directory: the base.
        removed: the blocks that were taken off.
        byte_identical: whether every file is known to be as it was.
        differing: files that are missing, or that need not equal the base's byte for byte. Weights, index
            and `config.json` mean the same all the same.
        bytes_written: size of the weight files.
        seconds: how long it took.
    """

    directory: Path
    removed: tuple[NewBlockRecord, ...]
    byte_identical: bool
    differing: tuple[str, ...]
    bytes_written: int
    seconds: float


def unmerge(
    expanded: str | Path, out: str | Path, *, overwrite: bool = False, progress: Progress | None = None
) -> UnmergeResult:
    """Take the new blocks (of the latest stage) off and write the base again, byte for byte.

    Weights with their headers, index, `config.json` and the files that were carried over are the base's. What
    an expansion does not carry (the base's README, code, weights in other formats) does not come back.

    Args:
        expanded: the expanded checkpoint, its new blocks trained or not.
        out: the directory to create, whole or not at all.
        overwrite: replace `out`.
        progress: called with (bytes done, bytes in all).

    Raises:
        PackError: its base tensors are no longer the base's.
        CheckpointError: it is malformed, or not an expanded checkpoint.
        OutputError: `out` exists, overlaps the input, or does not fit the disk.
    """
    start = time.perf_counter()
    check_free(Path(out), overwrite=overwrite)
    opened = open_expanded(expanded, "without its new blocks it is not the base")
    source = opened.checkpoint.directory
    plan, texts, rewritten = _decide(opened)
    names, changed = _carried(opened)
    differing = tuple(sorted({*rewritten, *changed}))
    check_space(Path(out), plan.bytes_needed)
    for name in differing:
        logger.warning("warning: %s cannot be restored byte for byte: %s", name, _why(name, names))
    with atomic_directory(Path(out), overwrite=overwrite, inside=(source,)) as partial:
        carry(source, partial, names)
        write_weights(plan, partial, progress)
        for name, text in texts.items():
            (partial / name).write_bytes(text.encode())
    return UnmergeResult(
        directory=Path(out),
        removed=opened.expansion.latest_blocks,
        byte_identical=not differing,
        differing=differing,
        bytes_written=plan.bytes_written,
        seconds=time.perf_counter() - start,
    )


def _decide(opened: Opened) -> tuple[Plan, dict[str, str], tuple[str, ...]]:
    """Return the base's weight files, its other files, and which of them may differ from what they were."""
    checkpoint, records = opened.checkpoint, opened.expansion.base_files
    plan = plan_base(checkpoint, held_tensors(checkpoint), opened.expansion, opened.family)
    exact = _exact_files(plan, {name: record for name, record in records.items() if _is_weights(name)})
    regenerated = _regenerated_texts(opened, plan)
    wanted = dict.fromkeys(regenerated)
    if exact is not None:  # then the base has an index if it is recorded
        wanted = {n: None for n in (CONFIG, INDEX, MANIFEST_NAME) if n in records or n in regenerated}
        if INDEX not in records:
            wanted.pop(INDEX, None)
    texts, differing = {}, [] if exact is not None else [file.name for file in plan.files]
    for name in wanted:
        text, same = recorded_text(records.get(name), regenerated.get(name))
        if text is not None:
            texts[name] = text
        if not same:
            differing.append(name)
    return Plan(plan.files if exact is None else exact, None), texts, tuple(sorted(differing))


def _why(name: str, carried: Collection[str]) -> str:
    if name in carried:
        return "it was changed since"
    written = name in (CONFIG, INDEX, MANIFEST_NAME) or _is_weights(name)
    return "what it was is not recorded, one that means the same is written" if written else "it is missing"


def _carried(opened: Opened) -> tuple[list[str], list[str]]:
    """Of the files that were carried over: those that are the base's, and those of it missing or changed."""
    source, records = opened.checkpoint.directory, opened.expansion.base_files
    held = list(carried_files(source))
    if not records:  # of an older deepen: nothing is known of them
        return held, []
    ours = [n for n in records if n not in (CONFIG, INDEX, MANIFEST_NAME) and not _is_weights(n)]
    kept = [name for name in held if name in ours]
    same = {name for name in kept if file_digest(source / name) == records[name].digest}
    return kept, [name for name in ours if name not in same]


def _regenerated_texts(opened: Opened, plan: Plan) -> dict[str, str]:
    """The base's files besides its weights, as far as they follow from the expanded checkpoint's."""
    config, expansion, family = opened.checkpoint.config, opened.expansion, opened.family
    texts = {CONFIG: _json(reduce_config(config, family, expansion.layout))}
    if (index := plan.index_text()) is not None:
        texts[INDEX] = index
    if (previous := previous_expansion(expansion, family)) is not None:
        texts[MANIFEST_NAME] = previous.to_json()
    return texts


def _exact_files(plan: Plan, records: Mapping[str, FileRecord]) -> tuple[PlannedFile, ...] | None:
    """The base's weight files as they were; None if that cannot be said of all of them."""
    files, tensors = {file.name: file for file in plan.files}, {t.name: t for t in plan.tensors}
    restored = [restored_file(name, record, files.get(name), tensors) for name, record in records.items()]
    held = tuple(file for file in restored if file is not None)
    complete = sorted(t.name for file in held for t in file.tensors) == sorted(tensors)
    return held if complete and len(held) == len(records) else None


def _is_weights(name: str) -> bool:
    """Whether a recorded name is that of a weight file, and nothing that leads elsewhere."""
    return name.endswith(".safetensors") and not {"/", "\\", "\0"} & set(name)


def _json(config: Mapping[str, Any]) -> str:
    return json.dumps(config, indent=2, ensure_ascii=False) + "\n"
