from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deepen.cli.apps import new_app
from deepen.cli.output import print_json

if TYPE_CHECKING:
    from deepen.pipeline.reporter import Reporter
    from deepen.planner.devices import Device
    from deepen.planner.job import Job
    from deepen.planner.rehearsal import Rehearsal
    from deepen.planner.speed import Speed

app = new_app()


@app.command()
def plan(
    model: Annotated[
        str, typer.Argument(help="A model (directory, config.json or hub id), or a recipe, a YAML file.")
    ],
    blocks: Annotated[int | None, typer.Option(min=1, help="Number of new blocks.")] = None,
    placement: Annotated[str, typer.Option(help="interleaved, suffix or prefix.")] = "interleaved",
    method: Annotated[str, typer.Option(help="blocks, full, lora, freeze, moe, scale or prompt.")] = "blocks",
    sequence: Annotated[int, typer.Option(min=1, help="Tokens of a window.")] = 4096,
    batch_tokens: Annotated[
        float, typer.Option(min=1, help="Tokens of an optimiser step, e.g. 4e6.")
    ] = 262_144,
    micro_batch: Annotated[int | None, typer.Option(min=1, help="Windows of a forward pass.")] = None,
    tokens: Annotated[float, typer.Option(min=1, help="Tokens to train on, e.g. 2e9.")] = 1e9,
    precision: Annotated[str, typer.Option(help="auto, bf16 or fp32.")] = "auto",
    checkpointing: Annotated[str, typer.Option(help="Activations: none, auto or full.")] = "auto",
    optimizer: Annotated[str, typer.Option(help="adamw or adamw_8bit.")] = "adamw",
    quantise: Annotated[str, typer.Option(help="How the base is held: none, 8bit or 4bit.")] = "none",
    device: Annotated[str, typer.Option(help="h100, a100-80, rtx4090, … or here: this machine's.")] = "here",
    devices: Annotated[int, typer.Option(min=1, help="How many share each step.")] = 1,
    measured: Annotated[
        bool, typer.Option("--measure", help="Train a few of its blocks here for some seconds, for the time.")
    ] = False,
    price: Annotated[float | None, typer.Option(min=0, help="Dollars for an hour of a device.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Set a key of the recipe, e.g. train.tokens=1e6.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Say what training would take, before it costs anything: memory, time, energy, money."""
    options = {
        "method": method,
        "tokens": tokens,
        "batch_tokens": max(batch_tokens, sequence),
        "micro_batch": micro_batch,
        "precision": precision,
        "recompute": checkpointing,
        "optimizer": optimizer,
        "quantise": quantise,
        "learning_rate": 1.0,
    }
    if model.endswith((".yaml", ".yml")):
        job_of = _of_recipe(Path(model), settings or [], device, devices)
    else:
        job_of = _of_model(model, options, blocks, placement, sequence, device, devices)
    from deepen.cli.display import display

    with display() as reporter:
        job, chosen = job_of()
        facts = _facts(model, job, chosen, price, measured, reporter)
    if as_json:
        print_json(facts)
    else:
        from deepen.cli.plan_page import print_plan

        print_plan(facts)


def _of_recipe(
    path: Path, settings: list[str], device: str, devices: int
) -> Callable[[], tuple["Job", "Device"]]:
    """Read and check the recipe; what is returned imports torch when it is called."""
    from deepen.config import load_recipe
    from deepen.pipeline.plan import plan_run

    outline = plan_run(load_recipe(path, settings))

    def job_of() -> tuple["Job", "Device"]:
        from deepen.pipeline.cost import choose_device, job_of_run
        from deepen.planner.devices import HERE, find_device

        return job_of_run(outline, devices), choose_device(outline) if device == HERE else find_device(device)

    return job_of


def _of_model(
    model: str,
    options: dict[str, Any],
    blocks: int | None,
    placement: str,
    sequence: int,
    device: str,
    devices: int,
) -> Callable[[], tuple["Job", "Device"]]:
    """Check the options; as above."""
    from deepen.config import TrainSection, make_section

    train = make_section(TrainSection, options, "--")

    def job_of() -> tuple["Job", "Device"]:
        from deepen.pipeline.cost import job_of_model
        from deepen.planner.devices import find_device

        job = job_of_model(model, train, blocks=blocks, placement=placement, length=sequence, devices=devices)
        return job, find_device(device)

    return job_of


def _facts(
    model: str, job: "Job", device: "Device", price: float | None, measured: bool, reporter: "Reporter"
) -> dict[str, Any]:
    from deepen.pipeline.texts import default_cache
    from deepen.planner.estimate import measure
    from deepen.planner.rehearsal import check_rehearsal, rehearse
    from deepen.planner.report import SPEED_FILE, plan_facts
    from deepen.planner.speed import read_speed

    if measured:
        check_rehearsal(job, device)
    reporter.stage("running one step without values")
    found = measure(job, device)
    speed: Speed | Rehearsal | None
    if measured:
        reporter.stage("training a few blocks")
        speed = rehearse(found, device, reporter.progress)
    else:
        speed = read_speed(default_cache() / SPEED_FILE, device, job.precision(device.kind))
    return plan_facts(model, found, device, speed, price)
