"""How far a model has moved from its base, token by token: rank shift and KL divergence.

The rank shift is that of LLaMA Pro (arXiv 2401.02415, Appendix G and Figure 6): the rank, in the base's
distribution, of the token the trained model holds most likely. The paper follows the model's own greedy
answers; here both read the same held-out text.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from deepen.data.evaluation_text import EvaluationText
from deepen.evaluation.heldout import Progress
from deepen.evaluation.record import number_items
from deepen.evaluation.statistics import paired_difference
from deepen.evaluation.windows import check_ids, evaluating, fitting, padded
from deepen.model.head import only_head
from deepen.records import TokenShift

T = TypeVar("T")
Work = Callable[[Any], tuple[torch.Tensor, torch.Tensor]]

MARGINAL: Final = 3
"""The lowest rank that is still marginal; rank 1 is unshifted."""
# Elements of both models' logits widened to fp32 at a time.
_WIDENED_LOGITS = 2**24


@dataclass(frozen=True, kw_only=True)
class Shift:
    """What `measure_shift` finds, a column an entry a window.

    Attributes:
        unshifted: positions whose most likely token is the base's most likely too.
        marginal: positions whose most likely token is the base's second or third.
        shifted: the other positions.
        kl: summed KL(base ‖ model) over the vocabulary, in nats.
    """

    unshifted: NDArray[np.int64]
    marginal: NDArray[np.int64]
    shifted: NDArray[np.int64]
    kl: NDArray[np.float64]


def _at_once(model: Any) -> Callable[[Work], tuple[torch.Tensor, torch.Tensor]]:
    return lambda work: work(model)


@torch.no_grad()
def measure_shift(
    model: Any,
    windows: Sequence[NDArray[np.int64]],
    base: Callable[[Any], AbstractContextManager[object]],
    *,
    batch_tokens: int = 16384,
    autocast: torch.dtype | None = None,
    progress: Progress | None = None,
    call: Callable[[Work], tuple[torch.Tensor, torch.Tensor]] | None = None,
) -> Shift:
    """Compare a model with its base at every position that predicts a token of the windows.

    Both run on the same batch, the base first. Of each only the final states are kept; logits are made from
    them for some positions at a time, so those of a whole batch never exist. A batch that does not fit the
    memory is halved, and so are those after it.

    Args:
        model: a `PreTrainedModel` for causal language modelling.
        windows: token ids, each of shape (length,); a window of one token has no position.
        base: gives the context in which the model is its base, such as `deepen.bypass`.
        batch_tokens: tokens, padding included, in one pass.
        autocast: compute type on the model's device; None computes in the weights' own.
        progress: called after each batch.
        call: runs a function of the model, where that needs more than calling it (several processes).

    Raises:
        DataError: a token id the model has no embedding for.
        EvaluationError: one window alone does not fit the memory.
    """
    check_ids(model, windows)
    device = next(model.parameters()).device
    call = call or _at_once(model)
    counts, kl = np.zeros((len(windows), 3), dtype=np.int64), np.zeros(len(windows))
    done, total = 0, sum(len(window) > 1 for window in windows)
    with evaluating(model), torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):

        def compare(batch: list[int]) -> list[NDArray[Any]]:
            ids = padded([windows[index] for index in batch])[:, :-1].to(device)
            return [each.cpu().numpy() for each in call(comparing(base, ids))]

        for batch, (rank, divergence) in fitting(windows, batch_tokens, compare, "rank shift"):
            for row, index in enumerate(batch):
                held = slice(len(windows[index]) - 1)
                counts[index] = np.bincount(_kind(rank[row, held]), minlength=3)
                kl[index] = divergence[row, held].sum(dtype=np.float64)
            done += len(batch)
            if progress:
                progress(done, total)
    return Shift(unshifted=counts[:, 0], marginal=counts[:, 1], shifted=counts[:, 2], kl=kl)


def comparing(base: Callable[[Any], AbstractContextManager[object]], ids: torch.Tensor) -> Work:
    """Return the work on one batch: a function of the model that compares it with its base on `ids`."""

    def work(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
        with base(model):
            before = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        after = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        step = max(1, _WIDENED_LOGITS // (2 * model.config.get_text_config().vocab_size * len(ids)))
        parts = zip(torch.split(before, step, dim=1), torch.split(after, step, dim=1), strict=True)
        with only_head(model) as head:
            found = [_compare(head(first), head(second)) for first, second in parts]
        ranks, divergences = zip(*found, strict=True)
        return torch.cat(ranks, dim=1), torch.cat(divergences, dim=1)

    return work


def _compare(base: torch.Tensor, model: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the base's rank of the model's first choice and KL(base ‖ model), both [windows, length]."""
    with torch.autocast(base.device.type, enabled=False):
        before, after = base.float().log_softmax(-1), model.float().log_softmax(-1)
        top = before.gather(-1, after.argmax(-1, keepdim=True))
        terms = before.exp() * (before - after)
        # What the base rules out (some heads mask ids with -inf) adds nothing.
        return 1 + (before > top).sum(-1), terms.masked_fill_(before == -torch.inf, 0).sum(-1)


def _kind(rank: NDArray[np.int64]) -> NDArray[np.int64]:
    """0 unshifted, 1 marginal, 2 shifted."""
    return (rank > 1).astype(np.int64) + (rank > MARGINAL)


def summarise_shift(texts: Sequence[EvaluationText], shift: Shift, *, seed: int = 0) -> list[TokenShift]:
    """Return the shares and the divergence of each text.

    Args:
        texts: what was read.
        shift: of all their windows, in order.
        seed: of the intervals' resampling, over documents or windows as in the losses' record.
    """
    found, begin = [], 0
    for text in texts:
        part = slice(begin, begin + len(text.windows))
        begin = part.stop
        _, item = number_items(text)
        columns = [shift.kl[part], [len(window) - 1 for window in text.windows]]
        kl, tokens = (np.bincount(item, weights=np.asarray(column, dtype=float)) for column in columns)
        interval = paired_difference(kl, np.zeros(len(kl)), tokens, seed=seed)
        kinds = (shift.unshifted, shift.marginal, shift.shifted)
        unshifted, marginal, shifted = (int(kind[part].sum()) / text.tokens for kind in kinds)
        found.append(
            TokenShift(
                task=text.task,
                role=text.role,
                n=interval.n,
                tokens=text.tokens,
                unshifted=unshifted,
                marginal=marginal,
                shifted=shifted,
                kl=interval.value,
                kl_low=interval.ci_low,
                kl_high=interval.ci_high,
            )
        )
    return found
