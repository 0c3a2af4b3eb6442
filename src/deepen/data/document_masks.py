"""Whether a model keeps packed documents apart, found by asking it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch

from deepen.errors import TrainingError, in_a_line

# Three documents, the last of one id, and an end of the same length for each.
_SIZES: Final = (5, 9, 1, 7)
# Sums in another order differ by rounding; documents that see each other differ by far more.
_TOLERANCE: Final = {torch.float32: 1e-3, torch.float64: 1e-9, torch.bfloat16: 0.05, torch.float16: 0.01}


def check_document_masks(model: Any) -> None:
    """Prove that packed documents get the logits they get alone, as `data.document_masks` promises.

    A family of which transformers does not part documents by their positions (linear attention, most with
    ALiBi, models that ignore `position_ids`) shows it here, whatever its config says.

    Args:
        model: a causal language model of transformers, on its device. Runs three short forward passes
            without gradients, in eval mode.

    Raises:
        TrainingError: documents see each other, or the model cannot be asked.
    """
    difference, scale = measure_leak(model)
    if not difference <= _TOLERANCE.get(model.dtype, 0.05) * max(scale, 1.0):
        raise TrainingError(
            f"data.document_masks: {model.config.get_text_config().model_type}: documents packed together "
            f"change each other's logits by {difference:.2g}{_reason(model)}\n"
            "set data.document_masks to false"
        )


def measure_leak(model: Any) -> tuple[float, float]:
    """Return the largest change of a logit by packing, and the largest logit.

    Raises:
        TrainingError: the model takes no position ids.
    """
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = (torch.arange(1, sum(_SIZES) + 1, device=model.device) * 7919 % vocabulary)[None]
    positions = torch.cat([torch.arange(size, device=model.device) for size in _SIZES])[None]
    with _evaluating(model), torch.no_grad():
        try:
            packed = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        except (TypeError, ValueError) as error:
            family, said = model.config.get_text_config().model_type, in_a_line(error, 120)
            raise TrainingError(
                f"data.document_masks: {family}: takes no positions ({said})\n"
                "set data.document_masks to false"
            ) from None
        alone = torch.cat(
            [model(input_ids=part, use_cache=False).logits for part in ids.split(_SIZES, dim=1)], dim=1
        )
    return (packed - alone).abs().max().item(), alone.abs().max().item()


def _reason(model: Any) -> str:
    """Name what is known to let documents see each other."""
    config = model.config.get_text_config()
    kinds = {str(kind) for kind in getattr(config, "layer_types", None) or ()}
    if any("linear" in kind or "mamba" in kind or "conv" in kind or "recurrent" in kind for kind in kinds):
        return ": the state of its linear layers runs on from one document into the next"
    if getattr(config, "alibi", config.model_type in ("bloom", "mpt")):
        return ": it tells distance by ALiBi, without position ids"
    return ": its attention is not parted by position ids"


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
