"""Typed results with provenance, as JSON on disk."""

from deepen.records.comparison import Cell, Column, Comparison, Difference, Row
from deepen.records.findings import FindingsRecord
from deepen.records.importance import BlockImportance, ImportanceRecord
from deepen.records.knowledge import KnowledgeRecord, KnowledgeRow
from deepen.records.metrics import BlockPoint, EvaluationPoint, TrainingPoint, read_metrics
from deepen.records.provenance import Provenance, capture_provenance
from deepen.records.results import (
    AuditResult,
    EvaluationRecord,
    IdentityResult,
    Items,
    Metric,
    Parameters,
    QuantisationResult,
    QuantisedLoss,
    Role,
    RunResult,
    TextResult,
    TokenShift,
    read_record,
    read_result,
)
from deepen.records.study import (
    AnyStudy,
    CellRecord,
    RateChoice,
    RunFacts,
    StudyRecord,
    StudyRow,
    StudyScore,
)
from deepen.records.tasks import ScoredItem, ScoredTask, TaskRecord, TaskScores

__all__ = [
    "AnyStudy",
    "AuditResult",
    "BlockImportance",
    "BlockPoint",
    "Cell",
    "CellRecord",
    "Column",
    "Comparison",
    "Difference",
    "EvaluationPoint",
    "EvaluationRecord",
    "FindingsRecord",
    "IdentityResult",
    "ImportanceRecord",
    "Items",
    "KnowledgeRecord",
    "KnowledgeRow",
    "Metric",
    "Parameters",
    "Provenance",
    "QuantisationResult",
    "QuantisedLoss",
    "RateChoice",
    "Role",
    "Row",
    "RunFacts",
    "RunResult",
    "ScoredItem",
    "ScoredTask",
    "StudyRecord",
    "StudyRow",
    "StudyScore",
    "TaskRecord",
    "TaskScores",
    "TextResult",
    "TokenShift",
    "TrainingPoint",
    "capture_provenance",
    "read_metrics",
    "read_record",
    "read_result",
]
