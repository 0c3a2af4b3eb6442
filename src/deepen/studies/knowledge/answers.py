"""The cell that scores held-out answers under what training left: conversations are not its texts."""

from functools import partial
from pathlib import Path
from typing import Any, Final

from deepen.checkpoint import write_file
from deepen.config import Recipe
from deepen.evaluation.heldout import evaluate_texts
from deepen.evaluation.record import build_record
from deepen.model import bypass
from deepen.pipeline.material import prepare_material
from deepen.pipeline.place import choose_place
from deepen.pipeline.plan import count_steps, plan_run
from deepen.pipeline.reporter import Reporter
from deepen.pipeline.trainee import load_base
from deepen.records import capture_provenance
from deepen.studies.cells import Cell, Computed
from deepen.training.world import join_world

RECORD: Final = "heldout.json"
_VERSION: Final = 1


def answers_cell(name: str, recipe: Recipe, tuning: Cell) -> Cell:
    """Return the cell that scores the answers which a tuning keeps out, before that tuning.

    Args:
        name: readable.
        recipe: of the tuning, with the pack that it begins with.
        tuning: its cell: the same decides what answers there are.
    """
    inputs: dict[str, Any] = {"kind": "answers", "version": _VERSION, "before": dict(tuning.inputs)}
    return Cell(name=name, inputs=inputs, compute=partial(_compute, recipe))


def _compute(recipe: Recipe, directory: Path, reporter: Reporter) -> Computed:
    outline = plan_run(recipe)
    with join_world() as world:
        material = prepare_material(outline, world, reporter)
        plan = count_steps(outline, material.mixture)
        model, autocast = load_base(plan, choose_place(plan, world))
    texts = [text for text in material.texts if text.counted is not None]
    found = evaluate_texts(model, texts, autocast=autocast, progress=reporter.progress)
    with bypass(model):
        base = evaluate_texts(model, texts, autocast=autocast, progress=reporter.progress)
    provenance = capture_provenance(seed=plan.train.seed, data=material.digests)
    record = build_record(
        texts, found, base, model=str(outline.pack), base=recipe.base, provenance=provenance
    )
    directory.mkdir(parents=True, exist_ok=True)
    write_file(directory / RECORD, record.model_dump_json(indent=1) + "\n")
    metrics = [metric.model_dump(mode="json") for metric in record.metrics]
    return Computed(result={"metrics": metrics}, provenance=provenance)
