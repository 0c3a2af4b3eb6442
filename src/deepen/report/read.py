"""Everything a run directory says about its run."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from deepen.config import Recipe, load_recipe
from deepen.records import (
    EvaluationPoint,
    EvaluationRecord,
    Metric,
    Provenance,
    RunResult,
    TrainingPoint,
    read_metrics,
    read_record,
    read_result,
)

Role = Literal["general", "domain"]


@dataclass(frozen=True, kw_only=True)
class RunReport:
    """The records of one finished run.

    Attributes:
        name: of the run directory.
        recipe: as it was run, complete.
        provenance: of the run.
        result: its outcome.
        training: logged steps, ascending.
        evaluations: held-out losses during training, ascending.
        heldout: the final evaluation, or None where the recipe names no texts.
    """

    name: str
    recipe: Recipe
    provenance: Provenance
    result: RunResult
    training: list[TrainingPoint]
    evaluations: list[EvaluationPoint]
    heldout: EvaluationRecord | None

    def metrics(self, metric: str, role: Role | None = None) -> list[Metric]:
        """The final figures in one metric, domain texts first, in the order evaluated."""
        found = [each for each in (self.heldout.metrics if self.heldout else []) if each.metric == metric]
        return [
            each
            for wanted in ("domain", "general")
            for each in found
            if each.role == wanted == (role or wanted)
        ]

    @property
    def base_name(self) -> str:
        """Last part of the base's path or hub id."""
        return self.result.base.rstrip("/").rsplit("/", 1)[-1]

    @property
    def sources(self) -> str:
        """The sources in words, with their shares of the tokens seen."""
        seen, total = self.source_tokens, sum(self.source_tokens.values())
        labels = [source.label for source in self.recipe.data.sources]
        if len(labels) > 1 and total:
            labels = [f"{label} ({seen.get(label, 0) / total:.0%})" for label in labels]
        return " and ".join([", ".join(labels[:-1]), labels[-1]] if len(labels) > 1 else labels)

    @property
    def source_tokens(self) -> dict[str, int]:
        """Tokens seen from each source."""
        return self.training[-1].source_tokens if self.training else {}

    @property
    def source_epochs(self) -> dict[str, float]:
        """How often each source was seen."""
        return self.training[-1].source_epochs if self.training else {}

    @property
    def epochs(self) -> float | None:
        """Passes through the mixture."""
        return self.training[-1].epochs if self.training else None


def read_run(run_dir: Path) -> RunReport:
    """Read a finished run.

    Raises:
        DataError: a record is missing or malformed; without `result.json` the run is not finished.
        RecipeError: `recipe.yaml` is missing or malformed.
    """
    result = read_result(run_dir)
    training, evaluations = read_metrics(run_dir / "metrics.jsonl")
    heldout = run_dir / "evaluation" / "heldout.json"
    return RunReport(
        name=run_dir.resolve().name,
        result=result,
        recipe=load_recipe(run_dir / "recipe.yaml"),
        provenance=read_record(run_dir / "environment.json", Provenance),
        training=training,
        evaluations=evaluations,
        heldout=read_record(heldout, EvaluationRecord) if heldout.exists() else None,
    )
