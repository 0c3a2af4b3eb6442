"""The page of one run."""

from pathlib import Path

from deepen.config import dump_recipe
from deepen.report.blocks import HEIGHT, WIDTH, trace_blocks
from deepen.report.effects import effects_chart
from deepen.report.figures import heldout_chart, speed_chart, training_chart
from deepen.report.layout import draw_tower
from deepen.report.read import RunReport, read_run
from deepen.report.retention import describe_kept, describe_tasks, divergence, margin_of, token_shifts
from deepen.report.switch import describe_switch
from deepen.report.templates import render
from deepen.report.wording import verdict
from deepen.report.write import write_page

METRICS = {"nats_per_token": "nats per token", "bits_per_byte": "bits per byte"}


def write_report(run_dir: Path) -> Path:
    """Write `report.html` into a finished run directory: one page that needs nothing else.

    Raises:
        DataError: a record is missing or malformed.
        RecipeError: `recipe.yaml` is missing or malformed.
        OutputError: the page cannot be written.
    """
    return write_page(run_dir / "report.html", render_report(read_run(run_dir)))


def render_report(report: RunReport, *, reload: int | None = None) -> str:
    """Return the page of a run as HTML.

    Args:
        report: the run; one that still goes on has no findings yet, and says how far it is.
        reload: seconds after which a browser asks for the page again.
    """
    result = report.outcome
    charts = [
        training_chart(report),
        heldout_chart(report, "domain"),
        heldout_chart(report, "general"),
        speed_chart(report),
    ]
    return render(
        "run.html.j2",
        report=report,
        result=result,
        reload=reload,
        tower=draw_tower(result.layout) if result and result.layout else None,
        verdicts=[verdict(metric) for metric in report.metrics("nats_per_token")] if result else [],
        kept=describe_kept(report),
        margin=margin_of(report),
        tasks=describe_tasks(report),
        shifts=token_shifts(report),
        divergence=divergence,
        metrics=METRICS,
        units=units(report),
        charts=[chart for chart in charts if chart],
        blocks=trace_blocks(report),
        effects=report.effects,
        effects_chart=effects_chart(report.effects) if report.effects else None,
        switch=report.switch,
        switched=describe_switch(report.switch) if report.switch else [],
        spark=(WIDTH, HEIGHT),
        recipe=dump_recipe(report.recipe),
    )


def units(report: RunReport) -> dict[str, str]:
    """What the items of each text are: task -> `document` or `window`."""
    return {text.task: text.items.unit for text in report.heldout.texts} if report.heldout else {}
