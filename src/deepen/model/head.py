"""The head alone: final states turned into logits by the model's own forward, some positions at a time."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel


class _Output:
    """What a base model returns, of which there is nothing but the states."""

    def __init__(self, states: torch.Tensor) -> None:
        self.last_hidden_state = states

    def __getattr__(self, name: str) -> None:
        return None

    def __getitem__(self, key: Any) -> Any:
        return (self.last_hidden_state,)[key]


class _Given(nn.Module):
    """Stands in for the base model: whatever it is called with, it gives back the states it was given."""

    states: torch.Tensor

    @property
    def decoder(self) -> "_Given":
        """OPT's head calls the part of its base model that does the work."""
        return self

    def forward(self, *_: Any, **__: Any) -> _Output:
        return _Output(self.states)


@contextmanager
def only_head(model: PreTrainedModel) -> Iterator[Callable[[torch.Tensor], torch.Tensor]]:
    """Give a function that turns final states into logits by the model's own forward."""
    name, base, given = model.base_model_prefix, model.base_model, _Given()

    def run(states: torch.Tensor) -> torch.Tensor:
        given.states = states
        logits: torch.Tensor = model(inputs_embeds=states, use_cache=False).logits
        return logits

    setattr(model, name, given)
    try:
        yield run
    finally:
        setattr(model, name, base)
