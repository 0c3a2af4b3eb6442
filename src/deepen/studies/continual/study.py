"""A study of continual learning from its recipe to its table."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from statistics import variance
from typing import Final

from deepen.checkpoint import write_file
from deepen.config import ContinualRecipe, dump_recipe, load_document
from deepen.pipeline.reporter import Reporter
from deepen.records import (
    ContinualRecord,
    EvaluationRecord,
    LearnedTask,
    Metric,
    SequenceCell,
    TaskAnswers,
    TraceDelta,
    capture_provenance,
    read_record,
)
from deepen.records.transfer import backward_transfer, forward_transfer, overall_performance
from deepen.report.continual import write_continual_report
from deepen.studies.cells import Cell, Store
from deepen.studies.continual.deltas import check_deltas, delta_cell, read_deltas
from deepen.studies.continual.sequence import ANSWERS, GENERAL, TaskSequence
from deepen.studies.continual.training import TRAINED
from deepen.studies.engine import Outcome, Share, Slot, run_cells

RECORD: Final = "study.json"
# Of a normal distribution, 95% lies within so many standard deviations.
_WIDTH: Final = 1.959964


@dataclass(frozen=True)
class ContinualStudy:
    """A study that can be computed."""

    recipe: ContinualRecipe
    sequence: TaskSequence
    store: Store

    def slots(self) -> list[Slot]:
        """Return all places; deltas wait for the sequence that they are of."""
        cells = self.sequence.cells()
        places = [Slot(name=cell.name, cell=cell) for cell in cells.values()]
        if self.recipe.deltas:
            places += [self._deltas(cell) for (_, seed), cell in cells.items() if seed is not None]
        return places

    def deltas(self, learned: Cell) -> Cell:
        """Return the cell of the deltas of a method's finished one."""
        tasks = self.sequence.tasks
        trained = self.store.directory(learned) / f"{len(tasks)}-{tasks[-1].name}" / TRAINED
        return delta_cell(self.recipe, learned, trained, self.sequence.base)

    def _deltas(self, learned: Cell) -> Slot:
        name = f"{learned.name}-deltas"
        if self.store.finished(learned) is None:
            return Slot(name=name, cell=None, waits_for=learned.name)
        return Slot(name=name, cell=self.deltas(learned))


def open_continual(path: Path, out: Path | None = None, overrides: Sequence[str] = ()) -> ContinualStudy:
    """Read a recipe and the tasks; nothing is written.

    Raises:
        DeepenError: the recipe has faults, or the base or a task cannot be used.
    """
    recipe = load_document(path, ContinualRecipe, overrides)
    study = ContinualStudy(recipe, TaskSequence(recipe), Store(out or Path(recipe.output)))
    study.slots()
    check_deltas(recipe.deltas, study.sequence.tokenizer)
    return study


def compute_continual(study: ContinualStudy, share: Share, reporter: Reporter) -> Outcome:
    """Compute what is missing of a share, then write `study.json` and `report.html` of what is finished.

    Raises:
        DeepenError: a cell cannot be computed; what is finished stays, task by task.
    """
    outcome = run_cells(study.store, lambda _: study.slots(), share, reporter)
    reporter.stage("writing the table")
    record = collect_continual(study)
    write_file(study.store.study / RECORD, record.model_dump_json(indent=1) + "\n")
    write_continual_report(study.store.study, record)
    return outcome


def collect_continual(study: ContinualStudy) -> ContinualRecord:
    """Make the table of the cells finished so far; without the base's, to compare them with, it is empty.

    Raises:
        DataError: a record is malformed.
    """
    cells, store = study.sequence.cells(), study.store
    finished = {place: cell for place, cell in cells.items() if store.finished(cell)}
    base = finished.pop(("base", None), None)
    names = [task.name for task in study.sequence.tasks]
    scores = [each.mean for each in _answers(store.directory(base), names)] if base else []
    return ContinualRecord(
        base=study.recipe.base,
        recipe=dump_recipe(study.recipe),
        scoring=study.recipe.scoring,
        tasks=[task.record for task in study.sequence.tasks],
        base_scores=scores,
        cells=[
            _sequence_cell(study, cell, method, seed, names, scores)
            for (method, seed), cell in finished.items()
            if base and seed is not None
        ],
        missing=[slot.name for slot in study.slots() if not (slot.cell and store.finished(slot.cell))],
        provenance=capture_provenance(),
    )


def _sequence_cell(
    study: ContinualStudy, cell: Cell, method: str, seed: int, names: Sequence[str], base: Sequence[float]
) -> SequenceCell:
    store = study.store
    directory = store.directory(cell)
    places = [directory / f"{number + 1}-{name}" for number, name in enumerate(names)]
    rows = [_answers(place, names[: number + 1]) for number, place in enumerate(places)]
    matrix = [[row[i].mean if i < len(row) else None for i in range(len(names))] for row in rows]
    own = [row[-1] for row in rows]
    later = [_answers(place, [name])[0].mean for place, name in zip(places, names[1:], strict=False)]
    before, record = [base[0], *later], store.finished(cell)
    overall, moved = overall_performance(matrix), backward_transfer(matrix)
    width, moved_width = overall_width(rows[-1]), transfer_width(rows[-1], own)
    general = [_general(place) for place in places]
    return SequenceCell(
        method=method,
        seed=seed,
        directory=str(directory.relative_to(store.study)),
        R=matrix,
        op=overall,
        op_low=overall - width,
        op_high=overall + width,
        bwt=moved,
        bwt_low=None if moved is None else moved - moved_width,
        bwt_high=None if moved is None else moved + moved_width,
        forward_transfer=forward_transfer(before, base),
        before=before,
        learned=[LearnedTask.model_validate(one) for one in record.result["learned"]] if record else [],
        general=general[-1],
        general_course={
            metric.task: [each[number].value for each in general] for number, metric in enumerate(general[-1])
        },
        deltas=_measured(study, cell),
    )


def _measured(study: ContinualStudy, learned: Cell) -> list[TraceDelta]:
    """Return the three deltas of a method, without values as far as they are not measured."""
    record = study.store.finished(study.deltas(learned)) if study.recipe.deltas else None
    return read_deltas(record.result["deltas"] if record else [])


def _answers(place: Path, names: Sequence[str]) -> list[TaskAnswers]:
    return [read_record(place / ANSWERS / f"{name}.json", TaskAnswers) for name in names]


def _general(place: Path) -> list[Metric]:
    record = place / GENERAL
    found = read_record(record, EvaluationRecord).metrics if record.exists() else []
    return [metric for metric in found if metric.metric == "nats_per_token"]


def overall_width(last: Sequence[TaskAnswers]) -> float:
    """Return half the width of OP's 95% interval: tasks' test items are independent samples."""
    return _WIDTH * sqrt(sum(_squared_error(each.scores) for each in last)) / len(last)


def transfer_width(last: Sequence[TaskAnswers], own: Sequence[TaskAnswers]) -> float:
    """Return half the width of BWT's 95% interval: the same items answered twice, so by their differences."""
    moves = [
        [after - then for after, then in zip(here.scores, there.scores, strict=True)]
        for here, there in zip(last[:-1], own[:-1], strict=True)
    ]
    return _WIDTH * sqrt(sum(map(_squared_error, moves))) / len(moves) if moves else 0.0


def _squared_error(values: Sequence[float]) -> float:
    return variance(values) / len(values) if len(values) > 1 else 0.0
