"""TRACE's three deltas of a study of continual learning, judged by a local endpoint."""

import json
from statistics import fmean

import pytest
import yaml
from judge_stub import completion, serving
from suite_tasks import write_own_tasks
from tiny_run import WORDS, write_base
from transformers import AutoTokenizer

from deepen.cli import main
from deepen.records import Metric
from deepen.studies import engine
from deepen.studies.continual.deltas import GENERAL, SAFETY, summarise

pytest.importorskip("lm_eval", reason="benchmarks need deepen[eval]")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A tiny base with a chat template, a task to learn, benchmarks and questions."""
    monkeypatch.setattr(engine, "traceable_code", lambda: None)
    monkeypatch.setenv("DEEPEN_CACHE", str(tmp_path / "cache"))
    write_base(tmp_path / "base", max_position_embeddings=512)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path / "base")
    write_own_tasks(tmp_path / "tasks")
    pairs = [{"prompt": word, "answer": WORDS[(at + 1) % 10]} for at, word in enumerate(WORDS)]
    (tmp_path / "pairs.json").write_text(json.dumps(pairs))
    for name in ("lima", "cona"):
        lines = [{"question_id": at, "turns": [f"{name} {word}"]} for at, word in enumerate(WORDS[:4])]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def write_recipe(place, **deltas):
    content = {
        "base": str(place / "base"),
        "output": str(place / "study"),
        "tasks": [
            {"name": "pairs", "metric": "accuracy", **dict.fromkeys(("train", "test"), f"{place}/pairs.json")}
        ],
        "methods": [{"name": "once", "method": "blocks", "expand": {"blocks": 1}, "learning_rate": 1e-1}],
        "template": "plain",
        "sequence_length": 32,
        "batch": 4,
        "device": "cpu",
        **({"deltas": deltas} if deltas else {}),
    }
    path = place / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return str(path)


def study(path, capsys):
    assert main(["study", "continual", path, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_deltas_are_rows_of_the_table(place, capsys):
    without = study(write_recipe(place), capsys)
    (cell,) = without["cells"]
    assert [(each["name"], each["value"]) for each in cell["deltas"]] == [
        ("general ability", None), ("instruction following", None), ("safety", None)
    ]  # fmt: skip
    assert "not measured" in (place / "study" / "report.html").read_text()

    def prefers_the_first(body):
        # A judge who always prefers what comes first prefers nobody: a tie.
        return completion("[[7]] [[A]]")

    with serving(prefers_the_first) as stub:
        asked = {
            "general": [f"{place}/tasks/choice.yaml", f"{place}/tasks/last-word.yaml"],
            "instructions": f"{place}/lima.jsonl",
            "judge": {"url": stub.url, "model": "judge"},
            "max_new_tokens": 4,
        }
        path = write_recipe(place, **asked)
        told = study(path, capsys)
        assert stub.requests
        stub.requests.clear()
        assert study(path, capsys)["cells"] == told["cells"]
        assert not stub.requests
    (measured,) = told["cells"]
    assert told["missing"] == []
    # The sequence itself was not learned anew.
    assert {**measured, "deltas": []} == {**cell, "deltas": []}
    general, instructions, safety = measured["deltas"]
    assert [part["task"] for part in general["parts"]] == ["choice", "last-word"]
    assert general["value"] == pytest.approx(fmean(p["value"] - p["base_value"] for p in general["parts"]))
    assert general["low"] < general["value"] < general["high"]
    assert (instructions["value"], [part["n"] for part in instructions["parts"]]) == (0.0, [4])
    assert safety["value"] is None
    page = (place / "study" / "report.html").read_text()
    assert page.count("<td>not measured</td>") == 1


def test_faults_are_said_before_anything_is_learned(place, capsys):
    nobody = {"url": "http://localhost:1/v1", "model": "judge"}
    for deltas, said in (
        ({"safety": f"{place}/cona.jsonl"}, "give both"),
        ({"general": ["no-such-task.yaml"]}, "no-such-task.yaml"),
        (
            {"safety": f"{place}/none.jsonl", "judge": nobody},
            "none.jsonl",
        ),
    ):
        assert main(["study", "continual", write_recipe(place, **deltas)]) == 2
        assert said in capsys.readouterr().err
    assert not (place / "study").exists()


def metric(task, name, delta, low, high, **more):
    values = {"value": delta, "base_value": 0.0, "delta": delta, "ci_low": low, "ci_high": high}
    return Metric(task=task, metric=name, n=100, stderr=None, higher_is_better=True, **values, **more)


def test_a_delta_is_the_mean_over_tasks():
    """TRACE's General Ability Delta of LLaMA2-7B-chat after SeqFT is a mean of six differences."""
    metrics = [
        metric("mmlu", "acc", -0.04, -0.06, -0.02),
        metric("boolq", "acc", 0.02, 0.00, 0.04),
        metric("boolq", "acc_norm", 0.5, 0.4, 0.6),
    ]
    found = summarise(GENERAL, metrics)
    assert found.value == pytest.approx(-0.01)
    # Independent samples: the half-widths 0.02 and 0.02 add in squares.
    assert (found.high - found.low) / 2 == pytest.approx(0.02 / 2**0.5)
    judged = [metric("cona", "grade", 1, 0, 2), metric("cona", "preference", -0.3, -0.4, -0.2)]
    assert summarise(SAFETY, judged).value == -0.3
