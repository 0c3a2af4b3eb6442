"""One conversation with a model and, beside it, its base."""

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Final

from deepen.dialogue.cast import Cast
from deepen.dialogue.network import Voice
from deepen.dialogue.prompt import Prompt, Turn, build_prompt
from deepen.dialogue.writing import Sampling, write
from deepen.errors import ChatError
from deepen.model import Decision

# Tokens that a voice writes before the next one's turn: to switch 40 blocks takes about 10 ms.
_BURST: Final = 8


@dataclass(frozen=True, kw_only=True)
class Answer:
    """An answer as far as it is written.

    Attributes:
        voice: who answers.
        prompt: what it was given.
        ids: tokens so far.
        text: of whole characters.
        ended: `end`: by itself; `length`: no more tokens were allowed; empty: unfinished, or stopped.
    """

    voice: Voice
    prompt: Prompt
    ids: tuple[int, ...] = ()
    text: str = ""
    ended: str = ""


class Talk:
    """A conversation: what was said, which packs are on, how answers are written.

    Attributes:
        cast: who can answer.
        compare: whether the base answers too, where there is one.
        system: the system message; empty: none.
        sampling: how answers are written; turn n, from 0, adds n to the seed.
        packs: those that are on, from the bottom.
        turns: what was said.
        answers: those of the last turn.
        decision: which pack answers the last question; None where no switch decides.
    """

    def __init__(self, cast: Cast, *, compare: bool, system: str = "", sampling: Sampling) -> None:
        """Begin with those packs on that the model came with."""
        self.cast, self.compare, self.system, self.sampling = cast, compare, system, sampling
        self.packs = cast.packs
        self.turns: list[Turn] = []
        self.answers: tuple[Answer, ...] = ()
        self.decision: Decision | None = None
        self._writing: object | None = None

    @property
    def voices(self) -> tuple[Voice, ...]:
        """Who answers: the base, where asked for, and the model."""
        model = Voice("model", self.cast.model, self._answering)
        return (Voice("base", self.cast.base, ()), model) if self.compare and self.cast.base else (model,)

    @property
    def _answering(self) -> tuple[str, ...]:
        if self.decision is None:
            return self.packs
        return (self.decision.pack,) if self.decision.pack else ()

    def ask(self, question: str) -> Generator[tuple[Answer, ...]]:
        """Yield the answers as they grow, a few tokens in turn; what was said is remembered.

        So is an answer that is stopped by `stop`, or by closing the iterator.

        Raises:
            ChatError: the question does not fit.
            DataError: the template refuses the conversation.
        """
        sampling = replace(self.sampling, seed=self.sampling.seed + len(self.turns))
        self.decision = self._decide(question)
        answers = tuple(self._unwritten(voice, question) for voice in self.voices)
        writers = [_grow(answer, sampling) for answer in answers]
        self._writing = mine = object()
        try:
            while any(not answer.ended for answer in answers):
                for at, writer in enumerate(writers):
                    for grown in islice(writer, _BURST):
                        answers = (*answers[:at], grown, *answers[at + 1 :])
                        yield answers
                        if self._writing is not mine:
                            return
        finally:
            # Of what was asked anew meanwhile, another remembers the turn.
            if self._writing in (mine, None):
                self.answers = answers
                self.turns.append(Turn(question, {each.voice.name: each.text for each in answers}))

    def stop(self) -> None:
        """End the answers that are being written, from another thread."""
        self._writing = None

    def switch(self, packs: Sequence[str]) -> None:
        """Switch to these packs, in the order in which they are attached.

        Raises:
            ChatError: one is not attached.
            LayoutError: the config has no words for the kinds of blocks in this order.
        """
        held = self.cast.model.packs
        if unknown := [name for name in packs if name not in held]:
            there = f"there is {', '.join(held)}" if held else "the model has no packs"
            raise ChatError(f"no pack {unknown[0]!r}; {there}")
        chosen = tuple(name for name in held if name in packs)
        with self.cast.model.playing(chosen):  # the first to see that they cannot stand together
            self.packs = chosen

    def reset(self) -> None:
        """Forget what was said, and what is being written."""
        self.turns, self.answers, self.decision, self._writing = [], (), None, object()

    def _decide(self, question: str) -> Decision | None:
        """Decide from the question, and from those before it as long as they are too short to tell."""
        switch, network = self.cast.switch, self.cast.model
        if switch is None:
            return None
        asked, ids = question, list[int]()
        for earlier in reversed(["", *(turn.question for turn in self.turns)]):
            ids = list(network.tokenizer(asked)["input_ids"])
            if len(ids) >= switch.prompt_tokens:
                break
            asked = f"{earlier}\n{asked}"
        return network.decide(switch, ids, self.packs)

    def _unwritten(self, voice: Voice, question: str) -> Answer:
        most = self.sampling.max_tokens
        prompt = build_prompt(voice.network, voice.name, self.turns, question, self.system, most)
        return Answer(voice=voice, prompt=prompt)


def _grow(answer: Answer, sampling: Sampling) -> Iterator[Answer]:
    """Yield an answer with one token more each time; the last time it has ended."""
    ids: list[int] = []
    for token in write(answer.voice, answer.prompt, sampling):
        ids.append(token)
        yield replace(answer, ids=tuple(ids), text=_text(answer, ids).rstrip("\ufffd"))
    ended = "length" if len(ids) == answer.prompt.room else "end"
    yield replace(answer, ids=tuple(ids), text=_text(answer, ids), ended=ended)


def _text(answer: Answer, ids: Sequence[int]) -> str:
    """Decode from the start: a token alone does not say whether a space goes before it."""
    decode = answer.voice.network.tokenizer.decode
    return str(decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
