import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from deepen.cli.output import print_json, table_console

if TYPE_CHECKING:
    from deepen.records import ContinualRecord


def study_continual(
    recipe: Path, out: Path | None, settings: Sequence[str], cell: str | None, dry_run: bool, as_json: bool
) -> None:
    """Compute what is missing of a study of continual learning, and print its table."""
    from deepen.cli.display import display, quiet_transformers
    from deepen.records import ContinualRecord, read_record
    from deepen.studies.continual.study import (
        RECORD,
        collect_continual,
        compute_continual,
        open_continual,
    )
    from deepen.studies.engine import Share

    share = Share.parse(cell) if cell else Share()
    quiet_transformers()
    study = open_continual(recipe, out, settings)
    if dry_run:
        _print(study.store.study, collect_continual(study), as_json)
        return
    with display() as reporter:
        outcome = compute_continual(study, share, reporter)
    for name in outcome.busy:
        print(f"{name}: another process is computing it", file=sys.stderr)
    _print(study.store.study, read_record(study.store.study / RECORD, ContinualRecord), as_json)


def _print(place: Path, record: "ContinualRecord", as_json: bool) -> None:
    if as_json:
        # The matrix of the first cell stands by itself, for who has one method and seed.
        first = record.cells[0].model_dump(mode="json") if record.cells else {}
        print_json({**record.model_dump(mode="json"), **{key: first.get(key) for key in ("R", "op", "bwt")}})
    else:
        from deepen.report import print_continual

        print_continual(record, table_console())
        if (place / "report.html").exists():
            print(f"{place / 'study.json'}\n{place / 'report.html'}")
    if record.missing:
        print(f"not finished yet: {', '.join(record.missing)}; call again to go on", file=sys.stderr)
