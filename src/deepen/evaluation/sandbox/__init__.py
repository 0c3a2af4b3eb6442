"""A sandbox for code that a model wrote; `docs/sandbox.md` says against what, and what it does not cover.

Needs no package beyond the standard library. Nothing is tried and no process started before the first use.
"""

from deepen.evaluation.sandbox.layers import UNPROTECTED, Layer, Protection, describe_layers, try_layers
from deepen.evaluation.sandbox.programs import Limits, Outcome, Program, Status
from deepen.evaluation.sandbox.run import run_programs

__all__ = [
    "UNPROTECTED",
    "Layer",
    "Limits",
    "Outcome",
    "Program",
    "Protection",
    "Status",
    "describe_layers",
    "run_programs",
    "try_layers",
]
