"""Writing an answer token by token, as transformers' `generate` would."""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.generation.logits_process import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from deepen.dialogue.network import Voice
from deepen.dialogue.prompt import Prompt
from deepen.errors import ChatError
from deepen.evaluation.memory import lacks_memory


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: 0 takes the most probable token; else logits are divided by it.
        top_p: of the probability, the share that may be drawn from.
        max_tokens: of an answer.
        seed: of the draws; the answers of one turn share theirs.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    max_tokens: int = 512
    seed: int = 0


def write(voice: Voice, prompt: Prompt, sampling: Sampling) -> Iterator[int]:
    """Yield the tokens of an answer; the one that ends it is not among them.

    Tokens are those that `generate` gives on the same device with the same seed. Several answers may be
    written in turn, on one network as well.

    Raises:
        ChatError: the conversation does not fit the memory.
    """
    network = voice.network
    choose, fewer = _chooser(network.model, sampling), _last_only(network.model)
    seen = given = torch.tensor([prompt.ids], device=network.model.device)
    cache = None
    for _ in range(prompt.room):
        with network.playing(voice.packs) as model:
            try:
                out = model(input_ids=given, past_key_values=cache, use_cache=True, **fewer)
            except (RuntimeError, MemoryError) as error:
                if not lacks_memory(error):
                    raise
                raise ChatError("the conversation does not fit the memory; begin anew with /reset") from None
            cache = out.past_key_values
            given = choose(seen, out.logits[:, -1])
            seen = torch.cat([seen, given], dim=1)
        token = int(given)
        if token in network.ends:
            return
        yield token


def _last_only(model: Any) -> dict[str, int]:
    """Keep logits of a long prompt out of memory, where the model can."""
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}


def _chooser(model: Any, sampling: Sampling) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a function of the tokens so far [1, n] and logits [1, vocabulary] -> the next token [1, 1]."""
    steps = LogitsProcessorList()
    penalty = getattr(model.generation_config, "repetition_penalty", None)
    if penalty not in (None, 1.0):
        steps.append(RepetitionPenaltyLogitsProcessor(penalty))
    if sampling.temperature > 0:
        steps.append(TemperatureLogitsWarper(sampling.temperature))
        if sampling.top_p < 1:
            steps.append(TopPLogitsWarper(sampling.top_p))
    generator = torch.Generator(model.device).manual_seed(sampling.seed)

    def choose(seen: Tensor, logits: Tensor) -> Tensor:
        scores = steps(seen, logits.float())
        if sampling.temperature > 0:
            return torch.multinomial(torch.softmax(scores, dim=-1), 1, generator=generator)
        return torch.argmax(scores, dim=-1, keepdim=True)

    return choose
