"""The table of a study of knowledge: one tuning on the base and on the expanded model."""

from typing import Literal

from pydantic import Field

from deepen.records.comparison import Comparison
from deepen.records.provenance import Provenance
from deepen.records.record import Record


class KnowledgeRow(Record):
    """One model of the study: what its finished cells say of their cost and their spread.

    Attributes:
        label: of the row in the comparison.
        method: how its last stage was trained.
        seeds: of the finished cells; the comparison has their mean.
        missing: seeds without one.
        diverged: seeds whose training diverged; they are in no mean.
        cells: directories of the finished cells relative to the study's, in the order of `seeds`.
        values: of each column of the comparison, the value of each seed; empty without a comparison.
        learning_rate: peak.
        trainable: parameters that trained in the last stage.
        tokens: trained on in it, a cell.
        flops: executed in it, a cell; None where not logged.
        seconds: of its training, the median cell.
    """

    label: str
    method: str
    seeds: list[int]
    missing: list[int]
    diverged: list[int]
    cells: list[str]
    values: list[list[float]] = Field(default_factory=list)
    learning_rate: float
    trainable: int
    tokens: int
    flops: float | None
    seconds: float


class KnowledgeRecord(Record):
    """`study.json` of a study of knowledge, of the cells finished so far.

    Attributes:
        kind: `knowledge`.
        name: of the study's recipe.
        base: name or path of the base.
        recipe: of the study, as YAML.
        cells: number of cells of the whole study.
        finished: how many of them are.
        waiting: cells not finished, each with the reason.
        rows: those with a finished cell; the first is the tuned base.
        comparison: the base and the rows on all texts and tasks, the mean over seeds; `from_first` is from
            the tuned base. None as long as that is not finished.
        provenance: of the first cell; None without one.
        codes: commits of deepen that computed them.
    """

    format_version: Literal[1] = 1
    kind: Literal["knowledge"] = "knowledge"
    name: str
    base: str
    recipe: str
    cells: int
    finished: int
    waiting: list[str] = Field(default_factory=list)
    rows: list[KnowledgeRow]
    comparison: Comparison | None
    provenance: Provenance | None
    codes: list[str]
