import json
import os
import stat

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_model_insert import generated, logits, move, plain

from deepen.blocks import extract_pack, merge_pack
from deepen.checkpoint import Checkpoint, fast_fingerprint, full_fingerprint
from deepen.errors import CheckpointError, DeepenError, OutputError, PackError
from deepen.expansion import expand_checkpoint, plan_layout, read_expansion
from deepen.model import base_fingerprint, insert_blocks, load, new_parameters, save_blocks

OPTIONS = [
    {},
    {"dtype": "bfloat16", "bias": True},
    {"tied": True, "sharded": True},
    {"tied": True, "dtype": "bfloat16"},
]


def trained(base, dtype="auto", **placed):
    model = plain(base, dtype)
    insert_blocks(model, plan_layout(len(model.model.layers), **(placed or {"blocks": 2})))
    move(model)
    return model


@pytest.fixture
def made(tiny_llama, tmp_path):
    """A base, a live model on it whose new blocks have moved, and the pack of them."""
    base = tiny_llama()
    model = trained(base)
    return base, model, save_blocks(model, tmp_path / "pack")


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_saved_loaded_and_merged(tiny_llama, tmp_path, options):
    base = tiny_llama(**options)
    model = trained(base, after=[-1, 2, 2])
    pack = save_blocks(model, tmp_path / "pack")
    assert sorted(os.listdir(pack)) == ["blocks.safetensors", "expansion.json"]
    again = load(base, pack)
    assert torch.equal(logits(again), logits(model))
    assert torch.equal(generated(again), generated(model))
    assert not again.training
    assert new_parameters(again).keys() == new_parameters(model).keys()
    # The pack again, from what was loaded: the same bytes.
    second = save_blocks(again, tmp_path / "second")
    for name in os.listdir(pack):
        assert (pack / name).read_bytes() == (second / name).read_bytes()

    merge_pack(base, pack, tmp_path / "merged")
    assert torch.equal(logits(plain(tmp_path / "merged")), logits(model))
    merged = load(tmp_path / "merged")
    assert torch.equal(logits(merged), logits(model))
    assert new_parameters(merged).keys() == new_parameters(model).keys()
    extract_pack(tmp_path / "merged", tmp_path / "extracted")
    ours, theirs = (load_file(tmp_path / d / "blocks.safetensors") for d in ("pack", "extracted"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("held", [torch.float32, torch.bfloat16])
def test_precision_on_disk_is_the_bases(tiny_llama, tmp_path, stored, held):
    base = tiny_llama(dtype=stored)
    model = trained(base, held)
    pack = save_blocks(model, tmp_path / "pack")
    with safe_open(pack / "blocks.safetensors", "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {getattr(torch, stored)}  # noqa: SIM118
        for name, parameter in new_parameters(model).items():
            assert torch.equal(file.get_tensor(name), parameter.detach().to(getattr(torch, stored)))
    assert load(base, pack).dtype == getattr(torch, stored)
    assert load(base, pack, dtype=torch.float32).dtype == torch.float32
    merge_pack(base, pack, tmp_path / "merged")


def test_precision_of_an_expanded_checkpoint(tiny_llama, tmp_path):
    # Block 2 is new and a copy of base block 1. That block, here in fp32, must not speak for it.
    base = tiny_llama(dtype="bfloat16")
    expand_checkpoint(base, tmp_path / "expanded", blocks=2)
    path = tmp_path / "expanded" / "model.safetensors"
    held = load_file(path)
    held = {k: v.float() if k.startswith("model.layers.1.") else v for k, v in held.items()}
    save_file(held, path, {"format": "pt"})
    pack = save_blocks(plain(tmp_path / "expanded", torch.float32), tmp_path / "pack")
    assert {t.dtype for t in load_file(pack / "blocks.safetensors").values()} == {torch.bfloat16}


def test_precision_may_be_asked_for(tiny_llama, tmp_path):
    model = trained(tiny_llama(dtype="bfloat16"))
    wanted = dict.fromkeys(new_parameters(model), torch.float32)
    pack = save_blocks(model, tmp_path / "pack", dtypes=wanted)
    assert {t.dtype for t in load_file(pack / "blocks.safetensors").values()} == {torch.float32}
    assert torch.equal(logits(load(model.name_or_path, pack)), logits(model))
    with pytest.raises(PackError, match=r"is F32 .*, the base needs BF16"):
        merge_pack(model.name_or_path, pack, tmp_path / "merged")


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_files_have_the_umasks_mode(made, tmp_path, umask):
    before = os.umask(umask)
    try:
        pack = save_blocks(made[1], tmp_path / "again")
    finally:
        os.umask(before)
    for path in pack.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask
    assert stat.S_IMODE(pack.stat().st_mode) == 0o777 & ~umask


def test_outputs(made, tmp_path):
    base, model, pack = made
    with pytest.raises(OutputError, match="exists already"):
        save_blocks(model, pack)
    before = sorted(os.listdir(base))
    for place in (base, base / "pack", tmp_path):
        with pytest.raises(OutputError):
            save_blocks(model, place, overwrite=True)
    assert sorted(os.listdir(base)) == before
    old = (pack / "blocks.safetensors").read_bytes()
    move(model)
    save_blocks(model, pack, overwrite=True)
    assert (pack / "blocks.safetensors").read_bytes() != old


def test_nothing_half_written(made, tmp_path, monkeypatch):
    import safetensors.torch

    def full_disk(*_):
        raise safetensors.SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr("deepen.model.tensors.save_file", lambda *_, **__: full_disk())
    with pytest.raises(OutputError, match="No space left"):
        save_blocks(made[1], tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["base", "pack"]


def test_another_base(made, tiny_llama):
    base, _, pack = made
    wanted = read_expansion(pack).base_fingerprint.fast
    other = tiny_llama("other", seed=1)
    with pytest.raises(PackError) as caught:
        load(other, pack)
    assert wanted[:16] in str(caught.value)
    assert fast_fingerprint(Checkpoint.open(other))[:16] in str(caught.value)
    assert str(base) in str(caught.value)
    assert str(other) in str(caught.value)
    with pytest.raises(PackError, match="of 4 blocks"):
        load(tiny_llama("deeper", blocks=5), pack)
    with pytest.raises(PackError):
        load(tiny_llama("narrow", dtype="bfloat16"), pack)


NAME = "model.layers.2.mlp.up_proj.weight"


def tensors(change):
    def edit(pack):
        held = load_file(pack / "blocks.safetensors")
        change(held)
        save_file(held, pack / "blocks.safetensors")

    return edit


def record(change):
    def edit(pack):
        raw = json.loads((pack / "expansion.json").read_text())
        change(raw)
        (pack / "expansion.json").write_text(json.dumps(raw))

    return edit


def truncate(pack):
    os.truncate(pack / "blocks.safetensors", os.path.getsize(pack / "blocks.safetensors") - 5)


FAULTS = {
    "no tensors": (lambda pack: (pack / "blocks.safetensors").unlink(), "not a block pack"),
    "no record": (lambda pack: (pack / "expansion.json").unlink(), "not found"),
    "truncated": (truncate, "truncated"),
    "empty": (lambda pack: (pack / "blocks.safetensors").write_bytes(b""), "too short"),
    "text": (lambda pack: (pack / "blocks.safetensors").write_text("no tensors at all"), "header"),
    "missing": (tensors(lambda held: held.pop(NAME)), f"{NAME}' is missing"),
    "extra": (tensors(lambda held: held.update(extra=torch.zeros(1))), "'extra' belongs to no new block"),
    "of the base": (
        tensors(lambda held: held.update({NAME.replace("2", "1"): held[NAME].clone()})),
        "belongs to no new block",
    ),
    "shape": (tensors(lambda held: held.update({NAME: held[NAME].T.contiguous()})), "[32, 48]"),
    "newer": (record(lambda raw: raw.update(format_version=2)), "format_version is 2; this deepen reads"),
    "no version": (record(lambda raw: raw.pop("format_version")), "format_version"),
    "no blocks": (record(lambda raw: raw.update(new_blocks=[])), "new_blocks"),
    "no base": (record(lambda raw: raw.pop("base_fingerprint")), "base_fingerprint"),
    "outside": (record(lambda raw: raw["new_blocks"][1].update(index=6)), "new block 6"),
    "another layout": (
        record(lambda raw: raw["new_blocks"][0].update(index=1, after=0)),
        "belongs to no new block",
    ),
    "a word": (record(lambda raw: raw.update(base_blocks="4")), "base_blocks"),
    "not JSON": (lambda pack: (pack / "expansion.json").write_text("{"), "not readable"),
    "a list": (lambda pack: (pack / "expansion.json").write_text("[]"), "format_version"),
    "binary": (lambda pack: (pack / "expansion.json").write_bytes(b"\xff\xfe"), "not readable"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_malformed_packs(made, fault):
    base, _, pack = made
    edit, words = FAULTS[fault]
    edit(pack)
    with pytest.raises(DeepenError) as caught:
        load(base, pack)
    message = str(caught.value)
    assert words in message
    assert str(pack) in message
    assert message.count("\n") <= 1
    assert caught.value.exit_code == 2


def test_bases_that_cannot_be_read(made, tiny_llama, tmp_path):
    _, _, pack = made
    for call in ((tmp_path / "absent",), (tmp_path / "absent", pack), (pack,)):
        with pytest.raises(CheckpointError):
            load(*call)
    with pytest.raises(PackError, match="not a block pack"):
        load(made[0], tmp_path / "absent")


@pytest.mark.parametrize(
    "change",
    [{"hidden_size": 40}, {"num_hidden_layers": "x"}, {"num_attention_heads": 5}, {"model_type": "nothing"}],
    ids=str,
)
def test_a_config_that_is_not_the_files(tiny_llama, change):
    base = tiny_llama()
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(CheckpointError) as caught:
        load(base)
    assert str(base) in str(caught.value)
    assert str(caught.value).count("\n") <= 1


def test_missing_tensors_are_not_filled_with_random_numbers(tiny_llama):
    base = tiny_llama()
    held = load_file(base / "model.safetensors")
    del held["model.layers.1.mlp.up_proj.weight"]
    save_file(held, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight' is missing"):
        load(base)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_live_and_file_fingerprints(tiny_llama, tmp_path, options):
    base = tiny_llama(**options)
    files = Checkpoint.open(base)
    dtypes = {name: tensor.dtype for name, tensor in files.tensors.items()}
    for dtype in ("auto", torch.float32):
        model = plain(base, dtype)
        for step in range(2):
            assert base_fingerprint(model, "fast", dtypes) == fast_fingerprint(files)
            assert base_fingerprint(model, "full", dtypes) == full_fingerprint(files)
            if step == 0:
                insert_blocks(model, plan_layout(4, after=[-1, 1]))
                move(model)
        record = read_expansion(save_blocks(model, tmp_path / "pack", overwrite=True))
        assert record.base_fingerprint.fast == fast_fingerprint(files)
    assert base_fingerprint(plain(base), "full") == full_fingerprint(files)


def test_one_bit(tiny_llama):
    # Large enough for `fast` to sample: `full` still sees a bit in the part between.
    base = tiny_llama(vocab_size=3000)
    model = trained(base)
    full = base_fingerprint(model, "full")
    assert full == full_fingerprint(Checkpoint.open(base))
    weight = model.model.embed_tokens.weight
    weight.data.view(torch.int32).view(-1)[2000] ^= 1
    assert base_fingerprint(model, "full") != full
    weight.data.view(torch.int32).view(-1)[2000] ^= 1
    assert base_fingerprint(model, "full") == full
    model.model.layers[1].mlp.up_proj.weight.data.view(torch.int32).view(-1)[-1] ^= 1
    assert base_fingerprint(model, "full") != full
    assert base_fingerprint(model, "fast") != fast_fingerprint(Checkpoint.open(base))


@pytest.mark.parametrize("factor", [1 + 1e-6, float("nan")])
def test_a_move_too_small_for_the_files_precision(tiny_llama, factor):
    base = tiny_llama(dtype="bfloat16")
    files, model = Checkpoint.open(base), plain(base, torch.float32)
    dtypes = {name: tensor.dtype for name, tensor in files.tensors.items()}
    with torch.no_grad():
        weight = model.model.layers[1].self_attn.q_proj.weight
        before = weight.clone()
        weight[2, 3] *= factor
    assert not torch.equal(weight, before)
    assert base_fingerprint(model, "full", dtypes) != full_fingerprint(files)


def test_the_record_of_a_base_that_was_changed_in_memory(tiny_llama, tmp_path):
    base = tiny_llama()
    model = plain(base)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.add_(1)
    insert_blocks(model, plan_layout(4, blocks=1))
    with pytest.raises(PackError, match="fingerprint"):
        load(base, save_blocks(model, tmp_path / "pack"))


def files_that_repeat(base):
    """As real ones do: a tied head under its own name too, and a buffer that Llama 2's files carry."""
    path = base / "model.safetensors"
    held = load_file(path)
    held["lm_head.weight"] = held["model.embed_tokens.weight"].clone()
    for index in range(4):
        held[f"model.layers.{index}.self_attn.rotary_emb.inv_freq"] = torch.rand(4)
    save_file(held, path, {"format": "pt"})


@pytest.mark.parametrize("dtype", ["auto", torch.bfloat16])
def test_files_that_hold_more_than_the_model(tiny_llama, tmp_path, dtype):
    base = tiny_llama(tied=True)
    files_that_repeat(base)
    model = trained(base, dtype)
    pack = save_blocks(model, tmp_path / "pack")
    assert read_expansion(pack).base_fingerprint.fast == fast_fingerprint(Checkpoint.open(base))
    assert torch.equal(logits(load(base, pack, dtype=model.dtype)), logits(model))
    merge_pack(base, pack, tmp_path / "merged")
    assert torch.equal(logits(plain(tmp_path / "merged", dtype)), logits(model))
    extract_pack(tmp_path / "merged", tmp_path / "extracted")
    assert torch.equal(logits(load(base, tmp_path / "extracted", dtype=model.dtype)), logits(model))
    dtypes = {"lm_head.weight": "F32", "model.embed_tokens.weight": "F32"}
    assert base_fingerprint(plain(base), "full", dtypes) == full_fingerprint(
        Checkpoint.open(base), lambda name: name if name in dtypes else None
    )


def test_a_model_loaded_by_its_hub_id(tiny_llama, tmp_path, monkeypatch):
    base = tiny_llama(dtype="bfloat16")
    home, commit = tmp_path / "hub" / "models--someone--tiny", "0" * 40
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text(commit)
    (home / "snapshots").mkdir()
    (home / "snapshots" / commit).symlink_to(base)
    for place in ("huggingface_hub.constants.HF_HUB_CACHE", "huggingface_hub.file_download.HF_HUB_CACHE"):
        monkeypatch.setattr(place, str(tmp_path / "hub"), raising=False)
    model = trained("someone/tiny", torch.float32)
    pack = save_blocks(model, tmp_path / "pack")
    assert read_expansion(pack).base == "someone/tiny"
    assert {t.dtype for t in load_file(pack / "blocks.safetensors").values()} == {torch.bfloat16}
    assert load(base, pack)
