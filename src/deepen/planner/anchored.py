"""What other models add to a training step: the base that an anchor holds the model to, and a teacher."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from deepen.methods import build_method
from deepen.methods.base import base_inside
from deepen.model.structure import family_of
from deepen.planner.ghost import Ghost
from deepen.planner.job import Job
from deepen.training.anchor import Anchor, BaseOf, anchor_loss
from deepen.training.interface import Batch
from deepen.training.loss import Loss, summed_loss
from deepen.training.prefix import Prefix, frozen_below


def anchor_of(ghost: Ghost, job: Job, run: Callable[[], object]) -> Anchor | None:
    """Return what would hold a model without values to its base; None where nothing would.

    What model and base share is taken to run once, as it does on one device unless `find_prefix` refuses it.

    Args:
        ghost: with a copy of the base where the method changes it.
        job: what is trained.
        run: one forward pass of the model.
    """
    section = job.train.anchor
    if section is None:
        return None
    return Anchor(
        batch_at=_no_batch,
        windows=job.anchor_windows,
        weight=section.weight,
        base=base_of(ghost, job),
        prefix=_shared(ghost, run) if ghost.reference is None else None,
    )


def loss_of(job: Job, teacher: PreTrainedModel | None) -> Loss:
    """Return what a job makes small: the divergence from its teacher, where it has one."""
    section = job.train.teacher
    if teacher is None or section is None:
        return summed_loss
    return anchor_loss(lambda _: nullcontext(teacher), likelihood=section.cross_entropy)


def base_of(ghost: Ghost, job: Job) -> BaseOf:
    """Return the context in which an anchored model is its base."""
    if ghost.base_of is not None:
        return ghost.base_of
    if ghost.reference is not None:
        return lambda _: nullcontext(ghost.reference)
    inside = base_inside(build_method(job.train))
    assert inside is not None
    return inside


def _shared(ghost: Ghost, run: Callable[[], object]) -> Prefix | None:
    """Return what lies below the first block that trains; it is not proven that the rest needs no more."""
    blocks = ghost.blocks
    depth = frozen_below(blocks)
    left: list[Any] = []

    def note(module: nn.Module, given: Any, returned: Any) -> None:
        left.append(returned)

    hooks = [block.register_forward_hook(note) for block in blocks[:depth]]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    if not left:
        return None
    last: torch.Tensor = left[-1][0] if isinstance(left[-1], tuple) else left[-1]
    return Prefix(
        model=ghost.model,
        family=family_of(ghost.model),
        depth=depth,
        returned=tuple(len(each) if isinstance(each, tuple) else 0 for each in left),
        width=tuple(last.shape[2:]),
        dtype=last.dtype,
    )


def _no_batch(step: int, windows: int) -> Batch:
    raise AssertionError("a model without values reads no text")
