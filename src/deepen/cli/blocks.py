from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deepen.cli import after_training
from deepen.cli import switch as switching
from deepen.cli.apps import new_app
from deepen.cli.output import human_bytes, human_count, print_json, progress_bar

if TYPE_CHECKING:
    from deepen.expansion import ExpandResult

app = new_app("Block packs: the new blocks alone, tied to their base.")

Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace OUT.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
ShardSize = Annotated[
    str | None, typer.Option(help="Cut weights into files of this size, e.g. 5GB. Default: as the base.")
]
Base = Annotated[str, typer.Argument(help="The pack's base: a directory or a hub id.")]
Pack = Annotated[str, typer.Argument(help="The block pack: a directory or a hub id.")]
Expanded = Annotated[Path, typer.Argument(help="The expanded checkpoint.")]


@app.command()
def extract(
    expanded: Expanded,
    out: Annotated[Path, typer.Argument(help="The block pack to create.")],
    pack: Annotated[
        str | None, typer.Option(help="Only this one of the packs that were stacked, by its name.")
    ] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Write the new blocks of an expanded checkpoint as a pack."""
    from deepen.blocks import extract_pack

    with progress_bar("extracting") as progress:
        result = extract_pack(expanded, out, pack=pack, overwrite=overwrite, progress=progress)
    if as_json:
        print_json({**vars(result)})
    else:
        print(f"{out}: {count_blocks(len(result.new_blocks))}, {human_bytes(result.bytes_written)}")


@app.command()
def attach(base: Base, pack: Pack, as_json: Json = False) -> None:
    """Check that a pack fits a base; nothing is written."""
    from deepen.blocks import fit_pack
    from deepen.checkpoint import resolve_base

    fit = fit_pack(resolve_base(base), pack)
    use = {
        "python": f"deepen.load({base!r}, {pack!r})",
        "merge": f"deepen blocks merge {base} {pack} OUT",
    }
    if as_json:
        print_json({"fits": True, **vars(fit), "use": use})
        return
    print(fit.layout.draw())
    print(f"{pack} fits {base}:")
    print(f"  fingerprint  {fit.fingerprint[:16]}… is the base's, every tensor (samples of large ones)")
    print(
        f"  tensors      {fit.tensors} of {count_blocks(len(fit.layout.new_blocks))} have the base's shapes "
        f"and dtypes ({human_count(fit.parameters)} parameters, {', '.join(fit.dtypes)})"
    )
    print(f"use it in Python:      model = {use['python']}")
    print(f"or as a checkpoint:    {use['merge']}")


@app.command()
def merge(
    base: Base,
    pack: Pack,
    out: Annotated[Path, typer.Argument(help="The expanded checkpoint to create.")],
    overwrite: Overwrite = False,
    shard_size: ShardSize = None,
    as_json: Json = False,
) -> None:
    """Write base and pack as one ordinary checkpoint."""
    from deepen.blocks import merge_pack
    from deepen.checkpoint import resolve_base

    size = _size(shard_size)
    with progress_bar("merging") as progress:
        result = merge_pack(
            resolve_base(base), pack, out, overwrite=overwrite, shard_size=size, progress=progress
        )
    _report_written(result, as_json)


@app.command()
def unmerge(
    expanded: Expanded,
    out: Annotated[Path, typer.Argument(help="The base to create.")],
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Take the latest new blocks off: the base, byte for byte."""
    from deepen.blocks import unmerge as take_off

    with progress_bar("taking off") as progress:
        result = take_off(expanded, out, overwrite=overwrite, progress=progress)
    if as_json:
        print_json({**vars(result)})
        return
    what = (
        "byte for byte" if result.byte_identical else f"except that {', '.join(result.differing)} may differ"
    )
    print(f"{out}: the base, {what}; {count_blocks(len(result.removed))} taken off")


@app.command()
def stack(
    base: Annotated[str, typer.Argument(help="The base of all packs: a directory or a hub id.")],
    out: Annotated[Path, typer.Argument(help="The expanded checkpoint to create.")],
    packs: Annotated[
        list[str],
        typer.Argument(help="The packs, bottom to top where they stand on one block: FIRST is lowest."),
    ],
    overwrite: Overwrite = False,
    shard_size: ShardSize = None,
    as_json: Json = False,
) -> None:
    """Write base and several packs as one ordinary checkpoint.

    Each pack was trained without the others: measure what they do together.
    """
    from deepen.blocks import stack_packs
    from deepen.checkpoint import resolve_base

    size = _size(shard_size)
    with progress_bar("stacking") as progress:
        result = stack_packs(
            resolve_base(base), packs, out, overwrite=overwrite, shard_size=size, progress=progress
        )
    _report_written(result, as_json)


@app.command()
def adopt(
    expanded: Annotated[Path, typer.Argument(help="A checkpoint that another tool expanded.")],
    base: Annotated[
        str | None, typer.Option(help="Its base, to hold it to: a directory or a hub id.")
    ] = None,
    new: Annotated[
        str | None,
        typer.Option(help="Which blocks are new, e.g. 4,9 (from 0). Default: they are looked for."),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="How to record the base. Default: as given, or as the config says.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace its expansion.json.")] = False,
    as_json: Json = False,
) -> None:
    """Find and record the new blocks of another tool's checkpoint.

    They are looked for against the base, or by their zeros before training. Only expansion.json is written.
    """
    import sys

    from deepen.blocks import adopt as find
    from deepen.checkpoint import resolve_base

    directory = resolve_base(base) if base is not None else None
    found = find(expanded, directory, _numbers(new), name or base, overwrite=overwrite)
    for warning in found.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if as_json:
        print_json({**vars(found)})
        return
    how = {"base": "held to its base", "zeros": "by their zeros", "list": "as you say"}[found.found_by]
    print(found.layout.draw())
    print(f"{expanded}: {len(found.layout.new_blocks)} of {found.layout.depth} blocks are new ({how})")
    for block in found.layout.new_blocks:
        print(f"  block {block.index} is new, a copy of base block {block.copy_of}")


@app.command()
def inspect(
    path: Annotated[str, typer.Argument(help="An expanded checkpoint or a block pack (or its hub id).")],
    base: Annotated[
        str | None, typer.Option(help="The base to compare with: a directory or a hub id.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show the new blocks and how far they have moved."""
    from deepen.blocks import inspect_blocks
    from deepen.checkpoint import resolve_base

    facts = inspect_blocks(path, resolve_base(base) if base is not None else None)
    if as_json:
        print_json({**vars(facts)})
        return
    from deepen.cli.inspection import show

    show(path, facts)


@app.command()
def push(
    pack: Annotated[Path, typer.Argument(help="The block pack.")],
    repo: Annotated[str, typer.Argument(help="Where to on the hub, e.g. someone/law-blocks.")],
    private: Annotated[bool, typer.Option("--private", help="Create it as a private one.")] = False,
    as_json: Json = False,
) -> None:
    """Push a pack to the hub, with a model card.

    Log in first: hf auth login.
    """
    from deepen.blocks import push_pack

    url = push_pack(pack, repo, private=private)
    if as_json:
        print_json({"repo": repo, "url": url})
    else:
        print(url)


for _command in (
    after_training.prune,
    after_training.damp,
    after_training.average,
    after_training.worth,
    after_training.effects,
    switching.switch,
):
    app.command()(_command)


def count_blocks(count: int) -> str:
    """Return `1 new block`, `2 new blocks`."""
    return f"{count} new block{'s' if count != 1 else ''}"


def _size(text: str | None) -> int | None:
    from deepen.cli.expand import parse_size

    return parse_size(text) if text is not None else None


def _numbers(text: str | None) -> list[int] | None:
    from deepen.cli.expand import parse_after

    return parse_after(text, "'--new'") if text is not None else None


def _report_written(result: "ExpandResult", as_json: bool) -> None:
    if as_json:
        print_json({**vars(result)})
        return
    from deepen.expansion import MANIFEST_NAME, read_expansion

    if (result.directory / MANIFEST_NAME).is_file():
        print(read_expansion(result.directory).layout.draw())
    else:
        print(f"the pack's new rows stand in its tables, so it has no {MANIFEST_NAME}: keep the pack")
    print(f"{result.directory}: {human_bytes(result.bytes_written)} written in {result.seconds:.1f} s")
