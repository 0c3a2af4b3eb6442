"""Questions of several turns, in the form of MT-Bench's file, and their answers."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from deepen.errors import EvaluationError
from deepen.evaluation.chat.journal import Journal
from deepen.evaluation.chat.messages import Message, Responder, assistant, digest_of, user

Progress = Callable[[int, int], None]
"""Called with (done, all)."""

_BATCH = 16


class Question(BaseModel):
    """One question (Zheng et al., arXiv 2306.05685); further keys of its line are passed over.

    Attributes:
        question_id: number or name, unique in the file.
        category: such as `writing`.
        turns: what the user says, one after the other.
        reference: a right answer for each turn, for the judge; missing or empty where there is none.
    """

    model_config = ConfigDict(frozen=True)

    question_id: int | str
    category: str = "all"
    turns: Annotated[tuple[str, ...], Field(min_length=1)]
    reference: tuple[str, ...] | None = None

    @property
    def name(self) -> str:
        """Its id, as results name it."""
        return str(self.question_id)


def read_questions(path: Path) -> list[Question]:
    """Read a file of questions, one JSON object a line.

    Raises:
        EvaluationError: it cannot be read, is empty, or a line is no question or stands twice.
    """
    return read_lines(path, Question, lambda question: question.name)


def answer_questions(
    questions: Sequence[Question], responder: Responder, journal: Journal, name: str, progress: Progress
) -> list[list[str]]:
    """Answer every turn of every question, or find the answers in the journal: [questions][turns].

    An answer for which the context has no room is empty.
    """
    keys = [digest_of("answers", responder.identity, question.turns) for question in questions]
    missing = [place for place, key in enumerate(keys) if journal.get(key) is None]
    for start in range(0, len(missing), _BATCH):
        batch = missing[start : start + _BATCH]
        for place, answers in zip(batch, _answer([questions[at] for at in batch], responder), strict=True):
            journal.put(keys[place], answers, question_id=questions[place].question_id, by=name)
        progress(len(questions) - len(missing) + start + len(batch), len(questions))
    return [journal.get(key) for key in keys]


def _answer(questions: Sequence[Question], responder: Responder) -> list[list[str]]:
    said: list[list[Message]] = [[] for _ in questions]
    answers: list[list[str]] = [[] for _ in questions]
    for turn in range(max(len(question.turns) for question in questions)):
        asked = [place for place, question in enumerate(questions) if turn < len(question.turns)]
        for place in asked:
            said[place].append(user(questions[place].turns[turn]))
        replies = responder.reply([said[place] for place in asked])
        for place, reply in zip(asked, replies, strict=True):
            answers[place].append((reply or "").strip())
            said[place].append(assistant(answers[place][-1]))
    return answers


_Line = TypeVar("_Line", bound=BaseModel)


def read_lines(path: Path, kind: type[_Line], name: Callable[[_Line], str]) -> list[_Line]:
    """Read one object a line; their names must differ.

    Raises:
        EvaluationError: the file cannot be read, is empty, or has a line that is not such an object.
    """
    try:
        found = list(_parse(path, kind))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise EvaluationError(f"{path}: cannot be read ({reason})") from None
    if not found:
        raise EvaluationError(f"{path}: is empty")
    name_, times = Counter(map(name, found)).most_common(1)[0]
    if times > 1:
        raise EvaluationError(f"{path}: {name_} stands {times} times")
    return found


def _parse(path: Path, kind: type[_Line]) -> Iterator[_Line]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                yield kind.model_validate_json(line)
            except ValidationError as error:
                first = error.errors()[0]
                where = ".".join(map(str, first["loc"])) or "line"
                raise EvaluationError(f"{path}:{number}: {where}: {first['msg'].lower()}") from None
