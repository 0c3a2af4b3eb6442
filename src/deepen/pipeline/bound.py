"""The general loss that a user allows: watched at every evaluation, with the last weights within it."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from deepen.errors import TrainingError
from deepen.pipeline.reporter import Reporter
from deepen.pipeline.trainee import Trainee
from deepen.records import EarlyStop
from deepen.training.checkpoints import newest_checkpoint, restore_checkpoint
from deepen.training.world import World


@dataclass(kw_only=True)
class Bound:
    """Watches general texts while a run trains.

    Attributes:
        limit: nats per token by which the loss of each may exceed the base's; None: by any.
        base: task -> the base's loss.
        general: the tasks watched.
        hold: keeps the weights after so many steps.
        broken: step, task and rise of what ended training, if anything has.
    """

    limit: float | None
    base: Mapping[str, float]
    general: Collection[str]
    hold: Callable[[int], None]
    broken: tuple[int, str, float] | None = None

    def enough(self) -> bool:
        """Whether the bound is broken."""
        return self.broken is not None

    def check(self, step: int, nats: Mapping[str, float]) -> None:
        """Take an evaluation after `step` steps: task -> nats per token."""
        if self.limit is None:
            return
        rises = {task: nats[task] - self.base[task] for task in self.general}
        worst = max(rises, key=lambda task: rises[task])
        if rises[worst] <= self.limit:
            self.hold(step)
        else:
            self.broken = step, worst, rises[worst]


def take_back(
    bound: Bound,
    held: Path,
    trainee: Trainee,
    optimizer: torch.optim.Optimizer,
    identity: Mapping[str, Any],
    world: World,
    reporter: Reporter,
) -> EarlyStop | None:
    """Go back to the last weights within the bound, if it was broken; return what happened.

    Raises:
        TrainingError: they cannot be read any more.
    """
    if bound.broken is None or bound.limit is None:
        return None
    step, text, rise = bound.broken
    saved, _ = world.first(lambda: newest_checkpoint(held))
    if saved is None:
        raise TrainingError(f"{held}: the weights within train.max_general_loss are gone; start anew")
    restore_checkpoint(saved, trainee.parameters, optimizer, identity=identity, world=world)
    reporter.note(
        f"stopped after step {step}: {text} rose by {rise:.4f} nats per token, {bound.limit:g} is allowed; "
        f"the result is of step {saved.step}"
    )
    return EarlyStop(step=step, kept=saved.step, text=text, rise=rise, bound=bound.limit)
