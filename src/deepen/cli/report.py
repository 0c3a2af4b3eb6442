import sys
from pathlib import Path
from typing import Annotated

import typer

from deepen.cli.apps import new_app

app = new_app()


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="A run; a finished one, unless it is watched; or a study.")],
    watch: Annotated[
        bool, typer.Option("--watch", help="Serve the page on this machine while the run goes on.")
    ] = False,
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="Where; 0: any free port.")] = 8377,
) -> None:
    """Write the report.html of a run or a study anew from its records; show a run's while it trains.

    A run gets its model card too.
    """
    if watch:
        _watch(run, port)
        return
    from deepen.report import write_card, write_report, write_study_report

    if (run / "study.json").exists():
        print(write_study_report(run))
        return
    print(write_report(run))
    print(write_card(run, run))


def _watch(run: Path, port: int) -> None:
    from deepen.report import WatchServer

    with WatchServer(run, port) as server:
        try:
            print(server.url, flush=True)
            print("Ctrl-C ends it; training goes on", file=sys.stderr)
            server.serve_forever()
        except KeyboardInterrupt:
            print(file=sys.stderr)  # after the ^C that the terminal shows
