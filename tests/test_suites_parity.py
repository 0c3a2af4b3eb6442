"""Our numbers are those of lm-evaluation-harness's own command line, to the bit."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from suite_tasks import write_public_tasks

from deepen.evaluation.suites import parse_task
from deepen.records import TaskRecord, read_record

pytest.importorskip("lm_eval", reason="benchmarks need deepen[eval]")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")


def command_line(
    model: Path, tasks: list[str], folder: Path, out: Path, *, limit: int, batch: int
) -> list[str]:
    return [
        "lm_eval", "run", "--model", "hf", "--model_args", f"pretrained={model}", "--device", "cpu",
        "--tasks", ",".join(tasks), "--include_path", str(folder), "--num_fewshot", "2",
        "--limit", str(limit), "--batch_size", str(batch), "--log_samples", "--output_path", str(out),
    ]  # fmt: skip


def theirs(out: Path) -> tuple[dict[str, dict[str, float]], dict[str, list[dict]]]:
    """Their figures, and their items by task."""
    (results,) = out.rglob("results_*.json")
    items = {
        path.name.removeprefix("samples_").rsplit("_", 1)[0]: [
            json.loads(line) for line in path.read_text().splitlines()
        ]
        for path in out.rglob("samples_*.jsonl")
    }
    return json.loads(results.read_text())["results"], items


def check_parity(model: Path, tasks: list[str], folder: Path, out: Path, *, limit: int, batch: int) -> None:
    from deepen.pipeline.evaluate import Request, evaluate_model

    figures, their_items = theirs(out / "theirs")
    found = evaluate_model(
        Request(
            target=str(model),
            tasks=tuple(parse_task(f"{task}:2") for task in tasks),
            local=folder,
            limit=limit,
            batch_size=batch,
            device="cpu",
            out=out / "ours",
        )
    )
    assert not found.failures
    for task in tasks:
        record = read_record(out / "ours" / f"task-{task}-2.json", TaskRecord)
        expected = {k: v for k, v in figures[task].items() if "," in k and "_stderr," not in k}
        assert record.results[task] == expected, task
        assert {f"{m.metric},none": m.value for m in record.metrics} == expected
        errors = {f"{m.metric}_stderr,none": m.stderr for m in record.metrics if m.metric.startswith("acc")}
        assert errors == pytest.approx({key: figures[task][key] for key in errors}, rel=1e-12)
        lines = [json.loads(line) for line in (out / "ours" / record.items).read_text().splitlines()]
        for mine, other in zip(
            lines, sorted(their_items[task], key=lambda item: item["doc_id"]), strict=True
        ):
            asked = [list(request.values()) for request in other["arguments"].values()]
            assert mine["request"] == asked
            assert [[float(n), str(g)] for n, g in mine["answer"]] == [
                [float(n), g] for n, g in other["filtered_resps"]
            ]


def test_a_few_items_of_each_benchmark(data_dir, tmp_path, monkeypatch):
    model = data_dir / "models" / "stories260k"
    folder = tmp_path / "tasks"
    folder.mkdir()
    tasks = write_public_tasks(folder, data_dir, ["anatomy"], rows=20)
    import lm_eval.tasks as harness
    from lm_eval.__main__ import cli_evaluate

    # The index of the harness's own thousands of tasks takes longer than all the rest, and is not needed.
    build = harness.TaskManager.__init__
    monkeypatch.setattr(
        harness.TaskManager,
        "__init__",
        lambda self, *all, **more: build(self, *all, **{**more, "include_defaults": False}),
    )
    asked = command_line(model, tasks, folder, tmp_path / "theirs", limit=4, batch=1)
    monkeypatch.setattr(sys, "argv", asked)
    with warnings.catch_warnings(action="ignore"):
        cli_evaluate()
    check_parity(model, tasks, folder, tmp_path, limit=4, batch=1)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("task", ["arc_challenge", "piqa", "winogrande", "lambada_openai", "mmlu"])
def test_hundreds_of_items_by_the_command_line_itself(data_dir, tmp_path, task):
    model = data_dir / "models" / "stories260k"
    folder = tmp_path / "tasks"
    folder.mkdir()
    subjects = ["anatomy", "marketing", "moral_disputes"]
    tasks = [name for name in write_public_tasks(folder, data_dir, subjects) if name.startswith(task)]
    limit = 400 // len(tasks)
    # One task a call: the command line puts those of one call into common batches, which round differently.
    for name in tasks:
        asked = command_line(model, [name], folder, tmp_path / name / "theirs", limit=limit, batch=8)
        done = subprocess.run(
            [sys.executable, "-m", *asked],
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        check_parity(model, [name], folder, tmp_path / name, limit=limit, batch=8)
