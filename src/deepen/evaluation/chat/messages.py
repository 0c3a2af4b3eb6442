"""A conversation, and whoever answers it."""

import hashlib
import json
from collections.abc import Sequence
from functools import cache
from typing import Any, Literal, Protocol, TypedDict

from jinja2 import Environment, PackageLoader, StrictUndefined


class Message(TypedDict):
    """One message, as chat templates and OpenAI-compatible endpoints take it."""

    role: Literal["system", "user", "assistant"]
    content: str


class Responder(Protocol):
    """Whoever answers conversations: a model, or in tests a script."""

    @property
    def identity(self) -> str:
        """Digest of all that its replies depend on: with an equal one, kept replies are taken instead."""

    def reply(self, conversations: Sequence[Sequence[Message]], stop: Sequence[str] = ()) -> list[str | None]:
        """Answer each conversation, up to and including the first of the stop sequences.

        None: there is no room for a reply in the context.
        """


def user(content: str) -> Message:
    """Return a message of the user."""
    return {"role": "user", "content": content}


def assistant(content: str) -> Message:
    """Return a message of the model."""
    return {"role": "assistant", "content": content}


def prompt(name: str, **values: Any) -> str:
    """Fill in a prompt of this package."""
    return _environment().get_template(f"{name}.j2").render(**values).strip()


def digest_of(*parts: Any) -> str:
    """Return the SHA-256 of plain data."""
    content = json.dumps(parts, ensure_ascii=False, sort_keys=True)
    return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()


@cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("deepen.evaluation.chat", "prompts"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
