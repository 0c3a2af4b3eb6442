"""Attempts to get out, made for real: what a layer is said to stop, it has been seen to stop.

Each attempt leaves a trace outside the sandbox that the program cannot make up: a connection that arrives,
the text of a file that it was not told, a file that appears, a process that dies.
"""

import secrets
import socket
import subprocess
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from select import select
from tempfile import TemporaryDirectory
from typing import Final

from deepen.evaluation.sandbox.launch import Running, launch
from deepen.evaluation.sandbox.programs import MIB, Limits, Outcome, Program

NETWORK, READING, WRITING = "network", "reading files outside", "writing files outside"
SIGNALS, PROCESSES = "signals to processes outside", "starting processes"
MEMORY, TIME = "memory beyond the limit", "time beyond the limit"

# Wide limits of time: a probe that is slow on a busy machine must not look like one that was stopped.
_LIMITS: Final = Limits(cpu_seconds=20, wall_seconds=60, memory_bytes=512 * MIB)
_TIGHT: Final = Limits(cpu_seconds=20, wall_seconds=0.5, memory_bytes=256 * MIB)

_ATTEMPTS = """
import os, signal, socket

def attempt(action):
    try:
        return action()
    except Exception as error:
        return None

def connect():
    socket.create_connection(("127.0.0.1", {port}), timeout=5).close()

def read():
    with open({secret!r}) as file:
        return file.read()

def datagram():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.sendto(b"out", ("127.0.0.1", {port}))

def local():
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect({door!r})

def write():
    with open({new!r}, "w") as file:
        file.write("written")

def fork():
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    return True

for action in (connect, datagram, local, write):
    attempt(action)
attempt(lambda: os.chmod({file!r}, 0o777))
attempt(lambda: os.truncate({file!r}, 0))
attempt(lambda: os.kill({victim}, signal.SIGKILL))
answer = [attempt(read), attempt(fork)]
"""


# A bare interpreter that gives back one byte and ends.
_VICTIM = "import sys; sys.stdout.buffer.write(sys.stdin.buffer.read(1))"


@dataclass(frozen=True, kw_only=True)
class _Bait:
    """What lies outside to be reached.

    Attributes:
        doors: sockets that listen, by TCP, UDP and path.
        directory: holds a secret, and a file that is not to change.
        victim: a living process.
    """

    doors: tuple[socket.socket, socket.socket, socket.socket]
    directory: Path
    victim: "subprocess.Popen[bytes]"

    @property
    def files(self) -> dict[str, tuple[int, int]]:
        """Mode and size of each file."""
        return {path.name: (path.stat().st_mode, path.stat().st_size) for path in self.directory.iterdir()}


@contextmanager
def _laid_out() -> Iterator[_Bait]:
    command = [sys.executable, "-I", "-S", "-c", _VICTIM]
    with (
        TemporaryDirectory(prefix="sandbox-bait-") as directory,
        socket.create_server(("127.0.0.1", 0)) as stream,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams,
        socket.socket(socket.AF_UNIX) as local,
        subprocess.Popen(command, bufsize=0, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as victim,
    ):
        datagrams.bind(stream.getsockname())
        local.bind(f"{directory}/door")
        local.listen()
        for name in ("secret", "file"):
            Path(directory, name).write_text(secrets.token_hex())
        yield _Bait(doors=(stream, datagrams, local), directory=Path(directory), victim=victim)


def _lives(victim: "subprocess.Popen[bytes]") -> bool:
    """Ask a process for an answer: whether it was killed shows at once, however busy the machine is."""
    assert victim.stdin is not None
    assert victim.stdout is not None
    try:
        victim.stdin.write(b"?")
    except BrokenPipeError:
        return False
    return victim.stdout.read(1) == b"?"


def escapes(layers: Collection[str], running: Running) -> tuple[set[str], Outcome]:
    """Make every attempt behind these layers; return what succeeded, and the program's outcome."""
    with _laid_out() as bait:
        paths = {name: str(bait.directory / name) for name in ("door", "secret", "file", "new")}
        port = bait.doors[0].getsockname()[1]
        source = _ATTEMPTS.format(port=port, victim=bait.victim.pid, **paths)
        before = bait.files
        program = Program(name="attempts", source=source, answer=("answer",))
        outcome = launch(program, _LIMITS, layers, running)
        text, forked = outcome.value or (None, False)
        done = {
            NETWORK: bool(select(bait.doors, (), (), 0)[0]),
            READING: text == Path(paths["secret"]).read_text(),
            WRITING: bait.files != before,
            SIGNALS: not _lives(bait.victim),
            PROCESSES: forked is True,
        }
        return {name for name, succeeded in done.items() if succeeded}, outcome


def limits_met(layers: Collection[str], running: Running) -> set[str]:
    """Return which of the limits on memory and time end a program that goes beyond them."""
    block = 4 * _TIGHT.memory_bytes
    greedy = Program(name="memory", source=f"answer = len(bytearray({block}))", answer=("answer",))
    endless = Program(name="time", source="while True: pass")
    found = set()
    if launch(greedy, _LIMITS, layers, running).status == "memory":
        found.add(MEMORY)
    if launch(endless, _TIGHT, layers, running).status == "timeout":
        found.add(TIME)
    return found
