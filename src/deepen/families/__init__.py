"""Model knowledge as data: one TOML file a family, and the checks that hold a checkpoint to it."""

from deepen.families.check import check_tensors
from deepen.families.family import Family, family_for, load_families

__all__ = ["Family", "check_tensors", "family_for", "load_families"]
