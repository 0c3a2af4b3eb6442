"""The process of the checks: it knows what is expected, asks the program, and alone says if it passed."""

import builtins
import json
import random
import re
from collections.abc import Callable
from typing import Any

from deepen.evaluation.sandbox.inside import codec, frames

_ADDRESS = re.compile(r"\b0x[0-9a-f]{6,}")


class ProgramError(Exception):
    """An exception of the program that the built-in ones do not include."""


class _Asker:
    """Asks the program's process over its pipes; remembers the last exception that came from there."""

    def __init__(self, requests: int, responses: int, most: int) -> None:
        self.requests, self.responses, self.most = requests, responses, most
        self.raised: tuple[BaseException | None, str] = (None, "failed")

    def hear(self) -> Any:
        kind, *parts = codec.decode(frames.receive(self.responses, self.most))
        if kind == "value":
            return parts[0]
        status, name, text = parts
        error = _error(str(name), str(text))
        self.raised = error, status if status in {"memory", "blocked"} else "failed"
        raise error

    def ask(self, *request: Any) -> Any:
        frames.send(self.requests, codec.encode(list(request)))
        return self.hear()

    def stand_in(self, name: str) -> Callable[..., Any]:
        """Return a function of this process that calls the program's function of that name."""

        def call(*arguments: Any, **keywords: Any) -> Any:
            return self.ask("call", name, arguments, keywords)

        call.__name__ = call.__qualname__ = name
        return call


def judge(checks: dict[str, Any], requests: int, responses: int, most: int) -> bytes:
    """Run the checks of a program and return the verdict: JSON of status, reason and value (encoded)."""
    random.seed(0)
    asker = _Asker(requests, responses, most)
    try:
        asker.hear()
        value = _run(checks, asker)
        return _verdict("passed", "", codec.encode(value).decode())
    except frames.Closed as closed:
        return _verdict("lost", str(closed))
    except BaseException as error:
        raised, status = asker.raised
        return _verdict(status if error is raised else "failed", _reason(error, checks["checks"]))


def _run(checks: dict[str, Any], asker: _Asker) -> Any:
    names: dict[str, Any] = {"__name__": "checks"}
    exec(compile(checks["setup"], "<setup>", "exec", dont_inherit=True), names)
    names.update({name: asker.stand_in(name) for name in checks["entry_points"]})
    exec(compile(checks["checks"], "<checks>", "exec", dont_inherit=True), names)
    return asker.ask("answer", checks["answer"]) if checks["answer"] else None


def _error(name: str, text: str) -> BaseException:
    kind = getattr(builtins, name, None)
    if isinstance(kind, type) and issubclass(kind, Exception):
        try:
            return kind(text)
        except TypeError:  # UnicodeDecodeError and its kin want more than a text
            pass
    return ProgramError(f"{name}: {text}" if text else name)


def _reason(error: BaseException, checks: str) -> str:
    """Return one line, fit for a terminal: the exception, and the line of the checks that raised it."""
    name = "" if isinstance(error, ProgramError) else type(error).__name__
    try:
        text = ": ".join(part for part in (name, " ".join(str(error).split())) if part)
    except Exception:
        text = name
    text = "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)
    # Addresses differ from run to run, results must not.
    return _ADDRESS.sub("0x…", (text + _place(error, checks))[:400])


def _place(error: BaseException, checks: str) -> str:
    lines, trace, number = checks.splitlines(), error.__traceback__, 0
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == "<checks>":
            number = trace.tb_lineno
        trace = trace.tb_next
    return f" at `{lines[number - 1].strip()}`" if 0 < number <= len(lines) else ""


def _verdict(status: str, reason: str, value: str | None = None) -> bytes:
    return json.dumps({"status": status, "reason": reason, "value": value}).encode()
