"""What a run says while it trains: a line of `metrics.jsonl` for each step, and the live line."""

from collections.abc import Mapping
from contextlib import ExitStack, closing
from dataclasses import asdict
from typing import Any

from deepen.data.batches import Mixture
from deepen.pipeline.directory import RunDirectory
from deepen.pipeline.plan import RunPlan
from deepen.pipeline.reporter import Reporter
from deepen.training.flops import Gauge
from deepen.training.interface import StepReport
from deepen.training.metrics import MetricsLog
from deepen.training.prefix import PrefixCache
from deepen.training.sinks import open_sinks


class RunLog:
    """Turns what the loop reports into metrics lines and the live line."""

    def __init__(
        self,
        plan: RunPlan,
        mixture: Mixture,
        prefix: PrefixCache | None,
        directory: RunDirectory,
        reporter: Reporter,
        first: int,
        gauge: Gauge,
    ) -> None:
        self._plan, self._mixture, self._prefix = plan, mixture, prefix
        self._reporter, self._gauge = reporter, gauge
        self._held = prefix.held if prefix else 0
        recipe = plan.recipe.model_dump(mode="json")
        self._stack = ExitStack()
        # First of all: a package that is not installed is said before anything is written.
        self._show = self._stack.enter_context(open_sinks(plan.train.log, directory.root, recipe, first))
        self.metrics = metrics = MetricsLog(directory.metrics, resume_after=first or -1)
        self._stack.enter_context(closing(metrics))
        self._sources = plan.labels
        self._step_tokens = plan.windows * plan.length
        self._evaluated = {line["step"] for line in metrics.kept if "evaluation" in line}
        steps = [line for line in metrics.kept if "loss" in line]
        self.seconds: float = steps[-1]["seconds"] if steps else 0.0
        self._source_tokens: dict[str, int] = (
            steps[-1]["source_tokens"] if steps else dict.fromkeys(self._sources, 0)
        )
        # Whole windows: of a share of all there are, their number comes back exactly.
        seen = steps[-1]["source_epochs"] if steps else dict.fromkeys(self._sources, 0)
        sizes = zip(self._sources, mixture.sizes, strict=True)
        self._source_windows = [round(seen[name] * size) for name, size in sizes]

    def close(self) -> None:
        """Close the log and everything else that shows metrics."""
        self._stack.close()

    def step(self, report: StepReport) -> None:
        """Write a step's line and show it."""
        rate = self._step_tokens / report.seconds
        speed = self._gauge.read(rate, passed_by=self._passed_by())
        self.seconds += report.seconds
        for source, tokens in report.sources.items():
            self._source_tokens[self._sources[source]] += tokens
        for source, _ in self._mixture.places(report.step - 1, self._plan.windows):
            self._source_windows[source] += 1
        columns = zip(self._sources, self._source_windows, self._mixture.sizes, strict=True)
        self._write(
            {
                "step": report.step,
                "tokens": report.step * self._step_tokens,
                "loss": report.loss,
                **({} if report.anchor is None else {"anchor": report.anchor}),
                **({} if report.unit_rates is None else {"unit_rates": asdict(report.unit_rates)}),
                "learning_rate": report.learning_rate,
                "gradient_norm": report.gradient_norm,
                "tokens_per_second": round(rate, 1),
                **speed,
                "seconds": round(self.seconds, 3),
                "epochs": report.step * self._plan.windows / self._mixture.windows_per_epoch,
                "source_tokens": self._source_tokens,
                "source_epochs": {name: windows / size for name, windows, size in columns},
                **({"prefix_windows": self._prefix.held} if self._prefix else {}),
                "blocks": {str(index): asdict(block) for index, block in report.blocks.items()},
            }
        )
        held = "" if report.anchor is None else f"  anchor {report.anchor:.3f}"
        detail = f"loss {report.loss:.3f}{held}  {rate:,.0f} tokens/s"
        if "utilisation" in speed:
            detail += f"  {speed['utilisation']:.0%} used"
        self._reporter.progress(report.step, self._plan.steps, detail)

    def _passed_by(self) -> float:
        """Return the share of the step's windows whose lower part was read back."""
        if self._prefix is None:
            return 0.0
        before, self._held = self._held, self._prefix.held
        return 1 - (self._held - before) / self._plan.windows

    def evaluation(self, step: int, nats: Mapping[str, float]) -> None:
        """Write and show what an evaluation found: task -> nats per token.

        After the last step a run may be killed and evaluate again: what it wrote then stays.
        """
        if step not in self._evaluated:
            self._write({"step": step, "tokens": step * self._step_tokens, "evaluation": dict(nats)})
        shown = "  ".join(f"{task} {value:.4f}" for task, value in nats.items())
        if shown:
            self._reporter.note(f"step {step}: {shown}")

    def _write(self, line: dict[str, Any]) -> None:
        self.metrics.write(line)
        self._show(line)
