"""Everything a run directory says about its run."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from deepen.config import ConversationSet, Recipe, Source, TrainSection, load_recipe
from deepen.records import (
    EffectsRecord,
    EvaluationPoint,
    EvaluationRecord,
    FindingsRecord,
    Metric,
    Provenance,
    Role,
    RunResult,
    SwitchEvaluation,
    TaskRecord,
    TrainingPoint,
    read_metrics,
    read_record,
    read_result,
)


@dataclass(frozen=True, kw_only=True)
class Speed:
    """A step's figures as a rule: medians over steps; None where no step has the figure.

    Attributes:
        tokens: a second.
        flops: executed a second.
        utilisation: as a share of what the devices attain.
    """

    tokens: float | None
    flops: float | None
    utilisation: float | None


@dataclass(frozen=True, kw_only=True)
class RunReport:
    """The records of one run.

    Attributes:
        name: of the run directory.
        recipe: as it was run, complete.
        provenance: of the run.
        outcome: None while the run goes on.
        training: logged steps, ascending.
        evaluations: held-out losses during training, ascending.
        heldout: the final evaluation, or None where the recipe names no texts.
        effects: what each new block does, or None where it was not measured.
        switch: what a switch loses and keeps, or None where it was not measured.
        tasks: finished benchmark tasks, by name.
        findings: of the checks of its texts in one line, or None where it asks for none.
    """

    name: str
    recipe: Recipe
    provenance: Provenance
    outcome: RunResult | None
    training: list[TrainingPoint]
    evaluations: list[EvaluationPoint]
    heldout: EvaluationRecord | None
    effects: EffectsRecord | None
    switch: SwitchEvaluation | None
    tasks: list[TaskRecord]
    findings: str | None

    @property
    def result(self) -> RunResult:
        """The outcome of a finished run; only `watch_run` reads others."""
        assert self.outcome is not None
        return self.outcome

    def metrics(self, metric: str, role: Role | None = None) -> list[Metric]:
        """The final figures in one metric, or those so far; domain texts first, in the order evaluated."""
        known = self.heldout.metrics if self.heldout else [] if self.outcome else self._so_far()
        found = [each for each in known if each.metric == metric]
        return [
            each
            for wanted in ("domain", "general")
            for each in found
            if each.role == wanted == (role or wanted)
        ]

    def _so_far(self) -> list[Metric]:
        """The last evaluation during training, with the first one, which is the base's."""
        if not self.evaluations:
            return []
        general = {text.label for text in self.recipe.evaluate.general}
        first, last = self.evaluations[0].evaluation, self.evaluations[-1].evaluation
        return [
            Metric(
                task=task,
                role="general" if task in general else "domain",
                metric="nats_per_token",
                value=value,
                stderr=None,
                n=0,
                base_value=first.get(task),
            )
            for task, value in last.items()
        ]

    @property
    def speed(self) -> Speed | None:
        """What a step is like as a rule; None before the first."""
        if not self.training:
            return None
        return Speed(
            tokens=_median(each.tokens_per_second for each in self.training),
            flops=_median(each.flops_per_second for each in self.training),
            utilisation=_median(each.utilisation for each in self.training),
        )

    @property
    def base(self) -> str:
        """The base's path or hub id."""
        return self.outcome.base if self.outcome else self.recipe.base

    @property
    def base_name(self) -> str:
        """Last part of the base's path or hub id."""
        return self.base.rstrip("/").rsplit("/", 1)[-1]

    @property
    def trained_on(self) -> tuple[Source | ConversationSet, ...]:
        """The texts, or the conversations where the run is tuning alone."""
        data, sft = self.recipe.data, self.recipe.sft
        return data.sources if data and self.recipe.train else sft.data if sft else ()

    @property
    def settings(self) -> TrainSection:
        """How it trained; of tuning, in the same words."""
        train, sft = self.recipe.train, self.recipe.sft
        if train is not None:
            return train
        assert sft is not None  # a recipe has either
        return sft.as_training(self.window)

    @property
    def window(self) -> int:
        """Tokens in a window; of conversations it is known from the first step on."""
        data, sft = self.recipe.data, self.recipe.sft
        if data and self.recipe.train:
            return data.sequence_length
        assert sft is not None
        first = self.training[0] if self.training else None
        return first.tokens // (first.step * sft.batch) if first else sft.sequence_length or 1

    @property
    def wanted_tokens(self) -> int | None:
        """Tokens it is to train on, where that is known by now."""
        asked, last = self.settings, self.training[-1] if self.training else None
        if asked.tokens is None and last and last.epochs and asked.epochs:
            return max(last.tokens, round(last.tokens * asked.epochs / last.epochs))
        return asked.tokens

    @property
    def sources(self) -> str:
        """The sources in words, with their shares of the tokens seen."""
        seen, total = self.source_tokens, sum(self.source_tokens.values())
        labels = [source.label for source in self.trained_on]
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
    return _read(run_dir, read_result(run_dir))


def watch_run(run_dir: Path) -> RunReport:
    """Read a run that may still go on.

    Raises:
        DataError: a record is missing or malformed.
        RecipeError: `recipe.yaml` is missing or malformed.
    """
    return _read(run_dir, read_result(run_dir) if (run_dir / "result.json").exists() else None)


def _read(run_dir: Path, outcome: RunResult | None) -> RunReport:
    training, evaluations = read_metrics(run_dir / "metrics.jsonl")
    heldout, findings = run_dir / "evaluation" / "heldout.json", run_dir / "findings.json"
    effects, switch = (heldout.with_name(name) for name in ("effects.json", "switch.json"))
    return RunReport(
        name=run_dir.resolve().name,
        outcome=outcome,
        recipe=load_recipe(run_dir / "recipe.yaml"),
        provenance=read_record(run_dir / "environment.json", Provenance),
        training=training,
        evaluations=evaluations,
        heldout=read_record(heldout, EvaluationRecord) if heldout.exists() else None,
        effects=read_record(effects, EffectsRecord) if effects.exists() else None,
        switch=read_record(switch, SwitchEvaluation) if switch.exists() else None,
        tasks=[read_record(path, TaskRecord) for path in sorted(heldout.parent.glob("task-*.json"))],
        findings=read_record(findings, FindingsRecord).line if findings.exists() else None,
    )


def _median(figures: Iterable[float | None]) -> float | None:
    known = [figure for figure in figures if figure is not None]
    return median(known) if known else None
