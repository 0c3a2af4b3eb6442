"""One run from base to evaluated result. The only place where training meets evaluation."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from deepen.blocks import copy_pack
from deepen.checkpoint import write_file
from deepen.config import Recipe
from deepen.data.chat import ChatTemplate, write_template
from deepen.data.evaluation_text import EvaluationText
from deepen.errors import CheckpointError
from deepen.evaluation import compare_runs
from deepen.evaluation.memory import collect_memory
from deepen.evaluation.record import build_record
from deepen.expansion import check_space
from deepen.methods.lora import ADAPTER
from deepen.model import bypass
from deepen.pipeline.anchor import prepare_anchor
from deepen.pipeline.baseline import Losses, base_losses, hand_on_losses
from deepen.pipeline.directory import RunDirectory, check_run, open_run
from deepen.pipeline.effects import EFFECTS_TOKENS, record_effects
from deepen.pipeline.evaluate import evaluate_run
from deepen.pipeline.material import Material, note_repeats, prepare_material
from deepen.pipeline.place import choose_place
from deepen.pipeline.plan import Outline, RunPlan, count_steps, plan_run, tuning_recipe
from deepen.pipeline.quantisation import audit_quantised, check_packages, conclude_quantisation
from deepen.pipeline.reporter import Reporter, Silent
from deepen.pipeline.scoring import shift_texts
from deepen.pipeline.switched import record_switch, switched_texts
from deepen.pipeline.trainee import (
    Trainee,
    assemble_trainee,
    audit_base,
    load_base,
    prepare_trainee,
    set_aside,
    spread_trainee,
)
from deepen.pipeline.training import Trained, train_to_the_end
from deepen.records import (
    AuditResult,
    EvaluationRecord,
    Provenance,
    QuantisationResult,
    RunResult,
    TokenShift,
    capture_provenance,
    read_record,
)
from deepen.report import complete_pages, write_comparison_page
from deepen.training.world import World, join_world


def run_recipe(
    recipe: Recipe | None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    reporter: Reporter | None = None,
    beside: Path | None = None,
) -> RunResult:
    """Expand, verify, train, tune, evaluate, audit, save and report. A finished run is returned as it is.

    Tuning that follows training is a run of its own, in `sft/` of the run directory.

    Under torchrun every process calls this, and all do what the first one was asked; only that one writes
    and reports.

    Args:
        recipe: what to do; may be None in all processes but the first.
        resume: continue an unfinished run from its newest valid checkpoint.
        overwrite: replace an earlier run in the same output.
        reporter: told what goes on.
        beside: another run's directory; what it found of the base is not found again, where it is the same
            base on the same texts, computed in the same precision on the same kind of device.

    Returns:
        The result of training; of tuning where that is all there is.

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
            outline = world.first_then_rest(lambda: plan_run(asked))
            world.first(lambda: check_packages(outline.train))
            with _opened(outline, resume, overwrite, world) as directory:
                if beside:
                    world.first(lambda: hand_on_losses(RunDirectory(beside), directory))
                finished = _run(outline, directory, world, reporter)
                if asked.train and asked.sft:
                    _tune(asked, directory, world, reporter)
        world.first(lambda: _complete(asked, RunDirectory(Path(asked.output))))
    return finished


def _tune(recipe: Recipe, trained: RunDirectory, world: World, reporter: Reporter) -> None:
    """Tune what was trained, or go on with what lies there of it."""
    asked, directory = tuning_recipe(recipe), trained.tuning
    if world.first(lambda: check_run(asked, resume=True, overwrite=False)):
        return
    collect_memory()
    outline = world.first_then_rest(lambda: plan_run(asked))
    world.first(lambda: check_packages(outline.train))
    begun = world.first(directory.recipe.exists)
    with _opened(outline, begun, False, world):
        world.first(lambda: hand_on_losses(trained, directory))
        _run(outline, directory, world, reporter)


def _complete(recipe: Recipe, directory: RunDirectory) -> None:
    """Write what is missing of the pages."""
    complete_pages(directory.root)
    if recipe.train and recipe.sft:
        complete_pages(directory.tuning.root)
        heldout = read_record(directory.evaluation / "heldout.json", EvaluationRecord)
        if heldout.texts and not directory.stages.exists():
            compared = compare_runs([directory.root, directory.tuning.root], ["trained", "tuned"])
            write_comparison_page(compared, directory.stages)


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
    """Train on what the outline's stage names, unless that is done."""
    if finished := world.first(directory.finished):
        return finished
    recipe, material = outline.recipe, prepare_material(outline, world, reporter)
    mixture, texts = material.mixture, material.texts
    switched = switched_texts(recipe, texts)
    plan = count_steps(outline, mixture)
    if plan.train.epochs:
        windows = f"{mixture.windows_per_epoch:,} windows"
        reporter.note(f"{plan.train.epochs:g} × {windows} an epoch: {plan.steps:,} steps")
    else:
        note_repeats(plan, mixture, reporter)
    provenance = capture_provenance(seed=plan.train.seed, data=material.digests, accelerators=_accelerators())
    if world.is_first:
        material.write_findings(directory.findings)
        if not directory.environment.exists():
            write_file(directory.environment, provenance.model_dump_json(indent=1) + "\n")

    reporter.stage("loading the base")
    place = choose_place(plan, world)
    model, autocast = load_base(plan, place)
    anchored = prepare_anchor(plan, model, autocast, material.tokenizer, world, reporter)
    reporter.stage("proving identity" if plan.layout and not plan.pack else "preparing")
    trainee = spread_trainee(plan, prepare_trainee(plan, model, autocast), place, world)
    base = base_losses(plan, trainee, directory, texts, world, reporter)
    trained = train_to_the_end(plan, trainee, mixture, texts, base, directory, world, reporter, anchored)
    losses = trained.losses
    shift = _shift(plan, trainee, texts, world, reporter)
    trainee = assemble_trainee(trainee, world)

    def conclude() -> RunResult:
        audit = _audit(plan, trainee, reporter)
        outputs = _save(plan, trainee, directory, material.template, reporter)
        _record(plan, texts, losses, base, shift, directory, outputs[0], provenance)
        _effects(plan, trainee, material, outputs[0], directory, reporter)
        record_switch(recipe, trainee, switched, str(outputs[0]), directory.switch, reporter)
        quantisation = conclude_quantisation(plan, trainee, place, texts, base, losses, reporter)
        set_aside(trainee)
        evaluate_run(outputs[0], recipe, directory.evaluation, place.device, reporter)
        return _finish(plan, trainee, trained, audit, quantisation, outputs, material.template, directory)

    return world.first(conclude)


def _shift(
    plan: RunPlan, trainee: Trainee, texts: Sequence[EvaluationText], world: World, reporter: Reporter
) -> list[TokenShift]:
    texts = [text for text in texts if text.counted is None]
    if not (plan.recipe.evaluate.shift and texts):
        return []
    reporter.stage("comparing with the base token by token")
    return shift_texts(
        trainee.root, texts, world, bypass, autocast=trainee.autocast, progress=reporter.progress
    )


def _effects(
    plan: RunPlan,
    trainee: Trainee,
    material: Material,
    model: Path,
    directory: RunDirectory,
    reporter: Reporter,
) -> None:
    if not (plan.recipe.evaluate.effects and material.texts):
        return
    record = record_effects(
        trainee.model,
        [text.beginning(EFFECTS_TOKENS) for text in material.texts],
        material.tokenizer,
        name=str(model),
        autocast=trainee.autocast,
        reporter=reporter,
    )
    write_file(directory.effects, record.model_dump_json(indent=1) + "\n")


def _audit(plan: RunPlan, trainee: Trainee, reporter: Reporter) -> AuditResult | None:
    if not trainee.method.keeps_base:
        return None
    reporter.stage("auditing the base")
    audit_quantised(plan, trainee)
    return audit_base(plan, trainee.model)


def _save(
    plan: RunPlan,
    trainee: Trainee,
    directory: RunDirectory,
    template: ChatTemplate | None,
    reporter: Reporter,
) -> list[Path]:
    reporter.stage("saving")
    outputs = [trainee.method.save(trainee.model, directory.root, plan.base.checkpoint)]
    if plan.pack and outputs[0].name == ADAPTER:
        outputs.append(copy_pack(plan.pack, directory.root / "blocks"))
    if plan.recipe.merge:
        reporter.stage("merging")
        merged = trainee.method.merge(trainee.model, directory.root, plan.base.checkpoint, reporter.progress)
        outputs += [merged] if merged else []
    if template and plan.recipe.sft and plan.recipe.sft.template:
        for output in outputs:
            write_template(template, output)
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


def _finish(
    plan: RunPlan,
    trainee: Trainee,
    trained: Trained,
    audit: AuditResult | None,
    quantisation: QuantisationResult | None,
    outputs: Sequence[Path],
    template: ChatTemplate | None,
    directory: RunDirectory,
) -> RunResult:
    trainable = sum(parameter.numel() for parameter in trainee.parameters.values())
    result = RunResult(
        stage=plan.name,
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
        template=template.name if template else None,
        stopped=trained.stopped,
        outputs=[str(path.relative_to(directory.root)) for path in outputs],
    )
    write_file(directory.result, result.model_dump_json(indent=1) + "\n")
    return result


def _accelerators() -> str:
    if not torch.cuda.is_available():
        return "none"
    return ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
