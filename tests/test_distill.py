"""Learning another model's predictions: the loss against torch's, runs, and what is refused."""

import json
import shutil
from contextlib import nullcontext

import pytest
import torch
from conftest import write_tiny_llama
from safetensors.torch import load_file
from test_anchor import checkpoint as checkpoint  # the fixture
from test_anchor import expanded, gradients, oracle, steps_of, windows
from tiny_run import write_base, write_recipe
from torch.nn import functional
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from deepen.cli import main
from deepen.config import load_recipe
from deepen.errors import Interrupted, RecipeError, TrainingError
from deepen.pipeline import training
from deepen.pipeline.plan import plan_run
from deepen.pipeline.run import run_recipe
from deepen.training import loss as loss_module
from deepen.training.anchor import anchor_loss
from deepen.training.loss import IGNORED


def student(checkpoint, seed=2):
    """A model of the base's size that has moved away from it."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.train(), dict(model.named_parameters())


@pytest.mark.parametrize("likelihood", [0.0, 0.3])
def test_the_loss_and_its_gradient_are_those_of_whole_logits(checkpoint, likelihood, monkeypatch):
    monkeypatch.setattr(loss_module, "_MOST_LOGITS", 5 * 96 * 3 * 2)  # two positions at a time
    teacher = expanded(checkpoint)[0].eval().requires_grad_(False)
    model, parameters = student(checkpoint)
    inputs, targets = windows()
    found = anchor_loss(lambda _: nullcontext(teacher), likelihood=likelihood)(model, inputs, targets)
    logits = model(input_ids=inputs, use_cache=False).logits.double()
    nll = functional.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum"
    )
    wanted = oracle(model, teacher, inputs, targets) + likelihood * nll
    assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(gradients(found, parameters), gradients(wanted, parameters), strict=True):
        assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def test_nothing_is_to_be_learned_from_oneself(checkpoint):
    model, parameters = student(checkpoint)
    twin = student(checkpoint)[0].eval().requires_grad_(False)
    found = anchor_loss(lambda _: nullcontext(twin))(model, *windows())
    assert found.item() == pytest.approx(0, abs=1e-5)
    assert all(gradient.abs().max() < 1e-5 for gradient in gradients(found, parameters))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A run of new blocks, to learn from."""
    root = tmp_path_factory.mktemp("distill")
    write_base(root / "base")
    run_recipe(recipe_at(root, "taught", train__learning_rate=3e-2))
    return root


def recipe_at(root, name, **changes):
    return load_recipe(write_recipe(root, output=str(root / name), **changes))


def distilled_at(root, name, teacher="taught", **changes):
    plain = {"train__method": "full", "expand": None}
    return recipe_at(root, name, **plain, train__teacher=str(root / teacher), **changes)


@pytest.fixture(scope="module")
def distilled(root):
    run_recipe(distilled_at(root, "small", train__tokens=12 * 128))
    return root


def test_a_base_learns_from_the_expanded_model(distilled):
    root = distilled
    steps = steps_of(root / "small")
    assert 0 < steps[-1]["loss"] < steps[0]["loss"] / 2
    for page in ("report.html", "README.md"):
        assert str(root / "taught") in (root / "small" / page).read_text()
    base, small = (load_file(root / name / "model.safetensors") for name in ("base", "small/model"))
    assert {name: tensor.shape for name, tensor in small.items()} == {
        name: tensor.shape for name, tensor in base.items()
    }
    losses = {}
    for name in ("taught", "small"):
        record = json.loads((root / name / "evaluation" / "heldout.json").read_text())
        losses[name] = {m["task"]: m for m in record["metrics"] if m["metric"] == "nats_per_token"}
    taught, small = losses["taught"]["heldout"], losses["small"]["heldout"]
    assert small["value"] < (taught["value"] + taught["base_value"]) / 2


def test_run_pack_and_merged_model_teach_the_same(distilled):
    root = distilled
    pack = root / "taught" / "blocks"
    assert main(["blocks", "merge", str(root / "base"), str(pack), str(root / "merged")]) == 0
    firsts = [steps_of(root / "small")[0]["loss"]]
    for number, teacher in enumerate(("taught/blocks", "merged")):
        run_recipe(distilled_at(root, f"same{number}", teacher, train__tokens=128))
        firsts.append(steps_of(root / f"same{number}")[0]["loss"])
    assert firsts[0] == firsts[1] == firsts[2] > 0


def test_a_resumed_run_ends_at_the_same_bits(root, monkeypatch):
    changes = {"train__teacher": {"model": str(root / "taught"), "cross_entropy": 0.5}}
    plain = {"train__method": "full", "expand": None}
    run_recipe(recipe_at(root, "whole", **plain, **changes))
    kept = training.save_checkpoint

    def interrupted(where, step, *args, **kwargs):
        kept(where, step, *args, **kwargs)
        if step == 4:
            raise Interrupted("here")

    monkeypatch.setattr(training, "save_checkpoint", interrupted)
    cut = recipe_at(root, "cut", **plain, **changes)
    with pytest.raises(Interrupted):
        run_recipe(cut)
    monkeypatch.undo()
    run_recipe(cut, resume=True)
    whole, other = ((root / name / "model" / "model.safetensors").read_bytes() for name in ("whole", "cut"))
    assert whole == other
    assert [line["loss"] for line in steps_of(root / "whole")] == [
        line["loss"] for line in steps_of(root / "cut")
    ]


def test_a_dry_run_names_the_teacher(root, capsys):
    distilled_at(root, "dry")
    assert main(["run", str(root / "recipe.yaml"), "--dry-run"]) == 0
    assert "teacher     " in capsys.readouterr().out


def other_words(root):
    write_tiny_llama(root / "words", blocks=3, tied=True, vocab_size=300)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (root / "words" / name).write_bytes((root / "base" / name).read_bytes())
    return "words"


def other_tokenizer(root):
    write_base(root / "tokens")
    path = root / "tokens" / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["merges"].pop()
    path.write_text(json.dumps(content))
    return "tokens"


def adapter(root):
    (root / "adapter").mkdir()
    config = {"peft_type": "LORA", "base_model_name_or_path": str(root / "base"), "task_type": "CAUSAL_LM"}
    (root / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    return "adapter"


REFUSALS = [
    (other_words, "predicts 300 words"),
    (other_tokenizer, "its tokenizer is not that of"),
    pytest.param(adapter, "is an adapter; merge it", marks=pytest.mark.slow),  # peft is imported
    (lambda root: "nowhere", "train.teacher"),
]


@pytest.mark.parametrize(("make", "words"), REFUSALS, ids=["words", "tokenizer", "adapter", "missing"])
def test_what_cannot_teach(root, make, words):
    with pytest.raises(RecipeError, match=words):
        plan_run(distilled_at(root, "refused", make(root)))


@pytest.mark.parametrize(("key", "value"), [("parallel", "fsdp"), ("loss", "liger")])
def test_what_does_not_go_together(root, key, value):
    with pytest.raises(RecipeError, match=f"teacher.*{value}|teacher.*ddp"):
        distilled_at(root, "refused", **{f"train__{key}": value})


def test_a_teacher_has_to_see_whole_windows(root):
    shutil.copytree(root / "base", root / "short")
    path = root / "short" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"max_position_embeddings": 16}))
    with pytest.raises(TrainingError, match="has 16 positions"):
        run_recipe(distilled_at(root, "refused", "short"))
    assert not (root / "refused").exists()
