"""What trains and what is saved: one short file a method."""

from deepen.config import TrainSection
from deepen.methods.blocks import Blocks
from deepen.methods.freeze import Freeze
from deepen.methods.full import Full
from deepen.methods.lora import Lora
from deepen.methods.method import WIDE, Method
from deepen.methods.moe import Moe
from deepen.methods.prompt import Prompt
from deepen.methods.rows import Rows
from deepen.methods.scale import Scale

__all__ = [
    "WIDE",
    "Blocks",
    "Freeze",
    "Full",
    "Lora",
    "Method",
    "Moe",
    "Prompt",
    "Rows",
    "Scale",
    "build_method",
]


def build_method(section: TrainSection) -> Method:
    """Return the method of a recipe, with its settings."""
    if section.method == "lora":
        return Lora(section.lora, section.match_parameters)
    if section.method == "freeze":
        return Freeze(section.freeze, section.match_parameters)
    if section.method == "prompt":
        return Prompt(section.prompt)
    plain: dict[str, Method] = {
        "blocks": Blocks(new_rows=section.new_rows),
        "full": Full(),
        "moe": Moe(),
        "rows": Rows(),
        "scale": Scale(),
    }
    return plain[section.method]
