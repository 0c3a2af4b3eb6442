"""How much each block of a base matters to general and to domain text, as a record."""

from dataclasses import dataclass

import torch

from deepen.checkpoint import fast_fingerprint, resolve_base
from deepen.config import TextSet
from deepen.errors import DataError
from deepen.evaluation.importance import cosines, gradient_importance, losses_without
from deepen.expansion import open_base
from deepen.model import load
from deepen.model.structure import blocks_of, family_of
from deepen.pipeline.losses import load_text_sets
from deepen.pipeline.reporter import Reporter, Silent
from deepen.records import BlockImportance, ImportanceRecord, Role, capture_provenance


@dataclass(frozen=True, kw_only=True)
class ImportanceRequest:
    """What is to be measured.

    Attributes:
        model: the base: a directory or a hub id.
        texts: what must be kept.
        domain_texts: what is to be learned; may be empty.
        max_tokens: tokens read of each text. Every block costs one more pass through all of them.
        device: where to run.
    """

    model: str
    texts: tuple[TextSet, ...]
    domain_texts: tuple[TextSet, ...] = ()
    max_tokens: int = 20_000
    device: torch.device


def measure_importance(request: ImportanceRequest, reporter: Reporter | None = None) -> ImportanceRecord:
    """Skip every block of a base in turn, and measure what that costs general and domain text.

    Raises:
        DeepenError: the base or a text cannot be read, or no general text was named.
    """
    reporter = reporter or Silent()
    if not request.texts:
        raise DataError("inspect: no text to be kept: give --text")
    directory = resolve_base(request.model)
    fingerprint = fast_fingerprint(open_base(directory).checkpoint)
    reporter.stage("reading texts")
    named: list[tuple[Role, TextSet]] = [("general", text) for text in request.texts]
    named += [("domain", text) for text in request.domain_texts]
    texts = load_text_sets(directory, named, request.max_tokens)
    general = [window for text in texts if text.role == "general" for window in text.windows]
    domain = [window for text in texts if text.role == "domain" for window in text.windows]
    reporter.stage("loading the base")
    model = load(directory, device=request.device)
    blocks = list(blocks_of(model, family_of(model)))

    def note(done: int, total: int) -> None:
        reporter.progress(done, total, "passes")

    reporter.stage("skipping each block: general text")
    kept = losses_without(model, blocks, general, progress=note)
    learned = None
    if domain:
        reporter.stage("skipping each block: domain text")
        learned = losses_without(model, blocks, domain, progress=note)
    reporter.stage("angles and gradients")
    angles, gradients = cosines(model, blocks, general), gradient_importance(model, blocks, general)
    return ImportanceRecord(
        model=request.model,
        fingerprint=fingerprint,
        general=float(kept[0]),
        domain=float(learned[0]) if learned is not None else None,
        tokens={text.task: text.tokens for text in texts},
        blocks=[
            BlockImportance(
                block=number,
                general=float(kept[number + 1] - kept[0]),
                domain=float(learned[number + 1] - learned[0]) if learned is not None else None,
                cosine=float(angles[number]),
                gradient=float(gradients[number]),
            )
            for number in range(len(blocks))
        ],
        provenance=capture_provenance(data={text.task: text.digest for text in texts}),
    )
