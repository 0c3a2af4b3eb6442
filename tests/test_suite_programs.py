"""The code suites' scorers on published problems: the reference solutions pass, spoiled ones do not."""

import gzip
import json

import pytest

from deepen.errors import DeepenError
from deepen.evaluation.sandbox import run_programs
from deepen.evaluation.suites import programs
from deepen.evaluation.suites.programs import program_scorers


@pytest.fixture(scope="module")
def problems(data_dir):
    with gzip.open(data_dir / "code" / "HumanEval.jsonl.gz", "rt") as file:
        return [json.loads(line) for line in file][:6]


def test_humaneval(problems):
    texts = [[problem["canonical_solution"], "    return None\n"] for problem in problems]
    assert program_scorers()["humaneval"](problems, texts) == [{"pass@1": 0.5}] * len(problems)


def test_mbpp(data_dir):
    problems = json.loads((data_dir / "code" / "mbpp-sanitized.json").read_text())[:6]
    found = program_scorers()["mbpp"](problems, [[problem["code"]] for problem in problems])
    assert found == [{"pass@1": 1.0}] * len(problems)


def test_programs_of_thought():
    problem = {"question": "How many eggs?", "answer": "3 * 6 = 18\n#### 18"}
    texts = [
        "    return 3 * 6\n",
        "    return 17\n",
        "    exit(0)\n",
        *["    eggs = 18.0\n    return eggs"] * 7,
    ]
    (found,) = program_scorers()["gsm8k_pot"]([problem], [texts])
    assert found == {"pass@1": pytest.approx(0.8), "pass@10": 1.0}


def test_a_sandbox_that_fails_scores_nothing(problems, monkeypatch):
    def fail(asked, **_):
        outcomes = run_programs(asked)
        return [type(outcome)(name=outcome.name, status="error", reason="no space") for outcome in outcomes]

    monkeypatch.setattr(programs, "run_programs", fail)
    with pytest.raises(DeepenError, match="HumanEval/0: the sandbox failed: no space"):
        program_scorers()["humaneval"](problems[:1], [["    pass\n"]])
