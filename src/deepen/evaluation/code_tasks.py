"""HumanEval, MBPP and program-of-thought GSM8K as programs for the sandbox, and pass@k over samples.

Pure functions: a problem in the form of its published file and a model's text become a `Program`;
`deepen.evaluation.sandbox.run_programs` runs it.
"""

import ast
import math
import re
import warnings
from collections.abc import Mapping
from typing import Any, Final

from deepen.evaluation.sandbox import Outcome, Program

_FENCED: Final = re.compile(r"```[ \t]*(?:python3?|py)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL | re.IGNORECASE)
_NUMBER: Final = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:[eE][+-]?\d+)?")
# As PAL scores GSM8K (Gao et al., arXiv 2211.10435): its answers are whole numbers or dollars and cents.
_TOLERANCE: Final = 1e-3
_ANSWERS: Final = ("solution", "ans", "answer", "result")


def extract_code(reply: str) -> str:
    """Return the first fenced block of a reply, closed or not; without a fence, the reply."""
    found = _FENCED.search(reply)
    return found[1] if found else reply


def humaneval_program(problem: Mapping[str, Any], completion: str) -> Program:
    """Return the program of a HumanEval problem (Chen et al., arXiv 2107.03374) and a completion.

    The prompt is run beside the checks too: three of them call functions that it defines.

    Args:
        problem: a record with task_id, prompt, test and entry_point.
        completion: what follows the prompt; to score a whole function, put it here with the prompt emptied.
    """
    entry = problem["entry_point"]
    return Program(
        name=problem["task_id"],
        source=problem["prompt"] + completion,
        entry_points=(entry,),
        setup=problem["prompt"],
        checks=f"{problem['test']}\ncheck({entry})\n",
    )


def mbpp_program(problem: Mapping[str, Any], code: str) -> Program:
    """Return the program of an MBPP problem (Austin et al., arXiv 2108.07732) and a solution.

    What the tests call is read from the reference solution, whose imports they may use as well.

    Args:
        problem: a record with task_id, code, test_list, and test_imports (sanitized) or test_setup_code.
        code: the whole function.
    """
    tests = "\n".join(problem["test_list"])
    reference = _parse(problem["code"])
    used = {node.id for node in ast.walk(_parse(tests)) if isinstance(node, ast.Name)}
    defined = [node.name for node in reference.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    imports = [ast.unparse(node) for node in reference.body if isinstance(node, ast.Import | ast.ImportFrom)]
    return Program(
        name=f"MBPP/{problem['task_id']}",
        source=code,
        entry_points=tuple(name for name in defined if name in used),
        setup="\n".join([*imports, *problem.get("test_imports", ()), problem.get("test_setup_code") or ""]),
        checks=tests,
    )


def _parse(source: str) -> ast.Module:
    with warnings.catch_warnings():
        # Escapes like "\\d" outside raw strings, in the published solutions.
        warnings.simplefilter("ignore")
        return ast.parse(source)


def pot_program(name: str, reply: str) -> Program:
    """Return the program of a problem that is solved by a program's result (arXiv 2211.10435, 2211.12588).

    Its answer is what `solution()` returns, else the variable `ans`, `answer` or `result`, else the last
    number of the last line that it printed; see `pot_correct`. The right answer does not enter the sandbox.
    """
    return Program(name=name, source=extract_code(reply), answer=_ANSWERS, main=True)


def pot_correct(outcome: Outcome, gold: str | float) -> bool:
    """Return whether a program of `pot_program` ran to its end and found the answer, to within 0.001."""
    if not outcome.passed:
        return False
    lines = outcome.stdout.strip().splitlines()
    found = _number(outcome.value if outcome.value is not None else lines[-1] if lines else None)
    expected = _number(gold)
    if expected is None:
        raise ValueError(f"the right answer {gold!r} is not a number")
    return found is not None and abs(found - expected) < _TOLERANCE


def _number(value: Any) -> float | None:
    """Return a number as a float; of a text the last one in it, of a sequence its only item."""
    if isinstance(value, list | tuple) and len(value) == 1:
        value = value[0]
    if isinstance(value, str):
        numbers = _NUMBER.findall(value)
        value = numbers[-1].replace(",", "") if numbers else None
    try:
        return None if value is None or isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return None


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Return the unbiased estimate of the chance that one of k samples is right.

    `1 − C(n−c, k) / C(n, k)` of Chen et al. (arXiv 2107.03374, equation 1), as the product
    `1 − Π (1 − k/i)`, i from n−c+1 to n, of its listing 3: no factorial overflows.

    Args:
        samples: n, drawn for one problem.
        correct: c, how many of them were right.
        k: at most n.

    Raises:
        ValueError: not 0 ≤ c ≤ n, or not 1 ≤ k ≤ n.
    """
    if not 0 <= correct <= samples or not 1 <= k <= samples:
        raise ValueError(f"no pass@{k} of {correct} right in {samples} samples")
    if samples - correct < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / i for i in range(samples - correct + 1, samples + 1))
