"""Tasks solved in turns: scripted models, the real sandbox."""

import json

import pytest

from deepen.errors import EvaluationError
from deepen.evaluation.chat import Journal, ToolTask, play_tasks, read_tool_tasks, score_tools
from deepen.evaluation.chat.tool_tasks import matches
from deepen.evaluation.sandbox import Outcome, try_layers

SUM = ToolTask(task_id="sum", category="reasoning", prompt="What is 6 times 7?", answer=42)
DOUBLE = ToolTask(
    task_id="double",
    category="code",
    prompt="Write double.",
    checks="assert double(4) == 8",
    entry_points=("double",),
)


@pytest.fixture(scope="module", autouse=True)
def confined():
    if missing := try_layers().missing:
        pytest.skip(f"this machine leaves open {', '.join(missing)}")


class Scripted:
    """Says one line after the other in each conversation; `lines` may be a function of the conversation."""

    def __init__(self, *lines, identity="scripted"):
        self.lines, self.identity, self.seen = lines, identity, []

    def reply(self, conversations, stop=()):
        assert stop == ("</execute>", "</solution>")
        self.seen += [[message["content"] for message in each] for each in conversations]
        return [self._line(each) for each in conversations]

    def _line(self, conversation):
        line = self.lines[min(len(conversation) // 2, len(self.lines) - 1)]
        return line(conversation) if callable(line) else line


def play(budget, *lines, task=SUM):
    who = Scripted(*lines)
    (episode,) = play_tasks([task], who, budget)
    return episode, [message["content"] for message in episode.messages]


def test_code_is_run_and_its_output_comes_back():
    episode, said = play(
        3, "Let me see. <execute>x = 6\nx * 7</execute> It says 43.", "<solution>42</solution>"
    )
    assert (episode.solved, episode.turns) == (True, 2)
    assert "You have 3 messages in all." in said[0]
    assert "What is 6 times 7?" in said[0]
    # What the model makes up after its move is not kept.
    assert said[1] == "Let me see. <execute>x = 6\nx * 7</execute>"
    assert said[2] == "Output:\n42\n\nYou have 2 messages and 2 solutions left."


def test_a_session_keeps_names_files_and_what_came_before_an_error():
    blocks = [
        "import math\nseen = [1]\nopen('kept', 'w').write('abc')",
        "seen.append(2)\nprint('loud')\n1 / 0",
        "print(open('kept').read(), seen, math.floor(2.5))",
        "```python\nundefined\n```",
    ]
    lines = [f"<execute>{block}</execute>" for block in blocks]
    _, said = play(5, *lines, "<solution>1</solution>")
    shown = [text.split("\n\n")[0] for text in said[2::2]]
    assert shown[0] == "Output:\n3"
    assert shown[1] == "Output:\nloud\nZeroDivisionError: division by zero"
    assert shown[2] == "Output:\nabc [1, 2] 2"
    assert shown[3].endswith("NameError: name 'undefined' is not defined")


def test_long_output_is_cut_in_the_middle():
    _, said = play(2, "<execute>print('a' * 3000 + 'b' * 3000)</execute>", "")
    assert "a" * 1000 + "\n… 4000 characters …\n" + "b" * 1000 in said[2]


def test_programs_run_in_the_sandbox(tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("told")
    _, said = play(2, f"<execute>print(open({str(secret)!r}).read())</execute>", "")
    assert "told" not in said[2].replace(str(secret), "")
    assert "Error" in said[2]


def test_two_solutions_and_no_more():
    wrong = "<solution>41</solution>"
    episode, said = play(5, wrong, wrong, "<solution>42</solution>")
    assert (episode.solved, episode.turns) == (False, 2)
    assert said[2] == "Your solution is wrong.\n\nYou have 4 messages and 1 solution left."
    assert play(5, wrong, "<solution>42</solution>")[0].solved


def test_the_budget_is_the_end():
    run = "<execute>1</execute>"
    episode, said = play(2, run, run, "<solution>42</solution>")
    assert (episode.solved, episode.turns, len(said)) == (False, 2, 4)
    assert said[2].endswith("You have 1 message and 2 solutions left. Give your solution now.")
    assert play(3, run, run, "<solution>42")[0].solved  # the end of the tag was cut off
    assert "so give your solution at once" in play(1, run)[1][0]


def test_a_message_without_a_move_costs_a_turn():
    episode, said = play(2, "I think it is 42.", "<solution>42</solution>")
    assert episode.solved
    assert said[2].startswith("There was neither <execute>")


def test_no_room_in_the_context_ends_the_task():
    episode, said = play(5, "<execute>1</execute>", None)
    assert (episode.solved, episode.turns, len(said)) == (False, 1, 3)


@pytest.mark.parametrize(
    ("code", "solved"),
    [
        ("def double(x):\n    return 2 * x", True),
        ("```python\ndef double(x):\n    return 2 * x\n```", True),
        ("def double(x):\n    return x", False),
        ("import os\nos._exit(0)", False),
        ("8", False),
    ],
)
def test_code_is_checked_by_its_tests(code, solved):
    assert play(1, f"<solution>{code}</solution>", task=DOUBLE)[0].solved == solved


@pytest.mark.parametrize(
    ("solution", "answer", "right"),
    [
        ("42", 42, True),
        (" $1,234.50. ", "1234.5", True),
        ("0.3333", 1 / 3, True),
        ("0.0004", 0.0001, False),
        ("0", 0, True),
        ("0.0005", 0, False),
        ("nan", "nan", True),
        ("Paris.", "paris", True),
        ("the  Eiffel\ntower", "The Eiffel Tower", True),
        ("42 apples", 42, False),
        ("", 42, False),
    ],
)
def test_answers(solution, answer, right):
    assert matches(solution, answer) == right


def test_a_sandbox_that_fails_scores_nothing():
    def fail(programs):
        return [Outcome(name=program.name, status="error", reason="no space") for program in programs]

    with pytest.raises(EvaluationError, match="sum: the sandbox failed: no space"):
        play_tasks([SUM], Scripted("<execute>1</execute>"), 2, fail)


def at_last(conversation):
    """Solves the sum in its last turn, having run code before; writes no working code."""
    last = conversation[-1]["content"]
    return "<solution>42</solution>" if "at once" in last or "now" in last else "<execute>1</execute>"


def test_success_by_budget_beside_the_base(tmp_path):
    # The model needs exactly two turns; the base solves the sum in whatever it has.
    model = Scripted("<execute>1</execute>", "<solution>42</solution>", identity="model")
    base = Scripted(at_last, identity="base")
    found = score_tools([SUM, DOUBLE], model, base, turns=3, journal=Journal(tmp_path / "episodes.jsonl"))
    assert [metric.metric for metric in found.metrics] == ["sr@1", "sr@2", "sr@3"]
    assert [metric.value for metric in found.metrics] == [0, 0.5, 0.5]
    assert [metric.base_value for metric in found.metrics] == [0.5, 0.5, 0.5]
    assert [metric.delta for metric in found.metrics] == [-0.5, 0, 0]
    assert found.results["tools/reasoning"] == {"sr@1": 0, "sr@2": 1, "sr@3": 1}
    assert found.base_results["tools/code"] == {"sr@1": 0, "sr@2": 0, "sr@3": 0}
    assert [json.loads(line)["solved"] for line in found.lines].count(True) == 5
    asked = len(model.seen), len(base.seen)
    again = score_tools([SUM, DOUBLE], model, base, turns=3, journal=Journal(tmp_path / "episodes.jsonl"))
    assert again == found
    assert (len(model.seen), len(base.seen)) == asked


def test_tasks_are_read(tmp_path):
    path = tmp_path / "tasks.jsonl"
    path.write_text(SUM.model_dump_json() + "\n" + DOUBLE.model_dump_json() + "\n")
    assert read_tool_tasks(path) == [SUM, DOUBLE]


@pytest.mark.parametrize("more", [{}, {"answer": 1, "checks": "assert f()"}])
def test_a_task_has_an_answer_or_checks(tmp_path, more):
    (tmp_path / "tasks.jsonl").write_text(json.dumps({"task_id": 1, "prompt": "?", **more}))
    with pytest.raises(EvaluationError, match=r":1: line: .*either an answer or checks"):
        read_tool_tasks(tmp_path / "tasks.jsonl")


def test_no_turns():
    with pytest.raises(EvaluationError, match="0 turns"):
        score_tools([SUM], Scripted(""), None, turns=0)
