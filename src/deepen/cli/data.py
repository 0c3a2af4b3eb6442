import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deepen.cli.apps import new_app
from deepen.cli.output import human_count, print_json

if TYPE_CHECKING:
    from deepen.config import Recipe
    from deepen.data.corpus import Corpus
    from deepen.data.preview import Example
    from deepen.pipeline.texts import Texts

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
        from deepen.pipeline.texts import corpus_cache, load_tokenizer, prepare_pieces, prepare_texts

        tokenizer, cache = load_tokenizer(resolve_base(asked.base)), corpus_cache(asked)
        corpora: Sequence[Corpus | None] = [None]
        if piece:
            corpora = prepare_pieces(asked, tokenizer, cache, piece, reporter)
        texts = prepare_texts(asked, tokenizer, cache, reporter) if not piece or all(corpora) else None
    facts: dict[str, Any] = {"shard": shard, "ready": texts is not None, **_sources(asked, texts, corpora)}
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
    step: Annotated[int, typer.Option(min=1, help="Step of the run whose windows are shown.")] = 1,
    as_json: Json = False,
) -> None:
    """Show the tokens, the packing and the loss mask, as the model will see them."""
    from deepen.cli.display import display
    from deepen.config import load_recipe

    asked = load_recipe(recipe, settings or [])
    with display() as reporter:
        from deepen.checkpoint import resolve_base
        from deepen.data.preview import preview
        from deepen.pipeline.plan import windows_per_step
        from deepen.pipeline.texts import corpus_cache, load_tokenizer, prepare_texts

        tokenizer = load_tokenizer(resolve_base(asked.base))
        texts = prepare_texts(asked, tokenizer, corpus_cache(asked), reporter)
    labels = [source.label for source in asked.data.sources]
    size = windows_per_step(asked)
    examples = preview(texts.mixture, labels, step=step - 1, windows=size)[:windows]
    if as_json:
        print_json({"examples": examples, **_sources(asked, texts, texts.corpora)})
        return
    for number, example in enumerate(examples, start=1):
        _print_example(example, number, tokenizer)
    _print_packing(_sources(asked, texts, texts.corpora))


def _sources(recipe: "Recipe", texts: "Texts | None", corpora: "Sequence[Corpus | None]") -> dict[str, Any]:
    """Describe the corpora that are ready, how they are packed, and what the checks found."""
    names = [source.label for source in recipe.data.sources]
    if texts is None:
        ready = [corpus is not None for corpus in corpora]
        return {"sources": [{"name": n, "ready": r} for n, r in zip(names, ready, strict=True)]}
    from deepen.pipeline.plan import windows_per_step

    epochs, counts = recipe.train.epochs, texts.mixture.packing_counts()
    columns = zip(names, texts.corpora, texts.mixture.counts, counts, strict=True)
    sources = [
        {
            "name": name,
            "ready": True,
            "directory": str(corpus.directory),
            "digest": corpus.digest,
            "documents": corpus.documents,
            "tokens": corpus.tokens,
            "heldout_documents": corpus.heldout_documents,
            "windows_per_epoch": windows,
            "packing": count,
        }
        for name, corpus, windows, count in columns
    ]
    findings = texts.findings.to_json() if texts.findings else None
    return {
        "sources": sources,
        "packing": recipe.data.packing,
        "document_masks": recipe.data.document_masks,
        "windows_per_epoch": texts.mixture.windows_per_epoch,
        "epochs": epochs,
        "steps": texts.mixture.steps(epochs, windows_per_step(recipe)) if epochs else None,
        "findings": findings,
    }


def _print_prepared(facts: dict[str, Any]) -> None:
    if facts["ready"]:
        _print_packing(facts)
        return
    for source in facts["sources"]:
        print(f"{source['name']}: {'ready' if source['ready'] else 'waits for other pieces'}")


def _print_packing(facts: dict[str, Any]) -> None:
    for source in facts["sources"]:
        count = source["packing"]
        print(
            f"{source['name']}: {human_count(source['tokens'])} tokens, {source['documents']:,} documents "
            f"({count.cut / count.documents:.1%} cut), {count.windows:,} windows, "
            f"{count.padding / count.places:.2%} padding, {count.trained / count.places:.2%} trained"
        )
    masks = "document masks" if facts["document_masks"] else "no document masks"
    asked = f" ({facts['epochs']:g}: {facts['steps']:,} steps)" if facts["steps"] else ""
    print(f"an epoch is {facts['windows_per_epoch']:,} windows{asked}; packing {facts['packing']}, {masks}")


def _print_example(example: "Example", number: int, tokenizer: Any) -> None:
    """Print a window: a colour a document, a bar before each, dim what is not trained."""
    from rich.console import Console
    from rich.text import Text

    length = len(example.token_ids) - 1
    text = Text()
    for begin, end in _spans(example):
        text.append("▌" if begin in example.starts else "", style="bold white")
        style = ("cyan", "yellow")[sum(start <= begin for start in example.starts) % 2]
        style += "" if example.trained[begin] else " dim underline"
        text.append(tokenizer.decode(example.token_ids[begin:end]), style=style)
    if example.padding:
        text.append(f"▌[padding × {example.padding}]", style="dim")
    documents = len(example.starts) - (example.padding > 0)
    console = Console(highlight=False, soft_wrap=True)
    counted = "1 document" if documents == 1 else f"{documents} documents"
    console.print(
        f"window {number}: {example.source} {example.window}, {counted} or pieces of one, "
        f"{sum(example.trained)} of {length} targets trained",
        style="bold",
    )
    console.print(text)
    console.print()


def _spans(example: "Example") -> list[tuple[int, int]]:
    """Cut a window where a document begins and where trained and untrained ids meet; padding is left out."""
    end = len(example.token_ids) - example.padding
    changes = [i for i in range(1, end) if example.trained[i] != example.trained[i - 1]]
    edges = sorted({0, end, *changes, *(start for start in example.starts if start < end)})
    return list(pairwise(edges))
