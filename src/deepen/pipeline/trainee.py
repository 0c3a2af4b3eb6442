"""The model in hand: loaded, expanded, proved to be the base, and what of it trains."""

from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers import PreTrainedModel

from deepen.checkpoint import Checkpoint, full_fingerprint
from deepen.data.document_masks import check_document_masks
from deepen.errors import CheckFailed
from deepen.expansion import Fingerprint
from deepen.methods import WIDE, Method, build_method
from deepen.model import (
    attach,
    base_fingerprint,
    base_names,
    compare_probes,
    find_expansion,
    insert_blocks,
    load,
    load_quantised,
    packed_fingerprint,
    packed_layers,
    probe_logits,
    settle_base,
)
from deepen.model.rows import check_parted
from deepen.model.structure import blocks_of
from deepen.pipeline.place import Place, compute_precision
from deepen.pipeline.plan import RunPlan
from deepen.records import AuditResult, IdentityResult
from deepen.training.parallel import Root, assemble, replicate, shard
from deepen.training.world import World


@dataclass(frozen=True, kw_only=True)
class Trainee:
    """The model in hand and what of it trains.

    Attributes:
        model: the model; under FSDP its parameters are sharded.
        root: where passes through it begin, see `deepen.training.parallel`.
        method: how it is adapted.
        parameters: what trains, by name.
        autocast: dtype of the compute where it is not the weights' own.
        identity: what was proved of the expansion.
        packed: digest of the base's quantised layers before training; None where none is.
    """

    model: PreTrainedModel
    root: nn.Module
    method: Method
    parameters: dict[str, nn.Parameter]
    autocast: torch.dtype | None
    identity: IdentityResult | None
    packed: str | None = None


def load_base(plan: RunPlan, place: Place) -> tuple[PreTrainedModel, torch.dtype | None]:
    """Load the base and its pack for training: bf16 compute keeps frozen weights in the files' precision.

    Args:
        plan: the run.
        place: from `choose_place`; a model to be sharded goes to the CPU, as it may not fit a device.

    Returns:
        The model, and the dtype to compute in where it is not the weights' own.

    Raises:
        CheckpointError: transformers cannot load it.
        TrainingError: it is to be quantised, and bitsandbytes is not installed.
    """
    precision = compute_precision(plan, place.device)
    wide = precision == "fp32" or plan.train.method in WIDE
    where = torch.device("cpu") if place.parallel == "fsdp" else place.device
    directory, dtype = plan.base.checkpoint.directory, torch.float32 if wide else None
    if (quantisation := plan.train.quantise) != "none":
        model = load_quantised(directory, quantisation, dtype=dtype, device=where)
        if plan.pack:
            attach(model, plan.pack)
    else:
        model = load(directory, plan.pack, dtype=dtype, device=where)
    if plan.layout is None:
        settle_base(model)
    return model, torch.bfloat16 if precision == "bf16" else None


def prepare_trainee(plan: RunPlan, model: PreTrainedModel, autocast: torch.dtype | None) -> Trainee:
    """Add the new blocks, prove that they change nothing, and set what trains; a pack's are there already.

    Raises:
        CheckFailed: the expanded model is not the base.
    """
    method = build_method(plan.train)
    before = _probe(model, autocast) if plan.layout and plan.pack is None else None
    if plan.layout and plan.pack is None:
        fingerprint = Fingerprint(fast=plan.fingerprint)
        insert_blocks(model, plan.layout, base=plan.recipe.base, fingerprint=fingerprint)
    if plan.document_masks:
        check_document_masks(model)
    torch.manual_seed(plan.train.seed)  # adapters begin as random numbers, the same in all processes
    parameters = method.prepare(model)
    identity = _prove_identity(plan, model, before, _probe(model, autocast)) if before else None
    return Trainee(
        model=model,
        root=Root(model),
        method=method,
        parameters=parameters,
        autocast=autocast,
        identity=identity,
        packed=packed_fingerprint(model) if packed_layers(model) else None,
    )


def spread_trainee(plan: RunPlan, trainee: Trainee, place: Place, world: World) -> Trainee:
    """Lay the model over the processes of the run; the parameters that train are then others."""
    model = trainee.model
    if place.parallel == "ddp":
        return replace(trainee, root=replicate(model, world))
    blocks = list(blocks_of(model, plan.base.family))
    root = shard(model, blocks, place.device, world, trainee.autocast)
    named = dict(model.named_parameters())
    return replace(trainee, root=root, parameters={name: named[name] for name in trainee.parameters})


def assemble_trainee(trainee: Trainee, world: World) -> Trainee:
    """Put a sharded model together in the first process, where it is audited and saved."""
    assemble(trainee.model, world)
    named = dict(trainee.model.named_parameters())
    return replace(trainee, parameters={name: named[name] for name in trainee.parameters})


def set_aside(trainee: Trainee) -> None:
    """Free the device for what was saved. A sharded model has left it, a packed one been let go."""
    first = next(trainee.model.parameters(), None)
    if first is not None and first.device.type != "cpu" and not packed_layers(trainee.model):
        trainee.model.cpu()


def _prove_identity(
    plan: RunPlan, model: PreTrainedModel, before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]
) -> IdentityResult:
    checks: tuple[str, ...] = ()
    expansion = find_expansion(model)
    if rows := expansion and expansion.new_rows:
        # Their logits are another product than the base's, which may round otherwise: the rows are compared.
        check_parted(model, rows)
        before, after = ({k: v[..., : rows.first] for k, v in each.items()} for each in (before, after))
        checks = (f"{rows.count} new rows",)
    found = compare_probes(before, after)
    if not found.identical:
        raise CheckFailed(
            f"{plan.recipe.base}: the expanded model is not the base before training "
            f"(largest difference of a logit: {found.max_abs_difference})"
        )
    return IdentityResult(
        identical=True, max_abs_difference=found.max_abs_difference, checks=[*found.checks, *checks]
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
    """Hash the base's tensors in the trained model, but for quantised ones, against the base's files.

    Raises:
        CheckFailed: a base tensor moved.
    """
    live = base_names(model, packed=False)
    dtypes = {name: tensor.dtype for name, tensor in plan.base.checkpoint.tensors.items() if name in live}
    before = full_fingerprint(plan.base.checkpoint, lambda name: name if name in dtypes else None)
    after = base_fingerprint(model, "full", dtypes)
    if before != after:
        raise CheckFailed(
            f"{plan.recipe.base}: a base tensor changed during training; the result is not kept"
        )
    return AuditResult(unchanged=True, tensors=len(dtypes), before=before, after=after)
