"""Put a finished pretraining run into the package as the embedded base, with its training record.

python studies/embedded_base/ship.py WORK      WORK as given to build.py
"""

import json
import shutil
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from deepen.checkpoint import Checkpoint, atomic_directory, full_fingerprint
from deepen.demo.demo import BASE
from deepen.model import save_tensors
from deepen.records import EvaluationRecord, Provenance, RunResult, read_metrics, read_record


def main(work: Path) -> None:
    run, trained = work / "run", work / "run" / "model"
    model = AutoModelForCausalLM.from_pretrained(trained)
    with atomic_directory(BASE, overwrite=True) as staged:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(trained / name, staged / name)
        config = json.loads((trained / "config.json").read_text()) | {"dtype": "bfloat16"}
        (staged / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        tensors = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
        save_tensors(staged / "model.safetensors", tensors, dict.fromkeys(tensors, torch.bfloat16))
        (staged / "training.json").write_text(json.dumps(record(work, run), indent=1) + "\n")
    print(f"{BASE}: fingerprint {full_fingerprint(Checkpoint.open(BASE))[:16]}…")


def record(work: Path, run: Path) -> dict[str, object]:
    training, evaluations = read_metrics(run / "metrics.jsonl")
    result = read_record(run / "result.json", RunResult)
    return {
        "what": "pretrained from random weights by studies/embedded_base; docstrings of an installation",
        "text": {
            name: {
                "documents": len(lines),
                "characters": sum(len(json.loads(line)["text"]) for line in lines),
            }
            for name in ("general", "heldout")
            for lines in [(work / f"{name}.jsonl").read_text().splitlines()]
        },
        "steps": result.steps,
        "tokens": result.tokens,
        "seconds": result.seconds,
        "recipe": (Path(__file__).parent / "recipe.yaml").read_text(),
        "training_loss": [[point.tokens, round(point.loss, 4)] for point in training[49::50]],
        "heldout_loss": [[point.tokens, round(*point.evaluation.values(), 4)] for point in evaluations],
        "metrics": [
            metric.model_dump(mode="json", include={"task", "metric", "value", "stderr", "n"})
            for metric in read_record(run / "evaluation" / "heldout.json", EvaluationRecord).metrics
        ],
        "provenance": read_record(run / "environment.json", Provenance).model_dump(mode="json"),
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]))
