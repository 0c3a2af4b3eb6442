"""The planner against reality on this machine's CPU: peak memory, FLOPs and seconds of training steps.

Each combination of size, layout, method, checkpointing and sequence is planned without values, then trained
for real by deepen's loop. Compared are

- peak memory: the most bytes that PyTorch's CPU allocator held at once from before the model was built to the
  end of the second step, by the allocation events of `torch.profiler` (exact; what Python and the libraries
  take beside it is no part of it);
- FLOPs: `torch.utils.flop_counter.FlopCounterMode` round a real forward and backward pass. It does not count
  fused attention on a CPU, so that is taken off the plan;
- seconds: the median step, after one calibration as `deepen doctor --calibrate` makes it;
- measured: the median step, half of them made before and half after `deepen plan --measure` worked it out
  from a few blocks. Four models of 16 blocks are tried as well. With --clock cpu the CPU time of the process
  stands for both, on a machine that does other work (set OMP_NUM_THREADS=1: waiting for a thread counts).

Beside them stand two estimators that know nothing of blocks that are frozen, or of activations:
`accelerate estimate-memory` (4 × the weights for Adam; by its own functions) and
DeepSpeed's for ZeRO-2 on one GPU (`estimate_zero2_model_states_mem_needs`: 4 + 16 bytes a parameter, by the
formula of its documentation, as DeepSpeed need not be installed). Both assume mixed precision.

    python benchmarks/plan.py [--part counts|time|measured|all] [--out FILE]
    python benchmarks/plan.py --part measured --out FILE [--match TEXT] [--clock cpu]    # goes on in FILE

Exit code 1 if memory is not within 5% (median) and 10% (worst), FLOPs are not equal to 0.1%, or seconds,
calibrated or measured, are not within 15% in the median.
"""

import argparse
import gc
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from accelerate.commands.estimate import estimate_training_usage
from accelerate.utils import calculate_maximum_sizes
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig

from deepen.checkpoint import write_file
from deepen.config import TrainSection
from deepen.expansion import plan_layout
from deepen.model.structure import blocks_of, family_of
from deepen.planner.calibration import calibrate
from deepen.planner.devices import this_device
from deepen.planner.estimate import Measured, measure
from deepen.planner.ghost import meta_base, prepare_ghost, trained_model
from deepen.planner.job import Job
from deepen.planner.rehearsal import rehearse
from deepen.planner.step import Work
from deepen.planner.timing import time_steps
from deepen.records.provenance import capture_provenance
from deepen.training.loss import summed_loss
from deepen.training.recompute import recompute

CPU = torch.device("cpu")
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
LIMITS = {"memory, median": 0.05, "memory, worst": 0.10, "flops, worst": 0.001, "seconds, median": 0.15}
LIMITS["measured, median"] = 0.15

SIZES = {
    "small": {"vocab_size": 1024, "hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 4},
    "deep": {"vocab_size": 1024, "hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 16},
    "medium": {"vocab_size": 4096, "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 6},
}
METHODS: dict[str, dict[str, Any]] = {
    "blocks interleaved": {"layout": {"blocks": 2}},
    "blocks suffix": {"layout": {"blocks": 2, "placement": "suffix"}},
    "blocks prefix": {"layout": {"blocks": 1, "placement": "prefix"}},
    "full": {},
    "lora": {},
    "freeze": {},
}
# Tokens of a window, windows, windows of a forward pass.
BATCHES = ((128, 4, 4), (384, 4, 2))


@dataclass(frozen=True, kw_only=True)
class Case:
    """One combination."""

    size: str
    method: str
    checkpointing: str
    batch: tuple[int, int, int]

    def job(self, scratch: Path) -> Job:
        """Return it as the planner sees it; its config lies in a scratch directory."""
        source = scratch / self.size
        if not source.exists():
            config = LlamaConfig(
                **SIZES[self.size], num_attention_heads=4, max_position_embeddings=512, dtype="float32"
            )
            config.save_pretrained(source)
        length, windows, micro = self.batch
        layout = METHODS[self.method].get("layout")
        section = TrainSection(
            method=self.method.split()[0],
            tokens=1,
            batch_tokens=1,
            learning_rate=1e-4,
            recompute=self.checkpointing,
        )
        depth = SIZES[self.size]["num_hidden_layers"]
        return Job(
            source=source,
            layout=plan_layout(depth, **layout) if layout else None,
            train=section,
            length=length,
            windows=windows,
            micro_batch=micro,
        )


def cases() -> Iterator[Case]:
    """Give every combination: of checkpointing, `full` with the long windows only."""
    for size in ("small", "medium"):
        for method in METHODS:
            for checkpointing, batch in (("none", BATCHES[0]), ("none", BATCHES[1]), ("full", BATCHES[1])):
                yield Case(size=size, method=method, checkpointing=checkpointing, batch=batch)


def measured_cases() -> Iterator[Case]:
    """Give these, and some of more blocks than are trained to foretell them."""
    yield from cases()
    for method in ("blocks interleaved", "blocks suffix", "lora", "full"):
        yield Case(size="deep", method=method, checkpointing="none", batch=BATCHES[0])


def peak_bytes(job: Job) -> int:
    """Train two steps; return the most bytes that PyTorch held."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        time_steps(job, CPU, steps=2)
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def executed_flops(job: Job) -> float:
    """Return the FLOPs a token that PyTorch counts in a real forward and backward pass."""
    model, _ = trained_model(job, "fp32", CPU)
    model.train()
    if job.train.recompute == "full":
        recompute(list(blocks_of(model, family_of(model))))
    tokens = torch.zeros(1, job.length + 1, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        summed_loss(model, tokens[:, :-1], tokens[:, 1:]).backward()
    return counter.get_total_flops() / job.length


def planned_products(found: Measured) -> float:
    """Return the FLOPs a token of the plan without fused attention."""
    attention = sum(
        cost.attention * ((3.5 + (index in found.again)) if stored.saved else 1.0)
        for index, (cost, stored) in enumerate(zip(found.cost.blocks, found.blocks, strict=True))
    )
    return found.flops.total - attention


def other_estimators(job: Job) -> dict[str, int]:
    """Return what accelerate's and DeepSpeed's estimators say of the expanded model, in bytes."""
    model = prepare_ghost(job, meta_base(job, "fp32"), "fp32").model
    whole, _ = calculate_maximum_sizes(model)
    count = sum(parameter.numel() for parameter in model.parameters())
    return {"accelerate": max(estimate_training_usage(whole, "float32").values()), "deepspeed": 20 * count}


def plan_cases(scratch: Path) -> Iterator[dict[str, Any]]:
    """Give memory and FLOPs, planned and real, of every combination, and the work to be timed."""
    for case in cases():
        job = case.job(scratch)
        found = measure(job, this_device())
        row: dict[str, Any] = {**vars(case), "parameters": found.parameters.model_dump()}
        real = peak_bytes(job)
        row["memory"] = _judge(found.step.peak, real)
        row["others"] = {name: _judge(said, real) for name, said in other_estimators(job).items()}
        row["flops"] = _judge(planned_products(found), executed_flops(job))
        row["work"] = vars(found.step.work)
        print(f"  {case}: {row['memory']['error']:+.2%} {row['flops']['error']:+.3%}", file=sys.stderr)
        yield row


def time_cases(rows: Sequence[dict[str, Any]], scratch: Path) -> dict[str, Any]:
    """Calibrate, train every combination, and add its seconds; return the calibration."""
    speed = calibrate(this_device())
    for case, row in zip(cases(), rows, strict=False):  # those of `measured_cases` alone come last
        seconds = statistics.median(time_steps(case.job(scratch), CPU, steps=6))
        row["seconds"] = _judge(speed.seconds(Work(**row["work"])), seconds)
        print(f"  {case}: {seconds:.3f} s {row['seconds']['error']:+.1%}", file=sys.stderr)
    return vars(speed)


def measure_cases(rows: list[dict[str, Any]], scratch: Path, clock: str, match: str) -> Iterator[None]:
    """Add what `deepen plan --measure` says to the combinations not tried yet, one after the other."""
    for number, case in enumerate(measured_cases()):
        row = rows[number] if number < len(rows) else vars(case).copy()
        rows[number:] = [row, *rows[number + 1 :]]
        if "measured" in row or not all(word in str(case) for word in match.split()):
            continue
        job = case.job(scratch)
        found = measure(job, this_device())
        with patch("deepen.training.loop.perf_counter", CLOCKS[clock]):
            real = time_steps(job, CPU, steps=4)
            planned = rehearse(found, this_device())
            real += time_steps(job, CPU, steps=4)
        judged = _judge(planned.step.expected, statistics.median(real))
        inside = planned.step.low <= judged["real"] <= planned.step.high
        row["measured"] = judged | {"inside": inside, "trained": planned.deepest, "of": planned.depth}
        row["measured"] |= {"clock": clock, "took": round(planned.took, 1), "load": os.getloadavg()[0]}
        print(f"  {case}: {judged['real']:.3f} s {judged['error']:+.1%}", file=sys.stderr)
        yield


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return the median and the worst relative errors."""
    found: dict[str, list[float]] = {}
    for row in rows:
        for name in ("memory", "flops", "seconds", "measured"):
            if name in row:
                found.setdefault(name, []).append(abs(row[name]["error"]))
        for name, judged in row.get("others", {}).items():
            found.setdefault(f"memory by {name}", []).append(abs(judged["error"]))
    judged = {f"{name}, median": statistics.median(errors) for name, errors in found.items()}
    return judged | {f"{name}, worst": max(errors) for name, errors in found.items()}


def _judge(plan: float, real: float) -> dict[str, float]:
    return {"plan": plan, "real": real, "error": round(plan / real - 1, 6)}


def write_record(
    rows: list[dict[str, Any]], speed: dict[str, Any] | None, out: Path | None
) -> dict[str, Any]:
    """Return the record; write it, where that is asked for."""
    errors = summary(rows)
    passed = all(errors.get(name, 0.0) <= limit for name, limit in LIMITS.items())
    record = {
        "benchmark": "plan",
        "memory_measured_by": "allocation events of torch's CPU allocator, torch.profiler",
        "threads": torch.get_num_threads(),
        "calibration": speed,
        "errors": {name: round(error, 5) for name, error in errors.items()},
        "limits": LIMITS,
        "passed": passed,
        "measured": sum("measured" in row for row in rows),
        "cases": rows,
        "provenance": capture_provenance(seed=0, data={}).model_dump(mode="json"),
    }
    if out:
        write_file(out, json.dumps(record, indent=1) + "\n")
    return record


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", choices=("counts", "time", "measured", "all"), default="all")
    parser.add_argument("--match", default="", help="With --part measured: words that a combination has.")
    parser.add_argument("--clock", choices=tuple(CLOCKS), default="wall", help="Of --part measured.")
    parser.add_argument("--out", type=Path, help="Written; by --part time and measured first read.")
    options = parser.parse_args()
    part, held = options.part, {}
    if part in ("time", "measured") and options.out and options.out.exists():
        held = json.loads(options.out.read_text())
    rows, speed = held.get("cases", []), held.get("calibration")
    with tempfile.TemporaryDirectory() as directory:
        scratch = Path(directory)
        if part in ("counts", "all"):
            rows = list(plan_cases(scratch))
        if part in ("time", "all"):
            speed = time_cases(rows, scratch)
        if part in ("measured", "all"):
            for _ in measure_cases(rows, scratch, options.clock, options.match):
                write_record(rows, speed, options.out)
    record = write_record(rows, speed, options.out)
    print(json.dumps({name: value for name, value in record.items() if name != "cases"}, indent=1))
    return 0 if record["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
