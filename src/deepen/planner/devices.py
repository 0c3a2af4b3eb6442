"""Devices a run could use: from a table, or the machine this is."""

import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, Final

import torch

from deepen.errors import TrainingError
from deepen.training.recompute import available_memory

HERE: Final = "here"

_GIB: Final = 2**30
# Share of the peak that a step executes, from slow to fast. LLaMA Pro's own run is near the first (26-31%),
# NVIDIA's LoRA recipe on one H100 near the second (41-43%), the best full-precision runs near the third
# (MosaicML's 46% and, with recomputed FLOPs counted, 54%).
_SHARES: Final = (0.25, 0.40, 0.52)
# What a device of which nothing is known but its memory is taken for.
_UNKNOWN: Final = "a100-40"


@dataclass(frozen=True, kw_only=True)
class Device:
    """One device.

    Attributes:
        key: what it is called on the command line.
        name: in full.
        kind: `cuda` or `cpu`, as PyTorch calls it.
        memory: bytes that a process can take.
        flops: peak FLOPs a second.
        bandwidth: of its memory, bytes a second.
        watts: power when busy.
        dollars: rent for an hour, an assumption; None where it is not rented.
        sheet: name of the device whose data these are.
    """

    key: str
    name: str
    kind: str
    memory: int
    flops: float
    bandwidth: float
    watts: float
    dollars: float | None
    sheet: str

    @property
    def attained(self) -> tuple[float, float, float]:
        """FLOPs a second that a training step is likely to execute: slow, expected, fast."""
        slow, expected, fast = (share * self.flops for share in _SHARES)
        return slow, expected, fast


def device_table() -> Mapping[str, Device]:
    """Return the devices of the table, by key."""
    return {key: _device(key, row) for key, row in _table().items() if isinstance(row, dict)}


def prices_assumed() -> str:
    """Return the month of the table's prices."""
    return str(_table()["prices_assumed"])


@cache
def _table() -> dict[str, Any]:
    return tomllib.loads((files("deepen.planner") / "devices.toml").read_text())


def _device(key: str, row: Mapping[str, Any]) -> Device:
    return Device(
        key=key,
        name=row["name"],
        kind="cpu" if key == "cpu" else "cuda",
        memory=int(row["memory_gib"] * _GIB),
        flops=row["tflops"] * 1e12,
        bandwidth=row["bandwidth"] * 1e9,
        watts=row["watts"],
        dollars=row["dollars"],
        sheet=row["name"],
    )


def find_device(key: str) -> Device:
    """Return a device of the table, or this machine's for `here`.

    Raises:
        TrainingError: there is none of that name.
    """
    table = device_table()
    if key == HERE:
        return this_device()
    if key.lower() not in table:
        raise TrainingError(f"--device: {key!r} is not in the table; choose {', '.join([HERE, *table])}")
    return table[key.lower()]


def this_device(asked: str = "auto") -> Device:
    """Return this machine's accelerator, or its CPU where there is none; with the memory it has left now.

    Args:
        asked: as `train.device` of a recipe.
    """
    usable = torch.cuda.is_available() and asked != "cpu"
    place = torch.device((asked if asked.startswith("cuda") else "cuda") if usable else "cpu")
    name = torch.cuda.get_device_name(place) if usable else f"CPU, {os.cpu_count()} cores"
    memory = available_memory(place)
    like = _likest(name, memory) if usable else device_table()["cpu"]
    share = 1.0 if usable else (os.cpu_count() or 1) / 16  # the table's has 16 cores
    return Device(
        key=HERE,
        name=name,
        kind=place.type,
        memory=memory,
        flops=like.flops * share,
        bandwidth=like.bandwidth,
        watts=like.watts * share,
        dollars=like.dollars if usable else None,
        sheet=like.name,
    )


def _likest(name: str, memory: int) -> Device:
    """Return the row of the table that a device's own name speaks of, nearest in memory."""
    words = set(name.upper().replace("-", " ").split())
    table = device_table()
    found = [row for key, row in table.items() if _table()[key]["chip"] in words]
    return min(found, key=lambda row: abs(row.memory - memory), default=table[_UNKNOWN])
