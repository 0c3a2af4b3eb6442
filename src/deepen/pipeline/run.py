"""One run from base to evaluated result. The only place where training meets evaluation."""

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from deepen.blocks import merge_pack
from deepen.checkpoint import Checkpoint, fast_fingerprint, full_fingerprint, write_file
from deepen.config import Recipe
from deepen.data.batches import Mixture
from deepen.data.evaluation_text import EvaluationText
from deepen.errors import CheckFailed, TrainingError
from deepen.evaluation.heldout import evaluate_texts
from deepen.evaluation.record import build_record, nats_per_token
from deepen.expansion import Fingerprint
from deepen.methods import METHODS, Method
from deepen.model import base_fingerprint, base_tensors, compare_probes, insert_blocks, probe_logits
from deepen.pipeline.directory import RunDirectory, check_run, open_run
from deepen.pipeline.plan import RunPlan, plan_run
from deepen.pipeline.reporter import Reporter, Silent
from deepen.pipeline.texts import load_evaluation, load_tokenizer, prepare_mixture
from deepen.records import AuditResult, IdentityResult, RunResult, capture_provenance
from deepen.report import write_card, write_report
from deepen.training.checkpoints import newest_checkpoint, restore_checkpoint, save_checkpoint
from deepen.training.loop import Hooks, Settings, StepReport, train
from deepen.training.metrics import MetricsLog
from deepen.training.optimizer import build_optimizer
from deepen.training.signals import stop_on_signal

Losses = Mapping[str, NDArray[np.float64]]


@dataclass(frozen=True, kw_only=True)
class _Trainee:
    """The model in hand and what of it trains."""

    model: PreTrainedModel
    method: Method
    parameters: dict[str, nn.Parameter]
    autocast: torch.dtype | None
    identity: IdentityResult | None


def run_recipe(
    recipe: Recipe, *, resume: bool = False, overwrite: bool = False, reporter: Reporter | None = None
) -> RunResult:
    """Expand, verify, train, audit, evaluate, save and report. A finished run is returned as it is.

    Args:
        recipe: what to do.
        resume: continue an unfinished run from its newest valid checkpoint.
        overwrite: replace an earlier run in the same output.
        reporter: told what goes on.

    Raises:
        DeepenError: something is wrong with the recipe, the base, the texts or the output; or the run was
            stopped (`Interrupted`) or a proof failed (`CheckFailed`).
    """
    reporter = reporter or Silent()
    if finished := check_run(recipe, resume=resume, overwrite=overwrite):
        reporter.note(f"{recipe.output}: already finished; nothing to do")
    else:
        plan = plan_run(recipe)
        with open_run(recipe, overwrite=overwrite) as directory:
            finished = _run(plan, directory, reporter)
    _describe(Path(recipe.output))
    return finished


def _describe(run: Path) -> None:
    """Write the pages made from the records, also where a run was killed just before them."""
    if not (run / "report.html").exists():
        write_report(run)
    if not (run / "README.md").exists():
        write_card(run, run)


def corpus_cache(recipe: Recipe) -> Path:
    """Return the directory of tokenised corpora."""
    default = os.environ.get("DEEPEN_CACHE") or Path.home() / ".cache" / "deepen"
    return Path(recipe.data.cache or default)


def _run(plan: RunPlan, directory: RunDirectory, reporter: Reporter) -> RunResult:
    recipe, cache = plan.recipe, corpus_cache(plan.recipe)
    tokenizer = load_tokenizer(plan.base.checkpoint.directory)
    mixture, corpora = prepare_mixture(plan, tokenizer, cache, reporter)
    texts = load_evaluation(recipe, tokenizer, cache, corpora)
    provenance = capture_provenance(
        seed=recipe.train.seed,
        data={s.label: c.digest for s, c in zip(recipe.data.sources, corpora, strict=True)},
        accelerators=_accelerators(),
    )
    if not directory.environment.exists():
        write_file(directory.environment, provenance.model_dump_json(indent=1) + "\n")

    reporter.stage("loading the base")
    model, autocast = _load(plan)
    base_losses = _base_losses(directory, model, texts, autocast, reporter)
    trainee = _prepare(plan, model, autocast, reporter)
    seconds = _train(plan, trainee, mixture, texts, base_losses, directory, reporter)

    _round(trainee, plan.base.checkpoint)
    audit = _audit(plan, model, reporter) if trainee.method.keeps_base else None
    reporter.stage("saving")
    outputs = [trainee.method.save(model, directory.root, plan.base.checkpoint)]
    reporter.stage("evaluating the trained model")
    losses = evaluate_texts(model, texts, autocast=autocast, progress=reporter.progress)
    record = build_record(
        texts, losses, base_losses, model=str(outputs[0]), base=recipe.base, provenance=provenance
    )
    write_file(directory.evaluation / "heldout.json", record.model_dump_json(indent=1) + "\n")
    if recipe.merge and trainee.method.keeps_base:
        reporter.stage("merging")
        merge_pack(plan.base.checkpoint.directory, outputs[0], directory.root / "model", overwrite=True)
        outputs.append(directory.root / "model")
    return _finish(plan, trainee, seconds, audit, outputs, directory)


def _load(plan: RunPlan) -> tuple[PreTrainedModel, torch.dtype | None]:
    """Load the base for training: bf16 compute keeps frozen weights in the checkpoint's precision."""
    train_section = plan.recipe.train
    device = _device(train_section.device)
    precision = train_section.precision
    if precision == "auto":
        precision = "fp32" if device.type == "cpu" else "bf16"
    wide = precision == "fp32" or train_section.method == "full"
    model = AutoModelForCausalLM.from_pretrained(
        plan.base.checkpoint.directory,
        dtype=torch.float32 if wide else "auto",
        trust_remote_code=False,
        local_files_only=True,
    )
    return model.to(device), torch.bfloat16 if precision == "bf16" else None


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise TrainingError(f"train.device: {name} cannot be used ({str(error).splitlines()[0]})") from None
    return device


def _prepare(
    plan: RunPlan, model: PreTrainedModel, autocast: torch.dtype | None, reporter: Reporter
) -> _Trainee:
    method = METHODS[plan.recipe.train.method]
    identity = None
    if plan.layout is not None:
        reporter.stage("proving identity")
        before = _probe(model, autocast)
        fingerprint = Fingerprint(fast=fast_fingerprint(plan.base.checkpoint))
        insert_blocks(model, plan.layout, base=plan.recipe.base, fingerprint=fingerprint)
        parameters = method.prepare(model)
        found = compare_probes(before, _probe(model, autocast))
        identity = IdentityResult(
            identical=found.identical, max_abs_difference=found.max_abs_difference, checks=list(found.checks)
        )
        if not found.identical:
            raise CheckFailed(
                f"{plan.recipe.base}: the expanded model is not the base before training "
                f"(largest difference of a logit: {found.max_abs_difference})"
            )
    else:
        parameters = method.prepare(model)
    if plan.recipe.train.compile:
        for layer in model.get_submodule(plan.base.family.layers):
            layer.compile()
    return _Trainee(
        model=model,
        method=method,
        parameters=parameters,
        autocast=autocast,
        identity=identity,
    )


def _probe(model: PreTrainedModel, autocast: torch.dtype | None) -> dict[str, torch.Tensor]:
    with torch.autocast(model.device.type, dtype=autocast) if autocast else nullcontext():
        return probe_logits(model)


def _base_losses(
    directory: RunDirectory,
    model: PreTrainedModel,
    texts: Sequence[EvaluationText],
    autocast: torch.dtype | None,
    reporter: Reporter,
) -> Losses:
    """Score the base once; a resumed run reads what it found."""
    digests = {text.task: text.digest for text in texts}
    if directory.base_losses.exists():
        held = json.loads(directory.base_losses.read_text())
        if held["texts"] == digests:
            return {task: np.asarray(values, dtype=np.float64) for task, values in held["nats"].items()}
    reporter.stage("evaluating the base")
    losses = evaluate_texts(model, texts, autocast=autocast, progress=reporter.progress)
    content = {"texts": digests, "nats": {task: values.tolist() for task, values in losses.items()}}
    write_file(directory.base_losses, json.dumps(content) + "\n")
    return losses


def _train(
    plan: RunPlan,
    trainee: _Trainee,
    mixture: Mixture,
    texts: Sequence[EvaluationText],
    base_losses: Losses,
    directory: RunDirectory,
    reporter: Reporter,
) -> float:
    """Train to the end; return the seconds it took, in all processes together."""
    recipe = plan.recipe
    torch.manual_seed(recipe.train.seed)
    optimizer = build_optimizer(
        trainee.parameters, betas=recipe.train.betas, weight_decay=recipe.train.weight_decay
    )
    shared = {"data": mixture.digest, "steps": plan.steps, "windows": plan.windows}
    first = 0
    saved, damaged = newest_checkpoint(directory.checkpoints)
    for line in damaged:
        reporter.note(line)
    if saved:
        restore_checkpoint(saved, trainee.parameters, optimizer, identity=shared)
        first = saved.step
        reporter.note(f"continuing after step {first} of {plan.steps}")
    reporter.stage("training")
    metrics = MetricsLog(directory.metrics, resume_after=first if saved else -1)
    log = _Log(plan, metrics, reporter, [source.label for source in recipe.data.sources])
    if not saved:
        log.evaluation(0, nats_per_token(texts, base_losses))

    def evaluate(step: int) -> None:
        losses = evaluate_texts(trainee.model, texts, autocast=trainee.autocast)
        log.evaluation(step, nats_per_token(texts, losses))

    def save(step: int) -> None:
        save_checkpoint(
            directory.checkpoints,
            step,
            trainee.parameters,
            optimizer,
            identity=shared,
            keep=recipe.train.keep_checkpoints,
        )

    with stop_on_signal() as asked:
        hooks = Hooks(log=log.step, evaluate=evaluate, save=save, stop=asked)
        train(
            trainee.model,
            trainee.parameters,
            optimizer,
            mixture.batch,
            _settings(plan, trainee),
            hooks,
            first_step=first,
        )
    metrics.close()
    return log.seconds


def _settings(plan: RunPlan, trainee: _Trainee) -> Settings:
    section = plan.recipe.train
    return Settings(
        steps=plan.steps,
        windows=plan.windows,
        micro_batch=plan.micro_batch,
        learning_rate=section.learning_rate,
        schedule=section.schedule,
        warmup=section.warmup,
        final_learning_rate=section.final_learning_rate,
        clip=section.clip,
        autocast=trainee.autocast,
        evaluate_every=plan.evaluate_every,
        checkpoint_every=plan.checkpoint_every,
    )


class _Log:
    """Turns what the loop reports into metrics lines and the live line."""

    def __init__(self, plan: RunPlan, metrics: MetricsLog, reporter: Reporter, sources: list[str]) -> None:
        self._plan, self._metrics, self._reporter, self._sources = plan, metrics, reporter, sources
        self._step_tokens = plan.windows * plan.recipe.data.sequence_length
        steps = [line for line in metrics.kept if "loss" in line]
        self.seconds: float = steps[-1]["seconds"] if steps else 0.0
        self._source_tokens: dict[str, int] = (
            steps[-1]["source_tokens"] if steps else dict.fromkeys(sources, 0)
        )

    def step(self, report: StepReport) -> None:
        rate = self._step_tokens / report.seconds
        self.seconds += report.seconds
        for source, windows in report.sources.items():
            self._source_tokens[self._sources[source]] += windows * self._plan.recipe.data.sequence_length
        self._metrics.write(
            {
                "step": report.step,
                "tokens": report.step * self._step_tokens,
                "loss": report.loss,
                "learning_rate": report.learning_rate,
                "gradient_norm": report.gradient_norm,
                "tokens_per_second": round(rate, 1),
                "seconds": round(self.seconds, 3),
                "source_tokens": self._source_tokens,
            }
        )
        detail = f"loss {report.loss:.3f}  {rate:,.0f} tokens/s"
        self._reporter.progress(report.step, self._plan.steps, detail)

    def evaluation(self, step: int, nats: Mapping[str, float]) -> None:
        self._metrics.write({"step": step, "tokens": step * self._step_tokens, "evaluation": dict(nats)})
        shown = "  ".join(f"{task} {value:.4f}" for task, value in nats.items())
        if shown:
            self._reporter.note(f"step {step}: {shown}")


def _round(trainee: _Trainee, base: Checkpoint) -> None:
    """Give what trained the precision it is saved in, so that what is evaluated is what was saved."""
    with torch.no_grad():
        for name, dtype in trainee.method.saved_dtypes(trainee.model, base).items():
            trainee.parameters[name].copy_(trainee.parameters[name].to(dtype))


def _audit(plan: RunPlan, model: PreTrainedModel, reporter: Reporter) -> AuditResult:
    """Hash the base's tensors in the trained model against the base's files.

    Raises:
        CheckFailed: a base tensor moved.
    """
    reporter.stage("auditing the base")
    live = base_tensors(model)
    dtypes = {name: tensor.dtype for name, tensor in plan.base.checkpoint.tensors.items() if name in live}
    before = full_fingerprint(plan.base.checkpoint, lambda name: name if name in dtypes else None)
    after = base_fingerprint(model, "full", dtypes)
    if before != after:
        raise CheckFailed(
            f"{plan.recipe.base}: a base tensor changed during training; the result is not kept"
        )
    return AuditResult(unchanged=True, tensors=len(dtypes), before=before, after=after)


def _finish(
    plan: RunPlan,
    trainee: _Trainee,
    seconds: float,
    audit: AuditResult | None,
    outputs: Sequence[Path],
    directory: RunDirectory,
) -> RunResult:
    result = RunResult(
        method=trainee.method.name,
        base=plan.recipe.base,
        layout=plan.layout.draw() if plan.layout else None,
        parameters=plan.parameters,
        steps=plan.steps,
        tokens=plan.tokens,
        seconds=round(seconds, 2),
        identity=trainee.identity,
        audit=audit,
        outputs=[str(path.relative_to(directory.root)) for path in outputs],
    )
    write_file(directory.result, result.model_dump_json(indent=1) + "\n")
    return result


def _accelerators() -> str:
    if not torch.cuda.is_available():
        return "none"
    return ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
