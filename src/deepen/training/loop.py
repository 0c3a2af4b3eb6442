import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from deepen.errors import Diverged, Interrupted
from deepen.model.structure import family_of
from deepen.training.interface import Batch, Hooks, Settings, StepReport
from deepen.training.loss import IGNORED
from deepen.training.meters import BlockReport, Blocks, by_block, gradient_norms, step_blocks
from deepen.training.nonfinite import NotFinite, explain, find_bad_windows
from deepen.training.parallel import Root, without_exchange
from deepen.training.prefix import PrefixCache
from deepen.training.schedule import learning_rate
from deepen.training.world import World


def train(
    model: PreTrainedModel,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    batch_at: Callable[[int, int], Batch],
    settings: Settings,
    hooks: Hooks,
    *,
    first_step: int = 0,
    root: nn.Module | None = None,
    world: World | None = None,
    prefix: PrefixCache | None = None,
) -> None:
    """Train `parameters` from step `first_step` to the last.

    Args:
        model: a causal LM.
        parameters: what trains, by name; everything else of the model has requires_grad False.
        optimizer: over exactly these parameters.
        batch_at: the batch of (step, windows), a pure function: resuming costs nothing.
        settings: the numbers.
        hooks: logging, evaluation, checkpoints, stop requests.
        first_step: steps already done.
        root: the model spread over processes, see `deepen.training.parallel`; default: it lies in this one.
        world: those processes. Each calls this with the same batches and takes its share of the windows;
            what is reported is the same in all.
        prefix: what windows are below the first block that trains, so that it is computed once; needs
            `numbers` in the batches.

    Raises:
        Diverged: the loss or a gradient is not finite; the parameters are those of the step before.
        Interrupted: `hooks.stop` said so; a checkpoint was saved.
    """
    world, root = world or World(), root or Root(model)
    blocks = by_block(parameters, family_of(model))
    model.train()
    for step in range(first_step, settings.steps):
        batch = batch_at(step, settings.windows)
        try:
            hooks.log(_step(root, parameters, blocks, optimizer, batch, settings, step, world, prefix))
        except NotFinite as found:
            rows = _find_bad_windows(root, parameters, optimizer, batch, settings, world)
            names = [hooks.name_window(step, row) for row in rows]
            raise Diverged(explain(str(found), names, len(batch.tokens))) from None
        done = step + 1
        last = done == settings.steps
        if last or done % settings.evaluate_every == 0:
            hooks.evaluate(done)
            model.train()
        stopping = world.any(hooks.stop()) and not last
        if last or stopping or done % settings.checkpoint_every == 0:
            hooks.save(done)
        if stopping:
            raise Interrupted(f"stopped at step {done} of {settings.steps}; continue with --resume")


def _step(
    root: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    blocks: Blocks,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    settings: Settings,
    step: int,
    world: World,
    prefix: PrefixCache | None,
) -> StepReport:
    begin = perf_counter()
    if not world.is_first:
        # The first process's random state is in the checkpoints; the others' follow from the step.
        torch.manual_seed(step * world.size + world.rank)
    rate = _rate(settings, step)
    for group in optimizer.param_groups:
        group["lr"] = rate
    loss = _accumulate(root, batch, settings, world, prefix)
    reached = gradient_norms(blocks, world)
    norm = _clip(parameters, settings.clip)
    if not np.isfinite(loss) or not np.isfinite(norm):
        raise NotFinite(f"step {step + 1}: loss {loss}, gradient norm {norm}")
    moved = step_blocks(optimizer, blocks, world)
    optimizer.zero_grad(set_to_none=True)
    counts = np.bincount(batch.sources, weights=batch.trained_tokens)
    return StepReport(
        step=step + 1,
        loss=loss,
        learning_rate=rate,
        gradient_norm=norm,
        seconds=perf_counter() - begin,
        sources={source: int(count) for source, count in enumerate(counts) if count},
        blocks={i: BlockReport(gradient_norm=reached[i], update=moved[i]) for i in blocks},
    )


def _find_bad_windows(
    root: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    settings: Settings,
    world: World,
) -> list[int]:
    """Return the windows of a step that are not finite alone; all processes look at the same one."""

    def is_finite(window: Batch) -> bool:
        optimizer.zero_grad(set_to_none=True)
        loss = _accumulate(root, window, settings, world, None)
        return bool(np.isfinite(loss) and np.isfinite(_clip(parameters, None)))

    return find_bad_windows(batch, is_finite)


def _accumulate(
    root: nn.Module, batch: Batch, settings: Settings, world: World, prefix: PrefixCache | None
) -> float:
    """Add up gradients over micro-batches and processes, each divided by the *step's* tokens.

    Every process makes as many passes as the one with most windows, as sharded weights are gathered by all
    at once; where it has no window left, it runs one that counts for nothing.

    Returns:
        The mean loss of the step.
    """
    device = next(root.parameters()).device
    windows = len(batch.tokens)
    total = max(1, int(batch.trained_tokens.sum()))
    summed = torch.zeros((), dtype=torch.float64, device=device if device.type != "mps" else "cpu")
    mine = torch.split(torch.arange(windows)[world.rank :: world.size], settings.micro_batch)
    passes = math.ceil(math.ceil(windows / world.size) / settings.micro_batch)
    for index in range(passes):
        counts = index < len(mine) and len(mine[index]) > 0
        rows = mine[index].numpy() if counts else np.zeros(1, dtype=np.int64)
        part = _part(batch, rows, device)
        with without_exchange(root, last=index == passes - 1):
            with _autocast(device, settings.autocast), _below(prefix, batch, rows):
                nll = root(lambda model, part=part: settings.loss(model, *part)) * counts
            # Of gradients the mean over processes is taken: hence their number.
            (nll / (total / world.size)).backward()
        summed += nll.detach().to(summed)
    return (world.add(summed) / total).item()


def _below(
    prefix: PrefixCache | None, batch: Batch, rows: np.ndarray[Any, np.dtype[np.int64]]
) -> AbstractContextManager[object]:
    """Take some windows' states below the first block that trains from the cache, if there is one."""
    return nullcontext() if prefix is None or batch.numbers is None else prefix.passing(batch.numbers[rows])


def _part(
    batch: Batch, rows: np.ndarray[Any, np.dtype[np.int64]], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return inputs, targets and positions of some windows; targets that do not count are `IGNORED`."""
    tokens = torch.from_numpy(batch.tokens[rows]).to(device)
    targets = tokens[:, 1:]
    if batch.trained is not None:
        counted = torch.from_numpy(batch.trained[rows]).to(device)
        targets = targets.masked_fill(~counted, IGNORED)
    positions = None if batch.positions is None else torch.from_numpy(batch.positions[rows]).to(device)
    return tokens[:, :-1], targets, positions


def _clip(parameters: Mapping[str, nn.Parameter], largest: float | None) -> float:
    norm = torch.nn.utils.clip_grad_norm_(parameters.values(), largest or float("inf"))
    return (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()


def _rate(settings: Settings, step: int) -> float:
    return learning_rate(
        step,
        steps=settings.steps,
        peak=settings.learning_rate,
        warmup=settings.warmup,
        final=settings.final_learning_rate,
        shape=settings.schedule,
    )


def _autocast(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager[object]:
    return torch.autocast(device.type, dtype=dtype) if dtype is not None else nullcontext()
