"""Task files for the tests of the benchmarks: small ones of our own, and the public ones over local data."""

import json
from itertools import islice
from pathlib import Path

import yaml
from tiny_run import WORDS

ROWS = [
    {
        "query": " ".join(WORDS[at : at + 3]),
        "choices": [WORDS[(at + 3) % 10], WORDS[(at + 5) % 10], WORDS[(at + 7) % 10]],
        "gold": at % 3,
    }
    for at in range(8)
]


def write_own_tasks(directory: Path) -> Path:
    """Write one task of each kind over one file, and a broken one; return the directory."""
    directory.mkdir()
    (directory / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    about = {
        "choice": {
            "kind": "multiple_choice",
            "question": "{{query}}",
            "choices": "{{choices}}",
            "answer": "{{gold}}",
        },
        "writing": {
            "kind": "generate",
            "question": "{{query}}",
            "answer": "{{choices[0]}}",
            "max_tokens": 6,
        },
        "last-word": {"kind": "likelihood", "question": "{{query}}", "answer": "{{choices[0]}}"},
        "whole": {"kind": "likelihood", "answer": "{{query}} {{choices[0]}}"},
        "broken": {"kind": "likelihood", "answer": "{{query.no.such.key}}"},
    }
    for name, lines in about.items():
        description = {"name": name, "path": "rows.jsonl", **lines}
        (directory / f"{name}.yaml").write_text(yaml.safe_dump(description))
    return directory


def write_public_tasks(
    directory: Path, data: Path, subjects: list[str], rows: int | None = None
) -> list[str]:
    """Describe local copies of five benchmarks for the harness; return the tasks' names.

    With `rows`, only so many of each are copied: reading all takes longer than asking a few. Questions with a
    choice that a context of 512 tokens cannot hold are left out: the harness's command line breaks off there.
    """
    benchmarks = directory / "rows"
    benchmarks.mkdir()
    for file in (data / "benchmarks").glob("*.jsonl"):
        lines = file.read_text().splitlines(keepends=True)
        short = (line for line in lines if all(len(c) < 400 for c in json.loads(line).get("choices", ())))
        (benchmarks / file.name).write_text("".join(islice(short, rows)))
    (benchmarks / "mmlu").symlink_to(data / "benchmarks" / "mmlu")
    letters = ["A", "B", "C", "D"]
    choice = {"output_type": "multiple_choice", "doc_to_choice": "{{choices}}", "doc_to_target": "{{gold}}"}
    tasks = {
        "arc_challenge": _json(
            benchmarks / "arc_challenge.jsonl", **choice, doc_to_text="{{query}}\nAnswer:"
        ),
        "piqa": _json(benchmarks / "piqa.jsonl", **choice, doc_to_text="{{query}}Answer:"),
        "winogrande": _json(
            benchmarks / "winogrande.jsonl",
            output_type="multiple_choice",
            doc_to_text="{{gold}}",
            doc_to_choice="{{context_options}}",
            doc_to_target="{{continuation}}",
        ),
        "lambada_openai": _json(
            benchmarks / "lambada_openai.jsonl",
            output_type="loglikelihood",
            doc_to_text="{{context}}",
            doc_to_target="{{' '+continuation}}",
        ),
    }
    for subject in subjects:
        files = {
            split: str(benchmarks / "mmlu" / split / f"{subject}_{split}.csv") for split in ("dev", "val")
        }
        tasks[f"mmlu_{subject}"] = {
            "dataset_path": "csv",
            "dataset_kwargs": {"data_files": files, "column_names": ["question", *letters, "answer"]},
            "test_split": "val",
            "fewshot_split": "dev",
            "fewshot_config": {"sampler": "first_n"},
            "output_type": "multiple_choice",
            "doc_to_text": "{{question}}\nA. {{A}}\nB. {{B}}\nC. {{C}}\nD. {{D}}\nAnswer:",
            "doc_to_choice": letters,
            "doc_to_target": "{{['A', 'B', 'C', 'D'].index(answer)}}",
        }
    for name, task in tasks.items():
        (directory / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **task}))
    return list(tasks)


def _json(file: Path, **lines: object) -> dict[str, object]:
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(file)}}}
    return {**data, "test_split": "test", "fewshot_split": "test", **lines}
