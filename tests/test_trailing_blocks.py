"""Blocks behind the last, which predict tokens further ahead: they move up with the depth, untouched."""

from pathlib import Path

import pytest
import torch
from family_table import MIXED, Line, Tensors
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

import deepen
from deepen.blocks import unmerge
from deepen.errors import CheckpointError

LINES = [line for line in MIXED if line.name in ("deepseek_v3", "glm4_moe")]


def with_blocks_behind(directory: Path, depth: int, count: int = 1) -> Path:
    """Add what files of the hub hold behind the last block: a block, and what joins it to the model."""
    path = directory / "model.safetensors"
    held = load_file(path)
    last = f"model.layers.{depth - 1}."
    made: Tensors = {}
    for block in range(depth, depth + count):
        place = f"model.layers.{block}."
        made |= {place + name.removeprefix(last): t + 0.01 for name, t in held.items() if last in name}
        hidden = held["model.norm.weight"].shape[0]
        made[f"{place}eh_proj.weight"] = torch.randn(hidden, 2 * hidden)
        for norm in ("enorm", "hnorm", "shared_head.norm"):
            made[f"{place}{norm}.weight"] = torch.randn(hidden)
        made[f"{place}embed_tokens.weight"] = held["model.embed_tokens.weight"].clone()
        made[f"{place}shared_head.head.weight"] = held["lm_head.weight"].clone()
    save_file(held | made, path, metadata={"format": "pt"})
    return directory


def load(directory: Path) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    # transformers looks for such blocks where the published models have them, at their very numbers.
    model._keys_to_ignore_on_load_unexpected = [rf"model\.layers\.{model.config.num_hidden_layers}\..*"]
    return model


@pytest.mark.parametrize("line", LINES, ids=lambda line: line.name)
def test_they_move_up_with_the_depth(line: Line, tmp_path: Path) -> None:
    base = with_blocks_behind(line.write(tmp_path / "base"), line.depth)
    result = deepen.expand_checkpoint(base, tmp_path / "expanded", after=[1, line.depth - 1])
    assert [block.index for block in result.new_blocks] == [2, line.depth + 1]
    old, new = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "expanded"))
    was, now = f"model.layers.{line.depth}.", f"model.layers.{line.depth + 2}."
    behind = {name.removeprefix(was): tensor for name, tensor in old.items() if name.startswith(was)}
    moved = {name.removeprefix(now): tensor for name, tensor in new.items() if name.startswith(now)}
    assert behind.keys() == moved.keys()
    assert all(torch.equal(moved[name], tensor) for name, tensor in behind.items())
    assert deepen.verify_bytes(base, tmp_path / "expanded").identical

    models = [load(base), load(tmp_path / "expanded")]
    ids = torch.randint(3, 96, (1, 12), generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        assert torch.equal(*(model(ids).logits for model in models))
        guessed = [model.generate(ids, max_new_tokens=6, do_sample=False, use_mtp=True) for model in models]
    assert torch.equal(*guessed)

    unmerge(tmp_path / "expanded", tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        base / "model.safetensors"
    ).read_bytes()


def test_one_more_than_the_config_says_is_refused(tmp_path: Path) -> None:
    base = with_blocks_behind(LINES[0].write(tmp_path / "base"), LINES[0].depth, count=2)
    with pytest.raises(CheckpointError, match=f"the files hold blocks 0–{LINES[0].depth + 1}"):
        deepen.expand_checkpoint(base, tmp_path / "expanded", blocks=1)


def test_what_predicts_ahead_outside_the_blocks_stays(tmp_path: Path) -> None:
    line = next(line for line in MIXED if line.name == "qwen3_next")
    base = line.write(tmp_path / "base")
    path, beside = base / "model.safetensors", ("mtp.fc.weight", "mtp.layers.0.mlp.experts.3.up_proj.weight")
    save_file(load_file(path) | {name: torch.randn(4, 4) for name in beside}, path, metadata={"format": "pt"})
    deepen.expand_checkpoint(base, tmp_path / "expanded", blocks=2)
    old, new = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "expanded"))
    assert all(torch.equal(old[name], new[name]) for name in beside)
