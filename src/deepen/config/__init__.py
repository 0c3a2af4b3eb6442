"""The recipe: strict, frozen models read from YAML with `--set` on top."""

from deepen.config.load import dump_recipe, load_recipe, make_section, parse_recipe
from deepen.config.recipe import EvaluateSection, ExpandSection, Recipe
from deepen.config.sft import ConversationSet, Format, SftSection
from deepen.config.texts import DataSection, Place, Source, TextSet
from deepen.config.training import FreezeSection, LoraSection, PromptSection, TrainSection

__all__ = [
    "ConversationSet",
    "DataSection",
    "EvaluateSection",
    "ExpandSection",
    "Format",
    "FreezeSection",
    "LoraSection",
    "Place",
    "PromptSection",
    "Recipe",
    "SftSection",
    "Source",
    "TextSet",
    "TrainSection",
    "dump_recipe",
    "load_recipe",
    "make_section",
    "parse_recipe",
]
