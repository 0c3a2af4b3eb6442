r"""A task over a local file, described in a few lines of YAML.

::

    name: quiz
    path: quiz.jsonl                 # beside this file; one JSON object a line
    kind: multiple_choice            # or generate, likelihood
    question: "Question: {{query}}\nAnswer:"
    choices: "{{choices}}"
    answer: "{{gold}}"               # the position of the right choice, or its text

Values are Jinja templates over the keys of a record.
"""

from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from deepen.config.document import read_yaml
from deepen.errors import EvaluationError, RecipeError

BUILDERS: Final = {
    ".jsonl": "json",
    ".json": "json",
    ".jsonl.gz": "json",
    ".parquet": "parquet",
    ".csv": "csv",
}
"""Suffix of a data file -> the loader of `datasets` that reads it."""


class OwnTask(BaseModel):
    """The description of a task over a local file."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+$")]
    """How results call it."""

    path: str
    """File of .jsonl, .json, .csv or .parquet, relative to the description."""

    kind: Literal["multiple_choice", "generate", "likelihood"]
    """`multiple_choice`: the likeliest of several answers; `generate`: the answer written, compared whole;
    `likelihood`: of the answer after the question, or of the answer alone where there is no question."""

    question: str = ""
    """What precedes the answer."""

    answer: str | int
    """The right answer: its text, or among choices also its position."""

    choices: str | list[str] | None = None
    """All answers; for `multiple_choice`."""

    examples: str | None = None
    """File from which worked examples are drawn; default: the other records of `path`."""

    shots: Annotated[int, Field(ge=0)] | None = None
    """Worked examples before each question, where the command line says none."""

    stop: list[str] = ["\n"]
    """Where a generated answer ends."""

    max_tokens: Annotated[int, Field(ge=1)] = 64
    """Longest generated answer."""

    extract: str | None = None
    """Regular expression whose first group is the answer in a generated text."""

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if (self.kind == "multiple_choice") != (self.choices is not None):
            raise ValueError("choices belong to multiple_choice, and it needs them")
        if self.kind == "generate" and not self.question:
            raise ValueError("generate needs a question")
        return self


def described_keys(path: Path) -> set[str]:
    """Return the top keys of a description; the harness's own form says `task`, `group` or `include`.

    Raises:
        EvaluationError: it cannot be read.
    """
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluationError(f"{path}: cannot be read ({error})") from None
    # Not parsed: the harness's form has tags of its own.
    return {line.split(":", 1)[0] for line in text.splitlines() if line[:1].isalpha()}


def harness_config(path: Path) -> dict[str, Any]:
    """Read a description and return the harness's for the same task.

    Raises:
        EvaluationError: it is malformed, or its file is not there.
    """
    try:
        task = OwnTask.model_validate(read_yaml(path.read_text("utf-8"), str(path)))
    except RecipeError as error:
        raise EvaluationError(str(error)) from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "task"
        raise EvaluationError(f"{path}: {where}: {first['msg'].removeprefix('Value error, ')}") from None
    files = {"test": _beside(path, task.path)}
    if task.examples is not None:
        files["examples"] = _beside(path, task.examples)
    if (builder := dataset_builder(Path(files["test"]))) is None:
        raise EvaluationError(f"{path}: path: {task.path} is none of {', '.join(BUILDERS)}")
    return {
        "task": task.name,
        "dataset_path": builder,
        "dataset_kwargs": {"data_files": files},
        "test_split": "test",
        "fewshot_split": "examples" if task.examples else "test",
        "num_fewshot": task.shots,
        "doc_to_text": task.question,
        **_KINDS[task.kind](task),
    }


def _multiple_choice(task: OwnTask) -> dict[str, Any]:
    return {
        "output_type": "multiple_choice",
        "doc_to_choice": task.choices,
        "doc_to_target": task.answer,
        "metric_list": [_mean("acc"), _mean("acc_norm")],
    }


def _generate(task: OwnTask) -> dict[str, Any]:
    steps: list[dict[str, Any]] = [{"function": "remove_whitespace"}, {"function": "take_first"}]
    if task.extract:
        steps.insert(0, {"function": "regex", "regex_pattern": task.extract})
    return {
        "output_type": "generate_until",
        "doc_to_target": str(task.answer),
        "generation_kwargs": {"until": task.stop, "max_gen_toks": task.max_tokens, "do_sample": False},
        "filter_list": [{"name": "none", "filter": steps}],
        "metric_list": [_mean("exact_match")],
    }


def _likelihood(task: OwnTask) -> dict[str, Any]:
    if task.question:
        metrics = [
            {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
            _mean("acc"),
        ]
        return {
            "output_type": "loglikelihood",
            "doc_to_target": str(task.answer),
            "metric_list": metrics,
        }
    bits = {"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False}
    return {
        "output_type": "loglikelihood_rolling",
        "doc_to_target": str(task.answer),
        "metric_list": [bits],
    }


_KINDS = {"multiple_choice": _multiple_choice, "generate": _generate, "likelihood": _likelihood}


def _mean(metric: str) -> dict[str, Any]:
    return {"metric": metric, "aggregation": "mean", "higher_is_better": True}


def _beside(path: Path, named: str) -> str:
    file = path.parent / named
    if not file.is_file():
        raise EvaluationError(f"{path}: path: {file} is not there")
    return str(file)


def dataset_builder(file: Path) -> str | None:
    """Name the loader of `datasets` for a file; None where there is none."""
    return next((builder for suffix, builder in BUILDERS.items() if file.name.endswith(suffix)), None)
