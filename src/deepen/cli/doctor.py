from collections.abc import Mapping
from typing import Annotated, Any

import typer

from deepen.cli.apps import new_app
from deepen.cli.output import human_bytes, print_json

app = new_app()


@app.command()
def doctor(
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Measure this machine, for `deepen plan`; ten seconds.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Say what this machine has, what a run would use, and what is missing."""
    from deepen.cli.display import display

    with display() as reporter:
        if calibrate:
            reporter.stage("measuring this machine")
            _calibrate()
        from deepen.pipeline.doctor import examine

        facts = examine()
    if as_json:
        print_json(facts)
        return
    for name, found in facts.items():
        if name != "packages":
            _print(name, found)
    for package in facts["packages"] if isinstance(facts["packages"], list) else []:
        state, get = (package.version, "") if package.version else ("missing", package.install)
        print(f"{'package':<12}{package.name:<14}{state:<10}{package.use:<35}{get}".rstrip())


def _calibrate() -> None:
    from deepen.pipeline.texts import default_cache
    from deepen.planner.calibration import calibrate
    from deepen.planner.devices import this_device
    from deepen.planner.report import SPEED_FILE
    from deepen.planner.speed import write_speed

    write_speed(default_cache() / SPEED_FILE, calibrate(this_device()))


def _print(name: str, found: Any) -> None:
    if found is None:
        found = {"": "none; deepen doctor --calibrate"}
    rows = found if isinstance(found, list) else [found]
    for row in rows:
        print(f"{name:<12}{_line(name, row)}")


def _line(name: str, row: Mapping[str, Any]) -> str:
    if name == "calibration" and "measured" in row:
        return (
            f"of {row['measured']}: {1e-9 / row['products']:.0f} GFLOP/s in products"
            if row["products"]
            else ""
        )
    said = (
        f"{key} {human_bytes(value) if isinstance(value, int) else value}".strip()
        for key, value in row.items()
        if value is not None
    )
    return "; ".join(said)
