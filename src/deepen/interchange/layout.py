"""What lies where in a llama2.c file, as `legacy_export` and `version1_export` of its export.py write it.

Version 0 starts with seven little-endian int32, vocab_size negative where the classifier is a matrix of its
own. Version 1 starts with the uint32 0x616b3432 ("ak42"), its version, the same seven numbers with
vocab_size positive, and a byte that says whether the classifier is shared; weights begin at byte 256.
Both hold float32 alone, one kind of matrix after the other, each for all layers.
"""

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from deepen.errors import CheckpointError

MAGIC: Final = 0x616B3432
_V1_START: Final = 256
# Nothing else in a version 1 file depends on seq_len, and layers can be nearly empty.
_MOST: Final = {"seq_len": 1 << 24, "n_layers": 10_000}
_FIELDS: Final = ("dim", "hidden_dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "seq_len")
_NO_MAGIC: Final = "without the magic 'ak42' it is read as version 0"


@dataclass(frozen=True, kw_only=True)
class Header:
    """The sizes of a model, in llama2.c's words.

    Attributes:
        version: 0 or 1.
        dim: width of the residual stream.
        hidden_dim: width of the feed-forward layer.
        n_layers: number of blocks.
        n_heads: number of query heads.
        n_kv_heads: number of key and value heads; divides `n_heads`.
        vocab_size: number of tokens, positive.
        seq_len: longest context in tokens.
        shared: the classifier is the embedding matrix.
    """

    version: int
    dim: int
    hidden_dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    vocab_size: int
    seq_len: int
    shared: bool

    @property
    def start(self) -> int:
        """The first byte of the weights."""
        return _V1_START if self.version == 1 else 4 * len(_FIELDS)

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.dim // self.n_heads


@dataclass(frozen=True, kw_only=True)
class Part:
    """One kind of tensor, stored for all layers in a row.

    Attributes:
        name: its name in a Hugging Face Llama, `{}` for the layer; None for what such a model computes.
        count: number of layers, or 1.
        shape: of one tensor.
        heads: where not 0, the rows are those of so many heads in interleaved rotary order.
    """

    name: str | None
    count: int
    shape: tuple[int, ...]
    heads: int = 0

    @property
    def length(self) -> int:
        """Number of bytes of one tensor."""
        return 4 * math.prod(self.shape)


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where one tensor of the Hugging Face model lies in the llama2.c file; see `Part`."""

    name: str
    shape: tuple[int, ...]
    heads: int
    offset: int
    length: int


def parse_header(data: bytes, path: Path) -> Header:
    """Read the first bytes (256, or all of a shorter file).

    Raises:
        CheckpointError: too short, of a version that cannot be imported, or with sizes no model has.
    """
    if len(data) < 4 * len(_FIELDS):
        raise CheckpointError(f"{path}: {len(data)} bytes long, too short for a llama2.c file")
    magic, version = struct.unpack_from("<Ii", data)
    if magic == int.from_bytes(MAGIC.to_bytes(4, "little"), "big"):
        raise CheckpointError(f"{path}: written in big-endian order; export it on a little-endian machine")
    if magic != MAGIC:
        sizes = dict(zip(_FIELDS, struct.unpack_from("<7i", data), strict=True))
        shared = sizes["vocab_size"] > 0
        sizes["vocab_size"] = abs(sizes["vocab_size"])
        return _checked(path, version=0, shared=shared, **sizes)
    _check_version(version, path)
    if len(data) < _V1_START:
        raise CheckpointError(
            f"{path}: {len(data)} bytes long; the header of version 1 alone has {_V1_START}"
        )
    sizes = dict(zip(_FIELDS, struct.unpack_from("<7i", data, 8), strict=True))
    flag = data[8 + 4 * len(_FIELDS)]
    if flag > 1:
        raise CheckpointError(
            f"{path}: its shared-classifier byte is {flag}, neither 0 nor 1; export it again"
        )
    return _checked(path, version=1, shared=bool(flag), **sizes)


def check_size(header: Header, size: int, path: Path) -> None:
    """Refuse a file that is not as long as its header says.

    Raises:
        CheckpointError: it is shorter or longer.
    """
    needed = header.start + sum(part.count * part.length for part in parts(header))
    if needed == size:
        return
    reading = f" ({_NO_MAGIC})" if header.version == 0 else ""
    fault = "truncated" if size < needed else f"{size - needed} bytes follow its last weight"
    raise CheckpointError(
        f"{path}: {fault}: by its header{reading} it has {needed} bytes, found {size}\n"
        f"({_described(header)}); fetch or export it again"
    )


def parts(header: Header) -> tuple[Part, ...]:
    """Return what the file holds, in its order."""
    return _v1_parts(header) if header.version == 1 else _v0_parts(header)


def sources(header: Header) -> Iterator[Source]:
    """Give every tensor of the Hugging Face model in the order of the file."""
    offset = header.start
    for part in parts(header):
        for layer in range(part.count):
            if part.name is not None:
                name, heads = part.name.format(layer), part.heads
                yield Source(name=name, shape=part.shape, heads=heads, offset=offset, length=part.length)
            offset += part.length


def rotary_offset(header: Header) -> int:
    """Return the first byte of the rotary cosines of a version 0 file; the sines follow."""
    before = parts(header)[: [part.name for part in parts(header)].index(None)]
    return header.start + sum(part.count * part.length for part in before)


def _v0_parts(header: Header) -> tuple[Part, ...]:
    angles = Part(name=None, count=1, shape=(header.seq_len, header.head_dim // 2))
    return (
        _embedding(header),
        _norm(header, "input_layernorm"),
        *_attention(header),
        _norm(header, "post_attention_layernorm"),
        *_feed_forward(header),
        _final_norm(header),
        angles,
        angles,
        *_classifier(header),
    )


def _v1_parts(header: Header) -> tuple[Part, ...]:
    return (
        _norm(header, "input_layernorm"),
        _norm(header, "post_attention_layernorm"),
        _final_norm(header),
        _embedding(header),
        *_attention(header),
        *_feed_forward(header),
        *_classifier(header),
    )


def _attention(header: Header) -> tuple[Part, ...]:
    dim, narrow = header.dim, header.n_kv_heads * header.head_dim
    return (
        _matrix(header, "self_attn.q_proj", (dim, dim), header.n_heads),
        _matrix(header, "self_attn.k_proj", (narrow, dim), header.n_kv_heads),
        _matrix(header, "self_attn.v_proj", (narrow, dim)),
        _matrix(header, "self_attn.o_proj", (dim, dim)),
    )


def _feed_forward(header: Header) -> tuple[Part, ...]:
    wide, tall = (header.hidden_dim, header.dim), (header.dim, header.hidden_dim)
    named = (("mlp.gate_proj", wide), ("mlp.down_proj", tall), ("mlp.up_proj", wide))  # w1, w2, w3
    return tuple(_matrix(header, name, shape) for name, shape in named)


def _matrix(header: Header, name: str, shape: tuple[int, ...], heads: int = 0) -> Part:
    return Part(name=f"model.layers.{{}}.{name}.weight", count=header.n_layers, shape=shape, heads=heads)


def _norm(header: Header, name: str) -> Part:
    return _matrix(header, name, (header.dim,))


def _final_norm(header: Header) -> Part:
    return Part(name="model.norm.weight", count=1, shape=(header.dim,))


def _embedding(header: Header) -> Part:
    return Part(name="model.embed_tokens.weight", count=1, shape=(header.vocab_size, header.dim))


def _classifier(header: Header) -> tuple[Part, ...]:
    own = Part(name="lm_head.weight", count=1, shape=(header.vocab_size, header.dim))
    return () if header.shared else (own,)


def _check_version(version: int, path: Path) -> None:
    if version == 2:
        raise CheckpointError(
            f"{path}: version 2 holds int8 weights, which have lost the model's; "
            "export the model again with --version 1"
        )
    if version != 1:
        raise CheckpointError(
            f"{path}: llama2.c file of version {version}; versions 0 and 1 can be imported: "
            "export it with --version 1"
        )


def _checked(path: Path, *, version: int, shared: bool, **sizes: int) -> Header:
    reading = f" ({_NO_MAGIC})" if version == 0 else ""

    def fault(what: str) -> CheckpointError:
        return CheckpointError(f"{path}: {what}{reading}; this is no llama2.c file, or a damaged one")

    for name, size in sizes.items():
        if size <= 0:
            raise fault(f"its header says {name} {size}")
    header = Header(version=version, shared=shared, **sizes)
    if header.dim % header.n_heads:
        raise fault(f"its header says dim {header.dim}, which {header.n_heads} heads do not divide")
    if header.head_dim % 2:
        raise fault(f"its header says heads of width {header.head_dim}; rotary positions need an even one")
    if header.n_heads % header.n_kv_heads:
        raise fault(
            f"its header says n_heads {header.n_heads}, which n_kv_heads {header.n_kv_heads} does not divide"
        )
    for name, most in _MOST.items():
        if sizes[name] > most:
            raise fault(f"its header says {name} {sizes[name]}")
    if header.vocab_size < 3:
        raise fault(f"its header says vocab_size {header.vocab_size}; <unk>, <s> and </s> alone are 3")
    return header


def _described(header: Header) -> str:
    return ", ".join(f"{name} {getattr(header, name)}" for name in _FIELDS)
