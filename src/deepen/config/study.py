"""What a study varies: one recipe for all of its cells, and the axes that fill it in."""

from typing import Annotated, Any, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from deepen.config.recipe import ExpandSection, Placement, SwitchSection, Zero
from deepen.config.section import Count, Index, Positive, Section, as_tuple
from deepen.config.texts import Source, TextSet

Label = Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+$")]
"""Names a directory is made of."""

Rates = Annotated[tuple[Positive, ...], BeforeValidator(as_tuple), Field(min_length=1)]


def _distinct(seeds: tuple[int, ...]) -> tuple[int, ...]:
    if len(set(seeds)) < len(seeds):
        raise ValueError("one stands twice")
    return seeds


Seeds = Annotated[
    tuple[Index, ...], BeforeValidator(as_tuple), Field(min_length=1), AfterValidator(_distinct)
]


class DomainSection(Section):
    """One domain: what is trained on, what chooses the learning rate, what is reported."""

    sources: Annotated[tuple[Source, ...], BeforeValidator(as_tuple), Field(min_length=1)]
    """The training texts: `data.sources` of its cells."""

    tuning: Annotated[tuple[TextSet, ...], BeforeValidator(as_tuple)] = ()
    """Held-out text that chooses learning rates and is not reported; needed where there are several rates."""

    reported: Annotated[tuple[TextSet, ...], BeforeValidator(as_tuple), Field(min_length=1)]
    """Held-out text that is reported and chooses nothing."""


class StudyRecipe(Section):
    """What all studies over domains and seeds share."""

    run: dict[str, Any]
    """The sections of a recipe that all cells share; what an axis decides (`output`, `data.sources`,
    `evaluate.domain`, `train.learning_rate`, `train.seed`) is left out."""

    output: str
    """Directory of the study."""

    domains: Annotated[dict[Label, DomainSection], Field(min_length=1)]
    """Each is trained by itself."""

    seeds: Seeds
    """Every result is repeated with each; the first one chooses learning rates."""

    learning_rates: Rates
    """Grid of peak learning rates, the same budget for each; with a single one nothing is chosen."""

    keep_models: bool = False
    """Keep what finished cells trained; their records stay in any case."""

    @model_validator(mode="after")
    def _tunable(self) -> Self:
        bare = [name for name, domain in self.domains.items() if not domain.tuning]
        if bare and self.chooses_rates:
            raise ValueError(
                f"domains.{bare[0]}: there are several learning rates and no tuning text to choose by; "
                "give one that is not reported, or a single rate"
            )
        return self

    @property
    def chooses_rates(self) -> bool:
        """Whether there is a choice of learning rates anywhere."""
        return len(self.learning_rates) > 1


class MethodSection(Section):
    """One row of a comparison of methods."""

    expand: ExpandSection | None = None
    """New blocks, for method `blocks`."""

    train: dict[str, Any] = Field(default_factory=dict)
    """Keys of `train` that make the row, such as `method`; they win over those of `run`."""

    data: dict[str, Any] = Field(default_factory=dict)
    """Keys of `data` that make the row, such as `anchor`; they win over those of `run`. `sources` are
    read beside the domain's: replay."""

    learning_rates: Rates | None = None
    """Its own grid; default: the study's."""

    switch: SwitchSection | None = None
    """`evaluate.switch` of its cells, for method `blocks`: a further row, of the same cells with a switch."""


class BaselinesRecipe(StudyRecipe):
    """Methods on equal tokens: rows × domains × seeds."""

    methods: Annotated[dict[Label, MethodSection], Field(min_length=1)]
    """The rows; the base's own stands beside them always."""

    match: Label | None = None
    """Row whose number of trained parameters rows of method `lora` and `freeze` come as near to as can be."""

    @property
    def chooses_rates(self) -> bool:
        """Whether there is a choice of learning rates anywhere."""
        return any(len(row.learning_rates or self.learning_rates) > 1 for row in self.methods.values())

    @model_validator(mode="after")
    def _matches_a_row(self) -> Self:
        if self.match is not None and self.match not in self.methods:
            raise ValueError(f"match: no row is called {self.match} (there are: {', '.join(self.methods)})")
        return self


class AblationRecipe(StudyRecipe):
    """Block expansion alone: numbers of new blocks × placements × what is zero × domains × seeds."""

    counts: Annotated[tuple[Count, ...], BeforeValidator(as_tuple), Field(min_length=1)]
    """Numbers of new blocks."""

    placements: Annotated[tuple[Placement, ...], BeforeValidator(as_tuple), Field(min_length=1)] = (
        "interleaved",
        "suffix",
        "prefix",
    )
    """Where they go: as `expand.placement`."""

    zeroed: Annotated[tuple[Zero, ...], BeforeValidator(as_tuple), Field(min_length=1)] = ("writes",)
    """What of them is filled so that they add nothing: as `expand.zero`."""

    importance: str | None = None
    """The record that `deepen inspect BASE --out FILE` wrote, for placement `importance`."""

    @model_validator(mode="after")
    def _measured(self) -> Self:
        if ("importance" in self.placements) != (self.importance is not None):
            raise ValueError(
                "placement importance needs a record, importance: FILE, and nothing else does; "
                "write one with deepen inspect BASE --out FILE"
            )
        return self


class KnowledgeRecipe(Section):
    """The same tuning on the base and on the expanded, trained model: rows × seeds."""

    run: dict[str, Any]
    """An ordinary recipe with `expand`, `data`, `train` and `sft`; what the study decides (`output`, `pack`,
    `train.seed`, `sft.seed`, `sft.trainable`) is left out. All parameters are tuned, as in the paper."""

    output: str
    """Directory of the study."""

    seeds: Seeds
    """Everything is repeated with each, from the training of the new blocks on."""

    also: dict[Label, dict[str, Any]] = Field(default_factory=dict)
    """Further tunings of the expanded model: name → keys of `sft` that win over those of `run`, such as
    `trainable: new`."""

    keep_models: bool = False
    """Keep what finished cells tuned. Records stay in any case, and so do the trained blocks, which every
    tuning begins with."""
