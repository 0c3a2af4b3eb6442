"""A cell: one result of a study, and where it is kept."""

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from deepen.checkpoint import write_file
from deepen.errors import OutputError
from deepen.pipeline.reporter import Reporter
from deepen.records import CellRecord, Provenance, read_record

RECORD: Final = "cell.json"
_DIGITS: Final = 12


@dataclass(frozen=True, kw_only=True)
class Computed:
    """What computing a cell gave: its result as plain data, and where it comes from."""

    result: Mapping[str, Any]
    provenance: Provenance


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One result that a study asks for.

    Attributes:
        name: readable; the beginning of its directory's name.
        inputs: everything that decides the result, as JSON can hold it; texts and models by their digests.
        compute: does the work in a directory. Called again after it was cut short, by a kill for instance, it
            goes on from what it finds there; called after it ended, it returns the same at once.
    """

    name: str
    inputs: Mapping[str, Any]
    compute: Callable[[Path, Reporter], Computed]

    @property
    def key(self) -> str:
        """Digest of the inputs."""
        written = json.dumps(self.inputs, sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.blake2b(written.encode()).hexdigest()[:_DIGITS]


@dataclass(frozen=True)
class Store:
    """The cells of one study on disk: `STUDY/cells/NAME-KEY/`."""

    study: Path

    def directory(self, cell: Cell) -> Path:
        """Return where a cell lies: where its key is found, whatever it was called then."""
        held = sorted((self.study / "cells").glob(f"*-{cell.key}"))
        return held[0] if held else self.study / "cells" / f"{cell.name}-{cell.key}"

    def finished(self, cell: Cell) -> CellRecord | None:
        """Return the record of a finished cell.

        Raises:
            DataError: it is malformed.
        """
        path = self.directory(cell) / RECORD
        return read_record(path, CellRecord) if path.exists() else None

    def finish(self, cell: Cell, computed: Computed, code: str | None) -> CellRecord:
        """Write a cell's record; with it the cell is finished."""
        record = CellRecord(
            name=cell.name,
            key=cell.key,
            inputs=dict(cell.inputs),
            result=dict(computed.result),
            code=code,
            provenance=computed.provenance,
        )
        write_file(self.directory(cell) / RECORD, record.model_dump_json(indent=1) + "\n")
        return record

    @contextmanager
    def hold(self, cell: Cell) -> Iterator[bool]:
        """Hold a cell against other processes; give False where another one holds it.

        The kernel lets go of the lock when its process ends, in whatever way.

        Raises:
            OutputError: the study's directory cannot be written.
        """
        path = self.study / "locks" / cell.key
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise OutputError(f"{path}: cannot be written ({error.strerror})") from None
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            yield False
            return
        except OSError as error:
            os.close(handle)
            raise OutputError(f"{path}: this file system cannot lock files ({error.strerror})") from None
        try:
            yield True
        finally:
            os.close(handle)
