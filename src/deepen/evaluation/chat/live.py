"""A live model, or its base bypassed, as one who answers conversations."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from itertools import groupby
from typing import Any, Final

import torch
from jinja2 import TemplateError
from transformers import GenerationConfig, PreTrainedModel

from deepen.errors import EvaluationError, in_a_line
from deepen.evaluation.chat.messages import Message, digest_of
from deepen.evaluation.memory import collect_memory, lacks_memory
from deepen.model import bypass

_UNSAMPLED: Final = {"do_sample": False, "num_beams": 1, "temperature": 1.0, "top_p": 1.0, "top_k": 50}


class LiveChat:
    """Greedy replies through transformers' `generate` and the tokenizer's chat template.

    Base and model may share one load: give the same model twice, once `bypassed`. Of the model's generation
    config all holds but what samples: its end tokens, its repetition penalty.
    """

    def __init__(
        self,
        model: Callable[[], PreTrainedModel],
        tokenizer: Any,
        identity: str,
        *,
        bypassed: bool = False,
        max_new_tokens: int = 1024,
        batch_size: int = 8,
    ) -> None:
        """Wrap a model that may not be loaded yet.

        Args:
            model: gives the model on its device, always the same one; called when it has to reply.
            tokenizer: with a chat template.
            identity: digest of the weights that answer and of what ends their replies.
            bypassed: answer with the model's new blocks switched off.
            max_new_tokens: of a reply; fewer where the context ends before.
            batch_size: conversations in a forward pass, halved where they do not fit the memory; sizes change
                results by rounding only.

        Raises:
            EvaluationError: the tokenizer has no chat template.
        """
        if not getattr(tokenizer, "chat_template", None):
            raise EvaluationError(
                "the tokenizer has no chat template, so the model cannot be asked in conversations;\n"
                "use a chat model, or put a chat_template into its tokenizer_config.json"
            )
        self._load, self._tokenizer, self._bypassed = model, tokenizer, bypassed
        self._most, self._batch_size = max_new_tokens, batch_size
        self._identity = digest_of(identity, bypassed, tokenizer.chat_template, max_new_tokens)

    @property
    def identity(self) -> str:
        """Digest of the identity given, the template and the length of replies."""
        return self._identity

    @property
    def _model(self) -> PreTrainedModel:
        return self._load()

    def reply(self, conversations: Sequence[Sequence[Message]], stop: Sequence[str] = ()) -> list[str | None]:
        """Answer each conversation; see `Responder`."""
        prompts = [self._encode(conversation) for conversation in conversations]
        replies: list[str | None] = [None] * len(prompts)
        with bypass(self._model) if self._bypassed else nullcontext():
            for room, batch in self._batches(prompts):
                texts = self._halving([prompts[at] for at in batch], room, stop)
                for at, text in zip(batch, texts, strict=True):
                    replies[at] = text
        return replies

    def _batches(self, prompts: Sequence[list[int]]) -> Iterator[tuple[int, list[int]]]:
        """Yield prompts that have equal room for a reply, alike in length, and that room."""
        room = {at: self._room(prompt) for at, prompt in enumerate(prompts)}
        order = sorted(room, key=lambda at: (room[at], len(prompts[at]), at))
        for most, places in groupby(order, key=room.__getitem__):
            if most > 0:
                held = list(places)
                while held:
                    batch = held[: self._batch_size]
                    held = held[len(batch) :]
                    yield most, batch

    def _halving(self, prompts: Sequence[list[int]], room: int, stop: Sequence[str]) -> list[str]:
        """Halve a batch that does not fit the memory, and those after it."""
        try:
            return self._generate(prompts, room, stop)
        except (RuntimeError, MemoryError) as error:
            if not lacks_memory(error):
                raise
            if len(prompts) == 1:
                raise EvaluationError("one conversation alone does not fit the memory") from None
        collect_memory()
        self._batch_size = half = len(prompts) // 2
        return [*self._halving(prompts[:half], room, stop), *self._halving(prompts[half:], room, stop)]

    def _encode(self, conversation: Sequence[Message]) -> list[int]:
        try:
            text = self._tokenizer.apply_chat_template(
                list(conversation), tokenize=False, add_generation_prompt=True
            )
        except (TemplateError, ValueError, TypeError) as error:
            said = in_a_line(error, 200)
            raise EvaluationError(f"the tokenizer's chat template fails on a conversation: {said}") from None
        # The template writes the special tokens itself.
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _room(self, prompt: Sequence[int]) -> int:
        context = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)
        return self._most if context is None else min(self._most, context - len(prompt))

    def _generate(self, prompts: Sequence[list[int]], room: int, stop: Sequence[str]) -> list[str]:
        ends = _ends(self._model, self._tokenizer)
        longest = max(map(len, prompts))
        pad = self._tokenizer.pad_token_id
        pad = pad if pad is not None else (ends or [0])[0]
        ids = torch.tensor([[pad] * (longest - len(each)) + each for each in prompts])
        mask = torch.tensor([[0] * (longest - len(each)) + [1] * len(each) for each in prompts])
        config = GenerationConfig(
            **_UNSAMPLED,
            max_new_tokens=room,
            eos_token_id=ends or None,
            pad_token_id=pad,
            stop_strings=list(stop) or None,
        )
        with torch.inference_mode():
            written = self._model.generate(
                input_ids=ids.to(self._model.device),
                attention_mask=mask.to(self._model.device),
                generation_config=config,
                tokenizer=self._tokenizer,
            )
        rows = written[:, longest:].tolist()
        return [self._decode(_until(row, ends), stop) for row in rows]

    def _decode(self, ids: list[int], stop: Sequence[str]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        cuts = [at + len(each) for each in stop if (at := text.find(each)) >= 0]
        return text[: min(cuts)] if cuts else text


def _ends(model: PreTrainedModel, tokenizer: Any) -> list[int]:
    """Return the tokens that end a reply: those of the model's generation config, and the tokenizer's."""
    own = model.generation_config.eos_token_id if model.generation_config else None
    listed = own if isinstance(own, list) else [own]
    return list(dict.fromkeys(each for each in [*listed, tokenizer.eos_token_id] if each is not None))


def _until(row: list[int], ends: Sequence[int]) -> list[int]:
    return next((row[:at] for at, token in enumerate(row) if token in ends), row)
