"""A price on what new blocks add to the residual stream, so that they add no more than they need."""

from collections.abc import Collection
from typing import Any

import torch
from transformers import PreTrainedModel

from deepen.model.stand_in import StandIn, standing_in
from deepen.model.structure import blocks_of, family_of
from deepen.training.loss import IGNORED, Loss


def penalised(loss: Loss, weight: float, new: Collection[int]) -> Loss:
    """Return a loss whose gradient is also that of `weight` × the relative size of what new blocks add.

    That is ‖block(x) − x‖² / ‖x‖², its mean over new blocks and its sum over positions that count; ‖x‖² is
    taken as a constant, or a block could pay less by making the stream longer for those above it. The value
    stays that of `loss`: a loss remains a likelihood.

    Args:
        loss: called as `summed_loss`.
        weight: beside the loss, both as means over tokens.
        new: numbers of the new blocks.
    """

    def with_penalty(
        model: PreTrainedModel,
        inputs: torch.Tensor,
        targets: torch.Tensor,
        positions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        blocks = blocks_of(model, family_of(model))
        measured = {index: _Measured(blocks[index]) for index in new}
        with standing_in(blocks, measured):
            nll = loss(model, inputs, targets, positions)
        added = torch.stack([each.added for each in measured.values()]).mean(0)
        price = weight * added.masked_fill(targets == IGNORED, 0).sum()
        return nll + (price - price.detach())

    return with_penalty


class _Measured(StandIn):
    """Measures what its block adds, outside of it: a block that is computed again does not do so twice."""

    added: torch.Tensor

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        before = args[0] if args else kwargs["hidden_states"]
        found = self.block(*args, **kwargs)
        after = found[0] if isinstance(found, tuple) else found
        size = before.detach().float().square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)
        self.added = (after - before).float().square().sum(-1) / size
        return found
