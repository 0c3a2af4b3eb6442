"""A study from its recipe to its table: what the commands do."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from deepen.checkpoint import write_file
from deepen.config import AblationRecipe, BaselinesRecipe, StudyRecipe, dump_recipe, load_document
from deepen.errors import DeepenError
from deepen.pipeline.reporter import Reporter
from deepen.records import CellRecord, KnowledgeRecord, StudyRecord
from deepen.report import write_study_report
from deepen.studies.ablation import ablation_grid
from deepen.studies.baselines import baselines_grid
from deepen.studies.cells import Store
from deepen.studies.cost import Planned, plan_costs
from deepen.studies.engine import Finished, Outcome, Share, Slot, run_cells
from deepen.studies.grid import Grid
from deepen.studies.knowledge.study import KnowledgeStudy, open_knowledge
from deepen.studies.pairs import study_pairs
from deepen.studies.switched import switched_rows
from deepen.studies.table import study_rows

GridKind = Literal["baselines", "ablation"]
Kind = Literal["baselines", "ablation", "knowledge"]


@dataclass(frozen=True, kw_only=True)
class Study:
    """A study that can be computed.

    Attributes:
        kind: which.
        name: of its recipe.
        recipe: of the study.
        grid: its cells.
        matched: parameters that rows are matched to; None: not asked for.
        store: where its cells lie.
    """

    kind: GridKind
    name: str
    recipe: StudyRecipe
    grid: Grid
    matched: int | None
    store: Store

    def slots(self) -> list[Slot]:
        """Return all places, as far as they are known."""
        return self.plan(self.store.finished)

    def plan(self, finished: Finished) -> list[Slot]:
        """Return all places, as far as finished cells decide them."""
        return self.grid.plan(finished)

    def costs(self) -> list[Planned]:
        """Return every cell with its cost."""
        return plan_costs(self.grid, self.store)

    def collect(self) -> StudyRecord:
        """Make the table of the cells finished so far; see `collect_study`."""
        return collect_study(self)


def open_study(
    kind: Kind, path: Path, out: Path | None, overrides: Sequence[str] = ()
) -> Study | KnowledgeStudy:
    """Read a study's recipe and check every cell; nothing is written but digests of texts.

    Raises:
        RecipeError: faults of the recipe, or of a cell's.
        DeepenError: a base or a text cannot be used.
    """
    if kind == "knowledge":
        return open_knowledge(path, out, overrides)
    recipe: StudyRecipe
    matched = None
    if kind == "baselines":
        recipe = baselines = load_document(path, BaselinesRecipe, overrides)
        grid, matched = baselines_grid(baselines)
    else:
        recipe = ablation = load_document(path, AblationRecipe, overrides)
        grid = ablation_grid(ablation)
    store = Store(out or Path(recipe.output))
    return Study(kind=kind, name=path.stem, recipe=recipe, grid=grid, matched=matched, store=store)


def compute_study(study: Study | KnowledgeStudy, share: Share, reporter: Reporter) -> Outcome:
    """Compute what is missing of a share, and write the table and the page of what is finished by the end.

    Raises:
        DeepenError: a cell cannot be computed, or the study was stopped; those finished stay.
    """
    try:
        outcome = run_cells(study.store, study.plan, share, reporter)
    except DeepenError:
        if study.store.study.is_dir():
            write_study(study)
        raise
    reporter.stage("writing the table")
    write_study(study)
    return outcome


def write_study(study: Study | KnowledgeStudy) -> StudyRecord | KnowledgeRecord:
    """Write `study.json` and `report.html` of the cells finished so far.

    Raises:
        DataError: a record is malformed.
        OutputError: they cannot be written.
    """
    record = study.collect()
    study.store.study.mkdir(parents=True, exist_ok=True)
    write_file(study.store.study / "study.json", record.model_dump_json(indent=1) + "\n")
    write_study_report(study.store.study)
    return record


def collect_study(study: Study) -> StudyRecord:
    """Make the table of the cells finished so far.

    Raises:
        DataError: a record is malformed.
        StudyError: cells were not evaluated on the same items.
    """
    grid, store, slots = study.grid, study.store, study.slots()
    records = _finished(slots, store)
    choices = (grid.choice(place, store) for place in grid.places)
    rows = study_rows(grid, store)
    return StudyRecord(
        kind=study.kind,
        name=study.name,
        base=grid.outline(grid.places[0]).recipe.base,
        recipe=dump_recipe(study.recipe),
        cells=len(slots),
        finished=sum(record is not None for record in records),
        waiting=[slot.missing for slot, record in zip(slots, records, strict=True) if record is None],
        matched=study.matched,
        rows=rows,
        pairs=study_pairs(rows, store),
        switched=switched_rows(grid, store),
        choices=[choice for choice in choices if choice],
        provenance=next((record.provenance for record in records if record), None),
        codes=sorted({record.code for record in records if record and record.code}),
    )


def _finished(slots: Sequence[Slot], store: Store) -> list[CellRecord | None]:
    return [store.finished(slot.cell) if slot.cell else None for slot in slots]
