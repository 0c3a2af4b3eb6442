"""What is to be evaluated: suites, one YAML file each, and tasks by name."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from deepen.config.document import read_yaml
from deepen.errors import EvaluationError, RecipeError
from deepen.records import Role

_HERE: Final = Path(__file__).parent
_YAML: Final = (".yaml", ".yml")
_SHOTS: Final = re.compile(r"(?P<name>.+?):(?P<shots>[0-9]+)")


@dataclass(frozen=True, kw_only=True)
class TaskSpec:
    """One task or group of the harness, and how it is asked.

    Attributes:
        name: of a task, group or tag of the harness, or the path of a YAML file that describes a task.
        shots: worked examples before each question; None: as the task says.
        metrics: which to report, as `acc_norm` or `exact_match,strict-match`; none: all the task has.
        role: `general` (must be kept) or `domain` (must be learned).
        scorer: who scores generated texts, where the harness does not (programs to be run, for instance).
        samples: texts generated for each question; more than one are sampled.
        temperature: of the sampling.
    """

    name: str
    shots: int | None = None
    metrics: tuple[str, ...] = ()
    role: Role = "general"
    scorer: str | None = None
    samples: int = 1
    temperature: float = 0.0

    @property
    def is_file(self) -> bool:
        """Whether the task is described by a file of its own."""
        return self.name.endswith(_YAML)

    @property
    def label(self) -> str:
        """The name results use: `arc_challenge:25`."""
        name = Path(self.name).stem if self.is_file else self.name
        sampled = f"@{self.samples}" if self.samples > 1 else ""
        return f"{name}{sampled}" if self.shots is None else f"{name}{sampled}:{self.shots}"

    @property
    def slug(self) -> str:
        """The label as part of a file name."""
        return re.sub(r"[^A-Za-z0-9._@-]+", "-", self.label)


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    task: str
    shots: Annotated[int, Field(ge=0)] | None = None
    metrics: tuple[str, ...] = ()
    role: Role | None = None
    scorer: str | None = None
    samples: Annotated[int, Field(ge=1)] = 1
    temperature: Annotated[float, Field(ge=0)] = 0.0


class _Suite(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    about: str
    role: Role = "general"
    tasks: Annotated[tuple[_Entry, ...], Field(min_length=1)]


def suite_names() -> list[str]:
    """Return the names of the suites that come with deepen."""
    return sorted(path.stem for path in _HERE.glob("*.yaml"))


def read_suite(name: str) -> list[TaskSpec]:
    """Read a suite that comes with deepen, or a YAML file of the same form.

    Raises:
        EvaluationError: there is no such suite, or the file is malformed.
    """
    path = Path(name) if name.endswith(_YAML) else _HERE / f"{name}.yaml"
    try:
        raw = read_yaml(path.read_text("utf-8"), name)
        suite = _Suite.model_validate(raw)
    except (OSError, UnicodeDecodeError):
        known = ", ".join(suite_names())
        raise EvaluationError(f"suite {name}: not found (known: {known}; or give a YAML file)") from None
    except RecipeError as error:
        raise EvaluationError(str(error)) from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "suite"
        raise EvaluationError(f"suite {name}: {where}: {first['msg'].lower()}") from None
    return [_spec(entry, suite.role, path.parent) for entry in suite.tasks]


def _spec(entry: _Entry, role: Role, beside: Path) -> TaskSpec:
    # A task's own file is named relative to the suite's.
    name = str(beside / entry.task) if entry.task.endswith(_YAML) else entry.task
    return TaskSpec(
        name=name,
        shots=entry.shots,
        metrics=entry.metrics,
        role=entry.role or role,
        scorer=entry.scorer,
        samples=entry.samples,
        temperature=entry.temperature,
    )


def parse_task(text: str) -> TaskSpec:
    """Read `arc_challenge`, `arc_challenge:25` or `my-quiz.yaml:3`.

    Raises:
        EvaluationError: it names a YAML file that is not there.
    """
    match = _SHOTS.fullmatch(text)
    name, shots = (match["name"], int(match["shots"])) if match else (text, None)
    if name.endswith(_YAML) and not Path(name).is_file():
        raise EvaluationError(f"task {name}: no such file")
    return TaskSpec(name=name, shots=shots)


def task_specs(suites: Sequence[str], tasks: Sequence[str]) -> tuple[TaskSpec, ...]:
    """Read suites and single tasks, each once.

    Raises:
        EvaluationError: there is no such suite, or the harness is not installed.
    """
    specs = [spec for suite in suites for spec in read_suite(suite)] + [parse_task(task) for task in tasks]
    if specs:
        check_harness()
    return tuple({spec.label: spec for spec in reversed(specs)}.values())[::-1]


def check_harness() -> None:
    """Refuse to go on without lm-evaluation-harness.

    Raises:
        EvaluationError: it is not installed.
    """
    if find_spec("lm_eval") is None:
        raise EvaluationError(
            "benchmarks need lm-evaluation-harness, which is not installed\npip install 'deepen[eval]'"
        )
