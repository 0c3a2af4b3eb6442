"""What the loop is given, and what it tells."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from deepen.training.loss import Loss, summed_loss
from deepen.training.meters import BlockReport


class Batch(Protocol):
    """What one optimiser step reads; see `deepen.data.batches.Batch`."""

    @property
    def tokens(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Token ids [windows, length + 1]."""

    @property
    def sources(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Index of each window's source [windows]."""

    @property
    def positions(self) -> np.ndarray[Any, np.dtype[np.int64]] | None:
        """Position ids [windows, length] that part documents; None: the model's own."""

    @property
    def trained(self) -> np.ndarray[Any, np.dtype[np.bool_]] | None:
        """Which targets count [windows, length]; None: all."""

    @property
    def numbers(self) -> np.ndarray[Any, np.dtype[np.int64]] | None:
        """Number of each window among all there are [windows]; needed where their states are cached."""

    @property
    def trained_tokens(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Targets of each window that count [windows]."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The numbers of a training run.

    Attributes:
        steps: optimiser steps of the whole run.
        windows: windows in one step.
        micro_batch: windows in one forward pass.
        learning_rate: peak learning rate.
        schedule: shape after the warm-up.
        warmup: share of steps that warm up.
        final_learning_rate: end of the cosine as a share of the peak.
        clip: largest gradient norm, or None.
        autocast: dtype of the compute, or None for the parameters' own.
        evaluate_every: steps between evaluations.
        checkpoint_every: steps between checkpoints.
        loss: of (model, inputs, targets, positions), summed over targets.
    """

    steps: int
    windows: int
    micro_batch: int
    learning_rate: float
    schedule: Any
    warmup: float
    final_learning_rate: float
    clip: float | None
    autocast: torch.dtype | None
    evaluate_every: int
    checkpoint_every: int
    loss: Loss = summed_loss


@dataclass(frozen=True, kw_only=True)
class RateSpread:
    """The factors on the learning rate that a measurement gave, over all units.

    Attributes:
        least: of any unit.
        median: the lower one of the two in the middle, where the units are even in number.
        greatest: of any unit.
    """

    least: float
    median: float
    greatest: float


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """What one step measured.

    Attributes:
        step: optimiser steps done, this one included.
        loss: mean negative log-likelihood of the step's tokens before the update, nats per token.
        learning_rate: rate of the update.
        gradient_norm: norm over all trainable parameters before clipping.
        seconds: wall time of the step.
        sources: source -> tokens of it in the step that count in the loss.
        blocks: block -> what reached it and moved in it, for each in which something trains.
        anchor: mean divergence from the base on the step's anchor before the update, in nats per token; None
            without one.
        unit_rates: what a measurement just before the step gave units for rates; None where there was none.
    """

    step: int
    loss: float
    learning_rate: float
    gradient_norm: float
    seconds: float
    sources: Mapping[int, int]
    blocks: Mapping[int, BlockReport]
    anchor: float | None = None
    unit_rates: RateSpread | None = None


@dataclass(frozen=True, kw_only=True)
class Hooks:
    """What the loop calls; it knows nothing else of the world.

    Attributes:
        log: after every step.
        evaluate: with the number of steps done, when an evaluation is due; what all the steps made is the
            caller's to evaluate.
        save: with the number of steps done, when a checkpoint is due.
        stop: whether someone asked to stop.
        name_window: what a user calls a window, of the step (from 0) and its number in the batch.
        enough: whether training ends with the evaluation just made.
    """

    log: Callable[[StepReport], None]
    evaluate: Callable[[int], None]
    save: Callable[[int], None]
    stop: Callable[[], bool]
    name_window: Callable[[int, int], str] = lambda _, row: f"window {row}"
    enough: Callable[[], bool] = bool
