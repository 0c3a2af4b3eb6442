from pathlib import Path
from typing import Annotated

import typer

from deepen.cli.apps import new_app
from deepen.cli.output import human_bytes, human_count, print_json, progress_bar

app = new_app("Block packs: the new blocks alone, tied to their base.")

Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace OUT.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@app.command()
def merge(
    base: Annotated[str, typer.Argument(help="The pack's base: a directory or a hub id.")],
    pack: Annotated[Path, typer.Argument(help="The block pack.")],
    out: Annotated[Path, typer.Argument(help="The expanded checkpoint to create.")],
    overwrite: Overwrite = False,
    shard_size: Annotated[
        str | None, typer.Option(help="Cut weights into files of this size, e.g. 5GB. Default: as the base.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write base and pack as one ordinary checkpoint."""
    from deepen.blocks import merge_pack
    from deepen.checkpoint import resolve_base
    from deepen.cli.expand import parse_size

    size = parse_size(shard_size) if shard_size is not None else None
    with progress_bar("merging") as progress:
        result = merge_pack(
            resolve_base(base), pack, out, overwrite=overwrite, shard_size=size, progress=progress
        )
    if as_json:
        print_json({**vars(result)})
    else:
        print(f"{out}: {human_bytes(result.bytes_written)} written in {result.seconds:.1f} s")


@app.command()
def extract(
    expanded: Annotated[Path, typer.Argument(help="The expanded checkpoint.")],
    out: Annotated[Path, typer.Argument(help="The block pack to create.")],
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Write the new blocks of an expanded checkpoint as a pack."""
    from deepen.blocks import extract_pack

    with progress_bar("extracting") as progress:
        result = extract_pack(expanded, out, overwrite=overwrite, progress=progress)
    if as_json:
        print_json({**vars(result)})
    else:
        print(f"{out}: {len(result.new_blocks)} new blocks, {human_bytes(result.bytes_written)}")


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="A block pack or an expanded checkpoint.")],
    as_json: Json = False,
) -> None:
    """Show the new blocks, what they copy and their base."""
    from deepen.blocks import inspect_blocks

    facts = inspect_blocks(path)
    if as_json:
        print_json({**vars(facts)})
        return
    expansion = facts.expansion
    print(f"{path}: {facts.kind} of {expansion.base} ({expansion.family}, {expansion.base_blocks} blocks)")
    print(expansion.layout.draw())
    print(
        f"{len(expansion.new_blocks)} new blocks: {human_count(facts.parameters)} parameters, {facts.dtypes}"
    )
    print(f"base fingerprint (fast): {expansion.base_fingerprint.fast}")
