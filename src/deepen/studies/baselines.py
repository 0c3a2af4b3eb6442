"""`deepen study baselines`: methods at equal tokens and, where they can be, equal trained parameters."""

from typing import Any

from deepen.config import BaselinesRecipe, MethodSection
from deepen.errors import RecipeError
from deepen.studies.grid import Grid, Place, Row

_MATCHED = ("lora", "freeze")


def baselines_grid(study: BaselinesRecipe) -> tuple[Grid, int | None]:
    """Return the cells of a comparison of methods, and the number of parameters that rows are matched to.

    Raises:
        RecipeError: faults of the study.
        DeepenError: a base or a text cannot be used.
    """
    wanted = None
    if study.match is not None:
        wanted = _trained(study, study.match)
    return Grid(study, [_row(study, label, wanted) for label in study.methods]), wanted


def _row(study: BaselinesRecipe, label: str, wanted: int | None) -> Row:
    method = study.methods[label]
    settings, train = _settings(method), dict(method.train)
    facts: dict[str, str | int] = {}
    if method.expand is not None:
        facts = {"placement": "explicit" if method.expand.after else method.expand.placement}
    if wanted is not None and train.get("method") in _MATCHED:
        settings["train"] = {**train, "match_parameters": wanted}
    return Row(
        label=label, settings=settings, rates=method.learning_rates or study.learning_rates, facts=facts
    )


def _settings(method: MethodSection) -> dict[str, Any]:
    expand = method.expand and method.expand.model_dump(mode="json", exclude_unset=True)
    settings = {"expand": expand, "train": dict(method.train), "data": dict(method.data)}
    if method.switch is not None:
        settings["evaluate"] = {"switch": method.switch.model_dump(mode="json")}
    return settings


def _trained(study: BaselinesRecipe, label: str) -> int:
    """Count what a row trains, from the base's headers."""
    domain = next(iter(study.domains))
    row = _row(study, label, None)
    trained = Grid(study, [row]).outline(Place(row, domain)).parameters.trainable
    if trained is None:
        raise RecipeError(
            f"match: how many parameters {label} trains is known once its model is built; "
            "name a row of method blocks or full"
        )
    return trained
