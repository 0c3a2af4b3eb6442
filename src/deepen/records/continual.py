"""Results of continual learning: what each task left of those before it."""

from typing import Literal

from pydantic import Field

from deepen.records.provenance import Provenance
from deepen.records.record import Record
from deepen.records.results import Metric


class SequenceTaskRecord(Record):
    """A task as it was learned and tested.

    Attributes:
        name: how results call it.
        metric: of its answers, from 0 to 1.
        epochs: passes through its training records.
        learned: training records.
        tested: test records.
        prompt_tokens: room for a prompt.
        answer_tokens: room for an answer.
        prompts_cut: training prompts cut in their middle.
        test_prompts_cut: test prompts cut so.
        answers_cut: training answers longer than what may be written.
    """

    name: str
    metric: str
    epochs: float
    learned: int
    tested: int
    prompt_tokens: int
    answer_tokens: int
    prompts_cut: int
    test_prompts_cut: int
    answers_cut: int


class LearnedTask(Record):
    """What learning one task took.

    Attributes:
        steps: optimiser steps.
        tokens: windows × their length.
        trainable: parameters that trained.
        first_loss: of the first step, nats per learned token.
        last_loss: of the last step.
        seconds: wall time of the process that ended it.
    """

    steps: int
    tokens: int
    trainable: int
    first_loss: float
    last_loss: float
    seconds: float


class TaskAnswers(Record):
    """A model's answers to the test of a task.

    Attributes:
        task: its name.
        answers: in the test's order; None where the context had no room for one.
        scores: of each, from 0 to 1.
    """

    task: str
    answers: list[str | None]
    scores: list[float]

    @property
    def mean(self) -> float:
        """The task's score."""
        return sum(self.scores) / len(self.scores)


class TraceDelta(Record):
    """One of TRACE's deltas: what a method's last model gained or lost beside the base.

    Attributes:
        name: `general ability`, `instruction following` or `safety`.
        value: mean difference of the tasks' scores (0 to 1), or the share of answers that the judge prefers
            less that of those it prefers the base's to; None: not measured.
        low: lower end of its 95% interval over items.
        high: upper end.
        parts: the metrics it is made of.
    """

    name: str
    value: float | None = None
    low: float | None = None
    high: float | None = None
    parts: list[Metric] = Field(default_factory=list)


class SequenceCell(Record):
    """One method and seed through the whole sequence.

    Attributes:
        method: name of the method; `base` for the base, which learns nothing.
        seed: of its random draws.
        directory: its records, below the study's directory.
        R: T × T: score on task i after training on tasks 0 … t; None above the diagonal.
        op: mean of the last row.
        op_low: lower end of its 95% interval over test items.
        op_high: upper end.
        bwt: mean change of earlier tasks' scores; None where there is one task.
        bwt_low: lower end of its 95% interval over test items, paired.
        bwt_high: upper end.
        forward_transfer: mean score before training on a task less the base's.
        before: score on each task just before it was trained on.
        learned: cost of each task.
        general: held-out loss of general texts after the last task, beside the base's.
        general_course: text -> nats per token after each task.
        deltas: TRACE's three, measured or not.
    """

    method: str
    seed: int
    directory: str
    R: list[list[float | None]]
    op: float
    op_low: float
    op_high: float
    bwt: float | None
    bwt_low: float | None
    bwt_high: float | None
    forward_transfer: float | None
    before: list[float]
    learned: list[LearnedTask]
    general: list[Metric] = Field(default_factory=list)
    general_course: dict[str, list[float]] = Field(default_factory=dict)
    deltas: list[TraceDelta] = Field(default_factory=list)


class ContinualRecord(Record):
    """A study of continual learning.

    Attributes:
        kind: of study.
        base: name or path.
        recipe: of the study, as YAML.
        scoring: `standard`, or as TRACE's own code scores.
        tasks: in the order of learning.
        base_scores: the base's on each task; empty before they are known.
        cells: those finished.
        missing: names of those not finished yet.
        provenance: of the table.
    """

    kind: Literal["continual"] = "continual"
    base: str
    recipe: str
    scoring: str
    tasks: list[SequenceTaskRecord]
    base_scores: list[float]
    cells: list[SequenceCell]
    missing: list[str]
    provenance: Provenance
