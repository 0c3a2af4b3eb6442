"""A pack and its base, both from one load, judged by a local endpoint and solving tasks."""

import json
import shutil

import pytest
from judge_stub import completion, serving
from tiny_run import write_base, write_trained_pack
from transformers import AutoTokenizer

from deepen.cli import main
from deepen.errors import EvaluationError
from deepen.evaluation.chat.live import LiveChat
from deepen.evaluation.sandbox import try_layers
from deepen.pipeline.chat import ChatSettings
from deepen.pipeline.evaluate import Request, evaluate_model
from deepen.records import TaskRecord, read_record

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny base with a chat template, a pack on it that is not the identity, questions and tasks."""
    root = tmp_path_factory.mktemp("chat")
    write_base(root / "base", max_position_embeddings=2048)
    tokenizer = AutoTokenizer.from_pretrained(root / "base")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(root / "base")
    write_trained_pack(root / "base", root / "pack")
    questions = [{"question_id": at, "turns": [f"block {at}", "gate"]} for at in range(3)]
    (root / "quiz.jsonl").write_text("".join(json.dumps(line) + "\n" for line in questions))
    (root / "sums.jsonl").write_text(json.dumps({"task_id": 1, "prompt": "6 * 7?", "answer": 42}) + "\n")
    return root


def asking(place, out, *options, target="pack"):
    """Evaluate as a user does; return the exit code."""
    given = ("evaluate", place / target, "--out", out, "--device", "cpu", "--max-new-tokens", 4, *options)
    return main([*map(str, given)])


def judged_by(stub):
    return ("--judge", stub.url, "--judge-model", "judge")


def record(out, name):
    return read_record(out / f"task-{name}.json", TaskRecord)


def items(out, name):
    return [json.loads(line) for line in (out / "items" / f"{name}.jsonl").read_text().splitlines()]


def test_a_pack_and_its_base_are_judged_and_kept(place, tmp_path, monkeypatch, capsys):
    if missing := try_layers().missing:
        pytest.skip(f"this machine leaves open {', '.join(missing)}")
    out = tmp_path / "of-pack"
    with serving(lambda body: completion(f"[[{len(str(body)) % 10 + 1}]] [[A]]")) as stub:
        asked = (
            "--chat",
            place / "quiz.jsonl",
            *judged_by(stub),
            "--tools",
            place / "sums.jsonl",
            "--turns",
            2,
        )
        assert asking(place, out, *asked, "--json") == 0
        quiz, sums = record(out, "quiz"), record(out, "sums")
        printed = json.loads(capsys.readouterr().out)["metrics"]
        count = len(stub.requests)
        with monkeypatch.context() as patch:
            patch.setattr(
                "deepen.pipeline.subject.load", lambda *_, **__: pytest.fail("the model was loaded")
            )
            assert asking(place, out, *asked) == 0
        assert len(stub.requests) == count
        assert asking(place, tmp_path / "of-base", *asked[:6], target="base") == 0
    assert [record(out, name).scores for name in ("quiz", "sums")] == [quiz.scores, sums.scores]
    assert [metric["metric"] for metric in printed] == ["grade", "preference", "sr@1", "sr@2"]
    assert {body["model"] for body in stub.requests} == {"judge"}
    assert quiz.provenance.data["judge"] == "judge"
    # The base bypassed answers as the base loaded from disk, and not as the model.
    both, of_base = items(out, "quiz"), items(tmp_path / "of-base", "quiz")
    assert [line["base_answers"] for line in both] == [line["answers"] for line in of_base]
    assert [line["base_answers"] for line in both] != [line["answers"] for line in both]
    assert record(tmp_path / "of-base", "quiz").scores[0].values == quiz.scores[0].base


def test_other_ends_of_a_reply_are_asked_anew(place, tmp_path, monkeypatch):
    """What ends a reply stands in generation_config.json; its replies are others."""
    seen, generate = [], LiveChat._generate
    monkeypatch.setattr(LiveChat, "_generate", lambda *a: (seen.append(1), generate(*a))[1])
    base = shutil.copytree(place / "base", tmp_path / "base")
    with serving(lambda body: completion("[[5]]")) as stub:
        asked = ("--chat", place / "quiz.jsonl", *judged_by(stub))
        for _ in range(2):
            assert asking(tmp_path, tmp_path / "out", *asked, target="base") == 0
        first = len(seen)
        (base / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 4]}))
        assert asking(tmp_path, tmp_path / "out", *asked, target="base") == 0
    assert (first, len(seen)) == (2, 4)


def test_a_judge_that_fails_leaves_the_rest(place, tmp_path, capsys):
    (tmp_path / "kept.txt").write_text("block gate norm. " * 200)
    with serving(lambda body: (400, {"error": "no such model"}, {})) as stub:
        asked = ("--chat", place / "quiz.jsonl", *judged_by(stub), "--text", tmp_path / "kept.txt")
        assert asking(place, tmp_path / "out", *asked) == 2
    said = capsys.readouterr()
    assert "kept  nats_per_token" in said.out
    assert "quiz: judge http" in said.err
    assert "no such model" in said.err
    assert not (tmp_path / "out" / "task-quiz.json").exists()


def test_what_cannot_be_asked_is_said_before_a_model_is_loaded(place, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("deepen.pipeline.subject.load", lambda *_, **__: pytest.fail("the model was loaded"))
    judge = ("--judge", "http://localhost/v1", "--judge-model", "x")
    (tmp_path / "quiz.jsonl").write_text((place / "sums.jsonl").read_text())
    for options, said in [
        (("--chat", place / "quiz.jsonl"), "--chat, --judge and --judge-model belong together"),
        (judge, "--chat, --judge and --judge-model belong together"),
        (("--chat", tmp_path / "none.jsonl", *judge), "none.jsonl"),
        (("--chat", place / "sums.jsonl", *judge), "sums.jsonl"),
        (("--chat", place / "quiz.jsonl", "--judge", "here", "--judge-model", "x"), "must be an address"),
        (
            ("--chat", place / "quiz.jsonl", *judge, "--tools", tmp_path / "quiz.jsonl"),
            "give the files names",
        ),
    ]:
        assert asking(place, tmp_path / "out", *options) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_questions_need_a_judge(place):
    asked = ChatSettings(questions=place / "quiz.jsonl")
    with pytest.raises(EvaluationError, match="questions need a judge"):
        evaluate_model(Request(target=str(place / "pack"), chat=asked))
