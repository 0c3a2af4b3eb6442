"""What in a step is to blame for a loss or a gradient that is not finite."""

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any, Final

# Windows that a message names.
_MOST: Final = 5


class NotFinite(Exception):
    """The loss or the gradient of a step is not finite; no update was made."""


def find_bad_windows(batch: Any, is_finite: Callable[[Any], bool]) -> list[int]:
    """Return the windows of a batch that are not finite alone.

    Args:
        batch: a dataclass whose fields have an entry for each window.
        is_finite: computes a batch's loss and gradient and says whether both are finite.
    """
    return [row for row in range(len(batch.tokens)) if not is_finite(_one_window(batch, row))]


def explain(found: str, names: Sequence[str], windows: int) -> str:
    """Say of a step that is not finite what is to blame, in two lines.

    Args:
        found: the step and its figures.
        names: the windows that are not finite alone.
        windows: how many the step has.
    """
    if len(names) == windows:
        advice = "so is each window of the step alone: weights have overflowed; lower train.learning_rate"
    elif names:
        shown = ", ".join(names[:_MOST]) + (f" and {len(names) - _MOST} more" if len(names) > _MOST else "")
        advice = f"of the step's {windows} windows, alone: {shown}; look at the text there, or lower "
        advice += "train.learning_rate"
    else:
        advice = "each window of the step alone is finite; lower train.learning_rate"
    return f"{found}: not finite; the last checkpoint is intact\n{advice}"


def _one_window(batch: Any, row: int) -> Any:
    held = {field.name: getattr(batch, field.name) for field in fields(batch)}
    return replace(batch, **{name: v[row : row + 1] for name, v in held.items() if v is not None})
