"""The processes that train together: what one does for all, what they agree on, and how they end.

Tensors of the model travel over the device's own backend (nccl, gloo). What processes say to each other
(a result of the first one, a request to stop) travels over a gloo group of its own, whose timeout is long:
the others wait in it while the first one writes a corpus.
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from itertools import count
from typing import Final, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from deepen.errors import DeepenError, TrainingError
from deepen.training.launch import launched

T = TypeVar("T")

_LONG: Final = timedelta(days=7)
# How long a process that failed leaves the word to the first one, which fails of the same as a rule.
_PRECEDENCE: Final = timedelta(seconds=1)
_LOST: Final = ("connection closed", "connection reset", "broken pipe", "connection refused", "socket")
_joined = count()


@dataclass(frozen=True, kw_only=True)
class World:
    """The processes of a run, seen from one of them; without torchrun, one alone.

    Attributes:
        rank: number of this process.
        size: number of processes.
        local_rank: number of this process on its machine.
        local_size: processes on this machine.
        control: the group in which processes agree; None where there is one process without torchrun.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    control: dist.ProcessGroup | None = None

    @property
    def is_first(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.rank == 0

    def first(self, work: Callable[[], T]) -> T:
        """Do `work` in the first process while the others wait; all return what it returned, pickled.

        Where it raises, the first process raises and the others end without a word.
        """
        if self.control is None:
            return work()
        answer: list[object] = [None]
        if self.is_first:
            try:
                answer = [work()]
            except BaseException as error:
                dist.broadcast_object_list([_Failure(exit_code(error))], 0, group=self.control)
                raise
        dist.broadcast_object_list(answer, 0, group=self.control)
        if isinstance(answer[0], _Failure):
            raise SystemExit(answer[0].code)
        return answer[0]  # type: ignore[return-value]

    def first_only(self, work: Callable[[], T]) -> T | None:
        """Do `work` in the first process while the others wait, and keep what it returned there."""
        made: list[T] = []
        self.first(lambda: made.append(work()))
        return made[0] if made else None

    def first_then_rest(self, work: Callable[[], T]) -> T:
        """Do `work` in every process, in the first one alone to begin with: the others find what it made."""
        made: list[T] = []
        self.first(lambda: made.append(work()))
        return made[0] if made else work()

    def any(self, flag: bool) -> bool:
        """Return whether it is so in any process."""
        return bool(self._agree(int(flag), dist.ReduceOp.MAX))

    def least(self, number: int) -> int:
        """Return the smallest of all processes' numbers."""
        return self._agree(number, dist.ReduceOp.MIN)

    def gather(self, value: T) -> list[T]:
        """Return every process's value, by rank."""
        if self.control is None:
            return [value]
        values: list[T | None] = [None] * self.size
        dist.all_gather_object(values, value, group=self.control)
        return values  # type: ignore[return-value]

    def add(self, tensor: torch.Tensor) -> torch.Tensor:
        """Add up a tensor over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def _agree(self, number: int, how: dist.ReduceOp.RedOpType) -> int:
        if self.control is None:
            return number
        box = torch.tensor(number, dtype=torch.int64)
        dist.all_reduce(box, how, group=self.control)
        return int(box)


@dataclass(frozen=True)
class _Failure:
    code: int


@contextmanager
def join_world() -> Iterator[World]:
    """Meet the other processes that torchrun started, for as long as the context lasts.

    Of those that fail, one alone raises what happened; the others leave by `SystemExit` with its exit code,
    and torchrun ends those that notice nothing.

    Raises:
        TrainingError: another process died.
    """
    if not launched():
        yield World()
        return
    store, rank, size = next(rendezvous("env://"))
    store = PrefixStore(f"deepen/{next(_joined)}", store)
    world = _meet(store, rank, size)
    try:
        yield world
    except BaseException as error:
        if not _may_speak(store, rank):
            time.sleep(_PRECEDENCE.total_seconds())  # torchrun ends all when one has ended
            raise SystemExit(exit_code(error)) from None
        if _is_loss(error):
            raise TrainingError(
                "another process of this run ended unexpectedly; the last checkpoint is intact, "
                "continue with --resume"
            ) from None
        raise
    dist.destroy_process_group()


def exit_code(error: BaseException) -> int:
    """Return the exit code of a process that ends by this error."""
    if isinstance(error, SystemExit) and isinstance(error.code, int):
        return error.code
    return error.exit_code if isinstance(error, DeepenError) else 1


def _meet(store: Store, rank: int, size: int) -> World:
    local_rank = int(os.environ["LOCAL_RANK"])
    has_gpu = torch.cuda.is_available() and local_rank < torch.cuda.device_count()
    if has_gpu:
        torch.cuda.set_device(local_rank)
    backend = "cpu:gloo,cuda:nccl" if has_gpu else "gloo"
    dist.init_process_group(backend, store=PrefixStore("group", store), rank=rank, world_size=size)
    return World(
        rank=rank,
        size=size,
        local_rank=local_rank,
        local_size=int(os.environ["LOCAL_WORLD_SIZE"]),
        control=dist.new_group(backend="gloo", timeout=_LONG),
    )


def _may_speak(store: Store, rank: int) -> bool:
    """Whether this is the process that says what went wrong."""
    try:
        if rank:
            with suppress(dist.DistStoreError):
                store.wait(["said"], _PRECEDENCE)
        return bool(store.compare_set("said", "", str(rank)) == str(rank).encode())
    except RuntimeError:  # the store has gone with its machine
        return True


def _is_loss(error: BaseException) -> bool:
    """Whether an error of a collective says that a peer is no longer there."""
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(word in text for word in _LOST)
