"""`deepen study ablation`: how many new blocks, where, and what of them is zero."""

from typing import Any

from deepen.config import AblationRecipe
from deepen.studies.grid import Grid, Row


def ablation_grid(study: AblationRecipe) -> Grid:
    """Return the cells of an ablation of block expansion.

    Raises:
        RecipeError: faults of the study.
        DeepenError: a base or a text cannot be used.
    """
    return Grid(
        study,
        [
            _row(study, count, place, zero)
            for zero in study.zeroed
            for place in study.placements
            for count in study.counts
        ],
    )


def _row(study: AblationRecipe, count: int, placement: str, zero: str) -> Row:
    expand: dict[str, Any] = {"blocks": count, "placement": placement, "zero": zero}
    if placement == "importance":
        expand["importance"] = study.importance
    return Row(
        label=f"{placement}-{count}" if zero == "writes" else f"{placement}-{count}-{zero}",
        settings={"expand": expand, "train": {"method": "blocks"}},
        rates=study.learning_rates,
        facts={"blocks": count, "placement": placement, "zeroed": zero},
    )
