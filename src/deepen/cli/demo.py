from pathlib import Path
from typing import Annotated

import typer

from deepen.cli.apps import new_app

app = new_app()

_NEXT = """\
What to try next:
  your own text      copy {out}/blocks/recipe.yaml, change base, output and the paths, then: deepen run
  other placements   deepen run {out}/blocks/recipe.yaml --set expand.placement=suffix \\
                         --set output={out}/suffix
  the pack           deepen blocks inspect {out}/blocks/blocks
  the pages          {out}/comparison.html, {out}/blocks/report.html"""


@app.command()
def demo(
    out: Annotated[
        Path, typer.Option(help="Directory to work in; an interrupted demo goes on from there.")
    ] = Path("demo"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier demo.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """See the whole life on a tiny embedded base: offline, on a CPU, in about two minutes."""
    from deepen.cli.compare import report_comparison
    from deepen.cli.display import display

    with display() as reporter:
        reporter.stage("starting")
        from deepen.demo.demo import run_demo

        runs = run_demo(out, overwrite=overwrite, reporter=reporter)
    report_comparison(runs, ["full fine-tuning", "new blocks"], out / "comparison.html", as_json)
    if not as_json:
        print(_NEXT.format(out=out))
