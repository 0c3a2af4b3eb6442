"""The model in hand: loaded, expanded, proved to be the base, and what of it trains."""

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from deepen.checkpoint import Checkpoint, full_fingerprint
from deepen.errors import CheckFailed, TrainingError
from deepen.expansion import Fingerprint
from deepen.methods import Method, build_method
from deepen.model import base_fingerprint, base_names, compare_probes, insert_blocks, load, probe_logits
from deepen.pipeline.plan import RunPlan
from deepen.records import AuditResult, IdentityResult


@dataclass(frozen=True, kw_only=True)
class Trainee:
    """The model in hand and what of it trains."""

    model: PreTrainedModel
    method: Method
    parameters: dict[str, nn.Parameter]
    autocast: torch.dtype | None
    identity: IdentityResult | None


def load_base(plan: RunPlan) -> tuple[PreTrainedModel, torch.dtype | None]:
    """Load the base for training: bf16 compute keeps frozen weights in the checkpoint's precision.

    Returns:
        The model on its device, and the dtype to compute in where it is not the weights' own.

    Raises:
        CheckpointError: transformers cannot load it.
        TrainingError: the device cannot be used.
    """
    section = plan.recipe.train
    device = _device(section.device)
    precision = section.precision
    if precision == "auto":
        precision = "fp32" if device.type == "cpu" else "bf16"
    wide = precision == "fp32" or section.method in ("full", "freeze", "scale")
    model = load(plan.base.checkpoint.directory, dtype=torch.float32 if wide else None, device=device)
    return model, torch.bfloat16 if precision == "bf16" else None


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise TrainingError(f"train.device: {name} cannot be used ({str(error).splitlines()[0]})") from None
    return device


def prepare_trainee(plan: RunPlan, model: PreTrainedModel, autocast: torch.dtype | None) -> Trainee:
    """Add the new blocks, prove that they change nothing, and set what trains.

    Raises:
        CheckFailed: the expanded model is not the base.
    """
    method = build_method(plan.recipe.train)
    before = _probe(model, autocast) if plan.layout else None
    if plan.layout:
        fingerprint = Fingerprint(fast=plan.fingerprint)
        insert_blocks(model, plan.layout, base=plan.recipe.base, fingerprint=fingerprint)
    parameters = method.prepare(model)
    identity = _prove_identity(plan, before, _probe(model, autocast)) if before else None
    return Trainee(model=model, method=method, parameters=parameters, autocast=autocast, identity=identity)


def _prove_identity(
    plan: RunPlan, before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]
) -> IdentityResult:
    found = compare_probes(before, after)
    if not found.identical:
        raise CheckFailed(
            f"{plan.recipe.base}: the expanded model is not the base before training "
            f"(largest difference of a logit: {found.max_abs_difference})"
        )
    return IdentityResult(
        identical=True, max_abs_difference=found.max_abs_difference, checks=list(found.checks)
    )


def _probe(model: PreTrainedModel, autocast: torch.dtype | None) -> dict[str, torch.Tensor]:
    with torch.autocast(model.device.type, dtype=autocast) if autocast else nullcontext():
        return probe_logits(model)


def round_to_saved(trainee: Trainee, base: Checkpoint) -> None:
    """Give what trained the precision it is saved in, so that what is evaluated is what was saved."""
    with torch.no_grad():
        for name, dtype in trainee.method.saved_dtypes(trainee.model, base).items():
            trainee.parameters[name].copy_(trainee.parameters[name].to(dtype))


def audit_base(plan: RunPlan, model: PreTrainedModel) -> AuditResult:
    """Hash the base's tensors in the trained model against the base's files.

    Raises:
        CheckFailed: a base tensor moved.
    """
    live = base_names(model)
    dtypes = {name: tensor.dtype for name, tensor in plan.base.checkpoint.tensors.items() if name in live}
    before = full_fingerprint(plan.base.checkpoint, lambda name: name if name in dtypes else None)
    after = base_fingerprint(model, "full", dtypes)
    if before != after:
        raise CheckFailed(
            f"{plan.recipe.base}: a base tensor changed during training; the result is not kept"
        )
    return AuditResult(unchanged=True, tensors=len(dtypes), before=before, after=after)
