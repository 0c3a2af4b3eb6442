"""How long a step takes: measured, from a calibration of this machine, or from a device's data sheet."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch

from deepen.checkpoint import write_file
from deepen.planner.devices import HERE, Device
from deepen.planner.job import Job
from deepen.planner.step import Step, Work

# How far a calibrated estimate is from what was measured, in the median (docs/plan.md).
_CALIBRATED: Final = 0.25
# Efficiency of each device where several share a step: slow, expected, fast.
_SHARING: Final = (0.80, 0.92, 1.0)


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Seconds that one unit of each kind of `Work` takes on a machine.

    Attributes:
        device: its name, by which a calibration is found again.
        threads: of PyTorch on the CPU.
        precision: `bf16` or `fp32`.
        products: seconds a FLOP of matrix products.
        attention: seconds a FLOP of fused attention.
        traffic: seconds a byte of small tensors.
        streamed: seconds a byte of large ones.
        calls: seconds an operation.
        error: median relative error on the steps it was found from.
        measured: UTC date, ISO 8601.
    """

    device: str
    threads: int
    precision: str
    products: float
    attention: float
    traffic: float
    streamed: float
    calls: float
    error: float
    measured: str

    def seconds(self, work: Work) -> float:
        """Return the seconds of some work."""
        return float(sum(getattr(self, name) * value for name, value in vars(work).items()))


@dataclass(frozen=True, kw_only=True)
class Span:
    """A quantity with its uncertainty."""

    low: float
    expected: float
    high: float

    def __mul__(self, times: float) -> "Span":
        """Return so many of it."""
        return Span(low=self.low * times, expected=self.expected * times, high=self.high * times)


def step_seconds(step: Step, flops: float, job: Job, device: Device, speed: Speed | Span | None) -> Span:
    """Return the seconds of one optimiser step.

    Args:
        step: of one device.
        flops: that it executes, as `deepen.training.flops` counts them.
        job: what is trained.
        device: on what.
        speed: the calibration of this machine, or the seconds of a step as they were measured on one device;
            None: the data sheet decides.
    """
    if isinstance(speed, Span):
        span = speed
    elif speed is not None:
        alone = speed.seconds(step.work)
        span = Span(low=alone * (1 - _CALIBRATED), expected=alone, high=alone * (1 + _CALIBRATED))
    else:
        slow, expected, fast = (flops / rate for rate in device.attained)
        update = step.update_traffic / device.bandwidth
        span = Span(low=fast + update, expected=expected + update, high=slow + 2 * update)
    if job.devices == 1:
        return span
    low, middle, high = _SHARING
    return Span(low=span.low / high, expected=span.expected / middle, high=span.high / low)


def read_speed(path: Path, device: Device, precision: str) -> Speed | None:
    """Return the calibration kept in a file, where it is of this machine as it is now.

    Args:
        path: from `write_speed`.
        device: what is planned for; only this machine was calibrated.
        precision: of the compute.
    """
    if device.key != HERE or not path.exists():
        return None
    try:
        held = Speed(**json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError):
        return None  # of another version of deepen, or damaged: as if there were none
    wanted = (device.name, torch.get_num_threads(), precision)
    return held if (held.device, held.threads, held.precision) == wanted else None


def write_speed(path: Path, speed: Speed) -> None:
    """Keep a calibration.

    Raises:
        OutputError: the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, json.dumps(vars(speed), indent=1) + "\n")
