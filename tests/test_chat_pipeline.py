"""A pack and its base, both from one load, judged by a local endpoint and solving tasks."""

import json

import pytest
from judge_stub import completion, serving
from tiny_run import write_base, write_trained_pack
from transformers import AutoTokenizer

from deepen.errors import EvaluationError
from deepen.evaluation.chat import Endpoint, Judge
from deepen.evaluation.sandbox import try_layers
from deepen.pipeline.chat import ChatRequest, evaluate_chat
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


def request(place, out, target="pack", **options):
    return ChatRequest(target=str(place / target), out=out, max_new_tokens=4, device="cpu", **options)


def judging(stub):
    return Judge(endpoint=Endpoint(url=stub.url, model="judge", timeout=5, attempts=1))


def test_a_pack_and_its_base_are_judged_and_kept(place, tmp_path, monkeypatch):
    if missing := try_layers().missing:
        pytest.skip(f"this machine leaves open {', '.join(missing)}")
    asked = {"questions": place / "quiz.jsonl", "tools": place / "sums.jsonl", "turns": 2}
    with serving(lambda body: completion(f"[[{len(str(body)) % 10 + 1}]] [[A]]")) as stub:
        quiz, sums = evaluate_chat(request(place, tmp_path / "of-pack", judge=judging(stub), **asked))
        count = len(stub.requests)
        monkeypatch.setattr(
            "deepen.evaluation.chat.live.LiveChat._generate", lambda *_: pytest.fail("generated again")
        )
        again = evaluate_chat(request(place, tmp_path / "of-pack", judge=judging(stub), **asked))
        monkeypatch.undo()
        assert len(stub.requests) == count
        (alone,) = evaluate_chat(
            request(place, tmp_path / "of-base", "base", judge=judging(stub), questions=asked["questions"])
        )
    assert [record.scores for record in again] == [quiz.scores, sums.scores]
    assert [metric.metric for metric in (*quiz.metrics, *sums.metrics)] == [
        "grade", "preference", "sr@1", "sr@2",
    ]  # fmt: skip
    assert read_record(tmp_path / "of-pack" / "task-quiz.json", TaskRecord).scores == quiz.scores
    assert quiz.provenance.data["judge"] == "judge"
    both, of_base = (
        [json.loads(line) for line in (tmp_path / where / "items" / "quiz.jsonl").read_text().splitlines()]
        for where in ("of-pack", "of-base")
    )
    # The base bypassed answers as the base loaded from disk, and not as the model.
    assert [line["base_answers"] for line in both] == [line["answers"] for line in of_base]
    assert [line["base_answers"] for line in both] != [line["answers"] for line in both]
    assert alone.scores[0].values == quiz.scores[0].base


def test_questions_need_a_judge_and_something_must_be_asked(place, tmp_path):
    with pytest.raises(EvaluationError, match="questions need a judge"):
        evaluate_chat(request(place, tmp_path, questions=place / "quiz.jsonl"))
    with pytest.raises(EvaluationError, match="nothing to ask"):
        evaluate_chat(request(place, tmp_path))
