import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deepen.cli.apps import new_app
from deepen.cli.compare import report_comparison
from deepen.cli.output import human_count, print_json

if TYPE_CHECKING:
    from deepen.config import Recipe
    from deepen.pipeline.plan import Outline
    from deepen.records import RunResult

app = new_app()


@app.command()
def run(
    recipe: Annotated[Path, typer.Argument(help="The recipe, a YAML file.")],
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Set a key of the recipe, e.g. train.tokens=1e6.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an unfinished run.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier run.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be done; write nothing.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Start even what cannot fit the memory.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Expand, train, evaluate and report, as a recipe says."""
    # torchrun starts many of us: the first one checks, writes and prints, the others do as it says.
    from deepen.training.launch import launch_rank, launched

    if launch_rank():
        if not dry_run:
            _follow()
        return
    # None of these imports torch: what is wrong with the recipe or the output is said at once.
    from deepen.config import load_recipe
    from deepen.pipeline.directory import RunDirectory, check_run
    from deepen.pipeline.plan import plan_run

    asked = load_recipe(recipe, settings or [])
    if dry_run:
        _report_plan(plan_run(asked), as_json)
        check_run(asked, resume=True, overwrite=overwrite)
        return
    result = check_run(asked, resume=resume, overwrite=overwrite)
    plan = plan_run(asked) if result is None else None
    if force or (resume and RunDirectory(Path(asked.output)).recipe.exists()):
        plan = None  # it fits, or is to be tried all the same
    # A process that is not alone tells the others that there is nothing to do.
    alone = not launched()
    result = _finished(asked, result) if result and alone else _run(asked, resume, overwrite, plan)
    _report(Path(asked.output), result, as_json)


def _finished(recipe: "Recipe", result: "RunResult") -> "RunResult":
    """Answer without torch, which takes seconds to import."""
    from deepen.report import complete_pages

    print(f"{recipe.output}: already finished; nothing to do", file=sys.stderr)
    output = Path(recipe.output)
    for run in (output, output / "sft"):
        if run.is_dir():
            complete_pages(run)
    return result


def _follow() -> None:
    from deepen.cli.display import quiet_transformers
    from deepen.pipeline.run import run_recipe

    quiet_transformers()
    run_recipe(None)


def _run(recipe: "Recipe", resume: bool, overwrite: bool, plan: "Outline | None") -> "RunResult":
    """Run, once what is planned, if anything, is known to fit."""
    from deepen.cli.display import display

    with display() as reporter:
        if plan is not None:
            from deepen.pipeline.cost import check_fits

            check_fits(plan)
        from deepen.pipeline.run import run_recipe

        return run_recipe(recipe, resume=resume, overwrite=overwrite, reporter=reporter)


def _report_plan(plan: "Outline", as_json: bool) -> None:
    from deepen.config import dump_recipe

    facts = {
        "dry_run": True,
        "stage": plan.name,
        "recipe": plan.recipe,
        "layout": plan.layout.draw() if plan.layout else None,
        "parameters": plan.parameters,
        "steps": plan.known_steps,
        "tokens": plan.known_tokens,
        "epochs": plan.train.epochs,
        "windows_per_step": plan.windows,
        "windows_per_forward": plan.micro_batch,
    }
    if as_json:
        print_json(facts)
        return
    print(dump_recipe(plan.recipe))
    print(f"layout      {plan.layout.draw() if plan.layout else 'the base as it is'}")
    counts = plan.parameters
    trained = "adapters" if counts.trainable is None else human_count(counts.trainable)
    print(f"parameters  {human_count(counts.base)} base + {human_count(counts.new)} new; {trained} train")
    if plan.train.prefix_cache != "none":
        _print_prefix(plan)
    if anchor := plan.train.anchor:
        copy = "; a frozen copy of the base in memory beside the model" if plan.train.copies_base else ""
        print(f"anchor      {plan.anchor_windows} windows more a step, {anchor.source}{copy}")
    if teacher := plan.train.teacher:
        print(f"teacher     {teacher.model}; a frozen model in memory beside the one that trains")
    step = f"{plan.windows} windows × {plan.length} tokens ({plan.micro_batch} windows a forward pass)"
    if plan.known_tokens is not None:
        print(f"tokens      {human_count(plan.known_tokens)} in {plan.known_steps} steps of {step}")
    else:
        print(f"epochs      {plan.train.epochs:g}, in steps of {step};")
        print("            how many steps is known once the texts are tokenised (deepen data prepare)")
    if plan.name == "train" and (sft := plan.recipe.sft):
        from deepen.pipeline.plan import window_length

        trains = {"all": "all parameters", "new": "the new blocks", "lora": "adapters"}[sft.trainable]
        length = window_length(sft, plan.base.checkpoint.config)
        print(
            f"then tuned  {trains}: {sft.epochs:g} epochs in steps of {sft.batch} windows × {length} tokens"
        )


def _print_prefix(plan: "Outline") -> None:
    """Say what the prefix cache takes; how many tokens there are is known once the texts are tokenised."""
    checkpoint, family = plan.base.checkpoint, plan.base.family
    outside = (tensor for tensor in checkpoint.tensors.values() if family.split(tensor.name) is None)
    width = min((tensor.shape[0] for tensor in outside if len(tensor.shape) == 1), default=0)  # a norm's
    below = f"the lower {min(plan.layout.new_indices)} blocks" if plan.layout else "the lower blocks"
    print(
        f"prefix      {below} run once a window; a token of the texts takes {2 * width:,} B on disk in bf16,"
    )
    print(f"            {4 * width:,} B in fp32")


def _report(output: Path, result: "RunResult", as_json: bool) -> None:
    from deepen.records import read_result

    tuning = output / "sft"
    tuned = read_result(tuning) if tuning.is_dir() else None
    if as_json:
        facts = _facts(output, result)
        print_json(facts | {"sft": _facts(tuning, tuned)} if tuned else facts)
        return
    runs, labels = ([output, tuning], ["trained", "tuned"]) if tuned else ([output], None)
    report_comparison(runs, labels, None, as_json)
    for each, where in ((result, output), (tuned, tuning)):
        if each is not None:
            _print_proofs(each)
            for path in (*each.outputs, "report.html"):
                print(where / path)
    if tuned:
        print(output / "stages.html")


def _facts(output: Path, result: "RunResult") -> dict[str, object]:
    from deepen.records import EvaluationRecord, read_record

    record = read_record(output / "evaluation" / "heldout.json", EvaluationRecord)
    return {**result.model_dump(mode="json"), "metrics": record.metrics}


def _print_proofs(result: "RunResult") -> None:
    from deepen.report.wording import early_stop

    stage = "tuning" if result.stage == "sft" else "training"
    if result.identity:
        held = "quantised base" if result.quantisation else "base"
        print(f"before {stage}: the {held} to the bit ({'; '.join(result.identity.checks)})")
    if result.audit:
        print(f"after {stage}: {result.audit.tensors} base tensors unchanged, by hash of all bytes")
    elif result.stage == "sft":
        print("after tuning: the base's tensors changed too, as all parameters were tuned")
    if result.stopped:
        print(early_stop(result.stopped))
