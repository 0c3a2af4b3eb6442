"""Digests that tie an expansion to its base, whatever files its tensors lie in.

Each tensor is hashed (blake2b) over its name, dtype, shape and bytes; the fingerprint is the hash of those
hashes in the order of names. `full` takes all bytes. `fast` takes all bytes of tensors up to 64 KiB and 16
pieces of 4 KiB of longer ones, spread evenly from the first byte to the last: training moves a tensor
everywhere, so it is noticed, while a change to single elements may not be.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Final, Literal

from deepen.checkpoint.header import Tensor
from deepen.checkpoint.store import Checkpoint
from deepen.errors import CheckpointError

Strength = Literal["fast", "full"]
Read = Callable[[int, int], bytes | memoryview]

CHUNK: Final = 1 << 20
PIECE: Final = 4096
PIECES: Final = 16


def fast_fingerprint(checkpoint: Checkpoint, rename: Callable[[str], str | None] | None = None) -> str:
    """Return the digest over every tensor's name, dtype, shape and a sample of its bytes.

    Args:
        checkpoint: what to fingerprint.
        rename: name in the checkpoint -> name to hash it under, None to leave it out. With
            `deepen.expansion.base_name` an expanded checkpoint gives its base's fingerprint.
    """
    return _fingerprint(checkpoint, rename, "fast")


def full_fingerprint(checkpoint: Checkpoint, rename: Callable[[str], str | None] | None = None) -> str:
    """Return the digest over every tensor's name, dtype, shape and all its bytes, read in parallel.

    Args:
        checkpoint: what to fingerprint.
        rename: as for `fast_fingerprint`.
    """
    return _fingerprint(checkpoint, rename, "full")


def tensor_digest(
    name: str, dtype: str, shape: Iterable[int], length: int, read: Read, strength: Strength
) -> bytes:
    """Return one tensor's digest; `read(offset, count)` gives its bytes, wherever they live.

    Args:
        name: the name to hash it under.
        dtype: safetensors' name of its type.
        shape: its dimensions.
        length: its number of bytes.
        read: gives `count` of its bytes from `offset`.
        strength: which bytes are read.
    """
    digest = hashlib.blake2b(f"{name}\0{dtype}\0{list(shape)}\0".encode(), digest_size=32)
    for offset, count in hashed_ranges(length, strength):
        digest.update(read(offset, count))
    return digest.digest()


def combine_digests(digests: Mapping[str, bytes], strength: Strength) -> str:
    """Return the fingerprint of a set of tensors from their digests by name."""
    total = hashlib.blake2b(digest_size=32, person=f"deepen {strength} 1".encode())
    for name in sorted(digests):
        total.update(digests[name])
    return total.hexdigest()


@contextmanager
def tensor_reader(tensor: Tensor) -> Iterator[Callable[[int, int], bytes]]:
    """Give a function that reads `count` bytes of a tensor from `offset`.

    Raises:
        CheckpointError: on reading, if the file ends early.
    """
    descriptor = os.open(tensor.file, os.O_RDONLY)

    def read(offset: int, count: int) -> bytes:
        data = os.pread(descriptor, count, tensor.offset + offset)
        while len(data) < count:
            more = os.pread(descriptor, count - len(data), tensor.offset + offset + len(data))
            if not more:
                raise CheckpointError(
                    f"{tensor.file}: tensor {tensor.name!r} ends early; the file has changed"
                )
            data += more
        return data

    try:
        yield read
    finally:
        os.close(descriptor)


def hashed_ranges(length: int, strength: Strength) -> Iterator[tuple[int, int]]:
    """Return the (offset, count) of the bytes hashed of a tensor of `length` bytes."""
    if strength == "full" or length <= PIECE * PIECES:
        yield from ((offset, min(CHUNK, length - offset)) for offset in range(0, length, CHUNK))
    else:
        yield from (((length - PIECE) * piece // (PIECES - 1), PIECE) for piece in range(PIECES))


def workers() -> int:
    """Return how many threads reading and hashing is spread over."""
    return min(8, os.cpu_count() or 1)


def _fingerprint(
    checkpoint: Checkpoint, rename: Callable[[str], str | None] | None, strength: Strength
) -> str:
    names = {name: rename(name) if rename else name for name in checkpoint.tensors}
    chosen = [(new, checkpoint.tensors[name]) for name, new in names.items() if new is not None]

    def digest(item: tuple[str, Tensor]) -> bytes:
        name, tensor = item
        with tensor_reader(tensor) as read:
            return tensor_digest(name, tensor.dtype, tensor.shape, tensor.length, read, strength)

    with ThreadPoolExecutor(workers()) as pool:
        digests = dict(zip((name for name, _ in chosen), pool.map(digest, chosen), strict=True))
    return combine_digests(digests, strength)
