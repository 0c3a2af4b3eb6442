"""How much each block of a model matters to a text: skipped, differentiated, and looked at from outside.

Uniform placement of new blocks ignores that blocks differ. ADEPT (arXiv 2510.10071) expands the layers least
important for general ability, measured by masking them one at a time.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from deepen.evaluation.heldout import Progress, score_windows
from deepen.evaluation.windows import batches, evaluating, padded

Windows = Sequence[NDArray[np.int64]]
_IGNORED = -100
_BATCH_TOKENS = 4096


@contextmanager
def skipping(block: nn.Module) -> Iterator[None]:
    """Let a block hand on what it is given: the model without it. Not with a KV cache."""

    def hand_on(_: nn.Module, given: tuple[Any, ...], kept: dict[str, Any], made: Any) -> Any:
        states = given[0] if given else kept["hidden_states"]
        return (states, *made[1:]) if isinstance(made, tuple) else states

    hook = block.register_forward_hook(hand_on, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def losses_without(
    model: Any,
    blocks: Sequence[nn.Module],
    windows: Windows,
    *,
    autocast: torch.dtype | None = None,
    progress: Progress | None = None,
) -> NDArray[np.float64]:
    """Score a text with all blocks, and with each block skipped alone, as `nats_without` does.

    Returns:
        Nats per predicted token, shape (1 + blocks,); the first with no block skipped.
    """
    nats = nats_without(model, blocks, windows, autocast=autocast, progress=progress)
    return np.asarray(nats.sum(axis=1) / sum(len(window) - 1 for window in windows))


def nats_without(
    model: Any,
    blocks: Sequence[nn.Module],
    windows: Windows,
    *,
    autocast: torch.dtype | None = None,
    progress: Progress | None = None,
) -> NDArray[np.float64]:
    """Score each window with all blocks, and with each block skipped alone.

    Args:
        model: a causal language model.
        blocks: its blocks, or some of them.
        windows: token ids, each of shape (length,).
        autocast: compute type; None computes in the weights' own.
        progress: called with (passes through the text done, passes to make).

    Returns:
        Nats, shape (1 + blocks, windows); the first row with no block skipped.

    Raises:
        DataError: a token id the model has no embedding for.
        TrainingError: a loss is not a finite number.
    """
    total = len(blocks) + 1
    found = [score_windows(model, windows, autocast=autocast)]
    for number, block in enumerate(blocks, start=1):
        if progress:
            progress(number, total)
        with skipping(block):
            found.append(score_windows(model, windows, autocast=autocast))
    if progress:
        progress(total, total)
    return np.stack(found)


def cosines(model: Any, blocks: Sequence[nn.Module], windows: Windows) -> NDArray[np.float64]:
    """Return the mean cosine between what enters and what leaves each block, shape (blocks,).

    Near 1: the block turns its input little.
    """
    return _mean_over_tokens(model, blocks, windows, lambda x, y: functional.cosine_similarity(x, y, dim=-1))


def contributions(model: Any, blocks: Sequence[nn.Module], windows: Windows) -> NDArray[np.float64]:
    """Return the mean of ‖block(x) − x‖ / ‖x‖ over tokens, shape (blocks,): how much each block adds.

    0: the block hands on what it is given. The norms are over the hidden size.
    """
    return _mean_over_tokens(model, blocks, windows, lambda x, y: (y - x).norm(dim=-1) / x.norm(dim=-1))


@torch.no_grad()
def _mean_over_tokens(
    model: Any,
    blocks: Sequence[nn.Module],
    windows: Windows,
    measure: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> NDArray[np.float64]:
    """Mean of a measure of what enters and what leaves each block, [windows, length, hidden] in fp32."""
    sums, count = np.zeros(len(blocks)), 0
    kept: torch.Tensor

    def look(number: int) -> Callable[..., None]:
        def hook(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any], made: Any) -> None:
            before = given[0] if given else named["hidden_states"]
            after = made[0] if isinstance(made, tuple) else made
            sums[number] += measure(before.float(), after.float())[kept].sum().item()

        return hook

    hooks = [block.register_forward_hook(look(i), with_kwargs=True) for i, block in enumerate(blocks)]
    try:
        with evaluating(model):
            for tokens, mask in _batches(model, windows):
                kept = mask
                model(input_ids=tokens, use_cache=False)
                count += int(mask.sum())
    finally:
        for hook in hooks:
            hook.remove()
    return sums / max(1, count)


def gradient_importance(model: Any, blocks: Sequence[nn.Module], windows: Windows) -> NDArray[np.float64]:
    """Return the sum of |weight × gradient| of each block's parameters, shape (blocks,).

    The first order of how much the mean loss moves when a weight is taken away (Molchanov et al.,
    arXiv 1906.10771), summed over a block. The gradients of all blocks lie in memory, in the weights'
    precision.
    """
    wanted = [parameter for block in blocks for parameter in block.parameters()]
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    held = {id(parameter) for parameter in wanted}
    predicted = sum(len(window) - 1 for window in windows)
    try:
        for parameter, _ in before:
            parameter.requires_grad_(id(parameter) in held and parameter.is_floating_point())
        with evaluating(model), torch.enable_grad():
            for tokens, mask in _batches(model, windows):
                logits = model(input_ids=tokens, use_cache=False).logits[:, :-1].float()
                targets = tokens[:, 1:].masked_fill(~mask[:, 1:], _IGNORED)
                nats = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
                torch.autograd.backward(nats / predicted)
        return np.asarray([sum(_moved(parameter) for parameter in block.parameters()) for block in blocks])
    finally:
        for parameter, trains in before:
            parameter.grad = None
            parameter.requires_grad_(trains)


def _moved(parameter: nn.Parameter) -> float:
    if parameter.grad is None:
        return 0.0
    return (parameter.detach().float() * parameter.grad.float()).abs().sum().item()


def _batches(model: Any, windows: Windows) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield (tokens, which of them are no padding), shape (windows, length) each."""
    device = next(model.parameters()).device
    for batch in batches(windows, _BATCH_TOKENS):
        chosen = [windows[index] for index in batch]
        tokens = padded(chosen).to(device)
        lengths = torch.tensor([len(window) for window in chosen], device=device)
        yield tokens, torch.arange(tokens.shape[1], device=device) < lengths[:, None]
