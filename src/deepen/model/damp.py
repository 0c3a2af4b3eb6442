"""The live model with its new blocks damped: every α between base and model without loading again."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel

from deepen.blocks import Alphas, check_alpha
from deepen.blocks.damp import check_dampable
from deepen.blocks.scaling import DAMPED, damped_bytes
from deepen.errors import PackError
from deepen.model.dtypes import DTYPE_NAMES
from deepen.model.record import expansion_of, new_tensors
from deepen.model.structure import family_of


@contextmanager
def damped(model: PreTrainedModel, alpha: Alphas) -> Iterator[PreTrainedModel]:
    """Run a model with the residual writes w of its new blocks at f + α (w − f), f being what adds nothing.

    The numbers are those that `damp_pack` writes, at the precision in memory. Afterwards every bit is as it
    was. A copy of the residual writes is held meanwhile. One thread at a time.

    Args:
        model: an expanded model.
        alpha: the factor, of all active new blocks or by index; 0 is the base, 1 the model.

    Raises:
        PackError: the model has no active new blocks or none of such an index, a factor is no number from 0,
            or a residual write is of a dtype that cannot be scaled, or would overflow it.
    """
    alphas, family = _alphas(model, alpha), family_of(model)
    held: list[tuple[torch.Tensor, torch.Tensor]] = []
    try:
        for name, tensor in new_tensors(model).items():
            place = family.split(name)
            fill = family.fill(place[1]) if place else None
            if place and fill is not None and alphas[place[0]] != 1:
                held.append((tensor, tensor.detach().clone()))
                _scale(tensor, fill, alphas[place[0]], name)
        yield model
    finally:
        with torch.no_grad():
            for tensor, kept in held:
                tensor.copy_(kept)


def _alphas(model: PreTrainedModel, alpha: Alphas) -> dict[int, float]:
    expansion = expansion_of(model)
    check_dampable(expansion, type(model).__name__)
    new = expansion.layout.new_indices
    given = dict(alpha) if isinstance(alpha, Mapping) else dict.fromkeys(new, alpha)
    if unknown := sorted(given.keys() - new):
        raise PackError(f"block {unknown[0]} is no new block of the model; it has {sorted(new)}")
    for each in given.values():
        check_alpha(each, type(model).__name__)
    return {index: float(given.get(index, 1.0)) for index in new}


@torch.no_grad()
def _scale(tensor: torch.Tensor, fill: float, alpha: float, name: str) -> None:
    dtype = DTYPE_NAMES.get(tensor.dtype, str(tensor.dtype))
    if dtype not in DAMPED:
        raise PackError(f"{name}: is {dtype}, which cannot be scaled")
    data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    try:
        scaled = damped_bytes(dtype, data, fill, alpha)
    except OverflowError as error:
        raise PackError(f"{name}: with alpha {alpha:g} {error}") from None
    values = torch.frombuffer(bytearray(scaled), dtype=tensor.dtype) if scaled else torch.empty(0)
    tensor.copy_(values.view(tensor.shape))
