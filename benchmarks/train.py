"""Training speed: deepen's loop against `transformers.Trainer` and peft on one model and the same batches.

Every contender trains a Llama-shaped model of random weights on the same random tokens. They take turns, a
few steps each, so that a busy machine disturbs all alike; a contender's figure is the median over its steps,
without the first two of each turn.

    python benchmarks/train.py [--shape tiny|8b] [--device cpu|cuda] [--rounds 3] [--steps 8] [--out FILE]

Exit code 1 if deepen's interleaved blocks are not 1.3 times as fast as the frozen Trainer with gradient
checkpointing, or its suffix blocks not 1.6 times as fast as full fine-tuning.
"""

import argparse
import copy
import gc
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from deepen.checkpoint import write_file
from deepen.data.batches import Batch
from deepen.expansion import plan_layout
from deepen.model import freeze_base, insert_blocks, load_quantised
from deepen.records.provenance import capture_provenance
from deepen.training.interface import Hooks, Settings
from deepen.training.loop import train
from deepen.training.optimizer import build_optimizer
from deepen.training.recompute import choose_blocks, free_memory, measure_blocks, recompute

LIMITS = {
    "interleaved over the frozen Trainer with checkpointing": 1.3,
    "suffix over full fine-tuning": 1.6,
}
WARM = 2


@dataclass(frozen=True)
class Shape:
    """A model to train and the batch to train it on."""

    model: dict[str, int]
    new_blocks: int
    length: int
    windows: int


SHAPES = {
    "tiny": Shape(
        {
            "vocab_size": 512,
            "hidden_size": 256,
            "intermediate_size": 688,
            "num_hidden_layers": 8,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
        },
        new_blocks=2,
        length=256,
        windows=4,
    ),
    "8b": Shape(
        {
            "vocab_size": 128_256,
            "hidden_size": 4096,
            "intermediate_size": 14_336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
        },
        new_blocks=8,
        length=4096,
        windows=1,
    ),
}


class Bench:
    """One model, one stream of batches, and the contenders' ways of training on it."""

    def __init__(self, shape: Shape, device: str, steps: int) -> None:
        self.shape, self.device, self.steps = shape, torch.device(device), steps
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.scratch = tempfile.TemporaryDirectory()
        torch.manual_seed(0)
        config = LlamaConfig(**shape.model, max_position_embeddings=shape.length, use_cache=False)
        # In the CPU's memory, as a device may have room for one model only.
        with torch.device(device):
            self.base = LlamaForCausalLM(config).to(self.dtype).cpu()
        size = (steps, shape.windows, shape.length + 1)
        self.batches = torch.randint(
            shape.model["vocab_size"], size, generator=torch.Generator().manual_seed(1)
        )

    def model(self, placement: str | None = None, *, quantised: bool = False) -> LlamaForCausalLM:
        """Return a fresh copy of the base, in 4 bits if asked; with a placement expanded and frozen."""
        if quantised:
            model = load_quantised(self._saved(), "4bit", dtype=self.dtype, device=self.device).train()
        else:
            model = copy.deepcopy(self.base).train().to(self.device)
        if placement:
            count = self.shape.new_blocks
            layout = plan_layout(len(model.model.layers), blocks=count, placement=placement)  # type: ignore[arg-type]
            insert_blocks(model, layout)
            freeze_base(model)
        return model

    def _saved(self) -> Path:
        """Return where the base lies on disk."""
        directory = Path(self.scratch.name, "base")
        if not directory.exists():
            self.base.save_pretrained(directory)
        return directory

    def ours(self, placement: str | None, *, quantised: bool = False) -> list[float]:
        """Train by deepen's loop; return seconds per step."""
        model = self.model(placement, quantised=quantised)
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        for parameter in parameters.values():
            parameter.data = parameter.data.float()
        optimizer = build_optimizer(parameters, betas=(0.9, 0.95), weight_decay=0.1)
        self._fit(model, parameters)
        seconds: list[float] = []
        hooks = Hooks(
            log=lambda report: seconds.append(report.seconds), evaluate=_nothing, save=_nothing, stop=bool
        )
        train(model, parameters, optimizer, self._batch_at, self._settings(), hooks)
        return seconds

    def _fit(self, model: LlamaForCausalLM, parameters: dict[str, torch.nn.Parameter]) -> None:
        """Choose what is computed again as `train.recompute: auto` does."""
        blocks = list(model.model.layers)
        tokens = torch.zeros(self.shape.windows, self.shape.length, dtype=torch.long, device=self.device)

        def forward() -> None:
            with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
                model.base_model(input_ids=tokens, use_cache=False)

        memory = measure_blocks(blocks, forward)
        budget = free_memory(self.device) - 12 * sum(p.numel() for p in parameters.values())
        recompute([blocks[index] for index in choose_blocks(memory, "auto", budget)])

    def _settings(self) -> Settings:
        return Settings(
            steps=self.steps,
            windows=self.shape.windows,
            micro_batch=self.shape.windows,
            learning_rate=1e-4,
            schedule="constant",
            warmup=0.0,
            final_learning_rate=1.0,
            clip=1.0,
            autocast=self.dtype if self.dtype != torch.float32 else None,
            evaluate_every=self.steps,
            checkpoint_every=self.steps,
        )

    def _batch_at(self, step: int, windows: int) -> Batch:
        tokens = self.batches[step].numpy()
        return Batch(tokens=tokens, sources=np.zeros(windows, dtype=np.int64))

    def trainer(self, model: Any, *, checkpointing: bool) -> list[float]:
        """Run `transformers.Trainer` on the same batches; return seconds per step."""
        timer = _Timer(self._now)
        arguments = TrainingArguments(
            output_dir=self.scratch.name,
            per_device_train_batch_size=self.shape.windows,
            max_steps=self.steps,
            learning_rate=1e-4,
            gradient_checkpointing=checkpointing,
            use_cpu=self.device.type == "cpu",
            bf16=self.dtype == torch.bfloat16,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        rows = self.batches.flatten(0, 1)[:, :-1]
        data = [{"input_ids": row, "labels": row} for row in rows]
        Trainer(model=model, args=arguments, train_dataset=data, callbacks=[timer]).train()
        return timer.seconds

    def lora(self, *, checkpointing: bool = False) -> list[float]:
        """Run peft's LoRA on all linear layers under the Trainer."""
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        return self.trainer(get_peft_model(self.model(), config), checkpointing=checkpointing)

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


class _Timer(TrainerCallback):  # type: ignore[misc]
    def __init__(self, now: Callable[[], float]) -> None:
        self.seconds: list[float] = []
        self._now, self._begin = now, 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._begin = self._now()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(self._now() - self._begin)


def contenders(bench: Bench) -> Iterator[tuple[str, Callable[[], list[float]]]]:
    """Name every way of training, and how to run it."""
    yield "deepen blocks, interleaved", lambda: bench.ours("interleaved")
    yield "deepen blocks, suffix", lambda: bench.ours("suffix")
    yield "deepen blocks, interleaved, 4-bit base", lambda: bench.ours("interleaved", quantised=True)
    yield "deepen blocks, suffix, 4-bit base", lambda: bench.ours("suffix", quantised=True)
    yield "deepen full", lambda: bench.ours(None)
    frozen = "Trainer, same blocks frozen"
    yield frozen, lambda: bench.trainer(bench.model("interleaved"), checkpointing=False)
    yield f"{frozen}, checkpointing", lambda: bench.trainer(bench.model("interleaved"), checkpointing=True)
    yield "Trainer full", lambda: bench.trainer(bench.model(), checkpointing=False)
    yield "Trainer + peft LoRA r16", bench.lora


def measure(bench: Bench, rounds: int) -> dict[str, dict[str, float]]:
    """Let the contenders take turns; return tokens per second by name, nothing of one that did not fit."""
    seconds: dict[str, list[float]] = {name: [] for name, _ in contenders(bench)}
    peaks: dict[str, float] = {}
    for turn in range(rounds):
        for name, run in contenders(bench):
            if bench.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            try:
                seconds[name] += run()[WARM:]
            except torch.OutOfMemoryError:
                print(f"  {turn + 1}/{rounds} {name}: out of memory", file=sys.stderr)
                continue
            finally:
                gc.collect()
                if bench.device.type == "cuda":
                    peaks[name] = torch.cuda.max_memory_allocated() / 1e9
                    torch.cuda.empty_cache()
            print(f"  {turn + 1}/{rounds} {name}: {seconds[name][-1]:.3f} s", file=sys.stderr)
    tokens = bench.shape.windows * bench.shape.length
    return {
        name: {
            "tokens_per_second": round(tokens / statistics.median(found), 1),
            "seconds_low": round(min(found), 4),
            "seconds_high": round(max(found), 4),
            **({"peak_gb": round(peaks[name], 2)} if peaks else {}),
        }
        for name, found in seconds.items()
        if found
    }


def compare(speed: dict[str, float]) -> dict[str, float]:
    """Return the ratios that are judged, of those contenders that fitted."""
    pairs = {
        "interleaved over the frozen Trainer with checkpointing": (
            speed.get("deepen blocks, interleaved"),
            speed.get("Trainer, same blocks frozen, checkpointing"),
        ),
        "suffix over full fine-tuning": (
            speed.get("deepen blocks, suffix"),
            max((speed[name] for name in ("deepen full", "Trainer full") if name in speed), default=None),
        ),
    }
    return {name: ours / theirs for name, (ours, theirs) in pairs.items() if ours and theirs}


def _nothing(_: int) -> None:
    """What is done when an evaluation or a checkpoint is due."""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    figures = measure(Bench(SHAPES[options.shape], options.device, options.steps), options.rounds)
    speed = {name: figure["tokens_per_second"] for name, figure in figures.items()}
    ratios = compare(speed)
    fast = all(ratio >= LIMITS[name] for name, ratio in ratios.items())
    record = {
        "benchmark": "train",
        "options": {k: v for k, v in vars(options).items() if k != "out"},
        "threads": torch.get_num_threads(),
        "figures": figures,
        "ratios": {name: round(ratio, 2) for name, ratio in ratios.items()},
        "passed": fast,
        "provenance": capture_provenance(seed=0, data={}).model_dump(mode="json"),
    }
    print(json.dumps(record, indent=1))
    if options.out:
        write_file(options.out, json.dumps(record, indent=1) + "\n")
    return 0 if fast else 1


if __name__ == "__main__":
    sys.exit(main())
