"""How far training may move the model from its base, and what holds it back."""

from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal, Self

from pydantic import Field, model_validator

from deepen.config.section import Count, Positive, Real, Section


class AnchorSection(Section):
    """KL(base ‖ model) on further windows beside each step's, whose tokens are not learned.

    The base is the model itself without what trains (`blocks`, `lora`); for other methods a frozen copy of it
    is held beside the model, as large again, and `parallel: fsdp` is refused.
    """

    share: Annotated[Positive, Field(le=4)] = 0.25
    """Windows of the anchor for each window of a step; at least one a step."""

    weight: Positive = 1.0
    """Of the divergence, in nats per token of the anchor, beside the loss, in nats per token."""

    source: Literal["self", "general"] = "self"
    """`self`: text that the base writes before training; `general`: the texts of `data.anchor`."""

    tokens: Count = 262_144
    """For `self`: tokens the base writes, no more than the run reads; kept beside the tokenised texts."""

    temperature: Positive = 1.0
    """For `self`: divides the logits that are drawn from; 1 is the base's own distribution."""

    def windows(self, windows: int) -> int:
        """Return how many windows of the anchor go with a step of so many."""
        return max(1, round(self.share * windows))


class UnitRatesSection(Section):
    """Learning rates of their own for the units of what trains, by how much general text needs them (ADEPT).

    General text is that of the anchor, which is needed; `parallel: fsdp` is refused.
    """

    units: Literal["tensor", "row"] = "tensor"
    """What has a rate: each `tensor` that trains, or each `row` of a matrix."""

    every: Count = 50
    """Steps between two measurements; all rates are 1 until the first."""

    windows: Count = 8
    """Windows of general text, and as many of the domain, that a measurement reads."""

    lower: Annotated[Real, Field(ge=0)] = 0.0
    """Factor on the learning rate of the unit that general text needs most."""

    upper: Positive = 2.0
    """The same of the unit that it needs least. The mean of all is halfway between the two."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.lower > self.upper:
            raise ValueError(f"lower {self.lower:g} is above upper {self.upper:g}")
        return self


PRESETS: Final[Mapping[str, Mapping[str, Any]]] = {
    "paper": {
        "method": "blocks",
        "batch_tokens": 1024 * 4096,
        "optimizer": "adamw",
        "learning_rate": 2e-4,
        "schedule": "cosine",
        "warmup": 0.06,
        "weight_decay": 0.1,
        "betas": [0.9, 0.95],
        "clip": 1.0,
        "anchor": None,
        "drift_penalty": None,
        "unit_rates": None,
        "max_general_loss": None,
    },
    "balanced": {"anchor": {"source": "self", "share": 0.125, "weight": 1.0}},
    "keep": {"anchor": {"source": "self", "share": 0.5, "weight": 4.0}},
}
"""What `train.preset` sets where the recipe says nothing; a section is filled up key by key."""


def with_preset(given: Any) -> Any:
    """Return the raw keys of `train`, those of its preset filled in."""
    if not isinstance(given, dict) or not isinstance(given.get("preset"), str):
        return given
    return _filled(PRESETS.get(given["preset"], {}), given)


def _filled(preset: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    filled = {**preset, **given}
    for key in preset.keys() & given.keys():
        if isinstance(preset[key], Mapping) and isinstance(given[key], Mapping):
            filled[key] = _filled(preset[key], given[key])
    return filled
