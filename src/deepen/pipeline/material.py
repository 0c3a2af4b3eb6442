"""What a run reads: the batches it trains on, and the texts on which it is scored."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from deepen.checkpoint import write_file
from deepen.data.batches import Mixture
from deepen.data.chat import ChatTemplate
from deepen.data.evaluation_text import EvaluationText
from deepen.data.findings import Findings
from deepen.pipeline.conversations import Conversations, prepare_sft
from deepen.pipeline.plan import Outline, RunPlan, window_length
from deepen.pipeline.reporter import Reporter
from deepen.pipeline.texts import (
    Texts,
    corpus_cache,
    load_evaluation,
    load_tokenizer,
    prepare_texts,
    tokenise_sources,
)
from deepen.training.world import World

# Times that a text may be seen before it is said: few texts are learned by heart.
_MANY_TIMES: Final = 10


@dataclass(frozen=True, kw_only=True)
class Material:
    """What a run reads.

    Attributes:
        tokenizer: of the base.
        mixture: where batches come from.
        texts: to be scored; the same in training and in the tuning that follows it.
        digests: source -> key of its content.
        template: of the conversations; None for training on texts.
        findings: of the checks of the texts, if the recipe asks for any.
    """

    tokenizer: Any
    mixture: Mixture
    texts: list[EvaluationText]
    digests: Mapping[str, str]
    template: ChatTemplate | None
    findings: Findings | None

    def write_findings(self, path: Path) -> None:
        """Write what the checks found, if there were any."""
        if self.findings:
            found = {"line": self.findings.line(), **self.findings.to_json()}
            write_file(path, json.dumps(found, indent=1) + "\n")


def prepare_material(outline: Outline, world: World, reporter: Reporter) -> Material:
    """Read all that the recipe names, also for tuning later: what is wrong shows before training.

    Raises:
        DataError: a text or a set of conversations is missing or malformed.
        OutputError: the cache cannot be written.
    """
    recipe, cache = outline.recipe, corpus_cache(outline.recipe)
    tokenizer = load_tokenizer(outline.base.checkpoint.directory)
    texts: Texts | None = None
    corpora = []
    if recipe.train:
        texts = world.first_then_rest(lambda: prepare_texts(recipe, tokenizer, cache, reporter))
        corpora = texts.corpora
    elif recipe.data and recipe.data.heldout:
        data = recipe.data
        corpora = world.first_then_rest(
            lambda: tokenise_sources(data.sources, data.heldout, data.workers, tokenizer, cache, reporter)
        )
    talk = world.first_then_rest(lambda: _conversations(outline, tokenizer, cache, reporter))
    held = talk.heldout(tokenizer, recipe.evaluate.max_tokens) if talk else []
    length = recipe.data.sequence_length if recipe.data else outline.length
    scored = world.first_then_rest(lambda: load_evaluation(recipe, tokenizer, cache, corpora, length))
    chosen = texts if outline.name == "train" else talk
    assert chosen is not None  # the stage is named for a section of the recipe
    return Material(
        tokenizer=tokenizer,
        mixture=chosen.mixture,
        texts=scored + held,
        digests=dict(zip(outline.labels, (each.digest for each in chosen.corpora), strict=True)),
        template=talk.template if talk and outline.name == "sft" else None,
        findings=texts.findings if texts else None,
    )


def _conversations(outline: Outline, tokenizer: Any, cache: Path, reporter: Reporter) -> Conversations | None:
    section = outline.recipe.sft
    if section is None:
        return None
    length = window_length(section, outline.base.checkpoint.config)
    return prepare_sft(section, tokenizer, length, cache, reporter)


def note_repeats(plan: RunPlan, mixture: Mixture, reporter: Reporter) -> None:
    """Say which sources are so small that the tokens asked for repeat them over and over."""
    seen = plan.steps * plan.windows / mixture.windows_per_epoch
    for label, count, size in zip(plan.labels, mixture.counts, mixture.sizes, strict=True):
        if (times := seen * count / size) > _MANY_TIMES:
            reporter.note(
                f"{label}: all of it is seen {times:,.0f} times; give more text or fewer train.tokens"
            )
