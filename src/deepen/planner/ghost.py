"""A model without values: the real transformers classes on the meta device, expanded, with what trains set.

PyTorch's fake tensors then let it run a training step in which every operation knows its shapes, strides and
dtypes and nothing is computed. They stand for the CPU's, whose fused attention stores what a GPU's does.
"""

import importlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final
from unittest.mock import patch

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from transformers import PretrainedConfig, PreTrainedModel

from deepen.checkpoint import Checkpoint
from deepen.errors import CheckpointError, DeepenError
from deepen.expansion import Fingerprint
from deepen.methods import WIDE, build_method
from deepen.methods.base import base_inside
from deepen.model import DTYPES, insert_blocks
from deepen.model.pack import model_class
from deepen.model.structure import blocks_of, family_of
from deepen.planner.job import Job
from deepen.training.anchor import BaseOf

_UNREAD: Final = Fingerprint(fast="0" * 64)


@dataclass(frozen=True, kw_only=True)
class Ghost:
    """A model without values.

    Attributes:
        model: the model, as it will train.
        parameters: what trains, by name.
        base: number of parameters of the base.
        compute: dtype of autocast, or None for the parameters' own.
        mode: that its tensors belong to; None while they lie on the meta device.
        reference: the copy of the base that an anchor needs where the method changes the base itself.
        teacher: the model whose predictions are learned.
        base_of: the context in which the model is its base; None: as its method has it.
    """

    model: PreTrainedModel
    parameters: dict[str, nn.Parameter]
    base: int
    compute: torch.dtype | None
    mode: FakeTensorMode | None = None
    reference: PreTrainedModel | None = None
    teacher: PreTrainedModel | None = None
    base_of: BaseOf | None = None

    @property
    def blocks(self) -> list[nn.Module]:
        """The blocks, bottom to top."""
        return list(blocks_of(self.model, family_of(self.model)))

    @property
    def models(self) -> list[PreTrainedModel]:
        """The model, and those that are held beside it."""
        return [model for model in (self.model, self.reference, self.teacher) if model is not None]

    @property
    def weight_bytes(self) -> int:
        """Bytes of all parameters and buffers, shared ones once; those of models beside it included."""
        held = [tensor for model in self.models for tensor in (*model.parameters(), *model.buffers())]
        return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in held}.values())

    @property
    def trainable(self) -> int:
        """Number of parameters that train."""
        return sum(parameter.numel() for parameter in self.parameters.values())


def meta_base(job: Job, precision: str) -> PreTrainedModel:
    """Build the base on the meta device, in the precision in which a run would hold it.

    Raises:
        CheckpointError: as `untrained_base`.
    """
    return untrained_base(job, _is_wide(job, precision), torch.device("meta"))


def prepare_ghost(job: Job, base: PreTrainedModel, precision: str) -> Ghost:
    """Expand a base without values, and set what trains, as a run does.

    Raises:
        FamilyError: deepen does not know the model.
        TrainingError: the method does not work on it.
    """
    count = count_parameters_of(base)
    with torch.device("meta"), one_document():
        parameters = _prepare(job, base)
    compute = torch.bfloat16 if precision == "bf16" else None
    return Ghost(
        model=base.train(),
        parameters=parameters,
        base=count,
        compute=compute,
        reference=_reference(job, precision),
        teacher=untrained_teacher(job, precision, torch.device("meta")),
    )


def trained_model(
    job: Job, precision: str, device: torch.device
) -> tuple[PreTrainedModel, dict[str, nn.Parameter]]:
    """Build the same with values, random ones, on a real device; return it and what of it trains."""
    model = untrained_base(job, _is_wide(job, precision), device)
    return model, _prepare(job, model)


def _prepare(job: Job, model: PreTrainedModel) -> dict[str, nn.Parameter]:
    if job.layout:
        insert_blocks(model, job.layout, base=str(job.source), fingerprint=_UNREAD)
    if job.train.new_rows or job.train.method == "rows":
        model.name_or_path = str(job.source)  # where it is said which rows are new
    return build_method(job.train).prepare(model)


def _reference(job: Job, precision: str) -> PreTrainedModel | None:
    if job.train.anchor is None or base_inside(build_method(job.train)) is not None:
        return None
    return untrained_base(job, precision == "fp32", torch.device("meta")).requires_grad_(False)


def untrained_teacher(job: Job, precision: str, device: torch.device) -> PreTrainedModel | None:
    """Build the teacher of a job with random values, frozen; None where it has none.

    Raises:
        CheckpointError: as `untrained_base`.
    """
    if job.teacher is None:
        return None
    model = untrained_base(replace(job, source=job.teacher.source), precision == "fp32", device)
    if job.teacher.layout:
        insert_blocks(model, job.teacher.layout, base=str(job.teacher.source), fingerprint=_UNREAD)
    return model.requires_grad_(False)


def _is_wide(job: Job, precision: str) -> bool:
    return precision == "fp32" or job.train.method in WIDE


def untrained_base(job: Job, wide: bool, device: torch.device) -> PreTrainedModel:
    """Build the base with random values, in fp32 or in the precision of its files.

    Raises:
        CheckpointError: transformers cannot make a model of the config.
    """
    try:
        config, auto = model_class(job.source)
        dtype = torch.float32 if wide else file_dtype(job.source, config)
        with device:
            model: PreTrainedModel = auto.from_config(config, dtype=dtype)
    except DeepenError:
        raise
    except Exception as error:  # transformers raises whatever the config leads it to
        reason = " ".join(str(error).split())[:160]
        raise CheckpointError(f"{job.source}: transformers makes no model of its config ({reason})") from None
    return model


def file_dtype(source: Path, config: PretrainedConfig) -> torch.dtype:
    """Return the dtype that a config speaks of, else that of the files; bf16 where neither tells."""
    said = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    if isinstance(said, torch.dtype):
        return said
    if source.is_dir():
        held = (DTYPES.get(t.dtype) for t in Checkpoint.open(source).tensors.values())
        return next((dtype for dtype in held if dtype and dtype.is_floating_point), torch.bfloat16)
    return torch.bfloat16


def file_bytes(source: Path) -> int:
    """Return the bytes of a parameter in a base's files."""
    return file_dtype(source, model_class(source)[0]).itemsize


def count_parameters_of(model: nn.Module) -> int:
    """Return the number of parameters of a model, shared ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def embody(ghost: Ghost, bits: int | None) -> Ghost:
    """Give a model fake tensors in place of meta ones, in place; its frozen layers packed, if asked.

    Args:
        ghost: on the meta device.
        bits: of each weight of the blocks' frozen linear layers; None: they are not packed.
    """
    if bits:
        _pack(ghost, bits)
    mode = FakeTensorMode()

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        with mode:
            return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")

    return replace(_remade(ghost, fake), mode=mode)


def give_values(ghost: Ghost, device: torch.device) -> Ghost:
    """Give a model real tensors on a device, in place: weights small random numbers, buffers ones.

    They are finite, and nothing else: what a step takes does not depend on them.
    """

    def real(tensor: torch.Tensor) -> torch.Tensor:
        made = torch.ones(tensor.shape, dtype=tensor.dtype, device=device)
        random = isinstance(tensor, nn.Parameter) and made.is_floating_point()
        return made.uniform_(-0.03, 0.03) if random else made

    return replace(_remade(ghost, real), mode=None)


def _remade(ghost: Ghost, make: Callable[[torch.Tensor], torch.Tensor]) -> Ghost:
    """Give a model other tensors, in place; what shares one shares the new one."""
    made: dict[int, Any] = {}

    def other(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in made:
            given = isinstance(tensor, nn.Parameter)
            # The old one is held too: its id must not be given anew.
            made[id(tensor)] = (
                tensor,
                (nn.Parameter(make(tensor), tensor.requires_grad) if given else make(tensor)),
            )
        found: torch.Tensor = made[id(tensor)][1]
        return found

    for model in ghost.models:
        for module in model.modules():
            for held in (module._parameters, module._buffers):
                named: dict[str, Any] = dict(held)
                held.update({name: other(tensor) for name, tensor in named.items() if tensor is not None})
    named = dict(ghost.model.named_parameters())
    return replace(ghost, parameters={name: named[name] for name in ghost.parameters})


@contextmanager
def one_document() -> Iterator[None]:
    """Have transformers take positions for 0, 1, 2, …, where it would have to look at values."""
    masking = importlib.import_module("transformers.masking_utils")
    if not hasattr(masking, "find_packed_sequence_indices"):
        yield
        return
    with patch.object(masking, "find_packed_sequence_indices", lambda _: None):
        yield


def real_masks(job: Job) -> AbstractContextManager[None]:
    """Have windows masked as the job's will be: a job that parts its documents stores a mask."""
    return nullcontext() if job.document_masks else one_document()


class _Packed(nn.Module):
    """A frozen linear layer whose matrix lies packed, as by bitsandbytes, and is unpacked to be used."""

    def __init__(self, linear: nn.Linear, bits: int, dtype: torch.dtype) -> None:
        super().__init__()
        count = linear.weight.numel()
        # NF4: a scale in 8 bits for 64 values, and one in 32 for 256 of these; LLM.int8: one in 32 a row.
        scales = count // 64 + 4 * (count // 64 // 256) if bits == 4 else 4 * linear.out_features
        size = count * bits // 8 + scales
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = nn.Parameter(torch.empty(size, dtype=torch.uint8, device="meta"), requires_grad=False)
        self.bias, self._dtype = linear.bias, dtype

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        shape = (self.out_features, self.in_features)
        result: torch.Tensor = _PackedProduct.apply(states.to(self._dtype), self.weight, shape)  # type: ignore[no-untyped-call]
        return result if self.bias is None else result + self.bias.to(result.dtype)


class _PackedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, packed: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
        ctx.shape = shape
        return functional.linear(states, states.new_empty(shape))

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return upstream @ upstream.new_empty(ctx.shape), None, None


def _pack(ghost: Ghost, bits: int) -> None:
    """Replace what quantisation packs: the linear layers of the blocks in which nothing trains."""
    for block in ghost.blocks:
        for parent in list(block.modules()):
            for name, child in list(parent.named_children()):
                if type(child) is nn.Linear and not child.weight.requires_grad:
                    setattr(parent, name, _Packed(child, bits, ghost.compute or torch.float32))
