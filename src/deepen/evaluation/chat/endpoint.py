"""One request to an OpenAI-compatible endpoint, again where that may help."""

import http.client
import json
import os
import random
import threading
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from email.message import Message as Headers
from typing import IO, Any, Final
from urllib.parse import urlsplit

from deepen.errors import EvaluationError
from deepen.evaluation.chat.messages import Message

_AGAIN: Final = {408, 409, 425, 429, 500, 502, 503, 504, 529}
_LONGEST_WAIT: Final = 60.0


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """Where a judge answers, and how long to insist.

    Attributes:
        url: what `/chat/completions` follows: `https://api.openai.com/v1`, `http://localhost:8000/v1`.
        model: its name there.
        key_variable: environment variable that holds the key; where it is not set, none is sent. The key is
            never written anywhere.
        timeout: seconds without a byte from the endpoint.
        attempts: requests until an answer comes.
        backoff: seconds before the second attempt; doubled before each further one, at most a minute. A
            `Retry-After` of the endpoint counts instead, at most a minute as well.
        options: further fields of the request.
    """

    url: str
    model: str
    key_variable: str = "OPENAI_API_KEY"
    timeout: float = 120.0
    attempts: int = 6
    backoff: float = 1.0
    options: Mapping[str, Any] = field(default_factory=lambda: {"temperature": 0})

    def __post_init__(self) -> None:
        """Refuse what is no address, and no attempt."""
        parts = urlsplit(self.url)
        if parts.scheme not in {"http", "https"} or not parts.hostname or parts.username:
            raise EvaluationError(f"judge {self.url!r}: must be an address such as https://host/v1")
        if self.attempts < 1:
            raise EvaluationError(f"judge {self.url}: {self.attempts} attempts; must be 1 or more")


@dataclass(frozen=True)
class Answer:
    """What an endpoint answered.

    Attributes:
        text: the reply.
        refused: the endpoint or its model declined to reply.
    """

    text: str
    refused: bool


class _Again(Exception):
    """A failure that may pass; `wait` is what the endpoint asked for, in seconds."""

    def __init__(self, said: str, wait: float | None = None) -> None:
        super().__init__(said)
        self.wait = wait


def ask(endpoint: Endpoint, messages: Sequence[Message], stop: threading.Event | None = None) -> Answer:
    """Send a conversation and return the answer.

    Args:
        endpoint: where to.
        messages: the conversation.
        stop: set from elsewhere, there is no further attempt.

    Raises:
        EvaluationError: the endpoint cannot be reached, refuses the request, or does not answer in its form.
    """
    said, stop = "", stop or threading.Event()
    for attempt in range(endpoint.attempts):
        try:
            return _read(_send(endpoint, messages))
        except _Again as failure:
            said = str(failure)
            last = attempt + 1 == endpoint.attempts
            if last or stop.wait(_wait(endpoint, attempt, failure.wait)):
                break
    raise EvaluationError(f"judge {endpoint.url}: {attempt + 1} attempts failed, the last: {said}")


def _wait(endpoint: Endpoint, attempt: int, asked: float | None) -> float:
    # Drawn, so that those who were turned away together do not come back together.
    own = endpoint.backoff * 2**attempt * random.uniform(0.75, 1.25)
    return min(own if asked is None else asked, _LONGEST_WAIT)


def _send(endpoint: Endpoint, messages: Sequence[Message]) -> bytes:
    key = os.environ.get(endpoint.key_variable, "")
    body = {**endpoint.options, "model": endpoint.model, "messages": list(messages)}
    request = urllib.request.Request(
        f"{endpoint.url.rstrip('/')}/chat/completions",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})},
    )
    try:
        with _OPENER.open(request, timeout=endpoint.timeout) as response:
            content: bytes = response.read()
            return content
    except urllib.error.HTTPError as error:
        raise _refusal(endpoint, error, key) from None
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        timed_out = isinstance(reason, TimeoutError)
        said = f"no answer in {endpoint.timeout:g} s" if timed_out else str(reason) or type(reason).__name__
        raise _Again(said) from None
    except ValueError as error:  # a key or an address that is no header
        raise EvaluationError(f"judge {endpoint.url}: cannot be asked ({type(error).__name__})") from None


def _refusal(endpoint: Endpoint, error: urllib.error.HTTPError, key: str) -> Exception:
    try:
        with error:
            told = " ".join(error.read(2000).decode(errors="replace").split())[:300]
    except (OSError, http.client.HTTPException):
        told = ""
    told = told.replace(key, "…") if key else told
    said = f"status {error.code}" + (f": {told}" if told else "")
    if error.code in _AGAIN:
        return _Again(said, _seconds(error.headers.get("Retry-After")))
    hint = f"\nthe key is read from {endpoint.key_variable}" if error.code in {401, 403} else ""
    return EvaluationError(f"judge {endpoint.url}: {said}{hint}")


def _seconds(text: str | None) -> float | None:
    try:
        return max(0.0, float(text)) if text else None
    except ValueError:  # a date
        return None


def _read(content: bytes) -> Answer:
    try:
        choice = json.loads(content)["choices"][0]
        message = choice["message"]
        text, refusal = message.get("content"), message.get("refusal")
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        shown = " ".join(content[:200].decode(errors="replace").split())
        raise _Again(f"not a chat completion: {shown!r}") from None
    refused = bool(refusal) or choice.get("finish_reason") == "content_filter"
    return Answer(text=str(refusal or text or ""), refused=refused)


class _Stay(urllib.request.HTTPRedirectHandler):
    """Follows no redirect: it would carry the key elsewhere."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Headers, newurl: str
    ) -> None:
        """Answer that there is nothing to follow."""


_OPENER: Final = urllib.request.build_opener(_Stay)
