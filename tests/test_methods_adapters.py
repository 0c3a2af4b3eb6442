"""Every method begins as the base, trains what it says, keeps what it says, and can be loaded again."""

import json

import pytest
import torch
from safetensors.torch import load_file
from test_endurance import files_of_at_most
from test_model_insert import logits, plain
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from deepen.checkpoint import Checkpoint
from deepen.config import parse_recipe
from deepen.errors import OutputError, RecipeError, TrainingError
from deepen.methods import build_method
from deepen.methods.base import without_adapter
from deepen.model import base_fingerprint
from deepen.training.loss import summed_loss
from deepen.training.optimizer import build_optimizer

TOKENS = torch.randint(96, (2, 17), generator=torch.Generator().manual_seed(0))
RECIPE = """
base: base
output: out
data: {sequence_length: 16, sources: [{path: a.txt}]}
train: {method: METHOD, tokens: 100, batch_tokens: 32, learning_rate: 1e-2}
"""
METHODS = {
    "lora": [],
    "rslora": ["train.method=lora", "train.lora.variant=rslora"],
    "dora": ["train.method=lora", "train.lora.variant=dora"],
    "freeze": ["train.freeze.blocks=2"],
    "moe": [],
    "scale": [],
    "prompt": [],
}
KEEP_BASE = ["lora", "rslora", "dora", "prompt"]


def method_of(name, *settings):
    text = RECIPE.replace("METHOD", name if name in METHODS and "=" not in name else "lora")
    text = text.replace("method: rslora", "method: lora").replace("method: dora", "method: lora")
    return build_method(parse_recipe(text, [*METHODS.get(name, []), *settings]).train)


def one_step(model, parameters):
    optimizer = build_optimizer(parameters, betas=(0.9, 0.95), weight_decay=0.0)
    for group in optimizer.param_groups:
        group["lr"] = 0.05
    model.train()
    for _ in range(2):  # the first moves only what the zeros let it
        summed_loss(model, TOKENS[:, :-1], TOKENS[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


@pytest.mark.parametrize("name", METHODS)
def test_it_begins_as_the_base_and_trains(tiny_llama, tmp_path, name):
    base = tiny_llama()
    model, method = plain(base), method_of(name)
    before = logits(model)
    digest = base_fingerprint(model, "full")
    parameters = method.prepare(model)
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-5)
    assert parameters.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    assert all(p.dtype == torch.float32 for p in parameters.values())
    one_step(model, parameters)
    trained = logits(model)
    assert not torch.allclose(trained, before, atol=1e-3)
    if name in KEEP_BASE:
        dtypes = dict.fromkeys(Checkpoint.open(base).tensors, "F32")
        assert base_fingerprint(model, "full", dtypes) == digest
    assert method.keeps_base == (name in KEEP_BASE)
    saved = method.save(model, tmp_path / "run", Checkpoint.open(base))
    merged = method.merge(model, tmp_path / "run", Checkpoint.open(base), None)
    if name in ("freeze", "moe"):
        assert merged is None
        merged = saved
    if name in ("scale", "prompt"):
        assert merged is None
        held = load_file(saved / f"{name}.safetensors")
        assert all(torch.equal(held[key], p) for key, p in parameters.items())
    else:
        torch.testing.assert_close(logits(plain(merged)), trained, rtol=1e-3, atol=2e-4)
        assert json.loads((merged / "config.json").read_text()) == json.loads(
            (base / "config.json").read_text()
        )


def test_an_adapter_is_one_of_pefts(tiny_llama, tmp_path):
    from peft import PeftModel

    base = tiny_llama()
    model, method = plain(base), method_of("lora")
    one_step(model, method.prepare(model))
    adapter = method.save(model, tmp_path / "run", Checkpoint.open(base))
    again = PeftModel.from_pretrained(plain(base), adapter).eval()
    torch.testing.assert_close(logits(again), logits(model))
    settings = json.loads((adapter / "adapter_config.json").read_text())
    assert settings["lora_alpha"] == 2 * settings["r"] == 32
    modules = set(settings["target_modules"])
    assert modules == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert {path.stat().st_mode & 0o777 for path in adapter.iterdir()} == {0o644}


@pytest.mark.parametrize("tied", [False, True])
def test_embeddings_and_head_train_whole_beside_an_adapter(tiny_llama, tmp_path, tied):
    from peft import PeftModel

    base = tiny_llama(tied=tied)
    model, method = plain(base), method_of("lora", "train.lora.modules_to_save=[embed_tokens, lm_head]")
    before, digest = logits(model), base_fingerprint(model, "full")
    parameters = method.prepare(model)
    assert torch.equal(logits(model), before)
    whole = {name for name in parameters if "modules_to_save" in name}
    assert len(whole) == (1 if tied else 2)
    with torch.random.fork_rng():
        one_step(model, parameters)
    trained = logits(model)
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert (embeddings.weight is head.weight) == tied
    assert not torch.equal(embeddings.weight, embeddings.original_module.weight)
    dtypes = dict.fromkeys(Checkpoint.open(base).tensors, "F32")
    assert base_fingerprint(model, "full", dtypes) == digest
    with without_adapter(model) as bare:
        assert torch.equal(logits(bare), before)
    assert torch.equal(logits(model), trained)
    adapter = method.save(model, tmp_path / "run", Checkpoint.open(base))
    again = PeftModel.from_pretrained(plain(base), adapter).eval()
    torch.testing.assert_close(logits(again), trained)
    merged = method.merge(model, tmp_path / "run", Checkpoint.open(base), None)
    torch.testing.assert_close(logits(plain(merged)), trained, rtol=1e-3, atol=2e-4)
    theirs = again.merge_and_unload().state_dict()
    for name, tensor in load_file(merged / "model.safetensors").items():
        torch.testing.assert_close(tensor, theirs[name])


def test_a_module_to_save_that_is_not_there_is_named(tiny_llama):
    method = method_of("lora", "train.lora.modules_to_save=[wte]")
    with pytest.raises(TrainingError, match=r"no module 'wte'; .* are model\.embed_tokens, lm_head"):
        method.prepare(plain(tiny_llama()))


def test_a_tied_head_never_comes_apart(tmp_path):
    """peft knows tied tables by the names embed_tokens and lm_head only; GPT-NeoX's are others."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = GPTNeoXConfig(vocab_size=96, tie_word_embeddings=True, bos_token_id=0, eos_token_id=0, **sizes)
    GPTNeoXForCausalLM(config).save_pretrained(tmp_path / "base")
    method = method_of("lora", "train.lora.modules_to_save=[embed_in]")
    with (
        pytest.warns(UserWarning, match="no tied modules are added"),
        pytest.raises(TrainingError, match="would train one apart from the other"),
    ):
        method.prepare(plain(tmp_path / "base"))


@pytest.mark.parametrize("name", METHODS)
def test_a_full_disk_is_a_message(tiny_llama, tmp_path, name):
    base = tiny_llama()
    model, method = plain(base), method_of(name)
    method.prepare(model)
    with files_of_at_most(500), pytest.raises(OutputError, match=r"cannot be written|left behind"):
        method.save(model, tmp_path / "run", Checkpoint.open(base))
    assert not list(tmp_path.glob("run/*"))


def test_frozen_blocks_are_those_that_new_ones_would_copy(tiny_llama):
    model = plain(tiny_llama(blocks=6))
    trained = method_of("freeze", "train.freeze.blocks=3").prepare(model)
    assert {name.split(".")[2] for name in trained} == {"1", "3", "5"}
    assert all(name.startswith("model.layers.") for name in trained)


@pytest.mark.parametrize("name", ["lora", "freeze"])
def test_matched_parameters(tiny_llama, name):
    model = plain(tiny_llama())
    block = sum(p.numel() for p in model.model.layers[0].parameters())
    parameters = method_of(name, f"train.match_parameters={2 * block}").prepare(model)
    count = sum(p.numel() for p in parameters.values())
    assert count == pytest.approx(2 * block, rel=0.05)


@pytest.mark.parametrize("name", ["moe", "scale", "prompt", "full"])
def test_nothing_to_match(name):
    with pytest.raises(RecipeError, match="match_parameters"):
        parse_recipe(RECIPE.replace("METHOD", name), ["train.match_parameters=100"])
