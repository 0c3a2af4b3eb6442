import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deepen.cli.apps import new_app
from deepen.cli.output import human_count, print_json, table_console

if TYPE_CHECKING:
    from deepen.studies.cost import Cost
    from deepen.studies.knowledge.study import KnowledgeStudy
    from deepen.studies.study import Kind, Study

app = new_app("Studies: many runs of one plan, each computed once, and the table they make.")

Recipe = Annotated[Path, typer.Argument(help="The study's recipe, a YAML file.")]
Out = Annotated[Path | None, typer.Option(help="Directory of the study. Default: the recipe's output.")]
Settings = Annotated[list[str] | None, typer.Option("--set", help="Set a key of the recipe, e.g. seeds=[0].")]
Part = Annotated[
    str | None, typer.Option("--cell", help="Only the i-th of n shares of the cells, i/n, for a scheduler.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="List the cells and their cost; compute nothing.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@app.command()
def baselines(
    recipe: Recipe,
    out: Out = None,
    settings: Settings = None,
    cell: Part = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Methods at equal tokens and matched parameters: what each learns, and what it forgets.

    Finished cells are never computed again: call it again to go on.
    """
    _study("baselines", recipe, out, settings, cell, dry_run, as_json)


@app.command()
def ablation(
    recipe: Recipe,
    out: Out = None,
    settings: Settings = None,
    cell: Part = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """How many new blocks, and where: what each layout learns, forgets and costs.

    Finished cells are never computed again: call it again to go on.
    """
    _study("ablation", recipe, out, settings, cell, dry_run, as_json)


@app.command()
def continual(
    recipe: Recipe,
    out: Out = None,
    settings: Settings = None,
    cell: Part = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Tasks learned one after another (TRACE): what each method keeps of the earlier ones.

    Finished cells, and finished tasks of others, are never computed again: call it again to go on.
    """
    from deepen.cli.continual import study_continual

    study_continual(recipe, out, settings or [], cell, dry_run, as_json)


@app.command()
def knowledge(
    recipe: Recipe,
    out: Out = None,
    settings: Settings = None,
    cell: Part = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """The same tuning on the base and on the expanded, trained model: what the new blocks add to it.

    Finished cells are never computed again: call it again to go on.
    """
    _study("knowledge", recipe, out, settings, cell, dry_run, as_json)


def _study(
    kind: "Kind",
    recipe: Path,
    out: Path | None,
    settings: list[str] | None,
    cell: str | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    from deepen.cli.display import display, quiet_transformers
    from deepen.studies.engine import Share
    from deepen.studies.study import compute_study, open_study

    share = Share.parse(cell) if cell else Share()
    quiet_transformers()
    study = open_study(kind, recipe, out, settings or [])
    if dry_run:
        _print_plan(study, as_json)
        return
    with display() as reporter:
        outcome = compute_study(study, share, reporter)
    _print_result(study, outcome.busy, as_json)


def _print_result(study: "Study | KnowledgeStudy", busy: list[str], as_json: bool) -> None:
    from deepen.report import print_study, read_study

    place = study.store.study
    record = read_study(place)
    if as_json:
        print_json(record.model_dump(mode="json"))
    else:
        print_study(record, table_console())
        print(f"{place / 'study.json'}\n{place / 'report.html'}")
    for name in busy:
        print(f"{name}: another process is computing it", file=sys.stderr)
    if record.finished < record.cells:
        said = f"{record.finished} of {record.cells} cells are finished; call again to go on"
        print(said, file=sys.stderr)


def _print_plan(study: "Study | KnowledgeStudy", as_json: bool) -> None:
    planned = study.costs()
    left = [each.cost for each in planned if not each.finished]
    tokens, flops = sum(cost.tokens or 0 for cost in left), sum(cost.flops or 0.0 for cost in left)
    if as_json:
        cells = [{**vars(each), "cost": {**vars(each.cost), "flops": each.cost.flops}} for each in planned]
        print_json({"dry_run": True, "cells": cells, "left": len(left), "tokens": tokens, "flops": flops})
        return
    width = max(len(each.name) for each in planned)
    for each in planned:
        state = "finished" if each.finished else f"waits for {each.waits_for}" if each.waits_for else ""
        print(f"{each.name:{width}}  {_cost(each.cost)}  {state}".rstrip())
    print(f"to compute: {len(left)} cells, {human_count(tokens)} tokens, {flops:.3g} FLOPs")


def _cost(cost: "Cost") -> str:
    tokens = "epochs" if cost.tokens is None else f"{human_count(cost.tokens)} tokens"
    flops = "" if cost.flops is None else f"  {cost.flops:.3g} FLOPs"
    return f"{human_count(cost.trainable):>9} trained  {tokens:>14}{flops}"
