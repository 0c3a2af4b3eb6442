"""Scores of a task's answers, from 0 to 1 each, by the libraries that define them.

TRACE's own code (BeyonderXX/TRACE, metrics.py) differs, and `scoring="trace"` does as it does:

- exact match is of the raw text: white space round an answer makes it wrong;
- ROUGE-L is that of the package `rouge`, not of Google's `rouge-score`: white space alone parts words, case
  counts, and sentences, which end at every full stop, are matched one by one;
- the edit similarity is rounded to whole per cents;
- an empty answer scores 0, but in SARI.

Its tables are what its code gives, where that is from 0 to 100 divided by 100.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any, Final

from deepen.config import AnswerMetric, Scoring
from deepen.errors import EvaluationError
from deepen.evaluation.sari import sari

_LITERAL: Final = re.compile(r"<(?:STR|NUM|CHAR)_LIT:(.*?)>", re.DOTALL)
# TRACE's code for ScienceQA reads the choice at the beginning of an answer, and the reasoning after it.
_CHOICE: Final = 1


@dataclass(frozen=True)
class Answer:
    """An answer to one prompt.

    Attributes:
        prompt: all that was asked; for SARI, the source.
        given: what the model wrote.
        wanted: the reference.
    """

    prompt: str
    given: str
    wanted: str


def score_answers(
    answers: Sequence[Answer], metric: AnswerMetric, scoring: Scoring = "standard"
) -> list[float]:
    """Return the score of each answer.

    Args:
        answers: of one task, in any order.
        metric: `accuracy` (the whole answer), `choice` (its first character), `rouge_l` (F1 of the longest
            common subsequence of words), `edit_similarity` (of code; 1 − insertions and deletions per
            character, literals' marks taken off) or `sari`.
        scoring: `standard`, or as TRACE's own code does.

    Raises:
        EvaluationError: a package that the metric needs is not installed.
    """
    score = _SCORES[scoring, metric] if (scoring, metric) in _SCORES else _SCORES["standard", metric]
    return [score(answer) for answer in answers]


def _accuracy(answer: Answer) -> float:
    return float(answer.given.strip() == answer.wanted.strip())


def _raw_accuracy(answer: Answer) -> float:
    return float(answer.given == answer.wanted != "")


def _choice(answer: Answer) -> float:
    return float(answer.given.strip()[:_CHOICE] == answer.wanted.strip()[:_CHOICE])


def _raw_choice(answer: Answer) -> float:
    return float(answer.given[:_CHOICE] == answer.wanted[:_CHOICE] != "")


def _rouge_l(answer: Answer) -> float:
    return float(_rouge_scorer().score(answer.wanted, answer.given)["rougeL"].fmeasure)


def _raw_rouge_l(answer: Answer) -> float:
    if not answer.given:
        return 0.0
    rouge = _package("rouge", "rouge").Rouge(metrics=["rouge-l"])
    try:
        return float(rouge.get_scores(answer.wanted, answer.given)[0]["rouge-l"]["f"])
    except ValueError:  # nothing but full stops
        return 0.0


@cache
def _rouge_scorer() -> Any:
    return _package("rouge_score.rouge_scorer", "rouge-score").RougeScorer(["rougeL"])


def _edit_similarity(answer: Answer) -> float:
    given, wanted = _without_marks(answer.given), _without_marks(answer.wanted)
    return float(_package("rapidfuzz.fuzz", "rapidfuzz").ratio(given, wanted)) / 100


def _whole_edit_similarity(answer: Answer) -> float:
    return round(100 * _edit_similarity(answer)) / 100 if answer.given else 0.0


def _without_marks(code: str) -> str:
    """Give the literals of Py150 their values; those without one become 0 or nothing."""
    code = code.replace("<NUM_LIT>", "0").replace("<STR_LIT>", "").replace("<CHAR_LIT>", "")
    return _LITERAL.sub(r"\1", code)


def _sari(answer: Answer) -> float:
    _package("sacrebleu", "sacrebleu")
    return sari(answer.prompt, answer.given, [answer.wanted])


def _package(module: str, name: str) -> Any:
    try:
        return import_module(module)
    except ModuleNotFoundError:
        raise EvaluationError(f"this score needs the package {name}: pip install {name}") from None


_SCORES: Final[dict[tuple[Scoring, AnswerMetric], Callable[[Answer], float]]] = {
    ("standard", "accuracy"): _accuracy,
    ("standard", "choice"): _choice,
    ("standard", "rouge_l"): _rouge_l,
    ("standard", "edit_similarity"): _edit_similarity,
    ("standard", "sari"): _sari,
    ("trace", "accuracy"): _raw_accuracy,
    ("trace", "choice"): _raw_choice,
    ("trace", "rouge_l"): _raw_rouge_l,
    ("trace", "edit_similarity"): _whole_edit_similarity,
}
