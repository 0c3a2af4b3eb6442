"""A conversation as the tokens a model is given, cut from its oldest turns where it is too long."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from deepen.data.chat import prompt_text
from deepen.data.conversations import Message
from deepen.dialogue.network import Network
from deepen.errors import ChatError


@dataclass(frozen=True)
class Turn:
    """A question and what each voice answered, by its name."""

    question: str
    answers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Prompt:
    """What a model is given.

    Attributes:
        ids: tokens, with what the template or the tokenizer adds.
        room: tokens an answer can have.
        cut: oldest turns that were left out.
    """

    ids: tuple[int, ...]
    room: int
    cut: int


def build_prompt(
    network: Network, voice: str, turns: Sequence[Turn], question: str, system: str, max_tokens: int
) -> Prompt:
    """Write a conversation as one voice has it.

    Turns are left out, the oldest first, until the longest answer fits, or one of half the context if that is
    less. Without a template only the question is given, to be continued.

    Args:
        network: whose template, tokenizer and context count.
        voice: whose answers are in it.
        turns: what was said before.
        question: what is asked now.
        system: the system message; empty: none.
        max_tokens: of the answer.

    Raises:
        ChatError: the question alone does not fit.
        DataError: the template refuses the conversation.
    """
    if network.template is None:
        turns = ()
    context = network.context
    reserved = min(max_tokens, context // 2) if context else 0
    for cut in range(len(turns) + 1):
        ids = _encode(network, voice, turns[cut:], question, system)
        if context is None or len(ids) + reserved <= context:
            break
    room = max_tokens if context is None else min(max_tokens, context - len(ids))
    if room < 1:
        raise ChatError(
            f"the question takes {len(ids):,} tokens, the model sees {context:,}; ask a shorter one"
        )
    if not ids:
        raise ChatError("nothing is asked: the question has no token")
    return Prompt(tuple(ids), room, cut)


def _encode(network: Network, voice: str, turns: Sequence[Turn], question: str, system: str) -> list[int]:
    tokenizer, template = network.tokenizer, network.template
    if template is None:
        return list(tokenizer(question)["input_ids"])
    text = prompt_text(_messages(voice, turns, question, system), template, tokenizer)
    # The template writes the special tokens itself.
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _messages(voice: str, turns: Sequence[Turn], question: str, system: str) -> list[Message]:
    messages: list[Message] = [{"role": "system", "content": system}] if system else []
    for turn in turns:
        if answered := turn.answers.get(voice):
            messages.append({"role": "user", "content": turn.question})
            messages.append({"role": "assistant", "content": answered})
    return [*messages, {"role": "user", "content": question}]
