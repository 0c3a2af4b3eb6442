"""One run from base to evaluated result. The only place where training meets evaluation."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from deepen.checkpoint import write_file
from deepen.config import Recipe
from deepen.data.evaluation_text import EvaluationText
from deepen.errors import CheckpointError
from deepen.evaluation.record import build_record, nats_per_token
from deepen.expansion import check_space
from deepen.model import bypass
from deepen.pipeline.anchor import prepare_anchor
from deepen.pipeline.directory import RunDirectory, check_run, open_run
from deepen.pipeline.evaluate import evaluate_run
from deepen.pipeline.place import choose_place
from deepen.pipeline.plan import Outline, RunPlan, count_steps, plan_run
from deepen.pipeline.quantisation import audit_quantised, check_packages, conclude_quantisation
from deepen.pipeline.reporter import Reporter, Silent
from deepen.pipeline.scoring import score_texts, shift_texts
from deepen.pipeline.texts import corpus_cache, load_evaluation, load_tokenizer, prepare_texts
from deepen.pipeline.trainee import (
    Trainee,
    assemble_trainee,
    audit_base,
    load_base,
    prepare_trainee,
    round_to_saved,
    set_aside,
    spread_trainee,
)
from deepen.pipeline.training import Trained, train_to_the_end
from deepen.records import (
    AuditResult,
    Provenance,
    QuantisationResult,
    RunResult,
    TokenShift,
    capture_provenance,
)
from deepen.report import complete_pages
from deepen.training.world import World, join_world

Losses = Mapping[str, NDArray[np.float64]]


def run_recipe(
    recipe: Recipe | None, *, resume: bool = False, overwrite: bool = False, reporter: Reporter | None = None
) -> RunResult:
    """Expand, verify, train, evaluate, audit, save and report. A finished run is returned as it is.

    Under torchrun every process calls this, and all do what the first one was asked; only that one writes
    and reports.

    Args:
        recipe: what to do; may be None in all processes but the first.
        resume: continue an unfinished run from its newest valid checkpoint.
        overwrite: replace an earlier run in the same output.
        reporter: told what goes on.

    Raises:
        DeepenError: something is wrong with the recipe, the base, the texts or the output; or the run was
            stopped (`Interrupted`) or a proof failed (`CheckFailed`).
    """
    with join_world() as world:
        asked = world.first(lambda: recipe)
        if asked is None:
            raise TypeError("run_recipe: the first process has no recipe")
        reporter = (reporter if world.is_first else None) or Silent()
        finished = world.first(lambda: check_run(asked, resume=resume, overwrite=overwrite))
        if finished:
            reporter.note(f"{asked.output}: already finished; nothing to do")
        else:
            world.first(lambda: check_packages(asked.train))
            outline = world.first_then_rest(lambda: plan_run(asked))
            with _opened(outline, resume, overwrite, world) as directory:
                finished = _run(outline, directory, world, reporter)
        world.first(lambda: complete_pages(Path(asked.output)))
    return finished


@contextmanager
def _opened(plan: Outline, resume: bool, overwrite: bool, world: World) -> Iterator[RunDirectory]:
    """Let the first process open the run's directory for all."""
    recipe = plan.recipe
    if len(set(world.gather(plan.fingerprint))) > 1:
        raise CheckpointError(f"{recipe.base}: not all processes find the same base there")
    with ExitStack() as stack:

        def enter() -> None:
            if not (resume or overwrite):
                check_space(Path(recipe.output), plan.bytes_needed)
            stack.enter_context(open_run(recipe, resume=resume, overwrite=overwrite))

        world.first(enter)
        yield RunDirectory(Path(recipe.output))


def _run(outline: Outline, directory: RunDirectory, world: World, reporter: Reporter) -> RunResult:
    recipe, cache = outline.recipe, corpus_cache(outline.recipe)
    tokenizer = load_tokenizer(outline.base.checkpoint.directory)
    training = world.first_then_rest(lambda: prepare_texts(recipe, tokenizer, cache, reporter))
    corpora, mixture = training.corpora, training.mixture
    plan = count_steps(outline, mixture)
    if recipe.train.epochs:
        windows = f"{mixture.windows_per_epoch:,} windows"
        reporter.note(f"{recipe.train.epochs:g} × {windows} an epoch: {plan.steps:,} steps")
    texts = world.first_then_rest(lambda: load_evaluation(recipe, tokenizer, cache, corpora))
    data = {source.label: corpus.digest for source, corpus in zip(recipe.data.sources, corpora, strict=True)}
    if world.is_first and training.findings:
        found = {"line": training.findings.line(), **training.findings.to_json()}
        write_file(directory.findings, json.dumps(found, indent=1) + "\n")
    provenance = capture_provenance(seed=recipe.train.seed, data=data, accelerators=_accelerators())
    if world.is_first and not directory.environment.exists():
        write_file(directory.environment, provenance.model_dump_json(indent=1) + "\n")

    reporter.stage("loading the base")
    place = choose_place(plan, world)
    model, autocast = load_base(plan, place)
    anchored = prepare_anchor(plan, model, autocast, tokenizer, world, reporter)
    reporter.stage("proving identity" if plan.layout else "preparing")
    trainee = spread_trainee(plan, prepare_trainee(plan, model, autocast), place, world)
    base_losses = _base_losses(plan, trainee, directory, texts, world, reporter)
    base_loss = nats_per_token(texts, base_losses)
    trained = train_to_the_end(plan, trainee, mixture, texts, base_loss, directory, world, reporter, anchored)

    round_to_saved(trainee, plan.base.checkpoint)
    reporter.stage("evaluating the trained model")
    losses = score_texts(trainee.root, texts, world, autocast=autocast, progress=reporter.progress)
    shift = _shift(plan, trainee, texts, world, reporter)
    trainee = assemble_trainee(trainee, world)

    def conclude() -> RunResult:
        audit = _audit(plan, trainee, reporter)
        outputs = _save(plan, trainee, directory, reporter)
        _record(plan, texts, losses, base_losses, shift, directory, outputs[0], provenance)
        quantisation = conclude_quantisation(plan, trainee, place, texts, base_losses, losses, reporter)
        set_aside(trainee)
        evaluate_run(outputs[0], recipe, directory.evaluation, place.device, reporter)
        return _finish(plan, trainee, trained, audit, quantisation, outputs, directory)

    return world.first(conclude)


def _shift(
    plan: RunPlan, trainee: Trainee, texts: Sequence[EvaluationText], world: World, reporter: Reporter
) -> list[TokenShift]:
    if not (plan.recipe.evaluate.shift and texts):
        return []
    reporter.stage("comparing with the base token by token")
    return shift_texts(
        trainee.root, texts, world, bypass, autocast=trainee.autocast, progress=reporter.progress
    )


def _audit(plan: RunPlan, trainee: Trainee, reporter: Reporter) -> AuditResult | None:
    if not trainee.method.keeps_base:
        return None
    reporter.stage("auditing the base")
    audit_quantised(plan, trainee)
    return audit_base(plan, trainee.model)


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
    shift: Sequence[TokenShift],
    directory: RunDirectory,
    model: Path,
    provenance: Provenance,
) -> None:
    record = build_record(
        texts,
        losses,
        base_losses,
        model=str(model),
        base=plan.recipe.base,
        provenance=provenance,
        shift=shift,
    )
    write_file(directory.evaluation / "heldout.json", record.model_dump_json(indent=1) + "\n")


def _base_losses(
    plan: RunPlan,
    trainee: Trainee,
    directory: RunDirectory,
    texts: Sequence[EvaluationText],
    world: World,
    reporter: Reporter,
) -> Losses:
    """Score the base, which the model is but for its new blocks, once; a resumed run reads what was found."""
    scored = {"base": plan.fingerprint, "texts": {text.task: text.digest for text in texts}}
    held = world.first(lambda: _held_losses(directory, scored))
    if held is not None:
        return held
    reporter.stage("evaluating the base")
    with bypass(trainee.model) if plan.layout else nullcontext():
        losses = score_texts(
            trainee.root, texts, world, autocast=trainee.autocast, progress=reporter.progress
        )
    content = scored | {"nats": {task: values.tolist() for task, values in losses.items()}}
    world.first(lambda: write_file(directory.base_losses, json.dumps(content) + "\n"))
    return losses


def _held_losses(directory: RunDirectory, scored: Mapping[str, object]) -> Losses | None:
    if not directory.base_losses.exists():
        return None
    held = json.loads(directory.base_losses.read_text())
    if not held.items() >= scored.items():
        return None
    return {task: np.asarray(values, dtype=np.float64) for task, values in held["nats"].items()}


def _finish(
    plan: RunPlan,
    trainee: Trainee,
    trained: Trained,
    audit: AuditResult | None,
    quantisation: QuantisationResult | None,
    outputs: Sequence[Path],
    directory: RunDirectory,
) -> RunResult:
    trainable = sum(parameter.numel() for parameter in trainee.parameters.values())
    result = RunResult(
        method=trainee.method.name,
        base=plan.recipe.base,
        layout=plan.layout.draw() if plan.layout else None,
        parameters=plan.parameters.model_copy(update={"trainable": trainable}),
        steps=trained.stopped.kept if trained.stopped else plan.steps,
        tokens=plan.tokens // plan.steps * (trained.stopped.kept if trained.stopped else plan.steps),
        seconds=round(trained.seconds, 2),
        identity=trainee.identity,
        audit=audit,
        quantisation=quantisation,
        stopped=trained.stopped,
        outputs=[str(path.relative_to(directory.root)) for path in outputs],
    )
    write_file(directory.result, result.model_dump_json(indent=1) + "\n")
    return result


def _accelerators() -> str:
    if not torch.cuda.is_available():
        return "none"
    return ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
