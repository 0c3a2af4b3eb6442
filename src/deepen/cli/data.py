import time
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deepen.cli.apps import new_app
from deepen.cli.output import print_json

if TYPE_CHECKING:
    from deepen.data.corpus import Corpus
    from deepen.data.preview import Example


class Stage(StrEnum):
    """Parts of a run that train."""

    train = "train"
    sft = "sft"


app = new_app("Training texts: tokenise them ahead of a run, look at what the model will see.")

RecipeFile = Annotated[Path, typer.Argument(help="The recipe, a YAML file.")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", help="Set a key of the recipe, e.g. data.packing=best_fit.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@app.command()
def prepare(
    recipe: RecipeFile,
    settings: Settings = None,
    shard: Annotated[
        str | None, typer.Option(help="Only piece i of n, as in 1/8; the last one made joins them.")
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; default: data.workers.")] = None,
    as_json: Json = False,
) -> None:
    """Tokenise a recipe's sources into the cache and check them, ahead of a run."""
    from deepen.cli.display import display
    from deepen.config import load_recipe
    from deepen.data.pieces import parse_piece

    asked = load_recipe(recipe, [*(settings or []), *([f"data.workers={workers}"] if workers else [])])
    piece = parse_piece(shard) if shard is not None else None
    begin = time.monotonic()
    with display() as reporter:
        from deepen.checkpoint import resolve_base
        from deepen.cli.preview import describe_sources
        from deepen.pipeline.texts import corpus_cache, load_tokenizer, prepare_pieces, prepare_texts

        tokenizer, cache = load_tokenizer(resolve_base(asked.base)), corpus_cache(asked)
        corpora: Sequence[Corpus | None] = [None]
        if piece:
            corpora = prepare_pieces(asked, tokenizer, cache, piece, reporter)
        texts = prepare_texts(asked, tokenizer, cache, reporter) if not piece or all(corpora) else None
    facts: dict[str, Any] = {
        "shard": shard,
        "ready": texts is not None,
        **describe_sources(asked, texts, corpora),
    }
    facts["seconds"] = round(time.monotonic() - begin, 2)
    if as_json:
        print_json(facts)
    else:
        _print_prepared(facts)


@app.command("preview")
def show(
    recipe: RecipeFile,
    settings: Settings = None,
    windows: Annotated[int, typer.Option(min=1, help="Windows to show.")] = 4,
    step: Annotated[int, typer.Option(min=1, help="Step of the stage whose windows are shown.")] = 1,
    stage: Annotated[
        Stage | None, typer.Option(help="Part of the run; default: sft if the recipe has it.")
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Write them as a page, too.")] = None,
    as_json: Json = False,
) -> None:
    """Show the tokens, the packing and the loss mask, as the model will see them."""
    from deepen.cli.display import display
    from deepen.config import load_recipe

    asked = load_recipe(recipe, settings or [])
    with display() as reporter:
        from deepen.checkpoint import resolve_base
        from deepen.cli.preview import preview_texts, print_example
        from deepen.cli.preview_sft import preview_conversations
        from deepen.pipeline.texts import load_tokenizer

        tokenizer = load_tokenizer(resolve_base(asked.base))
        if stage == Stage.sft or (stage is None and asked.sft):
            shown = preview_conversations(asked, tokenizer, step - 1, reporter)
        else:
            shown = preview_texts(asked, tokenizer, step - 1, reporter)
    examples = shown.examples[:windows]
    if html is not None:
        _write_page(html, examples, shown.lines, tokenizer)
    if as_json:
        print_json({"examples": examples, **shown.facts})
        return
    for number, example in enumerate(examples, start=1):
        print_example(example, number, tokenizer)
    print(*shown.lines, *([html] if html else []), sep="\n")


def _write_page(path: Path, examples: "Sequence[Example]", facts: Sequence[str], tokenizer: Any) -> None:
    from deepen.cli.preview import describe_window
    from deepen.report import write_preview_page

    windows = [
        describe_window(example, number, tokenizer) for number, example in enumerate(examples, start=1)
    ]
    write_preview_page(path, examples[0].stage, windows, facts)


def _print_prepared(facts: dict[str, Any]) -> None:
    from deepen.cli.preview import packing_lines

    if facts["ready"]:
        print(*packing_lines(facts), sep="\n")
        return
    for source in facts["sources"]:
        print(f"{source['name']}: {'ready' if source['ready'] else 'waits for other pieces'}")
