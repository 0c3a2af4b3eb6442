"""Where metrics are shown besides `metrics.jsonl`, which is always written and is the ground truth."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Protocol

from deepen.errors import TrainingError


class Sink(Protocol):
    """One place that shows metrics while a run goes on."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Show the values of a step."""

    def close(self) -> None:
        """Finish."""


class TensorBoard:
    """Event files below `tensorboard/` of the run, for `tensorboard --logdir RUN`."""

    def __init__(self, run: Path, recipe: Mapping[str, Any], first_step: int) -> None:
        writer = _module("torch.utils.tensorboard", "tensorboard").SummaryWriter
        # Points of an earlier process beyond the step this one begins at are hidden.
        self._writer = writer(str(run / "tensorboard"), purge_step=first_step + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Add one scalar for each value."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush the file and close it."""
        self._writer.close()


class _Tracker:
    """A run of wandb, or of trackio, which has the same calls."""

    package: str

    def __init__(self, run: Path, recipe: Mapping[str, Any], first_step: int) -> None:
        self._tracker = _module(self.package, self.package)
        self._tracker.init(project="deepen", name=run.name, config=dict(recipe), **self._place(run))

    def _place(self, run: Path) -> dict[str, Any]:
        return {"resume": "allow"}

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Log the values of a step."""
        self._tracker.log(dict(values), step=step)

    def close(self) -> None:
        """Finish the run."""
        self._tracker.finish()


class Trackio(_Tracker):
    """trackio: local, no account."""

    package = "trackio"


class Wandb(_Tracker):
    """Weights & Biases; its own environment variables decide on the account and on offline use."""

    package = "wandb"

    def _place(self, run: Path) -> dict[str, Any]:
        return {"resume": "allow", "id": run.name, "dir": str(run)}


SINKS: Final[Mapping[str, Callable[[Path, Mapping[str, Any], int], Sink]]] = MappingProxyType(
    {"tensorboard": TensorBoard, "trackio": Trackio, "wandb": Wandb}
)


@contextmanager
def open_sinks(
    names: Sequence[str], run: Path, recipe: Mapping[str, Any], first_step: int
) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Open the sinks asked for; give a function that shows a line of `metrics.jsonl` in all of them.

    Args:
        names: of `SINKS`.
        run: the run directory.
        recipe: shown beside the figures where a sink can.
        first_step: steps already done.

    Raises:
        TrainingError: a package is not installed.
    """
    with ExitStack() as stack:
        sinks = []
        for name in names:
            sink = SINKS[name](run, recipe, first_step)
            stack.callback(sink.close)
            sinks.append(sink)

        def show(line: Mapping[str, Any]) -> None:
            values = flatten(line)
            step = line["step"]
            for sink in sinks:
                sink.write(step, values)

        yield show


def flatten(line: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Return the numbers of a metrics line but its step, nested ones as `evaluation/NAME`."""
    values: dict[str, float] = {}
    for key, value in line.items():
        if isinstance(value, Mapping):
            values |= flatten(value, f"{prefix}{key}/")
        elif prefix or key != "step":
            values[prefix + key] = value
    return values


def _module(name: str, package: str) -> Any:
    try:
        return import_module(name)
    except ImportError:
        raise TrainingError(
            f"train.log: {package} is not installed\npip install {package}, or take it out of train.log"
        ) from None
