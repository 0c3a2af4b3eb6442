"""Gather finished runs of one base into one committed record: figures, proofs, recipes, provenance.

    python studies/record.py OUT.json LABEL=RUN [LABEL=RUN ...]

Item-level losses stay in the runs; what is kept here is what a README may quote.
"""

import json
import sys
from pathlib import Path

from deepen.checkpoint import write_file
from deepen.config import dump_recipe, load_recipe
from deepen.evaluation import compare_runs
from deepen.records import EvaluationRecord, Provenance, RunResult, read_record

ROOT = Path(__file__).resolve().parents[1]


def main(out: Path, runs: dict[str, Path]) -> None:
    record = {
        "comparison": compare_runs(list(runs.values()), list(runs)).model_dump(mode="json"),
        "runs": {label: describe(run) for label, run in runs.items()},
    }
    # Paths of the machine it was made on say nothing to others.
    write_file(out, (json.dumps(record, indent=1) + "\n").replace(f"{ROOT}/", ""))


def describe(run: Path) -> dict[str, object]:
    metrics = read_record(run / "evaluation" / "heldout.json", EvaluationRecord).metrics
    return {
        "result": read_record(run / "result.json", RunResult).model_dump(mode="json"),
        "metrics": [metric.model_dump(mode="json") for metric in metrics],
        "recipe": dump_recipe(load_recipe(run / "recipe.yaml")),
        "provenance": read_record(run / "environment.json", Provenance).model_dump(mode="json"),
    }


if __name__ == "__main__":
    pairs = (argument.partition("=") for argument in sys.argv[2:])
    main(Path(sys.argv[1]), {label: Path(run) for label, _, run in pairs})
