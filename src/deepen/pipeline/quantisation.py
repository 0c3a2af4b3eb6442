"""What it cost to hold the base quantised in training, measured beside the base in full precision."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from deepen.config import TrainSection
from deepen.data.evaluation_text import EvaluationText
from deepen.errors import CheckFailed
from deepen.evaluation.memory import collect_memory
from deepen.evaluation.record import nats_per_token
from deepen.expansion import count_parameters
from deepen.model import bypass, check_quantisation, packed_fingerprint, packed_layers
from deepen.model.state import forget_state
from deepen.pipeline.place import Place, compute_precision
from deepen.pipeline.plan import RunPlan
from deepen.pipeline.reporter import Reporter
from deepen.pipeline.scoring import score_texts
from deepen.pipeline.trainee import Trainee, load_base, prepare_trainee
from deepen.records import QuantisationResult, QuantisedLoss
from deepen.training.optimizer import check_optimizer
from deepen.training.recompute import free_memory
from deepen.training.world import World

Losses = Mapping[str, NDArray[np.float64]]

# How much of a memory the base in full precision may take; the rest is for activations.
_SHARE: Final = 0.8


def check_packages(train: TrainSection) -> None:
    """Check that what a recipe asks for beyond deepen's own packages is installed.

    Raises:
        TrainingError: something is not.
    """
    check_optimizer(train.optimizer)
    if train.quantise != "none":
        check_quantisation()


def audit_quantised(plan: RunPlan, trainee: Trainee) -> None:
    """Hash the base's quantised layers against what they were before training.

    Raises:
        CheckFailed: one of them moved.
    """
    if trainee.packed is not None and packed_fingerprint(trainee.model) != trainee.packed:
        raise CheckFailed(
            f"{plan.recipe.base}: a quantised layer changed during training; the result is not kept"
        )


def conclude_quantisation(
    plan: RunPlan,
    trainee: Trainee,
    place: Place,
    texts: Sequence[EvaluationText],
    base_losses: Losses,
    losses: Losses,
    reporter: Reporter,
) -> QuantisationResult | None:
    """Score the base in full precision, without and with what was trained; None where it was not quantised.

    The model in hand is given up for it: two bases need not fit the memory. What was trained is what was
    saved, and goes onto the other base by name.

    Args:
        plan: the run.
        trainee: trained, audited and saved; its model is empty afterwards.
        place: of the run.
        texts: to score.
        base_losses: task -> nats per window of the quantised base.
        losses: the same with what was trained.
        reporter: told what goes on.
    """
    if trainee.packed is None:
        return None
    layers = len(packed_layers(trainee.model))
    trained = {name: parameter.detach().cpu() for name, parameter in trainee.parameters.items()}
    _give_up(trainee)
    unmeasured: str | None = None
    found: list[QuantisedLoss] = []
    if texts:
        where = _roomy(plan, place)
        if where is None:
            unmeasured = "the base in full precision does not fit the memory"
            reporter.note(f"the cost of quantisation is not measured: {unmeasured}")
        else:
            reporter.stage("evaluating in full precision")
            scored = _score_unquantised(_unquantised(plan, place), where, trained, texts, reporter)
            found = _losses(texts, scored[0], base_losses, scored[1], losses)
    return QuantisationResult(
        bits=4 if plan.train.quantise == "4bit" else 8,
        layers=layers,
        unchanged=True,
        before=trainee.packed,
        after=trainee.packed,
        losses=found,
        unmeasured=unmeasured,
    )


def _give_up(trainee: Trainee) -> None:
    """Empty the model: whoever still refers to it holds no weights."""
    forget_state(trainee.model)
    trainee.model._modules.clear()
    collect_memory()


def _roomy(plan: RunPlan, place: Place) -> Place | None:
    """Return the run's device, or the CPU, whichever has room for the base in full precision."""
    wide = compute_precision(plan, place.device) == "fp32"
    tensors = plan.base.checkpoint.tensors.values()
    needed = 4 * count_parameters(tensors) if wide else sum(tensor.length for tensor in tensors)
    for device in (place.device, torch.device("cpu")):
        if needed <= _SHARE * free_memory(device):
            return Place(device, "ddp")
    return None


def _unquantised(plan: RunPlan, place: Place) -> RunPlan:
    """The same run on the base in full precision, computing as this one did wherever that may be."""
    as_before = {"quantise": "none", "precision": compute_precision(plan, place.device)}
    train = plan.train.model_copy(update=as_before)
    return replace(plan, train=train)


def _score_unquantised(
    plan: RunPlan,
    place: Place,
    trained: Mapping[str, torch.Tensor],
    texts: Sequence[EvaluationText],
    reporter: Reporter,
) -> tuple[Losses, Losses]:
    trainee = prepare_trainee(plan, *load_base(plan, place))

    def score() -> Losses:
        return score_texts(
            trainee.root, texts, World(), autocast=trainee.autocast, progress=reporter.progress
        )

    with bypass(trainee.model) if plan.pack else nullcontext():
        base = score()  # which what trains does not change until it is trained
    with torch.no_grad():
        for name, parameter in trainee.parameters.items():
            parameter.copy_(trained[name])
    return base, score()


def _losses(
    texts: Sequence[EvaluationText], base: Losses, base_quantised: Losses, trained: Losses, quantised: Losses
) -> list[QuantisedLoss]:
    means = [nats_per_token(texts, each) for each in (base, base_quantised, trained, quantised)]
    return [
        QuantisedLoss(
            task=text.task,
            role=text.role,
            base=means[0][text.task],
            base_quantised=means[1][text.task],
            trained=means[2][text.task],
            trained_quantised=means[3][text.task],
        )
        for text in texts
    ]
