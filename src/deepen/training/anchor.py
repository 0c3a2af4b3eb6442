"""Holding a model to its base: KL(base ‖ model) on further windows beside each step's.

For a position with logits z of the model and b of its base, over the vocabulary V, in nats::

    KL = Σ_v softmax(b)_v (log softmax(b)_v − log softmax(z)_v)

Its gradient with respect to z is softmax(z) − softmax(b): nothing of the base is differentiated, so what
the base computes is one more forward pass (Li and Hoiem's learning without forgetting, arXiv 1606.09282,
equation 2, at temperature 1, on text of one's choice).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from deepen.model.head import only_head
from deepen.model.structure import blocks_of, family_of
from deepen.training.flops import count_flops
from deepen.training.interface import Batch
from deepen.training.loss import IGNORED, Loss, summed_by_parts, summed_cross_entropy
from deepen.training.parallel import Root
from deepen.training.prefix import Prefix, handing_over, noting

# The context in which a model is its base: `deepen.bypass`, or one that gives another model.
BaseOf = Callable[[PreTrainedModel], AbstractContextManager[PreTrainedModel]]

# Tensors of the size of the logits that a divergence holds: both models', in logarithms, and their terms.
_HELD = 4


@dataclass(frozen=True, kw_only=True)
class Anchor:
    """What holds the model to its base in every step.

    Attributes:
        batch_at: the windows of (step, windows), a pure function; only their inputs are read.
        windows: windows in one step.
        weight: of the mean divergence of a step beside its mean loss.
        base: the context in which the model is its base. Nothing that trains may run in it.
        prefix: what model and base share below the first block that trains, so that it runs once for both;
            None: each runs as a whole.
    """

    batch_at: Callable[[int, int], Batch]
    windows: int
    weight: float
    base: BaseOf
    prefix: Prefix | None = None


def anchor_loss(base: BaseOf, prefix: Prefix | None = None, likelihood: float = 0.0) -> Loss:
    """Return what sums KL(base ‖ model) over positions, in nats; called as `summed_loss`.

    The whole logits of neither exist at any time. Dropout is off in the base.

    Args:
        base: as in `Anchor`.
        prefix: as in `Anchor`.
        likelihood: weight of the negative log-likelihood of the targets beside the divergence.
    """

    def loss(
        model: PreTrainedModel,
        inputs: torch.Tensor,
        targets: torch.Tensor,
        positions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        placed = {} if positions is None else {"position_ids": positions}

        def states_of(chosen: PreTrainedModel) -> torch.Tensor:
            states: torch.Tensor = chosen.base_model(
                input_ids=inputs, use_cache=False, **placed
            ).last_hidden_state
            return states

        with torch.no_grad(), base(model) as reference, _resting(reference), _noting(prefix) as lower:
            before = states_of(reference)
        with handing_over(prefix, lower[0]) if prefix else nullcontext():
            after = states_of(model)
        counted = targets != IGNORED
        with only_head(reference) if reference is not model else nullcontext() as other:

            def measure(
                run: Callable[[torch.Tensor], torch.Tensor], part: torch.Tensor, place: slice
            ) -> torch.Tensor:
                with torch.no_grad():
                    wanted = (other or run)(before[:, place])
                found = run(part)
                apart = divergence(wanted, found).masked_fill(~counted[:, place], 0).sum()
                if not likelihood:
                    return apart
                return apart + likelihood * summed_cross_entropy(found, targets[:, place])

            return summed_by_parts(model, after, measure, held=_HELD + (likelihood > 0))

    return loss


def divergence(base: torch.Tensor, model: torch.Tensor) -> torch.Tensor:
    """Return KL(base ‖ model) of logits [..., words], in nats: [...] in fp32.

    Words that the base rules out (some heads mask ids with -inf) add nothing.
    """
    before, after = base.float().log_softmax(-1), model.float().log_softmax(-1)
    terms = before.exp() * (before - after)
    return terms.masked_fill(before == -torch.inf, 0).sum(-1)


def anchor_flops(
    root: nn.Module, model: PreTrainedModel, blocks: Sequence[nn.Module], length: int, anchor: Anchor
) -> float:
    """Count what a token of the anchor costs: the model's own step, and the base forward.

    Args:
        root: where passes begin; all processes call this at once.
        model: the model as it will train.
        blocks: its blocks, bottom to top.
        length: tokens of a window.
        anchor: what holds it to its base.
    """
    own = count_flops(root, model, blocks, length)
    with anchor.base(model) as reference:
        start = root if reference is model else Root(reference)
        theirs = list(blocks_of(reference, family_of(reference)))
        other = count_flops(start, reference, theirs, length)
    return own.total + other.total - (own.below if anchor.prefix else 0.0)


def _noting(prefix: Prefix | None) -> AbstractContextManager[list[torch.Tensor]]:
    return noting(prefix) if prefix else nullcontext([])


@contextmanager
def _resting(model: PreTrainedModel) -> Iterator[None]:
    """Switch dropout off."""
    training = model.training
    if training:
        model.eval()
    try:
        yield
    finally:
        if training:
            model.train()
