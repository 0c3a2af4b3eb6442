"""What each new block of a model does to general and to domain text, as a record."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from transformers import PreTrainedModel

from deepen.checkpoint import write_file
from deepen.config import TextSet
from deepen.data.evaluation_text import EvaluationText
from deepen.errors import DataError
from deepen.evaluation.effects import describe_effects, measure_effects
from deepen.model import expansion_of
from deepen.pipeline.directory import RunDirectory
from deepen.pipeline.losses import load_text_sets
from deepen.pipeline.reporter import Reporter, Silent
from deepen.pipeline.subject import find_subject, open_run_recipe
from deepen.pipeline.texts import load_tokenizer
from deepen.records import BlockEffects, EffectsRecord, Role, capture_provenance
from deepen.report import write_report

EFFECTS_TOKENS: Final = 20_000
NAMED_TOKENS: Final = 8


@dataclass(frozen=True, kw_only=True)
class EffectsRequest:
    """What is to be measured.

    Attributes:
        target: a run, a block pack, or an expanded checkpoint.
        base: where its base is, if not where it says.
        texts: what must be kept; without any text, a run's are those of its recipe.
        domain_texts: what was to be learned.
        max_tokens: tokens read of each text. Everything costs about two passes of the head a new block.
        named: tokens named of each block and text.
        device: where to run.
    """

    target: str
    base: str | None = None
    texts: tuple[TextSet, ...] = ()
    domain_texts: tuple[TextSet, ...] = ()
    max_tokens: int = EFFECTS_TOKENS
    named: int = NAMED_TOKENS
    device: torch.device


def explain_blocks(request: EffectsRequest, reporter: Reporter | None = None) -> EffectsRecord:
    """Measure what each new block of a model does; a run keeps the record, and its page shows it.

    Raises:
        DeepenError: the model or a text cannot be read, it has no new blocks, or no text was named.
    """
    reporter = reporter or Silent()
    named = _texts(request)
    subject = find_subject(request.target, request.base)
    reporter.stage("reading texts")
    texts = load_text_sets(subject.model.tokenizer, named, request.max_tokens)
    reporter.stage("loading the model")
    record = record_effects(
        subject.model.load(request.device),
        texts,
        load_tokenizer(subject.model.tokenizer),
        name=subject.model.name,
        named=request.named,
        reporter=reporter,
    )
    run = RunDirectory(Path(request.target))
    if run.recipe.is_file():
        write_file(run.effects, record.model_dump_json(indent=1) + "\n")
        write_report(run.root)
    return record


def record_effects(
    model: PreTrainedModel,
    texts: Sequence[EvaluationText],
    tokenizer: Any,
    *,
    name: str,
    named: int = NAMED_TOKENS,
    autocast: torch.dtype | None = None,
    reporter: Reporter,
) -> EffectsRecord:
    """Measure what each new block of a loaded model does to texts.

    Args:
        model: an expanded model.
        texts: all of each is read.
        tokenizer: that of the texts.
        name: of the model, for the record.
        named: tokens named of each block and text.
        autocast: dtype of the compute, or None for the parameters' own.
        reporter: told how far it is.

    Raises:
        PackError: the model has no active new blocks.
        DeepenError: as `measure_effects`.
    """
    expansion = expansion_of(model)
    blocks = expansion.layout.new_blocks
    found = []
    for text in texts:
        reporter.stage(f"what each new block does: {text.task}")
        indices = [block.index for block in blocks]
        found.append(
            measure_effects(model, indices, text.windows, autocast=autocast, progress=reporter.progress)
        )
    effects = describe_effects(texts, found, tokenizer.decode, most=named)
    return EffectsRecord(
        model=name,
        base=expansion.base,
        fingerprint=expansion.base_fingerprint.fast,
        layout=expansion.layout.draw(),
        blocks=[
            BlockEffects(block=block.index, after=block.after, texts=each)
            for block, each in zip(blocks, effects, strict=True)
        ],
        tokens={text.task: text.tokens for text in texts},
        provenance=capture_provenance(data={text.task: text.digest for text in texts}),
    )


def _texts(request: EffectsRequest) -> list[tuple[Role, TextSet]]:
    """Return the texts named, or those of a run's recipe."""
    general, domain = request.texts, request.domain_texts
    directory = Path(request.target)
    if not (general or domain) and directory.is_dir() and (recipe := open_run_recipe(directory)):
        general, domain = recipe.evaluate.general, recipe.evaluate.domain
    named: list[tuple[Role, TextSet]] = [("general", text) for text in general]
    named += [("domain", text) for text in domain]
    if not named:
        raise DataError("blocks effects: no text is given: say --text or --domain-text")
    return named
