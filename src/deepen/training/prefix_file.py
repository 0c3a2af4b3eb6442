"""A file of fixed-size rows of states, filled in any order and mapped into memory for reading.

::

    8 bytes a window    digest of its row; zeros: there is none
    states              one row a window

A row counts only where it has its digest: one that a killed process or a full disk left half-written, or that
the disk damaged, is not there and is written again. What no one wrote takes no room on the disk.
"""

import hashlib
import math
import os
from pathlib import Path
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from deepen.errors import OutputError

_DIGEST: Final = 8


class PrefixFile:
    """States of windows, by number; open until `close`."""

    def __init__(self, path: Path, windows: int, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        """Open the file, or begin it.

        Args:
            path: the same for the same windows, shape and dtype; its directory is created.
            windows: how many there are.
            shape: of one window's states.
            dtype: of the states.

        Raises:
            OutputError: it cannot be written.
        """
        self.path, self._shape, self._dtype = path, shape, dtype
        self._row = math.prod(shape) * dtype.itemsize
        size = file_bytes(windows, shape, dtype)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            if os.fstat(self._file).st_size != size:
                os.ftruncate(self._file, size)
        except OSError as error:
            raise OutputError(f"{path}: cannot be written: {error.strerror}") from error
        mapped = np.memmap(path, np.uint8, "r", shape=(size,))
        self._digests = mapped[: windows * _DIGEST].reshape(windows, _DIGEST)
        self._rows = mapped[windows * _DIGEST :].reshape(windows, self._row)
        self._whole = np.zeros(windows, dtype=np.bool_)
        self.held = int(self._digests.any(axis=1).sum())

    def read(self, numbers: NDArray[np.int64]) -> torch.Tensor | None:
        """Return the states of some windows [windows, *shape], or None where one of them is not there."""
        if not all(map(self._is_whole, numbers.tolist())):
            return None
        # In torch's own memory: sums over what lies aligned otherwise come out in other last bits.
        states = torch.empty((len(numbers), *self._shape), dtype=self._dtype)
        states.view(torch.uint8).numpy().reshape(len(numbers), self._row)[:] = self._rows[numbers]
        return states

    def write(self, numbers: NDArray[np.int64], states: torch.Tensor) -> None:
        """Write the states of some windows; those that are there stay as they are.

        Raises:
            OutputError: the disk refuses it.
        """
        content = states.detach().to("cpu").contiguous().view(torch.uint8).numpy()
        rows = content.reshape(len(numbers), self._row)
        for number, row in zip(numbers.tolist(), rows, strict=True):
            if not self._is_whole(number):
                self.held += not self._digests[number].any()
                self._put(len(self._digests) * _DIGEST + number * self._row, row.data)
                self._put(number * _DIGEST, memoryview(_digest(row)))
                self._whole[number] = True

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)

    def _is_whole(self, number: int) -> bool:
        """Hold a row that this process neither wrote nor read before to its digest."""
        if not self._whole[number]:
            recorded = self._digests[number].tobytes()
            self._whole[number] = any(recorded) and _digest(self._rows[number]) == recorded
        return bool(self._whole[number])

    def _put(self, place: int, content: memoryview) -> None:
        # Not through the map: a full disk would end the process without a word.
        try:
            while content:
                done = os.pwrite(self._file, content, place)
                place, content = place + done, content[done:]
        except OSError as error:
            raise OutputError(
                f"{self.path}: cannot be written: {error.strerror}; set train.prefix_cache to none"
            ) from error


def file_bytes(windows: int, shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Return the size of a full file."""
    return windows * (_DIGEST + math.prod(shape) * dtype.itemsize)


def _digest(row: NDArray[np.uint8]) -> bytes:
    return hashlib.blake2b(row.data, digest_size=_DIGEST).digest()
