import re
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deepen.cli.apps import new_app
from deepen.cli.output import human_bytes, human_count, print_json, progress_bar

if TYPE_CHECKING:
    from deepen.expansion import ExpandResult, NewBlock, PreparedCheckpoint

app = new_app()

_UNITS = {"": 1, "B": 1} | {
    prefix + suffix: base**power
    for power, prefix in enumerate("KMGT", 1)
    for suffix, base in (("B", 1000), ("IB", 1024))
}


def parse_size(text: str) -> int:
    """Return a number of bytes from `5GB` (10^9 each), `5GiB` (2^30 each) or a plain number."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if (
        match is None
        or match[2].upper() not in _UNITS
        or (size := float(match[1]) * _UNITS[match[2].upper()]) < 1
    ):
        raise typer.BadParameter(
            f"{text!r} is not a size; write for example 5GB", param_hint="'--shard-size'"
        )
    return int(size)


def parse_after(text: str, option: str = "'--after'") -> list[int]:
    """Return block numbers from `3,7,11`."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(
            f"{text!r} is not a list of block numbers; write for example 3,7,11", param_hint=option
        ) from None


@app.command()
def expand(
    base: Annotated[str, typer.Argument(help="The base: a directory or a hub id. It is only read.")],
    out: Annotated[Path, typer.Argument(help="The expanded checkpoint to create.")],
    blocks: Annotated[int | None, typer.Option(help="Number of new blocks.")] = None,
    placement: Annotated[str, typer.Option(help="interleaved, suffix or prefix.")] = "interleaved",
    groups: Annotated[int | None, typer.Option(help="Groups the base is cut into (interleaved).")] = None,
    after: Annotated[
        str | None, typer.Option(help="Blocks to stand on instead, e.g. 3,7 (-1: the bottom).")
    ] = None,
    init: Annotated[
        str, typer.Option(help="copy; or, of the block and the one above it: average, transport (aligned).")
    ] = "copy",
    zero: Annotated[
        str, typer.Option(help="What is zero, so that they add nothing: writes (the paper), reads or norms.")
    ] = "writes",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be written; write nothing.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT.")] = False,
    shard_size: Annotated[
        str | None, typer.Option(help="Cut weights into files of this size, e.g. 5GB. Default: as the base.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Add new blocks to a base: an ordinary checkpoint, exactly as before."""
    from deepen.checkpoint import check_free, resolve_base
    from deepen.expansion import check_space, prepare_expansion, write_checkpoint

    start = time.perf_counter()
    chosen_after = parse_after(after) if after is not None else None
    size = parse_size(shard_size) if shard_size is not None else None
    check_free(out, overwrite=overwrite)
    prepared = prepare_expansion(
        resolve_base(base),
        blocks=blocks,
        placement=placement,  # type: ignore[arg-type]  # plan_layout refuses others, with help
        groups=groups,
        after=chosen_after,
        init=init,  # type: ignore[arg-type]  # the same
        zero=zero,  # type: ignore[arg-type]  # the same
        shard_size=size,
        name=base,
    )
    for warning in prepared.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if dry_run:
        check_space(out, prepared.plan.bytes_needed)
        _report_plan(prepared, as_json)
        return
    with progress_bar("expanding") as progress:
        result = write_checkpoint(prepared, out, overwrite=overwrite, progress=progress, start=start)
    _report(prepared, result, as_json)


def _report_plan(prepared: "PreparedCheckpoint", as_json: bool) -> None:
    facts = {
        "dry_run": True,
        "new_blocks": prepared.expansion.new_blocks,
        "parameters": prepared.parameters,
        "base_parameters": prepared.base.parameters,
        "bytes_written": prepared.plan.bytes_written,
        "files": {file.name: file.size for file in prepared.plan.files},
        "warnings": prepared.warnings,
    }
    if as_json:
        print_json(facts)
        return
    _print_layout(prepared)
    print(f"would write {human_bytes(prepared.plan.bytes_written)}; weight files: {len(prepared.plan.files)}")


def _report(prepared: "PreparedCheckpoint", result: "ExpandResult", as_json: bool) -> None:
    if as_json:
        print_json({**vars(result)})
        return
    _print_layout(prepared)
    print(f"{result.directory}: {human_bytes(result.bytes_written)} written in {result.seconds:.1f} s")


def _print_layout(prepared: "PreparedCheckpoint") -> None:
    layout, before, total = prepared.layout, prepared.base.parameters, prepared.parameters
    print(layout.draw())
    print(
        f"{layout.base_blocks} blocks + {len(layout.new_blocks)} new = {layout.depth}; parameters "
        f"{human_count(before)} + {human_count(total - before)} = {human_count(total)}"
    )
    for block in layout.new_blocks:
        place = f"after base block {block.after}" if block.after >= 0 else "at the bottom"
        zero = "" if block.zero == "writes" else f"; zero: its {block.zero}"
        print(f"  block {block.index} is new, {place}, {_origin(block)}{zero}")


def _origin(block: "NewBlock") -> str:
    if block.init == "copy":
        return f"a copy of base block {block.copy_of}"
    aligned = ", aligned by transport" if block.init == "transport" else ""
    return f"the average of base blocks {block.copy_of} and {block.copy_of + 1}{aligned}"
