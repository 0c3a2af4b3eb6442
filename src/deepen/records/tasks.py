"""Results of benchmark tasks, item by item."""

from typing import Any, Literal

from pydantic import Field

from deepen.records.provenance import Provenance
from deepen.records.record import Record
from deepen.records.results import Metric


class ScoredItem(Record):
    """One document of a task under one model.

    Attributes:
        task: the leaf task it belongs to.
        doc_id: its position in the task's documents.
        filter: how the answer was taken from what the model wrote; `none` as a rule.
        target: the right answer.
        request: what the model was asked, arguments of each request.
        answer: what it answered: (nats, greedy) of each choice, or the text written.
        values: metric -> value; a pair where the metric is a ratio of sums.
    """

    task: str
    doc_id: int
    filter: str = "none"
    target: Any = None
    request: Any = None
    answer: Any = None
    values: dict[str, Any]


class ScoredTask(Record):
    """A task under one model.

    Attributes:
        results: the harness's own figures: task or group -> `metric,filter` -> value.
        items: of every leaf task, in its order of documents.
        cut: requests that were longer than the model's context and lost their beginning.
    """

    results: dict[str, dict[str, float]]
    items: list[ScoredItem]
    cut: int = 0


class TaskScores(Record):
    """One metric of a task that is a mean, or a ratio of sums, over items, item by item.

    Attributes:
        task: name in results.
        metric: name in results.
        higher_is_better: whether a larger score is a gain.
        values: of the model.
        base: of the base on the same items; None where none was scored.
        weights: denominators where the metric is a ratio of sums: bytes × ln 2 under nats for bits per byte.
    """

    task: str
    metric: str
    higher_is_better: bool
    values: list[float]
    base: list[float] | None = None
    weights: list[float] | None = None


class TaskRecord(Record):
    """`task-NAME.json`: a finished task, the model beside its base.

    Attributes:
        task: the task with its shots, `arc_challenge:25`.
        identity: digest of model, base and all that was asked; with an equal one the task is not rerun.
        asked: digest of the requests alone, the same for every model; with an equal one items can be paired.
        model: name or path of the model.
        base: the same of the base; None where none was scored.
        limit: documents taken of each leaf; None: all.
        metrics: value, base, difference and interval; what is adjusted for several tasks is so for those
            reported together.
        scores: the items behind those metrics that are means or ratios of sums.
        results: the harness's own figures of the model, also of a group's members.
        base_results: the same of the base.
        cut: requests cut at the left to the model's context.
        items: file of the items beside this one.
        seconds: it took.
        provenance: of this task's evaluation.
    """

    format_version: Literal[1] = 1
    task: str
    identity: str
    asked: str
    model: str
    base: str | None
    limit: int | None
    metrics: list[Metric]
    scores: list[TaskScores]
    results: dict[str, dict[str, float]]
    base_results: dict[str, dict[str, float]] = Field(default_factory=dict)
    cut: int = 0
    items: str
    seconds: float
    provenance: Provenance
