"""Other people's trainers: what they train is what is recorded, and the pack saved from there is it."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from test_model_insert import logits, plain
from tiny_run import sentences, write_base
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import Trainer, TrainerCallback, TrainingArguments
from trl.trainer import dpo_trainer

import deepen
from deepen.blocks import adopt
from deepen.checkpoint import Checkpoint
from deepen.errors import PackError, TrainingError
from deepen.methods.blocks import Blocks
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
    return seen["model"].cpu().eval()


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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_preference_example(tmp_path, monkeypatch, dtype):
    """What the reference says is what the base from disk says, to the bit, and no second model is loaded."""
    base, out = write_base(tmp_path / "base", dtype=dtype), tmp_path / "out"
    rows = [{"prompt": t[:20], "chosen": t[20:60], "rejected": t[59:19:-1]} for t in sentences(3, 16)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    compute, step = dpo_trainer.DPOTrainer.compute_ref_log_probs, dpo_trainer.DPOTrainer.training_step
    from_disk, margins, references = plain(base, dtype), [], []
    dpo_trainer.add_fused_lm_head(from_disk)

    def computed(self, model, inputs):
        found = compute(self, model, inputs)
        assert len(model.model.layers) == len(from_disk.model.layers)
        references.append((found, compute(self, from_disk, inputs)))
        return found

    def stepped(self, *args, **kwargs):
        loss = step(self, *args, **kwargs)
        margins.append(self._metrics["train"]["rewards/margins"][-1])
        return loss

    monkeypatch.setattr(dpo_trainer.DPOTrainer, "compute_ref_log_probs", computed)
    monkeypatch.setattr(dpo_trainer.DPOTrainer, "training_step", stepped)
    monkeypatch.setattr(dpo_trainer, "create_model_from_path", lambda *_, **__: pytest.fail("a second model"))
    options = ("--length", 96, "--steps", 6, "--rate", 5e-3)
    model = run_example("dpo.py", monkeypatch, base, tmp_path / "rows.jsonl", out, *options)
    check_example(model, base, out)
    assert len(references) == 2
    for ours, theirs in references:
        assert all(torch.equal(*pair) for pair in zip(ours, theirs, strict=True))
    # Before the first step model and reference are one.
    assert margins[0] == 0
    assert margins[-1] > 0.1


# --- what a pack could not hold, or would not be trained, is refused before the first step


def thaw(name):
    return lambda model: model.get_parameter(name).requires_grad_(True)


def freeze_one(model):
    model.model.layers[2].mlp.up_proj.weight.requires_grad_(False)


def add_lora(model):
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))


def narrowed(model):
    model.to(torch.bfloat16)


def base_narrowed(model):
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()


def marked_by_deepspeed(model):
    model.model.norm.weight.ds_id = 0  # as ZeRO-3 does with what it takes apart


REENTRANT = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}}
UNSAID = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"preserve_rng_state": True}}
REFUSED = {
    "the head": (thaw("lm_head.weight"), {}, "'lm_head.weight' is trainable but part of no new block"),
    "a base block": (thaw("model.layers.3.mlp.up_proj.weight"), {}, r"'model\.layers\.3\.mlp\.up_proj"),
    "all of it": (
        lambda model: model.requires_grad_(True),
        {},
        r"'model\.embed_tokens\.weight' is trainable",
    ),
    "half a block": (freeze_one, {}, r"'model\.layers\.2\.mlp\.up_proj\.weight' is frozen but part of a new"),
    "an adapter": (add_lora, {}, r"q_proj\.(base_layer|lora_A)"),
    "bf16 blocks": (narrowed, {"bf16": True}, "is bfloat16: steps smaller than its own are lost"),
    "no autocast": (base_narrowed, {}, "the new blocks are float32, the base is bfloat16"),
    "reentrant": (lambda _: None, REENTRANT, "reentrant"),
    "reentrant by default": (lambda _: None, UNSAID, "reentrant"),
    "ZeRO-3": (marked_by_deepspeed, {}, r"'model\.norm\.weight' is sharded \(FSDP or ZeRO-3\)"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(tiny_llama, tmp_path, case):
    change, options, words = REFUSED[case]
    model = expanded(tiny_llama())
    change(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(TrainingError, match=words) as caught:
        trainer(model, tmp_path / "out", **options).train()
    assert str(caught.value).count("\n") == 1
    assert not list((tmp_path / "out").glob("**/blocks"))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_peft_around_the_model_is_refused(tiny_llama, tmp_path):
    model = get_peft_model(expanded(tiny_llama()), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(TrainingError, match=r"trains a PeftModel, .*\nleave out peft_config"):
        trainer(model, tmp_path / "out").train()


def test_an_optimizer_made_too_early_is_refused(tiny_llama, tmp_path):
    model = plain(tiny_llama())
    optimizer = torch.optim.AdamW(model.parameters())
    deepen.insert_blocks(model, deepen.plan_layout(4, blocks=1))
    deepen.freeze_base(model)
    with pytest.raises(TrainingError, match=r"the optimizer does not hold parameter 'model\.layers\.4"):
        trainer(model, tmp_path / "out", optimizers=(optimizer, None)).train()


def test_a_model_without_new_blocks_is_refused(tiny_llama, tmp_path):
    with pytest.raises(PackError, match="no record of new blocks"):
        trainer(plain(tiny_llama()), tmp_path / "out").train()


def test_a_sharded_model_is_refused(tiny_llama, tmp_path):
    model = expanded(tiny_llama())
    running = trainer(model, tmp_path / "out")
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(TrainingError, match=r"embed_tokens\.weight' is sharded"):
            deepen.SaveBlocks().on_train_begin(running.args, running.state, running.control, model=model)
    finally:
        distributed.destroy_process_group()


@pytest.mark.parametrize("strategy", ["steps", "no"])
def test_what_thaws_on_the_way_is_not_saved(tiny_llama, tmp_path, strategy):
    model = expanded(tiny_llama())
    running = trainer(model, tmp_path, At(1, thaw("model.norm.weight")), save_strategy=strategy)
    with pytest.raises(TrainingError, match=r"'model\.norm\.weight' is trainable"):
        running.train()
    saved = [path.relative_to(tmp_path).as_posix() for path in tmp_path.glob("**/blocks")]
    assert saved == (["checkpoint-1/blocks"] if strategy == "steps" else [])


# --- what is saved


def test_the_pack_is_what_our_own_loop_saves(tiny_llama, tmp_path):
    base = tiny_llama(dtype="bfloat16")
    model = expanded(base)
    trainer(model, tmp_path / "out", bf16=True).train()
    assert_base_unmoved(model, base)
    Blocks().save(model, tmp_path / "run", Checkpoint.open(base))
    same_files(tmp_path / "out" / "blocks", tmp_path / "run" / "blocks")
    same_files(tmp_path / "out" / "blocks", tmp_path / "out" / "checkpoint-2" / "blocks")
    assert {t.dtype for t in load_file(tmp_path / "out/blocks/blocks.safetensors").values()} == {
        torch.bfloat16
    }


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_resumed_is_as_if_never_stopped(tiny_llama, tmp_path, dtype):
    base = tiny_llama(dtype=dtype)
    options = {"max_steps": 4, "save_steps": 2, "bf16": dtype == "bfloat16"}
    trainer(expanded(base), tmp_path / "one", **options).train()
    again = trainer(expanded(base), tmp_path / "two", **options)
    again.train(resume_from_checkpoint=str(tmp_path / "one" / "checkpoint-2"))
    assert again.state.global_step == 4
    same_files(tmp_path / "one" / "blocks", tmp_path / "two" / "blocks")
    first = tmp_path / "one" / "checkpoint-2" / "blocks" / "blocks.safetensors"
    assert first.read_bytes() != (tmp_path / "one" / "blocks" / "blocks.safetensors").read_bytes()


def test_the_best_is_saved_at_the_end(tiny_llama, tmp_path):
    # The highest loss counts as the best here, which is not the last.
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    running = trainer(
        expanded(tiny_llama()), tmp_path, max_steps=3, eval_strategy="steps", eval_steps=1, **best
    )
    running.train()
    step = running.state.best_global_step
    assert step < 3
    same_files(tmp_path / "blocks", tmp_path / f"checkpoint-{step}" / "blocks")
    packs = [(tmp_path / p / "blocks.safetensors").read_bytes() for p in ("blocks", "checkpoint-3/blocks")]
    assert packs[0] != packs[1]


def test_checkpointing_runs_nothing_backwards_below_the_first_new_block(tiny_llama, tmp_path):
    base, needed = tiny_llama(), []
    for name, checkpointing in (("without", False), ("with", True)):
        model = expanded(base, blocks=2, placement="suffix")
        model.model.layers[3].register_forward_hook(lambda _, __, out: needed.append(out.requires_grad))
        trainer(model, tmp_path / name, activation_checkpointing=checkpointing).train()
    assert needed
    assert not any(needed)
    same_files(tmp_path / "with" / "blocks", tmp_path / "without" / "blocks")


def test_a_model_saved_whole_gives_the_same_pack(tiny_llama, tmp_path):
    # What is left to who trains without the callback, as under ZeRO-3.
    base = tiny_llama()
    running = trainer(expanded(base), tmp_path / "out")
    running.train()
    running.save_model(str(tmp_path / "whole"))
    adopt(tmp_path / "whole", base)
    deepen.extract_pack(tmp_path / "whole", tmp_path / "pack")
    ours, theirs = (load_file(d / "blocks.safetensors") for d in (tmp_path / "out/blocks", tmp_path / "pack"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
