"""One model over several processes: replicated (DDP) or sharded block by block (FSDP2, `fully_shard`).

Gradients of both are means over processes, so a loss is scaled by the number of processes before `backward`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Literal, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from deepen.training.world import World

Parallel = Literal["ddp", "fsdp"]
T = TypeVar("T")


class Root(nn.Module):
    """Where every pass through a model begins, whatever is asked of it, so that hooks on it always run."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, work: Callable[[PreTrainedModel], T]) -> T:
        """Return what `work` makes of the model."""
        return work(self.model)


def replicate(model: PreTrainedModel, world: World) -> nn.Module:
    """Return the root of a model that lies whole on each process's device, gradients being exchanged."""
    root = Root(model)
    if world.size == 1:
        return root
    # Every process has read the same files: there is nothing to send about at the start.
    return DistributedDataParallel(root, init_sync=False, gradient_as_bucket_view=True)


def shard(
    model: PreTrainedModel,
    blocks: Sequence[nn.Module],
    device: torch.device,
    world: World,
    compute: torch.dtype | None,
) -> Root:
    """Cut every tensor of a model over the processes; return its root.

    A block is a group, gathered whole while it runs; what lies outside the blocks is one more. Frozen and
    trainable groups may differ in precision: blocks are gathered in the precision of compute, and what lies
    outside them, which begins the residual stream, in its own. Gradients are added up in fp32.

    Args:
        model: on any device; one group at a time is moved to `device`.
        blocks: the model's blocks.
        device: this process's.
        world: the processes.
        compute: dtype of autocast, or None for the parameters' own.
    """
    mesh = init_device_mesh(device.type, (world.size,))
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    root = Root(model)
    outside = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    fully_shard(root, mesh=mesh, mp_policy=outside)
    # The first pass decides which blocks belong to the root; a later one may leave out the new blocks.
    token = torch.zeros(1, 1, dtype=torch.long, device=device)
    with torch.no_grad(), torch.autocast(device.type, dtype=compute, enabled=compute is not None):
        root(lambda model: model(input_ids=token, use_cache=False))
    release(root)
    return root


def plain_root(root: nn.Module) -> nn.Module:
    """Return the root for passes without gradients."""
    return root.module if isinstance(root, DistributedDataParallel) else root


def sharded(root: nn.Module) -> bool:
    """Whether a model's tensors are cut over the processes."""
    return isinstance(root, FSDPModule)


def release(root: nn.Module) -> None:
    """Give back what passes without a backward pass have left gathered: it would hide later changes."""
    if isinstance(root, FSDPModule):
        root.reshard()


def without_exchange(root: nn.Module, last: bool) -> AbstractContextManager[None]:
    """Keep a replica's gradients to itself until the last pass of a step."""
    return root.no_sync() if isinstance(root, DistributedDataParallel) and not last else nullcontext()


def local(tensor: torch.Tensor) -> torch.Tensor:
    """Return this process's part of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensors: Mapping[str, torch.Tensor], world: World) -> dict[str, torch.Tensor]:
    """Put tensors together in the first process, sharded ones on its CPU; the others return nothing."""
    gathered = {}
    for name, tensor in tensors.items():
        full = tensor.detach()
        if isinstance(full, DTensor):
            full = full.full_tensor().cpu()
        if world.is_first:
            gathered[name] = full
    return gathered


def share(
    tensors: Mapping[str, torch.Tensor], world: World, device: torch.device
) -> Iterator[tuple[str, torch.Tensor]]:
    """Give the first process's tensors to all, one at a time, whole and on `device`."""
    shapes = world.first(lambda: {name: (t.shape, t.dtype) for name, t in tensors.items()})
    for name, (shape, dtype) in shapes.items():
        tensor = (
            tensors[name].to(device) if world.is_first else torch.empty(shape, dtype=dtype, device=device)
        )
        if world.size > 1:
            dist.broadcast(tensor, 0)
        yield name, tensor


def placed_like(tensor: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """Place a whole tensor as a parameter of its shape is; scalars stay whole."""
    if isinstance(parameter, DTensor) and tensor.shape == parameter.shape:
        return distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)
    return tensor.to(parameter.device)


def assemble(model: nn.Module, world: World) -> None:
    """Make a sharded model a plain one in the memory of the first process; elsewhere it is emptied."""
    made: dict[nn.Parameter, nn.Parameter] = {}  # tied parameters stay one
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if isinstance(parameter, DTensor):
                if parameter not in made:
                    made[parameter] = _assembled(parameter, world)
                module._parameters[name] = made[parameter]


def _assembled(parameter: DTensor, world: World) -> nn.Parameter:
    full = parameter.full_tensor().detach()
    kept = full.cpu() if world.is_first else torch.empty_like(full, device="meta")
    return nn.Parameter(kept, requires_grad=parameter.requires_grad)
