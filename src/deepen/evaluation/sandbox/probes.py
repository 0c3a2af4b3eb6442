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
    with socket.create_connection(("127.0.0.1", {port}), timeout=5) as connection:
        connection.sendall({token!r})

def read():
    with open({secret!r}) as file:
        return file.read()

def write():
    with open({new!r}, "w") as file:
        file.write("written")

def fork():
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    return True

attempt(connect)
attempt(write)
attempt(lambda: os.kill({victim}, signal.SIGKILL))
answer = [attempt(read), attempt(fork)]
"""


@dataclass(frozen=True, kw_only=True)
class _Bait:
    """What lies outside to be reached: a listening port, a secret, an empty place, a living process."""

    port: socket.socket
    secret: Path
    new: Path
    victim: "subprocess.Popen[bytes]"


@contextmanager
def _laid_out() -> Iterator[_Bait]:
    # A bare interpreter that waits for the end of its input.
    command = [sys.executable, "-I", "-S", "-c", "import sys; sys.stdin.read()"]
    with (
        TemporaryDirectory(prefix="sandbox-bait-") as directory,
        socket.create_server(("127.0.0.1", 0)) as port,
        subprocess.Popen(command, stdin=subprocess.PIPE) as victim,
    ):
        secret = Path(directory, "secret")
        secret.write_text(secrets.token_hex())
        port.settimeout(0)
        yield _Bait(port=port, secret=secret, new=Path(directory, "new"), victim=victim)


def escapes(layers: Collection[str], running: Running) -> tuple[set[str], Outcome]:
    """Make every attempt behind these layers; return what succeeded, and the program's outcome."""
    with _laid_out() as bait:
        token = secrets.token_bytes()
        source = _ATTEMPTS.format(
            port=bait.port.getsockname()[1],
            token=token,
            secret=str(bait.secret),
            new=str(bait.new),
            victim=bait.victim.pid,
        )
        program = Program(name="attempts", source=source, answer=("answer",))
        outcome = launch(program, _LIMITS, layers, running)
        text, forked = outcome.value or (None, False)
        done = {
            NETWORK: _arrived(bait.port, token),
            READING: text == bait.secret.read_text(),
            WRITING: bait.new.exists(),
            SIGNALS: bait.victim.poll() is not None,
            PROCESSES: forked is True,
        }
        return {name for name, succeeded in done.items() if succeeded}, outcome


def _arrived(port: socket.socket, token: bytes) -> bool:
    try:
        connection, _ = port.accept()
    except BlockingIOError:
        return False
    with connection:
        connection.settimeout(5)
        return connection.recv(len(token)) == token


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
