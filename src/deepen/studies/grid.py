"""Studies over rows × domains × seeds, with a learning rate chosen for each row and domain.

A row is a way to adapt the base. The runs that choose its rate are cells like any other, on the same budget
with the first seed; they are judged on held-out text of the domain that is not reported. Every cell is
evaluated on all texts, so the run with the chosen rate is itself the first seed's cell and not repeated.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from statistics import fmean
from typing import Any, Final

from deepen.config import Recipe, StudyRecipe, TextSet, build_recipe
from deepen.errors import RecipeError
from deepen.pipeline.plan import Outline, plan_run
from deepen.pipeline.texts import corpus_cache
from deepen.records import CellRecord, RateChoice, RunFacts
from deepen.studies.cells import Cell, Store
from deepen.studies.engine import Finished, Slot
from deepen.studies.runs import run_cell, text_digests

# Keys of `run` that the axes decide.
_DECIDED: Final = (
    *(("output",), ("expand",), ("data", "sources"), ("evaluate", "domain")),
    *(("train", "learning_rate"), ("train", "seed")),
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Row:
    """One way to adapt the base.

    Attributes:
        label: how results call it.
        settings: sections of a recipe that make it, which win over those all cells share.
        rates: peak learning rates to choose from.
        facts: what of it the report puts on axes, such as the number of new blocks.
    """

    label: str
    settings: Mapping[str, Any]
    rates: tuple[float, ...]
    facts: Mapping[str, str | int] = field(default_factory=dict)


@dataclass(frozen=True)
class Place:
    """A row in a domain."""

    row: Row
    domain: str


class Grid:
    """All cells of a study, and which of them are known by now."""

    def __init__(self, study: StudyRecipe, rows: Sequence[Row]) -> None:
        """Check every cell before any is computed.

        Raises:
            RecipeError: faults of a cell's recipe.
            DeepenError: a base or a text cannot be used.
        """
        check_free(study.run, _DECIDED)
        self.study, self.rows = study, tuple(rows)
        self.places = [Place(row, domain) for domain in study.domains for row in rows]
        self.cell = cache(self._cell)
        self.outline = cache(self._outline)
        self._texts = cache(self._read_texts)
        for place in self.places:
            self.outline(place)

    def recipe(self, place: Place, rate: float, seed: int) -> Recipe:
        """Return the recipe of a cell, but for where it goes."""
        domain = self.study.domains[place.domain]
        raw = merged(self.study.run, place.row.settings)
        raw = merged(raw, {"output": "cell", "train": {"learning_rate": rate, "seed": seed}})
        data = raw.get("data", {})
        raw["data"] = {**data, "sources": [*_plain(domain.sources), *data.get("sources", ())]}
        raw["evaluate"] = {**raw.get("evaluate", {}), "domain": _plain((*domain.tuning, *domain.reported))}
        return build_recipe(raw, f"{place.row.label} in {place.domain}")

    def _outline(self, place: Place) -> Outline:
        return plan_run(self.recipe(place, place.row.rates[0], self.study.seeds[0]))

    def _read_texts(self, place: Place) -> dict[str, Any]:
        recipe = self.outline(place).recipe
        return text_digests(recipe, corpus_cache(recipe))

    def _cell(self, place: Place, rate: float, seed: int) -> Cell:
        return run_cell(
            f"{place.domain}-{place.row.label}-rate{rate:g}-seed{seed}",
            self.recipe(place, rate, seed),
            self.outline(place),
            self._texts(place),
            keep_models=self.study.keep_models,
        )

    def plan(self, finished: Finished) -> list[Slot]:
        """Return every place of the study: the runs that choose rates, then rows × domains × seeds."""
        return [slot for _, slot in self.placed(finished)]

    def placed(self, finished: Finished) -> list[tuple[Place, Slot]]:
        """Return `plan`, each with its row and domain."""
        choosing = [(place, slot) for place in self.places for slot in self._choosing(place)]
        return choosing + [(place, slot) for place in self.places for slot in self._seeded(place, finished)]

    def _choosing(self, place: Place) -> Iterator[Slot]:
        for rate in place.row.rates if len(place.row.rates) > 1 else ():
            cell = self.cell(place, rate, self.study.seeds[0])
            yield Slot(name=cell.name, cell=cell)

    def _seeded(self, place: Place, finished: Finished) -> Iterator[Slot]:
        rate = self.rate(place, finished)
        for seed in self.study.seeds:
            if rate is None:
                ended = self._losses(place, finished) is not None
                why = (
                    "no learning rate was found: training diverged at each" if ended else "the learning rate"
                )
                yield Slot(name=f"{place.domain}-{place.row.label}-seed{seed}", cell=None, waits_for=why)
            else:
                cell = self.cell(place, rate, seed)
                yield Slot(name=cell.name, cell=cell)

    def rate(self, place: Place, finished: Finished) -> float | None:
        """Return the learning rate of a row in a domain; None as long as runs that choose it are missing."""
        if len(place.row.rates) == 1:
            return place.row.rates[0]
        losses = self._losses(place, finished)
        if losses is None or not (known := [rate for rate in losses if losses[rate] < math.inf]):
            return None
        return min(known, key=lambda rate: losses[rate])

    def choice(self, place: Place, store: Store) -> RateChoice | None:
        """Return how a rate was chosen; None where it is not yet, or there was no choice."""
        chosen = self.rate(place, store.finished)
        losses = self._losses(place, store.finished) if len(place.row.rates) > 1 else None
        if chosen is None or losses is None:
            return None
        seed = self.study.seeds[0]
        cells = [self.cell(place, rate, seed) for rate in losses]
        return RateChoice(
            row=place.row.label,
            domain=place.domain,
            seed=seed,
            texts=sorted(labels(self.study.domains[place.domain].tuning)),
            losses={f"{rate:g}": loss if loss < math.inf else None for rate, loss in losses.items()},
            chosen=chosen,
            at_edge=chosen in (min(losses), max(losses)),
            cells=[str(store.directory(cell).relative_to(store.study)) for cell in cells],
        )

    def _losses(self, place: Place, finished: Finished) -> dict[float, float] | None:
        """Tuning loss at each rate, ascending; infinite where training diverged; None unless all known."""
        names = labels(self.study.domains[place.domain].tuning)
        rates = sorted(place.row.rates)
        records = [finished(self.cell(place, rate, self.study.seeds[0])) for rate in rates]
        if not all(records):
            return None
        return {rate: _tuning_loss(r, names) for rate, r in zip(rates, records, strict=True) if r}


def labels(texts: Sequence[TextSet]) -> set[str]:
    """Return how results call texts."""
    return {text.label for text in texts}


def _tuning_loss(record: CellRecord, names: set[str]) -> float:
    """Nats per token, the mean over texts; infinite where training diverged."""
    facts = RunFacts.model_validate(record.result)
    found = math.inf if facts.diverged else fmean(m.value for m in facts.metrics if m.task in names)
    return found if math.isfinite(found) else math.inf


def _plain(texts: Sequence[TextSet]) -> list[dict[str, Any]]:
    return [text.model_dump(mode="json", exclude_unset=True) for text in texts]


def merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Lay one tree of settings over another."""
    whole = dict(below)
    for key, value in above.items():
        held = whole.get(key)
        both = isinstance(held, Mapping) and isinstance(value, Mapping)
        whole[key] = merged(held, value) if both else value  # type: ignore[arg-type]
    return whole


def check_free(run: Mapping[str, Any], decided: Sequence[tuple[str, ...]]) -> None:
    """Refuse what the study decides, which would be overwritten silently.

    Raises:
        RecipeError: a key that is decided is there.
    """
    for path in decided:
        at: Any = run
        for key in path:
            at = at.get(key) if isinstance(at, Mapping) else None
        if at is not None:
            raise RecipeError(f"run.{'.'.join(path)}: the study decides it; remove it there")
