"""Graded questions against a local endpoint: what it may answer, and what comes of it."""

import json
import threading
import time

import numpy as np
import pytest
from judge_stub import completion, serving

from deepen.errors import DeepenError, EvaluationError
from deepen.evaluation.chat import Endpoint, Journal, Judge, Question, read_questions, score_questions
from deepen.evaluation.chat.endpoint import ask
from deepen.evaluation.chat.judge import Case, read_choice, read_grade
from deepen.evaluation.chat.messages import user

HELLO = [user("hello")]
QUESTIONS = [
    Question(question_id=at, category=("math", "writing")[at % 2], turns=(f"first {at}", f"second {at}"))
    for at in range(6)
]


class Scripted:
    """Answers with its name and the question."""

    def __init__(self, identity):
        self.identity, self.asked = identity, 0

    def reply(self, conversations, stop=()):
        self.asked += len(conversations)
        assert all(each[-1]["role"] == "user" for each in conversations)
        return [f"{self.identity} says {each[-1]['content']} of {len(each)}" for each in conversations]


def endpoint(stub, **options):
    return Endpoint(url=stub.url, model="judge", **{"timeout": 5, "backoff": 0.001, **options})


def replies(*found):
    """Answer one after the other."""
    left = iter(found)
    return lambda _: next(left)


def test_an_answer_comes_with_the_key_and_what_was_asked(monkeypatch):
    monkeypatch.setenv("SOME_KEY", "secret")
    with serving(lambda _: completion("hi")) as stub:
        answer = ask(endpoint(stub, key_variable="SOME_KEY", options={"temperature": 0, "seed": 1}), HELLO)
    assert (answer.text, answer.refused, stub.paths) == ("hi", False, ["/v1/chat/completions"])
    assert stub.requests == [{"model": "judge", "messages": HELLO, "temperature": 0, "seed": 1}]
    assert stub.headers[0]["Authorization"] == "Bearer secret"


def test_without_a_key_none_is_sent(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with serving(lambda _: completion("hi")) as stub:
        ask(endpoint(stub), HELLO)
    assert "Authorization" not in stub.headers[0]


@pytest.mark.parametrize(
    "first",
    [
        (429, {"error": "slow down"}, {"Retry-After": "0"}),
        (503, b"", {}),
        (200, b"<html>", {}),
        (200, {"error": {"message": "overloaded"}}, {}),
        (200, {"choices": []}, {}),
        (200, {"choices": [{"message": None}]}, {}),
        0.5,
    ],
)
def test_what_may_pass_is_asked_again(first):
    with serving(replies(first, completion("hi"))) as stub:
        assert ask(endpoint(stub, timeout=0.2), HELLO).text == "hi"
    assert len(stub.requests) == 2


class Waits(threading.Event):
    """Notes how long it was to wait, and does not."""

    def __init__(self):
        super().__init__()
        self.waited = []

    def wait(self, timeout=None):
        self.waited.append(timeout)
        return self.is_set()


def test_retry_after_counts_instead_of_the_own_wait():
    stop = Waits()
    turned_away = [(429, {}, {"Retry-After": wait}) for wait in ("7", "9999", "Mon, 1 Jan 2029 00:00:00 GMT")]
    with serving(replies(*turned_away, completion("hi"))) as stub:
        ask(endpoint(stub, backoff=1), HELLO, stop)
    assert stop.waited[:2] == [7, 60]
    assert 3 <= stop.waited[2] <= 5  # the third of 1, 2, 4, give or take a quarter


@pytest.mark.parametrize(
    ("answer", "said", "requests"),
    [
        ((401, {"error": "bad key secret"}, {}), "status 401: .*bad key ….*\n.*OPENAI_API_KEY", 1),
        ((404, {"error": "no such model"}, {}), "status 404: .*no such model", 1),
        ((302, b"", {"Location": "http://127.0.0.1:9/"}), "status 302", 1),
        ((500, {"error": "broken"}, {}), "3 attempts failed, the last: status 500: .*broken", 3),
        ((200, b"<html>", {}), "3 attempts failed, the last: not a chat completion: '<html>'", 3),
        (0.3, "no answer in 0.1 s|Remote end closed", 3),
    ],
)
def test_what_does_not_pass_is_said(monkeypatch, answer, said, requests):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    with serving(lambda _: answer) as stub, pytest.raises(EvaluationError, match=said) as caught:
        ask(endpoint(stub, attempts=3, timeout=0.1 if answer == 0.3 else 5), HELLO)
    assert "secret" not in str(caught.value)
    assert len(stub.requests) == requests


def test_nobody_there():
    with serving(lambda _: completion("")) as stub:
        pass
    with pytest.raises(EvaluationError, match=r"2 attempts failed, the last: .*refused"):
        ask(endpoint(stub, attempts=2), HELLO)


@pytest.mark.parametrize("url", ["file:///etc/passwd", "localhost:8000", "https://me:pw@host/v1", ""])
def test_no_address(url):
    with pytest.raises(EvaluationError, match="must be an address"):
        Endpoint(url=url, model="judge")


@pytest.mark.parametrize(
    ("text", "grade"),
    [("Good. Grade: [[7]]", 7), ("[[ 8.5 ]]", 8.5), ("It claims [[10]].\nGrade: [[2]]", 2)]
    + [(text, None) for text in ("7", "[[0]]", "[[11]]", "[[ten]]", "[7]", "")],
)
def test_grades_are_read(text, grade):
    assert read_grade(text) == grade


def test_choices_are_read():
    assert [read_choice(text) for text in ("[[A]]", "not [[A]] but [[C]]", "[[D]]", "A")] == [
        "A",
        "C",
        None,
        None,
    ]


def test_the_judge_sees_the_turns_so_far_and_their_references():
    question = Question(question_id=1, turns=("one?", "two?"), reference=("", "the right one"))
    answers = ["first answer", "second answer"]
    first, second = (
        Case(question=question, turn=turn, answers=(answers,), about="").prompt() for turn in (0, 1)
    )
    assert "one?" in first
    assert "first answer" in first
    assert not any(text in first for text in ("two?", "second answer", "right one", "reference"))
    assert all(text in second for text in ("one?", "two?", *answers, "the right one"))
    both = Case(question=question, turn=0, answers=(["mine"], ["<b> theirs"]), about="").prompt()
    assert both.index("mine") < both.index("<b> theirs")


def grade_by(wanted):
    """A judge who gives the grade `wanted` says, and prefers the model's answers in even questions."""

    def answer(body):
        text = body["messages"][0]["content"]
        if "comparing" not in text:
            return completion(f"Grade: [[{wanted(text)}]]")
        model_first = text.index("model says") < text.index("base says")
        even = any(f"first {at} " in text for at in (0, 2, 4))
        return completion("[[A]]" if model_first == even else "[[B]]")

    return answer


def judged(stub, base=True, attempts=1, workers=4, **options):
    judge = Judge(endpoint=endpoint(stub, attempts=attempts), tries=2, workers=workers)
    theirs = Scripted("base") if base else None
    return score_questions(QUESTIONS, Scripted("model"), theirs, judge, name="quiz", **options)


def test_grades_and_preferences_are_paired_by_question():
    with serving(grade_by(lambda text: 4 + ("model says" in text) * (2 + 2 * ("turn 2." in text)))) as stub:
        found = judged(stub)
    grade, preference = found.metrics
    assert (grade.metric, grade.n, grade.value, grade.base_value, grade.delta) == ("grade", 6, 7, 4, 3)
    assert (preference.metric, preference.value, preference.base_value, preference.delta) == (
        "preference", 0.5, 0.5, 0.0,
    )  # fmt: skip
    assert found.scores[1].values == [1, 0, 1, 0, 1, 0]
    assert found.results["quiz"] == {"grade": 7, "win": 0.5, "tie": 0, "lose": 0.5}
    assert found.results["quiz/math"]["win"] == 1
    assert found.base_results["quiz/writing"] == {"grade": 4}
    # 6 questions of 2 turns: two grades and two comparisons each.
    assert (len(stub.requests), found.left_out) == (48, 0)
    line = json.loads(found.lines[1])
    assert line["answers"] == ["model says first 1 of 1", "model says second 1 of 3"]
    assert [verdict["value"] for verdict in line["grades"]] == [6, 8]
    assert line["preferences"] == [0, 0]


def test_a_judge_who_prefers_a_place_prefers_nobody():
    with serving(lambda body: completion("[[5]] [[A]]")) as stub:
        found = judged(stub)
    assert found.results["quiz"] == {"grade": 5, "win": 0, "tie": 1, "lose": 0}


def test_without_a_base_there_are_only_grades():
    with serving(lambda _: completion("[[5]]")) as stub:
        found = judged(stub, base=False)
    (metric,) = found.metrics
    assert (metric.value, metric.base_value, found.base_results) == (5, None, {})
    assert len(stub.requests) == 12


def test_what_is_not_judged_is_left_out_for_both():
    def answer(body):
        text = body["messages"][0]["content"]
        if "first 2" in text and "base says" in text:
            return completion(None, finish_reason="content_filter")
        return completion("no idea" if "first 3" in text else "[[6]] [[C]]")

    with serving(answer) as stub:
        found = judged(stub)
    assert (found.left_out, found.metrics[0].n) == (2, 4)
    refused, unsaid = (json.loads(found.lines[at]) for at in (2, 3))
    assert [(each["value"], each["refused"]) for each in refused["base_grades"]] == [(None, True)] * 2
    assert [(each["value"], each["refused"]) for each in unsaid["grades"]] == [(None, False)] * 2
    # Without a verdict it is asked once more, refused it is not.
    assert sum("first 3" in body["messages"][0]["content"] for body in stub.requests) == 16
    assert sum("first 2" in body["messages"][0]["content"] for body in stub.requests) == 8


def test_no_verdict_at_all_is_an_error():
    with serving(lambda _: completion("no idea")) as stub, pytest.raises(DeepenError, match="on any of 6"):
        judged(stub)


def test_a_failure_ends_the_attempts_of_the_others():
    def answer(body):
        if "first 0" in body["messages"][0]["content"]:
            time.sleep(0.1)
            return 400, b"", {}
        return 503, b"", {"Retry-After": "30"}

    begun = time.monotonic()
    with serving(answer) as stub, pytest.raises(EvaluationError, match="status 400"):
        judged(stub, base=False, attempts=6, workers=20)
    assert time.monotonic() - begun < 10


def test_an_interrupted_evaluation_goes_on_where_it_was(tmp_path):
    files = {"answers": tmp_path / "answers.jsonl", "verdicts": tmp_path / "verdicts.jsonl"}
    left = iter(range(20))
    good = grade_by(lambda text: 1 + len(text) % 10)
    failing = serving(lambda body: (400, b"", {}) if next(left, None) is None else good(body))
    with failing as stub, pytest.raises(EvaluationError, match="status 400"):
        judged(stub, **{name: Journal(path) for name, path in files.items()})
    kept = files["verdicts"].read_text().splitlines()
    assert 10 < len(kept) <= 20
    with files["verdicts"].open("a") as file:
        file.write('{"key": "cut of')  # a crash
    with serving(good) as stub:
        found = judged(stub, **{name: Journal(path) for name, path in files.items()})
        asked = len(stub.requests)
        assert asked == 48 - len(kept)
        again = judged(stub, **{name: Journal(path) for name, path in files.items()})
        assert len(stub.requests) == asked
        fresh = judged(stub)
    assert found == again == fresh
    lines = [json.loads(line) for line in files["verdicts"].read_text().splitlines()]
    # Questions in their order, whichever verdict came first.
    assert [line["question_id"] for line in lines] == sorted(line["question_id"] for line in lines)
    assert np.unique([line["key"] for line in lines]).size == 48


def test_answers_of_other_weights_are_not_taken(tmp_path):
    from deepen.evaluation.chat.questions import answer_questions

    journal, first, second = Journal(tmp_path / "answers.jsonl"), Scripted("one"), Scripted("two")
    for _ in range(2):
        for who in (first, second):
            answer_questions(QUESTIONS, who, journal, "model", lambda *_: None)
    assert (first.asked, second.asked) == (12, 12)


def test_questions_are_read_in_the_published_form(tmp_path):
    path = tmp_path / "question.jsonl"
    lines = [
        {"question_id": 81, "category": "writing", "turns": ["a", "b"]},
        {"question_id": 101, "category": "reasoning", "turns": ["c"], "reference": ["d"], "other": 1},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + "\n")
    first, second = read_questions(path)
    assert (first.name, first.turns, first.reference) == ("81", ("a", "b"), None)
    assert second.reference == ("d",)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "is empty"),
        ("{", ":1: line: "),
        ('{"question_id": 1, "turns": []}', ":1: turns: "),
        ('{"question_id": 1}', ":1: turns: field required"),
        ('{"question_id": 1, "turns": ["a"]}\n' * 2, "1 stands 2 times"),
        (b"\xff", "not UTF-8"),
    ],
)
def test_broken_questions(tmp_path, content, said):
    path = tmp_path / "question.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(EvaluationError, match=said):
        read_questions(path)


def test_a_journal_that_is_none(tmp_path):
    (tmp_path / "notes").write_text("hello\n")
    with pytest.raises(EvaluationError, match="notes:1: not a line"):
        Journal(tmp_path / "notes")
