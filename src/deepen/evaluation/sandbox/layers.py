"""Which layers hold on this machine, and what they stop: tried out before the first program runs."""

import shutil
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Final

from deepen.errors import SandboxError
from deepen.evaluation.sandbox.inside import kernel, landlock, seccomp
from deepen.evaluation.sandbox.inside.confine import BUBBLEWRAP, LANDLOCK, NAMESPACES, SECCOMP
from deepen.evaluation.sandbox.launch import Running
from deepen.evaluation.sandbox.probes import (
    NETWORK,
    PROCESSES,
    READING,
    SIGNALS,
    WRITING,
    escapes,
    limits_met,
)

UNPROTECTED: Final = "I understand that code written by a model will run with my rights on this machine"

# What must be stopped before code of a model runs. Starting processes is not among them: where seccomp does
# not forbid it, they end with the sandbox.
_NEEDED: Final = (NETWORK, READING, WRITING, SIGNALS)
_ATTEMPTED: Final = (*_NEEDED, PROCESSES)

# Before it a file that may be read can also be cut to nothing.
_LANDLOCK_VERSION: Final = 3


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One layer, tried alone.

    Attributes:
        name: "namespaces", "bubblewrap", "landlock" or "seccomp".
        holds: whether a program ran behind it, and it stopped something.
        stops: attempts that succeed without it and failed behind it.
        why_not: where it does not hold, the reason in a few words.
    """

    name: str
    holds: bool
    stops: tuple[str, ...] = ()
    why_not: str = ""


@dataclass(frozen=True, kw_only=True)
class Protection:
    """What the self-test found.

    Attributes:
        layers: each layer tried.
        used: those that hold and are used together.
        stops: attempts that succeed without a layer and failed behind all of them: more than each alone
            stops, for what passes as "writing" behind one may be the change of a mode that another denies.
        open: attempts that succeed behind all of them.
        limits: which limits were seen to end a program.
    """

    layers: tuple[Layer, ...]
    used: tuple[str, ...]
    stops: tuple[str, ...]
    open: tuple[str, ...]
    limits: tuple[str, ...]

    @property
    def missing(self) -> tuple[str, ...]:
        """What has to be stopped before model-written code may run, and is not."""
        return tuple(name for name in _NEEDED if name in self.open)


_LOCK = threading.Lock()


def try_layers() -> Protection:
    """Try every layer alone and those that hold together; about a second, once a process."""
    with _LOCK:
        return _tried()


@cache
def _tried() -> Protection:
    with ThreadPoolExecutor(4) as pool:
        without = pool.submit(escapes, (), Running())
        alone = [pool.submit(_try, name) for name in (NAMESPACES, LANDLOCK, SECCOMP)]
        possible = without.result()[0]
        layers = [_judge(*future.result(), possible) for future in alone]
    if not layers[0].holds:
        layers.insert(1, _judge(*_try(BUBBLEWRAP), possible))
    used = tuple(layer.name for layer in layers if layer.holds)
    escaped, outcome = escapes(used, Running())
    if not outcome.passed:
        raise SandboxError(
            f"the sandbox failed its self-test behind {', '.join(used) or 'no layer'}: {outcome.reason}"
        )
    met = limits_met(used, Running())
    return Protection(
        layers=tuple(layers),
        used=used,
        stops=_ordered(possible - escaped),
        open=_ordered(escaped),
        limits=tuple(sorted(met)),
    )


def _try(name: str) -> tuple[str, str, set[str]]:
    """Return the layer, why it cannot be had (empty if it can), and what escapes it."""
    refusal = _unavailable(name)
    if refusal:
        return name, refusal, set()
    escaped, outcome = escapes((name,), Running())
    return name, "" if outcome.passed else outcome.reason, escaped


def _unavailable(name: str) -> str:
    if not kernel.LINUX:
        return "not on this system"
    if name == BUBBLEWRAP and shutil.which("bwrap") is None:
        return "bwrap is not installed"
    if name == LANDLOCK and landlock.version() < _LANDLOCK_VERSION:
        return f"the kernel has version {landlock.version()}, not {_LANDLOCK_VERSION} (Linux 6.2)"
    if name == SECCOMP and not seccomp.supported():
        return "no filter for this architecture"
    return ""


def _judge(name: str, refusal: str, escaped: set[str], possible: set[str]) -> Layer:
    if refusal:
        return Layer(name=name, holds=False, why_not=refusal)
    stops = _ordered(possible - escaped)
    return Layer(name=name, holds=bool(stops), stops=stops, why_not="" if stops else "it stopped nothing")


def _ordered(names: set[str]) -> tuple[str, ...]:
    return tuple(name for name in _ATTEMPTED if name in names)


def require_layers(allow_unprotected: str) -> Sequence[str]:
    """Return the layers to run behind; raises `SandboxError` where they leave too much open.

    `allow_unprotected` is `UNPROTECTED`, word for word, to run nevertheless.
    """
    protection = try_layers()
    if protection.missing and allow_unprotected != UNPROTECTED:
        raise SandboxError(
            "this machine does not confine a program that a model wrote: it leaves open "
            f"{_list(protection.missing)} (layers that hold: {_list(protection.used)})\n"
            "run where Linux offers namespaces, Landlock or seccomp, "
            f"or pass allow_unprotected={UNPROTECTED!r}"
        )
    return protection.used


def describe_layers() -> str:
    """Return what the self-test found, one layer a line."""
    protection = try_layers()
    lines = [
        f"{layer.name:<12}" + (f"stops {_list(layer.stops)}" if layer.holds else f"absent: {layer.why_not}")
        for layer in protection.layers
    ]
    lines += [
        f"{'together':<12}stop {_list(protection.stops)}",
        f"{'limits':<12}stop {_list(protection.limits)}",
        f"{'open':<12}{_list(protection.open)}",
    ]
    return "\n".join(lines)


def _list(names: Sequence[str]) -> str:
    return ", ".join(names) or "none"
