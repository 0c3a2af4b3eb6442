"""A base in 4 or 8 bits: identity against it, new blocks from the files, packs for the unquantised base.

The oracles are bitsandbytes' own dequantisation and transformers' own quantised loading.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from family_table import LINES
from safetensors.torch import load_file
from test_sft import tuning, write_talk
from tiny_run import write_base, write_recipe
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import deepen
from deepen.config import load_recipe, parse_recipe
from deepen.errors import CheckFailed, CheckpointError, FamilyError, Interrupted, RecipeError, TrainingError
from deepen.model import base_names, load_quantised, packed_fingerprint, packed_layers, probe_logits
from deepen.model import quantised as quantised_module
from deepen.pipeline import training
from deepen.pipeline.run import run_recipe
from deepen.pipeline.subject import find_subject
from deepen.records import RunResult, read_record
from deepen.training import optimizer as optimizer_module
from deepen.training.optimizer import build_optimizer, optimizer_tensors, restore_optimizer

pytest.importorskip("bitsandbytes")

SIZES = {"hidden_size": 64, "intermediate_size": 128}
CPU = torch.device("cpu")
FP32 = torch.float32
TOKENS = torch.randint(290, (2, 17), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return write_base(tmp_path_factory.mktemp("quantised") / "base", dtype="bfloat16", bias=True, **SIZES)


def packed(base, quantisation="4bit"):
    return load_quantised(base, quantisation, dtype=FP32, device=CPU)


def logits(model):
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def dequantised(base, quantisation="4bit"):
    """The base with the values that its packed matrices stand for, by bitsandbytes."""
    return packed(base, quantisation).dequantize(dtype=FP32)


@pytest.mark.parametrize(
    ("quantisation", "options"),
    [
        (
            "4bit",
            {
                "load_in_4bit": True,
                "bnb_4bit_quant_type": "nf4",
                "bnb_4bit_use_double_quant": True,
                "bnb_4bit_compute_dtype": FP32,
            },
        ),
        ("8bit", {"load_in_8bit": True}),
    ],
)
def test_what_is_loaded_is_what_transformers_loads(base, quantisation, options):
    config = BitsAndBytesConfig(llm_int8_skip_modules=["lm_head"], **options)
    theirs = AutoModelForCausalLM.from_pretrained(
        base, quantization_config=config, dtype=FP32, device_map="cpu"
    )
    for layer in packed_layers(theirs).values():
        layer.support_avx512bf16_for_cpu = False
    ours = packed(base, quantisation)
    assert torch.equal(logits(ours), logits(theirs))
    assert all(".layers." in name for name in packed_layers(ours))
    assert len(packed_layers(ours)) == 3 * 7
    assert type(ours.lm_head) is torch.nn.Linear


@pytest.mark.parametrize("zero", ["reads", "norms"])
def test_something_else_is_zero_in_blocks_from_the_files(base, zero):
    model = packed(base)
    before = logits(model)
    deepen.insert_blocks(model, deepen.plan_layout(3, after=[1], zero=zero))
    assert torch.equal(logits(model), before)
    held = {name for name, tensor in deepen.model.new_tensors(model).items() if not tensor.any()}
    assert held >= deepen.expansion_of(model).new_blocks[0].filled.keys()
    assert held.isdisjoint(
        {f"model.layers.2.{name}" for name in ("self_attn.o_proj.weight", "mlp.down_proj.weight")}
    )


@pytest.mark.parametrize("quantisation", ["4bit", "8bit"])
def test_new_blocks_are_what_the_files_hold_and_change_nothing(base, quantisation):
    model = packed(base, quantisation)
    before = probe_logits(model)
    deepen.insert_blocks(model, deepen.plan_layout(3, after=[0, 2]))
    assert all(torch.equal(value, before[key]) for key, value in probe_logits(model).items())
    with deepen.bypass(model):
        assert torch.equal(logits(model), logits(packed(base, quantisation)))

    files, state = load_file(base / "model.safetensors"), model.state_dict()
    for new, origin in ((1, 0), (4, 2)):
        for name, tensor in files.items():
            if not name.startswith(f"model.layers.{origin}."):
                continue
            held = state[name.replace(f".{origin}.", f".{new}.", 1)]
            written = "o_proj" in name or "down_proj" in name
            assert torch.equal(held, torch.zeros_like(held) if written else tensor.to(FP32)), name
    rounded = dequantised(base, quantisation).state_dict()["model.layers.0.mlp.up_proj.weight"]
    assert not torch.equal(rounded, state["model.layers.1.mlp.up_proj.weight"])


@pytest.mark.slow
@pytest.mark.parametrize("line", LINES, ids=lambda line: line.name)
def test_every_family_is_expanded_on_a_packed_base(line, tmp_path):
    base = line.write(tmp_path / "base")
    layout = deepen.plan_layout(line.depth, **line.placed)
    full = deepen.insert_blocks(deepen.load(base, dtype=FP32), layout)
    model = packed(base)
    before = probe_logits(model)
    deepen.insert_blocks(model, layout)
    assert all(torch.equal(value, before[key]) for key, value in probe_logits(model).items())
    new, wanted = deepen.model.new_tensors(model), deepen.model.new_tensors(full)
    assert new.keys() == wanted.keys()
    assert all(torch.equal(new[name], wanted[name]) for name in new)
    assert deepen.model.expansion_of(model).portable == deepen.model.expansion_of(full).portable


def test_a_pack_goes_onto_either_base(base, tmp_path):
    model = packed(base)
    deepen.insert_blocks(model, deepen.plan_layout(3, after=[1]))
    with torch.no_grad():
        for name, parameter in deepen.freeze_base(model).items():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
            assert ".layers.2." in name
    deepen.save_blocks(model, tmp_path / "pack", dtypes={})
    full = deepen.load(base, tmp_path / "pack", dtype=FP32)
    for name, tensor in deepen.model.new_tensors(model).items():
        assert torch.equal(full.state_dict()[name], tensor)
    again = deepen.attach(packed(base), tmp_path / "pack")
    assert torch.equal(logits(again), logits(model))
    assert not torch.equal(logits(again), logits(full))


def test_a_base_that_is_quantised_on_disk_cannot_be_expanded(base, tmp_path):
    packed(base).save_pretrained(tmp_path / "packed")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", device_map="cpu")
    with pytest.raises(FamilyError, match="load it from unquantised files"):
        deepen.insert_blocks(model, deepen.plan_layout(3, blocks=1))
    with pytest.raises(CheckpointError, match="is quantised already"):
        packed(tmp_path / "packed")


# For runs whose losses are not looked at closely.
SHORT = {"train__tokens": 2 * 128, "evaluate__max_tokens": 400}
SETTINGS = {"train__quantise": "4bit", "train__optimizer": "adamw_8bit"}


@pytest.fixture(scope="module")
def finished(base):
    """A finished run on the base in 4 bits."""
    root = base.parent
    recipe = load_recipe(write_recipe(root, **SETTINGS))
    return root, run_recipe(recipe)


def losses(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def evaluated(root, model, base=None, length=32):
    """Mean loss on the held-out text, window by window as the run cuts it."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base or root / "base")
    summed, count = 0.0, 0
    for line in (root / "heldout.jsonl").read_text().splitlines():
        ids = torch.tensor(tokenizer(json.loads(line)["text"])["input_ids"])
        for start in range(0, len(ids) - 1, length):
            window = ids[start : start + length + 1][None]
            with torch.no_grad():
                summed += model(input_ids=window, labels=window).loss.item() * (window.shape[1] - 1)
            count += window.shape[1] - 1
    return summed / count


def test_a_run_learns_and_records_what_quantisation_cost(base, finished):
    root, result = finished
    curve = losses(root / "run")
    assert curve[-1] < curve[0] - 0.2
    assert result.identity.identical
    assert result.quantisation.bits == 4
    assert result.quantisation.layers == 21
    assert result.quantisation.unchanged
    found = {each.task: each for each in result.quantisation.losses}["heldout"]
    full = AutoModelForCausalLM.from_pretrained(base, dtype=FP32)
    trained = deepen.load(base, root / "run" / "blocks", dtype=FP32)
    assert found.base == pytest.approx(evaluated(root, full), abs=1e-5)
    assert found.base_quantised == pytest.approx(evaluated(root, dequantised(base)), abs=1e-5)
    assert found.trained == pytest.approx(evaluated(root, trained), abs=1e-5)
    on_packed = deepen.attach(packed(base), root / "run" / "blocks")
    assert found.trained_quantised == pytest.approx(evaluated(root, on_packed), abs=1e-5)
    assert len({found.base, found.base_quantised, found.trained, found.trained_quantised}) == 4


def test_the_pages_say_so(finished):
    root, _ = finished
    page, card = ((root / "run" / name).read_text() for name in ("report.html", "README.md"))
    assert "The quantised base, to the bit, before training" in page
    assert "equal to the quantised base to the bit" in card
    for text in (page, card):
        assert "linear layers were held in 4 bits, unchanged" in text
        assert "in full precision; trained" in text


def test_the_audit_counts_what_was_not_quantised(base, finished):
    _, result = finished
    names = load_file(base / "model.safetensors")
    plain = [n for n in names if "layers" not in n or n.endswith("norm.weight")]
    assert result.audit.tensors == len(plain)
    assert result.quantisation.before == packed_fingerprint(renamed_as_trained(base))


def renamed_as_trained(base):
    model = packed(base)
    return deepen.insert_blocks(model, deepen.plan_layout(3, blocks=2))


def stop_after(steps, recipe, monkeypatch):
    train = training.train

    def asked(*args, **kwargs):
        *rest, hooks = args
        done = []
        log = hooks.log
        stopping = replace(
            hooks, log=lambda report: (done.append(report), log(report)), stop=lambda: len(done) == steps
        )
        train(*rest, stopping, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(training, "train", asked)
        with pytest.raises(Interrupted):
            run_recipe(recipe)


def test_a_resumed_run_ends_bit_identical(base, finished, monkeypatch):
    root, _ = finished
    recipe = load_recipe(root / "recipe.yaml", [f"output={root}/resumed"])
    stop_after(3, recipe, monkeypatch)
    run_recipe(recipe, resume=True)
    for place in ("blocks/blocks.safetensors", "checkpoints/step-6/optimizer.safetensors"):
        assert (root / "resumed" / place).read_bytes() == (root / "run" / place).read_bytes(), place
    state = load_file(root / "run" / "checkpoints" / "step-6" / "optimizer.safetensors")
    moments = {key.rpartition("/")[2]: t.dtype for key, t in state.items() if "up_proj.weight" in key}
    assert moments["state1"] == moments["state2"] == torch.uint8
    assert {"absmax1", "absmax2", "qmap1", "qmap2", "step"} <= moments.keys()


@pytest.mark.slow
def test_two_replicas_do_what_one_process_does(finished):
    root, result = finished
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    changes = ["--set", "train.micro_batch=1", "--set", f"output={root}/replicas"]
    done = subprocess.run(
        [*launch, "-m", "deepen", "run", str(root / "recipe.yaml"), *changes],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    # Moments of 8 bits round, so what differs in the last bit may come out a step apart.
    assert losses(root / "replicas") == pytest.approx(losses(root / "run"), abs=1e-3)
    ours = read_record(root / "replicas" / "result.json", RunResult).quantisation
    assert (ours.before, ours.after) == (result.quantisation.before, result.quantisation.after)
    assert [each.base for each in ours.losses] == pytest.approx(
        [each.base for each in result.quantisation.losses], abs=1e-5
    )


def test_a_packed_layer_that_moves_is_found(base, tmp_path, monkeypatch):
    recipe = load_recipe(write_recipe(tmp_path, base=str(base), train__quantise="8bit", **SHORT))
    train = training.train

    def meddling(model, *rest, **kwargs):
        train(model, *rest, **kwargs)
        layer = next(iter(packed_layers(model).values()))
        layer.weight.data[0, 0] += 1

    monkeypatch.setattr(training, "train", meddling)
    with pytest.raises(CheckFailed, match="a quantised layer changed during training"):
        run_recipe(recipe)


@pytest.mark.parametrize(("method", "quantisation"), [("lora", "4bit"), ("lora", "8bit"), ("prompt", "4bit")])
def test_adapters_train_on_a_packed_base(base, tmp_path, method, quantisation):
    changes = {"train__method": method, "train__quantise": quantisation, "expand": None, **SHORT}
    result = run_recipe(load_recipe(write_recipe(tmp_path, base=str(base), **changes)))
    assert result.quantisation.bits == int(quantisation[0])
    for each in result.quantisation.losses:
        assert each.trained != each.base
        assert each.trained_quantised != each.base_quantised
    assert result.audit.unchanged


@pytest.mark.parametrize(
    ("way", "quantisation"), [("new", "4bit"), pytest.param("lora", "8bit", marks=pytest.mark.slow)]
)
def test_conversations_are_tuned_on_a_packed_base(base, finished, tmp_path, way, quantisation):
    pack = finished[0] / "run" / "blocks"
    changes = {"base": str(base), "pack": str(pack), "output": str(tmp_path / "run")}
    recipe = tuning(tmp_path, way, on_pack=False, sft__quantise=quantisation, **changes)
    result = run_recipe(load_recipe(recipe))
    assert (result.quantisation.bits, result.quantisation.layers) == (int(quantisation[0]), 21)
    assert result.audit.unchanged
    found = {each.task: each for each in result.quantisation.losses}
    assert found["talk-heldout"].trained < found["talk-heldout"].base - 0.1
    # The base is the base without its pack, and what was tuned goes onto the unquantised one.
    full = AutoModelForCausalLM.from_pretrained(base, dtype=FP32)
    assert found["heldout"].base == pytest.approx(evaluated(tmp_path, full, base, 64), abs=1e-5)
    tuned = find_subject(str(tmp_path / "run")).model.load(CPU).float()
    assert found["heldout"].trained == pytest.approx(evaluated(tmp_path, tuned, base, 64), abs=5e-3)


@pytest.mark.slow
def test_a_packed_base_is_trained_then_tuned(base, tmp_path):
    sft = write_talk(tmp_path) | {"trainable": "new", "epochs": 0.2, "evaluate_every": None}
    changes = {"base": str(base), "train__quantise": "8bit", "sft": sft, **SHORT}
    recipe = load_recipe(write_recipe(tmp_path, **changes))
    assert recipe.sft.quantise == "8bit"
    trained = run_recipe(recipe)
    tuned = read_record(tmp_path / "run" / "sft" / "result.json", RunResult)
    assert tuned.quantisation.before == trained.quantisation.before
    assert tuned.audit.before == trained.audit.before


RECIPE = """
base: base
output: out
data: {sequence_length: 16, sources: [{path: a.txt}]}
train: {method: full, tokens: 100, batch_tokens: 32, learning_rate: 1e-2}
"""


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["train.quantise=4bit"], r"\(blocks, lora, prompt\), not for full"),
        (["train.quantise=8bit", "train.method=moe"], "not for moe"),
        (["train.method=lora", "train.quantise=4bit", "train.parallel=fsdp"], "cannot be cut over devices"),
        (["train.optimizer=adamw_8bit", "train.parallel=fsdp"], "adamw_8bit: its state cannot be cut"),
        (["train.method=lora", "train.quantise=4bit", "merge=true"], "merge it into the unquantised base"),
        (["train.quantise=2bit"], "train.quantise"),
    ],
)
def test_what_does_not_go_together_is_said(settings, said):
    with pytest.raises(RecipeError, match=said):
        parse_recipe(RECIPE, settings)


def test_missing_packages_are_named(base, tmp_path, monkeypatch):
    for module in (quantised_module, optimizer_module):
        monkeypatch.setattr(module, "find_spec", lambda name: None)
    for setting, said in (
        ("quantise=4bit", "needs bitsandbytes"),
        ("optimizer=adamw_8bit", "8bit needs"),
    ):
        recipe = load_recipe(write_recipe(tmp_path, base=str(base)), [f"train.{setting}"])
        with pytest.raises(TrainingError, match=said):
            run_recipe(recipe)
        assert not (tmp_path / "run").exists()


def test_eight_bit_moments_go_on_from_where_they_were():
    """Against an optimiser of bitsandbytes that was never stopped."""
    from bitsandbytes.optim import AdamW8bit

    begin = torch.randn(64, 80, generator=torch.Generator().manual_seed(2))
    gradients = [torch.randn(64, 80, generator=torch.Generator().manual_seed(i)) for i in range(6)]

    def steps(parameter, optimizer, some):
        for group in optimizer.param_groups:
            group["lr"] = 0.01
        for gradient in some:
            parameter.grad = gradient.clone()
            optimizer.step()

    theirs = torch.nn.Parameter(begin.clone())
    steps(theirs, AdamW8bit([theirs], betas=(0.9, 0.95), weight_decay=0.1), gradients)

    def ours(parameter):
        return build_optimizer({"w": parameter}, betas=(0.9, 0.95), weight_decay=0.1, kind="adamw_8bit")

    first = torch.nn.Parameter(begin.clone())
    stopped = ours(first)
    steps(first, stopped, gradients[:3])
    second = torch.nn.Parameter(first.detach().clone())
    resumed = ours(second)
    saved = {name: tensor.clone() for name, tensor in optimizer_tensors(stopped, {"w": first}).items()}
    restore_optimizer(resumed, {"w": second}, saved.items())
    steps(second, resumed, gradients[3:])
    assert torch.equal(second, theirs)


def test_a_plain_model_has_nothing_packed(base):
    model = deepen.load(base)
    assert not packed_layers(model)
    assert base_names(model, packed=False) == base_names(model)
