"""A live model as the harness sees it: its own class over a loaded model, so that numbers are its own."""

from collections.abc import Callable, Sequence
from typing import Any, Final, TypeVar

import torch
from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedModel

from deepen.errors import EvaluationError
from deepen.evaluation.memory import collect_memory, lacks_memory

T = TypeVar("T")
Progress = Callable[[int, int], None]
"""Called with (sequences run, requests)."""

_MOST_ROWS: Final = 64
# Elements of one batch's logits; the harness holds them twice, as logits and as log-probabilities.
_MOST_LOGITS: Final = 2**28


class LiveModel(HFLM):  # type: ignore[misc]
    """The harness's `HFLM` over a model that is loaded already.

    Tokenisation, BOS, truncation and padding are the harness's. A batch that does not fit the memory is
    halved, and so are those after it; where no size was asked for, the first is as large as the logits of the
    longest request allow.

    Attributes:
        lengths: (context, continuation) -> tokens of the continuation, of all pairs scored.
        cut: requests that were longer than the model's context and lost their beginning.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: Any, *, batch_size: int | None = None) -> None:
        """Wrap a model; `batch_size` is the rows of one forward pass, None to find it."""
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size or _MOST_ROWS)
        self._asked = batch_size
        self._most = batch_size or _MOST_ROWS
        self.progress: Progress | None = None
        self.lengths: dict[tuple[str, str], int] = {}
        self.cut = 0
        self._done = self._total = 0

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Score continuations after contexts: (nats, whether greedy decoding writes it) each."""
        self._begin(len(requests))
        scored: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return scored

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Score whole texts in windows of the model's context: nats each."""
        self._begin(len(requests))
        self._size_for(self.max_length)
        return self._halving(
            lambda: super(LiveModel, self).loglikelihood_rolling(requests, disable_tqdm=True)
        )

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continue each context up to its stop sequences, batched, with a KV cache."""
        self._begin(len(requests))
        self.batch_size_per_gpu = self._most  # only the last position's logits are computed
        return self._halving(lambda: super(LiveModel, self).generate_until(requests, disable_tqdm=True))

    def _loglikelihood_tokens(
        self, requests: Sequence[Any], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        for pair, context, continuation in requests:
            if pair is not None:
                self.lengths[pair] = len(continuation)
                self.cut += len(context) + len(continuation) > self.max_length + 1
        if override_bs is None and requests:
            self._size_for(max(len(context) + len(continuation) for _, context, continuation in requests))
        return self._halving(
            lambda: super(LiveModel, self)._loglikelihood_tokens(requests, True, override_bs)
        )

    def _model_call(self, inps: torch.Tensor, *others: Any, **more: Any) -> torch.Tensor:
        logits: torch.Tensor = super()._model_call(inps, *others, **more)
        self._advance(len(inps))
        return logits

    def _model_generate(self, context: torch.Tensor, *others: Any, **more: Any) -> torch.Tensor:
        tokens: torch.Tensor = super()._model_generate(context, *others, **more)
        self._advance(len(context))
        return tokens

    def _size_for(self, longest: int) -> None:
        """Choose the rows of a batch where none were asked for."""
        fit = _MOST_LOGITS // (min(longest, self.max_length) * self.model.config.get_text_config().vocab_size)
        self.batch_size_per_gpu = self._most if self._asked else max(1, min(self._most, fit))

    def _halving(self, work: Callable[[], list[T]]) -> list[T]:
        """Do it again with half the rows until it fits; the longest come first, so little is lost."""
        while True:
            done, cut = self._done, self.cut
            try:
                return work()
            except (RuntimeError, MemoryError) as error:
                if not lacks_memory(error):
                    raise
                if self.batch_size_per_gpu == 1:
                    raise EvaluationError("one sequence alone does not fit the memory") from None
            # Outside the handler: the traceback would hold on to the tensors that filled the memory.
            self._most = self.batch_size_per_gpu = self.batch_size_per_gpu // 2
            self._done, self.cut = done, cut
            collect_memory()

    def _begin(self, total: int) -> None:
        self._done, self._total = 0, total

    def _advance(self, rows: int) -> None:
        self._done += rows
        if self.progress:
            self.progress(min(self._done, self._total), self._total)
