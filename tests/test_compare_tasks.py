"""Benchmark tasks beside held-out losses: paired on the same questions, or left out by name."""

import io
import json

import numpy as np
import pytest
from rich.console import Console
from run_directory import PROVENANCE, items, text, write_run
from scipy.stats import binomtest

from deepen.cli import main
from deepen.errors import DataError
from deepen.evaluation import compare_runs
from deepen.evaluation.suites.comparing import compare_tasks
from deepen.evaluation.verdict import holm
from deepen.records import Metric, TaskRecord, TaskScores
from deepen.report import describe_differences, print_table, write_comparison_page

N = 60
BASE = np.arange(N) % 3 == 0
BETTER = BASE | (np.arange(N) % 4 == 1)
WORSE = BASE & (np.arange(N) > 20)


def task_record(values, base=BASE, *, task="quiz:2", asked="the questions", role="general", **changes):
    scores = [
        TaskScores(
            task=task,
            metric="acc",
            higher_is_better=True,
            values=values.astype(float).tolist(),
            base=None if base is None else base.astype(float).tolist(),
        )
    ]
    metrics = [
        Metric(task=task, role=role, metric="acc", value=0, stderr=None, n=N),
        Metric(task=task, role=role, metric="perplexity", value=7.5, stderr=None, n=N),
    ]
    given = {
        "task": task, "identity": "i", "asked": asked, "model": "m", "limit": None, "metrics": metrics,
        "base": None if base is None else "models/stories260k", "scores": scores, "results": {},
        "items": "items/quiz-2.jsonl", "seconds": 1.0, "provenance": PROVENANCE,
    }  # fmt: skip
    (record,) = compare_tasks([TaskRecord(**(given | changes))])
    return record


def write_evaluation(directory, *records):
    directory.mkdir(parents=True, exist_ok=True)
    for record in records:
        name = record.task.replace(":", "-")
        (directory / f"task-{name}.json").write_text(record.model_dump_json())
    return directory


@pytest.fixture
def runs(tmp_path):
    """Two runs with a text, and a task each has answered."""
    given = {"blocks": (0.02, BETTER), "full": (0.4, WORSE)}
    places = []
    for name, (loss, answers) in given.items():
        places.append(write_run(tmp_path / name, [text("stories", "general", items(1.5, loss))]))
        write_evaluation(places[-1] / "evaluation", task_record(answers))
    return places


def test_a_task_is_a_column_beside_the_losses(runs):
    found = compare_runs(runs)
    columns = [(column.name, column.metric, column.pooled, column.n) for column in found.columns]
    assert columns == [("stories", None, True, N), ("quiz:2", "acc", False, N)]
    assert found.columns[1].higher_is_better
    base, first, second = (row.cells[1] for row in found.rows)
    assert (base.value, first.value, second.value) == (BASE.mean(), BETTER.mean(), WORSE.mean())
    assert second.from_first.delta == pytest.approx(WORSE.mean() - BETTER.mean())
    lost, gained = int((BETTER & ~WORSE).sum()), int((WORSE & ~BETTER).sum())
    assert second.from_first.p == pytest.approx(binomtest(lost, lost + gained).pvalue)
    assert first.from_base.ci_low < first.from_base.delta < first.from_base.ci_high
    for kind in ("from_base", "from_first"):
        family = [each for row in found.rows for cell in row.cells if (each := getattr(cell, kind))]
        assert [each.p_holm for each in family] == holm([each.p for each in family])
    assert len(family) == 2
    assert found.left_out == ["quiz:2 perplexity: no score of single items"]


def test_tasks_are_shown_and_said(runs, tmp_path, capsys):
    found = compare_runs(runs)
    for width in (60, 300):
        console = Console(width=width, file=io.StringIO())
        print_table(found, console)
        shown = console.file.getvalue()
        assert all(word in shown for word in ("quiz:2", "acc ↑", "0.333", "0.500", "more is better"))
    (said, left_out) = describe_differences(found)
    assert "quiz:2 acc" in said
    assert "general loss" in said
    assert left_out == "left out: quiz:2 perplexity: no score of single items"
    page = write_comparison_page(found, tmp_path / "page.html").read_text()
    assert "quiz:2: must be kept" in page
    assert "acc, higher is better, 60 items" in page
    assert main(["compare", *map(str, runs), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(found.model_dump_json())


def test_directories_and_records_are_compared_as_runs_are(runs, tmp_path):
    record = runs[1] / "evaluation" / "task-quiz-2.json"
    plain = write_evaluation(tmp_path / "plain", task_record(WORSE))
    whole = compare_runs(runs).rows[2].cells[1]
    for place in (record, plain):
        found = compare_runs([runs[0], place])
        assert [column.name for column in found.columns] == ["quiz:2"]
        cell = found.rows[2].cells[0]
        assert (cell.value, cell.from_first.p) == (whole.value, whole.from_first.p)
        assert found.left_out[0] == f"stories: not evaluated in {place}"


def test_other_questions_are_left_out_and_another_base_is_refused(runs, tmp_path):
    other = write_evaluation(
        tmp_path / "other", task_record(WORSE, asked="others"), task_record(WORSE, task="b")
    )
    write_evaluation(runs[0] / "evaluation", task_record(BETTER, task="b"))
    found = compare_runs([runs[0], other])
    assert [column.name for column in found.columns] == ["b"]
    assert f"quiz:2 acc: not asked the same as in {runs[0]}: {other}" in found.left_out
    alone = write_evaluation(tmp_path / "alone", task_record(WORSE, asked="others"))
    with pytest.raises(DataError, match="no text or task was evaluated in all"):
        compare_runs([runs[0], alone])
    based = write_evaluation(tmp_path / "based", task_record(WORSE, ~BASE))
    with pytest.raises(DataError, match="its base scores quiz:2 otherwise"):
        compare_runs([runs[0], based])
    rounded = BASE.copy()
    rounded[0] = False  # one answer of 60 may fall otherwise in another precision
    compare_runs([runs[0], write_evaluation(tmp_path / "rounded", task_record(WORSE, rounded))])


def test_models_without_a_base_are_compared_with_each_other(tmp_path):
    places = [
        write_evaluation(tmp_path / name, task_record(answers, None))
        for name, answers in (("a", BETTER), ("b", WORSE))
    ]
    found = compare_runs(places)
    base, first, second = (row.cells[0] for row in found.rows)
    assert found.base is base.value is first.from_base is second.from_base is None
    assert second.from_first.delta == pytest.approx(WORSE.mean() - BETTER.mean())
    print_table(found, Console(file=io.StringIO()))
    assert "no base was scored" in write_comparison_page(found, tmp_path / "page.html").read_text()


def test_an_empty_place_is_refused(tmp_path, runs):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no finished run"):
        compare_runs([runs[0], tmp_path / "empty"])
