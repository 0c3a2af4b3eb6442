"""A judge's grade of an answer, and its choice between two."""

import re
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal

from deepen.evaluation.chat.endpoint import Endpoint, ask
from deepen.evaluation.chat.journal import Journal
from deepen.evaluation.chat.messages import digest_of, prompt, user
from deepen.evaluation.chat.questions import Progress, Question

_GRADE: Final = re.compile(r"\[\[\s*(\d+(?:\.\d+)?)\s*\]\]")
_CHOICE: Final = re.compile(r"\[\[\s*([ABC])\s*\]\]")
_LOWEST, _HIGHEST = 1.0, 10.0


@dataclass(frozen=True, kw_only=True)
class Judge:
    """Who judges.

    Attributes:
        endpoint: where it answers.
        tries: questions to it until a reply contains a verdict.
        workers: requests at a time.
    """

    endpoint: Endpoint
    tries: int = 3
    workers: int = 4


@dataclass(frozen=True, kw_only=True)
class Case:
    """One thing to judge: a turn of a question, with one answer or with two to choose from.

    Attributes:
        question: what was asked.
        turn: which of its turns is judged, from 0; those before are shown.
        answers: of one or two models, each by turn, in the order the judge sees them.
        about: whose they are, for the reader.
    """

    question: Question
    turn: int
    answers: tuple[Sequence[str], ...]
    about: str

    def prompt(self) -> str:
        """Write what the judge is asked."""
        shown = slice(0, self.turn + 1)
        references = (self.question.reference or ())[shown]
        return prompt(
            "single" if len(self.answers) == 1 else "pairwise",
            turns=self.question.turns[shown],
            references=references if any(references) else (),
            answers=[list(each[shown]) for each in self.answers],
        )


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the judge said.

    Attributes:
        value: a grade of 1 to 10, or "A", "B" or "C" (a tie); None where it gave none.
        refused: whether it declined to judge.
        text: its reply.
    """

    value: float | Literal["A", "B", "C"] | None
    refused: bool
    text: str


def judge_cases(
    cases: Sequence[Case], judge: Judge, journal: Journal, progress: Progress = lambda done, total: None
) -> list[Verdict]:
    """Return the verdict of each case, in order; those in the journal are not asked for again.

    Raises:
        EvaluationError: the endpoint failed; what it judged before is in the journal.
    """
    keys = [_key(case, judge) for case in cases]
    missing = {key: case for key, case in zip(keys, cases, strict=True) if journal.get(key) is None}
    stop = threading.Event()
    with ThreadPoolExecutor(judge.workers) as pool:
        futures = [(key, case, pool.submit(_ask, case, judge, stop)) for key, case in missing.items()]
        try:
            for done, (key, case, future) in enumerate(futures, start=1):
                about = {"question_id": case.question.question_id, "turn": case.turn + 1, "of": case.about}
                journal.put(key, asdict(future.result()), **about)
                progress(done, len(futures))
        except BaseException:
            # Nobody asks about the others any more; leaving the block waits for those at work.
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [Verdict(**journal.get(key)) for key in keys]


def _key(case: Case, judge: Judge) -> str:
    options: dict[str, Any] = dict(judge.endpoint.options)
    # Without the address: the same judge may be served elsewhere next time.
    return digest_of("verdict", judge.endpoint.model, options, case.prompt())


def _ask(case: Case, judge: Judge, stop: threading.Event) -> Verdict:
    read: Callable[[str], Any] = read_grade if len(case.answers) == 1 else read_choice
    for _ in range(judge.tries):
        answer = ask(judge.endpoint, [user(case.prompt())], stop)
        value = None if answer.refused else read(answer.text)
        if answer.refused or value is not None:
            break
    return Verdict(value=value, refused=answer.refused, text=answer.text)


def read_grade(text: str) -> float | None:
    """Return the last grade `[[n]]` of a reply; None where there is none from 1 to 10."""
    found = _GRADE.findall(text)
    grade = float(found[-1]) if found else 0.0
    return grade if _LOWEST <= grade <= _HIGHEST else None


def read_choice(text: str) -> str | None:
    """Return the last choice `[[A]]`, `[[B]]` or `[[C]]` of a reply."""
    found = _CHOICE.findall(text)
    return found[-1] if found else None
