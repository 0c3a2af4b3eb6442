"""Ten seconds of real training steps, from which the speed of this machine is found."""

import tempfile
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Final

import numpy as np
import torch
from scipy.optimize import nnls  # type: ignore[import-untyped]
from transformers import LlamaConfig

from deepen.config import TrainSection
from deepen.errors import TrainingError
from deepen.expansion import plan_layout
from deepen.planner.devices import Device
from deepen.planner.ghost import embody, meta_base, prepare_ghost
from deepen.planner.job import Job
from deepen.planner.speed import Speed
from deepen.planner.step import Work, run_step
from deepen.planner.timing import time_steps
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
            seconds = [median(time_steps(job, torch.device(device.kind), _STEPS)) for job in jobs]
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
