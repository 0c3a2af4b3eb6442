"""Taking new blocks off again: the base, byte for byte, whatever wrote its files."""

import json
import logging
import shutil
import struct

import pytest
from safetensors.torch import load_file, save_file
from trained_files import assert_same_files, assert_same_tensors, in_place, new_indices, saved_again
from transformers import AutoModelForCausalLM

from deepen.blocks import extract_pack, merge_pack, unmerge
from deepen.cli import main
from deepen.errors import CheckpointError, OutputError, PackError
from deepen.expansion import expand_checkpoint


def rewrite_headers(base, change):
    """Give every weight file another header for the same tensors: the text that `change` makes of it."""
    for path in base.glob("*.safetensors"):
        data = path.read_bytes()
        size = struct.unpack("<Q", data[:8])[0]
        text = change(json.loads(data[8 : 8 + size])).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])


def shuffle(base):
    """Lay the tensors out in an order that no rule gives."""
    for path in base.glob("*.safetensors"):
        data = path.read_bytes()
        size = struct.unpack("<Q", data[:8])[0]
        header, body, out, begin = json.loads(data[8 : 8 + size]), data[8 + size :], {}, 0
        bodies = []
        for name in sorted((n for n in header if n != "__metadata__"), key=lambda name: name[::-1]):
            first, last = header[name]["data_offsets"]
            out[name] = {**header[name], "data_offsets": [begin, begin + last - first]}
            bodies.append(body[first:last])
            begin += last - first
        text = json.dumps(out).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(bodies))


def edit_config(base, dump):
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_bytes(dump(config))


STYLES = {
    "as transformers writes": lambda base: None,
    "spaced headers": lambda base: rewrite_headers(base, lambda raw: json.dumps(raw, indent=1)),
    "no metadata": lambda base: rewrite_headers(
        base, lambda raw: json.dumps({k: v for k, v in raw.items() if k != "__metadata__"})
    ),
    "more metadata": lambda base: rewrite_headers(
        base, lambda raw: json.dumps({**raw, "__metadata__": {"b": "é", "a": "\n"}})
    ),
    "any order": shuffle,
    "config with tabs and CRLF": lambda base: edit_config(
        base,
        lambda c: json.dumps({**c, "é": "ü"}, indent="\t", ensure_ascii=False).replace("\n", "\r\n").encode(),
    ),
    "config in one line": lambda base: edit_config(base, lambda c: json.dumps(c).encode()),
}


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("shard_size", [None, 20_000, 10**9])
def test_byte_for_byte(tiny_llama, tmp_path, style, sharded, shard_size):
    base = tiny_llama(sharded=sharded, dtype="bfloat16")
    STYLES[style](base)
    expanded = tmp_path / "expanded"
    expand_checkpoint(base, expanded, after=[-1, 1, 1], shard_size=shard_size)
    in_place(expanded, new_indices(expanded))
    result = unmerge(expanded, tmp_path / "again")
    assert result.byte_identical
    assert len(result.removed) == 3
    assert_same_files(base, tmp_path / "again")


@pytest.mark.parametrize("style", [None, "spaced headers"])
def test_an_index_of_another_hand(tiny_llama, tmp_path, style):
    base = tiny_llama(sharded=True)
    path = base / "model.safetensors.index.json"
    raw = json.loads(path.read_text())
    raw["metadata"] = {"total_size": 5, "made_by": "hand"}
    path.write_text(json.dumps(raw))
    if style:
        STYLES[style](base)
    expand_checkpoint(base, tmp_path / "expanded", blocks=2)
    assert unmerge(tmp_path / "expanded", tmp_path / "again").byte_identical
    assert_same_files(base, tmp_path / "again")


def test_what_follows_by_itself_is_not_recorded(tiny_llama, tmp_path):
    """Of a base that transformers wrote, only the config is kept as text."""
    expand_checkpoint(tiny_llama(sharded=True), tmp_path / "expanded", blocks=2)
    files = json.loads((tmp_path / "expanded" / "expansion.json").read_text())["base_files"]
    assert len(files) > 3
    assert [name for name, record in files.items() if "text" in record] == ["config.json"]
    assert {"LICENSE", "tokenizer.json"} < set(files)


def test_files_saved_again_by_the_library(tiny_llama, tmp_path):
    """Its order of the expanded names is not that of the base's, but the base's own can be found."""
    base = tiny_llama(blocks=12)
    expanded = tmp_path / "expanded"
    expand_checkpoint(base, expanded, blocks=2)
    in_place(expanded, new_indices(expanded))
    saved_again(expanded)
    assert unmerge(expanded, tmp_path / "again").byte_identical
    assert_same_files(base, tmp_path / "again")


def test_files_distributed_anew_are_said_and_equivalent(tiny_llama, tmp_path, caplog):
    base = tiny_llama(sharded=True)
    expanded, moved = tmp_path / "expanded", tmp_path / "moved"
    expand_checkpoint(base, expanded, blocks=2)
    AutoModelForCausalLM.from_pretrained(expanded).save_pretrained(moved)
    for name in ("expansion.json", "LICENSE", "tokenizer.json"):
        shutil.copy(expanded / name, moved)
    with caplog.at_level(logging.WARNING):
        result = unmerge(moved, tmp_path / "again")
    assert not result.byte_identical
    assert result.differing == ("model.safetensors",)
    assert "model.safetensors cannot be restored byte for byte" in caplog.text
    assert_same_tensors(base, tmp_path / "again")
    assert (tmp_path / "again" / "config.json").read_bytes() == (base / "config.json").read_bytes()


def test_a_record_of_an_older_deepen(tiny_llama, tmp_path, capsys):
    base = tiny_llama(sharded=True)
    expanded = tmp_path / "expanded"
    expand_checkpoint(base, expanded, blocks=2)
    raw = json.loads((expanded / "expansion.json").read_text())
    del raw["base_files"]
    (expanded / "expansion.json").write_text(json.dumps(raw))
    assert main(["blocks", "unmerge", str(expanded), str(tmp_path / "again"), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert not said["byte_identical"]
    assert "config.json" in said["differing"]
    assert_same_tensors(base, tmp_path / "again")
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert config == json.loads((base / "config.json").read_text())


@pytest.mark.parametrize(
    "record",
    [
        {"../out.safetensors": {"digest": "0", "text": "{}"}},
        {"model.safetensors": {"digest": "0", "text": "[" * 100_000}},
        {"model.safetensors": {"digest": "0", "text": '{"model.norm.weight": 1}'}},
        {"other.safetensors": {"digest": "0", "x": 1}, "config.json": {"digest": "0", "text": "{}"}},
    ],
    ids=str,
)
def test_a_record_that_lies(tiny_llama, tmp_path, record):
    base = tiny_llama()
    expanded = tmp_path / "expanded"
    expand_checkpoint(base, expanded, blocks=2)
    raw = json.loads((expanded / "expansion.json").read_text())
    (expanded / "expansion.json").write_text(json.dumps({**raw, "base_files": record}))
    result = unmerge(expanded, tmp_path / "place" / "again")
    assert not result.byte_identical
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "expanded", "place"]
    assert_same_tensors(base, tmp_path / "place" / "again")


def test_carried_files(tiny_llama, tmp_path, caplog):
    """What was added since is left behind; what was changed or removed is said."""
    base, expanded = tiny_llama(), tmp_path / "expanded"
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tool.jinja").write_text("a template")
    expand_checkpoint(base, expanded, blocks=2)
    (expanded / "trainer_state.json").write_text("{}")
    assert unmerge(expanded, tmp_path / "again").byte_identical
    assert sorted(p.relative_to(base) for p in base.rglob("*")) == sorted(
        p.relative_to(tmp_path / "again") for p in (tmp_path / "again").rglob("*")
    )
    (expanded / "LICENSE").unlink()
    (expanded / "tokenizer.json").write_text("another")
    with caplog.at_level(logging.WARNING):
        result = unmerge(expanded, tmp_path / "third")
    assert result.differing == ("LICENSE", "tokenizer.json")
    assert "LICENSE cannot be restored byte for byte: it is missing" in caplog.text
    assert "tokenizer.json cannot be restored byte for byte: it was changed since" in caplog.text


def test_merged_packs(tiny_llama, tmp_path):
    base = tiny_llama(sharded=True)
    expand_checkpoint(base, tmp_path / "expanded", blocks=2)
    in_place(tmp_path / "expanded", [2, 5])
    extract_pack(tmp_path / "expanded", tmp_path / "pack")
    assert "base_files" not in (tmp_path / "pack" / "expansion.json").read_text()
    merge_pack(base, tmp_path / "pack", tmp_path / "merged", shard_size=30_000)
    assert unmerge(tmp_path / "merged", tmp_path / "again").byte_identical
    assert_same_files(base, tmp_path / "again")


def test_a_trained_base(tiny_llama, tmp_path):
    expanded = tmp_path / "expanded"
    expand_checkpoint(tiny_llama(), expanded, blocks=2)
    in_place(expanded, [0])
    with pytest.raises(PackError, match="were trained too"):
        unmerge(expanded, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_refusals(tiny_llama, tmp_path):
    base = tiny_llama()
    expanded = tmp_path / "expanded"
    expand_checkpoint(base, expanded, blocks=2)
    with pytest.raises(CheckpointError, match="not found"):
        unmerge(base, tmp_path / "again")
    with pytest.raises(OutputError, match="exists already"):
        unmerge(expanded, base)
    with pytest.raises(OutputError, match="inside the input"):
        unmerge(expanded, expanded / "again")
    held = load_file(expanded / "model.safetensors")
    config = json.loads((expanded / "config.json").read_text())
    (expanded / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 5}))
    save_file({k: v for k, v in held.items() if ".layers.5." not in k}, expanded / "model.safetensors")
    with pytest.raises(PackError, match="of 6 blocks, the checkpoint is a llama of 5"):
        unmerge(expanded, tmp_path / "again")


def test_the_command(tiny_llama, tmp_path, capsys):
    base = tiny_llama()
    expand_checkpoint(base, tmp_path / "expanded", blocks=2)
    assert main(["blocks", "unmerge", str(tmp_path / "expanded"), str(tmp_path / "again")]) == 0
    assert "byte for byte; 2 new blocks taken off" in capsys.readouterr().out
    assert_same_files(base, tmp_path / "again")
