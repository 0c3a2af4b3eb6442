"""A few blocks of a job's own model, trained for real, from which a step of the whole is worked out.

The model is prepared as a run prepares it, without values, and all but a few of its blocks are taken out: one
stays of each kind (shape, what trains in it, whether a gradient passes it, whether it is computed again);
then there are more of one kind, then more of all. Each of these models is trained by deepen's loop on this
machine's device. With c_k blocks of kind k a step takes::

    T(c) = rest + Σ_k c_k t_k

`rest` (embeddings, head, loss, what a step takes once, and kinds of which there is one block) and the t_k are
found by least squares of relative errors, none negative. Steps are made of one pass, of two, and of one with
a pass of the anchor; for the job's own number of passes the differences are taken so many times.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from statistics import stdev
from time import perf_counter
from typing import Any, Final

import numpy as np
from scipy.optimize import nnls  # type: ignore[import-untyped]

from deepen.errors import TrainingError
from deepen.planner.devices import HERE, Device
from deepen.planner.estimate import Measured
from deepen.planner.job import Job
from deepen.planner.speed import Span
from deepen.planner.stage import Stage, set_stage

# Blocks of a kind beside its first: the most that fit.
_MORE: Final = (2, 1)
_SECONDS: Final = 10.0
_ROUNDS: Final = (3, 15)
# Of each model in each round.
_STEPS: Final = 2
# Never surer than this: a first look was 1% to 9% off (docs/plan.md).
_LEAST_ERROR: Final = 0.10

# Passes of a step, and windows of its anchor.
Load = tuple[int, int]
# Of (samples taken, samples in all).
Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class Kind:
    """Blocks that are alike.

    Attributes:
        state: `below` the first block that a gradient passes, `frozen` above it, or what `trains`.
        positions: where they stand in the model.
    """

    state: str
    positions: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class BlockTime:
    """What a block of a kind adds to a step: `blocks` such, `seconds` each."""

    state: str
    blocks: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Rehearsal:
    """What was measured.

    Attributes:
        step: seconds of an optimiser step of the whole model on one device.
        rest: seconds of it outside the blocks listed.
        blocks: what those of each kind take, where there are several.
        deepest: blocks of the deepest model that was trained.
        depth: blocks of the whole.
        rounds: how often each was.
        took: seconds of all this.
    """

    step: Span
    rest: float
    blocks: tuple[BlockTime, ...]
    deepest: int
    depth: int
    rounds: int
    took: float


def check_rehearsal(job: Job, device: Device) -> None:
    """Check that a job's blocks can be trained here at all.

    Raises:
        TrainingError: the device is not this machine's, or the base is to be quantised.
    """
    if device.key != HERE:
        raise TrainingError(f"--measure: trains on this machine, and --device is {device.key}; leave one out")
    if job.train.quantise != "none":
        raise TrainingError("--measure: random weights cannot be packed; plan it with --quantise none")


def rehearse(found: Measured, device: Device, progress: Progress = lambda done, total: None) -> Rehearsal:
    """Train a few of a job's blocks on this machine; return what a step of all takes.

    Args:
        found: the job as it was measured without values, for this machine; see `check_rehearsal`.
        device: this machine's.
        progress: told how far it is.

    Raises:
        TrainingError: the blocks do not fit, or they cannot be trained.
        LayoutError: the config has no words for so few blocks.
    """
    begin = perf_counter()
    kinds = find_kinds(found)
    stage, probes = _set_up(found, device, kinds)
    loads = step_loads(found.job)
    try:
        samples = _sample(stage, probes, loads, progress)
    except RuntimeError as error:
        raise TrainingError(f"--measure: {str(error).splitlines()[0]}") from None
    several = [kind for kind in kinds if len(kind.positions) > 1]
    counts = [[len(set(kind.positions) & set(probe)) for kind in several] for probe in probes]
    whole = [len(kind.positions) for kind in several]
    weights = list(loads.values())
    each, rest, apart = solve_steps(counts, np.median(samples, axis=(0, 3)).T.tolist(), weights)
    rounds = [
        _whole(*solve_steps(counts, np.median(one, axis=2).T.tolist(), weights)[:2], whole) for one in samples
    ]
    return Rehearsal(
        step=_span(_whole(each, rest, whole), rounds, apart),
        rest=rest,
        blocks=tuple(
            BlockTime(state=kind.state, blocks=count, seconds=seconds)
            for kind, count, seconds in zip(several, whole, each, strict=True)
        ),
        deepest=max(map(len, probes)),
        depth=len(found.blocks),
        rounds=len(samples),
        took=perf_counter() - begin,
    )


def find_kinds(found: Measured) -> list[Kind]:
    """Sort the blocks of a job by what they take; the lowest block of each kind comes first."""
    kinds: dict[Any, list[int]] = {}
    rows = zip(found.cost.blocks, found.blocks, found.trained, found.frozen_bytes, strict=True)
    for index, (cost, stored, trained, frozen) in enumerate(rows):
        state = "below" if not stored.saved else "trains" if trained else "frozen"
        kinds.setdefault((state, cost, trained, frozen, index in found.again), []).append(index)
    return [Kind(state=key[0], positions=tuple(held)) for key, held in kinds.items()]


def list_probes(kinds: Sequence[Kind], more: int) -> list[tuple[int, ...]]:
    """Return the blocks of each model that is trained: one of each kind, `more` of one kind, more of all.

    The first block that a gradient passes is among them always, so that all keep their states.
    """
    few = [kind.positions[:1] for kind in kinds]
    many = [kind.positions[: 1 + more] for kind in kinds]
    grown = [(*few[:index], kind, *few[index + 1 :]) for index, kind in enumerate(many)]
    chosen = (tuple(sorted(chain.from_iterable(parts))) for parts in (few, *grown, many))
    return list(dict.fromkeys(chosen))


def step_loads(job: Job) -> dict[Load, float]:
    """Return the steps that are made, and how many times the time of each makes up that of a whole one."""
    share, micro = -(-job.windows // job.devices), job.micro_batch
    passes = share * (1 + job.train.measured_share(job.windows)) / micro
    more = {(2, 0): passes - 1} if passes > 1 else {}
    if beside := -(-job.anchor_windows // job.devices):
        more[1, min(micro, beside)] = beside / min(micro, beside)
    return {(1, 0): 1 - sum(more.values()), **more}


def solve_steps(
    counts: Sequence[Sequence[int]], seconds: Sequence[Sequence[float]], weights: Sequence[float]
) -> tuple[list[float], float, float]:
    """Find what blocks take of a step from the steps of several models.

    Args:
        counts: for each model, its blocks of each kind.
        seconds: for each load, those of a step of each model.
        weights: of each load, from `step_loads`.

    Returns:
        Seconds of a block of each kind, of all else, and the largest relative error of a step.
    """
    rows = np.array([[*count, 1.0] for count in counts])
    found: list[Any] = []
    errors: list[float] = []
    for times in np.array(seconds):
        parts, _ = nnls(rows / times[:, None], np.ones(len(times)))
        found.append(parts)
        errors.append(float(np.abs(rows @ parts / times - 1).max()))
    *each, rest = (np.array(weights) @ np.array(found)).tolist()
    return each, rest, max(errors)


def _whole(each: Sequence[float], rest: float, counts: Sequence[int]) -> float:
    return rest + sum(seconds * count for seconds, count in zip(each, counts, strict=True))


def _span(expected: float, rounds: Sequence[float], apart: float) -> Span:
    """Widen by the scatter of the rounds (two standard errors) or the misfit of the line, as is larger."""
    scatter = 2 * stdev(rounds) / len(rounds) ** 0.5 / expected
    width = max(scatter, apart, _LEAST_ERROR)
    return Span(low=expected * max(0.0, 1 - width), expected=expected, high=expected * (1 + width))


def _set_up(found: Measured, device: Device, kinds: Sequence[Kind]) -> tuple[Stage, list[tuple[int, ...]]]:
    """Return the model with values in the most blocks that fit, and which blocks to train it with."""
    for more in _MORE:
        probes = list_probes(kinds, more)
        stage = set_stage(found.job, device, probes[-1], found.again)
        needed = stage.needed(device)
        if needed <= device.memory:
            return stage.with_values(device), probes
    raise TrainingError(
        f"--measure: training {len(probes[-1])} of {len(found.blocks)} blocks needs {needed / 1e9:.1f} GB, "
        f"{device.name} has {device.memory / 1e9:.1f} GB\nplan without it, or with a smaller micro-batch"
    )


def _sample(
    stage: Stage, probes: Sequence[Sequence[int]], loads: Mapping[Load, float], progress: Progress
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return seconds [rounds, models, loads, steps]; each round makes all of them, so all meet one noise."""
    made = [(probe, load) for probe in probes for load in loads]
    begin = perf_counter()
    for probe, load in made:  # memory, kernels and the optimiser's state are there from here on
        stage.train(probe, *load, 1)
    least, most = _ROUNDS
    count = min(most, max(least, int(_SECONDS / (_STEPS * (perf_counter() - begin)))))
    seconds = []
    for number, (probe, load) in enumerate(made * count):
        progress(number, count * len(made))
        seconds.append(stage.train(probe, *load, _STEPS))
    return np.array(seconds).reshape(count, len(probes), len(loads), _STEPS)
