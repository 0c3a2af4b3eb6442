"""Choose the learning rate of each of the demo's rows on one grid, by domain loss on text of its own.

    python studies/demo_rates/tune.py WORK [N/M]     WORK is kept, finished runs are not repeated

The text that chooses is taken from training modules the demo does not train on; the demo's held-out modules
are not looked at. With N/M only every M-th cell is run (N = 0 … M-1), so that processes can share the work;
a call without it runs what is missing and writes record.json. Choosing and changing demo/settings.yaml is
left to a person, who can see the whole table.
"""

import json
import sys
import sysconfig
from pathlib import Path

from deepen.checkpoint import write_file
from deepen.config import Recipe, TextSet
from deepen.demo.demo import demo_recipes, write_texts
from deepen.demo.text import code, documents_apart, standard_library
from deepen.evaluation import compare_runs
from deepen.pipeline.run import run_recipe
from deepen.records import Provenance, read_record

RATES = (3e-4, 1e-3, 2e-3, 4e-3, 8e-3)
LAYOUTS = {"blocks": {"blocks": 6}, "blocks-3": {"blocks": 3}}
TUNING_MODULES = 60


def main(work: Path, share: str | None) -> None:
    texts = work / "text"
    if not (texts / "tuning.jsonl").exists():
        write_texts(texts)
        write_tuning_text(texts / "tuning.jsonl")
    cells = [(row, rate) for rate in RATES for row in ("full", *LAYOUTS)]
    number, parts = map(int, share.split("/")) if share else (0, 1)
    for row, rate in cells[number::parts]:
        run_recipe(cell(work, row, rate), resume=True)
        print(f"{row} {rate:g}: done", flush=True)
    if not share:
        write_record(work, cells)


def write_tuning_text(path: Path) -> None:
    root = Path(sysconfig.get_path("stdlib"))
    training, _ = documents_apart(standard_library(), root)
    documents = [text for _, text in code(training[-TUNING_MODULES:])]
    write_file(path, "".join(json.dumps({"text": text}) + "\n" for text in documents))


def cell(work: Path, row: str, rate: float) -> Recipe:
    recipe = demo_recipes(work)["full" if row == "full" else "blocks"]
    tuning = TextSet(name="tuning", path=str(work / "text" / "tuning.jsonl"))
    changes = {
        "output": str(work / "runs" / f"{row}-{rate:g}"),
        "train": recipe.train.model_copy(update={"learning_rate": rate, "evaluate_every": 1000}),
        "evaluate": recipe.evaluate.model_copy(update={"domain": (tuning,)}),
    }
    if row in LAYOUTS:
        assert recipe.expand is not None
        changes["expand"] = recipe.expand.model_copy(update=LAYOUTS[row])
    return recipe.model_copy(update=changes)


def write_record(work: Path, cells: list[tuple[str, float]]) -> None:
    runs = [work / "runs" / f"{row}-{rate:g}" for row, rate in cells]
    comparison = compare_runs(runs)
    columns = [column.name for column in comparison.columns]
    losses = {
        row.label: dict(zip(columns, [c.value for c in row.cells], strict=True)) for row in comparison.rows
    }
    record = {
        "what": "nats per token after the demo's token budget, by row and learning rate; base: the start",
        "chosen_by": "tuning (domain text of its own)",
        "losses": losses,
        "seconds": {run.name: json.loads((run / "result.json").read_text())["seconds"] for run in runs},
        "provenance": read_record(runs[0] / "environment.json", Provenance).model_dump(mode="json"),
    }
    write_file(Path(__file__).parent / "record.json", json.dumps(record, indent=1) + "\n")
    for label, values in losses.items():
        print(f"{label:14}", "  ".join(f"{name} {value:.4f}" for name, value in values.items()))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else None)
