import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from deepen.cli import main
from deepen.errors import CheckpointError
from deepen.expansion import expand_checkpoint, verify_bytes


@pytest.fixture
def pair(tiny_llama, tmp_path):
    base = tiny_llama(bias=True, dtype="bfloat16")
    expand_checkpoint(base, tmp_path / "out", blocks=2)  # new blocks: 2 and 5
    return base, tmp_path / "out"


def edit(directory, change):
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def edit_json(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_identical(pair):
    answer = verify_bytes(*pair)
    assert answer.identical
    assert answer.first_difference is None
    assert answer.differing == ()
    assert answer.max_abs_difference == 0
    held = load_file(pair[1] / "model.safetensors")
    assert answer.tensors == len(held)
    assert answer.bytes == sum(tensor.numel() * 2 for tensor in held.values())


@pytest.mark.parametrize("sharded", [True, False])
def test_sharding_does_not_matter(tiny_llama, tmp_path, sharded):
    base = tiny_llama(sharded=sharded)
    expand_checkpoint(base, tmp_path / "out", blocks=3, shard_size=15_000)
    assert verify_bytes(base, tmp_path / "out").identical


def add(name, index, amount):
    def change(tensors):
        tensors[name].view(-1)[index] += amount

    return change


@pytest.mark.parametrize(
    ("name", "index", "base_only_sees"),
    [
        ("model.embed_tokens.weight", 77, True),
        ("model.layers.3.mlp.up_proj.weight", 5, True),
        ("model.layers.2.mlp.up_proj.weight", 0, False),
        ("model.layers.2.mlp.down_proj.weight", 9, False),
        ("model.layers.5.self_attn.o_proj.bias", 31, False),
    ],
)
def test_one_element(pair, name, index, base_only_sees):
    before = load_file(pair[1] / "model.safetensors")[name].view(-1)[index].float()
    edit(pair[1], add(name, index, 4))
    after = load_file(pair[1] / "model.safetensors")[name].view(-1)[index].float()
    answer = verify_bytes(*pair)
    assert not answer.identical
    assert answer.differing == (name,)
    assert (
        f"tensor '{name}' differs from element {index}: {after.item():.6g}, should be"
        in answer.first_difference
    )
    assert answer.max_abs_difference == abs(after - before).item()
    assert verify_bytes(*pair, base_only=True).identical is not base_only_sees


def test_the_last_bit_is_told_apart_in_words(tiny_llama, tmp_path):
    base = tiny_llama(dtype="float32")
    expand_checkpoint(base, tmp_path / "one", blocks=1)

    def raise_a_bit(tensors):
        tensors["model.norm.weight"].view(torch.int32)[3] += 1

    edit(tmp_path / "one", raise_a_bit)
    said = verify_bytes(base, tmp_path / "one").first_difference
    was, should = re.fullmatch(r".* element 3: (\S+), should be the base's (\S+)", said).groups()
    assert was != should


def test_a_sign_of_zero(pair):
    """-0 computes the same and is not the same bytes."""
    edit(pair[1], lambda tensors: tensors["model.layers.2.mlp.down_proj.weight"].neg_())
    answer = verify_bytes(*pair)
    assert not answer.identical
    assert answer.max_abs_difference == 0


def test_nan(pair, capsys):
    edit(pair[1], add("model.norm.weight", 0, float("nan")))
    assert verify_bytes(*pair).max_abs_difference == float("inf")
    assert main(["verify", str(pair[0]), str(pair[1]), "--json"]) == 3
    assert json.loads(capsys.readouterr().out)["max_abs_difference"] is None


def widen(tensors):
    tensors["model.norm.weight"] = tensors["model.norm.weight"].float()


def rename(tensors):
    tensors["model.layers.6.mlp.up_proj.weight"] = tensors.pop("model.layers.5.mlp.up_proj.weight")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tensors: tensors.pop("model.norm.weight"), "'model.norm.weight' is missing"),
        (
            lambda tensors: tensors.pop("model.layers.2.mlp.up_proj.weight"),
            "layers.2.mlp.up_proj.weight' is missing",
        ),
        (lambda tensors: tensors.update(extra=torch.zeros(1)), "'extra' is unexpected"),
        (rename, "is missing"),
        (widen, "'model.norm.weight' is F32 [32], should be BF16 [32]"),
    ],
)
@pytest.mark.parametrize("base_only", [True, False])
def test_other_tensors(pair, change, words, base_only):
    edit(pair[1], change)
    answer = verify_bytes(*pair, base_only=base_only)
    assert not answer.identical
    assert words in answer.first_difference
    assert answer.max_abs_difference is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda config: config.update(rms_norm_eps=1e-5), "rms_norm_eps is 1e-05, should be 1e-06"),
        (lambda config: config.update(num_hidden_layers=5), "num_hidden_layers is 5, should be 6"),
        (lambda config: config.update(more=1), "more is 1"),
        (lambda config: config.pop("hidden_act"), "hidden_act is None, should be 'silu'"),
    ],
)
def test_the_config(pair, change, words):
    edit_json(pair[1] / "config.json", change)
    answer = verify_bytes(*pair)
    assert f"config.json: {words}" in answer.first_difference


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda record: record["base_fingerprint"].update(fast="0" * 64), "made from another base"),
        (lambda record: record["base_fingerprint"].update(full="0" * 64), "made from another base"),
        (lambda record: record.update(base_blocks=6), "from a llama of 6 blocks"),
        (lambda record: record["new_blocks"][0]["filled"].popitem(), "new block 2: filled is not"),
        (lambda record: record["new_blocks"][0].update(copy_of=0), "differs from element 0"),
    ],
)
def test_the_record(pair, change, words):
    edit_json(pair[1] / "expansion.json", change)
    answer = verify_bytes(*pair, full=True)
    assert not answer.identical
    assert words in answer.first_difference


def test_another_base(pair, tiny_llama):
    answer = verify_bytes(tiny_llama("other", seed=1, bias=True, dtype="bfloat16"), pair[1])
    assert not answer.identical
    assert "model.norm.weight" in answer.differing


def test_no_record(pair):
    (pair[1] / "expansion.json").unlink()
    with pytest.raises(CheckpointError, match=r"expansion\.json: not found"):
        verify_bytes(*pair)


def test_the_command(pair, capsys):
    base, out = map(str, pair)
    assert main(["verify", base, out]) == 0
    assert "identical" in capsys.readouterr().out
    assert main(["verify", base, out, "--json", "--full"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["identical"] is True
    assert said["max_abs_difference"] == 0
    assert len(said["full_fingerprint"]) == 64
    edit(pair[1], add("model.norm.weight", 3, 1))
    assert main(["verify", base, out]) == 3
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "not identical" in captured.err
    assert "model.norm.weight" in captured.err
    assert main(["verify", base, out, "--json"]) == 3
    said = json.loads(capsys.readouterr().out)
    assert said["identical"] is False
    assert said["max_abs_difference"] > 0
    assert "model.norm.weight" in said["first_difference"]


def test_logits(pair, capsys):
    pytest.importorskip("deepen.model.identity")
    base, out = map(str, pair)
    assert main(["verify", base, out, "--logits", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["logits"]["identical"] is True
    assert said["logits"]["checks"]
    # A new block that has moved: other bytes, and other logits.
    edit(pair[1], add("model.layers.2.mlp.down_proj.weight", 9, 1))
    assert main(["verify", base, out, "--logits", "--json"]) == 3
    said = json.loads(capsys.readouterr().out)
    assert said["logits"]["identical"] is False
    assert said["logits"]["max_abs_difference"] > 0
    assert main(["verify", base, out, "--logits", "--base-only"]) == 2
