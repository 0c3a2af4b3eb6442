"""An estimate as plain facts: what `deepen plan --json` prints."""

from dataclasses import asdict
from typing import Any, Final

from deepen.planner.devices import HERE, Device, prices_assumed
from deepen.planner.estimate import (
    Cost,
    Measured,
    cost_of,
    largest_micro_batch,
    memory_of,
    on_others,
)
from deepen.planner.levers import Lever, list_levers
from deepen.planner.memory import Memory, is_cut
from deepen.planner.paper import paper_run
from deepen.planner.rehearsal import Rehearsal
from deepen.planner.speed import Span, Speed

# The calibration, in deepen's cache.
SPEED_FILE: Final = "speed.json"


def plan_facts(
    name: str, found: Measured, device: Device, speed: Speed | Rehearsal | None, price: float | None = None
) -> dict[str, Any]:
    """Return everything that can be said of a job before it starts.

    Args:
        name: what the model is called.
        found: what is to be trained, measured without values.
        device: on what.
        speed: for `device` being this machine: its calibration, or what was measured on it.
        price: dollars for an hour of a device; default: the table's.
    """
    job = found.job
    step: Speed | Span | None = speed.step if isinstance(speed, Rehearsal) else speed
    dollars = device.dollars if price is None else price
    memory = memory_of(found, device)
    return {
        "model": name,
        "job": _job_facts(found, device),
        "parameters": found.parameters.model_dump(),
        "flops_per_token": {**asdict(found.flops), "total": found.flops.total},
        "memory_bytes": asdict(memory),
        "fits": memory.fits,
        "largest_micro_batch": largest_micro_batch(found, device),
        "disk_bytes": asdict(found.disk),
        "cost": {**asdict(cost_of(found, device, step, dollars)), "tokens": job.tokens},
        "basis": _basis(device, speed, dollars, price),
        "measured": asdict(speed) if isinstance(speed, Rehearsal) else None,
        "levers": [_lever_facts(lever) for lever in list_levers(found, device)],
        "devices": [_row(*row) for row in on_others(found, device)],
        "paper": asdict(paper_run(device, dollars)),
    }


def _job_facts(found: Measured, device: Device) -> dict[str, Any]:
    job = found.job
    return {
        "layout": job.layout.draw() if job.layout else None,
        "method": job.train.method,
        "precision": job.precision(device.kind),
        "sequence": job.length,
        "windows_per_step": job.windows,
        "micro_batch": job.micro_batch,
        "optimizer": job.train.optimizer,
        "quantise": job.train.quantise,
        "checkpointing": job.train.recompute,
        "computed_again": list(found.again),
        "device": device.name,
        "devices": job.devices,
        "cut_over_devices": is_cut(found.step, job, device),
        "steps": job.optimiser_steps,
    }


def _basis(
    device: Device, speed: Speed | Rehearsal | None, dollars: float | None, price: float | None
) -> dict[str, Any]:
    """Say what time and money rest on."""
    return {
        "time": _time_basis(device, speed),
        "calibration_error": speed.error if isinstance(speed, Speed) else None,
        "calibrate": device.key == HERE and speed is None,
        "watts": device.watts,
        "dollars_per_hour": dollars,
        "price_assumed": prices_assumed() if price is None and dollars is not None else None,
    }


def _time_basis(device: Device, speed: Speed | Rehearsal | None) -> str:
    if isinstance(speed, Rehearsal):
        return f"measurement here, of models of up to {speed.deepest} of the {speed.depth} blocks"
    return f"calibration of {speed.measured}" if speed else f"data sheet of {device.sheet}"


def _lever_facts(lever: Lever) -> dict[str, Any]:
    return {
        "name": lever.name,
        "setting": lever.setting,
        "memory_bytes": lever.memory.total,
        "fits": lever.memory.fits,
        "time": lever.time,
        "note": lever.note,
    }


def _row(device: Device, memory: Memory, cost: Cost) -> dict[str, Any]:
    return {
        "device": device.name,
        "key": device.key,
        "memory_bytes": memory.total,
        "device_bytes": device.memory,
        "fits": memory.fits,
        "seconds": asdict(cost.seconds) if cost.seconds else None,
        "dollars": asdict(cost.dollars) if cost.dollars else None,
    }
