"""What a training step allocates and does: the step itself, run with fake tensors and watched."""

import weakref
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from deepen.planner.anchored import anchor_of, loss_of
from deepen.planner.ghost import Ghost, real_masks
from deepen.planner.job import Job
from deepen.training.anchor import anchor_loss
from deepen.training.loss import Loss
from deepen.training.recompute import BlockMemory, measure_blocks

# Bytes read and written for each parameter that trains, in fp32: gradient norms, clipping, the optimiser's
# update of weight and moments, and the block's own report of how far it moved.
_UPDATE_TRAFFIC: Final = 72
_CACHED: Final = 4 * 2**20
_SMALL: Final = 4096
_EIGHT_BIT_GROUP: Final = 256


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a device does in one optimiser step.

    Attributes:
        products: FLOPs of matrix products.
        attention: FLOPs of fused attention.
        traffic: bytes read and written by everything else, of tensors below 4 MiB.
        streamed: the same of larger tensors, which no cache holds.
        calls: operations started.
    """

    products: float = 0.0
    attention: float = 0.0
    traffic: float = 0.0
    streamed: float = 0.0
    calls: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        """Return both."""
        return Work(**{name: value + getattr(other, name) for name, value in vars(self).items()})

    def __mul__(self, times: float) -> "Work":
        """Return so many of it."""
        return Work(**{name: value * times for name, value in vars(self).items()})


@dataclass(frozen=True, kw_only=True)
class Step:
    """What one optimiser step takes on one device.

    Attributes:
        weights: bytes of parameters and buffers.
        gradients: bytes of the gradients of what trains.
        optimizer: bytes of the optimiser's state.
        peak: most bytes at any time, all of these included.
        work: what is done.
        update_traffic: bytes of it that the update of the weights reads and writes.
    """

    weights: int
    gradients: int
    optimizer: int
    peak: int
    work: Work
    update_traffic: float

    @property
    def activations(self) -> int:
        """Bytes of everything else at the peak: what autograd stores, and what passes."""
        return self.peak - self.weights - self.gradients - self.optimizer


def run_step(ghost: Ghost, job: Job, micro_batch: int) -> Step:
    """Run one step of `deepen.training.loop` on a model without values.

    Args:
        ghost: with fake tensors, and what is computed again set.
        job: what is trained.
        micro_batch: windows in the forward pass, which may be others than the job's.
    """
    parameters = list(ghost.parameters.values())
    gradients = sum(4 * parameter.numel() for parameter in parameters)
    moments = optimizer_bytes(parameters, job.train.optimizer)
    share = -(-job.windows // job.devices) * (1 + job.train.measured_share(job.windows))
    watch = _Watch()
    # Decided by the job's own passes, so that micro-batches compare.
    _clear(parameters, watch if job.passes > 1 else None, ghost)
    _pass(ghost, job, micro_batch, watch, loss_of(job, ghost.teacher))
    beside = _Watch()
    work = watch.work * (share / micro_batch) + _anchored(ghost, job, micro_batch, beside)
    _clear(parameters, None, ghost)
    updating = gradients + _largest_update(ghost)
    traffic = _UPDATE_TRAFFIC * ghost.trainable
    update = Work(traffic=traffic, calls=10 * len(parameters))
    return Step(
        weights=ghost.weight_bytes,
        gradients=gradients,
        optimizer=moments,
        peak=ghost.weight_bytes + moments + max(watch.peak, beside.peak, updating),
        work=work + update,
        update_traffic=traffic,
    )


def measure_ghost(ghost: Ghost, job: Job, micro_batch: int) -> list[BlockMemory]:
    """Return what each block stores for the gradient of one forward pass."""
    return measure_blocks(ghost.blocks, lambda: _forward(ghost, job, micro_batch))


def optimizer_bytes(parameters: Sequence[nn.Parameter], kind: str) -> int:
    """Return the bytes of AdamW's two moments: in fp32, or in 8 bits with a scale for each 256 of them."""
    if kind == "adamw":
        return sum(8 * parameter.numel() + 4 for parameter in parameters)
    total = 0
    for parameter in parameters:
        count = parameter.numel()
        groups = -(-count // _EIGHT_BIT_GROUP)
        total += 2 * count + 8 * groups if count >= _SMALL else 8 * count
    return total


def _anchored(ghost: Ghost, job: Job, micro_batch: int, watch: "_Watch") -> Work:
    """Run what an anchor adds, beside the gradients that there are by then; return it for a whole step."""
    anchor = anchor_of(ghost, job, lambda: _forward(ghost, job, 1))
    if anchor is None:
        return Work()
    share = -(-anchor.windows // job.devices)
    _clear(list(ghost.parameters.values()), watch, ghost)
    _pass(ghost, job, min(micro_batch, share), watch, anchor_loss(anchor.base, anchor.prefix))
    return watch.work * (share / min(micro_batch, share))


def _forward(ghost: Ghost, job: Job, windows: int) -> None:
    assert ghost.mode is not None
    with ghost.mode, real_masks(job), _computing(ghost):
        tokens = torch.zeros(windows, job.length, dtype=torch.long)
        ghost.model.base_model(input_ids=tokens, use_cache=False)


def _pass(ghost: Ghost, job: Job, micro_batch: int, watch: "_Watch", loss: Loss) -> None:
    assert ghost.mode is not None
    with ghost.mode, real_masks(job), watch:
        tokens = torch.zeros(micro_batch, job.length + 1, dtype=torch.long)
        with _computing(ghost):
            found = loss(ghost.model, tokens[:, :-1], tokens[:, 1:])
        (found / tokens.numel()).backward()  # type: ignore[no-untyped-call]


def _computing(ghost: Ghost) -> Any:
    return torch.autocast("cpu", dtype=ghost.compute) if ghost.compute else nullcontext()


def _clear(parameters: Sequence[nn.Parameter], watch: "_Watch | None", ghost: Ghost) -> None:
    """Remove all gradients; or, with a watch, let there be those of a pass before."""
    for parameter in parameters:
        parameter.grad = None
    if watch is not None and ghost.mode is not None:
        with ghost.mode, watch:
            for parameter in parameters:
                parameter.grad = torch.empty_like(parameter)


def _largest_update(ghost: Ghost) -> int:
    """Return the bytes of the largest block's weights that train: they are held twice while they move."""
    trained = {id(parameter) for parameter in ghost.parameters.values()}
    sizes = [4 * sum(p.numel() for p in block.parameters() if id(p) in trained) for block in ghost.blocks]
    return max(sizes, default=0)


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Keeps count of the bytes that are alive, and of what is done.

    Attributes:
        live: bytes now.
        peak: most bytes so far.
        work: all that was done.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self._held: dict[int, tuple[int, object]] = {}
        self._products = self._attention = self._traffic = self._streamed = 0.0
        self._calls = 0

    @property
    def work(self) -> Work:
        """All that was done."""
        return Work(
            products=self._products,
            attention=self._attention,
            traffic=self._traffic,
            streamed=self._streamed,
            calls=self._calls,
        )

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Do one operation, and note it."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if not any(argument.alias_info and not argument.alias_info.is_write for argument in _schema(func)):
            made = [each for each in tree_leaves(result) if isinstance(each, torch.Tensor)]
            for tensor in made:
                self._hold(tensor.untyped_storage())
            self._note(func, args, kwargs, result, made)
        return result

    def _hold(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._held:
            return
        size = storage.nbytes()
        self._held[key] = (size, weakref.ref(storage, self._let_go(key)))
        self.live += size
        self.peak = max(self.peak, self.live)

    def _let_go(self, key: int) -> Callable[[object], None]:
        def gone(_: object) -> None:
            self.live -= self._held.pop(key)[0]

        return gone

    def _note(self, func: Any, args: Any, kwargs: Any, result: Any, made: Sequence[torch.Tensor]) -> None:
        self._calls += 1
        name = func.overloadpacket.__name__
        if "flash_attention" in name:
            self._attention += _attention(name, args)
        elif func.overloadpacket in flop_registry:
            self._products += flop_registry[func.overloadpacket](*args, **kwargs, out_val=result)
        else:
            given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
            for size in (tensor.numel() * tensor.element_size() for tensor in (*given, *made)):
                self._traffic += size if size < _CACHED else 0
                self._streamed += size if size >= _CACHED else 0


def _schema(func: Any) -> Any:
    return func._schema.arguments


def _attention(name: str, args: Any) -> float:
    """Return the FLOPs of fused attention: of half the pairs, and 2.5 times as many for its gradient."""
    backward = "backward" in name
    query, key, value = args[1:4] if backward else args[:3]
    pairs = query.shape[0] * query.shape[1] * query.shape[2] * key.shape[2] / 2
    return float((5.0 if backward else 2.0) * pairs * (query.shape[3] + value.shape[3]))
