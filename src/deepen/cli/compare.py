from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from deepen.cli.apps import new_app
from deepen.cli.output import print_json, table_console

app = new_app()


@app.command()
def compare(
    runs: Annotated[
        list[Path],
        typer.Argument(help="Runs, directories deepen evaluate wrote, or single records, on the same items."),
    ],
    html: Annotated[Path | None, typer.Option(help="Also write a page with the learned/kept plane.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Put runs beside their base: losses and tasks, what was learned, what was kept, with intervals."""
    report_comparison(runs, None, html, as_json)


def report_comparison(
    runs: Sequence[Path], labels: Sequence[str] | None, html: Path | None, as_json: bool
) -> None:
    """Print a comparison, and write its page where one is asked for."""
    from deepen.evaluation import compare_runs
    from deepen.report import describe_differences, print_table, write_comparison_page

    comparison = compare_runs(runs, labels)
    if html is not None:
        write_comparison_page(comparison, html)
    if as_json:
        print_json(comparison.model_dump(mode="json"))
        return
    print_table(comparison, table_console())
    for sentence in describe_differences(comparison):
        print(sentence)
