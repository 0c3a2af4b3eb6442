"""What a run will take, before it starts: a recipe, or a model and options, as a job of the planner."""

import os
from pathlib import Path

from deepen.blocks import BLOCKS_NAME, open_pack
from deepen.checkpoint import read_json, resolve_config
from deepen.config import TrainSection
from deepen.errors import CheckpointError, TrainingError
from deepen.expansion import plan_layout
from deepen.families import family_for
from deepen.pipeline.plan import Outline, default_micro_batch, windows_per_step
from deepen.pipeline.subject import find_subject
from deepen.planner.devices import Device, this_device
from deepen.planner.estimate import least_memory
from deepen.planner.job import Job, TeacherFiles


def job_of_run(outline: Outline, devices: int = 1) -> Job:
    """Return a run as the planner sees it."""
    return Job(
        source=outline.base.checkpoint.directory,
        layout=outline.layout,
        train=outline.train,
        length=outline.length,
        windows=outline.windows,
        micro_batch=outline.micro_batch,
        document_masks=outline.document_masks,
        tokens=outline.known_tokens,
        devices=devices,
        teacher=_teacher_files(outline),
    )


def _teacher_files(outline: Outline) -> TeacherFiles | None:
    section = outline.train.teacher
    if section is None:
        return None
    side = find_subject(section.model, outline.recipe.base).model
    packed = (Path(side.name) / BLOCKS_NAME).is_file()
    return TeacherFiles(side.tokenizer, open_pack(side.name).expansion.layout if packed else None)


def job_of_model(
    model: str,
    train: TrainSection,
    *,
    blocks: int | None,
    placement: str,
    length: int,
    devices: int,
) -> Job:
    """Return the training of a model as the planner sees it; of the model only the config is read.

    Args:
        model: directory, `config.json` or hub id.
        train: method, tokens, batch and the rest.
        blocks: number of new blocks; for method `blocks`.
        placement: where they go.
        length: tokens of a window.
        devices: how many share each step.

    Raises:
        CheckpointError: the model cannot be found, or deepen does not know it.
        LayoutError: the blocks cannot be placed so.
        TrainingError: method and blocks do not go together.
    """
    if (train.method == "blocks") != (blocks is not None):
        raise TrainingError(
            "--blocks: say how many new blocks there are to be, e.g. --blocks 8"
            if train.method == "blocks"
            else f"--blocks: method {train.method} trains on the base itself"
        )
    source = resolve_config(model)
    windows = windows_per_step(train, length)
    micro = train.micro_batch or default_micro_batch(length)
    return Job(
        source=source,
        layout=plan_layout(_depth(source), blocks=blocks, placement=placement) if blocks else None,  # type: ignore[arg-type]
        train=train,
        length=length,
        windows=windows,
        micro_batch=min(micro, max(1, windows // devices)),
        tokens=train.tokens,
        devices=devices,
    )


def check_fits(outline: Outline) -> None:
    """Refuse a run that certainly does not fit this machine's device.

    Raises:
        TrainingError: even the least it needs is more than there is.
    """
    devices = int(os.environ.get("WORLD_SIZE", "1"))
    device = this_device(outline.train.device)
    if not outline.train.held_beside and _most_bytes(outline) <= device.memory:
        return  # a small model: nothing has to be run to know
    try:
        memory = least_memory(job_of_run(outline, devices), device)
    except Exception:  # an estimate that cannot be made keeps no run from starting, which says what is wrong
        return
    if memory.fits is False:
        raise TrainingError(
            f"{outline.recipe.base}: training it needs at least {_gigabytes(memory.low)} on {device.name}, "
            f"which has {_gigabytes(memory.device)}\n"
            "`deepen plan RECIPE` shows what would change that; --force starts all the same"
        )


def _most_bytes(outline: Outline) -> int:
    """Return a loose upper bound of the bytes of a step, from the shapes in the files alone.

    Weights, gradients and moments; and of each matrix inputs and outputs of all tokens, ten times in fp32,
    new blocks being no more than the base's.
    """
    counts, length = outline.parameters, outline.length
    sides = sum(sum(tensor.shape) for tensor in outline.base.checkpoint.tensors.values())
    return 16 * (counts.base + counts.new) + 2 * 40 * outline.micro_batch * length * sides


def choose_device(outline: Outline) -> Device:
    """Return the device on which a recipe would run here."""
    return this_device(outline.train.device)


def _depth(source: Path) -> int:
    path = source / "config.json" if source.is_dir() else source
    config = read_json(path, hint="; give a checkpoint's directory or its config.json")
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: is not a JSON object")
    family = family_for(config, where=str(path))
    depth = family.text_config(config).get(family.depth_key)
    if not isinstance(depth, int):
        raise CheckpointError(f"{path}: has no {family.depth_key}, the number of its blocks")
    return depth


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB"
