"""What a run is anchored to: the text, written by the base or given, and the base itself."""

from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from deepen.config import AnchorSection
from deepen.data.batches import Mixture
from deepen.data.build import META
from deepen.data.corpus import Corpus
from deepen.data.tokens import digest_of, encode, end_of_text, token_dtype, tokenizer_digest
from deepen.data.written import write_written
from deepen.errors import TrainingError
from deepen.methods.base import base_inside
from deepen.model import load
from deepen.model.write import write_documents
from deepen.pipeline.plan import RunPlan
from deepen.pipeline.reporter import Reporter
from deepen.pipeline.texts import corpus_cache, prepare_general
from deepen.pipeline.trainee import Trainee
from deepen.training.anchor import Anchor, BaseOf
from deepen.training.parallel import sharded
from deepen.training.prefix import Prefix, find_prefix
from deepen.training.world import World

_FORMAT_VERSION = 1


def prepare_anchor(
    plan: RunPlan,
    model: PreTrainedModel,
    autocast: torch.dtype | None,
    tokenizer: Any,
    world: World,
    reporter: Reporter,
) -> Mixture | None:
    """Return the windows that a run is anchored on; None where it has no anchor.

    What the base writes lies in `CACHE/written/KEY`, a corpus. KEY hashes all that decides it: base, seed,
    numbers, precision, device and libraries.

    Args:
        plan: the run.
        model: the base, as it was loaded.
        autocast: dtype of the compute, or None for the parameters' own.
        tokenizer: of the base.
        world: the processes of the run; the first one prepares.
        reporter: told what goes on.

    Raises:
        DataError: a text of `data.anchor` is missing or malformed.
        OutputError: the cache cannot be written.
    """
    section = plan.train.anchor
    if section is None:
        return None
    data, _ = plan.recipe.training()
    if section.source == "general":
        cache = corpus_cache(plan.recipe)
        general = world.first_then_rest(lambda: prepare_general(plan.recipe, tokenizer, cache, reporter))
        corpora = list(zip(general, (source.weight for source in data.anchor), strict=True))
    else:
        where = world.first(lambda: _written(plan, section, model, autocast, tokenizer, reporter))
        corpora = [(Corpus(where), 1.0)]
        reporter.note(f"held to {corpora[0][0].tokens:,} tokens that the base wrote: {where}")
    return Mixture(
        corpora,
        data.sequence_length,
        plan.train.seed,
        packing=data.packing,
        document_masks=data.document_masks,
    )


def open_anchor(
    plan: RunPlan, trainee: Trainee, mixture: Mixture | None, reporter: Reporter
) -> Anchor | None:
    """Make the anchor of a run, with a frozen copy of the base where the model does not hold it.

    Args:
        plan: the run.
        trainee: the model as it will train.
        mixture: from `prepare_anchor`.
        reporter: told of a copy.
    """
    section = plan.train.anchor
    if section is None or mixture is None:
        return None
    return Anchor(
        batch_at=mixture.batch,
        windows=plan.anchor_windows,
        weight=section.weight,
        base=_base_of(plan, trainee, reporter),
        prefix=_shared(trainee),
    )


def _written(
    plan: RunPlan,
    section: AnchorSection,
    model: PreTrainedModel,
    autocast: torch.dtype | None,
    tokenizer: Any,
    reporter: Reporter,
) -> Path:
    """Have the base write its text, unless it did so in an earlier run; return where it lies."""
    train, length = plan.train, plan.length
    tokens = min(section.tokens, plan.steps * plan.anchor_windows * length)
    key = digest_of(
        {
            "format": _FORMAT_VERSION,
            "base": plan.fingerprint,
            "tokenizer": tokenizer_digest(tokenizer),
            "draws": [train.seed, tokens, length, section.temperature],
            "precision": [str(autocast), str(model.dtype), train.quantise],
            "device": torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else "cpu",
            "libraries": [version(name) for name in ("torch", "transformers")],
        }
    )
    target = corpus_cache(plan.recipe) / "written" / key[:32]
    if not (target / META).is_file():
        reporter.stage("the base writes what it is held to")
        end = end_of_text(tokenizer)
        documents = write_documents(
            model,
            _frame(tokenizer, end),
            end,
            tokens=tokens,
            length=length,
            temperature=section.temperature,
            seed=train.seed,
            progress=lambda done, total: reporter.progress(done, total, "tokens"),
        )
        target.parent.mkdir(parents=True, exist_ok=True)
        with torch.autocast(model.device.type, dtype=autocast) if autocast else nullcontext():
            write_written(target, documents, token_dtype(tokenizer), key, f"written by {plan.recipe.base}")
    return target


def _frame(tokenizer: Any, end: int) -> list[int]:
    """Return the ids with which the tokenizer begins a document; none where it does not frame them."""
    ids = encode(tokenizer, [""])[0]
    while ids and ids[-1] == end and (len(ids) > 1 or end != tokenizer.bos_token_id):
        ids = ids[:-1]
    return ids


def _shared(trainee: Trainee) -> Prefix | None:
    """Return what model and base share below the first block that trains, if it can run once for both."""
    if sharded(trainee.root) or base_inside(trainee.method) is None:
        return None
    try:
        return find_prefix(trainee.model, trainee.autocast)
    except TrainingError:  # nothing lies below, or it cannot be passed by: it runs twice
        return None


def _base_of(plan: RunPlan, trainee: Trainee, reporter: Reporter) -> BaseOf:
    inside = base_inside(trainee.method)
    if inside is not None:
        return inside
    dtype, device = None if trainee.autocast else torch.float32, trainee.model.device
    copy = load(plan.base.checkpoint.directory, dtype=dtype, device=device).requires_grad_(False)
    size = sum(parameter.numel() * parameter.element_size() for parameter in copy.parameters())
    reporter.note(
        f"method {trainee.method.name} changes the base: a frozen copy of it is held beside the model, "
        f"{size / 1e6:,.1f} MB"
    )
    return lambda _: nullcontext(copy)
