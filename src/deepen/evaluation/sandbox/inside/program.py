"""The process of the model's code: it runs the source, then answers calls with plain data.

Nothing here decides whether the program is right. Whatever the program does to this process, to the
interpreter or to the pipes, all it can send is plain data, as if its functions had returned it.
"""

import errno
import random
import sys
from types import ModuleType
from typing import Any

from deepen.evaluation.sandbox.inside import codec, frames


def serve(job: dict[str, Any], requests: int, responses: int) -> None:
    """Run the job's source, say how that went, and answer requests until nobody asks."""
    most = job["limits"]["message_bytes"]
    module = ModuleType(job["module"])
    sys.modules[job["module"]] = module
    sys.argv = ["program"]
    # Programs that draw at random draw the same in every run.
    random.seed(0)
    frames.send(responses, _answer(_run, job["source"], vars(module)))
    while True:
        request = codec.decode(frames.receive(requests, most))
        frames.send(responses, _answer(_do, request, vars(module)))


def _run(source: str, names: dict[str, Any]) -> None:
    exec(compile(source, "<program>", "exec", dont_inherit=True), names)


def _do(request: Any, names: dict[str, Any]) -> Any:
    kind, *arguments = request
    if kind == "call":
        name, positional, keywords = arguments
        return _find(name, names)(*positional, **keywords)
    for name in arguments[0]:
        # The answer of a program: a function to call, or a variable.
        if name in names:
            return names[name]() if callable(names[name]) else names[name]
    return None


def _find(name: str, names: dict[str, Any]) -> Any:
    if name not in names:
        raise NameError(f"the program defines no {name!r}")
    return names[name]


def _answer(work: Any, *arguments: Any) -> bytes:
    """Return the encoded outcome of a piece of work: ["value", it], or ["error", status, type, text]."""
    try:
        try:
            return codec.encode(["value", work(*arguments)])
        finally:
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
    except BaseException as error:
        return codec.encode(["error", _status(error), type(error).__name__, _text(error)])


def _status(error: BaseException) -> str:
    if isinstance(error, MemoryError):
        return "memory"
    refused = isinstance(error, OSError) and error.errno in {errno.EPERM, errno.EACCES, errno.EROFS}
    return "blocked" if refused else "failed"


def _text(error: BaseException) -> str:
    try:
        return str(error)[:300]
    except BaseException:
        return ""
