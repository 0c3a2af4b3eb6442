"""Ten seconds of real training steps, from which the speed of this machine is found."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any, Final

import numpy as np
import torch
from scipy.optimize import nnls  # type: ignore[import-untyped]
from transformers import LlamaConfig, PreTrainedModel

from deepen.config import TrainSection
from deepen.errors import TrainingError
from deepen.expansion import plan_layout
from deepen.methods import build_method
from deepen.methods.base import base_inside
from deepen.model.structure import blocks_of, family_of
from deepen.planner.devices import Device
from deepen.planner.ghost import embody, meta_base, prepare_ghost, trained_model, untrained_base
from deepen.planner.job import Job
from deepen.planner.speed import Speed
from deepen.planner.step import Work, run_step
from deepen.training.anchor import Anchor
from deepen.training.interface import Hooks, Settings
from deepen.training.loop import train
from deepen.training.optimizer import build_optimizer
from deepen.training.prefix import Prefix, find_prefix
from deepen.training.recompute import recompute

# Width, inner width, blocks, words, windows, tokens of a window: of a CPU, and of an accelerator.
_SHAPES: Final = {
    "cpu": (
        (64, 172, 2, 512, 2, 64),
        (128, 344, 4, 512, 4, 128),
        (128, 344, 2, 4096, 2, 512),
        (256, 688, 2, 512, 2, 128),
        (256, 688, 4, 2048, 4, 256),
        (512, 1376, 2, 512, 2, 128),
        (512, 1376, 3, 2048, 2, 512),
        (128, 344, 4, 1024, 2, 384),
        (192, 512, 4, 1024, 4, 192),
        (256, 688, 6, 512, 2, 384),
        (64, 172, 6, 256, 4, 256),
        (384, 1024, 3, 4096, 2, 256),
    ),
    "cuda": (
        (1024, 2752, 4, 8192, 1, 512),
        (1024, 2752, 4, 8192, 4, 2048),
        (2048, 5504, 4, 32000, 1, 4096),
        (2048, 5504, 2, 32000, 4, 2048),
        (4096, 11008, 2, 32000, 1, 2048),
        (4096, 11008, 3, 32000, 2, 4096),
    ),
}
_STEPS: Final = 4
_WARM: Final = 1


@dataclass(frozen=True)
class _Batch:
    """A batch of random tokens, as `deepen.training.interface.Batch`."""

    tokens: np.ndarray[Any, np.dtype[np.int64]]
    sources: np.ndarray[Any, np.dtype[np.int64]]
    positions: None = None
    trained: None = None
    numbers: None = None

    @property
    def trained_tokens(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """All of them count."""
        return np.full(len(self.tokens), self.tokens.shape[1] - 1)


def calibrate(device: Device) -> Speed:
    """Time some small training steps on this machine, and find what each kind of work costs.

    Args:
        device: this machine's.

    Raises:
        TrainingError: the steps cannot be run.
    """
    precision = "fp32" if device.kind == "cpu" else "bf16"
    with tempfile.TemporaryDirectory() as scratch:
        jobs = list(_jobs(Path(scratch), device.kind))
        try:
            seconds = [median(time_steps(job, torch.device(device.kind))) for job in jobs]
        except RuntimeError as error:
            raise TrainingError(f"the calibration failed: {str(error).splitlines()[0]}") from None
        works = [plan_work(job, precision) for job in jobs]
    found, apart = _fit(works, seconds)
    return Speed(
        device=device.name,
        threads=torch.get_num_threads(),
        precision=precision,
        error=round(apart, 3),
        measured=datetime.now(UTC).date().isoformat(),
        **found,
    )


def plan_work(job: Job, precision: str) -> Work:
    """Return what one optimiser step of a job does on one device."""
    ghost = embody(prepare_ghost(job, meta_base(job, precision), precision), None)
    if job.train.recompute == "full":
        recompute(ghost.blocks)
    return run_step(ghost, job, job.micro_batch).work


def time_steps(job: Job, device: torch.device, steps: int = _STEPS) -> list[float]:
    """Train for real on random tokens; return the seconds of each step but the first ones.

    Args:
        job: what is trained; its base begins as random numbers.
        device: of this machine.
        steps: how many.
    """
    precision = job.precision(device.type)
    model, parameters = trained_model(job, precision, device)
    if job.train.recompute == "full":
        recompute(list(blocks_of(model, family_of(model))))
    seconds: list[float] = []
    optimizer = build_optimizer(parameters, betas=(0.9, 0.95), weight_decay=0.1, kind=job.train.optimizer)
    hooks = Hooks(
        log=lambda report: seconds.append(report.seconds), evaluate=_nothing, save=_nothing, stop=bool
    )
    batches, settings = _batches(job, model), _settings(job, precision, steps)
    anchor = _anchor(job, model, precision)
    train(model, parameters, optimizer, batches, settings, hooks, anchor=anchor)
    return seconds[_WARM:]


def _anchor(job: Job, model: PreTrainedModel, precision: str) -> Anchor | None:
    """Hold the model to its base on random tokens."""
    section = job.train.anchor
    if section is None:
        return None
    inside = base_inside(build_method(job.train))
    if inside is None:
        copy = untrained_base(job, precision == "fp32", model.device).requires_grad_(False)
    return Anchor(
        batch_at=_batches(job, model),
        windows=job.anchor_windows,
        weight=section.weight,
        base=inside or (lambda _: nullcontext(copy)),
        prefix=_prefix(model, precision) if inside else None,
    )


def _prefix(model: PreTrainedModel, precision: str) -> Prefix | None:
    try:
        return find_prefix(model, torch.bfloat16 if precision == "bf16" else None)
    except TrainingError:
        return None


def _jobs(scratch: Path, kind: str) -> Iterator[Job]:
    for number, (width, inner, blocks, words, windows, length) in enumerate(_SHAPES[kind]):
        config = LlamaConfig(
            vocab_size=words,
            hidden_size=width,
            intermediate_size=inner,
            num_hidden_layers=blocks,
            num_attention_heads=max(2, width // 64),
            max_position_embeddings=length,
            dtype="float32" if kind == "cpu" else "bfloat16",
        )
        config.save_pretrained(scratch / str(number))
        train_section = TrainSection(
            tokens=1,
            batch_tokens=1,
            learning_rate=1e-4,
            recompute="full" if number % 3 == 2 else "none",
        )
        yield Job(
            source=scratch / str(number),
            layout=plan_layout(blocks, blocks=1, placement="suffix" if number % 2 else "interleaved"),
            train=train_section,
            length=length,
            windows=windows,
            micro_batch=max(1, windows // 2),
        )


def _batches(job: Job, model: PreTrainedModel) -> Any:
    words = int(model.get_input_embeddings().weight.shape[0])
    count = max(job.windows, job.anchor_windows)
    tokens = np.random.default_rng(0).integers(0, words, (count, job.length + 1))
    return lambda step, windows: _Batch(tokens[:windows], np.zeros(windows, dtype=np.int64))


def _settings(job: Job, precision: str, steps: int) -> Settings:
    return Settings(
        steps=steps,
        windows=job.windows,
        micro_batch=job.micro_batch,
        learning_rate=1e-4,
        schedule="constant",
        warmup=0.0,
        final_learning_rate=1.0,
        clip=1.0,
        autocast=torch.bfloat16 if precision == "bf16" else None,
        evaluate_every=steps,
        checkpoint_every=steps,
    )


def _nothing(_: int) -> None:
    """What is done when an evaluation or a checkpoint is due."""


def _fit(works: Sequence[Work], seconds: Sequence[float]) -> tuple[dict[str, float], float]:
    """Return the seconds a unit of each kind of work, by least squares of relative errors, none negative."""
    names = list(vars(works[0]))
    rows = np.array([[getattr(work, name) for name in names] for work in works])
    relative = rows / np.array(seconds)[:, None]
    scale = np.maximum(relative.max(axis=0), 1e-300)  # of what none of them does, the speed is 0
    found, _ = nnls(relative / scale, np.ones(len(works)))
    found = found / scale
    errors = np.abs(rows @ found / np.array(seconds) - 1)
    return dict(zip(names, found.tolist(), strict=True)), float(np.median(errors))
