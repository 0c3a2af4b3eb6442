"""Checkpoints of every family, bent in structure: each is expanded well or refused well, and nothing else.

A valid tiny checkpoint is drafted, then changed in one to four places: lengths, JSON text, keys, dtypes,
shapes, offsets, file names, types of config values. The only outcomes allowed are a checkpoint that the
safetensors library reads, or a DeepenError of at most two lines with nothing left behind.
"""

import gc
import json
import logging
import math
import os
import resource
import tempfile
import tracemalloc
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from tiny_checkpoint import INDEX, SINGLE

from deepen.errors import DeepenError
from deepen.expansion import expand_checkpoint
from deepen.families import load_families

SIZES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "BF16": 2, "F16": 2, "F8_E4M3": 1, "U8": 1, "BOOL": 1}
MOST_MEMORY = 1 << 30
# Thousands of small directories: in memory where the system offers that.
PLACE = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


@dataclass
class File:
    """A safetensors file to be: header entries, number of data bytes, and what is done to its text."""

    header: dict[str, Any]
    size: int
    length: int | None = None
    edits: list = field(default_factory=list)

    def content(self) -> bytes:
        text = edited(dumps(self.header), self.edits)
        length = len(text) if self.length is None else self.length
        return (length % 2**64).to_bytes(8, "little") + text + b"\x3c" * min(self.size, 1 << 16)


@dataclass
class Draft:
    """A checkpoint to be."""

    config: Any
    files: dict[str, File]
    index: Any = None
    config_edits: list = field(default_factory=list)
    index_edits: list = field(default_factory=list)
    kinds: dict[str, str] = field(default_factory=dict)

    def write(self, directory: Path) -> None:
        directory.mkdir()
        (directory / "config.json").write_bytes(edited(dumps(self.config), self.config_edits))
        if self.index is not None:
            (directory / INDEX).write_bytes(edited(dumps(self.index), self.index_edits))
        for name, file in self.files.items():
            put(directory / name, file.content(), self.kinds.get(name, "file"))


def put(path: Path, content: bytes, kind: str) -> None:
    if kind == "file":
        path.write_bytes(content)
    elif kind == "directory":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "link":
        path.with_name("blob").write_bytes(content)
        path.symlink_to("blob")
    elif kind == "link out":
        path.symlink_to(__file__)


def dumps(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def edited(text: bytes, edits: list) -> bytes:
    """Cut `count` bytes at a fraction of the text and put others there."""
    for place, count, instead in edits:
        at = int(place * len(text))
        text = text[:at] + instead + text[at + count :]
    return text


# Valid checkpoints.


def tensor_names(family) -> list[str]:
    """The names every checkpoint of a family has, with two blocks and two of everything numbered."""
    firsts = {part.part: part for part in reversed(family.block)}
    inside = [name for part in firsts.values() for name in part.required]
    rest = [name.replace("*", n) for name in inside for n in (("0", "1") if "*" in name else ("",))]
    blocks = [family.join(block, name) for block in (0, 1) for name in rest]
    return [*family.outside_required, *family.tied, *blocks]


def file_of(shapes: dict[str, tuple[str, list[int]]]) -> File:
    header, end = {}, 0
    for name, (dtype, shape) in shapes.items():
        size = SIZES[dtype] * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    return File(header, end)


def draft_of(family, dtype: str, shards: int) -> Draft:
    names = tensor_names(family)
    config = {"model_type": family.model_types[0], family.depth_key: 2}
    config |= dict.fromkeys(family.numbered.values(), 2)
    shapes = {name: (dtype, [2, 2] if "weight" in name else [2]) for name in names}
    if shards == 1:
        return Draft(config, {SINGLE: file_of(shapes)})
    files = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    held = {file: {n: shapes[n] for n in names[i::shards]} for i, file in enumerate(files)}
    index = {"metadata": {"total_size": 1}, "weight_map": {n: f for f, ns in held.items() for n in ns}}
    return Draft(config, {file: file_of(held[file]) for file in files}, index)


# What they are bent by.

numbers = st.one_of(
    st.integers(-3, 9),
    st.sampled_from([2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, 2**64 + 1, 10**12, 10**40, -(2**63)]),
    st.sampled_from([0.0, -0.0, 0.5, 2.0, 1e308, math.inf, math.nan]),
)
words = st.one_of(
    st.text(max_size=6),
    st.sampled_from(["", ".", "..", "\0", "\ud800", "\udc80", "a\nb", "x" * 300, "../x.safetensors", "/"]),
    st.sampled_from(["full_attention", "sliding_attention", "float32", "llama", "__metadata__", SINGLE]),
)
values = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, words),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(words, inner, max_size=3)),
    max_leaves=6,
)
tokens = st.one_of(
    st.binary(max_size=3),
    st.sampled_from([b"{", b"}", b"[", b'"', b",", b":", b"null", b"-1", b"NaN", b"1e999", b"\\ud800"]),
    st.sampled_from([b"\xff", b"\0", b" ", b"\xef\xbb\xbf", b"9" * 5000, b"[" * 5000, b'{"a":' * 5000]),
)
edits = st.tuples(st.floats(0, 1), st.integers(0, 4), tokens)


def a_file(draw, draft: Draft) -> File:
    return draft.files[draw(st.sampled_from(sorted(draft.files)))]


def a_tensor(draw, file: File) -> str | None:
    return draw(st.sampled_from(list(file.header))) if file.header else None


def an_entry(draw, draft: Draft) -> dict | None:
    file = a_file(draw, draft)
    entry = file.header.get(a_tensor(draw, file))
    return entry if isinstance(entry, dict) else None


def keys_of(family) -> set[str]:
    """The config keys that a family's own rules read."""
    rules = [rule.predicate for rule in (*family.per_layer.lists, *family.per_layer.numbers)]
    settings_of = [s for p in rules for s in (p.every, p.not_every, p.start, p.below, *p.when) if s]
    keys = {family.depth_key, family.trailing_key, *family.numbered.values(), *family.tied}
    keys |= {setting.key for setting in settings_of} | {refusal.key for refusal in family.refusals}
    return {key for key in keys if key}


def bend_config_value(draw, draft):
    """Any key that some family reads, and some that none does, to anything."""
    if isinstance(draft.config, dict):
        keys = ["text_config", "quantization_config", "layer_types", "tie_word_embeddings", "sliding_window"]
        keys += ["per_layer_config", "num_kv_shared_layers", "sliding_window_pattern", "mlp_layer_types"]
        keys += [key for family in load_families() for key in (*family.per_layer.keys, *keys_of(family))]
        draft.config[draw(st.sampled_from(sorted({*keys, *draft.config})))] = draw(values)


def bend_model_type(draw, draft):
    """The tensors of one family under the name of another."""
    if isinstance(draft.config, dict):
        types = [name for family in load_families() for name in family.model_types]
        draft.config["model_type"] = draw(st.sampled_from(sorted(types)))


def bend_config_whole(draw, draft):
    inner = draft.config
    draft.config = draw(st.one_of(values, st.just({"text_config": inner}), st.just([inner])))


def bend_per_layer(draw, draft):
    """A list with one entry a block, or nearly."""
    keys = sorted({key for family in load_families() for key in family.per_layer.keys} | {"layer_types"})
    entries = st.one_of(st.integers(-1, 3), st.sampled_from(["full_attention", "sliding_attention"]), values)
    if isinstance(draft.config, dict):
        draft.config[draw(st.sampled_from(keys))] = draw(st.lists(entries, max_size=4))


def bend_quantised(draw, draft):
    """A quantised model's config, which names modules, and patterns of modules, of certain blocks."""
    names = st.one_of(
        words,
        st.sampled_from(
            ["lm_head", "model.layers.0", "model.layers.1.mlp.gate", "re:.*layers.[01].*", "re:("]
        ),
        st.sampled_from(
            ["re:.*", "re:model.layers.\\d+.mlp", "re:(a+)+$", "Linear", "layers.1.", "h.0.attn"]
        ),
    )
    lists = st.one_of(values, st.lists(st.one_of(names, values), max_size=3))
    methods = st.sampled_from(["fp8", "fbgemm_fp8", "mxfp8", "compressed-tensors", "gptq", "bitsandbytes"])
    weights = st.fixed_dictionaries({"type": st.sampled_from(["float", "int"]), "num_bits": numbers})
    group = st.fixed_dictionaries({"weights": st.one_of(weights, values), "targets": lists})
    held = {"quant_method": st.one_of(methods, values), "modules_to_not_convert": lists, "ignore": lists}
    held |= {"format": st.sampled_from(["float-quantized", "pack-quantized"])}
    held |= {"config_groups": st.one_of(values, st.fixed_dictionaries({"group_0": st.one_of(group, values)}))}
    if isinstance(draft.config, dict):
        draft.config["quantization_config"] = draw(st.fixed_dictionaries({}, optional=held))


def bend_text(draw, draft):
    lists = [draft.config_edits, draft.index_edits, a_file(draw, draft).edits]
    draw(st.sampled_from(lists)).append(draw(edits))


def bend_length(draw, draft):
    file = a_file(draw, draft)
    near = st.integers(-9, 9).map(lambda more: len(dumps(file.header)) + more)
    file.length = draw(st.one_of(near, st.sampled_from([0, 1, 100_000_000, 100_000_001, 2**63, 2**64 - 1])))


def bend_size(draw, draft):
    file = a_file(draw, draft)
    file.size = draw(st.one_of(st.just(0), st.integers(0, 9).map(lambda more: max(0, file.size + more - 5))))


def bend_entry(draw, draft):
    if entry := an_entry(draw, draft):
        key = draw(st.sampled_from(["dtype", "shape", "data_offsets", "more"]))
        entry[key] = draw(st.one_of(values, st.lists(numbers, max_size=3)))


def bend_entry_whole(draw, draft):
    file = a_file(draw, draft)
    if (name := a_tensor(draw, file)) is not None:
        file.header[name] = draw(values)


def bend_entry_less(draw, draft):
    if entry := an_entry(draw, draft):
        entry.pop(draw(st.sampled_from(sorted(entry))), None)


def bend_offsets(draw, draft):
    """Overlaps and holes: an offset moved a little."""
    entry = an_entry(draw, draft)
    if entry and isinstance(entry.get("data_offsets"), list) and entry["data_offsets"]:
        at = draw(st.integers(0, len(entry["data_offsets"]) - 1))
        if isinstance(entry["data_offsets"][at], int):
            entry["data_offsets"][at] += draw(st.sampled_from([-16, -8, -4, -1, 1, 4, 8, 16, 2**63]))


def bend_soundly(draw, draft):
    """Other dtypes and shapes, with offsets to match: nothing is wrong with the file."""
    file = a_file(draw, draft)
    dtypes, dimensions = st.sampled_from(sorted(SIZES)), st.lists(st.integers(0, 3), max_size=3)
    changed = {}
    for name in file.header:
        keep = draw(st.booleans())
        changed[name] = ("F32", [2]) if keep else (draw(dtypes), draw(dimensions))
    file.header, file.size = (made := file_of(changed)).header, made.size


def bend_name(draw, draft):
    file = a_file(draw, draft)
    if (name := a_tensor(draw, file)) is not None:
        numbered = [name.replace(".0.", f".{n}.") for n in ("00", "1", "2", "10", "9" * 20, "-1", "٣")]
        new = draw(st.one_of(words, st.sampled_from([*numbered, name + ".", "." + name, name[:-1]])))
        file.header[new] = file.header.pop(name)


def bend_order(draw, draft):
    file = a_file(draw, draft)
    file.header = dict(draw(st.permutations(list(file.header.items()))))


def bend_tensor_away(draw, draft):
    file = a_file(draw, draft)
    file.header.pop(a_tensor(draw, file), None)


def bend_metadata(draw, draft):
    made = st.one_of(values, st.dictionaries(words, words, max_size=2), st.just({"format": "pt"}))
    a_file(draw, draft).header["__metadata__"] = draw(made)


def bend_map(draw, draft):
    if isinstance(draft.index, dict) and isinstance(places := draft.index.get("weight_map"), dict):
        name = draw(st.one_of(words, st.sampled_from(sorted(places)) if places else st.nothing()))
        places[name] = draw(st.one_of(words, values, st.sampled_from(sorted(draft.files))))
        if draw(st.booleans()):
            places.pop(name)


def bend_index(draw, draft):
    if isinstance(draft.index, dict):
        draft.index[draw(st.sampled_from(["metadata", "weight_map", "more"]))] = draw(values)
    elif draw(st.booleans()):
        draft.index = draw(values)


def bend_kind(draw, draft):
    name = draw(st.sampled_from(sorted(draft.files)))
    if draw(st.booleans()) and len(draft.files) > 1:
        del draft.files[name]
    else:
        draft.kinds[name] = draw(st.sampled_from(["directory", "pipe", "link", "link out"]))


BENDS = [bend for name, bend in sorted(globals().items()) if name.startswith("bend_")]
BENDS += [bend_config_value, bend_per_layer, bend_soundly] * 2  # what goes deepest


@st.composite
def drafts(draw) -> Draft:
    family = draw(st.sampled_from(load_families()))
    draft = draft_of(
        family, draw(st.sampled_from(["F32", "BF16", "F16", "F8_E4M3"])), draw(st.integers(1, 3))
    )
    for bend in draw(st.lists(st.sampled_from(BENDS), min_size=1, max_size=4)):
        bend(draw, draft)
    return draft


wishes = st.one_of(
    st.fixed_dictionaries({"blocks": st.integers(1, 3)}, optional={"shard_size": st.integers(1, 100)}),
    st.fixed_dictionaries({"after": st.lists(st.integers(-1, 1), min_size=1, max_size=3)}),
)


# What may come of them.


@contextmanager
def memory_limit(more: int):
    """Let an allocation of more than that fail."""
    if not (statistics := Path("/proc/self/statm")).exists():
        yield  # only Linux says how much there is
        return
    pages = int(statistics.read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + more, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def outcome(draft: Draft, wish: dict) -> str:
    """Write it, expand it, judge; return "expanded" or the message."""
    with tempfile.TemporaryDirectory(dir=PLACE) as name:
        place = Path(name)
        draft.write(place / "base")
        said = None
        try:
            with memory_limit(MOST_MEMORY):
                expand_checkpoint(place / "base", place / "out", **wish)
        except DeepenError as error:
            said = str(error)
        if said is not None:
            assert os.listdir(place) == ["base"]
            assert 0 < len(said.encode()) < 4000
            assert len(said.splitlines()) <= 2
            return said
        assert_readable(place / "out")
        return "expanded"


def assert_readable(out: Path) -> None:
    """By the safetensors library; and what the index says is where it says."""
    json.loads((out / "config.json").read_text("utf-8"))
    held = {}
    for path in out.glob("*.safetensors"):
        with safe_open(path, "np") as file:
            held |= dict.fromkeys(file.keys(), path.name)
    assert held
    if (out / INDEX).exists():
        assert json.loads((out / INDEX).read_text("utf-8"))["weight_map"] == held
    else:
        assert set(held.values()) == {SINGLE}


@pytest.fixture(autouse=True)
def _not_to_the_disk(monkeypatch):
    """Waiting for the disk after every example is most of its time, and no part of what is tested."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(autouse=True)
def _without_warnings(monkeypatch):
    """pytest keeps every line logged, which would be the growth of memory that is looked for."""
    monkeypatch.setattr(logging.getLogger("deepen"), "disabled", True)


LIMITS = {
    "deadline": timedelta(seconds=10),
    "database": None,
    "print_blob": True,
    "suppress_health_check": list(HealthCheck),
}


@settings(max_examples=250, derandomize=True, **LIMITS)
@given(draft=drafts(), wish=wishes)
def test_expanded_or_refused(draft, wish):
    outcome(draft, wish)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@settings(max_examples=20_000, **LIMITS)
@given(draft=drafts(), wish=wishes)
def test_expanded_or_refused_at_length(draft, wish):
    outcome(draft, wish)


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("family", load_families(), ids=lambda family: family.name)
def test_an_unbent_draft_is_expanded(family, shards):
    """So a bent one is refused for its bend."""
    assert outcome(draft_of(family, "BF16", shards), {"blocks": 1}) == "expanded"


def test_memory_does_not_grow():
    good = draft_of(load_families()[0], "F32", 2)
    bad = draft_of(load_families()[0], "F32", 1)
    bad.files[SINGLE].edits.append((0.5, 1, b"x"))

    def round_of(count):
        for _ in range(count):
            outcome(good, {"blocks": 2})
            outcome(bad, {"blocks": 2})
        gc.collect()
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        before = round_of(5)
        assert round_of(20) - before < 100_000
    finally:
        tracemalloc.stop()
