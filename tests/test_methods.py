import filecmp
import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_model_freeze_bypass import BLOCK, of_blocks
from test_model_insert import logits, move, plain, tokens
from test_model_pack import files_that_repeat

from deepen.checkpoint import Checkpoint
from deepen.errors import OutputError, PackError
from deepen.expansion import plan_layout
from deepen.methods import Blocks, Full
from deepen.model import insert_blocks, load

OPTIONS = [
    {},
    {"dtype": "bfloat16", "bias": True},
    {"tied": True, "dtype": "bfloat16", "sharded": True},
    {"sharded": True},
]


def expanded(base, dtype="auto"):
    model = plain(base, dtype)
    insert_blocks(model, plan_layout(4, blocks=2))
    return model


def step(model, trained):
    """One real optimiser step; bf16 models compute under autocast, as in a run."""
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16, enabled=model.dtype != torch.float32):
            model(input_ids=tokens(model), labels=tokens(model), use_cache=False).loss.backward()
        optimizer.step()


def test_what_they_keep():
    assert Blocks().keeps_base
    assert not Full().keeps_base


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [False, True])
def test_blocks_trains_the_new_blocks_in_fp32(tiny_llama, dtype, tied):
    model = expanded(tiny_llama(dtype=dtype, tied=tied))
    trained = Blocks().prepare(model)
    assert trained.keys() == of_blocks([2, 5], BLOCK)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trained.keys()
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if name in trained else getattr(torch, dtype))
        assert name not in trained or parameter is trained[name]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    step(model, trained)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == trained.keys()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [False, True])
def test_full_trains_everything_in_fp32(tiny_llama, dtype, tied):
    model = plain(tiny_llama(dtype=dtype, tied=tied))
    model.requires_grad_(False)
    trained = Full().prepare(model)
    assert trained.keys() == {name for name, _ in model.named_parameters()}
    assert all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())
    assert ("lm_head.weight" in trained) is not tied
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    step(model, trained)
    assert not any(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied


def test_blocks_needs_new_blocks(tiny_llama):
    with pytest.raises(PackError, match="no record"):
        Blocks().prepare(plain(tiny_llama()))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_blocks_saves_a_pack_in_the_files_precision(tiny_llama, tmp_path, options):
    base = tiny_llama(**options)
    model = expanded(base, torch.float32)
    Blocks().prepare(model)
    move(model)
    for _ in range(2):  # a resumed run saves again
        saved = Blocks().save(model, tmp_path / "run", Checkpoint.open(base))
    assert saved == tmp_path / "run" / "blocks"
    held = load_file(saved / "blocks.safetensors")
    assert {t.dtype for t in held.values()} == {getattr(torch, options.get("dtype", "float32"))}
    again = load(base, saved, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        stored = parameter.to(held[name].dtype) if name in held else parameter
        assert torch.equal(again.get_parameter(name), stored)


def trained_fully(base):
    model = plain(base, torch.float32)
    trained = Full().prepare(model)
    step(model, trained)
    return model


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_full_saves_the_bases_directory_with_trained_tensors(tiny_llama, tmp_path, options):
    base = tiny_llama(**options)
    model = trained_fully(base)
    saved = Full().save(model, tmp_path / "run", Checkpoint.open(base))
    assert saved == tmp_path / "run" / "model"
    assert sorted(os.listdir(saved)) == sorted(os.listdir(base))
    for name in os.listdir(base):
        same = filecmp.cmp(base / name, saved / name, shallow=False)
        assert same is not name.endswith(".safetensors")
    old, new = Checkpoint.open(base), Checkpoint.open(saved)
    assert [(t.name, t.dtype, t.shape) for t in new.tensors.values()] == [
        (t.name, t.dtype, t.shape) for t in old.tensors.values()
    ]
    stored = getattr(torch, options.get("dtype", "float32"))
    assert plain(saved).dtype == stored
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(stored))
    assert torch.equal(logits(plain(saved, torch.float32)), logits(model))


def test_full_saves_what_only_the_files_hold(tiny_llama, tmp_path):
    base = tiny_llama(tied=True)
    files_that_repeat(base)
    model = trained_fully(base)
    saved = Full().save(model, tmp_path / "run", Checkpoint.open(base))
    old, new = load_file(base / "model.safetensors"), load_file(saved / "model.safetensors")
    assert old.keys() == new.keys()
    assert torch.equal(new["lm_head.weight"], new["model.embed_tokens.weight"])
    assert not torch.equal(new["lm_head.weight"], old["lm_head.weight"])
    buffer = "model.layers.1.self_attn.rotary_emb.inv_freq"
    assert torch.equal(new[buffer], old[buffer])
    assert torch.equal(logits(plain(saved)), logits(model))


def test_mixed_precisions_are_kept(tiny_llama, tmp_path):
    base = tiny_llama(dtype="bfloat16")
    path = base / "model.safetensors"
    held = {k: v.float() if "norm" in k else v for k, v in load_file(path).items()}
    save_file(held, path, {"format": "pt"})
    saved = Full().save(trained_fully(base), tmp_path / "full", Checkpoint.open(base))
    assert {k: v.dtype for k, v in load_file(saved / "model.safetensors").items()} == {
        k: v.dtype for k, v in held.items()
    }
    saved = Blocks().save(expanded(base, torch.float32), tmp_path / "run", Checkpoint.open(base))
    for name, tensor in load_file(saved / "blocks.safetensors").items():
        assert tensor.dtype == (torch.float32 if "norm" in name else torch.bfloat16)


def test_full_saves_the_tokenizers_files_and_no_readme(tiny_llama, tmp_path):
    base = tiny_llama()
    (base / "README.md").write_text("the base's own card")
    saved = Full().save(trained_fully(base), tmp_path / "run", Checkpoint.open(base))
    assert (saved / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    assert not (saved / "README.md").exists()


def test_the_base_is_never_overwritten(tiny_llama, tmp_path):
    # A run directory whose `model/` or `blocks/` is the base.
    for method, name in (("full", "model"), ("blocks", "blocks")):
        base = tiny_llama(name)
        model = plain(base) if method == "full" else expanded(base)
        before = (base / "model.safetensors").read_bytes()
        with pytest.raises(OutputError, match="inside the input"):
            (Full() if method == "full" else Blocks()).save(model, tmp_path, Checkpoint.open(base))
        assert (base / "model.safetensors").read_bytes() == before
