"""Where two voices disagree: the next token each expects after every token of one text."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deepen.dialogue.network import Voice
from deepen.errors import ChatError

# Positions whose probabilities are in memory at once: of 128,000 tokens, 33 MB in fp32 a voice.
_CHUNK = 64


@dataclass(frozen=True)
class Guess:
    """A token that may come next.

    Attributes:
        token: its number.
        text: as it reads, special tokens by their names.
        probability: from 0 to 1.
    """

    token: int
    text: str
    probability: float


@dataclass(frozen=True, kw_only=True)
class Place:
    """A place in a text, and what each voice expects there.

    Attributes:
        text: the token that stands there; empty at the end of the text.
        divergence: KL(model ‖ base) of the two distributions, in nats.
        base: the base's most probable tokens, the first first.
        model: the model's.
    """

    text: str
    divergence: float
    base: tuple[Guess, ...]
    model: tuple[Guess, ...]

    @property
    def differs(self) -> bool:
        """Whether the two would go on with different tokens."""
        return self.base[0].token != self.model[0].token


def compare_next_tokens(
    base: Voice, model: Voice, prompt: Sequence[int], answer: Sequence[int], count: int = 5
) -> list[Place]:
    """Give both voices one text and compare what each expects next; temperature and top-p do not count.

    Args:
        base: the one.
        model: the other.
        prompt: tokens before the text that is looked at; at least one.
        answer: tokens of that text.
        count: tokens to show of each voice.

    Returns:
        A place for each token of `answer`, and the one after it.

    Raises:
        ChatError: the two have different tokens.
    """
    if base.network is not model.network and _vocabulary(base) != _vocabulary(model):
        raise ChatError("base and model have different tokens, so their next tokens cannot be compared")
    said = [*(_read(model, token) for token in answer), ""]
    chunks = zip(_chunks(base, prompt, answer), _chunks(model, prompt, answer), strict=True)
    places: list[Place] = []
    for ours, theirs in ((m.double(), b.double()) for b, m in chunks):
        divergence = (ours.exp() * (ours - theirs)).sum(-1)
        guesses = zip(
            _best(model, theirs, count), _best(model, ours, count), divergence.tolist(), strict=True
        )
        for of_base, of_model, nats in guesses:
            text = said[len(places)]
            places.append(Place(text=text, divergence=max(nats, 0.0), base=of_base, model=of_model))
    return places


def _chunks(voice: Voice, prompt: Sequence[int], answer: Sequence[int]) -> Iterator[Tensor]:
    """Yield log-probabilities [positions, vocabulary] of what follows the prompt, chunk by chunk."""
    ids = torch.tensor([[*prompt, *answer]], device=voice.network.model.device)
    with voice.network.playing(voice.packs) as model:
        logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 :]
    for chunk in logits.split(_CHUNK):
        yield torch.log_softmax(chunk.float(), dim=-1)


def _best(voice: Voice, chunk: Tensor, count: int) -> Iterator[tuple[Guess, ...]]:
    values, tokens = chunk.topk(min(count, chunk.shape[-1]), dim=-1)
    for row, chances in zip(tokens.tolist(), values.exp().tolist(), strict=True):
        yield tuple(Guess(t, _read(voice, t), p) for t, p in zip(row, chances, strict=True))


def _read(voice: Voice, token: int) -> str:
    """Return a token as it reads within a text, where the first token of some tokenizers loses its space."""
    tokenizer = voice.network.tokenizer
    if token in tokenizer.all_special_ids:
        return str(tokenizer.convert_ids_to_tokens(token))
    text = str(tokenizer.decode([token], clean_up_tokenization_spaces=False))
    piece = tokenizer.convert_ids_to_tokens(token)
    return f" {text}" if piece and piece.startswith("▁") and not text.startswith(" ") else text


def _vocabulary(voice: Voice) -> dict[str, Any]:
    return dict(voice.network.tokenizer.get_vocab())
