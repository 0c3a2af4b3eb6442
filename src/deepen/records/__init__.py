"""Typed results with provenance, as JSON on disk."""

from deepen.records.comparison import Cell, Column, Comparison, Difference, Row
from deepen.records.metrics import EvaluationPoint, TrainingPoint, read_metrics
from deepen.records.provenance import Provenance, capture_provenance
from deepen.records.results import (
    AuditResult,
    EvaluationRecord,
    IdentityResult,
    Items,
    Metric,
    Parameters,
    RunResult,
    TextResult,
    read_record,
    read_result,
)
from deepen.records.tasks import ScoredItem, ScoredTask, TaskRecord, TaskScores

__all__ = [
    "AuditResult",
    "Cell",
    "Column",
    "Comparison",
    "Difference",
    "EvaluationPoint",
    "EvaluationRecord",
    "IdentityResult",
    "Items",
    "Metric",
    "Parameters",
    "Provenance",
    "Row",
    "RunResult",
    "ScoredItem",
    "ScoredTask",
    "TaskRecord",
    "TaskScores",
    "TextResult",
    "TrainingPoint",
    "capture_provenance",
    "read_metrics",
    "read_record",
    "read_result",
]
