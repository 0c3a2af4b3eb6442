from pathlib import Path

from deepen.report.card import write_card
from deepen.report.page import write_report


def complete_pages(run: Path) -> None:
    """Write what a finished run lacks of its pages: it may have been killed just before them."""
    if not (run / "report.html").exists():
        write_report(run)
    if not (run / "README.md").exists():
        write_card(run, run)
