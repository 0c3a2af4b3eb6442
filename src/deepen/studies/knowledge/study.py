"""A study of knowledge from its recipe to its table."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

from deepen.config import KnowledgeRecipe, dump_recipe, load_document
from deepen.evaluation.comparison import compare_evaluated
from deepen.evaluation.evaluated import Evaluated, mean_of, read_evaluated
from deepen.records import CellRecord, Comparison, KnowledgeRecord, KnowledgeRow, RunFacts
from deepen.studies.cells import Cell, Store
from deepen.studies.cost import Cost, Planned, estimate_cost
from deepen.studies.engine import Finished, Slot
from deepen.studies.knowledge.cells import BASE_TUNED, EXPANDED, KnowledgeCells, Part

_UNIT = "nats_per_token"
_NOTHING = Cost(trainable=0, tokens=0, flops_per_token=0.0)


@dataclass(frozen=True, kw_only=True)
class KnowledgeStudy:
    """A study that can be computed.

    Attributes:
        name: of its recipe.
        recipe: of the study.
        cells: what it computes.
        store: where its cells lie.
    """

    name: str
    recipe: KnowledgeRecipe
    cells: KnowledgeCells
    store: Store

    def plan(self, finished: Finished) -> list[Slot]:
        """Return all places, as far as finished cells decide them."""
        return self.cells.plan(finished)

    def costs(self) -> list[Planned]:
        """Return every cell with its cost."""
        return [self._cost(part) for part in self.cells.parts(self.store.finished)]

    def _cost(self, part: Part) -> Planned:
        slot = part.slot
        return Planned(
            name=slot.name,
            finished=slot.cell is not None and self.store.finished(slot.cell) is not None,
            waits_for=slot.waits_for,
            cost=estimate_cost(part.outline) if part.outline else _NOTHING,
        )

    def collect(self) -> KnowledgeRecord:
        """Make the table of the cells finished so far.

        Raises:
            DataError: a record is malformed, or cells were not evaluated on the same items.
        """
        parts = self.cells.parts(self.store.finished)
        records = [self.store.finished(part.slot.cell) if part.slot.cell else None for part in parts]
        models = [model for row in self.cells.rows if (model := _Model.read(row, parts, self.store))]
        comparison = _compare(models)
        return KnowledgeRecord(
            name=self.name,
            base=self.cells.trains.recipe.base,
            recipe=dump_recipe(self.recipe),
            cells=len(parts),
            finished=sum(record is not None for record in records),
            waiting=[
                part.slot.missing for part, record in zip(parts, records, strict=True) if record is None
            ],
            rows=_describe(self.cells, models, comparison),
            comparison=comparison,
            provenance=next((record.provenance for record in records if record), None),
            codes=sorted({record.code for record in records if record and record.code}),
        )


def open_knowledge(path: Path, out: Path | None, overrides: Sequence[str] = ()) -> KnowledgeStudy:
    """Read a study's recipe and check every cell; nothing is written but digests of texts.

    Raises:
        RecipeError: faults of the recipe.
        DeepenError: the base or a text cannot be used.
    """
    recipe = load_document(path, KnowledgeRecipe, overrides)
    store = Store(out or Path(recipe.output))
    return KnowledgeStudy(name=path.stem, recipe=recipe, cells=KnowledgeCells(recipe, store), store=store)


@dataclass(frozen=True, kw_only=True)
class _Model:
    """A row of the table: its finished cells, seed by seed."""

    label: str
    seeds: list[int]
    missing: list[int]
    diverged: list[int]
    cells: list[str]
    facts: list[RunFacts]
    evaluated: list[Evaluated]

    @classmethod
    def read(cls, label: str, parts: Sequence[Part], store: Store) -> "_Model | None":
        """Read the seeds of which all cells are finished; None where there is none."""
        cells: dict[int, list[Cell | None]] = {}
        for part in parts:
            if part.row == label:
                cells.setdefault(part.seed, []).append(part.slot.cell)
        held = {seed: _all_finished(own, store) for seed, own in cells.items()}
        facts = {seed: RunFacts.model_validate(own[0].result) for seed, own in held.items() if own}
        diverged = [seed for seed, found in facts.items() if found.diverged]
        seeds = [seed for seed in facts if seed not in diverged]
        if not seeds:
            return None
        places = {seed: [store.directory(cell) for cell in cells[seed] if cell] for seed in seeds}
        return cls(
            label=label,
            seeds=seeds,
            missing=[seed for seed in cells if seed not in facts],
            diverged=diverged,
            cells=[str(places[seed][0].relative_to(store.study)) for seed in seeds],
            facts=[facts[seed] for seed in seeds],
            evaluated=[_read_all(places[seed], label) for seed in seeds],
        )

    def describe(self, study: KnowledgeCells, values: list[list[float]]) -> KnowledgeRow:
        """Say what the row cost, and what each of its seeds scored on each column."""
        first = self.facts[0]
        outline = study.trains if self.label == EXPANDED else study.tunes.get(self.label, study.tunes_base)
        return KnowledgeRow(
            label=self.label,
            method=first.method,
            seeds=self.seeds,
            missing=self.missing,
            diverged=self.diverged,
            cells=self.cells,
            values=values,
            learning_rate=outline.train.learning_rate,
            trainable=first.trainable,
            tokens=first.tokens,
            flops=first.flops,
            seconds=median(facts.seconds for facts in self.facts),
        )


def _compare(models: Sequence[_Model]) -> Comparison | None:
    """Put the means over seeds beside the base and the tuned base; None as long as that is missing."""
    if not models or models[0].label != BASE_TUNED:
        return None
    found = compare_evaluated([mean_of(model.evaluated, model.label) for model in models], metric=_UNIT)
    # Where a mean lies, and what it cost, is in the rows of the study.
    rows = [row.model_copy(update={"run": None, "seconds": None}) for row in found.rows]
    return found.model_copy(update={"rows": rows})


def _describe(
    cells: KnowledgeCells, models: Sequence[_Model], comparison: Comparison | None
) -> list[KnowledgeRow]:
    if comparison is None:
        return [model.describe(cells, []) for model in models]
    single = iter(compare_evaluated([run for model in models for run in model.evaluated]).rows[1:])
    rows = []
    for model in models:
        seeds = [[cell.value or 0.0 for cell in next(single).cells] for _ in model.seeds]
        rows.append(model.describe(cells, [list(column) for column in zip(*seeds, strict=True)]))
    return rows


def _all_finished(cells: Sequence[Cell | None], store: Store) -> list[CellRecord] | None:
    records = [store.finished(cell) if cell else None for cell in cells]
    found = [record for record in records if record]
    return found if len(found) == len(records) else None


def _read_all(places: Sequence[Path], label: str) -> Evaluated:
    """Read what was evaluated in the cells of one seed as one."""
    first, *rest = [read_evaluated(place, label, _UNIT) for place in places]
    return replace(first, scores={**first.scores, **{k: s for each in rest for k, s in each.scores.items()}})
