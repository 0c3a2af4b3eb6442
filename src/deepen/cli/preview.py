"""Training windows in words and colours."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from rich.console import Console
from rich.text import Text

from deepen.cli.output import human_count
from deepen.config import Recipe
from deepen.data.corpus import Corpus
from deepen.data.preview import Example, preview
from deepen.pipeline.plan import windows_per_step
from deepen.pipeline.reporter import Reporter
from deepen.pipeline.texts import Texts, corpus_cache, prepare_texts
from deepen.report import PreviewPiece, PreviewWindow


@dataclass(frozen=True)
class Shown:
    """What a preview shows.

    Attributes:
        examples: the windows of one step.
        facts: about all there are.
        lines: the facts in words.
    """

    examples: list[Example]
    facts: dict[str, Any]
    lines: list[str]


def preview_texts(recipe: Recipe, tokenizer: Any, step: int, reporter: Reporter) -> Shown:
    """Look at a step of training on texts, counted from 0."""
    texts = prepare_texts(recipe, tokenizer, corpus_cache(recipe), reporter)
    data, train = recipe.training()
    labels = [source.label for source in data.sources]
    facts = describe_sources(recipe, texts, texts.corpora)
    examples = preview(
        texts.mixture, labels, step=step, windows=windows_per_step(train, data.sequence_length)
    )
    return Shown(examples, facts, list(packing_lines(facts)))


def describe_sources(recipe: Recipe, texts: Texts | None, corpora: Sequence[Corpus | None]) -> dict[str, Any]:
    """Describe the corpora that are ready, how they are packed, and what the checks found."""
    data, train = recipe.training()
    names = [source.label for source in data.sources]
    if texts is None:
        ready = [corpus is not None for corpus in corpora]
        return {"sources": [{"name": n, "ready": r} for n, r in zip(names, ready, strict=True)]}
    epochs, counts = train.epochs, texts.mixture.packing_counts()
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
        "packing": data.packing,
        "document_masks": data.document_masks,
        "windows_per_epoch": texts.mixture.windows_per_epoch,
        "epochs": epochs,
        "steps": texts.mixture.steps(epochs, windows_per_step(train, data.sequence_length))
        if epochs
        else None,
        "findings": findings,
    }


def packing_lines(facts: dict[str, Any]) -> Iterator[str]:
    """Say how each source is packed, and what an epoch is."""
    for source in facts["sources"]:
        count = source["packing"]
        yield (
            f"{source['name']}: {human_count(source['tokens'])} tokens, {source['documents']:,} documents "
            f"({count.cut / count.documents:.1%} cut), {count.windows:,} windows, "
            f"{source['heldout_documents']:,} documents held out, "
            f"{count.padding / count.places:.2%} padding, {count.trained / count.places:.2%} trained"
        )
    masks = "document masks" if facts["document_masks"] else "no document masks"
    asked = f" ({facts['epochs']:g}: {facts['steps']:,} steps)" if facts["steps"] else ""
    yield f"an epoch is {facts['windows_per_epoch']:,} windows{asked}; packing {facts['packing']}, {masks}"


def print_example(example: Example, number: int, tokenizer: Any) -> None:
    """Print a window: a colour a document, a bar before each, grey or dim what is not trained."""
    window = describe_window(example, number, tokenizer)
    text = Text()
    for piece in window.pieces:
        text.append("▌" if piece.begins else "", style="bold white")
        style = ("cyan", "yellow")[piece.document % 2]
        if not piece.trained:
            # Of a text the few ids that are not trained stand out; of a conversation most of them are not.
            style = "bright_black" if example.stage == "sft" else f"{style} dim underline"
        text.append(piece.text, style=style)
    if window.padding:
        text.append(f"▌[padding × {window.padding}]", style="dim")
    console = Console(highlight=False, soft_wrap=True)
    console.print(window.title, style="bold")
    console.print(text)
    console.print()


def describe_window(example: Example, number: int, tokenizer: Any) -> PreviewWindow:
    """Return a window in words."""
    documents = len(example.starts) - (example.padding > 0)
    noun = "conversation" if example.stage == "sft" else "document"
    counted = f"1 {noun}" if documents == 1 else f"{documents} {noun}s"
    counted += "" if example.stage == "sft" else " or pieces of one"
    pieces = tuple(
        PreviewPiece(
            text=tokenizer.decode(example.token_ids[begin:end]),
            tokens=end - begin,
            trained=bool(example.trained[begin]),
            document=sum(start <= begin for start in example.starts),
            begins=begin in example.starts,
        )
        for begin, end in _spans(example)
    )
    title = (
        f"window {number}: {example.source} {example.window}, {counted}, "
        f"{sum(example.trained)} of {len(example.token_ids) - 1} targets trained"
    )
    return PreviewWindow(title=title, pieces=pieces, padding=example.padding)


def _spans(example: Example) -> list[tuple[int, int]]:
    """Cut a window where a document begins and where trained and untrained ids meet; padding is left out."""
    end = len(example.token_ids) - example.padding
    changes = [i for i in range(1, end) if example.trained[i] != example.trained[i - 1]]
    edges = sorted({0, end, *changes, *(start for start in example.starts if start < end)})
    return list(pairwise(edges))
