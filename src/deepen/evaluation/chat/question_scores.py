"""Grades of answered questions, the model beside its base, and which of the two answers is preferred."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any, Final

import numpy as np

from deepen.errors import EvaluationError
from deepen.evaluation.chat.journal import Journal
from deepen.evaluation.chat.judge import Case, Judge, Verdict, judge_cases
from deepen.evaluation.chat.messages import Responder
from deepen.evaluation.chat.questions import Progress, Question, answer_questions
from deepen.evaluation.chat.scored import Scored, figures, task_scores
from deepen.evaluation.paired import PairedItems, compare_items
from deepen.evaluation.verdict import adjust

GRADE_MARGIN: Final = 0.1
"""Largest loss of the mean grade that counts as kept: a hundredth of the scale's top."""
_PREFERENCE: Final = {("A", "B"): 1.0, ("B", "A"): 0.0}


@dataclass(frozen=True, kw_only=True)
class _Judged:
    """One question under both models.

    Attributes:
        question: what was asked.
        answers: model or base -> its answers by turn.
        grades: model or base -> the judge's verdicts by turn.
        choices: by turn, the verdicts with the model's answer first and with the base's first.
    """

    question: Question
    answers: Mapping[str, list[str]]
    grades: Mapping[str, list[Verdict]]
    choices: list[tuple[Verdict, Verdict]]

    def grade(self, side: str) -> float | None:
        """Return the mean grade of the turns; None where one has none."""
        return _mean([verdict.value for verdict in self.grades[side]])

    def preferences(self) -> list[float | None]:
        """Return 1 (the model's), 0 (the base's) or a half of each turn."""
        return [_preference(*both) for both in self.choices]

    def scores(self) -> list[float | None]:
        """Return the grades of the model and the base, and the mean preference, as far as there are such."""
        grades = [self.grade(side) for side in self.grades]
        return [*grades, _mean(self.preferences())] if self.choices else grades

    def line(self) -> str:
        """Write everything about the question as one line."""
        line = self.question.model_dump(mode="json")
        for side, prefix in zip(self.grades, ("", "base_"), strict=False):
            line[f"{prefix}answers"] = self.answers[side]
            line[f"{prefix}grades"] = [asdict(verdict) for verdict in self.grades[side]]
        if self.choices:
            line["preferences"] = self.preferences()
            line["comparisons"] = [[asdict(verdict) for verdict in both] for both in self.choices]
        return json.dumps(line, ensure_ascii=False) + "\n"


def score_questions(
    questions: Sequence[Question],
    model: Responder,
    base: Responder | None,
    judge: Judge,
    *,
    name: str = "chat",
    answers: Journal | None = None,
    verdicts: Journal | None = None,
    progress: Progress = lambda done, total: None,
) -> Scored:
    """Answer questions, have every turn graded from 1 to 10, and with a base the two answers compared.

    An item is a question: its score is the mean grade of its turns. `preference` is 1 where the judge prefers
    the model's answer whichever comes first, 0 where it prefers the base's, and a half otherwise, so its
    difference from the base's is the share of wins less that of losses.

    Args:
        questions: to be answered.
        model: who answers.
        base: the base; None: only grades.
        judge: who grades.
        name: of the task in results.
        answers: where answers are kept.
        verdicts: where the judge's replies are kept.
        progress: called with (done, all), of each stage.

    Raises:
        EvaluationError: the endpoint failed (what was done is kept), or it judged no question in full.
    """
    kept = answers or Journal()
    said = {
        side: answer_questions(questions, who, kept, side, progress)
        for side, who in (("model", model), ("base", base))
        if who is not None
    }
    by_question = [{side: said[side][at] for side in said} for at in range(len(questions))]
    judged = _judge(questions, by_question, judge, verdicts or Journal(), progress)
    return _score(judged, name)


def _judge(
    questions: Sequence[Question],
    answers: Sequence[Mapping[str, list[str]]],
    judge: Judge,
    journal: Journal,
    progress: Progress,
) -> list[_Judged]:
    """Ask for all verdicts at once: they are independent."""
    cases = [
        case
        for question, said in zip(questions, answers, strict=True)
        for turn in range(len(question.turns))
        for case in _cases(question, turn, said)
    ]
    found = iter(judge_cases(cases, judge, journal, progress))
    judged = []
    for question, said in zip(questions, answers, strict=True):
        turns = [[next(found) for _ in _cases(question, turn, said)] for turn in range(len(question.turns))]
        grades = {side: [turn[place] for turn in turns] for place, side in enumerate(said)}
        choices = [(turn[2], turn[3]) for turn in turns if len(turn) > 2]
        judged.append(_Judged(question=question, answers=said, grades=grades, choices=choices))
    return judged


def _cases(question: Question, turn: int, said: Mapping[str, list[str]]) -> list[Case]:
    """Return what is to be judged of one turn: each answer, then the two in both orders."""
    cases = [
        Case(question=question, turn=turn, answers=(answers,), about=side) for side, answers in said.items()
    ]
    if len(said) > 1:
        orders = (("model", "base"), ("base", "model"))
        cases += [
            Case(question=question, turn=turn, answers=(said[a], said[b]), about=f"{a}, {b}")
            for a, b in orders
        ]
    return cases


def _preference(first: Verdict, second: Verdict) -> float | None:
    """A judge who changes its mind with the order prefers neither."""
    if first.value is None or second.value is None:
        return None
    return _PREFERENCE.get((str(first.value), str(second.value)), 0.5)


def _mean(values: Sequence[Any]) -> float | None:
    return None if None in values else fmean(map(float, values))


def _score(judged: Sequence[_Judged], name: str) -> Scored:
    whole = [each for each in judged if None not in each.scores()]
    if not whole:
        raise EvaluationError(f"{name}: the judge gave no verdict on any of {len(judged)} questions")
    grade, *others = np.array([each.scores() for each in whole], dtype=np.float64).T
    categories = [each.question.category for each in whole]
    items = [PairedItems(task=name, metric="grade", values=grade, base=others[0] if others else None)]
    metrics, columns = compare_items(items, margin=GRADE_MARGIN), {"grade": grade}
    if others:
        preference = others[1]
        items.append(PairedItems(task=name, metric="preference", values=preference, base=1 - preference))
        metrics = adjust([*metrics, *compare_items(items[1:])])
        columns |= {"win": preference > 0.5, "tie": preference == 0.5, "lose": preference < 0.5}
    return Scored(
        scores=[task_scores(each) for each in items],
        metrics=metrics,
        results=figures(name, categories, columns),
        base_results=figures(name, categories, {"grade": others[0]}) if others else {},
        left_out=len(judged) - len(whole),
        lines=[each.line() for each in judged],
    )
