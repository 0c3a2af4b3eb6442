"""Several runs on the same items of texts and tasks, side by side."""

from typing import Literal

from pydantic import Field

from deepen.records.record import Record
from deepen.records.results import Role


class Difference(Record):
    """A paired difference on the same items.

    Attributes:
        delta: the difference.
        ci_low: lower end of its 95% interval; None with too few items.
        ci_high: upper end.
        p: two-sided p of no difference, of this one alone.
        p_holm: the same, adjusted for all runs and columns of the comparison (Holm).
    """

    delta: float
    ci_low: float | None
    ci_high: float | None
    p: float | None = None
    p_holm: float | None = None


class Cell(Record):
    """One run on one column.

    Attributes:
        value: in the column's metric; None in the base's row where no base was scored.
        from_base: the run less the base; None in the base's own row, and where no base was scored.
        from_first: the run less the first run; None in the base's row and the first run's.
    """

    value: float | None
    from_base: Difference | None = None
    from_first: Difference | None = None


class Column(Record):
    """What a column shows: one text, all texts of a role pooled where there are several, or a task's score.

    Attributes:
        name: of the text or task, or `all general` / `all domain` for the pool.
        role: `general` (must be kept) or `domain` (must be learned).
        pooled: whether the column stands for its role as a whole; each role with texts has exactly one.
        n: items: documents, windows, or questions.
        tokens: predicted tokens; None for a task.
        metric: of a task, such as `acc`; None for texts, which are in the comparison's.
        higher_is_better: whether a positive difference is a gain.
    """

    name: str
    role: Role
    pooled: bool
    n: int
    tokens: int | None = None
    metric: str | None = None
    higher_is_better: bool = False


class Row(Record):
    """The base or a run; `cells` follow the comparison's columns. What does not apply to the base is None."""

    label: str
    run: str | None = None
    method: str | None = None
    trainable: int | None = None
    tokens: int | None = None
    seconds: float | None = None
    cells: list[Cell]


class Comparison(Record):
    """Rows: the base, then each run in the order given.

    Attributes:
        metric: unit of the losses.
        base: name or path of the base, as the first run has it; None where it was not scored.
        columns: what is compared.
        rows: the base and the runs.
        left_out: texts and tasks that not all runs were evaluated on, or not alike; a line each.
    """

    format_version: Literal[1] = 1
    metric: str
    base: str | None
    columns: list[Column]
    rows: list[Row]
    left_out: list[str] = Field(default_factory=list)
