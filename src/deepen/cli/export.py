from pathlib import Path
from typing import Annotated, Literal

import typer

from deepen.cli.apps import new_app
from deepen.cli.output import human_bytes, print_json, progress_bar

app = new_app("A finished model for elsewhere: llama.cpp, the hub, servers.")

Model = Annotated[str, typer.Argument(help="A checkpoint, a block pack, or the directory of a finished run.")]
Base = Annotated[str | None, typer.Option(help="Where a pack's base is; default: where the pack says.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@app.command()
def gguf(
    model: Model,
    out: Annotated[Path, typer.Argument(help="The GGUF file to create.")],
    type: Annotated[
        Literal["auto", "f32", "f16", "bf16", "q8_0"],
        typer.Option(help="Precision of the matrices; auto: the checkpoint's own."),
    ] = "auto",
    base: Base = None,
    converter: Annotated[
        Path | None,
        typer.Option(help="llama.cpp's convert_hf_to_gguf.py, for families that deepen does not write."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT.")] = False,
    as_json: Json = False,
) -> None:
    """Write a model as one file for llama.cpp, and whatever is built on it."""
    _need_gguf()
    from deepen.export.gguf import export_gguf

    with progress_bar("exporting") as progress:
        result = export_gguf(
            model, out, base=base, type=type, converter=converter, overwrite=overwrite, progress=progress
        )
    if as_json:
        print_json({**vars(result)})
    else:
        print(f"{out}: {result.architecture}, {result.type}, {human_bytes(result.bytes_written)}")


@app.command()
def hub(
    model: Model,
    repository: Annotated[str, typer.Argument(help="Where to: someone/something. Created if not there.")],
    private: Annotated[bool, typer.Option("--private", help="Create it as a private one.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only list what would be pushed; nothing leaves the machine.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Push a model or a block pack to the Hugging Face hub."""
    from deepen.export.hub import plan_upload, push_checkpoint

    upload = plan_upload(model, repository)
    url = None if dry_run else push_checkpoint(model, repository, private=private)
    if as_json:
        print_json({**vars(upload), "bytes": upload.bytes, "url": url})
        return
    for name, size in upload.files.items():
        print(f"{human_bytes(size):>10}  {name}")
    print(f"{human_bytes(upload.bytes):>10}  {url or f'would go to {repository}'}")


@app.command()
def serving(
    model: Annotated[Path, typer.Argument(help="The checkpoint's directory.")], as_json: Json = False
) -> None:
    """Check that servers load a checkpoint as it is, and say what to type."""
    from deepen.export.serving import check_serving

    found = check_serving(model)
    if as_json:
        print_json({**vars(found)})
        return
    print(f"{found.directory}: {found.architecture} of {found.blocks} blocks, an ordinary checkpoint")
    for server, command in found.commands.items():
        print(f"{server:>8}  {command}")


def _need_gguf() -> None:
    from importlib.util import find_spec

    from deepen.errors import OutputError

    if find_spec("gguf") is None:
        raise OutputError("the package gguf is not installed\npip install 'deepen[gguf]'")
