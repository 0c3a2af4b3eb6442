import sys
from pathlib import Path
from typing import Annotated

import typer

from deepen.cli.apps import new_app
from deepen.cli.output import human_bytes, human_count, print_json, progress_bar

app = new_app("Other projects' models as ordinary Hugging Face directories.")


@app.callback()
def _import() -> None:
    pass


@app.command()
def llama2c(
    model: Annotated[Path, typer.Argument(help="The llama2.c file, version 0 or 1. It is only read.")],
    out: Annotated[Path, typer.Argument(help="The Hugging Face directory to create.")],
    tokenizer: Annotated[
        Path | None, typer.Option(help="llama2.c's tokenizer.bin or a SentencePiece tokenizer.model.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Write a llama2.c model as a Llama, weights bit by bit."""
    from deepen.interchange import import_llama2c

    with progress_bar("importing") as progress:
        result = import_llama2c(model, out, tokenizer, overwrite=overwrite, progress=progress)
    for warning in result.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if as_json:
        print_json({**vars(result)})
        return
    with_ = ", ".join(result.tokenizer) or "no tokenizer (name one with --tokenizer)"
    print(f"{out}: {human_count(result.parameters)} parameters, {human_bytes(result.bytes_written)}; {with_}")
