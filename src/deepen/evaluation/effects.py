"""What each new block does to the residual stream, and to what could be predicted from it.

Every predicted token is looked at before and after a block: how much the block writes, and what the model's
own final norm and head make of the stream there (`deepen.model.lens`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from deepen.data.evaluation_text import EvaluationText
from deepen.evaluation.heldout import Progress
from deepen.evaluation.paired import PairedItems, compare_items
from deepen.evaluation.record import number_items
from deepen.evaluation.windows import check_ids, evaluating, fitting, padded, vocabulary
from deepen.model.lens import logit_lens, noting_streams
from deepen.model.structure import blocks_of, family_of
from deepen.records import TextEffect, TokenEffect

# The streams of a batch round every new block are held at once.
_BATCH_TOKENS: Final = 4096
# Elements of the logits widened to fp32 at a time.
_WIDENED_LOGITS = 2**24
_CONTEXT: Final = 16


@dataclass(frozen=True, kw_only=True)
class Effect:
    """One block at every predicted token of some windows, in reading order; columns of shape (tokens,).

    Attributes:
        share: ‖block(x) − x‖ / ‖x‖ where the token is predicted, norms over the hidden size.
        before: −log p of the token, read off the stream below the block, in nats.
        after: the same above the block.
        first_before: the most likely token, read off the stream below the block.
        first_after: the same above the block.
    """

    share: NDArray[np.float64]
    before: NDArray[np.float64]
    after: NDArray[np.float64]
    first_before: NDArray[np.int64]
    first_after: NDArray[np.int64]


@torch.no_grad()
def measure_effects(
    model: Any,
    indices: Sequence[int],
    windows: Sequence[NDArray[np.int64]],
    *,
    autocast: torch.dtype | None = None,
    progress: Progress | None = None,
) -> list[Effect]:
    """Look at the stream below and above some blocks, at every position that predicts a token.

    A batch that does not fit the memory is halved. Logits are made for some positions at a time.

    Args:
        model: a causal language model of a known family.
        indices: of the blocks, ascending.
        windows: token ids, each of shape (length,); `window[1:]` is predicted.
        autocast: compute type on the model's device; None computes in the weights' own.
        progress: called after each batch.

    Returns:
        One for each block.

    Raises:
        DataError: a token id the model has no embedding for.
        EvaluationError: one window alone does not fit the memory.
    """
    check_ids(model, windows)
    ends = np.cumsum([len(window) - 1 for window in windows])
    columns = np.zeros((len(indices), 5, int(ends[-1])))
    device = next(model.parameters()).device
    done = 0
    with evaluating(model), torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):

        def look(batch: list[int]) -> NDArray[np.float64]:
            return _look(model, indices, padded([windows[index] for index in batch]).to(device))

        for batch, found in fitting(windows, _BATCH_TOKENS, look, "what each block does"):
            for row, index in enumerate(batch):
                length = len(windows[index]) - 1
                columns[..., ends[index] - length : ends[index]] = found[:, :, row, :length]
            done += len(batch)
            if progress:
                progress(done, len(windows))
    return [
        Effect(
            share=share,
            before=before,
            after=after,
            first_before=first_before.astype(np.int64),
            first_after=first_after.astype(np.int64),
        )
        for share, before, after, first_before, first_after in columns
    ]


def _look(model: Any, indices: Sequence[int], ids: torch.Tensor) -> NDArray[np.float64]:
    """Return the columns of `Effect` for a batch: [blocks, 5, windows, length]."""
    blocks = blocks_of(model, family_of(model))
    with noting_streams([blocks[index] for index in indices]) as streams:
        model.base_model(input_ids=ids[:, :-1], use_cache=False)
    step, found = max(1, _WIDENED_LOGITS // (vocabulary(model) * len(ids))), []
    with logit_lens(model) as lens:
        for below, above in streams:
            share = (above.float() - below.float()).norm(dim=-1) / below.float().norm(dim=-1)
            before, first_before = _read(lens, below, ids[:, 1:], step)
            after, first_after = _read(lens, above, ids[:, 1:], step)
            # Token numbers are exact in fp32 up to 2²⁴.
            columns = (share, before, after, first_before.float(), first_after.float())
            found.append(torch.stack(columns))
    return torch.stack(found).cpu().double().numpy()


def _read(
    lens: Callable[[torch.Tensor], torch.Tensor], states: torch.Tensor, targets: torch.Tensor, step: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return −log p of the targets and the most likely tokens, read off states: [windows, length] each.

    Args:
        lens: from states to logits.
        states: [windows, length, hidden].
        targets: the true next tokens, [windows, length].
        step: positions whose logits are made at a time.
    """
    nats, first = [], []
    for part, wanted in zip(torch.split(states, step, dim=1), torch.split(targets, step, dim=1), strict=True):
        logits = lens(part).float()
        nats.append(functional.cross_entropy(logits.transpose(1, 2), wanted, reduction="none"))
        first.append(logits.argmax(-1))
    return torch.cat(nats, dim=1), torch.cat(first, dim=1)


def describe_effects(
    texts: Sequence[EvaluationText],
    found: Sequence[Sequence[Effect]],
    decode: Callable[[Sequence[int]], str],
    *,
    most: int,
) -> list[list[TextEffect]]:
    """Summarise what the blocks do to each text.

    Args:
        texts: what was read.
        found: of each text, what `measure_effects` made of all its windows, a block an entry.
        decode: from token ids to text.
        most: tokens named of each block and text.

    Returns:
        Of each block, one entry a text. p values are adjusted for all blocks and texts.
    """
    pairs = [
        (text, _counted(text, effect))
        for text, effects in zip(texts, found, strict=True)
        for effect in effects
    ]
    metrics = compare_items([_paired(text, effect) for text, effect in pairs])
    summed = [
        TextEffect(
            task=text.task,
            role=text.role,
            share=float(effect.share.mean()),
            changed=float((effect.first_before != effect.first_after).mean()),
            loss=metric.model_copy(update={"role": text.role}),
            tokens=_strongest(text, effect, decode, most),
        )
        for (text, effect), metric in zip(pairs, metrics, strict=True)
    ]
    blocks = len(found[0])
    return [summed[block::blocks] for block in range(blocks)]


def _counted(text: EvaluationText, effect: Effect) -> Effect:
    """Return the columns of the tokens that count."""
    if text.counted is None:
        return effect
    counted = np.concatenate(text.counted)
    return Effect(**{name: column[counted] for name, column in vars(effect).items()})


def _paired(text: EvaluationText, effect: Effect) -> PairedItems:
    window = np.repeat(np.arange(len(text.windows)), text.predicted)

    def total(column: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.bincount(window, weights=column, minlength=len(text.windows)).astype(np.float64)

    return PairedItems(
        task=text.task,
        metric="nats_per_token",
        values=total(effect.after),
        base=total(effect.before),
        clusters=number_items(text)[1],
        weights=np.asarray(text.predicted, dtype=np.float64),
        higher_is_better=False,
    )


def _strongest(
    text: EvaluationText, effect: Effect, decode: Callable[[Sequence[int]], str], most: int
) -> list[TokenEffect]:
    """Return the tokens whose log-probability, over all their occurrences, a block changes most."""
    counted = text.counted or [np.ones(len(window) - 1, dtype=bool) for window in text.windows]
    places = [(row, int(at)) for row, flags in enumerate(counted) for at in np.flatnonzero(flags)]
    gains = effect.before - effect.after
    targets = np.asarray([text.windows[row][at + 1] for row, at in places])
    words, number, counts = np.unique(targets, return_inverse=True, return_counts=True)
    totals = np.bincount(number, weights=gains)
    described = []
    for word in np.argsort(-np.abs(totals), kind="stable")[:most]:
        among = np.flatnonzero(number == word)
        best = int(among[np.argmax(np.abs(gains[among]))])
        row, at = places[best]
        described.append(
            TokenEffect(
                token=_piece(decode, words[word]),
                count=int(counts[word]),
                gain=float(totals[word] / counts[word]),
                context=decode(text.windows[row][max(0, at + 1 - _CONTEXT) : at + 1].tolist()),
                context_gain=float(gains[best]),
                before=_piece(decode, effect.first_before[best]),
                after=_piece(decode, effect.first_after[best]),
            )
        )
    return described


def _piece(decode: Callable[[Sequence[int]], str], token: np.int64) -> str:
    """Return a token's text with its space, which some tokenizers take off what they decode first."""
    return decode([int(token)] * 2)[len(decode([int(token)])) :]
