"""Messages over pipes: eight bytes of length, then the bytes."""

import os

_HEAD = 8


class Closed(Exception):
    """The other end of a pipe is gone."""


def pack(message: bytes) -> bytes:
    """Return a message as it crosses a pipe."""
    return len(message).to_bytes(_HEAD, "little") + message


def send(descriptor: int, message: bytes) -> None:
    """Write one message; raises `Closed` when nobody reads."""
    view = memoryview(pack(message))
    while view:
        try:
            view = view[os.write(descriptor, view) :]
        except OSError as error:
            raise Closed("nobody reads") from error


def receive(descriptor: int, most: int) -> bytes:
    """Read one message; raises `Closed` at the end, and ValueError where it has more than `most` bytes."""
    length = int.from_bytes(_exactly(descriptor, _HEAD), "little")
    if length > most:
        raise ValueError(f"a message of {length} bytes; at most {most} may pass")
    return _exactly(descriptor, length)


def _exactly(descriptor: int, length: int) -> bytes:
    chunks = bytearray()
    while len(chunks) < length:
        chunk = os.read(descriptor, min(length - len(chunks), 1 << 20))
        if not chunk:
            raise Closed("the other end is gone")
        chunks += chunk
    return bytes(chunks)


def complete(data: bytes | bytearray) -> bytes | None:
    """Return the message that the bytes received so far begin with; None while some of it is missing."""
    length = int.from_bytes(data[:_HEAD], "little")
    return bytes(data[_HEAD : _HEAD + length]) if len(data) >= _HEAD + length else None
