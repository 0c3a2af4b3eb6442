"""A Llama-shaped checkpoint of a few kilobytes, written without any library, so that tests can bend it."""

import json
import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

SINGLE = "model.safetensors"
SHARD = "model-00001-of-00002.safetensors"
OTHER = "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"

FIRST = "model.embed_tokens.weight"
BLOCKS = 2
BLOCK = {
    "input_layernorm.weight": (4,),
    "post_attention_layernorm.weight": (4,),
    **{f"self_attn.{part}_proj.weight": (4, 4) for part in "qkvo"},
    **{f"mlp.{part}_proj.weight": (4, 4) for part in ("gate", "up", "down")},
}
SHAPES = {
    FIRST: (6, 4),
    "lm_head.weight": (6, 4),
    "model.norm.weight": (4,),
    **{f"model.layers.{i}.{name}": shape for i in range(BLOCKS) for name, shape in BLOCK.items()},
}
PLACES = {name: SHARD if at < 6 else OTHER for at, name in enumerate(SHAPES)}
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": BLOCKS,
    "hidden_size": 4,
    "intermediate_size": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 6,
    "tie_word_embeddings": False,
}


def header_of(shapes: Mapping[str, Sequence[int]]) -> tuple[dict, int]:
    """Header of a float32 file with tensors of these shapes, and the size of its data."""
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    return header, end


def entries(names: Iterable[str]) -> tuple[dict, bytes]:
    """Header and data of a file that holds these tensors, every element 0.5."""
    header, size = header_of({name: SHAPES[name] for name in names})
    return header, struct.pack("<f", 0.5) * (size // 4)


def file_bytes(header: Mapping | bytes, data: bytes, length: int | None = None) -> bytes:
    """A safetensors file; `header` may be any text, `length` any lie about it."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def single(directory: Path) -> Path:
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(CONFIG))
    (directory / SINGLE).write_bytes(file_bytes(*entries(SHAPES)))
    return directory


def sharded(directory: Path) -> Path:
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(CONFIG))
    for file in (SHARD, OTHER):
        held = [name for name, place in PLACES.items() if place == file]
        (directory / file).write_bytes(file_bytes(*entries(held)))
    (directory / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": PLACES}))
    return directory


def hollow(directory: Path, rows: int) -> Path:
    """`single` with matrices of `rows` × 4 in its MLPs; its data is one hole but for the last 4 bytes."""
    single(directory)
    wide = {name: (rows, 4) if "mlp" in name else shape for name, shape in SHAPES.items()}
    header, size = header_of(wide)
    with (directory / SINGLE).open("wb") as file:
        file.write(file_bytes(header, b""))
        file.seek(size - 4, 1)
        file.write(struct.pack("<f", 0.5))
    return directory
