"""Windows of conversations, and what was made of the sets they are from."""

from collections.abc import Iterator
from typing import Any

from deepen.checkpoint import read_config, resolve_base
from deepen.cli.preview import Shown
from deepen.config import Recipe
from deepen.data.preview import preview
from deepen.errors import RecipeError
from deepen.pipeline.conversations import Conversations, prepare_sft
from deepen.pipeline.plan import window_length
from deepen.pipeline.reporter import Reporter
from deepen.pipeline.texts import corpus_cache


def preview_conversations(recipe: Recipe, tokenizer: Any, step: int, reporter: Reporter) -> Shown:
    """Look at a step of tuning on conversations, counted from 0."""
    section = recipe.sft
    if section is None:
        raise RecipeError("sft: the recipe has no such section to show; remove --stage sft")
    length = window_length(section, read_config(resolve_base(recipe.base)))
    found = prepare_sft(section, tokenizer, length, corpus_cache(recipe), reporter)
    labels = [one.label for one in section.data]
    examples = preview(found.mixture, labels, step=step, windows=section.batch, stage="sft")
    facts = _describe(labels, found)
    facts["steps"] = found.mixture.steps(section.epochs, section.batch)
    return Shown(examples, facts, list(_lines(facts)))


def _describe(labels: list[str], found: Conversations) -> dict[str, Any]:
    mixture = found.mixture
    columns = zip(labels, found.corpora, mixture.packing_counts(), strict=True)
    return {
        "template": found.template.name,
        "sequence_length": mixture.sequence_length,
        "sets": [
            {
                "name": name,
                "forms": corpus.forms,
                "digest": corpus.digest,
                "counts": corpus.counts,
                "packing": counts,
            }
            for name, corpus, counts in columns
        ],
        "windows_per_epoch": mixture.windows_per_epoch,
    }


def _lines(facts: dict[str, Any]) -> Iterator[str]:
    for one in facts["sets"]:
        counts, packing = one["counts"], one["packing"]
        for line in one["forms"]:
            yield f"{one['name']}: {line}"
        yield f"{one['name']}: {counts.line()}"
        yield (
            f"{one['name']}: {counts.median:,} tokens in the middle conversation, 95% have at most "
            f"{counts.most:,}, the longest {counts.longest:,}; {packing.windows:,} windows of "
            f"{facts['sequence_length']:,}, {packing.padding / packing.places:.2%} padding, "
            f"{packing.trained / packing.places:.2%} trained"
        )
    yield (
        f"chat template: {facts['template']}; an epoch is {facts['windows_per_epoch']:,} windows, "
        f"the run {facts['steps']:,} steps"
    )
