import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deepen.cli.apps import new_app
from deepen.cli.output import print_json

if TYPE_CHECKING:
    from deepen.pipeline.evaluate import Evaluation
    from deepen.records import Metric

app = new_app()


@app.command()
def evaluate(
    model: Annotated[
        str, typer.Argument(help="A run, a block pack, an adapter, or a checkpoint (directory or hub id).")
    ],
    base: Annotated[
        str | None, typer.Option(help="The base, where the model does not say it or it has moved.")
    ] = None,
    suite: Annotated[
        list[str] | None, typer.Option(help="open-llm, code, math, law, safety, or a YAML file.")
    ] = None,
    task: Annotated[
        list[str] | None, typer.Option(help="A task of the harness or a YAML file, with shots: arc_easy:5.")
    ] = None,
    text: Annotated[
        list[str] | None, typer.Option(help="Text whose loss must be kept (.txt, .jsonl …).")
    ] = None,
    domain_text: Annotated[list[str] | None, typer.Option(help="Text whose loss must fall.")] = None,
    local: Annotated[Path | None, typer.Option(help="Directory of local copies of datasets.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Documents of each task; default: all.")] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Sequences in a forward pass; default: as many as fit.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda …")] = "auto",
    allow_unprotected: Annotated[
        str, typer.Option(help="The sandbox's sentence, to run programs where nothing confines them.")
    ] = "",
    out: Annotated[
        Path | None, typer.Option(help="Keep records and items here; a run keeps them in evaluation/.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Score a model and its base on the same items: benchmarks, and held-out loss of texts."""
    # Neither imports torch: a suite that does not exist is said at once.
    from deepen.config import TextSet
    from deepen.evaluation.suites import task_specs

    specs = task_specs(suite or [], task or [])
    from deepen.cli.display import display

    with display() as reporter:
        reporter.stage("starting")
        from deepen.pipeline.evaluate import Request, evaluate_model

        request = Request(
            target=model,
            base=base,
            tasks=specs,
            texts=tuple(TextSet(path=path) for path in text or []),
            domain_texts=tuple(TextSet(path=path) for path in domain_text or []),
            local=local,
            limit=limit,
            batch_size=batch_size,
            device=device,
            allow_unprotected=allow_unprotected,
            out=out,
        )
        found = evaluate_model(request, reporter)
    _report(found, as_json)
    _fail(found.failures)


def _fail(failures: list[str]) -> None:
    if failures:
        said = f"error: {len(failures)} tasks failed; the others' results are kept"
        print(said, *failures, sep="\n", file=sys.stderr)
        raise typer.Exit(2)


def _report(found: "Evaluation", as_json: bool) -> None:
    if as_json:
        print_json(
            {
                "model": found.subject.model.name,
                "base": found.subject.base,
                "metrics": found.metrics,
                "failed": found.failures,
                "out": found.out,
            }
        )
        return
    for line in _table(found.metrics):
        print(line)
    if found.out is not None:
        print(f"records and items: {found.out}")
        if (found.out.parent / "result.json").exists():
            print(f"on the run's page and card: deepen report {found.out.parent}")


def _table(metrics: "list[Metric]") -> list[str]:
    """Lines of equal columns: task, metric, n, base, model, difference, interval, p and verdict."""
    from deepen.report import finding, p_value

    rows = [("task", "metric", "n", "base", "model", "delta", "95% interval", "p (Holm)", "verdict")]
    for each in metrics:
        ends = (each.ci_low, each.ci_high)
        rows.append(
            (
                each.task,
                each.metric,
                str(each.n),
                _number(each.base_value),
                _number(each.value),
                _number(each.delta, "+"),
                "" if None in ends else f"{_number(each.ci_low, '+')} … {_number(each.ci_high, '+')}",
                "" if each.p_holm is None else p_value(each.p_holm),
                "" if each.verdict is None else finding(each),
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if column < 2 or column == len(row) - 1 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _number(value: float | None, sign: str = "") -> str:
    return "" if value is None else f"{value:{sign}.4f}"
