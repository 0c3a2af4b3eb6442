"""The tasks of a sequence as they fit the model: prompts cut, answers measured, files to learn from."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from deepen.checkpoint import write_file
from deepen.config import AnswerMetric, ContinualRecipe, ConversationSet, SequenceTask
from deepen.data.chat import ChatTemplate
from deepen.data.conversation_files import read_conversations
from deepen.data.conversations import Conversation
from deepen.data.tokens import digest_of
from deepen.errors import DataError, OutputError
from deepen.records import SequenceTaskRecord

_LEAST_PROMPT = 16


@dataclass(frozen=True)
class Question:
    """A prompt as the model sees it, the whole of it, and its answer."""

    asked: str
    prompt: str
    wanted: str


@dataclass(frozen=True, kw_only=True)
class Task:
    """A task that fits the model.

    Attributes:
        name: how results call it.
        metric: of its answers.
        epochs: passes through its training records.
        questions: what is learned.
        tests: what it is tested on.
        answer_tokens: most tokens of an answer.
        record: what was read and cut.
    """

    name: str
    metric: AnswerMetric
    epochs: float
    questions: Sequence[Question]
    tests: Sequence[Question]
    answer_tokens: int
    record: SequenceTaskRecord

    @property
    def learned_digest(self) -> str:
        """Digest of all that is learned of it."""
        return digest_of([[(one.asked, one.wanted) for one in self.questions], self.epochs])

    @property
    def tested_digest(self) -> str:
        """Digest of all that it is tested on, and how."""
        tests = [(one.asked, one.prompt, one.wanted) for one in self.tests]
        return digest_of([tests, self.answer_tokens, self.metric])


def read_tasks(recipe: ContinualRecipe, tokenizer: Any, template: ChatTemplate) -> list[Task]:
    """Read a sequence of tasks and cut prompts in their middle so that answers fit behind them.

    Raises:
        DataError: a file is missing or malformed, or a record is not one prompt and its answer.
    """
    return [_read_task(recipe, task, tokenizer, template) for task in recipe.sequence]


def write_questions(task: Task, path: Path) -> ConversationSet:
    """Write what is learned of a task as prompts and completions, and say where.

    Raises:
        OutputError: it cannot be written.
    """
    lines = (
        json.dumps({"prompt": q.asked, "completion": q.wanted}, ensure_ascii=False) for q in task.questions
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{path.parent}: cannot be written ({error.strerror})") from None
    write_file(path, "".join(f"{line}\n" for line in lines))
    return ConversationSet(name=task.name, path=str(path), format="prompt_completion")


def _read_task(recipe: ContinualRecipe, task: SequenceTask, tokenizer: Any, template: ChatTemplate) -> Task:
    learned = _read(task, task.train, recipe.train_items)
    tested = _read(task, task.test, recipe.test_items)
    longest = max(_lengths(tokenizer, [wanted for _, wanted in learned]))
    # The token that ends an answer is written too.
    room = min(recipe.most_answer_tokens, longest + 1)
    most = recipe.sequence_length - room - _frame(tokenizer, template)
    if most < _LEAST_PROMPT:
        raise DataError(
            f"{task.name}: a window of {recipe.sequence_length} tokens leaves {max(most, 0)} to prompts; "
            "raise sequence_length or lower answer_tokens"
        )
    questions, tests = (_cut_all(tokenizer, pairs, most) for pairs in (learned, tested))
    return Task(
        name=task.name,
        metric=task.metric,
        epochs=task.epochs or 1.0,
        questions=questions,
        tests=tests,
        answer_tokens=room,
        record=SequenceTaskRecord(
            name=task.name,
            metric=task.metric,
            epochs=task.epochs or 1.0,
            learned=len(questions),
            tested=len(tests),
            prompt_tokens=most,
            answer_tokens=room,
            prompts_cut=_count_cut(questions),
            test_prompts_cut=_count_cut(tests),
            answers_cut=sum(length > room - 1 for length in _lengths(tokenizer, [w for _, w in learned])),
        ),
    )


def _read(task: SequenceTask, path: str, most: int | None) -> list[tuple[str, str]]:
    asked = ConversationSet(path=path, format=task.format)
    try:
        pairs = [_pair(one) for one in islice(read_conversations(asked, lambda _: None), most)]
    except DataError as error:
        raise DataError(f"{task.name}: {error}") from None
    if not pairs:
        raise DataError(f"{task.name}: {path}: holds no records")
    return pairs


def _pair(conversation: Conversation) -> tuple[str, str]:
    roles = [message["role"] for message in conversation.messages]
    if roles != ["user", "assistant"]:
        raise DataError(f"{conversation.where}: is not one prompt and its answer (roles: {', '.join(roles)})")
    prompt, answer = (message["content"] for message in conversation.messages)
    return prompt, answer


def _frame(tokenizer: Any, template: ChatTemplate) -> int:
    """Count the tokens a template puts round a prompt; one more may come where its text meets it."""
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "x"}],
        chat_template=template.source,
        tokenize=False,
        add_generation_prompt=True,
    )
    return len(tokenizer(text, add_special_tokens=False)["input_ids"]) + 1


def _cut_all(tokenizer: Any, pairs: Sequence[tuple[str, str]], most: int) -> list[Question]:
    return [Question(cut_middle(prompt, tokenizer, most), prompt, wanted) for prompt, wanted in pairs]


def cut_middle(text: str, tokenizer: Any, most: int) -> str:
    """Cut text in its middle until it has at most so many tokens: both ends of a prompt say what is asked."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    offsets, allowed = encoded["offset_mapping"], most
    kept, size = text, len(offsets)
    while size > most:
        # Fewer than are allowed: the ends may meet in more tokens than they had apart.
        allowed -= 0 if kept is text else size - most
        head, tail = (allowed + 1) // 2, allowed // 2
        kept = text[: offsets[head - 1][1]] + text[offsets[len(offsets) - tail][0] :]
        size = _lengths(tokenizer, [kept])[0]
    return kept


def _lengths(tokenizer: Any, texts: Sequence[str]) -> list[int]:
    return [len(ids) for ids in tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]]


def _count_cut(questions: Sequence[Question]) -> int:
    return sum(one.asked != one.prompt for one in questions)
