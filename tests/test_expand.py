"""Expanded checkpoints, judged by transformers' own forward and the safetensors library."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from deepen.checkpoint import Checkpoint, fast_fingerprint, full_fingerprint
from deepen.errors import CheckpointError, LayoutError, OutputError
from deepen.expansion import apply as apply_module
from deepen.expansion import base_name, expand_checkpoint, read_expansion
from deepen.families import family_for

TOKENS = torch.randint(96, (2, 24), generator=torch.Generator().manual_seed(0))


def logits(directory, dtype):
    """Logits [2, 24, vocabulary] of a whole forward, and of the last 8 positions on the cache."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()
    with torch.no_grad():
        whole = model(TOKENS, use_cache=False).logits
        step = model(TOKENS[:, :16], use_cache=True)
        cached = []
        for position in range(16, 24):
            step = model(TOKENS[:, position : position + 1], past_key_values=step.past_key_values)
            cached.append(step.logits)
    return whole, torch.cat(cached, dim=1)


def assert_same_function(base, expanded, dtype):
    for ours, theirs in zip(logits(expanded, dtype), logits(base, dtype), strict=True):
        assert torch.equal(ours, theirs)


def tensors(directory):
    return {k: v for path in directory.glob("*.safetensors") for k, v in load_file(path).items()}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("sharded", [True, False])
def test_the_function_is_kept(tiny_llama, tmp_path, tied, bias, dtype, sharded):
    base = tiny_llama(tied=tied, bias=bias, dtype=dtype, sharded=sharded)
    expand_checkpoint(base, tmp_path / "out", blocks=3)
    assert_same_function(base, tmp_path / "out", getattr(torch, dtype))
    if dtype == "bfloat16":
        assert_same_function(base, tmp_path / "out", torch.float32)


@pytest.mark.parametrize(
    "how",
    [
        {"blocks": 1},
        {"blocks": 9},
        {"blocks": 4, "groups": 2},
        {"blocks": 2, "placement": "suffix"},
        {"blocks": 6, "placement": "prefix"},
        {"after": [-1, 0, 0, 3]},
    ],
)
def test_any_layout(tiny_llama, tmp_path, how):
    base = tiny_llama(bias=True, sharded=True)
    result = expand_checkpoint(base, tmp_path / "out", **how)
    assert_same_function(base, tmp_path / "out", torch.float32)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.num_hidden_layers == len(model.model.layers) == 4 + len(result.new_blocks)


def test_new_blocks_are_alive(tiny_llama, tmp_path):
    """A new block copies its source but for its residual writes, weights and biases, so it can learn."""
    base = tiny_llama(bias=True)
    expand_checkpoint(base, tmp_path / "out", after=[1])
    held, source = tensors(tmp_path / "out"), tensors(base)
    new = {name for name in held if name.startswith("model.layers.2.")}
    zero = {name for name in new if not held[name].any()}
    assert {name.removeprefix("model.layers.2.") for name in zero} == {
        "self_attn.o_proj.weight",
        "self_attn.o_proj.bias",
        "mlp.down_proj.weight",
        "mlp.down_proj.bias",
    }
    for name in new - zero:
        assert torch.equal(held[name], source[name.replace("layers.2.", "layers.1.")])


@pytest.mark.parametrize("sharded", [True, False])
def test_files_are_the_bases(tiny_llama, tmp_path, sharded):
    base, out = tiny_llama(sharded=sharded), tmp_path / "out"
    (base / "README.md").write_text("the base's card")
    (base / "modeling.py").write_text("raise SystemExit")
    (base / "pytorch_model.bin").write_bytes(b"x")
    (base / "original").mkdir()
    (base / "original" / "params.json").write_text("{}")
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "rag.jinja").write_text("{{ x }}")
    expand_checkpoint(base, out, blocks=2)
    carried = {"tokenizer.json", "LICENSE", "generation_config.json", "additional_chat_templates/rag.jinja"}
    weights = {path.name for path in base.glob("model*.safetensors*")}
    found = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert found == carried | weights | {"config.json", "expansion.json"}
    for name in carried:
        assert (out / name).read_bytes() == (base / name).read_bytes()
    for path in out.glob("*.safetensors"):
        with safe_open(path, "pt") as ours, safe_open(base / path.name, "pt") as theirs:
            assert ours.metadata() == theirs.metadata()
            assert set(ours.keys()) > set()
    was, now = (json.loads((directory / "config.json").read_text()) for directory in (base, out))
    assert list(was) == list(now)
    assert {key for key in was if was[key] != now[key]} == {"num_hidden_layers"}


def test_the_index_tells_the_truth(tiny_llama, tmp_path):
    base, out = tiny_llama(sharded=True), tmp_path / "out"
    result = expand_checkpoint(base, out, blocks=2)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    held = tensors(out)
    assert set(index["weight_map"]) == set(held)
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in held.values())
    assert index["metadata"]["total_parameters"] == sum(t.numel() for t in held.values()) == result.parameters
    for name, file in index["weight_map"].items():
        with safe_open(out / file, "pt") as shard:
            assert name in shard.keys()  # noqa: SIM118  # it is not a mapping


def test_tied_models_keep_their_set_of_tensors(tiny_llama, tmp_path):
    base = tiny_llama(tied=True)
    expand_checkpoint(base, tmp_path / "out", blocks=1)
    assert "lm_head.weight" not in tensors(base)
    assert "lm_head.weight" not in tensors(tmp_path / "out")


def test_shard_size(tiny_llama, tmp_path):
    base = tiny_llama(dtype="bfloat16")
    expand_checkpoint(base, tmp_path / "out", blocks=2, shard_size=20_000)
    names = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert names == [f"model-{i:05}-of-{len(names):05}.safetensors" for i in range(1, len(names) + 1)]
    assert len(names) > 2
    for name in names:
        assert sum(t.numel() * 2 for t in load_file(tmp_path / "out" / name).values()) <= 20_000
    assert_same_function(base, tmp_path / "out", torch.bfloat16)
    expand_checkpoint(tiny_llama("many", sharded=True), tmp_path / "one", blocks=2, shard_size=10**9)
    assert [path.name for path in (tmp_path / "one").glob("model*")] == ["model.safetensors"]


def test_mixed_dtypes_stay_aligned(tiny_llama, tmp_path):
    """Readers map a tensor only where its offset is a multiple of its element."""
    from safetensors.torch import save_file

    base = tiny_llama(dtype="bfloat16", hidden_size=12, num_attention_heads=2, head_dim=6, vocab_size=97)
    held = load_file(base / "model.safetensors")
    for name in held:
        if name.endswith("norm.weight"):
            held[name] = held[name].float()
    save_file(held, base / "model.safetensors", {"format": "pt"})
    expand_checkpoint(base, tmp_path / "out", blocks=3)
    for tensor in Checkpoint.open(tmp_path / "out").tensors.values():
        assert tensor.offset % (4 if tensor.dtype == "F32" else 2) == 0
    assert len(load_file(tmp_path / "out" / "model.safetensors")) > len(held)


def test_the_base_inside_has_the_bases_fingerprint(tiny_llama, tmp_path):
    base = tiny_llama(sharded=True)
    expand_checkpoint(base, tmp_path / "out", blocks=3, name="org/base")
    expansion = read_expansion(tmp_path / "out")
    inside, original = Checkpoint.open(tmp_path / "out"), Checkpoint.open(base)
    llama = family_for(original.config)

    def rename(name):
        return base_name(expansion, llama, name)

    assert expansion.base == "org/base"
    assert expansion.base_fingerprint.fast == fast_fingerprint(original) == fast_fingerprint(inside, rename)
    assert full_fingerprint(original) == full_fingerprint(inside, rename)


@pytest.mark.parametrize("refused", [["_copy_file_range"], ["_copy_file_range", "_sendfile"]])
def test_file_systems_without_fast_copies(tiny_llama, tmp_path, monkeypatch, refused):
    base = tiny_llama(sharded=True)
    expand_checkpoint(base, tmp_path / "fast", blocks=2)

    def refuse(*arguments):
        raise OSError(18, "Invalid cross-device link")

    for name in refused:
        monkeypatch.setattr(apply_module, name, refuse)
    monkeypatch.setattr(apply_module, "_BUFFER", 1000)
    expand_checkpoint(base, tmp_path / "slow", blocks=2)
    for path in (tmp_path / "fast").glob("*.safetensors"):
        assert (tmp_path / "slow" / path.name).read_bytes() == path.read_bytes()


def test_a_fill_that_is_not_zero(tmp_path):
    """Gemma's gains are 1 + w: their fill is -1."""
    for dtype, name in ((torch.bfloat16, "BF16"), (torch.float16, "F16"), (torch.float32, "F32")):
        wanted = torch.full((5,), -1, dtype=dtype).view(torch.uint8).numpy().tobytes()
        assert apply_module.fill_bytes(name, -1.0) * 5 == wanted
        with (tmp_path / name).open("wb", buffering=0) as file:
            apply_module._fill(file.fileno(), apply_module.fill_bytes(name, -1.0), 3, len(wanted))
        assert (tmp_path / name).read_bytes() == b"\0\0\0" + wanted


def test_progress_ends_at_the_total(tiny_llama, tmp_path):
    seen = []
    result = expand_checkpoint(
        tiny_llama(), tmp_path / "out", blocks=1, progress=lambda done, total: seen.append((done, total))
    )
    assert seen == sorted(seen)
    assert seen[-1] == (result.bytes_written, result.bytes_written)
    assert result.bytes_written == (tmp_path / "out" / "model.safetensors").stat().st_size


def test_a_base_that_shrinks_meanwhile(tiny_llama, tmp_path):
    base = tiny_llama()

    def shrink(done, total):
        os.truncate(base / "model.safetensors", 100)

    with pytest.raises(CheckpointError, match="ended early"):
        expand_checkpoint(base, tmp_path / "out", blocks=1, progress=shrink)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("how", "error"),
    [
        ({"blocks": 0}, LayoutError),
        ({"after": [9]}, LayoutError),
        ({"blocks": 1, "shard_size": 0}, LayoutError),
    ],
)
def test_refused(tiny_llama, tmp_path, how, error):
    with pytest.raises(error):
        expand_checkpoint(tiny_llama(), tmp_path / "out", **how)
    assert not (tmp_path / "out").exists()


def test_an_existing_output(tiny_llama, tmp_path):
    base = tiny_llama()
    expand_checkpoint(base, tmp_path / "out", blocks=1)
    with pytest.raises(OutputError, match="--overwrite"):
        expand_checkpoint(base, tmp_path / "out", blocks=2)
    expand_checkpoint(base, tmp_path / "out", blocks=2, overwrite=True)
    assert len(read_expansion(tmp_path / "out").new_blocks) == 2


def test_prefix_warns_with_the_papers_figures(tiny_llama, tmp_path, caplog):
    result = expand_checkpoint(tiny_llama(), tmp_path / "out", blocks=1, placement="prefix")
    assert "29.36" in result.warnings[0]
    assert "0.81" in result.warnings[0]
    assert "29.36" in caplog.text
    assert expand_checkpoint(tmp_path / "base", tmp_path / "two", blocks=1).warnings == ()


LIGHT = """
import resource, sys
from deepen.cli import main
code = main(["expand", sys.argv[1], sys.argv[2], "--blocks", "2"])
heavy = {"torch", "transformers", "numpy", "huggingface_hub", "safetensors"} & set(sys.modules)
print(code, sorted(heavy), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_needs_no_torch_and_little_memory(tiny_llama, tmp_path):
    base = tiny_llama(hidden_size=256, intermediate_size=4096, vocab_size=20_000)  # 68 MB
    assert (base / "model.safetensors").stat().st_size > 64 << 20
    # ru_maxrss of a direct child would start at this process's own; that of the shell's child does not.
    command = ["sh", "-c", '"$0" "$@"; exit $?', sys.executable, "-c", LIGHT, base, tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    code, *heavy, kilobytes = done.stdout.splitlines()[-1].split()
    assert (code, heavy) == ("0", ["[]"])
    assert int(kilobytes) < 64 * 1024


@pytest.mark.parametrize("name", ["stories260k", "books-4m"])
def test_a_real_model_says_the_same(data_dir, tmp_path, name):
    base = data_dir / "models" / name
    expand_checkpoint(base, tmp_path / "out", blocks=3)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    prompt = tokenizer("Once upon a time", return_tensors="pt").input_ids
    said = []
    for directory in (base, tmp_path / "out"):
        model = AutoModelForCausalLM.from_pretrained(directory).eval()
        said.append(model.generate(prompt, max_new_tokens=40, do_sample=False, pad_token_id=0)[0].tolist())
    assert len(said[0]) > 20
    assert said[0] == said[1]


@pytest.mark.parametrize("sharded", [True, False])
@pytest.mark.parametrize("spaces", [0, 8, 24])
def test_a_base_tensor_lies_in_its_cache_line_as_before(tiny_llama, tmp_path, sharded, spaces):
    # Where a mapped matrix begins in one decides the last bits of a product with it, as in cached decoding.
    base = tiny_llama(sharded=sharded)
    for path in base.glob("*.safetensors"):
        size, data = int.from_bytes(path.read_bytes()[:8], "little"), path.read_bytes()
        header = data[8 : 8 + size] + b" " * spaces
        path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + size :])
    expand_checkpoint(base, tmp_path / "out", blocks=2)
    family, expansion = family_for({"model_type": "llama"}), read_expansion(tmp_path / "out")
    before = Checkpoint.open(base).tensors
    for name, tensor in Checkpoint.open(tmp_path / "out").tensors.items():
        if (origin := base_name(expansion, family, name)) is not None:
            assert tensor.offset % 64 == before[origin].offset % 64, name
