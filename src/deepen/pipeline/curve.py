"""The held-out losses of a run from its first step to its last: logged, and held to the bound."""

from collections.abc import Sequence
from dataclasses import dataclass

from deepen.data.evaluation_text import EvaluationText
from deepen.evaluation.heldout import Progress
from deepen.evaluation.record import nats_per_token
from deepen.pipeline.baseline import Losses
from deepen.pipeline.bound import Bound
from deepen.pipeline.log import RunLog
from deepen.pipeline.plan import RunPlan
from deepen.pipeline.reporter import Reporter
from deepen.pipeline.scoring import score_texts
from deepen.pipeline.trainee import Trainee, round_to_saved
from deepen.training.world import World


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Scores the texts of a run; every process calls each method at the same step.

    Attributes:
        plan: the run.
        trainee: what is scored.
        texts: on what.
        log: where points are written; None in all processes but the first.
        bound: told of each.
        world: the processes of the run.
    """

    plan: RunPlan
    trainee: Trainee
    texts: Sequence[EvaluationText]
    log: RunLog | None
    bound: Bound
    world: World

    def begin(self, base: Losses) -> None:
        """Note what the model is before the first step: the base, or what a pack made of it."""
        self._note(0, self._score() if self.plan.pack else base)

    def go_on(self, step: int) -> None:
        """Note what it is after `step` steps."""
        self._note(step, self._score())

    def end(self, reporter: Reporter) -> Losses:
        """Note what it is after the last step, as it will be saved; return nats per window."""
        losses = self.score_saved(reporter)
        self._note(self.plan.steps, losses)
        return losses

    def score_saved(self, reporter: Reporter) -> Losses:
        """Give what trained the precision it is saved in, and return nats per window."""
        reporter.stage("evaluating the trained model")
        round_to_saved(self.trainee, self.plan.base.checkpoint)
        return self._score(reporter.progress)

    def _score(self, progress: Progress | None = None) -> Losses:
        trainee = self.trainee
        return score_texts(trainee.root, self.texts, self.world, autocast=trainee.autocast, progress=progress)

    def _note(self, step: int, losses: Losses) -> None:
        found = nats_per_token(self.texts, losses)
        if self.log:
            self.log.evaluation(step, found)
        self.bound.check(step, found)
