"""The loss by Liger's fused kernel: an extra for GPUs, used where it is seen to give what ours gives."""

from collections.abc import Sequence
from importlib import import_module
from typing import Any, Final

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from deepen.errors import TrainingError, in_a_line
from deepen.training.loss import IGNORED, Loss, summed_loss

# Tokens of the trial, and how far loss and gradient may be apart, relative, in compute of 16 and of 32 bits.
_TRIAL: Final = (2, 48)
_APART: Final = {True: (2e-3, 3e-2), False: (1e-5, 1e-3)}


def liger_loss(model: PreTrainedModel, autocast: torch.dtype | None = None) -> Loss:
    """Return `summed_loss` by Liger's fused linear cross-entropy, having tried it beside ours.

    Args:
        model: a causal LM with what trains set, on the device it trains on.
        autocast: dtype of the compute, or None for the parameters' own.

    Raises:
        TrainingError: it is not installed, cannot run here, or gives another loss or gradient: a model that
            scales or caps its logits, for instance.
    """
    kernel = _kernel()

    def loss(
        model: PreTrainedModel,
        inputs: torch.Tensor,
        targets: torch.Tensor,
        positions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        placed = {} if positions is None else {"position_ids": positions}
        states = model.base_model(input_ids=inputs, use_cache=False, **placed).last_hidden_state
        head: Any = model.get_output_embeddings()
        width = states.shape[-1]
        summed: torch.Tensor = kernel(
            head.weight, states.reshape(-1, width).to(head.weight.dtype), targets.reshape(-1), head.bias
        )
        return summed

    _prove(model, loss, autocast)
    return loss


def _kernel() -> Any:
    try:
        module = import_module("liger_kernel.transformers.fused_linear_cross_entropy")
    except ImportError:
        raise TrainingError(
            "train.loss: liger-kernel is not installed\npip install liger-kernel, or set train.loss to parts"
        ) from None
    return module.LigerFusedLinearCrossEntropyLoss(ignore_index=IGNORED, reduction="sum")


def _prove(model: PreTrainedModel, loss: Loss, autocast: torch.dtype | None) -> None:
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear) or isinstance(head.weight, DTensor):
        raise _refusal("the head is no linear layer, or lies in several processes")
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        ours, theirs = (_trial(model, each, parameters, autocast) for each in (summed_loss, loss))
    except (RuntimeError, ValueError, TypeError, AssertionError) as error:
        raise _refusal(f"it does not run here ({in_a_line(error, 120)})") from None
    narrow = (autocast or model.dtype).itemsize < 4
    for what, first, second, most in zip(("loss", "gradient"), ours, theirs, _APART[narrow], strict=True):
        apart = float((first - second).norm() / first.norm())
        if not apart <= most:
            raise _refusal(f"its {what} is apart from ours by {apart:.1e}, {most:.0e} is allowed")


def _trial(
    model: PreTrainedModel, loss: Loss, parameters: Sequence[nn.Parameter], autocast: torch.dtype | None
) -> tuple[torch.Tensor, torch.Tensor]:
    words = model.get_input_embeddings().weight.shape[0]
    own = torch.Generator().manual_seed(0)
    tokens = torch.randint(words, (_TRIAL[0], _TRIAL[1] + 1), generator=own).to(model.device)
    targets = tokens[:, 1:].clone()
    targets[0, :5] = IGNORED
    with torch.autocast(model.device.type, dtype=autocast, enabled=autocast is not None):
        found = loss(model, tokens[:, :-1], targets)
    gradients = torch.autograd.grad(found, parameters, allow_unused=True)
    flat = torch.cat([each.detach().double().flatten() for each in gradients if each is not None])
    return found.detach().double(), flat


def _refusal(reason: str) -> TrainingError:
    return TrainingError(f"train.loss: liger: {reason}\nset train.loss to parts")
