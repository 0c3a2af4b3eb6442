"""The part of a model below the first block that trains, run once for each window and read back afterwards.

Nothing there changes, so what it makes of a window is the same in every epoch. That is taken where it enters
the first block that trains, in the precision it has there, and given back at the same place: what the model
does round its blocks (masks, rotary embeddings, kinds of layers by number) is done as ever, and the blocks
below are passed by. A model whose upper blocks read more than the residual stream, or whose lower part draws
random numbers, shows it in a trial and is refused.

Equal to the bit where a window's states do not depend on the windows beside it in a pass: always with one
window a pass (`train.micro_batch: 1`), else as far as the device's kernels go.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import PreTrainedModel

from deepen.errors import TrainingError, in_a_line
from deepen.families import Family
from deepen.model.stand_in import Passed, StandIn, Watched, standing_in
from deepen.model.structure import blocks_of, family_of
from deepen.training.prefix_file import PrefixFile
from deepen.training.recompute import trains


@dataclass(frozen=True, kw_only=True)
class Prefix:
    """What lies below the first block that trains.

    Attributes:
        model: the model.
        family: its family.
        depth: how many blocks lie below.
        returned: items of the tuple that each of these returns; 0: it returns a tensor.
        width: shape of the residual stream at one position.
        dtype: its precision.
    """

    model: PreTrainedModel
    family: Family
    depth: int
    returned: tuple[int, ...]
    width: tuple[int, ...]
    dtype: torch.dtype

    @property
    def blocks(self) -> nn.ModuleList:
        """All blocks of the model as it stands: a bypass makes another list of them."""
        return blocks_of(self.model, self.family)


class PrefixCache:
    """The states that windows have where they enter the first block that trains."""

    def __init__(self, prefix: Prefix, file: PrefixFile) -> None:
        self._prefix, self._file = prefix, file

    @property
    def held(self) -> int:
        """Windows in the file."""
        return self._file.held

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    @contextmanager
    def passing(self, numbers: NDArray[np.int64]) -> Iterator[None]:
        """Have one pass within take these windows' states from the file, or leave them there.

        Args:
            numbers: of the windows, in the order of the pass.

        Raises:
            OutputError: the file cannot be written.
        """
        prefix = self._prefix
        states = self._file.read(numbers)
        entry = _Entry(prefix.blocks[prefix.depth], states)
        others = {prefix.depth: entry} if states is None else _passed_by(prefix, entry)
        with standing_in(prefix.blocks, others):
            yield
        if entry.found is not None:
            self._file.write(numbers, entry.found)


def find_prefix(model: PreTrainedModel, autocast: torch.dtype | None = None) -> Prefix:
    """Find what lies below the first block that trains, and prove that its output is all the rest needs.

    Args:
        model: a causal LM with what trains set. It runs forward twice, in training mode, on a few tokens.
        autocast: dtype of the compute, or None for the parameters' own.

    Raises:
        TrainingError: there is nothing below, or it cannot be passed by.
    """
    family = family_of(model)
    blocks = blocks_of(model, family)
    depth = frozen_below(blocks)
    if depth == 0:
        raise _refusal("nothing lies below the first block that trains")
    entry = _FirstEntry(blocks[depth])
    below = {index: Watched(block) for index, block in enumerate(blocks[:depth])}
    whole = _trial(model, autocast, blocks, {**below, depth: entry})
    states = entry.found
    if states is None or states.shape[: _TRIAL.ndim] != _TRIAL.shape:
        raise _refusal(f"{type(model).__name__} has more than one residual stream, or none")
    if states.requires_grad:
        raise _refusal("parameters below the first block that trains are trained too")
    with _seeded(model.device):
        fresh = _random_state(model.device)
    if entry.random != fresh:
        raise _refusal("the lower part of the model draws random numbers, by dropout for instance")
    prefix = Prefix(
        model=model,
        family=family,
        depth=depth,
        returned=tuple(each.items for each in below.values()),
        width=tuple(states.shape[_TRIAL.ndim :]),
        dtype=states.dtype,
    )
    _prove(prefix, autocast, states, whole)
    return prefix


@contextmanager
def noting(prefix: Prefix) -> Iterator[list[torch.Tensor]]:
    """Note the states that leave what lies below, once for each pass within.

    They are the same in the bypassed model, which has the same blocks there.
    """
    last = _Leaving(prefix.blocks[prefix.depth - 1])
    with standing_in(prefix.blocks, {prefix.depth - 1: last}):
        yield last.noted


@contextmanager
def handing_over(prefix: Prefix, states: torch.Tensor) -> Iterator[None]:
    """Have passes within take these states for what leaves the blocks below, none of which is run."""
    top = prefix.depth - 1
    passed = {index: Passed(prefix.blocks[index], items) for index, items in enumerate(prefix.returned)}
    passed[top] = Passed(prefix.blocks[top], prefix.returned[top], states)
    with standing_in(prefix.blocks, passed):
        yield


_TRIAL = torch.arange(1, 15).view(2, 7)


def _prove(prefix: Prefix, autocast: torch.dtype | None, states: torch.Tensor, whole: torch.Tensor) -> None:
    model = prefix.model
    entry = _Entry(prefix.blocks[prefix.depth], states)
    try:
        again = _trial(model, autocast, prefix.blocks, _passed_by(prefix, entry))
    except Exception as error:  # whatever the model's own code meets without its lower blocks
        reason = in_a_line(error, 120)
        raise _refusal(f"{type(model).__name__} does not run without its lower blocks ({reason})") from None
    if not torch.equal(whole, again):
        raise _refusal(f"the upper blocks of {type(model).__name__} read more than the residual stream")


def _trial(
    model: PreTrainedModel,
    autocast: torch.dtype | None,
    blocks: nn.ModuleList,
    others: Mapping[int, nn.Module],
) -> torch.Tensor:
    """Run the model on a few tokens, as in training; every trial draws the same random numbers."""
    device, training = model.device, model.training
    computing = torch.autocast(device.type, dtype=autocast) if autocast else nullcontext()
    tokens = (_TRIAL % model.get_input_embeddings().weight.shape[0]).to(device)
    model.train()
    try:
        with _seeded(device), computing, standing_in(blocks, others):
            states: torch.Tensor = model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
    finally:
        model.train(training)
    return states.detach()


def _passed_by(prefix: Prefix, entry: "_Entry") -> dict[int, nn.Module]:
    passed = {index: Passed(prefix.blocks[index], items) for index, items in enumerate(prefix.returned)}
    return {**passed, prefix.depth: entry}


class _Leaving(StandIn):
    """Notes the states that its block returns."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__(block)
        self.noted: list[torch.Tensor] = []

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        found = self.block(*args, **kwargs)
        self.noted.append(found[0] if isinstance(found, tuple) else found)
        return found


class _Entry(StandIn):
    """The first block that trains: notes the states that enter it, or is given others."""

    def __init__(self, block: nn.Module, states: torch.Tensor | None = None) -> None:
        super().__init__(block)
        self._given = states
        self.found: torch.Tensor | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        found = args[0] if args else kwargs["hidden_states"]
        if self._given is None:
            self.found = found
            return self.block(*args, **kwargs)
        given = self._given.to(found.device)
        if args:
            return self.block(given, *args[1:], **kwargs)
        return self.block(**{**kwargs, "hidden_states": given})


class _FirstEntry(_Entry):
    """Notes the random state as well."""

    random = b""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.random = _random_state((args[0] if args else kwargs["hidden_states"]).device)
        return super().forward(*args, **kwargs)


@contextmanager
def _seeded(device: torch.device) -> Iterator[None]:
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        yield


def _random_state(device: torch.device) -> bytes:
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return b"".join(state.numpy().tobytes() for state in states)


def _refusal(reason: str) -> TrainingError:
    return TrainingError(f"train.prefix_cache: {reason}\nset train.prefix_cache to none")


def frozen_below(blocks: Iterable[nn.Module]) -> int:
    """Return how many blocks lie below the first that trains; 0 where none does."""
    return next((index for index, block in enumerate(blocks) if trains(block)), 0)
