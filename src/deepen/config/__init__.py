"""The recipe: strict, frozen models read from YAML with `--set` on top."""

from deepen.config.continual import (
    AnswerMetric,
    ContinualRecipe,
    DeltasSection,
    Scoring,
    SequenceMethod,
    SequenceTask,
)
from deepen.config.drift import PRESETS, AnchorSection
from deepen.config.load import (
    build_recipe,
    dump_recipe,
    load_document,
    load_recipe,
    make_section,
    parse_recipe,
)
from deepen.config.recipe import EvaluateSection, ExpandSection, Recipe, SwitchSection
from deepen.config.sft import ConversationSet, Format, SftSection
from deepen.config.study import (
    AblationRecipe,
    BaselinesRecipe,
    DomainSection,
    KnowledgeRecipe,
    MethodSection,
    StudyRecipe,
)
from deepen.config.teacher import TeacherSection
from deepen.config.texts import DataSection, Place, Source, TextSet
from deepen.config.training import FreezeSection, LoopSection, LoraSection, PromptSection, TrainSection

__all__ = [
    "PRESETS",
    "AblationRecipe",
    "AnchorSection",
    "AnswerMetric",
    "BaselinesRecipe",
    "ContinualRecipe",
    "ConversationSet",
    "DataSection",
    "DeltasSection",
    "DomainSection",
    "EvaluateSection",
    "ExpandSection",
    "Format",
    "FreezeSection",
    "KnowledgeRecipe",
    "LoopSection",
    "LoraSection",
    "MethodSection",
    "Place",
    "PromptSection",
    "Recipe",
    "Scoring",
    "SequenceMethod",
    "SequenceTask",
    "SftSection",
    "Source",
    "StudyRecipe",
    "SwitchSection",
    "TeacherSection",
    "TextSet",
    "TrainSection",
    "build_recipe",
    "dump_recipe",
    "load_document",
    "load_recipe",
    "make_section",
    "parse_recipe",
]
