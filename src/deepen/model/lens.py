"""The logit lens: what a model would predict from its residual stream as it is between two blocks.

The stream goes through the model's own final norm, head, scale and cap, as if no further block followed
(nostalgebraist, "interpreting GPT: the logit lens", 2020).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from deepen.model.stand_in import Passed, Watched, standing_in
from deepen.model.structure import blocks_of, family_of


@contextmanager
def logit_lens(model: PreTrainedModel) -> Iterator[Callable[[torch.Tensor], torch.Tensor]]:
    """Give a function from states [windows, length, hidden] to logits [windows, length, words].

    It is the model's own forward pass in which every block is passed by: states that leave the last block
    become the model's logits. Within, the model is nothing else.
    """
    blocks = blocks_of(model, family_of(model))
    watched = {index: Watched(block) for index, block in enumerate(blocks)}
    token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    with standing_in(blocks, watched):
        model(input_ids=token, use_cache=False)
    passed = {index: Passed(blocks[index], each.items) for index, each in watched.items()}

    def look(states: torch.Tensor) -> torch.Tensor:
        passed[len(blocks) - 1].states = states
        logits: torch.Tensor = model(input_ids=token.expand(states.shape[:2]), use_cache=False).logits
        return logits

    with standing_in(blocks, passed):
        yield look


@contextmanager
def noting_streams(blocks: Sequence[nn.Module]) -> Iterator[list[tuple[torch.Tensor, torch.Tensor]]]:
    """Give the list in which a pass within notes what enters and what leaves each of some blocks."""
    noted: list[tuple[torch.Tensor, torch.Tensor]] = []

    def note(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any], made: Any) -> None:
        noted.append(
            (given[0] if given else named["hidden_states"], made[0] if isinstance(made, tuple) else made)
        )

    hooks = [block.register_forward_hook(note, with_kwargs=True) for block in blocks]
    try:
        yield noted
    finally:
        for hook in hooks:
            hook.remove()
