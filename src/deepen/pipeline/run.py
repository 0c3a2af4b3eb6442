"""One run from base to evaluated result. The only place where training meets evaluation."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from deepen.checkpoint import write_file
from deepen.config import Recipe
from deepen.data.evaluation_text import EvaluationText
from deepen.evaluation.heldout import evaluate_texts
from deepen.evaluation.record import build_record, nats_per_token
from deepen.expansion import check_space
from deepen.pipeline.directory import RunDirectory, check_run, open_run
from deepen.pipeline.plan import RunPlan, plan_run
from deepen.pipeline.reporter import Reporter, Silent
from deepen.pipeline.texts import load_evaluation, load_tokenizer, prepare_mixture
from deepen.pipeline.trainee import Trainee, audit_base, load_base, prepare_trainee, round_to_saved
from deepen.pipeline.training import train_to_the_end
from deepen.records import AuditResult, Provenance, RunResult, capture_provenance
from deepen.report import complete_pages

Losses = Mapping[str, NDArray[np.float64]]


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
        if not (resume or overwrite):
            check_space(Path(recipe.output), plan.bytes_needed)
        with open_run(recipe, resume=resume, overwrite=overwrite) as directory:
            finished = _run(plan, directory, reporter)
    complete_pages(Path(recipe.output))
    return finished


def corpus_cache(recipe: Recipe) -> Path:
    """Return the directory of tokenised corpora."""
    default = os.environ.get("DEEPEN_CACHE") or Path.home() / ".cache" / "deepen"
    return Path(recipe.data.cache or default)


def _run(plan: RunPlan, directory: RunDirectory, reporter: Reporter) -> RunResult:
    recipe, cache = plan.recipe, corpus_cache(plan.recipe)
    tokenizer = load_tokenizer(plan.base.checkpoint.directory)
    mixture, corpora = prepare_mixture(plan, tokenizer, cache, reporter)
    texts = load_evaluation(recipe, tokenizer, cache, corpora)
    data = {source.label: corpus.digest for source, corpus in zip(recipe.data.sources, corpora, strict=True)}
    provenance = capture_provenance(seed=recipe.train.seed, data=data, accelerators=_accelerators())
    if not directory.environment.exists():
        write_file(directory.environment, provenance.model_dump_json(indent=1) + "\n")

    reporter.stage("loading the base")
    model, autocast = load_base(plan)
    base_losses = _base_losses(plan, directory, model, texts, autocast, reporter)
    reporter.stage("proving identity" if plan.layout else "preparing")
    trainee = prepare_trainee(plan, model, autocast)
    base_loss = nats_per_token(texts, base_losses)
    seconds = train_to_the_end(plan, trainee, mixture, texts, base_loss, directory, reporter)

    round_to_saved(trainee, plan.base.checkpoint)
    audit = None
    if trainee.method.keeps_base:
        reporter.stage("auditing the base")
        audit = audit_base(plan, model)
    outputs = _save(plan, trainee, directory, reporter)
    reporter.stage("evaluating the trained model")
    losses = evaluate_texts(model, texts, autocast=autocast, progress=reporter.progress)
    _record(plan, texts, losses, base_losses, directory, outputs[0], provenance)
    return _finish(plan, trainee, seconds, audit, outputs, directory)


def _save(plan: RunPlan, trainee: Trainee, directory: RunDirectory, reporter: Reporter) -> list[Path]:
    reporter.stage("saving")
    outputs = [trainee.method.save(trainee.model, directory.root, plan.base.checkpoint)]
    if plan.recipe.merge:
        reporter.stage("merging")
        merged = trainee.method.merge(trainee.model, directory.root, plan.base.checkpoint, reporter.progress)
        outputs += [merged] if merged else []
    return outputs


def _record(
    plan: RunPlan,
    texts: Sequence[EvaluationText],
    losses: Losses,
    base_losses: Losses,
    directory: RunDirectory,
    model: Path,
    provenance: Provenance,
) -> None:
    record = build_record(
        texts, losses, base_losses, model=str(model), base=plan.recipe.base, provenance=provenance
    )
    write_file(directory.evaluation / "heldout.json", record.model_dump_json(indent=1) + "\n")


def _base_losses(
    plan: RunPlan,
    directory: RunDirectory,
    model: PreTrainedModel,
    texts: Sequence[EvaluationText],
    autocast: torch.dtype | None,
    reporter: Reporter,
) -> Losses:
    """Score the base once; a resumed run reads what it found."""
    scored = {"base": plan.fingerprint, "texts": {text.task: text.digest for text in texts}}
    if directory.base_losses.exists():
        held = json.loads(directory.base_losses.read_text())
        if held.items() >= scored.items():
            return {task: np.asarray(values, dtype=np.float64) for task, values in held["nats"].items()}
    reporter.stage("evaluating the base")
    losses = evaluate_texts(model, texts, autocast=autocast, progress=reporter.progress)
    content = scored | {"nats": {task: values.tolist() for task, values in losses.items()}}
    write_file(directory.base_losses, json.dumps(content) + "\n")
    return losses


def _finish(
    plan: RunPlan,
    trainee: Trainee,
    seconds: float,
    audit: AuditResult | None,
    outputs: Sequence[Path],
    directory: RunDirectory,
) -> RunResult:
    trainable = sum(parameter.numel() for parameter in trainee.parameters.values())
    result = RunResult(
        method=trainee.method.name,
        base=plan.recipe.base,
        layout=plan.layout.draw() if plan.layout else None,
        parameters=plan.parameters.model_copy(update={"trainable": trainable}),
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
