"""A pseudo-random order of any length that takes no memory and no start-up time."""

import hashlib

import numpy as np
import numpy.typing as npt

from deepen.data.words import scatter

_ROUNDS = 6

Words = npt.NDArray[np.uint64]


def permute(positions: npt.NDArray[np.int64], size: int, key: str) -> npt.NDArray[np.int64]:
    """Map each position in [0, size) to its place in a bijection of [0, size) chosen by `key`.

    A balanced Feistel network permutes the next power of four; a value that leaves [0, size) is sent through
    again until it returns (cycle walking), fewer than four times on average. See Black and Rogaway, "Ciphers
    with Arbitrary Finite Domains", 2002.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    digest = hashlib.blake2b(key.encode(), digest_size=8 * _ROUNDS, person=b"deepen-order").digest()
    keys = np.frombuffer(digest, dtype="<u8").astype(np.uint64)
    result = _network(positions.astype(np.uint64), half, keys)
    while (outside := result >= size).any():
        result[outside] = _network(result[outside], half, keys)
    return result.astype(np.int64)


def _network(words: Words, half: int, keys: Words) -> Words:
    shift, mask = np.uint64(half), np.uint64((1 << half) - 1)
    left, right = words >> shift, words & mask
    for key in keys:
        left, right = right, left ^ (scatter(right + key) & mask)
    return (left << shift) | right
