import json
import math

import pytest
from run_directory import PROVENANCE, evaluation, items, result, text

from deepen.errors import DataError
from deepen.records import (
    EvaluationRecord,
    IdentityResult,
    Items,
    Provenance,
    RunResult,
    capture_provenance,
    read_metrics,
    read_record,
    read_result,
)


@pytest.mark.parametrize(
    "record", [result(), PROVENANCE, evaluation([text("t", "general", items(2.0, 0.1))])], ids=type
)
def test_records_read_back_equal(tmp_path, record):
    path = tmp_path / "record.json"
    path.write_text(record.model_dump_json())
    assert read_record(path, type(record)) == record


def test_a_study_is_no_run(tmp_path):
    (tmp_path / "cells").mkdir()
    with pytest.raises(DataError, match=r"holds a study; its runs lie in .*cells"):
        read_result(tmp_path)


def test_unknown_keys_are_kept(tmp_path):
    path = tmp_path / "result.json"
    path.write_text(json.dumps(result().model_dump() | {"later": [1, 2]}))
    assert read_record(path, RunResult).model_dump()["later"] == [1, 2]


def test_not_a_number_survives_as_valid_json():
    given = IdentityResult(identical=False, max_abs_difference=math.nan, checks=[])
    line = given.model_dump_json()
    json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert math.isnan(IdentityResult.model_validate_json(line).max_abs_difference)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot be read"),
        (b"", "not a RunResult"),
        (b"\xff\xfe", "not a RunResult"),
        (b"[]", "not a RunResult"),
        (b'{"method": "blocks"}', "not a RunResult: base: Field required"),
        (b"[" * 100_000, "not a RunResult"),
        (b'{"format_version": 7}', "format_version is 7, this deepen reads 1"),
    ],
)
def test_a_bad_record_is_named_in_a_line(tmp_path, content, said):
    path = tmp_path / "result.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=said) as raised:
        read_record(path, RunResult)
    assert str(raised.value).startswith(f"{path}: ")
    assert "\n" not in str(raised.value)


def test_columns_of_items_are_equally_long(tmp_path):
    with pytest.raises(ValueError, match="columns of 2, 2, 1 items"):
        Items(unit="window", tokens=[1, 2], bytes=[3, 4], nll=[0.5])
    record = json.loads(evaluation([text("t", "general", items(2.0, 0.1))]).model_dump_json())
    record["texts"][0]["items"]["base_nll"].pop()
    path = tmp_path / "heldout.json"
    path.write_text(json.dumps(record))
    with pytest.raises(DataError, match=r"texts\.0\.items: .*columns of 60, 60, 60, 59 items"):
        read_record(path, EvaluationRecord)


def test_provenance_describes_this_process(monkeypatch, tmp_path):
    import platform
    import subprocess

    import numpy as np

    monkeypatch.setattr("sys.argv", ["/some/where/bin/deepen", "run", "a recipe.yaml"])
    monkeypatch.chdir(tmp_path)
    found = capture_provenance(seed=5, data={"text": "d1"})
    assert found.command == "deepen run 'a recipe.yaml'"
    assert found.python == platform.python_version()
    assert found.packages["numpy"] == np.__version__
    assert (found.seed, found.data, found.git) == (5, {"text": "d1"}, None)

    def git(*arguments):
        names = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        done = subprocess.run(["git", *names, *arguments], check=True, capture_output=True, text=True)
        return done.stdout.strip()

    git("init", "-q")
    git("commit", "-q", "--allow-empty", "-m", "x")
    head = git("rev-parse", "HEAD")
    assert capture_provenance().git == head
    (tmp_path / "new").touch()
    assert capture_provenance().git == head + " with changes"
    assert Provenance.model_validate_json(found.model_dump_json()) == found


def test_provenance_of_a_module_run(monkeypatch):
    monkeypatch.setattr("sys.argv", ["/lib/deepen/__main__.py", "demo"])
    assert capture_provenance().command == "python -m deepen demo"


STEP = '{"step": %d, "tokens": %d, "loss": %s}\n'


def test_metrics_are_sorted_and_the_last_word_counts(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        STEP % (1, 8, 3.0)
        + STEP % (2, 16, 2.5)
        + '{"step": 2, "tokens": 16, "evaluation": {"t": 2.0}}\n'
        + STEP % (3, 24, 9.0)
        + STEP % (2, 16, 2.25)  # killed after step 3, resumed from step 1
    )
    training, evaluations = read_metrics(path)
    assert [(point.step, point.loss) for point in training] == [(1, 3.0), (2, 2.25), (3, 9.0)]
    assert [(point.step, point.evaluation) for point in evaluations] == [(2, {"t": 2.0})]


def test_a_cut_line_at_the_end_is_passed_over_and_no_other(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(STEP % (1, 8, 3.0) + '{"step": 2, "tok')
    assert [point.step for point in read_metrics(path)[0]] == [1]
    path.write_text('{"step": 2, "tok\n' + STEP % (1, 8, 3.0))
    with pytest.raises(DataError, match=r"metrics\.jsonl:1: not a TrainingPoint"):
        read_metrics(path)


def test_metrics_read_what_json_writes(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps({"step": 1, "tokens": 8, "loss": float("nan")}) + "\n")
    assert math.isnan(read_metrics(path)[0][0].loss)
    assert read_metrics(tmp_path / "absent.jsonl") == ([], [])
