"""The templates and what they may use."""

from datetime import datetime
from functools import cache
from html import escape
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from deepen.report import wording


def render(template: str, **values: Any) -> str:
    """Fill in a template of this package; HTML templates escape every value."""
    return _environment().get_template(template).render(**values)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("deepen.report"),
        autoescape=lambda name: bool(name and name.endswith(".html.j2")),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "count": wording.count,
        "duration": wording.duration,
        "loss": wording.loss,
        "change": wording.change,
        "shown": wording.shown,
        "date": _date,
        "md": _markdown,
    }
    environment.globals |= {
        "interval": wording.interval,
        "number": wording.number,
        "epochs": wording.epochs,
        "quantisation": wording.quantisation,
        "early_stop": wording.early_stop,
    }
    return environment


def _date(moment: str) -> str:
    try:
        return datetime.fromisoformat(moment).strftime("%-d %B %Y, %H:%M UTC")
    except ValueError:
        return moment


def _markdown(value: object) -> str:
    """Escape text for a line or a table cell of Markdown."""
    text = escape(" ".join(str(value).split()), quote=False)
    return "".join(f"\\{letter}" if letter in "\\`*_[]|#~" else letter for letter in text)
