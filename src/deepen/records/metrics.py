"""`metrics.jsonl`: what a run logged while it trained, one JSON object a line."""

from collections.abc import Iterator
from pathlib import Path

from pydantic import Field, ValidationError

from deepen.errors import DataError
from deepen.records.record import Record


class BlockPoint(Record):
    """One step of what trains in one block.

    Attributes:
        gradient_norm: before clipping.
        update: norm of the change of its weights over the norm of the weights.
    """

    gradient_norm: float
    update: float


class RatePoint(Record):
    """Factors on the learning rate that a measurement gave the units of what trains.

    Attributes:
        least: of the unit that general text needs most.
        median: over units.
        greatest: of the unit it needs least.
    """

    least: float
    median: float
    greatest: float


class TrainingPoint(Record):
    """One optimiser step.

    Attributes:
        step: steps done.
        tokens: tokens seen so far.
        loss: mean training loss of the step, nats per token.
        learning_rate: of the step.
        gradient_norm: before clipping.
        tokens_per_second: over this step.
        seconds: of training so far.
        epochs: passes through the mixture so far.
        source_tokens: tokens seen so far from each source.
        flops_per_second: executed, by the closed form of `deepen.training.flops`.
        utilisation: of what the devices attain in a square matrix product; None where that was not measured.
        blocks: block -> its figures, for each in which something trains.
        source_epochs: windows seen so far of each source, as a share of all it has.
        anchor: mean KL(base ‖ model) on the step's anchor, nats per token; None without one.
        unit_rates: measured just before the step; None in steps without a measurement.
    """

    step: int
    tokens: int
    loss: float
    learning_rate: float | None = None
    gradient_norm: float | None = None
    tokens_per_second: float | None = None
    seconds: float | None = None
    epochs: float | None = None
    source_tokens: dict[str, int] = Field(default_factory=dict)
    flops_per_second: float | None = None
    utilisation: float | None = None
    blocks: dict[int, BlockPoint] = Field(default_factory=dict)
    source_epochs: dict[str, float] = Field(default_factory=dict)
    anchor: float | None = None
    unit_rates: RatePoint | None = None


class EvaluationPoint(Record):
    """Held-out loss during training: `evaluation` is task -> nats per token."""

    step: int
    tokens: int
    evaluation: dict[str, float]


def read_metrics(path: Path) -> tuple[list[TrainingPoint], list[EvaluationPoint]]:
    """Read a log: training and evaluation points by ascending step; none where the file is missing.

    A step logged twice (by a run that was killed and resumed) counts as logged last, and a line cut off at
    the end of the file is passed over.

    Raises:
        DataError: a line that is neither kind of point.
    """
    training: dict[int, TrainingPoint] = {}
    evaluation: dict[int, EvaluationPoint] = {}
    for point in _points(path):
        if isinstance(point, EvaluationPoint):
            evaluation[point.step] = point
        else:
            training[point.step] = point
    return [training[step] for step in sorted(training)], [evaluation[step] for step in sorted(evaluation)]


def _points(path: Path) -> Iterator[TrainingPoint | EvaluationPoint]:
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        return
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    for number, line in enumerate(lines, start=1):
        kind = EvaluationPoint if b'"evaluation"' in line else TrainingPoint
        try:
            yield kind.model_validate_json(line)
        except ValidationError as error:
            if number == len(lines) and not line.endswith(b"\n"):
                return
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "line"
            raise DataError(f"{path}:{number}: not a {kind.__name__}: {where}: {first['msg']}") from None
