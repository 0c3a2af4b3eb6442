"""The model between two tasks: opened to be trained on, saved, and found again by those who evaluate it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch import nn
from transformers import PreTrainedModel

from deepen.checkpoint import Checkpoint
from deepen.config import ContinualRecipe, ExpandSection, SequenceMethod
from deepen.errors import CheckFailed
from deepen.methods import Blocks, Full, Lora, Method
from deepen.methods.method import widen
from deepen.model import compare_probes, insert_blocks, live_fingerprint, load, probe_logits
from deepen.model.structure import blocks_of, family_of
from deepen.pipeline.placement import place_blocks

ADAPTER: Final = "adapter"
MODEL: Final = "model"
PACK: Final = "blocks"


@dataclass(frozen=True, kw_only=True)
class Learner:
    """A model about to learn a task.

    Attributes:
        model: in hand.
        method: how it is adapted.
        parameters: what trains, by name.
        base: the files it was loaded from.
        autocast: dtype of the compute where it is not the weights' own.
        merges: whether what trained becomes base for the task after.
    """

    model: PreTrainedModel
    method: Method
    parameters: dict[str, nn.Parameter]
    base: Checkpoint
    autocast: torch.dtype | None
    merges: bool

    def save(self, directory: Path) -> None:
        """Write what trained into a directory."""
        self.method.save(self.model, directory, self.base)
        if self.merges:
            self.method.merge(self.model, directory, self.base, None)


def open_learner(
    recipe: ContinualRecipe,
    asked: SequenceMethod,
    base: Path,
    before: Path | None,
    seed: int,
    device: torch.device,
) -> Learner:
    """Load the model as the task before left it, and set what trains.

    Args:
        recipe: of the study.
        asked: the method.
        base: directory of the base of the whole sequence.
        before: what the task before saved; None for the first task.
        seed: of what begins as random numbers.
        device: where it trains.

    Raises:
        CheckFailed: new blocks change what the model computes.
    """
    bf16 = recipe.precision == "bf16" or (recipe.precision == "auto" and device.type != "cpu")
    files = _files(asked, base, before)
    pack = before / PACK if before and asked.method == "blocks" and not asked.each_task else None
    wide = torch.float32 if asked.method == "full" or not bf16 else None
    model = load(files, pack, dtype=wide, device=device)
    torch.manual_seed(seed)
    method, parameters = _METHODS[asked.method](model, asked, before)
    return Learner(
        model=model,
        method=method,
        parameters=parameters,
        base=Checkpoint.open(files),
        autocast=torch.bfloat16 if bf16 else None,
        merges=asked.each_task,
    )


def saved_model(directory: Path) -> Path:
    """Return which part of what a task saved is evaluated: what `deepen evaluate` takes."""
    return next(path for name in (MODEL, ADAPTER, PACK) if (path := directory / name).is_dir())


def _files(asked: SequenceMethod, base: Path, before: Path | None) -> Path:
    """Return the checkpoint to load: that of the task before, if it left one; else the base."""
    return before / MODEL if before and (asked.method == "full" or asked.each_task) else base


def _full(
    model: PreTrainedModel, asked: SequenceMethod, before: Path | None
) -> tuple[Method, dict[str, nn.Parameter]]:
    method = Full()
    return method, method.prepare(model)


def _lora(
    model: PreTrainedModel, asked: SequenceMethod, before: Path | None
) -> tuple[Method, dict[str, nn.Parameter]]:
    """Add an adapter for the first task; the others train the same one on, as TRACE's LoRASeqFT does."""
    method = Lora(asked.lora)
    if before is None:
        return method, method.prepare(model)
    model.requires_grad_(False)
    model.load_adapter(str(before / ADAPTER), is_trainable=True)
    return method, widen({name: p for name, p in model.named_parameters() if p.requires_grad})


def _blocks(
    model: PreTrainedModel, asked: SequenceMethod, before: Path | None
) -> tuple[Method, dict[str, nn.Parameter]]:
    method = Blocks()
    if (before is None or asked.each_task) and asked.expand:
        _insert(model, asked.expand)
    return method, method.prepare(model)


_METHODS: Final[
    dict[
        str,
        Callable[[PreTrainedModel, SequenceMethod, Path | None], tuple[Method, dict[str, nn.Parameter]]],
    ]
] = {"full": _full, "lora": _lora, "blocks": _blocks}


def _insert(model: PreTrainedModel, expand: ExpandSection) -> None:
    before = probe_logits(model)
    depth = len(blocks_of(model, family_of(model)))
    insert_blocks(model, place_blocks(expand, depth, live_fingerprint(model)))
    found = compare_probes(before, probe_logits(model))
    if not found.identical:
        raise CheckFailed(
            "the expanded model is not the one before it "
            f"(largest difference of a logit: {found.max_abs_difference})"
        )
