import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from deepen.errors import Diverged, Interrupted
from deepen.model.structure import family_of
from deepen.training.anchor import Anchor, anchor_loss
from deepen.training.interface import Batch, Hooks, RateSpread, Settings, StepReport
from deepen.training.loss import IGNORED, Loss, summed_loss
from deepen.training.meters import BlockReport, Blocks, by_block, gradient_norms, step_blocks
from deepen.training.nonfinite import NotFinite, explain, find_bad_windows
from deepen.training.parallel import Root, without_exchange
from deepen.training.prefix import PrefixCache
from deepen.training.rates import UnitRates, measure_rates, scaling_updates
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
    anchor: Anchor | None = None,
    rates: UnitRates | None = None,
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
        prefix: what windows are below the first block that trains; needs `numbers` in the batches.
        anchor: what holds the model to its base.
        rates: how units get learning rates of their own.

    Raises:
        Diverged: the loss or a gradient is not finite; the parameters are those of the step before.
        Interrupted: `hooks.stop` said so; a checkpoint was saved.
    """
    world, root = world or World(), root or Root(model)
    blocks = by_block(parameters, family_of(model))
    measure = partial(_measure_rates, rates, root, parameters, optimizer, batch_at, settings, world)
    model.train()
    for step in range(first_step, settings.steps):
        batch = batch_at(step, settings.windows)
        terms = [_Term(batch, settings.loss, prefix), *_anchor_terms(anchor, step)]
        try:
            hooks.log(_step(root, parameters, blocks, optimizer, terms, settings, step, world, measure))
        except NotFinite as found:
            rows = _find_bad_windows(root, parameters, optimizer, batch, settings, world)
            names = [hooks.name_window(step, row) for row in rows]
            raise Diverged(explain(str(found), names, len(batch.tokens))) from None
        done, last = step + 1, step + 1 == settings.steps
        if not last and done % settings.evaluate_every == 0:
            hooks.evaluate(done)
            if hooks.enough():
                return  # no checkpoint: a run that goes on from the one before comes to the same end
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
    terms: Sequence["_Term"],
    settings: Settings,
    step: int,
    world: World,
    measure: Callable[[int], RateSpread | None],
) -> StepReport:
    begin = perf_counter()
    if not world.is_first:
        # The first process's random state is in the checkpoints; the others' follow from the step.
        torch.manual_seed(step * world.size + world.rank)
    measured = measure(step)
    rate = _rate(settings, step)
    for group in optimizer.param_groups:
        group["lr"] = rate
    loss, *others = _accumulate(root, terms, settings, world)
    reached = gradient_norms(blocks, world)
    norm = _clip(parameters, settings.clip)
    if not np.isfinite([loss, norm, *others]).all():
        found = "".join(f", anchor {other}" for other in others)
        raise NotFinite(f"step {step + 1}: loss {loss}{found}, gradient norm {norm}")
    with scaling_updates(optimizer):
        moved = step_blocks(optimizer, blocks, world)
    optimizer.zero_grad(set_to_none=True)
    batch = terms[0].batch
    counts = np.bincount(batch.sources, weights=batch.trained_tokens)
    return StepReport(
        step=step + 1,
        loss=loss,
        learning_rate=rate,
        gradient_norm=norm,
        seconds=perf_counter() - begin,
        sources={source: int(count) for source, count in enumerate(counts) if count},
        blocks={i: BlockReport(gradient_norm=reached[i], update=moved[i]) for i in blocks},
        anchor=others[0] if others else None,
        unit_rates=measured,
    )


def _measure_rates(
    rates: UnitRates | None,
    root: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    batch_at: Callable[[int, int], Batch],
    settings: Settings,
    world: World,
    step: int,
) -> RateSpread | None:
    """Measure, where it is due, what units matter to general text and to the domain; no weight moves."""
    if rates is None or not rates.due(step):
        return None
    terms = (_Term(at(step, rates.windows), summed_loss) for at in (rates.general_at, batch_at))
    runs = [partial(_accumulate, root, [term], settings, world) for term in terms]
    return measure_rates(rates, parameters, optimizer, runs)


def _anchor_terms(anchor: Anchor | None, step: int) -> Iterator["_Term"]:
    if anchor:
        batch = anchor.batch_at(step, anchor.windows)
        yield _Term(batch, anchor_loss(anchor.base, anchor.prefix), weight=anchor.weight)


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
        (loss,) = _accumulate(root, [_Term(window, settings.loss)], settings, world)
        return bool(np.isfinite(loss) and np.isfinite(_clip(parameters, None)))

    return find_bad_windows(batch, is_finite)


@dataclass(frozen=True)
class _Term:
    """A part of what a step makes small.

    Attributes:
        batch: its windows.
        loss: summed over their targets, of which the mean counts.
        prefix: what they are below the first block that trains.
        weight: of the mean.
    """

    batch: Batch
    loss: Loss
    prefix: PrefixCache | None = None
    weight: float = 1.0

    @property
    def tokens(self) -> int:
        """Targets that count, of all processes."""
        return max(1, int(self.batch.trained_tokens.sum()))


def _accumulate(root: nn.Module, terms: Sequence[_Term], settings: Settings, world: World) -> list[float]:
    """Add up gradients over micro-batches and processes, each divided by the *step's* tokens of its term.

    Every process makes as many passes as the one with most windows, as sharded weights are gathered by all
    at once; where it has no window left, it runs one that counts for nothing.

    Returns:
        The mean loss of each term.
    """
    device = next(root.parameters()).device
    where = device if device.type != "mps" else torch.device("cpu")
    summed = torch.zeros(len(terms), dtype=torch.float64, device=where)
    passes = [
        (index, rows)
        for index, term in enumerate(terms)
        for rows in _passes(len(term.batch.tokens), settings, world)
    ]
    for number, (index, mine) in enumerate(passes):
        term, counts = terms[index], len(mine) > 0
        rows = mine if counts else np.zeros(1, dtype=np.int64)
        part = _part(term.batch, rows, device)
        with without_exchange(root, last=number == len(passes) - 1):
            with _autocast(device, settings.autocast), _below(term.prefix, term.batch, rows):
                nll = root(lambda model, term=term, part=part: term.loss(model, *part)) * counts
            # Of gradients the mean over processes is taken: hence their number.
            (nll / (term.tokens / (term.weight * world.size))).backward()
        summed[index] += nll.detach().to(summed)
    totals = world.add(summed).tolist()
    return [total / term.tokens for total, term in zip(totals, terms, strict=True)]


def _passes(windows: int, settings: Settings, world: World) -> list[np.ndarray[Any, np.dtype[np.int64]]]:
    """Return this process's windows of each pass; none in a pass that only others need."""
    mine, size = np.arange(windows, dtype=np.int64)[world.rank :: world.size], settings.micro_batch
    passes = math.ceil(math.ceil(windows / world.size) / size)
    return [mine[index * size : (index + 1) * size] for index in range(passes)]


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
