"""The live model on families that each break something: fused experts, mixed kinds, prefixes, buffers."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from family_table import LINES, Line
from safetensors.torch import load_file
from test_contract import differing, observe, plain
from transformers import PreTrainedModel

import deepen
from deepen.checkpoint import Checkpoint, fast_fingerprint, full_fingerprint
from deepen.expansion import read_expansion
from deepen.model import base_fingerprint, base_tensors, new_parameters

NAMES = (
    "llama tied and biased",
    "gemma3, no list",
    "gpt2, old files",
    "gpt_neox, one after the other, unbiased, old files",
    "mixtral",
    "qwen3_moe, every second dense",
    "qwen3_next, every third full, some dense, no list",
    "deepseek_v3, a dense copy below",
)
CHOSEN = [line for line in LINES if line.name in NAMES]
# What switching can break: mixed kinds, fused experts, leading counts, other names. It takes longer.
HARD = pytest.mark.parametrize(
    "made",
    [line for line in CHOSEN if line.config in ("Gemma3Text", "GPT2", "Mixtral", "Qwen3Moe", "Qwen3Next")],
    ids=lambda line: line.name,
    indirect=True,
)


class Made(NamedTuple):
    """A base on disk, its line of the table, and what it computes."""

    base: Path
    line: Line
    observed: dict[str, torch.Tensor]

    @property
    def layout(self) -> deepen.Layout:
        return deepen.plan_layout(self.line.depth, **self.line.placed)


@pytest.fixture(scope="module", params=CHOSEN, ids=lambda line: line.name)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    base = request.param.write(tmp_path_factory.mktemp("family") / "base")
    return Made(base, request.param, observe(plain(base)))


@torch.no_grad()
def move(model: PreTrainedModel, seed: int = 3) -> None:
    """Let the new blocks learn something: parameters, and the buffers that are trained beside them."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in deepen.model.new_tensors(model).values():
        tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.1)


def held(directory: Path) -> dict[str, torch.Tensor]:
    return {k: v for f in sorted(directory.glob("*.safetensors")) for k, v in load_file(f).items()}


def test_all_are_there() -> None:
    assert len(CHOSEN) == len(NAMES)


def test_inserted_it_is_what_the_byte_engine_writes(made: Made, tmp_path: Path) -> None:
    model, base = plain(made.base), Checkpoint.open(made.base)
    deepen.insert_blocks(model, made.layout)
    assert not differing(observe(model), made.observed)

    deepen.expand_checkpoint(made.base, tmp_path / "expanded", **made.line.placed)
    record = read_expansion(tmp_path / "expanded").portable
    assert deepen.expansion_of(model) == record
    assert record.base_fingerprint.fast == fast_fingerprint(base)
    expanded = plain(tmp_path / "expanded")
    assert not differing(expanded.state_dict(), model.state_dict())
    assert not differing(model.state_dict(), expanded.state_dict())
    ours, theirs = model.config.to_dict(), expanded.config.to_dict()
    assert {k for k in ours if ours[k] != theirs[k]} <= {"architectures", "dtype", "_name_or_path"}


def test_the_base_inside_is_the_files(made: Made) -> None:
    model, files = plain(made.base), held(made.base)
    deepen.insert_blocks(model, made.layout)
    move(model)
    base = base_tensors(model, repeated=True)
    assert not [n for n in base if n in files and not torch.equal(base[n], files[n])]
    assert {n.rpartition(".")[2] for n in files.keys() - base.keys()} <= {"inv_freq", "bias", "masked_bias"}
    assert not base.keys() - files.keys() - {"lm_head.weight", "embed_out.weight"}
    dtypes = dict.fromkeys(base.keys() & files.keys(), "F32")
    wanted = full_fingerprint(Checkpoint.open(made.base), lambda name: name if name in dtypes else None)
    assert base_fingerprint(model, "full", dtypes) == wanted


def test_a_pack_is_the_same_from_memory_and_from_files(made: Made, tmp_path: Path) -> None:
    model = plain(made.base)
    deepen.insert_blocks(model, made.layout)
    trained = deepen.freeze_base(model)
    assert trained.keys() == new_parameters(model).keys()
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trained.keys()
    move(model)
    moved = observe(model)
    assert differing(moved, made.observed)
    pack = deepen.save_blocks(model, tmp_path / "pack")
    deepen.merge_pack(made.base, pack, tmp_path / "merged")
    assert not differing(observe(plain(tmp_path / "merged")), moved)
    deepen.extract_pack(tmp_path / "merged", tmp_path / "extracted")
    ours, theirs = held(pack), held(tmp_path / "extracted")
    assert not differing(ours, theirs)
    assert (pack / "expansion.json").read_bytes() == (tmp_path / "extracted/expansion.json").read_bytes()
    # A pack cut from old files has buffers that the model computes itself.
    for each in (pack, tmp_path / "extracted"):
        assert not differing(observe(deepen.load(made.base, each)), moved)
        live = deepen.attach(plain(made.base), each)
        assert not differing(observe(live), moved)
        again = deepen.save_blocks(live, tmp_path / f"again from {each.name}")
        assert (again / "blocks.safetensors").read_bytes() == (pack / "blocks.safetensors").read_bytes()


@pytest.fixture
def packs(made: Made, tmp_path: Path) -> dict[str, Path]:
    """Two packs of one base, in other places and of other sizes."""
    written = {}
    for seed, (name, after) in enumerate({"low": [0, 2], "high": [0, made.line.depth - 1]}.items()):
        model = plain(made.base)
        deepen.insert_blocks(model, deepen.plan_layout(made.line.depth, after=after))
        move(model, seed)
        written[name] = deepen.save_blocks(model, tmp_path / name)
    return written


def stacked(made: Made, packs: dict[str, Path], names: tuple[str, ...], out: Path) -> dict[str, torch.Tensor]:
    """What plain transformers computes with packs that were written into a checkpoint as bytes."""
    if not names:
        return made.observed
    from deepen.blocks.merge import stack_packs

    stack_packs(made.base, [packs[name] for name in names], out)
    return observe(plain(out))


@HARD
def test_switching(made: Made, packs: dict[str, Path], tmp_path: Path) -> None:
    model = plain(made.base)
    config = model.config.to_dict()
    for pack in packs.values():
        deepen.attach(model, pack)
    assert deepen.attached(model) == ("low", "high")
    for number, names in enumerate((("low",), (), ("low", "high"), ("high", "low"))):
        deepen.activate(model, *names)
        wanted = stacked(made, packs, names, tmp_path / str(number))
        assert not differing(observe(model), wanted), names
        model.save_pretrained(tmp_path / f"saved {number}")
        assert not differing(observe(plain(tmp_path / f"saved {number}")), wanted), names
        hidden = model(input_ids=torch.tensor([[3, 4]]), output_hidden_states=True).hidden_states
        assert len(hidden) == made.line.depth + 2 * len(names) + 1
    with deepen.bypass(model):
        assert not differing(observe(model), made.observed)
        assert model.config.to_dict() == config
    assert not differing(observe(model), wanted)
    for name in packs:
        deepen.detach(model, name)
    assert deepen.attached(model) == ()
    assert not differing(observe(model), made.observed)
    assert model.config.to_dict() == config


@HARD
def test_several_at_once_are_one_expansion(made: Made, packs: dict[str, Path], tmp_path: Path) -> None:
    wanted = stacked(made, packs, ("high", "low"), tmp_path / "stacked")
    model = plain(made.base)
    for name in packs:
        deepen.attach(model, packs[name])
    deepen.activate(model, "high", "low")
    record = deepen.expansion_of(model)
    assert record.layout == read_expansion(tmp_path / "stacked").layout
    assert len(deepen.freeze_base(model)) == len(new_parameters(model))
    whole = deepen.save_blocks(model, tmp_path / "whole")
    assert not differing(observe(deepen.load(made.base, whole)), wanted)
    # The stack on disk is known by the packs it is of.
    again = deepen.load(tmp_path / "stacked")
    assert set(deepen.attached(again)) == {"high", "low"}
    deepen.activate(again, "low")
    assert not differing(observe(again), observe(deepen.load(made.base, packs["low"])))


@HARD
def test_expanded_again(made: Made, tmp_path: Path) -> None:
    live = plain(made.base)
    deepen.insert_blocks(live, made.layout)
    move(live)
    first = observe(live)
    deepen.save_blocks(live, tmp_path / "first")
    deepen.merge_pack(made.base, tmp_path / "first", tmp_path / "merged")
    second = deepen.plan_layout(made.layout.depth, after=[0, made.layout.depth - 1])
    loaded = plain(tmp_path / "merged")
    deepen.expand_checkpoint(tmp_path / "merged", tmp_path / "twice", after=[0, made.layout.depth - 1])
    recorded = read_expansion(tmp_path / "twice")
    for model in (live, loaded):
        deepen.insert_blocks(model, second)
        assert not differing(observe(model), first)
        record = deepen.expansion_of(model)
        assert record.stage == 1
        assert record.new_blocks == recorded.new_blocks
        assert record.layout == second
        assert len(record.earlier) == 1
    assert deepen.expansion_of(loaded).base_fingerprint == recorded.base_fingerprint

    trained = deepen.freeze_base(loaded)
    of_second = {name for index in second.new_indices for name in trained if f".{index}." in f".{name}"}
    assert trained.keys() == of_second
    move(loaded, 5)
    moved = observe(loaded)
    with deepen.bypass(loaded):
        assert not differing(observe(loaded), first), "the latest stage alone is switched off"
    pack = deepen.save_blocks(loaded, tmp_path / "second")
    assert not differing(observe(deepen.load(tmp_path / "merged", pack)), moved)
    deepen.merge_pack(tmp_path / "merged", pack, tmp_path / "merged twice")
    again = plain(tmp_path / "merged twice")
    assert not differing(observe(again), moved)
    assert deepen.expansion_of(again).stage == 1
    deepen.detach(again, "new")
    assert not differing(observe(again), first)
    assert deepen.expansion_of(again).stage == 0
    deepen.detach(again, "new")
    assert not differing(observe(again), made.observed)
    assert deepen.attached(again) == ()


def test_json_of_a_pack_names_tensors_of_the_files(made: Made, packs: dict[str, Path]) -> None:
    record: dict[str, Any] = json.loads((packs["low"] / "expansion.json").read_text())
    filled = {name for block in record["new_blocks"] for name in block["filled"]}
    assert filled
    assert filled <= held(packs["low"]).keys()
