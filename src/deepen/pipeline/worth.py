"""What the new blocks of a model are worth on general and domain text, as a record."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from deepen.checkpoint import resolve_base
from deepen.config import TextSet
from deepen.errors import DataError, EvaluationError
from deepen.evaluation.heldout import score_windows
from deepen.evaluation.importance import contributions, nats_without
from deepen.evaluation.worth import Pool, choose_alpha, compare_pool, pool_texts
from deepen.model import bypass, damped, expansion_of, load
from deepen.model.structure import blocks_of, family_of
from deepen.pipeline.losses import load_text_sets
from deepen.pipeline.reporter import Reporter, Silent
from deepen.records import BlockWorth, PathPoint, Role, WorthRecord, capture_provenance

ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25)


@dataclass(frozen=True, kw_only=True)
class WorthRequest:
    """What is to be measured.

    Attributes:
        base: the base, or without a pack an expanded checkpoint: a directory or a hub id.
        pack: the block pack.
        texts: what must be kept.
        domain_texts: what was to be learned.
        alphas: points of the path; 0 and 1 are added.
        max_general_loss: largest rise of the general loss that the chosen point may have; None: no limit.
        max_tokens: tokens read of each text. Every new block and every point costs one pass through all.
        device: where to run.
    """

    base: str
    pack: str | None
    texts: tuple[TextSet, ...]
    domain_texts: tuple[TextSet, ...]
    alphas: tuple[float, ...] = ALPHAS
    max_general_loss: float | None = None
    max_tokens: int = 20_000
    device: torch.device


def measure_worth(request: WorthRequest, reporter: Reporter | None = None) -> WorthRecord:
    """Skip each new block, and walk from the base to the model: what general and domain text make of it.

    Raises:
        DeepenError: the model or a text cannot be read, it has no new blocks, or a number is out of range.
    """
    reporter = reporter or Silent()
    alphas = _checked(request)
    reporter.stage("reading texts")
    named: list[tuple[Role, TextSet]] = [("general", text) for text in request.texts]
    named += [("domain", text) for text in request.domain_texts]
    texts = load_text_sets(resolve_base(request.base), named, request.max_tokens)
    pools = [pool_texts(texts, "general"), pool_texts(texts, "domain")]
    reporter.stage("loading the model")
    model = load(request.base, request.pack, device=request.device)
    expansion = expansion_of(model)
    blocks = _measure_blocks(model, pools, reporter)
    path = _measure_path(model, pools, alphas, reporter)
    chosen, rule = choose_alpha(path, request.max_general_loss)
    return WorthRecord(
        base=request.base,
        pack=request.pack or "",
        fingerprint=expansion.base_fingerprint.fast,
        layout=expansion.layout.draw(),
        blocks=blocks,
        path=path,
        max_general_loss=request.max_general_loss,
        chosen=chosen,
        rule=rule,
        tokens={text.task: text.tokens for text in texts},
        provenance=capture_provenance(data={text.task: text.digest for text in texts}),
    )


def _checked(request: WorthRequest) -> list[float]:
    """Return the points of the path, or refuse what cannot be measured before anything is read."""
    for texts, option in ((request.texts, "--text"), (request.domain_texts, "--domain-text")):
        if not texts:
            raise DataError(f"blocks worth: no text is given: say {option}")
    if odd := [alpha for alpha in request.alphas if not 0 <= alpha < math.inf]:
        raise EvaluationError(f"blocks worth: alpha is {odd[0]:g}; give numbers from 0 (the base) on")
    limit = request.max_general_loss
    if limit is not None and not 0 <= limit < math.inf:
        raise EvaluationError(f"blocks worth: max_general_loss is {limit:g}; give a number from 0 on")
    return sorted({0.0, 1.0, *request.alphas})


def _measure_blocks(model: PreTrainedModel, pools: Sequence[Pool], reporter: Reporter) -> list[BlockWorth]:
    layout = expansion_of(model).layout
    every = blocks_of(model, family_of(model))
    new = [every[block.index] for block in layout.new_blocks]
    metrics, shares = [], []
    for pool in pools:
        reporter.stage(f"skipping each new block: {pool.role} text")
        whole, *without = nats_without(
            model, new, pool.windows, progress=lambda done, total: reporter.progress(done, total, "passes")
        )
        metrics.append(compare_pool(pool, without, whole))
        shares.append(contributions(model, new, pool.windows).tolist())
    return [
        BlockWorth(
            block=block.index,
            after=block.after,
            general=metrics[0][number],
            domain=metrics[1][number],
            general_share=shares[0][number],
            domain_share=shares[1][number],
        )
        for number, block in enumerate(layout.new_blocks)
    ]


def _measure_path(
    model: PreTrainedModel, pools: Sequence[Pool], alphas: Sequence[float], reporter: Reporter
) -> list[PathPoint]:
    reporter.stage("from the base to the model")
    scores: list[list[NDArray[np.float64]]] = [[] for _ in pools]
    for number, alpha in enumerate(alphas):
        reporter.progress(number, len(alphas), "points")
        # At 0 the model is the base: the new blocks need not be run.
        with damped(model, alpha) if alpha else bypass(model):
            for pool, found in zip(pools, scores, strict=True):
                found.append(score_windows(model, pool.windows))
    general, domain = (compare_pool(pool, found, found[0]) for pool, found in zip(pools, scores, strict=True))
    return [
        PathPoint(alpha=alpha, general=one, domain=other)
        for alpha, one, other in zip(alphas, general, domain, strict=True)
    ]
