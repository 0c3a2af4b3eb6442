"""Tasks solved in turns with Python as a tool, in the form of MINT (Wang et al., arXiv 2309.10691).

In each turn the model writes either `<execute>` code, whose output it is shown, or `<solution>` an answer, of
which it has two. It is told how many turns it has. So success with a budget of three turns is not success
within the first three of five: every budget is played by itself, and the rate need not rise with it.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from deepen.errors import EvaluationError
from deepen.evaluation.chat.messages import Message, Responder, assistant, prompt, user
from deepen.evaluation.chat.tool_tasks import ToolTask, matches, session_program, solution_program
from deepen.evaluation.code_tasks import extract_code
from deepen.evaluation.sandbox import Outcome, Program, run_programs

RunPrograms = Callable[[Sequence[Program]], list[Outcome]]
"""Runs programs where they can do no harm; `deepen.evaluation.sandbox.run_programs` with limits bound."""

_MOVE: Final = re.compile(r"<(execute|solution)>(.*?)(?:</\1>|\Z)", re.DOTALL)
_STOP: Final = ("</execute>", "</solution>")
_MOST_SHOWN: Final = 2000
_PROPOSALS: Final = 2


@dataclass(frozen=True, kw_only=True)
class Episode:
    """One task played once.

    Attributes:
        task_id: of the task.
        solved: whether a proposal was right.
        turns: the model took.
        messages: the conversation.
    """

    task_id: int | str
    solved: bool
    turns: int
    messages: list[Message]


@dataclass
class _Game:
    task: ToolTask
    messages: list[Message]
    blocks: list[str] = field(default_factory=list)
    turns: int = 0
    proposals: int = _PROPOSALS
    solved: bool = False
    ended: bool = False


def play_tasks(
    tasks: Sequence[ToolTask], responder: Responder, budget: int, run: RunPrograms = run_programs
) -> list[Episode]:
    """Play each task once with a budget of turns; all tasks take each turn together.

    Args:
        tasks: to be solved.
        responder: who solves them.
        budget: turns, from 1.
        run: where code is run.

    Raises:
        SandboxError: this machine cannot confine a program.
        EvaluationError: the sandbox failed, which says nothing about the model.
    """
    games = [_Game(task, [user(opening(task, budget))]) for task in tasks]
    for left in reversed(range(budget)):
        playing = [game for game in games if not game.ended]
        if playing:
            _take_turn(playing, responder, left, run)
    return [
        Episode(task_id=game.task.task_id, solved=game.solved, turns=game.turns, messages=game.messages)
        for game in games
    ]


def opening(task: ToolTask, budget: int) -> str:
    """Return the first message: the rules, the budget and the task."""
    return prompt("task", task=task, turns=budget, proposals=_PROPOSALS)


def _take_turn(games: Sequence[_Game], responder: Responder, left: int, run: RunPrograms) -> None:
    """Let each game take one turn; `left` are to come after it."""
    replies = responder.reply([game.messages for game in games], _STOP)
    moves = [_move(game, reply) for game, reply in zip(games, replies, strict=True)]
    programs = [_program(game, *move, left) for game, move in zip(games, moves, strict=True)]
    asked = [program for program in programs if program]
    outcomes = iter(run(asked) if asked else ())
    for game, (kind, content), program in zip(games, moves, programs, strict=True):
        outcome = next(outcomes) if program else None
        if outcome and outcome.status == "error":
            raise EvaluationError(f"{outcome.name}: the sandbox failed: {outcome.reason}")
        if kind == "solution":
            _propose(game, content, outcome)
        elif outcome and outcome.status in {"passed", "failed"}:
            game.blocks.append(extract_code(content))
        game.ended = game.ended or left == 0
        if not game.ended:
            shown = _shown(outcome) if kind == "execute" and outcome else ""
            said = prompt("observation", kind=kind, shown=shown, turns=left, proposals=game.proposals)
            game.messages.append(user(said))


def _move(game: _Game, reply: str | None) -> tuple[str, str]:
    """Take a reply in, up to the end of its first move; return the kind of move and what is in it."""
    if reply is None:
        game.ended = True
        return "none", ""
    found = _MOVE.search(reply)
    game.turns += 1
    game.messages.append(assistant((reply[: found.end()] if found else reply).strip()))
    return (found[1], found[2].strip()) if found else ("none", "")


def _program(game: _Game, kind: str, content: str, left: int) -> Program | None:
    if kind == "solution" and game.task.checks:
        return solution_program(game.task, content)
    if kind == "execute" and left:  # nobody sees what the last turn prints
        return session_program(game.task.name, game.blocks, extract_code(content))
    return None


def _propose(game: _Game, solution: str, outcome: Outcome | None) -> None:
    answer = game.task.answer
    game.solved = outcome.passed if outcome else answer is not None and matches(solution, answer)
    game.proposals -= 1
    game.ended = game.solved or not game.proposals


def _shown(outcome: Outcome) -> str:
    """Return what the model sees of a run: its output, cut in the middle where it is long, and its error."""
    text = outcome.stdout.strip()
    if len(text) > _MOST_SHOWN:
        half = _MOST_SHOWN // 2
        text = f"{text[:half]}\n… {len(text) - 2 * half} characters …\n{text[-half:]}"
    return "\n".join(part for part in (text, outcome.reason) if part) or "(no output)"
