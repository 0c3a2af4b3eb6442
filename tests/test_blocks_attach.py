"""Whether a pack fits a base, and packs that do not: two lines, nothing written."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Gemma2Config, Gemma2ForCausalLM

from deepen.blocks import extract_pack, fit_pack
from deepen.cli import main
from deepen.expansion import expand_checkpoint

NAME = "model.layers.2.mlp.up_proj.weight"


@pytest.fixture
def made(tiny_llama, tmp_path):
    base, pack = tiny_llama(), tmp_path / "pack"
    expand_checkpoint(base, tmp_path / "expanded", blocks=2)
    extract_pack(tmp_path / "expanded", pack)
    return base, pack


def test_a_pack_that_fits(made, capsys):
    base, pack = made
    fit = fit_pack(base, pack)
    held = load_file(pack / "blocks.safetensors")
    assert fit.tensors == len(held)
    assert fit.parameters == sum(tensor.numel() for tensor in held.values())
    assert main(["blocks", "attach", str(base), str(pack), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["fits"] is True
    assert said["dtypes"] == ["F32"]
    assert (
        said["fingerprint"] == json.loads((pack / "expansion.json").read_text())["base_fingerprint"]["fast"]
    )
    before = sorted(os.listdir(pack.parent))
    assert main(["blocks", "attach", str(base), str(pack)]) == 0
    out = capsys.readouterr().out
    assert "■■ □2 ■■ □5" in out
    assert f"deepen blocks merge {base} {pack} OUT" in out
    assert sorted(os.listdir(pack.parent)) == before


def other_family(base, pack):
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8,
    )  # fmt: skip
    Gemma2ForCausalLM(config).save_pretrained(base)


def tensors(change):
    def edit(base, pack):
        held = load_file(pack / "blocks.safetensors")
        change(held)
        save_file(held, pack / "blocks.safetensors")

    return edit


def record(change):
    def edit(base, pack):
        raw = json.loads((pack / "expansion.json").read_text())
        change(raw)
        (pack / "expansion.json").write_text(json.dumps(raw))

    return edit


def text(content):
    return lambda base, pack: (pack / "expansion.json").write_bytes(content)


def linked(name):
    def edit(base, pack):
        (pack / name).rename(pack.parent / "elsewhere")
        (pack / name).symlink_to(pack.parent / "elsewhere")

    return edit


def directory(name):
    def edit(base, pack):
        (pack / name).unlink()
        (pack / name).mkdir()

    return edit


def dangling(base, pack):
    (pack / "blocks.safetensors").unlink()
    (pack / "blocks.safetensors").symlink_to("nowhere")


def first(raw):
    return raw["new_blocks"][0]


FAULTS = {
    "no directory": (lambda base, pack: pack.rename(pack.parent / "moved"), "not a block pack"),
    "no tensors": (lambda base, pack: (pack / "blocks.safetensors").unlink(), "not a block pack"),
    "no record": (lambda base, pack: (pack / "expansion.json").unlink(), "not found"),
    "empty record": (text(b""), "not readable as JSON"),
    "record of bytes": (text(b"\xff\xfe\x00"), "not readable as JSON"),
    "record too deep": (text(b"[" * 100_000), "not readable as JSON"),
    "record is a list": (text(b"[1]"), "format_version"),
    "record of numbers": (text(b'{"format_version": 1, "new_blocks": 7}'), "expansion.json"),
    "newer record": (record(lambda raw: raw.update(format_version=2)), "format_version is 2"),
    "base_files not files": (record(lambda raw: raw.update(base_files=[1])), "base_files"),
    "packs not packs": (record(lambda raw: raw.update(packs={"a": 1})), "packs"),
    "pack not a name": (record(lambda raw: first(raw).update(pack=3)), "pack"),
    "no new blocks": (record(lambda raw: raw.update(new_blocks=[])), "new_blocks"),
    "index astray": (record(lambda raw: first(raw).update(index=7)), "expansion.json"),
    "another depth": (record(lambda raw: raw.update(base_blocks=5)), "blocks"),
    "another family": (record(lambda raw: raw.update(family="gemma2")), "belongs to a gemma2"),
    "another fingerprint": (record(lambda raw: raw["base_fingerprint"].update(fast="0" * 64)), "fingerprint"),
    "a tensor missing": (tensors(lambda held: held.pop(NAME)), f"'{NAME}' is missing"),
    "a tensor too many": (tensors(lambda held: held.update(x=torch.ones(1))), "'x' belongs to no new block"),
    "of another block": (
        tensors(lambda held: held.update({NAME.replace("2", "3"): held.pop(NAME)})),
        "belongs to no new block",
    ),
    "another shape": (
        tensors(lambda held: held.update({NAME: held[NAME].T.contiguous()})),
        "is F32 [32, 48]",
    ),
    "another dtype": (tensors(lambda held: held.update({NAME: held[NAME].bfloat16()})), "is BF16 [48, 32]"),
    "no safetensors": (lambda base, pack: (pack / "blocks.safetensors").write_text("x" * 99), "header"),
    "truncated": (lambda base, pack: os.truncate(pack / "blocks.safetensors", 2000), "blocks.safetensors"),
    "tensors through a link": (linked("blocks.safetensors"), "link out of the model"),
    "record through a link": (linked("expansion.json"), "link out of the model"),
    "a link to nowhere": (dangling, "blocks.safetensors"),
    "tensors are a directory": (directory("blocks.safetensors"), "not a regular file"),
    "record is a directory": (directory("expansion.json"), "expansion.json"),
    "a base of another family": (other_family, "not to"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_malformed(made, tmp_path, capsys, fault):
    base, pack = made
    edit, words = FAULTS[fault]
    edit(base, pack)
    out = tmp_path / "out"
    capsys.readouterr()
    for command, *arguments in (
        ("attach", base, pack),
        ("merge", base, pack, out),
        ("stack", base, out, pack),
    ):
        assert main(["blocks", command, *map(str, arguments)]) == 2
        said = capsys.readouterr()
        assert words in said.err
        assert said.err.startswith("error: ")
        assert said.err.count("\n") <= 2
        assert not said.out
        assert not out.exists()
    assert not [path for path in tmp_path.iterdir() if ".partial" in path.name]


def test_a_record_that_names_no_tensors(made, capsys):
    base, pack = made
    record(lambda raw: first(raw).update(filled={}))(base, pack)
    assert main(["blocks", "inspect", str(pack)]) == 2
    assert f"{pack}/expansion.json: new block 2: filled names none" in capsys.readouterr().err


def test_of_a_run_the_pack_within_is_named(made, tmp_path, capsys):
    base, pack = made
    run = tmp_path / "run"
    run.mkdir()
    pack.rename(run / "blocks")
    assert main(["blocks", "attach", str(base), str(run)]) == 2
    assert f"this is not a block pack; that of this run is {run / 'blocks'}" in capsys.readouterr().err


@pytest.mark.parametrize("fault", ["a tensor too many", "of another block", "record through a link"])
def test_inspecting_malformed_ones(made, capsys, fault):
    FAULTS[fault][0](*made)
    assert main(["blocks", "inspect", str(made[1])]) == 2
    assert capsys.readouterr().err.count("\n") <= 2
