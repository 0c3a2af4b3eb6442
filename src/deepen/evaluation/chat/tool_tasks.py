"""Tasks that are solved in turns, and what solves them."""

import math
from pathlib import Path
from typing import Final, Self

from pydantic import BaseModel, ConfigDict, model_validator

from deepen.evaluation.chat.questions import read_lines
from deepen.evaluation.code_tasks import extract_code
from deepen.evaluation.sandbox import Program

_TOLERANCE: Final = 1e-3


class ToolTask(BaseModel):
    """One task; it has either an answer or checks.

    Attributes:
        task_id: number or name, unique in the file.
        category: such as `reasoning`; success is told for each.
        prompt: what is to be solved.
        answer: the right answer. A number is met to within a thousandth; anything else as text, whatever its
            case and spaces.
        checks: statements that raise where a solution, which is code then, is wrong.
        setup: statements that run before the checks.
        entry_points: names of the solution's functions that the checks call.
    """

    model_config = ConfigDict(frozen=True)

    task_id: int | str
    category: str = "all"
    prompt: str
    answer: int | float | str | None = None
    checks: str = ""
    setup: str = ""
    entry_points: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _has_one(self) -> Self:
        if (self.answer is None) == (not self.checks):
            raise ValueError("needs either an answer or checks")
        return self

    @property
    def name(self) -> str:
        """Its id, as results name it."""
        return str(self.task_id)


def read_tool_tasks(path: Path) -> list[ToolTask]:
    """Read a file of tasks, one JSON object a line.

    Raises:
        EvaluationError: it cannot be read, is empty, or a line is no task or stands twice.
    """
    return read_lines(path, ToolTask, lambda task: task.name)


def solution_program(task: ToolTask, solution: str) -> Program:
    """Return the program that tells whether a solution passes the task's checks."""
    return Program(
        name=task.name,
        source=extract_code(solution),
        entry_points=task.entry_points,
        setup=task.setup,
        checks=task.checks,
    )


def matches(solution: str, answer: int | float | str) -> bool:
    """Return whether a solution states the answer."""
    found, right = _number(solution), _number(str(answer))
    if found is None or right is None:
        return _plain(solution) == _plain(str(answer))
    return found == right or abs(found - right) < _TOLERANCE * min(1.0, abs(right))


def _number(text: str) -> float | None:
    try:
        number = float(_plain(text).removeprefix("$").replace(",", ""))
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _plain(text: str) -> str:
    return " ".join(text.casefold().split()).removesuffix(".")


# A session is run from its beginning in each turn: nothing of a model's code lives on between turns.
_SESSION: Final = '''\
import ast, contextlib, io

def _show(code, names):
    """Run a block as a notebook does: the value of a last expression is printed."""
    tree = ast.parse(code, "<execute>")
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "<execute>", "exec"), names)
    if last is not None:
        value = eval(compile(ast.Expression(last.value), "<execute>", "eval"), names)
        if value is not None:
            print(repr(value))

_names = {{"__name__": "__main__"}}
for _code in {earlier!r}:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(BaseException):
        _show(_code, _names)
_show({code!r}, _names)
'''


def session_program(name: str, earlier: list[str], code: str) -> Program:
    """Return the program of one turn: the blocks of earlier turns without their output, then this one.

    Names, imports and files of earlier blocks are there, as in a notebook.
    """
    return Program(name=name, source=_SESSION.format(earlier=earlier, code=code), main=True)
