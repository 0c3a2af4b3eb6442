"""Several packs of one base in one checkpoint, and back."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from trained_files import assert_same_files, in_place, new_indices, tensors
from transformers import AutoModelForCausalLM

from deepen.blocks import extract_pack, inspect_blocks, merge_pack, stack_packs, unmerge
from deepen.cli import main
from deepen.errors import CheckpointError, OutputError, PackError
from deepen.expansion import expand_checkpoint, read_expansion, verify_bytes
from deepen.model import load, save_blocks


@pytest.fixture
def packs(tiny_llama, tmp_path):
    """A base and a function that makes a trained pack of it."""
    base = tiny_llama(sharded=True, dtype="bfloat16")

    def build(name, seed, **placed):
        expanded = tmp_path / f"{name}-expanded"
        expand_checkpoint(base, expanded, **placed)
        in_place(expanded, new_indices(expanded), seed)
        extract_pack(expanded, tmp_path / name)
        return tmp_path / name

    return base, build


def pack_of(directory):
    blocks = json.loads((directory / "expansion.json").read_text())["new_blocks"]
    return [(block["index"], block["after"], block["pack"]) for block in blocks]


def test_order_positions_and_bytes(packs, tmp_path):
    base, build = packs
    law, maths = build("law", 1, after=[1, 3]), build("maths", 2, after=[-1, 1, 1])
    out = tmp_path / "out"
    stack_packs(base, [law, maths], out)
    assert pack_of(out) == [
        (0, -1, "maths"),
        (3, 1, "law"),
        (4, 1, "maths"),
        (5, 1, "maths"),
        (8, 3, "law"),
    ]
    held, ours = tensors(out), {"law": tensors(law), "maths": tensors(maths)}
    for name, index, was in [("maths", 0, 0), ("law", 3, 2), ("maths", 4, 3), ("maths", 5, 4), ("law", 8, 5)]:
        for key, tensor in ours[name].items():
            if f".layers.{was}." in key:
                assert torch.equal(held[key.replace(f".layers.{was}.", f".layers.{index}.")], tensor)
    assert verify_bytes(base, out, base_only=True).identical
    # Read by transformers as any other model.
    assert AutoModelForCausalLM.from_pretrained(out).config.num_hidden_layers == 9


def test_the_order_given_is_bottom_to_top(packs, tmp_path):
    base, build = packs
    law, maths = build("law", 1, after=[2]), build("maths", 2, after=[2])
    stack_packs(base, [law, maths], tmp_path / "one")
    stack_packs(base, [maths, law], tmp_path / "other")
    assert [pack for *_, pack in pack_of(tmp_path / "one")] == ["law", "maths"]
    assert [pack for *_, pack in pack_of(tmp_path / "other")] == ["maths", "law"]
    at = "model.layers.{}.mlp.up_proj.weight".format
    one, other = tensors(tmp_path / "one"), tensors(tmp_path / "other")
    assert torch.equal(one[at(3)], other[at(4)])
    assert torch.equal(one[at(4)], other[at(3)])
    assert not torch.equal(one[at(3)], one[at(4)])


@pytest.mark.parametrize("shard_size", [None, 20_000])
def test_each_pack_comes_back_byte_for_byte(packs, tmp_path, shard_size):
    base, build = packs
    law, maths = build("law", 1, blocks=2), build("maths", 2, blocks=3)
    # As `deepen.save_blocks` writes it: another header, another name for the base.
    live = save_blocks(load(base, maths), tmp_path / "live")
    raw = json.loads((live / "expansion.json").read_text())
    (live / "expansion.json").write_text(json.dumps({**raw, "base": "someone/base", "later": [1]}))
    out = tmp_path / "out"
    stack_packs(base, [law, live, maths], out, shard_size=shard_size)
    for pack in (law, live, maths):
        extract_pack(out, tmp_path / "back" / pack.name, pack=pack.name)
        assert_same_files(pack, tmp_path / "back" / pack.name)
    assert unmerge(out, tmp_path / "again").byte_identical
    assert_same_files(base, tmp_path / "again")


def test_the_combined_pack(packs, tmp_path):
    base, build = packs
    law, maths = build("law", 1, blocks=2), build("maths", 2, blocks=2)
    stack_packs(base, [law, maths], tmp_path / "out")
    extract_pack(tmp_path / "out", tmp_path / "both")
    assert read_expansion(tmp_path / "both").base_files == {}
    merge_pack(base, tmp_path / "both", tmp_path / "again")
    assert_same_files(tmp_path / "out", tmp_path / "again")
    extract_pack(tmp_path / "again", tmp_path / "single", pack="maths")
    assert_same_files(maths, tmp_path / "single")
    # A combined pack is a pack like any other, under its own name.
    other = build("other", 3, blocks=1)
    stack_packs(base, [tmp_path / "both", other], tmp_path / "three")
    extract_pack(tmp_path / "three", tmp_path / "back", pack="both")
    assert_same_files(tmp_path / "both", tmp_path / "back")


def test_after_more_training(packs, tmp_path):
    """The pack then holds what was learned, under the names it had."""
    base, build = packs
    law, maths = build("law", 1, after=[1]), build("maths", 2, after=[1])
    stack_packs(base, [law, maths], tmp_path / "out")
    in_place(tmp_path / "out", [3], seed=5)  # block 3 is maths's
    extract_pack(tmp_path / "out", tmp_path / "law2", pack="law")
    assert_same_files(law, tmp_path / "law2")
    extract_pack(tmp_path / "out", tmp_path / "maths2", pack="maths")
    before, after = tensors(maths), tensors(tmp_path / "maths2")
    assert before.keys() == after.keys()
    assert not any(torch.equal(before[name], after[name]) for name in before)
    merge_pack(base, tmp_path / "maths2", tmp_path / "merged")
    assert verify_bytes(base, tmp_path / "merged", base_only=True).identical


def test_the_same_name_twice(packs, tmp_path):
    base, build = packs
    law = build("law", 1, blocks=1)
    (tmp_path / "x").mkdir()
    again = tmp_path / "x" / "law"
    law.rename(again)
    other = build("law2", 2, blocks=1)
    other.rename(tmp_path / "law")
    stack_packs(base, [again, tmp_path / "law"], tmp_path / "out")
    assert [pack for *_, pack in pack_of(tmp_path / "out")] == ["law", "law-2"]
    assert inspect_blocks(tmp_path / "out").packs == ("law", "law-2")


def test_refusals(packs, tiny_llama, tmp_path):
    base, build = packs
    law, maths = build("law", 1, blocks=1), build("maths", 2, blocks=1)
    other = tiny_llama("other", seed=1, dtype="bfloat16")
    out = tmp_path / "out"
    with pytest.raises(PackError, match="no packs"):
        stack_packs(base, [], out)
    with pytest.raises(PackError, match="fingerprint"):
        stack_packs(other, [law, maths], out)
    with pytest.raises(PackError, match="not a block pack"):
        stack_packs(base, [law, base], out)
    with pytest.raises(OutputError, match="inside the input"):
        stack_packs(base, [law, maths], maths / "out")
    raw = json.loads((maths / "expansion.json").read_text())
    (maths / "expansion.json").write_text(json.dumps({**raw, "base_blocks": 5}))
    with pytest.raises((PackError, CheckpointError), match="blocks"):
        stack_packs(base, [law, maths], out)
    held = load_file(law / "blocks.safetensors")
    save_file({name: tensor.float() for name, tensor in held.items()}, law / "blocks.safetensors")
    with pytest.raises(PackError, match="is F32"):
        stack_packs(base, [law], out)
    assert not out.exists()
    merged = tmp_path / "law-expanded"
    with pytest.raises(PackError, match="of a pack 'maths'; none was stacked"):
        extract_pack(merged, tmp_path / "back", pack="maths")


def test_the_commands(packs, tmp_path, capsys):
    base, build = packs
    law, maths, out = build("law", 1, blocks=1), build("maths", 2, blocks=1), tmp_path / "out"
    assert main(["blocks", "stack", str(base), str(out), str(law), str(maths)]) == 0
    assert "■■■■ □4 □5" in capsys.readouterr().out
    assert main(["blocks", "stack", str(base), str(out), str(law), "--overwrite", "--json"]) == 0
    assert [block["pack"] for block in json.loads(capsys.readouterr().out)["new_blocks"]] == ["law"]
    assert main(["blocks", "stack", str(base), str(out), str(law), str(maths), "--overwrite"]) == 0
    assert main(["blocks", "extract", str(out), str(tmp_path / "back"), "--pack", "law"]) == 0
    assert_same_files(law, tmp_path / "back")
    capsys.readouterr()
    assert main(["blocks", "extract", str(out), str(tmp_path / "x"), "--pack", "what"]) == 2
    assert "it has law, maths" in capsys.readouterr().err
