"""Training, as far as files can tell: the new blocks' tensors move, in place or through another writer."""

import filecmp
import json
import os
import struct
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def in_place(directory: Path, blocks: list[int], seed: int = 0) -> None:
    """Add noise to every tensor of these blocks; headers stay as they are."""
    generator = torch.Generator().manual_seed(seed)
    marks = tuple(f".layers.{block}." for block in blocks)
    for path in directory.glob("*.safetensors"):
        with path.open("r+b") as file:
            size = struct.unpack("<Q", file.read(8))[0]
            header = json.loads(file.read(size))
            for name, entry in header.items():
                if not any(mark in name for mark in marks):
                    continue
                begin, end = entry["data_offsets"]
                file.seek(8 + size + begin)
                dtype = {"F32": torch.float32, "BF16": torch.bfloat16}[entry["dtype"]]
                tensor = torch.frombuffer(bytearray(file.read(end - begin)), dtype=dtype)
                tensor += 0.05 * torch.randn(tensor.shape, generator=generator).to(dtype)
                file.seek(8 + size + begin)
                file.write(tensor.view(torch.uint8).numpy().tobytes())


def saved_again(directory: Path) -> None:
    """Let the safetensors library write the same tensors in its own order."""
    for path in directory.glob("*.safetensors"):
        save_file(load_file(path), path, {"format": "pt"})


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {k: v for path in sorted(directory.glob("*.safetensors")) for k, v in load_file(path).items()}


def assert_same_files(first: Path, second: Path) -> None:
    """Same names, same bytes."""
    names = sorted(os.listdir(first))
    assert names == sorted(os.listdir(second))
    same, differing, _ = filecmp.cmpfiles(first, second, names, shallow=False)
    assert not differing
    assert len(same) == len(names)


def assert_same_tensors(first: Path, second: Path) -> None:
    ours, theirs = tensors(first), tensors(second)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def new_indices(directory: Path, stage: int | None = None) -> list[int]:
    blocks = json.loads((directory / "expansion.json").read_text())["new_blocks"]
    return [block["index"] for block in blocks if stage in (None, block["stage"])]
