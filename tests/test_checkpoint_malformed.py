"""Every malformed input: exit code 2, at most two lines that name file and tensor, nothing written.

One table a place a fault can stand in: header, tensors, shards, index, config, directory, arguments, output.
A line of a table is: what is wrong -> (how to make it, the file that must be named, words that must be said).
"""

import json
import os
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
from tiny_checkpoint import CONFIG, FIRST, INDEX, OTHER, SHAPES, SHARD, SINGLE, file_bytes, sharded, single
from tiny_checkpoint import entries as entries_of

from deepen.cli import main

WRITE = "model.layers.1.self_attn.o_proj.weight"
DEEP = b'{"a":' * 100_000 + b"1" + b"}" * 100_000


# How to make them: each of these gives a function that builds a checkpoint in a directory.


def header(change=None, *, data=lambda data: data, length=None, text=None):
    """A single file whose header is changed: as an object, as text, or in what it says its length is."""

    def build(directory):
        single(directory)
        content, values = entries_of(SHAPES)
        content = (change(content) or content) if change else content
        raw = text(json.dumps(content).encode()) if text else content
        (directory / SINGLE).write_bytes(file_bytes(raw, data(values), length))

    return build


def raw_header(content: bytes):
    return header(text=lambda text: content)


def entry(name=FIRST, **changes):
    return header(lambda content: content[name].update(changes))


def holding(change):
    """A well-formed single file that holds other tensors: name -> shape, changed."""

    def build(directory):
        single(directory)
        names = dict.fromkeys(SHAPES, 4)
        change(names)
        content, end = {}, 0
        for name in names:
            content[name] = {"dtype": "F32", "shape": [4], "data_offsets": [end, end + 16]}
            end += 16
        (directory / SINGLE).write_bytes(file_bytes(content, bytes(end)))

    return build


def in_dtype(dtype, item, config=None):
    """The attention's writes in another dtype, of `item` bytes an element."""

    def build(directory):
        single(directory)
        content, end = entries_of(SHAPES)[0], 0
        for name, held in content.items():
            size = held["data_offsets"][1] - held["data_offsets"][0]
            if name.endswith("o_proj.weight"):
                held["dtype"], size = dtype, size // 4 * item
            held["data_offsets"] = [end, end + size]
            end += size
        (directory / SINGLE).write_bytes(file_bytes(content, bytes(end)))
        (directory / "config.json").write_text(json.dumps({**CONFIG, **(config or {})}))

    return build


def config(content):
    """config.json changed in some keys, or replaced by some text."""

    def build(directory):
        single(directory)
        changed = {**CONFIG, **content} if isinstance(content, dict) else content
        raw = changed if isinstance(changed, bytes) else json.dumps(changed).encode()
        (directory / "config.json").write_bytes(raw)

    return build


def quantised(**how):
    return config({"quantization_config": how})


def index(change):
    """A sharded checkpoint whose index is changed, or replaced by some text."""

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


def indexed(change):
    def build(directory):
        sharded(directory)
        change(directory / INDEX)

    return build


def single_with(change):
    def build(directory):
        single(directory)
        change(directory)

    return build


def twice(text):
    first = json.dumps({FIRST: json.loads(text)[FIRST]}).encode()
    return first[:-1] + b"," + text[1:]


def to_directory(path):
    path.unlink()
    path.mkdir()


def to_link(path):
    moved = path.parent.parent / "elsewhere"
    path.rename(moved)
    path.symlink_to(moved)


def to_loop(path):
    path.unlink()
    path.symlink_to(path.name)


def to_nowhere(path):
    path.unlink()
    path.symlink_to("nowhere")


def to_fifo(path):
    path.unlink()
    os.mkfifo(path)


def to_device(path):
    path.unlink()
    path.symlink_to("/dev/zero")


def pickled(name):
    def change(directory):
        (directory / SINGLE).unlink()
        (directory / name).write_bytes(b"x")

    return single_with(change)


def overlong(path):
    path.write_bytes(path.read_bytes() + bytes(8))


def with_a_tensor_of_the_first(path):
    held = [*list(SHAPES)[6:], FIRST]
    path.with_name(OTHER).write_bytes(file_bytes(*entries_of(held)))


NAMED = f"tensor '{FIRST}'"
NUL = "model\0.safetensors"

HEADERS = {
    "length 2^63": (header(length=2**63), SINGLE, "header of 9223372036854775808"),
    "length 2^64 - 1": (header(length=2**64 - 1), SINGLE, "header of 18446744073709551615"),
    "length over 100 MB": (header(length=100_000_001), SINGLE, "more than 100000000"),
    "length past the end": (header(length=50_000), SINGLE, "file ends after"),
    "length zero": (header(length=0), SINGLE, "does not start with '{'"),
    "length one short": (header(length=20), SINGLE, "not readable as JSON"),
    "too short for a length": (
        single_with(lambda d: (d / SINGLE).write_bytes(b"abc")),
        SINGLE,
        "too short",
    ),
    "an empty file": (single_with(lambda d: (d / SINGLE).write_bytes(b"")), SINGLE, "0 bytes"),
    "a file of another kind": (
        single_with(lambda d: (d / SINGLE).write_bytes(b"PK\x03\x04" + bytes(100))),
        SINGLE,
        "header of",
    ),
    "a fetched pointer instead of the file": (
        single_with(lambda d: (d / SINGLE).write_text("version https://git-lfs.github.com/spec/v1\n")),
        SINGLE,
        "header of",
    ),
    "metadata with a number": (header(lambda c: {"__metadata__": {"a": 1}, **c}), SINGLE, "__metadata__"),
    "metadata not a map": (header(lambda c: {"__metadata__": "pt", **c}), SINGLE, "__metadata__"),
    "JSON 100k deep": (raw_header(DEEP), SINGLE, "nested too deeply"),
    "a leading space": (header(text=lambda text: b" " + text), SINGLE, "does not start with '{'"),
    "a byte order mark": (header(text=lambda text: b"\xef\xbb\xbf" + text), SINGLE, "does not start with"),
    "a list": (raw_header(b"[1]"), SINGLE, "does not start with '{'"),
    "not JSON": (raw_header(b"{]"), SINGLE, "not readable as JSON"),
    "text after the JSON": (header(text=lambda text: text + b"}"), SINGLE, "not readable as JSON"),
    "a zero byte after the JSON": (header(text=lambda text: text + b"\0"), SINGLE, "not readable as JSON"),
    "not UTF-8": (raw_header(b'{"\xff": 1}'), SINGLE, "not readable as JSON"),
    "half a character": (raw_header(b'{"__metadata__":{"a":"\\ud800"}}'), SINGLE, "surrogate"),
    "a very long number": (raw_header(b'{"a":' + b"9" * 5000 + b"}"), SINGLE, "not readable as JSON"),
    "no tensors": (raw_header(b"{}"), SINGLE, "bytes follow"),
    "a tensor twice": (header(text=twice), SINGLE, f"'{FIRST}' stands twice"),
}

TENSORS = {
    "truncated": (header(data=lambda data: data[:-1]), SINGLE, "truncated: tensor 'model.layers.1."),
    "no data at all": (header(data=lambda data: b""), SINGLE, "truncated: tensor 'model.layers.1."),
    "trailing bytes": (header(data=lambda data: data + b"x"), SINGLE, "1 bytes follow"),
    "overlap": (entry(shape=[12, 4], data_offsets=[0, 192]), SINGLE, "overlaps"),
    "a tensor inside another": (
        entry("lm_head.weight", shape=[3, 4], data_offsets=[0, 48]),
        SINGLE,
        "overlaps",
    ),
    "a hole": (entry(shape=[3, 4], data_offsets=[0, 48]), SINGLE, "leaves a hole"),
    "a hole at the start": (entry(shape=[3, 4], data_offsets=[48, 96]), SINGLE, FIRST),
    "shape and bytes disagree": (entry(shape=[5, 4]), SINGLE, f"{NAMED}: shape [5, 4]"),
    "dtype and bytes disagree": (entry(dtype="F16"), SINGLE, f"{NAMED}: shape [6, 4] of F16"),
    "shape overflows": (entry(shape=[2**32, 2**32]), SINGLE, "needs more than 2^64 bytes"),
    "a huge dimension": (entry(shape=[2**70, 4]), SINGLE, f"{NAMED}: its shape"),
    "a float dimension": (entry(shape=[6.0, 4]), SINGLE, f"{NAMED}: its shape"),
    "a boolean dimension": (entry(shape=[True, 24]), SINGLE, f"{NAMED}: its shape"),
    "negative dimensions": (entry(shape=[-6, -4]), SINGLE, f"{NAMED}: its shape"),
    "shape not a list": (entry(shape="6x4"), SINGLE, f"{NAMED}: its shape"),
    "a negative offset": (entry(data_offsets=[-96, 0]), SINGLE, f"{NAMED}: its data_offsets"),
    "offsets past 2^63": (entry(data_offsets=[2**63, 2**63 + 96]), SINGLE, f"{NAMED}: its data_offsets"),
    "end before begin": (entry(data_offsets=[96, 0]), SINGLE, f"{NAMED}: its data_offsets"),
    "three offsets": (entry(data_offsets=[0, 96, 0]), SINGLE, f"{NAMED}: its data_offsets"),
    "float offsets": (entry(data_offsets=[0.0, 96.0]), SINGLE, f"{NAMED}: its data_offsets"),
    "unknown dtype": (entry(dtype="F33"), SINGLE, f"{NAMED}: unknown dtype 'F33'"),
    "a dtype of half bytes": (entry(dtype="F4"), SINGLE, f"{NAMED}: unknown dtype 'F4'"),
    "dtype not a string": (entry(dtype=["F32"]), SINGLE, f"{NAMED}: unknown dtype"),
    "one key too many": (entry(more=1), SINGLE, NAMED),
    "one key too few": (header(lambda c: c[FIRST].pop("dtype") and None), SINGLE, NAMED),
    "an entry that is no object": (header(lambda c: c.update({FIRST: [1]})), SINGLE, NAMED),
    "an entry that is null": (header(lambda c: c.update({FIRST: None})), SINGLE, NAMED),
    "one without a place": (
        holding(lambda n: n.update({"score.weight": 4})),
        "base",
        "tensor 'score.weight' has no place",
    ),
    "one without a place in its block": (
        holding(lambda n: n.update({"model.layers.1.mlp.experts.3.w1.weight": 4})),
        "base",
        "tensor 'model.layers.1.mlp.experts.3.w1.weight' has no place",
    ),
    "a block's number with a zero before": (
        holding(lambda n: n.update({"model.layers.01.mlp.up_proj.weight": 4})),
        "base",
        "'model.layers.01.mlp.up_proj.weight' has no place",
    ),
    "a block's number of 5,000 digits": (
        holding(lambda n: n.update({f"model.layers.{'9' * 5000}.mlp.up_proj.weight": 4})),
        SINGLE,
        "its name has 5032 characters",
    ),
    "one of a block missing": (holding(lambda n: n.pop(WRITE)), "base", f"tensor '{WRITE}' is missing"),
    "one outside the blocks missing": (
        holding(lambda n: n.pop("model.norm.weight")),
        "base",
        "tensor 'model.norm.weight' is missing",
    ),
    "the head missing, not tied": (
        holding(lambda n: n.pop("lm_head.weight")),
        "base",
        "tensor 'lm_head.weight' is missing",
    ),
    "a bias in one block only": (
        holding(lambda n: n.update({"model.layers.1.self_attn.o_proj.bias": 4})),
        "base",
        "self_attn.o_proj.bias",
    ),
    "a block too many": (
        holding(lambda n: n.update({f"model.layers.2{k[14:]}": 4 for k in SHAPES if ".layers.1." in k})),
        "base",
        "num_hidden_layers 2, the files hold blocks 0–2",
    ),
    "a write that is not a float": (in_dtype("I8", 1), WRITE, "is I8"),
    "a write whose zero byte is not zero": (
        in_dtype("F8_E8M0", 1, {"quantization_config": {"quant_method": "fp8"}}),
        WRITE,
        "is F8_E8M0",
    ),
    "a packed write": (
        in_dtype("U8", 1, {"quantization_config": {"quant_method": "fp8"}}),
        WRITE,
        "is U8",
    ),
}

SHARDS = {
    "missing": (shard(Path.unlink), SHARD, "missing"),
    "empty": (shard(lambda path: path.write_bytes(b"")), SHARD, "too short"),
    "truncated": (shard(lambda path: os.truncate(path, path.stat().st_size - 1)), SHARD, "truncated: tensor"),
    "too long": (shard(overlong), SHARD, "8 bytes follow"),
    "a directory": (shard(to_directory), SHARD, "regular file"),
    "a pipe": (shard(to_fifo), SHARD, "regular file"),
    "a link out of the model": (shard(to_link), SHARD, "link out of the model"),
    "a link to a device": (shard(to_device), SHARD, "link out of the model"),
    "a link to itself": (shard(to_loop), SHARD, ""),
    "a link to nothing": (shard(to_nowhere), SHARD, "missing"),
    "a tensor in two": (shard(with_a_tensor_of_the_first), OTHER, f"{NAMED} stands in {SHARD} too"),
}

INDEXES = {
    "names ../": (maps(FIRST, "../x.safetensors"), INDEX, f"{NAMED}: '../x.safetensors'"),
    "names an absolute path": (maps(FIRST, "/etc/x.safetensors"), INDEX, NAMED),
    "names a path of another system": (maps(FIRST, "..\\x.safetensors"), INDEX, NAMED),
    "names a file with a zero byte": (maps(FIRST, NUL), INDEX, NAMED),
    "names a very long file": (maps(FIRST, "x" * 300 + ".safetensors"), INDEX, NAMED),
    "names half a character": (maps(FIRST, "\ud800.safetensors"), INDEX, "surrogate"),
    "names a number": (maps(FIRST, 3), INDEX, NAMED),
    "names a list": (maps(FIRST, [SHARD]), INDEX, NAMED),
    "names nothing": (maps(FIRST, None), INDEX, NAMED),
    "names another kind of file": (maps(FIRST, "config.json"), INDEX, NAMED),
    "names a pickle": (maps(FIRST, "pytorch_model-00001-of-00002.bin"), INDEX, NAMED),
    "without weight_map": (index(lambda content: {"metadata": {}}), INDEX, "no weight_map"),
    "with an empty weight_map": (index(lambda content: {"weight_map": {}}), INDEX, "no weight_map"),
    "with a list for weight_map": (index(lambda content: {"weight_map": [SHARD]}), INDEX, "no weight_map"),
    "not JSON": (index(lambda content: "{"), INDEX, "not readable as JSON"),
    "empty": (indexed(lambda path: path.write_bytes(b"")), INDEX, "not readable as JSON"),
    "a list": (index(lambda content: "[]"), INDEX, "no weight_map"),
    "100k deep": (index(lambda content: DEEP.decode()), INDEX, "nested too deeply"),
    "a directory": (indexed(to_directory), INDEX, "regular file"),
    "a pipe": (indexed(to_fifo), INDEX, "regular file"),
    "a link out": (indexed(to_link), INDEX, "link out of the model"),
    "with a tensor twice": (
        index(lambda content: json.dumps(content).replace('"lm_head.weight"', f'"{FIRST}"')),
        INDEX,
        "stands twice",
    ),
    "with a tensor its shard lacks": (maps("ghost", SHARD), SHARD, "tensor 'ghost' is missing"),
    "with a tensor in the other shard": (maps(FIRST, OTHER), SHARD, f"{NAMED} stands in {OTHER} too"),
    "without a tensor its shard has": (
        index(lambda content: content["weight_map"].pop(FIRST) and None),
        SHARD,
        f"{NAMED} is not in",
    ),
}

CONFIGS = {
    "more blocks than the files": (config({"num_hidden_layers": 3}), "config.json", "num_hidden_layers 3"),
    "fewer blocks than the files": (config({"num_hidden_layers": 1}), "config.json", "num_hidden_layers 1"),
    "10^12 blocks": (config({"num_hidden_layers": 10**12}), "config.json", "num_hidden_layers 1000000000000"),
    "no number of blocks": (config({"num_hidden_layers": None}), "config.json", "num_hidden_layers is None"),
    "no blocks": (config({"num_hidden_layers": 0}), "config.json", "num_hidden_layers is 0"),
    "a negative number of blocks": (config({"num_hidden_layers": -2}), "config.json", "is -2"),
    "a number of blocks in quotes": (config({"num_hidden_layers": "2"}), "config.json", "is '2'"),
    "a number of blocks with a point": (config({"num_hidden_layers": 2.0}), "config.json", "is 2.0"),
    "true blocks": (config({"num_hidden_layers": True}), "config.json", "is True"),
    "kinds of other blocks": (config({"layer_types": ["full_attention"] * 5}), "config.json", "layer_types"),
    "kinds that are no list": (config({"layer_types": "full_attention"}), "config.json", "layer_types"),
    "an encoder": (config({"model_type": "bert"}), "config.json", "'bert' is not a family"),
    "an encoder and a decoder": (config({"model_type": "t5"}), "config.json", "'t5' is not a family"),
    "an image model": (config({"model_type": "clip"}), "config.json", "'clip' is not a family"),
    "a state space model": (config({"model_type": "mamba"}), "config.json", "'mamba' is not a family"),
    "model_type a list": (config({"model_type": ["llama"]}), "config.json", "is not a family"),
    "model_type null": (config({"model_type": None}), "config.json", "is not a family"),
    "nothing in it": (config(b"{}"), "config.json", "model_type None"),
    "blocks of different config": (
        config({"per_layer_config": {"0": {}}}),
        "config.json",
        "per_layer_config",
    ),
    "not JSON": (config(b"{"), "config.json", "not readable as JSON"),
    "empty": (config(b""), "config.json", "not readable as JSON"),
    "a list": (config(b"[]"), "config.json", "not a JSON object"),
    "a string": (config(b'"llama"'), "config.json", "not a JSON object"),
    "not UTF-8": (config(b'{"a": "\xff"}'), "config.json", "not readable as JSON"),
    "half a character": (config(b'{"a": "\\ud800"}'), "config.json", "surrogate"),
    "a key twice": (config(b'{"a": 1, "a": 2}'), "config.json", "'a' stands twice"),
    "100k deep": (config(DEEP), "config.json", "nested too deeply"),
    "missing": (single_with(lambda d: (d / "config.json").unlink()), "config.json", "No such file"),
    "a directory": (single_with(lambda d: to_directory(d / "config.json")), "config.json", "regular file"),
    "a pipe": (single_with(lambda d: to_fifo(d / "config.json")), "config.json", "regular file"),
    "a link out": (single_with(lambda d: to_link(d / "config.json")), "config.json", "link out"),
    "a link to itself": (single_with(lambda d: to_loop(d / "config.json")), "config.json", "cannot be read"),
    "bitsandbytes, 4 bits": (
        quantised(quant_method="bitsandbytes", load_in_4bit=True),
        "config.json",
        "packed by bitsandbytes, where zero bytes need not mean zero.\nLoad it with transformers, model.deq",
    ),
    "bitsandbytes of old": (quantised(load_in_8bit=True), "config.json", "packed by bitsandbytes"),
    "GPTQ": (quantised(quant_method="gptq", bits=4), "config.json", "gptq, where"),
    "AWQ": (quantised(quant_method="awq", bits=4), "config.json", "awq, where"),
    "MXFP4": (quantised(quant_method="mxfp4"), "config.json", "Mxfp4Config(dequantize=True)"),
    "HQQ": (quantised(quant_method="hqq"), "config.json", "Use the unquantised model"),
    "quantised by no name": (quantised(bits=4), "config.json", "an unknown method"),
    "quantised by a list": (quantised(quant_method=["gptq"]), "config.json", "an unknown method"),
    "quantised by a string": (config({"quantization_config": "4bit"}), "config.json", "an unknown method"),
}

DIRECTORIES = {
    "not there": (lambda directory: None, "base", "no such directory"),
    "a file": (lambda directory: directory.write_text("x"), "base", "no such directory"),
    "a link to nothing": (lambda directory: directory.symlink_to("nowhere"), "base", "no such directory"),
    "empty": (Path.mkdir, "config.json", "a checkpoint is a directory with config.json in it"),
    "no weights": (single_with(lambda d: (d / SINGLE).unlink()), "base", "has neither"),
    "pickled weights only": (pickled("pytorch_model.bin"), "pytorch_model.bin", "save_pretrained"),
    "pickled shards only": (
        pickled("pytorch_model-00001-of-00002.bin"),
        "pytorch_model-00001-of-00002.bin",
        "save_pretrained",
    ),
    "TencentARC's pickle": (pickled("pytorch_model.pth"), "pytorch_model.pth", "save_pretrained"),
    "weights a directory": (single_with(lambda d: to_directory(d / SINGLE)), SINGLE, "regular file"),
    "weights a pipe": (single_with(lambda d: to_fifo(d / SINGLE)), SINGLE, "regular file"),
    "weights a link out": (single_with(lambda d: to_link(d / SINGLE)), SINGLE, "link out"),
    "weights a link to itself": (single_with(lambda d: to_loop(d / SINGLE)), SINGLE, "cannot be read"),
    "tokenizer a link out": (
        single_with(lambda d: (d / "tokenizer.json").symlink_to("/etc/hosts")),
        "tokenizer.json",
        "link out",
    ),
}

TABLES = {
    "header": HEADERS,
    "tensors": TENSORS,
    "shard": SHARDS,
    "index": INDEXES,
    "config": CONFIGS,
    "directory": DIRECTORIES,
}
CASES = {f"{place}: {what}": case for place, table in TABLES.items() for what, case in table.items()}

# What the user may get wrong in the arguments -> what must be said.
ARGUMENTS = {
    "--blocks 0": "at least 1",
    "--blocks -1": "-1",
    "--blocks two": "--blocks",
    "--blocks 1 --placement middle": "middle",
    "--blocks 1 --groups 0": "groups",
    "--blocks 1 --groups 9": "groups",
    "--after 2": "2",
    "--after x": "x",
    "--after 0, --blocks 1": "",
    "--blocks 1 --shard-size 0": "size",
    "--blocks 1 --shard-size -5GB": "size",
    "--blocks 1 --shard-size much": "much",
    "--blocks 1 --shard-size nan": "nan",
    "--blocks 1 --shard-size infGB": "inf",
    "": "say how many new blocks",
}

# Where the output may not go: (how to prepare the place, the output from it, what must be said).
OUTPUTS = {
    "exists": (lambda place: (place / "out").mkdir(), "out", "exists already"),
    "is a file": (lambda place: (place / "out").write_text("mine"), "out", "is not a directory"),
    "is a link to nothing": (lambda place: (place / "out").symlink_to("x"), "out", "is not a directory"),
    "lies inside the input": (lambda place: None, "base/out", "inside the input"),
    "lies deep inside the input": (lambda place: None, "base/a/b/out", "inside the input"),
    "lies inside by a link": (lambda place: (place / "l").symlink_to("base"), "l/out", "inside the input"),
    "lies inside by a detour": (lambda place: None, "base/../base/out", "inside the input"),
    "is the input": (lambda place: None, "base", "exists already"),
    "has a file for a parent": (lambda place: (place / "f").write_text("mine"), "f/out", "Not a directory"),
    "has a very long name": (lambda place: None, "o" * 300, "File name too long"),
    "has a parent of a very long name": (lambda place: None, f"{'o' * 300}/out", "File name too long"),
}


def expand(base, out, *more):
    return main(["expand", str(base), str(out), *(more or ("--blocks", "1"))])


def files(directory):
    return {path: path.lstat().st_size for path in directory.rglob("*") if path.name != "elsewhere"}


def assert_refused(code, said, *words):
    assert code == 2, said.err
    assert said.out == ""
    assert 1 <= len(said.err.splitlines()) <= 2
    assert len(said.err) < 6000
    for word in words:
        assert word in said.err


@pytest.mark.timeout(20)
@pytest.mark.parametrize("case", CASES)
def test_a_malformed_base(case, tmp_path, capfd):
    build, where, words = CASES[case]
    build(tmp_path / "base")
    before = files(tmp_path)
    code = expand(tmp_path / "base", tmp_path / "out")
    assert_refused(code, capfd.readouterr(), where, words)
    assert files(tmp_path) == before


def test_the_tables_are_large_enough():
    assert len(CASES) >= 60


@pytest.mark.parametrize("arguments", ARGUMENTS)
def test_malformed_arguments(arguments, tmp_path, capfd):
    single(tmp_path / "base")
    before = files(tmp_path)
    code = main(["expand", str(tmp_path / "base"), str(tmp_path / "out"), *arguments.split()])
    assert_refused(code, capfd.readouterr(), ARGUMENTS[arguments])
    assert files(tmp_path) == before


@pytest.mark.parametrize("base", ["", "no/such/place/at/all", "n" * 300, "a" * 5000, "-", "~"])
def test_a_base_that_is_nowhere(base, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert_refused(main(["expand", "--blocks", "1", "--", base, "out"]), capfd.readouterr())
    assert files(tmp_path) == {}


@pytest.mark.parametrize("case", OUTPUTS)
def test_an_output_that_cannot_be(case, tmp_path, capfd):
    prepare, out, words = OUTPUTS[case]
    single(tmp_path / "base")
    prepare(tmp_path)
    before = files(tmp_path)
    code = expand(tmp_path / "base", tmp_path / out)
    assert_refused(code, capfd.readouterr(), words)
    assert files(tmp_path) == before


@pytest.mark.parametrize("out", ["base", "base/out", ""])
def test_overwriting_the_input(out, tmp_path, capfd, monkeypatch):
    """Neither itself, nor from inside, nor with all that surrounds it."""
    single(tmp_path / "base")
    before = files(tmp_path)
    code = expand(tmp_path / "base", tmp_path / out, "--blocks", "1", "--overwrite")
    assert_refused(code, capfd.readouterr(), "the input")
    assert files(tmp_path) == before


def test_no_space(tmp_path, capfd, monkeypatch):
    base = single(tmp_path / "base")
    before = files(tmp_path)
    real = os.statvfs(tmp_path)
    full = os.statvfs_result((real.f_bsize, real.f_frsize, 9, 0, 0, *list(real)[5:10]))
    monkeypatch.setattr("deepen.expansion.apply.os.statvfs", lambda path: full)
    code = expand(base, tmp_path / "out")
    assert_refused(code, capfd.readouterr(), "out: needs", "0.0 MB are free on its disk")
    assert files(tmp_path) == before


def test_a_parent_that_may_not_be_written(tmp_path, capfd):
    base, place = single(tmp_path / "base"), tmp_path / "place"
    place.mkdir()
    if os.geteuid() == 0:  # whom a mode does not stop
        mount = ["mount", "-t", "tmpfs", "-o", "ro,size=16k", "tmpfs", str(place)]
        if subprocess.run(mount, capture_output=True).returncode:
            pytest.skip("root may write anywhere, and may not mount here")
    else:
        place.chmod(0o500)
    try:
        code = expand(base, place / "new" / "out")
        assert_refused(code, capfd.readouterr(), f"{place}/new/out: cannot be created")
        assert expand(base, place / "out") == 2
        assert os.listdir(place) == []
    finally:
        if os.geteuid() == 0:
            subprocess.run(["umount", str(place)], check=True)
        else:
            place.chmod(0o700)


@pytest.mark.parametrize("build", [single, sharded])
def test_what_the_cases_are_made_from_is_good(build, tmp_path, capfd):
    build(tmp_path / "base")
    assert expand(tmp_path / "base", tmp_path / "out") == 0
    assert main(["verify", str(tmp_path / "base"), str(tmp_path / "out")]) == 0
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    "build",
    [holding(lambda names: None), in_dtype("F16", 2), quantised(quant_method="fp8"), in_dtype("F8_E4M3", 1)],
)
def test_what_the_builders_change_nothing_in_is_good(build, tmp_path):
    """So each case is refused for its fault, not for how it was made; 8-bit floats are fine."""
    build(tmp_path / "base")
    assert expand(tmp_path / "base", tmp_path / "out") == 0


@pytest.mark.parametrize("command", ["verify", "merge", "extract"])
def test_other_commands_read_as_carefully(command, tmp_path, capfd):
    base, out = single(tmp_path / "base"), tmp_path / "out"
    assert expand(base, tmp_path / "expanded") == 0
    assert main(["blocks", "extract", str(tmp_path / "expanded"), str(tmp_path / "pack")]) == 0
    victim = tmp_path / ("pack/blocks.safetensors" if command == "merge" else f"expanded/{SINGLE}")
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
    raw = bytearray((base / SINGLE).read_bytes())
    raw[-4:] = struct.pack("<f", float("nan"))
    (base / SINGLE).write_bytes(raw)
    assert expand(base, tmp_path / "out") == 0
    warning = "warning: the base holds NaN or infinity in model.layers.1.mlp.down_proj.weight"
    assert warning in capfd.readouterr().err


def test_a_link_within_the_model_is_followed(tmp_path):
    base = single(tmp_path / "base")
    shutil.move(base / SINGLE, base / "weights")
    (base / SINGLE).symlink_to("weights")
    assert expand(base, tmp_path / "out") == 0
    assert not (tmp_path / "out" / SINGLE).is_symlink()
