"""The language-modelling loss without the logits of a whole batch in memory.

The head is run on some positions at a time, and each part's gradient is taken at once, so that neither its
logits nor anything else of it is kept: with a frozen head that is one forward and one backward product, the
least there is, and memory for one part. What a model class does to its logits (scaling, soft capping) is
done by its own forward.
"""

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from deepen.model.head import only_head

# As `summed_loss`.
Loss = Callable[..., torch.Tensor]

# Of the head, states [windows, part, width] and where they lie among the positions.
Measure = Callable[[Callable[[torch.Tensor], torch.Tensor], torch.Tensor, slice], torch.Tensor]

# A target that does not count.
IGNORED: Final = -100
# Elements of the logits held at a time: 64 MB in fp32.
_MOST_LOGITS: Final = 2**24


def summed_loss(
    model: PreTrainedModel,
    inputs: torch.Tensor,
    targets: torch.Tensor,
    positions: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the sum of the negative log-likelihoods of targets, in nats.

    Equal, but for the order of additions, to cross-entropy of `model(inputs).logits` in fp32.

    Args:
        model: a causal language model.
        inputs: token ids [windows, length].
        targets: the token after each, [windows, length]; `IGNORED` where it does not count.
        positions: position ids [windows, length], where they are not 0, 1, 2, …; transformers parts
            documents where they restart, as no cache is used.

    Returns:
        A scalar in fp32 to call `backward` on, once.
    """
    placed = {} if positions is None else {"position_ids": positions}
    states = model.base_model(input_ids=inputs, use_cache=False, **placed).last_hidden_state
    return summed_by_parts(
        model, states, lambda run, part, place: summed_cross_entropy(run(part), targets[:, place])
    )


def summed_by_parts(
    model: PreTrainedModel, states: torch.Tensor, measure: Measure, *, held: int = 1
) -> torch.Tensor:
    """Return the sum over positions of what is measured on the head's logits, some positions at a time.

    Args:
        model: a causal language model.
        states: final states [windows, length, width].
        measure: of (a function from states to logits, some positions' states, their slice): a scalar that
            sums over these positions.
        held: how many tensors as large as the logits a measure holds at a time.

    Returns:
        A scalar in fp32 to call `backward` on, once.
    """
    head = _trainable_head(model)
    loss: torch.Tensor = _HeadLoss.apply(states, model, measure, held, *head)  # type: ignore[no-untyped-call]
    return loss


def _trainable_head(model: PreTrainedModel) -> list[nn.Parameter]:
    """Return the trainable parameters behind the base model; of a tied head, the embeddings."""
    inside = {id(module) for module in model.base_model.modules()}
    outer = [module for module in model.modules() if id(module) not in inside and module is not model]
    own = {id(p): p for module in outer for p in module.parameters(recurse=False) if p.requires_grad}
    return list(own.values())


class _HeadLoss(torch.autograd.Function):
    """A sum over the head's logits; gradients are made in the forward pass, part by part."""

    @staticmethod
    def forward(
        ctx: Any,
        states: torch.Tensor,
        model: PreTrainedModel,
        measure: Measure,
        held: int,
        *head: nn.Parameter,
    ) -> torch.Tensor:
        words = model.config.get_text_config().vocab_size
        step = max(1, _MOST_LOGITS // (held * words * len(states)))
        total = torch.zeros((), device=states.device)
        upstream = torch.empty_like(states) if states.requires_grad else None
        gradients = [torch.zeros_like(parameter) for parameter in head]
        with only_head(model) as run:
            for begin in range(0, states.shape[1], step):
                end = begin + step
                part = states[:, begin:end].detach().requires_grad_(upstream is not None)
                with torch.enable_grad():
                    loss = measure(run, part, slice(begin, end))
                found = torch.autograd.grad(loss, [*([part] if upstream is not None else []), *head])
                if upstream is not None:
                    upstream[:, begin:end], *found = found  # type: ignore[assignment]
                for gradient, more in zip(gradients, found, strict=True):
                    gradient += more
                total += loss.detach()
        ctx.upstream, ctx.gradients = upstream, gradients
        return total

    @staticmethod
    def backward(ctx: Any, scale: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # In place: nothing else refers to them, and a copy would be as large as the states.
        scaled = [None if g is None else g.mul_(scale.to(g.dtype)) for g in (ctx.upstream, *ctx.gradients)]
        ctx.upstream, ctx.gradients = None, []
        return scaled[0], None, None, None, *scaled[1:]


def summed_cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the summed negative log-likelihood of labels [...] under logits [..., words], in nats."""
    flat = logits.flatten(0, 1).float()
    return functional.cross_entropy(flat, labels.flatten(), ignore_index=IGNORED, reduction="sum")
