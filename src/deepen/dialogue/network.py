"""A loaded model that answers, and the voices it answers with: each a choice of its packs."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from threading import Lock
from typing import Any

import torch
from transformers import PreTrainedModel

from deepen.data.chat import ChatTemplate, choose_template, turn_end
from deepen.errors import DataError
from deepen.model import Decision, Switch, activate, attached
from deepen.model.state import find_state


class Network:
    """A model in memory with its tokenizer and chat template.

    Which packs are on is said each time it computes, so that several conversations, and both columns of one,
    share a load. With none on it is its base, as in `deepen.bypass`.
    """

    def __init__(self, model: Any, tokenizer: Any, template: ChatTemplate | None) -> None:
        """Wrap a loaded model.

        Args:
            model: on its device, with or without packs.
            tokenizer: its own.
            template: how a conversation becomes text; None: texts are continued as they are.
        """
        self.model, self.tokenizer, self.template = model, tokenizer, template
        # An adapter of peft switches nothing on or off.
        self.packs = attached(model) if isinstance(model, PreTrainedModel) else ()
        self.ends = _ends(model, tokenizer, template)
        self._lock = Lock()

    @property
    def context(self) -> int | None:
        """Tokens that the model can see at once; None where its config does not say."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    @property
    def active(self) -> tuple[str, ...]:
        """The packs that are on, from the bottom."""
        state = find_state(self.model) if self.packs else None
        return state.active if state else ()

    @contextmanager
    def playing(self, packs: Sequence[str]) -> Iterator[Any]:
        """Give the model with these packs on, to compute without gradients; one thread at a time.

        A KV cache serves only those packs with which it was made.
        """
        with self._lock, torch.inference_mode():
            if self.active != tuple(packs):
                activate(self.model, *packs)
            yield self.model

    def decide(self, switch: Switch, ids: Sequence[int], packs: Sequence[str]) -> Decision:
        """Return which of these packs, if any, answers a prompt; all of it is read."""
        prompt = torch.tensor(ids, device=self.model.device)
        whole = replace(switch, prompt_tokens=max(len(ids), 1))
        with self._lock, torch.inference_mode():
            return whole.decide(self.model, [prompt], packs)[0]


@dataclass(frozen=True)
class Voice:
    """Who answers.

    Attributes:
        name: `base` or `model`.
        network: what computes.
        packs: those that are on, from the bottom.
    """

    name: str
    network: Network
    packs: tuple[str, ...]


def find_template(tokenizer: Any, name: str | None) -> ChatTemplate | None:
    """Return the template of that name, or the tokenizer's own; None where it has none and none is named.

    Raises:
        DataError: there is none of that name.
    """
    return choose_template(tokenizer, name) if name or tokenizer.chat_template else None


def _ends(model: Any, tokenizer: Any, template: ChatTemplate | None) -> frozenset[int]:
    """Return the tokens that end an answer: the generation config's, the tokenizer's, the template's."""
    own = model.generation_config.eos_token_id if model.generation_config else None
    listed = own if isinstance(own, list) else [own]
    try:
        turn = turn_end(template, tokenizer) if template else None
    except DataError:  # a template that wants more than two messages ends turns as the tokenizer does
        turn = None
    return frozenset(each for each in (*listed, tokenizer.eos_token_id, turn) if each is not None)
