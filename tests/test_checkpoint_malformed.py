"""Every malformed input: exit code 2, at most two lines that name file and tensor, nothing written."""

import json
import os
import shutil
import struct
from pathlib import Path

import pytest

from deepen.cli import main

SIZES = {"model.embed_tokens.weight": (6, 4), "lm_head.weight": (6, 4), "model.norm.weight": (4,)}
BLOCK = {
    "input_layernorm.weight": (4,),
    "post_attention_layernorm.weight": (4,),
    **{f"self_attn.{part}_proj.weight": (4, 4) for part in "qkvo"},
    **{f"mlp.{part}_proj.weight": (4, 4) for part in ("gate", "up", "down")},
}
SHAPES = SIZES | {f"model.layers.{i}.{name}": shape for i in range(2) for name, shape in BLOCK.items()}
FIRST = "model.embed_tokens.weight"
SHARD = "model-00001-of-00002.safetensors"
OTHER = "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 2}


def entries(names):
    header, end = {}, 0
    for name in names:
        size = 4 * SHAPES[name][0] * (SHAPES[name][1] if len(SHAPES[name]) > 1 else 1)
        header[name] = {"dtype": "F32", "shape": list(SHAPES[name]), "data_offsets": [end, end + size]}
        end += size
    return header, struct.pack("<f", 0.5) * (end // 4)


def safetensors(header, data, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def single(directory: Path) -> Path:
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(CONFIG))
    (directory / "model.safetensors").write_bytes(safetensors(*entries(SHAPES)))
    return directory


def sharded(directory: Path) -> Path:
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(CONFIG))
    names = list(SHAPES)
    places = {SHARD: names[:6], OTHER: names[6:]}
    for file, held in places.items():
        (directory / file).write_bytes(safetensors(*entries(held)))
    weight_map = {name: file for file, held in places.items() for name in held}
    (directory / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return directory


def header(change=None, *, data=lambda data: data, length=None, text=None):
    """A single-file checkpoint whose header is changed."""

    def build(directory):
        single(directory)
        content, values = entries(SHAPES)
        content = (change(content) or content) if change else content
        raw = text(json.dumps(content).encode()) if text else content
        (directory / "model.safetensors").write_bytes(safetensors(raw, data(values), length))

    return build


def entry(**changes):
    return header(lambda content: content[FIRST].update(changes))


def config(content):
    def build(directory):
        single(directory)
        text = content if isinstance(content, str) else json.dumps({**CONFIG, **content})
        (directory / "config.json").write_text(text)

    return build


def index(change):
    def build(directory):
        sharded(directory)
        content = json.loads((directory / INDEX).read_text())
        content = change(content) or content
        (directory / INDEX).write_text(content if isinstance(content, str) else json.dumps(content))

    return build


def maps(name, file):
    return index(lambda content: content["weight_map"].update({name: file}))


def shard(change):
    def build(directory):
        sharded(directory)
        change(directory / SHARD)

    return build


def single_with(change):
    def build(directory):
        single(directory)
        change(directory)

    return build


def repeat(text):
    first = json.dumps({FIRST: json.loads(text)[FIRST]}).encode()
    return first[:-1] + b"," + text[1:]


def to_directory(path):
    path.unlink()
    path.mkdir()


def to_link(path):
    moved = path.parent.parent / "elsewhere"
    path.rename(moved)
    path.symlink_to(moved)


def to_fifo(path):
    path.unlink()
    os.mkfifo(path)


def pickled(directory):
    (directory / "model.safetensors").unlink()
    (directory / "pytorch_model.bin").write_bytes(b"x")


def copied_shard(path):
    """The second shard holds a tensor of the first too."""
    held = [*list(SHAPES)[6:], FIRST]
    path.with_name(OTHER).write_bytes(safetensors(*entries(held)))


def as_dtype(dtype, item):
    """All of block 1 in another dtype of the same or smaller size."""

    def change(content):
        end = 0
        for name, held in content.items():
            if name.endswith("o_proj.weight"):
                held["dtype"] = dtype
            count = (held["data_offsets"][1] - held["data_offsets"][0]) // 4
            size = count * (item if held["dtype"] == dtype else 4)
            held["data_offsets"] = [end, end + size]
            end += size

    return change


CASES = {
    "header length 2^63": (header(length=2**63), "model.safetensors", "header of 9223372036854775808"),
    "header over 100 MB": (header(length=100_000_001), "model.safetensors", "more than 100000000"),
    "header past the end": (header(length=50_000), "model.safetensors", "file ends after"),
    "shorter than a length": (
        single_with(lambda d: (d / "model.safetensors").write_bytes(b"abc")),
        "model.safetensors",
        "too short",
    ),
    "empty file": (
        single_with(lambda d: (d / "model.safetensors").write_bytes(b"")),
        "model.safetensors",
        "0 bytes",
    ),
    "truncated data": (
        header(data=lambda data: data[:-1]),
        "model.safetensors",
        "truncated: tensor 'model.layers.1.",
    ),
    "trailing bytes": (header(data=lambda data: data + b"x"), "model.safetensors", "1 bytes follow"),
    "overlap": (entry(shape=[12, 4], data_offsets=[0, 192]), "model.safetensors", "overlaps"),
    "hole": (entry(shape=[3, 4], data_offsets=[0, 48]), "model.safetensors", "leaves a hole"),
    "hole at the start": (entry(shape=[3, 4], data_offsets=[48, 96]), "model.safetensors", FIRST),
    "shape and bytes disagree": (entry(shape=[5, 4]), "model.safetensors", f"tensor '{FIRST}': shape [5, 4]"),
    "dtype and bytes disagree": (
        entry(dtype="F16"),
        "model.safetensors",
        f"tensor '{FIRST}': shape [6, 4] of F16",
    ),
    "shape overflow": (entry(shape=[2**32, 2**32]), "model.safetensors", "needs more than 2^64 bytes"),
    "huge dimension": (entry(shape=[2**70, 4]), "model.safetensors", f"tensor '{FIRST}': its shape"),
    "float dimension": (entry(shape=[6.0, 4]), "model.safetensors", f"tensor '{FIRST}': its shape"),
    "boolean dimension": (entry(shape=[True, 24]), "model.safetensors", f"tensor '{FIRST}': its shape"),
    "negative dimension": (entry(shape=[-6, -4]), "model.safetensors", f"tensor '{FIRST}': its shape"),
    "negative offset": (
        entry(data_offsets=[-96, 0]),
        "model.safetensors",
        f"tensor '{FIRST}': its data_offsets",
    ),
    "end before begin": (
        entry(data_offsets=[96, 0]),
        "model.safetensors",
        f"tensor '{FIRST}': its data_offsets",
    ),
    "three offsets": (
        entry(data_offsets=[0, 96, 0]),
        "model.safetensors",
        f"tensor '{FIRST}': its data_offsets",
    ),
    "unknown dtype": (entry(dtype="F33"), "model.safetensors", f"tensor '{FIRST}': unknown dtype 'F33'"),
    "dtype of another type": (entry(dtype=["F32"]), "model.safetensors", f"tensor '{FIRST}': unknown dtype"),
    "extra key in an entry": (entry(more=1), "model.safetensors", f"tensor '{FIRST}'"),
    "duplicate key": (header(text=repeat), "model.safetensors", f"'{FIRST}' stands twice"),
    "non-string metadata": (
        header(lambda c: {"__metadata__": {"a": 1}, **c}),
        "model.safetensors",
        "__metadata__",
    ),
    "metadata not a map": (
        header(lambda c: {"__metadata__": "pt", **c}),
        "model.safetensors",
        "__metadata__",
    ),
    "100k-deep JSON": (
        header(text=lambda text: b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
        "model.safetensors",
        "nested too deeply",
    ),
    "leading space": (header(text=lambda text: b" " + text), "model.safetensors", "does not start with '{'"),
    "a list": (header(text=lambda text: b"[1]"), "model.safetensors", "does not start with '{'"),
    "not JSON": (header(text=lambda text: b"{]"), "model.safetensors", "not readable as JSON"),
    "not UTF-8": (header(text=lambda text: b'{"\xff": 1}'), "model.safetensors", "not readable as JSON"),
    "a very long number": (header(text=lambda t: b'{"a":' + b"9" * 5000 + b"}"), "model.safetensors", "JSON"),
    "weights a directory": (
        single_with(lambda d: to_directory(d / "model.safetensors")),
        "model.safetensors",
        "regular file",
    ),
    "weights a pipe": (
        single_with(lambda d: to_fifo(d / "model.safetensors")),
        "model.safetensors",
        "regular file",
    ),
    "weights a link out": (
        single_with(lambda d: to_link(d / "model.safetensors")),
        "model.safetensors",
        "link out",
    ),
    "shard missing": (shard(Path.unlink), SHARD, "missing"),
    "shard empty": (shard(lambda path: path.write_bytes(b"")), SHARD, "too short"),
    "shard a directory": (shard(to_directory), SHARD, "regular file"),
    "shard a link out": (shard(to_link), SHARD, "link out of the model"),
    "index with ../": (maps(FIRST, "../x.safetensors"), INDEX, f"tensor '{FIRST}': '../x.safetensors'"),
    "index with an absolute path": (maps(FIRST, "/etc/x.safetensors"), INDEX, f"tensor '{FIRST}'"),
    "index with a number": (maps(FIRST, 3), INDEX, f"tensor '{FIRST}'"),
    "index with another kind of file": (maps(FIRST, "config.json"), INDEX, f"tensor '{FIRST}'"),
    "index without weight_map": (index(lambda content: {"metadata": {}}), INDEX, "no weight_map"),
    "index not JSON": (index(lambda content: "{"), INDEX, "not readable as JSON"),
    "index a list": (index(lambda content: "[]"), INDEX, "no weight_map"),
    "index with a tensor twice": (
        index(lambda content: json.dumps(content).replace('"lm_head.weight"', f'"{FIRST}"')),
        INDEX,
        "stands twice",
    ),
    "tensor in two shards": (shard(copied_shard), OTHER, f"tensor '{FIRST}' stands in {SHARD} too"),
    "tensor absent from its shard": (maps("ghost", SHARD), SHARD, "tensor 'ghost' is missing"),
    "extra tensor in a shard": (
        index(lambda content: content["weight_map"].pop(FIRST) and None),
        SHARD,
        f"tensor '{FIRST}' is not in",
    ),
    "depth disagrees": (config({"num_hidden_layers": 3}), "config.json", "num_hidden_layers 3"),
    "depth absent": (config({"num_hidden_layers": None}), "config.json", "num_hidden_layers is None"),
    "unknown family": (config({"model_type": "bert"}), "config.json", "'bert' is not a family"),
    "blocks of different config": (
        config({"per_layer_config": {"0": {}}}),
        "config.json",
        "per_layer_config",
    ),
    "quantised": (config({"quantization_config": {"bits": 4}}), "config.json", "quantised"),
    "residual write not a float": (
        header(as_dtype("I8", 1), data=lambda data: data[: len(data) - 2 * 3 * 16]),
        "o_proj.weight",
        "is I8",
    ),
    "config not JSON": (config("{"), "config.json", "not readable as JSON"),
    "config a list": (config("[]"), "config.json", "not a JSON object"),
    "config missing": (single_with(lambda d: (d / "config.json").unlink()), "config.json", "No such file"),
    "config a link out": (single_with(lambda d: to_link(d / "config.json")), "config.json", "link out"),
    "tokenizer a link out": (
        single_with(lambda d: (d / "tokenizer.json").symlink_to("/etc/hosts")),
        "tokenizer.json",
        "link out",
    ),
    "no weights": (single_with(lambda d: (d / "model.safetensors").unlink()), "base", "has neither"),
    "pickled weights only": (single_with(pickled), "pytorch_model.bin", "save_pretrained"),
    "expanded already": (
        single_with(lambda d: (d / "expansion.json").write_text("{}")),
        "base",
        "expanded already",
    ),
    "not there": (lambda directory: None, "base", "no such directory"),
}


def files(directory):
    return sorted(path for path in directory.rglob("*") if path.name != "elsewhere")


@pytest.mark.parametrize("case", CASES)
def test_refused(case, tmp_path, capfd):
    build, where, words = CASES[case]
    build(tmp_path / "base")
    before = files(tmp_path)
    code = main(["expand", str(tmp_path / "base"), str(tmp_path / "out"), "--blocks", "1"])
    said = capfd.readouterr()
    assert code == 2, said.err
    assert said.out == ""
    assert len(said.err.splitlines()) <= 2
    assert where in said.err
    assert words in said.err
    assert files(tmp_path) == before


@pytest.mark.parametrize("build", [single, sharded])
def test_what_the_cases_are_made_from_is_good(build, tmp_path, capfd):
    build(tmp_path / "base")
    assert main(["expand", str(tmp_path / "base"), str(tmp_path / "out"), "--blocks", "1"]) == 0
    assert main(["verify", str(tmp_path / "base"), str(tmp_path / "out")]) == 0
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("command", ["verify", "merge", "extract"])
def test_other_commands_read_as_carefully(command, tmp_path, capfd):
    base, out = single(tmp_path / "base"), tmp_path / "out"
    assert main(["expand", str(base), str(tmp_path / "expanded"), "--blocks", "1"]) == 0
    assert main(["blocks", "extract", str(tmp_path / "expanded"), str(tmp_path / "pack")]) == 0
    victim = tmp_path / ("pack/blocks.safetensors" if command == "merge" else "expanded/model.safetensors")
    victim.write_bytes(victim.read_bytes()[:-1])
    arguments = {
        "verify": ["verify", str(base), str(tmp_path / "expanded")],
        "merge": ["blocks", "merge", str(base), str(tmp_path / "pack"), str(out)],
        "extract": ["blocks", "extract", str(tmp_path / "expanded"), str(out)],
    }
    capfd.readouterr()
    assert main(arguments[command]) == 2
    said = capfd.readouterr().err
    assert "truncated" in said
    assert victim.name in said
    assert not out.exists()


def test_nan_in_the_base_is_a_warning(tmp_path, capfd):
    base = single(tmp_path / "base")
    raw = bytearray((base / "model.safetensors").read_bytes())
    raw[-4:] = struct.pack("<f", float("nan"))
    (base / "model.safetensors").write_bytes(raw)
    assert main(["expand", str(base), str(tmp_path / "out"), "--blocks", "1"]) == 0
    assert (
        "warning: the base holds NaN or infinity in model.layers.1.mlp.down_proj.weight"
        in capfd.readouterr().err
    )


def test_no_space(tmp_path, capfd, monkeypatch):
    base = single(tmp_path / "base")
    full = os.statvfs(tmp_path)

    class Full:
        f_bavail, f_frsize = 0, full.f_frsize

    monkeypatch.setattr("deepen.expansion.apply.os.statvfs", lambda path: Full)
    assert main(["expand", str(base), str(tmp_path / "out"), "--blocks", "1"]) == 2
    assert "are free on its disk" in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_output_inside_the_input(tmp_path, capfd):
    base = single(tmp_path / "base")
    before = files(tmp_path)
    assert main(["expand", str(base), str(base / "out"), "--blocks", "1"]) == 2
    assert "inside the input" in capfd.readouterr().err
    assert main(["expand", str(base), str(base), "--blocks", "1", "--overwrite"]) == 2
    assert files(tmp_path) == before


def test_a_link_within_the_model_is_followed(tmp_path):
    base = single(tmp_path / "base")
    shutil.move(base / "model.safetensors", base / "weights")
    (base / "model.safetensors").symlink_to("weights")
    assert main(["expand", str(base), str(tmp_path / "out"), "--blocks", "1"]) == 0
    assert not (tmp_path / "out" / "model.safetensors").is_symlink()
