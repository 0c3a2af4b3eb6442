"""Scorers that run what a model wrote, in the sandbox."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, Final

from deepen.errors import EvaluationError
from deepen.evaluation.code_tasks import (
    humaneval_program,
    mbpp_program,
    pass_at_k,
    pot_correct,
    pot_program,
)
from deepen.evaluation.sandbox import Outcome, Program, run_programs

Document = Mapping[str, Any]
Build = Callable[[Document, str], Program]
Judge = Callable[[Document, Outcome], bool]

# Of which k pass@k is told, where there are as many samples.
_KS: Final = (1, 10, 100)


def program_scorers(
    allow_unprotected: str = "",
) -> Mapping[str, Callable[[Sequence[Document], Sequence[Sequence[str]]], list[dict[str, float]]]]:
    """Return who scores programs, by the name a suite gives: (documents, texts of each) -> pass@k of each.

    Args:
        allow_unprotected: see `deepen.evaluation.sandbox.run_programs`.
    """
    return {name: partial(_score, *how, allow_unprotected) for name, how in _SCORERS.items()}


def _score(
    build: Build,
    judge: Judge,
    allow_unprotected: str,
    documents: Sequence[Document],
    texts: Sequence[Sequence[str]],
) -> list[dict[str, float]]:
    """Run every text of every document.

    Raises:
        SandboxError: this machine cannot confine programs.
        EvaluationError: the sandbox failed, which says nothing about the program.
    """
    asked = [(document, text) for document, each in zip(documents, texts, strict=True) for text in each]
    outcomes = run_programs([build(*each) for each in asked], allow_unprotected=allow_unprotected)
    for outcome in outcomes:
        if outcome.status == "error":
            raise EvaluationError(f"{outcome.name}: the sandbox failed: {outcome.reason}")
    verdicts = iter(
        [judge(document, outcome) for (document, _), outcome in zip(asked, outcomes, strict=True)]
    )
    return [_pass_at_k([next(verdicts) for _ in each]) for each in texts]


def _pass_at_k(right: Sequence[bool]) -> dict[str, float]:
    return {f"pass@{k}": pass_at_k(len(right), sum(right), k) for k in _KS if k <= len(right)}


def _passed(_: Document, outcome: Outcome) -> bool:
    return outcome.passed


def _solution(document: Document, text: str) -> Program:
    return pot_program(document["question"][:60], f"def solution():\n{text}")


def _answered(document: Document, outcome: Outcome) -> bool:
    return pot_correct(outcome, document["answer"])


_SCORERS: Final[Mapping[str, tuple[Build, Judge]]] = MappingProxyType(
    {
        "humaneval": (humaneval_program, _passed),
        "mbpp": (mbpp_program, _passed),
        "gsm8k_pot": (_solution, _answered),
    }
)
