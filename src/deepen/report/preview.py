"""Training windows as a page: what the model will really see."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from deepen.report.templates import render
from deepen.report.write import write_page


@dataclass(frozen=True, kw_only=True)
class PreviewPiece:
    """A run of tokens that are alike.

    Attributes:
        text: what they are in words.
        tokens: how many.
        trained: whether they are targets that count in the loss.
        document: number of the document or conversation in the window, from 1.
        begins: whether it begins here.
    """

    text: str
    tokens: int
    trained: bool
    document: int
    begins: bool


@dataclass(frozen=True, kw_only=True)
class PreviewWindow:
    """A window.

    Attributes:
        title: which one it is, and how much of it is trained.
        pieces: of it, in order.
        padding: tokens at its end that hold nothing.
    """

    title: str
    pieces: tuple[PreviewPiece, ...]
    padding: int


def write_preview_page(
    path: Path, stage: str, windows: Sequence[PreviewWindow], facts: Sequence[str]
) -> Path:
    """Write windows and facts about all there are as one self-contained HTML page; return its path.

    Args:
        path: the file.
        stage: `train` or `sft`.
        windows: to show.
        facts: a line each: template, truncation, lengths, packing.

    Raises:
        OutputError: it cannot be written.
    """
    return write_page(path, render("preview.html.j2", stage=stage, windows=windows, facts=facts))
