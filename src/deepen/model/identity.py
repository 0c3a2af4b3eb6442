"""Is it exactly the base? Logits, compared without tolerance."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from transformers import PreTrainedModel

from deepen.model.pack import load

_LENGTH: Final = 48
_DECODED: Final = 8


@dataclass(frozen=True, kw_only=True)
class LogitsComparison:
    """What comparing logits found.

    Attributes:
        identical: every logit of every check is equal.
        max_abs_difference: the largest difference of any.
        checks: what was compared, e.g. `bfloat16, cached`.
    """

    identical: bool
    max_abs_difference: float
    checks: tuple[str, ...]


def probe_logits(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return logits on fixed pseudo-random tokens: one whole forward, and a cached decode of the same.

    Returns:
        `uncached` [2, length, vocabulary] and `cached` [2, decoded, vocabulary]: the last positions, computed
        one token at a time on the cache of what stands before. Both on the CPU.
    """
    length = min(_LENGTH, getattr(model.config, "max_position_embeddings", None) or _LENGTH)
    decoded = min(_DECODED, length - 1)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.config.vocab_size, (2, length), generator=generator).to(model.device)
    with _evaluating(model), torch.no_grad():
        whole = model(input_ids=tokens, use_cache=False).logits
        step = model(input_ids=tokens[:, :-decoded], use_cache=True)
        stepwise = []
        for position in range(length - decoded, length):
            step = model(
                input_ids=tokens[:, position : position + 1],
                past_key_values=step.past_key_values,
                use_cache=True,
            )
            stepwise.append(step.logits)
    return {"uncached": whole.cpu(), "cached": torch.cat(stepwise, dim=1).cpu()}


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def compare_probes(base: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> LogitsComparison:
    """Compare two results of `probe_logits`."""
    differences = [_distance(base[name], other[name]) for name in base]
    return LogitsComparison(
        identical=not any(differences),
        max_abs_difference=max(differences),
        checks=tuple(f"{str(base[name].dtype).removeprefix('torch.')}, {name}" for name in base),
    )


def _distance(base: torch.Tensor, other: torch.Tensor) -> float:
    """Largest difference; infinity where one is not finite and the other is something else."""
    if base.shape != other.shape or base.dtype != other.dtype:
        return math.inf
    same = (base == other) | (base.isnan() & other.isnan())
    distance = (base.double() - other.double()).abs().nan_to_num(nan=math.inf, posinf=math.inf)
    return distance.masked_fill(same, 0.0).max().item()


def compare_logits(base: Path, expanded: Path) -> LogitsComparison:
    """Compare two checkpoints in the base's own dtype and in fp32, cached and uncached.

    One model is in memory at a time.

    Raises:
        CheckpointError: a checkpoint cannot be read.
    """
    results = []
    own = _probe(base, None)
    results.append(compare_probes(own, _probe(expanded, None)))
    if own["uncached"].dtype != torch.float32:
        results.append(compare_probes(_probe(base, torch.float32), _probe(expanded, torch.float32)))
    return LogitsComparison(
        identical=all(result.identical for result in results),
        max_abs_difference=max(result.max_abs_difference for result in results),
        checks=tuple(check for result in results for check in result.checks),
    )


def _probe(directory: Path, dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
    return probe_logits(load(directory, dtype=dtype))
