"""Typed results with provenance, as JSON on disk."""

from deepen.records.comparison import Cell, Column, Comparison, Difference, Row
from deepen.records.continual import (
    ContinualRecord,
    LearnedTask,
    SequenceCell,
    SequenceTaskRecord,
    TaskAnswers,
    TraceDelta,
)
from deepen.records.effects import BlockEffects, EffectsRecord, TextEffect, TokenEffect
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
from deepen.records.stop import EarlyStop
from deepen.records.study import (
    AnyStudy,
    CellRecord,
    RateChoice,
    RunFacts,
    StudyPair,
    StudyRecord,
    StudyRow,
    StudyScore,
)
from deepen.records.switch import (
    SwitchCost,
    SwitchEvaluation,
    SwitchPack,
    SwitchRecord,
    SwitchRow,
    SwitchTally,
)
from deepen.records.tasks import ScoredItem, ScoredTask, TaskRecord, TaskScores
from deepen.records.worth import BlockWorth, PathPoint, WorthRecord

__all__ = [
    "AnyStudy",
    "AuditResult",
    "BlockEffects",
    "BlockImportance",
    "BlockPoint",
    "BlockWorth",
    "Cell",
    "CellRecord",
    "Column",
    "Comparison",
    "ContinualRecord",
    "Difference",
    "EarlyStop",
    "EffectsRecord",
    "EvaluationPoint",
    "EvaluationRecord",
    "FindingsRecord",
    "IdentityResult",
    "ImportanceRecord",
    "Items",
    "KnowledgeRecord",
    "KnowledgeRow",
    "LearnedTask",
    "Metric",
    "Parameters",
    "PathPoint",
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
    "SequenceCell",
    "SequenceTaskRecord",
    "StudyPair",
    "StudyRecord",
    "StudyRow",
    "StudyScore",
    "SwitchCost",
    "SwitchEvaluation",
    "SwitchPack",
    "SwitchRecord",
    "SwitchRow",
    "SwitchTally",
    "TaskAnswers",
    "TaskRecord",
    "TaskScores",
    "TextEffect",
    "TextResult",
    "TokenEffect",
    "TokenShift",
    "TraceDelta",
    "TrainingPoint",
    "WorthRecord",
    "capture_provenance",
    "read_metrics",
    "read_record",
    "read_result",
]
