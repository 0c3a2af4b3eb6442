import filecmp
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from deepen.blocks import extract_pack, inspect_blocks, merge_pack
from deepen.cli import main
from deepen.errors import CheckpointError, OutputError, PackError
from deepen.expansion import expand_checkpoint, verify_bytes


@pytest.fixture
def made(tiny_llama, tmp_path):
    """A base, an expanded checkpoint whose new blocks have moved, and the pack of them."""
    base, expanded, pack = (
        tiny_llama(sharded=True, dtype="bfloat16"),
        tmp_path / "expanded",
        tmp_path / "pack",
    )
    expand_checkpoint(base, expanded, blocks=2)  # new blocks: 2 and 5
    for path in expanded.glob("*.safetensors"):
        tensors = load_file(path)
        for name, tensor in tensors.items():
            if name.startswith(("model.layers.2.", "model.layers.5.")):
                tensor += torch.randn_like(tensor)
        save_file(tensors, path, {"format": "pt"})
    extract_pack(expanded, pack)
    return base, expanded, pack


def edit(pack, change):
    tensors = load_file(pack / "blocks.safetensors")
    change(tensors)
    save_file(tensors, pack / "blocks.safetensors")


def tensors(directory):
    return {k: v for path in directory.glob("*.safetensors") for k, v in load_file(path).items()}


def test_a_pack_holds_the_new_blocks_only(made):
    _, expanded, pack = made
    assert sorted(path.name for path in pack.iterdir()) == ["blocks.safetensors", "expansion.json"]
    held, whole = tensors(pack), tensors(expanded)
    assert set(held) == {name for name in whole if name.startswith(("model.layers.2.", "model.layers.5."))}
    assert all(torch.equal(held[name], whole[name]) for name in held)
    ours, theirs = (json.loads((d / "expansion.json").read_text()) for d in (pack, expanded))
    assert theirs.pop("base_files")  # the base's, which a pack does not carry
    assert ours == theirs


def test_merging_gives_the_expanded_checkpoint_back(made, tmp_path):
    base, expanded, pack = made
    merge_pack(base, pack, tmp_path / "merged")
    found, wanted = tensors(tmp_path / "merged"), tensors(expanded)
    assert set(found) == set(wanted)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    for name in ("config.json", "expansion.json", "tokenizer.json", "model.safetensors.index.json"):
        assert filecmp.cmp(expanded / name, tmp_path / "merged" / name, shallow=False)
    assert verify_bytes(base, tmp_path / "merged", base_only=True).identical
    assert not verify_bytes(base, tmp_path / "merged").identical


def test_the_base_may_be_sharded_otherwise(made, tiny_llama, tmp_path):
    _, expanded, pack = made
    merge_pack(tiny_llama("single", dtype="bfloat16"), pack, tmp_path / "merged")
    found, wanted = tensors(tmp_path / "merged"), tensors(expanded)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_another_base(made, tiny_llama, tmp_path):
    _, _, pack = made
    with pytest.raises(PackError, match="fingerprint") as caught:
        merge_pack(tiny_llama("other", seed=1, dtype="bfloat16"), pack, tmp_path / "out")
    assert str(caught.value).count("fingerprint") == 2
    with pytest.raises(PackError, match="of 4 blocks"):
        merge_pack(tiny_llama("deeper", blocks=5, dtype="bfloat16"), pack, tmp_path / "out")
    with pytest.raises(PackError, match="fingerprint"):
        merge_pack(tiny_llama("wider", dtype="float32"), pack, tmp_path / "out")
    assert not (tmp_path / "out").exists()


NAME = "model.layers.2.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda held: held.pop(NAME), f"'{NAME}' is missing"),
        (
            lambda held: held.update({NAME: held[NAME].float()}),
            "is F32 [48, 32], the base needs BF16 [48, 32]",
        ),
        (lambda held: held.update({NAME: held[NAME][:1].clone()}), "is BF16 [1, 32]"),
        (lambda held: held.update(extra=torch.zeros(1)), "'extra' belongs to no new block"),
        (lambda held: held.update({NAME.replace("2", "3"): held[NAME].clone()}), "belongs to no new block"),
    ],
)
def test_a_pack_must_fit(made, tmp_path, change, words):
    base, _, pack = made
    edit(pack, change)
    with pytest.raises(PackError) as caught:
        merge_pack(base, pack, tmp_path / "out")
    assert words in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_not_a_pack(made, tmp_path):
    base, expanded, pack = made
    with pytest.raises(PackError, match="not a block pack"):
        merge_pack(base, expanded, tmp_path / "out")
    (pack / "expansion.json").unlink()
    with pytest.raises(CheckpointError, match="not found"):
        merge_pack(base, pack, tmp_path / "out")
    with pytest.raises(CheckpointError, match="not found"):
        extract_pack(base, tmp_path / "out")


def test_no_pack_of_a_trained_base(made, tmp_path):
    _, expanded, _ = made
    path = next(expanded.glob("*00001*.safetensors"))
    held = load_file(path)
    next(t for name, t in held.items() if ".layers.0." in name).view(-1)[0] += 1
    save_file(held, path, {"format": "pt"})
    with pytest.raises(PackError, match="keep the whole checkpoint"):
        extract_pack(expanded, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_outputs_that_exist_or_overlap(made):
    base, expanded, pack = made
    with pytest.raises(OutputError, match="--overwrite"):
        merge_pack(base, pack, expanded)
    with pytest.raises(OutputError, match="inside the input"):
        merge_pack(base, pack, pack / "out")
    with pytest.raises(OutputError, match="inside the input"):
        extract_pack(expanded, expanded / "out")
    merge_pack(base, pack, expanded, overwrite=True)


def test_inspecting(made, capsys):
    _, expanded, pack = made
    of_pack, of_expanded = inspect_blocks(pack), inspect_blocks(expanded)
    assert (of_pack.kind, of_expanded.kind) == ("block pack", "expanded checkpoint")
    assert of_pack.parameters == of_expanded.parameters == sum(t.numel() for t in tensors(pack).values())
    assert main(["blocks", "inspect", str(pack), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert [block["index"] for block in said["expansion"]["new_blocks"]] == [2, 5]
    assert said["dtypes"] == "BF16"
    assert main(["blocks", "inspect", str(expanded)]) == 0
    assert "■■ □2 ■■ □5" in capsys.readouterr().out


def test_the_commands(made, tmp_path, capsys):
    base, expanded, _ = map(str, made)
    pack, out = str(tmp_path / "pack2"), str(tmp_path / "out")
    assert main(["blocks", "extract", expanded, pack, "--json"]) == 0
    assert [block["index"] for block in json.loads(capsys.readouterr().out)["new_blocks"]] == [2, 5]
    assert main(["blocks", "merge", base, pack, out, "--json", "--shard-size", "1GB"]) == 0
    assert json.loads(capsys.readouterr().out)["bytes_written"] > 0
    assert main(["blocks", "merge", base, base, out + "2"]) == 2
    assert "not a block pack" in capsys.readouterr().err
