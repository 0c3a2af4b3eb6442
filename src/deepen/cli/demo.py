from pathlib import Path
from typing import Annotated

import typer

from deepen.cli.apps import new_app
from deepen.cli.output import human_bytes

app = new_app()

_NEXT = """
Each row is trained at the rate with its best domain loss on one grid (studies/demo_rates/record.json).
Said plainly: on that grid full fine-tuning at a lower rate, 1e-3, forgets as much as new blocks do here and
learns a little more. At this size new blocks are not the better trade-off. What they give at any size is the
base's bytes untouched, and a pack of {pack} that comes off again, as do others on the same base.

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
        from deepen.demo.demo import run_demo

        runs = run_demo(out, overwrite=overwrite, reporter=reporter)
    report_comparison(runs, ["full fine-tuning", "new blocks"], out / "comparison.html", as_json)
    if not as_json:
        pack = out / "blocks" / "blocks" / "blocks.safetensors"
        print(_NEXT.format(out=out, pack=human_bytes(pack.stat().st_size)))
