import gzip
import json
from itertools import combinations
from math import comb

import pytest

from deepen.evaluation.code_tasks import (
    extract_code,
    humaneval_program,
    mbpp_program,
    pass_at_k,
    pot_correct,
    pot_program,
)
from deepen.evaluation.sandbox import Outcome, run_programs, try_layers


@pytest.fixture(scope="module")
def confined():
    if try_layers().missing:
        pytest.skip("this machine does not confine programs")


@pytest.fixture(scope="module")
def humaneval(data_dir):
    with gzip.open(data_dir / "code" / "HumanEval.jsonl.gz", "rt") as lines:
        return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def mbpp(data_dir):
    return json.loads((data_dir / "code" / "mbpp-sanitized.json").read_text())


def solved(humaneval, mbpp):
    return [
        *(humaneval_program(problem, problem["canonical_solution"]) for problem in humaneval),
        *(mbpp_program(problem, problem["code"]) for problem in mbpp),
    ]


def spoiled(humaneval, mbpp):
    """Solutions whose every function returns what it should, in a list."""
    wrong = "\ndef {0}(*arguments, _right={0}):\n    return [_right(*arguments)]\n"
    names = [mbpp_program(problem, "").entry_points for problem in mbpp]
    return [
        *(
            humaneval_program(problem, problem["canonical_solution"] + wrong.format(problem["entry_point"]))
            for problem in humaneval
        ),
        *(
            mbpp_program(problem, problem["code"] + "".join(map(wrong.format, entries)))
            for problem, entries in zip(mbpp, names, strict=True)
        ),
    ]


def wrong_ones(outcomes, status):
    return [outcome for outcome in outcomes if outcome.status != status]


def test_a_sample_of_solutions_passes_and_fails_when_spoiled(confined, humaneval, mbpp):
    # The odd too: functions of the prompt in the checks, the name of a builtin, an import of the reference.
    some = [humaneval[i] for i in (0, 32, 33, 38, 50, 100, 163)], [mbpp[i] for i in (0, 60, 200, 300, 426)]
    some[1].extend(problem for problem in mbpp if problem["task_id"] in {126, 596, 737})
    assert not wrong_ones(run_programs(solved(*some)), "passed")
    assert not wrong_ones(run_programs(spoiled(*some)), "failed")


@pytest.mark.slow
def test_all_solutions_pass(confined, humaneval, mbpp):
    assert (len(humaneval), len(mbpp)) == (164, 427)
    assert not wrong_ones(run_programs(solved(humaneval, mbpp)), "passed")


@pytest.mark.slow
def test_all_spoiled_solutions_fail(confined, humaneval, mbpp):
    assert not wrong_ones(run_programs(spoiled(humaneval, mbpp)), "failed")


@pytest.mark.slow
def test_nothing_fails_every_problem(confined, humaneval, mbpp):
    nothing = [*(humaneval_program(p, "    pass\n") for p in humaneval), *(mbpp_program(p, "") for p in mbpp)]
    assert not wrong_ones(run_programs(nothing), "failed")


def test_mbpp_entry_points(mbpp):
    assert all(mbpp_program(problem, "").entry_points for problem in mbpp)
    summing = next(problem for problem in mbpp if problem["task_id"] == 126)
    assert mbpp_program(summing, "").entry_points == ("sum",)


REPLY = "Let us see.\n```python\ndef solution():\n    return 6 * 7\n```\nSo 41."


@pytest.mark.parametrize(
    ("reply", "gold", "correct"),
    [
        (REPLY, "42", True),
        (REPLY, "41", False),
        ("apples = 3\nans = apples / 2", 1.5, True),
        ("print('The answer is $1,234.00.')", "1,234", True),
        ("result = [18]", 18, True),
        ("ans = True", 1, False),
        ("ans = 'none'", 1, False),
        ("ans = 42\nraise ValueError", 42, False),
        ("print(42)\nimport os\nos._exit(0)", 42, False),
    ],
)
def test_program_of_thought(confined, reply, gold, correct):
    (outcome,) = run_programs([pot_program("gsm8k/0", reply)])
    assert pot_correct(outcome, gold) is correct


def test_a_right_answer_is_a_number():
    with pytest.raises(ValueError, match="not a number"):
        pot_correct(Outcome(name="a", status="passed", value=1), "many")


@pytest.mark.parametrize(
    ("reply", "code"),
    [
        ("x = 1", "x = 1"),
        ("a\n```python\nx = 1\n```\nb", "x = 1\n"),
        ("```\nx\n", "x\n"),
        ("```py\nx\n```\n```\ny\n```", "x\n"),
    ],
)
def test_extract_code(reply, code):
    assert extract_code(reply) == code


@pytest.mark.parametrize("samples", [1, 2, 5, 8])
def test_pass_at_k_is_the_share_of_draws_with_a_right_one(samples):
    for correct in range(samples + 1):
        right = [True] * correct + [False] * (samples - correct)
        for k in range(1, samples + 1):
            draws = [any(draw) for draw in combinations(right, k)]
            assert pass_at_k(samples, correct, k) == pytest.approx(sum(draws) / len(draws), abs=1e-12)


def test_pass_at_k_holds_for_many_samples():
    exact = 1 - comb(10_000 - 3, 100) / comb(10_000, 100)
    assert pass_at_k(10_000, 3, 100) == pytest.approx(exact, rel=1e-12)


@pytest.mark.parametrize(("samples", "correct", "k"), [(1, 2, 1), (1, 0, 2), (3, -1, 1), (3, 1, 0)])
def test_pass_at_k_refuses_what_cannot_be(samples, correct, k):
    with pytest.raises(ValueError, match="no pass@"):
        pass_at_k(samples, correct, k)
