from pathlib import Path
from typing import Annotated

import typer

from deepen.cli.apps import new_app

app = new_app()


@app.command()
def report(run: Annotated[Path, typer.Argument(help="A finished run.")]) -> None:
    """Write a run's report.html and model card anew from its records."""
    from deepen.report import write_card, write_report

    print(write_report(run))
    print(write_card(run, run))
