"""What LLaMA Pro's own run took, and would take on other devices (arXiv 2401.02415 section 4.1, Table 6)."""

from dataclasses import dataclass
from typing import Final

from deepen.planner.devices import Device
from deepen.planner.speed import Span

# 16 H800 for about 7 days. 15,900 steps of 1,024 windows of 4,096 tokens are 66.7 billion; the text says 80.
GPU_HOURS: Final = 2830.0
DEVICES: Final = 16
TOKENS: Final = 15_900 * 1_024 * 4_096
# Of Llama-2-7B with 8 new blocks interleaved, at 4,096 tokens a window, nothing computed again; counted by
# `deepen.training.flops`.
FLOPS_PER_TOKEN: Final = 38.885e9
_HOUR: Final = 3600.0


@dataclass(frozen=True, kw_only=True)
class PaperRun:
    """The paper's run, there and here.

    Attributes:
        gpu_hours: on H800, as the paper says.
        devices: how many.
        tokens: trained on.
        parameters_new: of the 8 new blocks.
        flops: executed, nothing computed again.
        flops_per_second: of each of its devices, by these.
        hours_here: device hours on a device.
        kilowatt_hours_here: of that device.
        dollars_here: of renting it; None without a price.
    """

    gpu_hours: float
    devices: int
    tokens: int
    parameters_new: int
    flops: float
    flops_per_second: float
    hours_here: Span
    kilowatt_hours_here: Span
    dollars_here: Span | None


def paper_run(device: Device, dollars: float | None) -> PaperRun:
    """Return what the paper's run took, and what it would on a device of the table.

    Args:
        device: which; memory is not looked at.
        dollars: for an hour of it; None: there is no price.
    """
    flops = TOKENS * FLOPS_PER_TOKEN
    slow, expected, fast = device.attained
    hours = Span(low=flops / fast / _HOUR, expected=flops / expected / _HOUR, high=flops / slow / _HOUR)
    return PaperRun(
        gpu_hours=GPU_HOURS,
        devices=DEVICES,
        tokens=TOKENS,
        parameters_new=8 * 202_383_360,
        flops=flops,
        flops_per_second=flops / (GPU_HOURS * _HOUR),
        hours_here=hours,
        kilowatt_hours_here=hours * (device.watts / 1000),
        dollars_here=hours * dollars if dollars is not None else None,
    )
