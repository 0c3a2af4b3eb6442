"""The recipe: strict, frozen models read from YAML with `--set` on top."""

from deepen.config.load import build_recipe, dump_recipe, load_document, load_recipe, parse_recipe
from deepen.config.recipe import EvaluateSection, ExpandSection, Recipe
from deepen.config.sft import ConversationSet, Format, SftSection
from deepen.config.study import (
    AblationRecipe,
    BaselinesRecipe,
    DomainSection,
    KnowledgeRecipe,
    MethodSection,
    StudyRecipe,
)
from deepen.config.texts import DataSection, Place, Source, TextSet
from deepen.config.training import FreezeSection, LoopSection, LoraSection, PromptSection, TrainSection

__all__ = [
    "AblationRecipe",
    "BaselinesRecipe",
    "ConversationSet",
    "DataSection",
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
    "SftSection",
    "Source",
    "StudyRecipe",
    "TextSet",
    "TrainSection",
    "build_recipe",
    "dump_recipe",
    "load_document",
    "load_recipe",
    "parse_recipe",
]
