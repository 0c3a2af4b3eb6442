from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from deepen.cli.apps import new_app
from deepen.cli.output import human_bytes, print_json, progress_bar

app = new_app("Pieces for another language or domain, added to a base before it is expanded.")


class Head(StrEnum):
    """How the rows of a head of its own begin."""

    parts = "parts"
    average = "average"


@app.callback()
def _vocabulary() -> None:
    pass


@app.command()
def extend(
    base: Annotated[str, typer.Argument(help="The base: a directory or a hub id. It is only read.")],
    out: Annotated[Path, typer.Argument(help="The extended checkpoint to create.")],
    text: Annotated[
        list[str], typer.Option(help="Text to learn from: a file, directory or glob; may be repeated.")
    ],
    measure: Annotated[
        list[str] | None, typer.Option(help="Text that is only measured; may be repeated.")
    ] = None,
    pieces: Annotated[int, typer.Option(min=1, help="Number of new pieces.")] = 1000,
    field: Annotated[
        str | None,
        typer.Option(help="Key of the text in a record. Default: text, or the turns of a conversation."),
    ] = None,
    head: Annotated[
        Head,
        typer.Option(help="Rows of a head of its own: mean of the replaced tokens' rows, or of all rows."),
    ] = Head.parts,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Learn new pieces and write the base with them, an ordinary checkpoint whose old rows are as before."""
    from deepen.checkpoint import resolve_base
    from deepen.cli.display import quiet_transformers
    from deepen.vocabulary import Text, extend_vocabulary

    quiet_transformers()
    texts = [Text(path=path, field=field) for path in text]
    texts += [Text(path=path, field=field, learned=False) for path in measure or ()]
    with progress_bar("writing") as progress:
        result = extend_vocabulary(
            resolve_base(base),
            out,
            texts,
            pieces=pieces,
            head=head.value,
            overwrite=overwrite,
            name=base,
            progress=progress,
        )
    record = result.vocabulary
    if as_json:
        print_json({**vars(result)})
        return
    print("tokens per character")
    for each in record.texts:
        per = [count / max(1, each.characters) for count in (each.tokens_before, each.tokens_after)]
        said = f"{each.documents_changed} of {each.documents} documents changed"
        print(f"  {each.path}: {per[0]:.4f} -> {per[1]:.4f} ({0 - each.saved:+.1%}), {said}")
    size = human_bytes(result.bytes_written)
    rows = f"{record.base_rows} rows + {len(record.pieces)} new"
    print(f"{out}: {rows}, {size} written in {result.seconds:.1f} s")
