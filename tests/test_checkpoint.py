import json
import math
import shutil
import struct

import numpy as np
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from deepen.checkpoint import (
    Checkpoint,
    decode,
    fast_fingerprint,
    full_fingerprint,
    max_abs_difference,
    not_finite,
    resolve_base,
    write_header,
)
from deepen.errors import CheckpointError


def test_reads_what_the_library_reads(tiny_llama):
    directory = tiny_llama(dtype="bfloat16", sharded=True)
    checkpoint = Checkpoint.open(directory)
    assert len(checkpoint.shards) > 2
    seen = set()
    for shard in checkpoint.shards:
        with safe_open(shard.path, "pt") as theirs:
            assert shard.metadata == theirs.metadata()
            for tensor in shard.tensors:
                wanted = theirs.get_tensor(tensor.name)
                data = shard.path.read_bytes()[tensor.offset : tensor.offset + tensor.length]
                assert tensor.dtype == "BF16"
                assert tensor.shape == tuple(wanted.shape)
                assert data == wanted.view(torch.uint8).numpy().tobytes()
                seen.add(tensor.name)
    assert (
        seen
        == set(checkpoint.tensors)
        == set(json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"])
    )


def test_the_library_reads_our_header(tmp_path):
    header = write_header(
        [("é", "F32", (2, 3)), ("empty", "I64", (0, 4)), ("one", "U8", ())], {"format": "pt"}
    )
    (tmp_path / "x").write_bytes(header + struct.pack("<6f", *range(6)) + b"\x07")
    with safe_open(tmp_path / "x", "pt") as theirs:
        assert theirs.get_tensor("é").tolist() == [[0, 1, 2], [3, 4, 5]]
        assert theirs.get_tensor("empty").shape == (0, 4)
        assert theirs.get_tensor("one").item() == 7
    assert len(header) % 8 == 0


def test_fingerprints_do_not_depend_on_sharding(tiny_llama):
    one, many = (Checkpoint.open(tiny_llama(name, sharded=name == "many")) for name in ("one", "many"))
    assert len(one.shards) == 1 < len(many.shards)
    assert fast_fingerprint(one) == fast_fingerprint(many)
    assert full_fingerprint(one) == full_fingerprint(many)
    assert fast_fingerprint(one) != full_fingerprint(one)


def big(directory, change=lambda tensor: None):
    tensor = torch.arange(400_000, dtype=torch.float32)
    change(tensor)
    directory.mkdir()
    save_file({"a": tensor}, directory / "model.safetensors")
    (directory / "config.json").write_text("{}")
    return Checkpoint.open(directory)


def set_element(index):
    return lambda tensor: tensor.__setitem__(index, -1)


@pytest.mark.parametrize(("index", "seen_by_fast"), [(0, True), (399_999, True), (20_000, False)])
def test_what_fingerprints_notice(tmp_path, index, seen_by_fast):
    base, changed = big(tmp_path / "base"), big(tmp_path / "changed", set_element(index))
    assert full_fingerprint(base) != full_fingerprint(changed)
    assert (fast_fingerprint(base) != fast_fingerprint(changed)) is seen_by_fast


def test_fast_notices_training(tmp_path):
    assert fast_fingerprint(big(tmp_path / "a")) != fast_fingerprint(big(tmp_path / "b", lambda t: t.add_(1)))


def test_a_fingerprint_covers_name_dtype_and_shape(tmp_path):
    def one(name, tensor):
        directory = tmp_path / f"{name}{tensor.dtype}{len(tensor)}{tensor.ndim}"
        directory.mkdir()
        save_file({name: tensor}, directory / "model.safetensors")
        (directory / "config.json").write_text("{}")
        return fast_fingerprint(Checkpoint.open(directory))

    data = torch.zeros(4)
    variants = [("a", data), ("b", data), ("a", data.to(torch.int32)), ("a", data.view(2, 2))]
    assert len({one(*variant) for variant in variants}) == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, None])
def test_nan_and_infinity_are_seen(tmp_path, dtype, value):
    tensor = torch.randn(1000).mul(100).to(dtype)
    tensor[10] = torch.finfo(dtype).max
    if value is not None:
        tensor[567] = value
    save_file({"a": tensor}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    assert not_finite(Checkpoint.open(tmp_path).tensors["a"]) is (value is not None)


@pytest.mark.parametrize(
    "dtype", ["float32", "float64", "float16", "int8", "uint8", "int16", "int32", "int64"]
)
def test_decoding_agrees_with_numpy(dtype):
    names = {"float": "F", "int": "I", "uint": "U"}
    kind = dtype.rstrip("0123456789")
    values = np.random.default_rng(0).normal(size=50).astype(dtype)
    assert list(decode(names[kind] + dtype[len(kind) :], values.tobytes())) == values.tolist()


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1))
def test_bfloat16_agrees_with_torch(values):
    tensor = torch.tensor(values).to(torch.bfloat16)
    assert list(decode("BF16", tensor.view(torch.uint8).numpy().tobytes())) == tensor.tolist()


def test_largest_difference():
    first, second = (struct.pack("<3f", *values) for values in ([1, 2, 3], [1, 2.5, 1]))
    assert max_abs_difference("F32", first, second) == 2
    assert max_abs_difference("F32", first, first) == 0
    assert max_abs_difference("F32", first, struct.pack("<3f", 1, math.nan, 3)) == math.inf
    assert max_abs_difference("F8_E4M3", b"a", b"b") is None


def in_cache(directory, cache):
    """Lay a checkpoint out as the hub's cache does; return the snapshot."""
    snapshot = cache / "models--a--b" / "snapshots" / "0123"
    blobs = cache / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(directory.iterdir())):
        shutil.copy(path, blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    return snapshot


def test_links_of_the_hubs_cache_are_followed(tiny_llama, tmp_path):
    directory = tiny_llama(sharded=True)
    snapshot = in_cache(directory, tmp_path / "cache")
    (tmp_path / "link").symlink_to(snapshot)
    wanted = full_fingerprint(Checkpoint.open(directory))
    assert full_fingerprint(Checkpoint.open(snapshot)) == wanted
    assert full_fingerprint(Checkpoint.open(tmp_path / "link")) == wanted


def test_a_link_out_of_the_hubs_cache_is_not(tiny_llama, tmp_path):
    directory = tiny_llama()
    snapshot = in_cache(directory, tmp_path / "cache")
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to(directory / "model.safetensors")
    with pytest.raises(CheckpointError, match="link out of the model"):
        Checkpoint.open(snapshot)


def test_a_directory_wins_over_the_hub(tmp_path, monkeypatch):
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert str(resolve_base("org/name")) == "org/name"


@pytest.mark.parametrize("name", ["org/absent", "/no/such/place", "a/b/c", ""])
def test_neither_directory_nor_hub(name, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="no such directory") as caught:
        resolve_base(name)
    assert len(str(caught.value).splitlines()) <= 2


@pytest.mark.parametrize(
    ("error", "cause", "words"),
    [
        (LocalEntryNotFoundError("long"), ConnectionError("no route"), "(ConnectionError: no route)"),
        (LocalEntryNotFoundError("long"), OfflineModeIsEnabled("off"), "HF_HUB_OFFLINE is set"),
        (LocalEntryNotFoundError("not cached"), None, "(LocalEntryNotFoundError: not cached)"),
        (RuntimeError("a" * 101), ValueError("b"), f"(RuntimeError: {'a' * 100}…)"),
    ],
    ids=["unreachable", "offline", "not-cached", "other"],
)
def test_why_the_hub_gave_nothing(error, cause, words, monkeypatch):
    def snapshot_download(*args, **kwargs):
        raise error from cause

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(CheckpointError, match="no such directory, and not from the hub") as caught:
        resolve_base("org/absent")
    assert words in str(caught.value)


def test_the_hubs_files(monkeypatch, tmp_path):
    asked = {}

    def snapshot_download(name, **options):
        asked.update(options, name=name)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert resolve_base("org/name") == tmp_path
    assert asked["name"] == "org/name"
    assert not any(pattern in asked["allow_patterns"] for pattern in ("*", "*.py", "*.bin"))
