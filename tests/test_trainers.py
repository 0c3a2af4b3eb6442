"""Other people's trainers: what they train is what is recorded, and the pack saved from there is it."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_model_insert import logits, plain
from tiny_run import sentences, write_base
from transformers import Trainer, TrainerCallback, TrainingArguments

import deepen
from deepen.model import new_parameters

EXAMPLES = Path(__file__).parents[1] / "examples"


def expanded(base, dtype="auto", **placed):
    """A model ready to train, as the examples make it."""
    model = plain(base, dtype)
    deepen.insert_blocks(model, deepen.plan_layout(len(model.model.layers), **(placed or {"blocks": 2})))
    for parameter in deepen.freeze_base(model).values():
        parameter.data = parameter.data.float()
    return model


def trainer(model, out, *callbacks, save=True, optimizers=(None, None), **options):
    """A trainer of the model for two steps on CPU."""
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(3, model.config.vocab_size, (24,), generator=generator) for _ in range(16)]
    defaults = {"max_steps": 2, "save_steps": 1, "learning_rate": 1e-2}
    arguments = TrainingArguments(
        output_dir=str(out), use_cpu=True, report_to=[], disable_tqdm=True, **defaults | options
    )
    data = [{"input_ids": row, "labels": row} for row in rows]
    chosen = [deepen.SaveBlocks(), *callbacks] if save else [*callbacks]
    return Trainer(
        model=model,
        args=arguments,
        train_dataset=data,
        eval_dataset=data[:2],
        callbacks=chosen,
        optimizers=optimizers,
    )


class At(TrainerCallback):
    """Does something to the model at one step."""

    def __init__(self, step, change):
        self.step, self.change = step, change

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.change(kwargs["model"])


def assert_base_unmoved(model, base):
    """Every base tensor of the trained model has the bytes of its file."""
    files, live = load_file(base / "model.safetensors"), model.state_dict()
    layout = deepen.expansion_of(model).layout
    for index, place in enumerate(layout.base_positions):
        for name in [name for name in files if name.startswith(f"model.layers.{index}.")]:
            inside = name.removeprefix(f"model.layers.{index}.")
            held = live[f"model.layers.{place}.{inside}"]
            assert torch.equal(held.view(torch.uint8), files[name].view(torch.uint8)), name
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"):
        if name in files:
            assert torch.equal(live[name].view(torch.uint8), files[name].view(torch.uint8))


def same_files(one, other):
    assert sorted(p.name for p in one.iterdir()) == sorted(p.name for p in other.iterdir())
    assert all((one / p.name).read_bytes() == p.read_bytes() for p in other.iterdir())


def run_example(name, monkeypatch, *arguments):
    """Run an example as a user does, on a CPU and without progress bars; return the model it trained."""
    seen = {}
    begin = deepen.SaveBlocks.on_train_begin

    def noted(self, args, state, control, **kwargs):
        seen["model"] = kwargs["model"]
        begin(self, args, state, control, **kwargs)

    monkeypatch.setattr(deepen.SaveBlocks, "on_train_begin", noted)
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return seen["model"].eval()


def check_example(model, base, out):
    assert_base_unmoved(model, base)
    again = deepen.load(base, out / "blocks")
    with torch.no_grad():
        for parameter in new_parameters(model).values():
            parameter.data = parameter.data.to(again.dtype)  # what is evaluated is what was saved
    assert torch.equal(logits(again), logits(model))
    assert not torch.equal(logits(again), logits(plain(base)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_trainer_example(tmp_path, monkeypatch, dtype):
    base, out = write_base(tmp_path / "base", dtype=dtype), tmp_path / "out"
    (tmp_path / "text.txt").write_text("\n".join(sentences(3, 20)))
    options = ("--length", 32, "--steps", 2)
    model = run_example("trainer.py", monkeypatch, base, tmp_path / "text.txt", out, *options)
    check_example(model, base, out)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_sft_example(tmp_path, monkeypatch, dtype):
    base, out = write_base(tmp_path / "base", dtype=dtype), tmp_path / "out"
    rows = [{"prompt": text[:30], "completion": text[30:90]} for text in sentences(3, 20)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ("--length", 48, "--steps", 2)
    model = run_example("sft_trainer.py", monkeypatch, base, tmp_path / "rows.jsonl", out, *options)
    check_example(model, base, out)
