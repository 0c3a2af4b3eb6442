"""Pieces of the page, as HTML and plain data; gradio is not needed for them."""

import math
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from html import escape
from typing import Any, Final

from deepen.dialogue.cast import Cast
from deepen.dialogue.next_tokens import Guess, Place

Message = MutableMapping[str, Any]

# Whatever a model writes, an image from elsewhere say, the browser loads nothing but this page's own files.
POLICY: Final = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; "
    "worker-src 'self' blob:; form-action 'self'; frame-ancestors 'none'"
)

STYLE: Final = """
.gradio-container { max-width: 1280px !important; margin: 0 auto; }
.gradio-container .prose { padding: 0; }
.title b, h3.section { font-weight: 600; font-size: 1.15rem; }
.title span { color: var(--body-text-color-subdued); margin-left: .75rem; }
.title p { color: var(--body-text-color-subdued); margin: .25rem 0 0; }
h3.section { margin: .25rem 0 0; }
.message-buttons-bot, .message-buttons-user, button[aria-label="Clear"] { display: none !important; }
#tokens .textfield { padding: 10px; line-height: 1.7; }
.guesses { display: grid; grid-template-columns: 1fr 1fr; gap: .5rem 1.25rem; }
.guesses p { margin: 0 0 .25rem; color: var(--body-text-color-subdued); }
.guesses .after { grid-column: 1 / -1; }
.guess { display: grid; grid-template-columns: 1fr 3.6rem; margin: 2px 0; font-family: var(--font-mono); }
.guess code { background: none; padding: 1px 6px; white-space: pre; border-radius: 3px; overflow: hidden; }
.guess span { text-align: right; font-variant-numeric: tabular-nums; }
"""

# A divergence at which a token has the full colour, in nats: the base would be e² times as surprised.
_FULL: Final = 2.0


class ContentPolicy:
    """Adds the content security policy to every answer of a server (an ASGI middleware)."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self._app = app

    async def __call__(
        self, scope: Message, receive: Any, send: Callable[[Message], Awaitable[None]]
    ) -> None:
        """Serve one request."""

        async def stamped(message: Message) -> None:
            if message["type"] == "http.response.start":
                held = [*message.get("headers", ())]
                message["headers"] = [*held, (b"content-security-policy", POLICY.encode())]
            await send(message)

        await self._app(scope, receive, stamped)


def heading(cast: Cast) -> str:
    """Say who is here, and what to know of them."""
    notes = "".join(f"<p>{escape(note)}</p>" for note in cast.notes)
    beside = f"beside its base {cast.base_name}" if cast.base_name != cast.name else "with packs and without"
    return (
        f'<div class="title"><b>deepen chat</b><span>{escape(cast.name)} {escape(beside)}</span>{notes}</div>'
    )


def marked_tokens(places: Sequence[Place]) -> list[tuple[str, float | None]]:
    """Return the tokens of a text, those marked where base and model would choose differently.

    The mark is from 0 to 1 and grows with the divergence. A line break is written as a sign: the page would
    make several entries of one that has it.
    """
    return [
        (each.text.replace("\n", "↵"), max(0.1, min(each.divergence / _FULL, 1.0)) if each.differs else None)
        for each in places[:-1]
    ]


def summary(places: Sequence[Place]) -> str:
    """Say in a line how far apart the two are over a text."""
    if len(places) < 2:
        return "Ask something: the tokens of the answer stand here, marked where the two would differ."
    tokens = places[:-1]
    mean = math.fsum(each.divergence for each in tokens) / len(tokens)
    differing = sum(each.differs for each in tokens)
    if not differing and mean < 1e-9:
        return f"The two are one model here: {len(tokens)} tokens, no difference."
    return (
        f"At {differing} of {len(tokens)} tokens the two would go on differently; these are marked, "
        f"the darker the further apart. KL(model ‖ base) is {mean:.3f} nats a token. "
        "Choose a token to see what each expected."
    )


def first_difference(places: Sequence[Place]) -> int:
    """Return the first place where the two would differ; the end of the text where there is none."""
    return next((at for at, place in enumerate(places) if place.differs), len(places) - 1)


def guess_tables(places: Sequence[Place], at: int) -> str:
    """Show what each expects at a place, with probabilities, below the end of the text before it."""
    if not places:
        return ""
    place = places[at]
    before = "".join(each.text for each in places[:at])[-30:]
    after = f"after “…{escape(before)}”" if before else "at the beginning"
    return (
        f'<div class="guesses"><p class="after">KL {place.divergence:.3f} nats {after}</p>'
        f"<div><p>the base expects</p>{_guesses(place.base)}</div>"
        f"<div><p>the model expects</p>{_guesses(place.model)}</div></div>"
    )


def _guesses(guesses: Sequence[Guess]) -> str:
    return "".join(map(_guess, guesses))


def _guess(guess: Guess) -> str:
    share = f"{guess.probability:.1%}"
    bar = f"linear-gradient(90deg, var(--primary-200) {share}, transparent {share})"
    text = escape(visible(guess.text))
    return f'<div class="guess"><code style="background: {bar}">{text}</code><span>{share}</span></div>'


def visible(text: str) -> str:
    """Write a token so that white space shows."""
    return text.replace("\n", "↵").replace("\t", "⇥").replace(" ", "·") or "∅"
