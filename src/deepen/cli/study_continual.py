import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deepen.cli.output import print_json

if TYPE_CHECKING:
    from deepen.records import ContinualRecord


def continual(
    recipe: Annotated[Path, typer.Argument(help="The study's recipe, a YAML file.")],
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Set a key of the recipe, e.g. seeds=[0].")
    ] = None,
    cell: Annotated[
        str | None,
        typer.Option("--cell", help="Only the i-th of n shares of the cells, i/n, for a scheduler."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the tasks and the cells; compute nothing.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Tasks learned one after another (TRACE): what each method keeps of the earlier ones.

    Finished cells, and finished tasks of those cut short, are never computed again: call it again to go on.
    """
    from deepen.cli.display import display, quiet_transformers
    from deepen.studies.continual.study import collect_continual, compute_continual, open_continual
    from deepen.studies.engine import Share

    share = Share.parse(cell) if cell else Share()
    quiet_transformers()
    study = open_continual(recipe, settings or [])
    if not dry_run:
        with display() as reporter:
            outcome = compute_continual(study, share, reporter)
        for name in outcome.busy:
            print(f"{name}: another process is computing it", file=sys.stderr)
    _print(study.store.study, collect_continual(study), as_json)


def _print(place: Path, record: "ContinualRecord", as_json: bool) -> None:
    if as_json:
        # The matrix of the first cell stands by itself, for who has one method and seed.
        first = record.cells[0].model_dump(mode="json") if record.cells else {}
        print_json({**record.model_dump(mode="json"), **{key: first.get(key) for key in ("R", "op", "bwt")}})
    else:
        from rich.console import Console

        from deepen.report import print_continual

        print_continual(record, Console())
        if (place / "report.html").exists():
            print(f"{place / 'study.json'}\n{place / 'report.html'}")
    if record.missing:
        print(f"not finished yet: {', '.join(record.missing)}", file=sys.stderr)
