"""An expanded, trained checkpoint is expanded again: its new blocks are base now. All of it can be undone."""

import json
import shutil
from itertools import pairwise

import pytest
import torch
from conftest import write_tiny_llama
from safetensors.torch import load_file
from tiny_run import write_base, write_recipe
from trained_files import assert_same_files, assert_same_tensors, in_place, new_indices
from transformers import AutoModelForCausalLM

import deepen
from deepen.blocks import extract_pack, inspect_blocks, merge_pack, stack_packs, unmerge
from deepen.checkpoint import Checkpoint, full_fingerprint
from deepen.cli import main
from deepen.config import load_recipe
from deepen.errors import CheckFailed, CheckpointError, PackError
from deepen.expansion import expand_checkpoint, prepare_expansion, read_expansion, verify_bytes
from deepen.model import freeze_base, load, new_parameters, save_blocks
from deepen.pipeline import training
from deepen.pipeline.run import run_recipe

TOKENS = torch.randint(96, (2, 24), generator=torch.Generator().manual_seed(0))
# What each stage adds: copies of base blocks, of earlier new ones, at the bottom, and several in one place.
STAGES = [{"blocks": 2}, {"after": [-1, 2, 2]}, {"blocks": 4, "groups": 2}]


def logits(directory):
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(directory)(TOKENS).logits


def build(directory, files):
    """The base and three stages on it, each trained before the next: [base, one, two, three]."""
    made = [write_tiny_llama(directory / "base", sharded=files == "sharded", dtype="bfloat16", bias=True)]
    for number, placed in enumerate(STAGES):
        out = directory / f"stage{number}"
        size = 25_000 + 7_000 * number if files == "cut anew" else None
        expand_checkpoint(made[-1], out, **placed, shard_size=size)
        assert torch.equal(logits(out), logits(made[-1]))
        assert verify_bytes(made[-1], out).identical
        in_place(out, new_indices(out, stage=number), seed=number)
        made.append(out)
    return made


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    return build(tmp_path_factory.mktemp("stages"), "sharded")


@pytest.mark.parametrize("files", ["single", "sharded", "cut anew"])
def test_three_stages_on_and_off(tmp_path, files):
    stages = build(tmp_path / "made", files)
    for number, (below, above) in enumerate(pairwise(stages)):
        assert verify_bytes(below, above, base_only=True).identical
        assert not verify_bytes(below, above).identical
        extract_pack(above, tmp_path / f"pack{number}")
        merge_pack(below, tmp_path / f"pack{number}", tmp_path / f"merged{number}")
        assert_same_tensors(above, tmp_path / f"merged{number}")
        unmerge(tmp_path / f"merged{number}", tmp_path / f"unmerged{number}")
        assert_same_files(below, tmp_path / f"unmerged{number}")
    # From the top to the bottom, each from what came out before.
    top = stages[-1]
    for number in range(len(STAGES) - 1, -1, -1):
        result = unmerge(top, tmp_path / f"down{number}")
        assert result.byte_identical
        assert {block.stage for block in result.removed} == {number}
        assert_same_files(stages[number], tmp_path / f"down{number}")
        top = tmp_path / f"down{number}"


def test_the_record(stages):
    one, two, three = (read_expansion(directory) for directory in stages[1:])
    assert [expansion.stage for expansion in (one, two, three)] == [0, 1, 2]
    assert [stage.base for stage in three.earlier] == [str(stages[0]), str(stages[1])]
    assert three.base == str(stages[2])
    assert three.earlier[0].base_files == one.base_files
    assert three.earlier[1].base_fingerprint == two.base_fingerprint
    counts = [len([b for b in three.new_blocks if b.stage == stage]) for stage in range(3)]
    assert counts == [2, 3, 4]
    # Blocks keep what they are: each stage's tensors are found under their new indices.
    assert len(three.latest_blocks) == 4
    assert sorted(new_indices(stages[3])) == new_indices(stages[3])


def test_only_the_latest_blocks_train(stages):
    model = load(stages[2])
    freeze_base(model)
    trained = {name.split(".")[2] for name, p in model.named_parameters() if p.requires_grad}
    assert sorted(map(int, trained)) == new_indices(stages[2], stage=1)


def test_a_pack_of_a_stage_fits_that_stage_only(stages, tmp_path):
    extract_pack(stages[2], tmp_path / "pack")
    assert "base_files" not in (tmp_path / "pack" / "expansion.json").read_text()
    for other in (stages[0], stages[2], stages[3]):
        with pytest.raises(PackError, match="not to"):
            merge_pack(other, tmp_path / "pack", tmp_path / "out")
    merge_pack(stages[1], tmp_path / "pack", tmp_path / "out")
    assert_same_files(stages[2], tmp_path / "out")


def test_packs_stacked_on_a_stage(stages, tmp_path):
    for number in (1, 2):
        out = tmp_path / f"expanded{number}"
        expand_checkpoint(stages[1], out, after=[1, 4])
        in_place(out, new_indices(out, stage=1), seed=number)
        extract_pack(out, tmp_path / f"pack{number}")
    packs = [tmp_path / "pack1", tmp_path / "pack2"]
    stack_packs(stages[1], packs, tmp_path / "stacked")
    record = read_expansion(tmp_path / "stacked")
    assert [(b.stage, b.pack) for b in record.new_blocks if b.stage == 0] == [(0, None)] * 2
    assert [b.pack for b in record.latest_blocks] == ["pack1", "pack2"] * 2
    assert verify_bytes(stages[1], tmp_path / "stacked", base_only=True).identical
    for pack in packs:
        extract_pack(tmp_path / "stacked", tmp_path / "back" / pack.name, pack=pack.name)
        assert_same_files(pack, tmp_path / "back" / pack.name)
    # The stack is a checkpoint like any other: expanded, and back to the base in two steps.
    expand_checkpoint(tmp_path / "stacked", tmp_path / "higher", blocks=1)
    unmerge(tmp_path / "higher", tmp_path / "down")
    assert_same_files(tmp_path / "stacked", tmp_path / "down")
    unmerge(tmp_path / "down", tmp_path / "base2")
    assert_same_files(stages[1], tmp_path / "base2")


def test_lineage(stages):
    facts = inspect_blocks(stages[3])
    assert [stage.stage for stage in facts.lineage] == [0, 1, 2]
    assert facts.lineage[0].layout.draw() == "■■ □2 ■■ □5"
    assert [b.block.index for b in facts.blocks] == new_indices(stages[3], stage=2)


def test_new_blocks_of_the_command(stages, tmp_path, capsys):
    capsys.readouterr()
    assert main(["expand", str(stages[1]), str(tmp_path / "out"), "--after", "0", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)["new_blocks"]
    assert [(block["index"], block["stage"]) for block in said] == [(1, 1), (3, 0), (6, 0)]
    assert main(["verify", str(stages[1]), str(tmp_path / "out"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["identical"] is True


def test_a_record_that_is_not_the_checkpoints(stages, tmp_path):
    shutil.copytree(stages[1], tmp_path / "copy")
    shutil.copy(stages[2] / "expansion.json", tmp_path / "copy")
    with pytest.raises(CheckpointError, match="describes 9 blocks, the checkpoint has 6"):
        prepare_expansion(tmp_path / "copy", blocks=1)


def test_a_recipe_on_an_expanded_base(stages, tmp_path, capsys):
    (tmp_path / "text.txt").write_text("some text\n" * 50)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"""
base: {stages[1]}
output: {tmp_path / "run"}
expand: {{blocks: 3}}
data:
  sequence_length: 16
  sources: [{{name: text, path: {tmp_path / "text.txt"}}}]
train: {{tokens: 64, batch_tokens: 32, learning_rate: 1e-3}}
"""
    )
    capsys.readouterr()
    assert main(["run", str(recipe), "--dry-run", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["layout"] == "■■ □2 ■■ □5 ■■ □8"
    new = said["parameters"]["new"]
    assert new > 0
    assert said["parameters"]["trainable"] == new


@pytest.fixture
def second(tmp_path):
    """A recipe of three steps on a base that is expanded and trained already."""
    write_base(tmp_path / "first", dtype="bfloat16")
    expand_checkpoint(tmp_path / "first", tmp_path / "base", blocks=2)
    in_place(tmp_path / "base", new_indices(tmp_path / "base"))
    return write_recipe(tmp_path, merge=True, expand={"blocks": 3}, train__tokens=3 * 128)


def test_a_run_on_an_expanded_base(second, tmp_path):
    earlier = read_expansion(tmp_path / "base")
    result = run_recipe(load_recipe(second))
    record = read_expansion(tmp_path / "run" / "blocks")
    assert record.stage == 1
    assert sorted(block.stage for block in record.new_blocks) == [0, 0, 1, 1, 1]
    assert [record.layout.base_block(b.index) for b in record.new_blocks if b.stage == 0] == [
        block.index for block in earlier.new_blocks
    ]
    # What trained and was saved is the new stage alone.
    held = load_file(tmp_path / "run" / "blocks" / "blocks.safetensors")
    assert {int(name.split(".")[2]) for name in held} == {b.index for b in record.latest_blocks}
    assert result.parameters.trainable == sum(tensor.numel() for tensor in held.values())
    assert any(bool(tensor.any()) for name, tensor in held.items() if name.endswith("o_proj.weight"))
    # The earlier stage's blocks are audited with the rest of the base.
    files = Checkpoint.open(tmp_path / "base")
    assert result.audit.tensors == len(files.tensors)
    assert result.audit.after == full_fingerprint(files)
    assert read_expansion(tmp_path / "run" / "model").new_blocks == record.new_blocks
    unmerge(tmp_path / "run" / "model", tmp_path / "again")
    assert_same_files(tmp_path / "base", tmp_path / "again")


def test_an_earlier_block_that_moves_fails_the_audit(second, tmp_path, monkeypatch):
    honest = training.train
    record = prepare_expansion(tmp_path / "base", blocks=3).expansion
    old = [block.index for block in record.new_blocks if block.stage == 0]

    def leaky(model, *arguments, **keywords):
        honest(model, *arguments, **keywords)
        with torch.no_grad():
            model.model.layers[old[0]].mlp.up_proj.weight[0, 0] += 1

    monkeypatch.setattr(training, "train", leaky)
    with pytest.raises(CheckFailed, match="a base tensor changed"):
        run_recipe(load_recipe(second))


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("rounded", [True, False])
def test_a_stage_on_blocks_that_trained_in_fp32(tmp_path, wide, rounded):
    base = write_tiny_llama(tmp_path / "base", dtype="bfloat16")
    model = load(base, dtype=torch.float32 if wide else None)
    deepen.insert_blocks(model, deepen.plan_layout(4, blocks=2))
    for parameter in new_parameters(model).values():
        moved = parameter.detach().float() + 0.05 * torch.randn(parameter.shape)
        parameter.data = moved.bfloat16().float() if rounded else moved
    save_blocks(model, tmp_path / "one")
    merge_pack(base, tmp_path / "one", tmp_path / "merged")
    deepen.insert_blocks(model, deepen.plan_layout(6, after=[2, 5]))
    for parameter in new_parameters(model).values():
        parameter.data = (parameter.detach() + 0.05).bfloat16().to(parameter.dtype)
    save_blocks(model, tmp_path / "two")
    if not rounded:
        # The blocks below the new stage were others than those that were saved.
        with pytest.raises(PackError, match="fingerprint"):
            merge_pack(tmp_path / "merged", tmp_path / "two", tmp_path / "both")
        return
    merge_pack(tmp_path / "merged", tmp_path / "two", tmp_path / "both")
    both = load(tmp_path / "both", dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(both(TOKENS).logits, model.float().eval()(TOKENS).logits)
