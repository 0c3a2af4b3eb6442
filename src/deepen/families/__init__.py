"""Model knowledge as data: one TOML file a family, and the checks that hold a checkpoint to it."""

from deepen.families.check import check_tensors
from deepen.families.family import (
    Alternative,
    Family,
    Gguf,
    Zero,
    family_for,
    family_named,
    load_families,
    load_refusals,
    load_towers,
)
from deepen.families.names import generic
from deepen.families.quantised import check_quantised, renumbered_modules
from deepen.families.units import Kind, Place, unit_places, without_place

__all__ = [
    "Alternative",
    "Family",
    "Gguf",
    "Kind",
    "Place",
    "Zero",
    "check_quantised",
    "check_tensors",
    "family_for",
    "family_named",
    "generic",
    "load_families",
    "load_refusals",
    "load_towers",
    "renumbered_modules",
    "unit_places",
    "without_place",
]
