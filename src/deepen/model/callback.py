"""Training by transformers' Trainer (or TRL's): the pack is saved from there.

What those trainers do to a partly frozen model, and what is done about it here:

- They train whatever requires a gradient, and a pack holds the recorded new blocks and nothing else. So what
  trains must be exactly what is recorded, when training begins and whenever a pack is saved.
- They step parameters in the precision they are held in. A bf16 parameter of 1 does not notice a step below
  0.004, so blocks in half precision are refused; except under DeepSpeed, which keeps fp32 copies itself.
- Activation checkpointing makes the embeddings' output require a gradient, so that the backward pass runs
  through every frozen block below the first new one. Nothing there needs it: it is taken off again.
  Reentrant checkpointing does need it, and is refused.
- FSDP and ZeRO-3 leave no process a whole parameter. They are refused before the first step.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from deepen.errors import TrainingError
from deepen.model.pack import save_blocks
from deepen.model.record import new_parameters


class SaveBlocks(TrainerCallback):  # type: ignore[misc]
    """Save the new blocks as a block pack: beside each of the trainer's checkpoints, and at the end.

    ::

        for parameter in deepen.freeze_base(model).values():
            parameter.data = parameter.data.float()  # a step smaller than one of bf16 is not lost
        Trainer(model=model, args=arguments, callbacks=[deepen.SaveBlocks()], ...)

    With `load_best_model_at_end` the pack at the end is the best. Packs have the precision of the files that
    the model was loaded from.

    Args:
        directory: where the pack goes at the end; default: `blocks` in the trainer's output directory.
            Each checkpoint gets `blocks` of its own.

    Raises:
        TrainingError: before the first step: what is trainable is not what is recorded as new, or would not
            be trained or saved as it should; when a pack is saved: what is trainable has changed.
        PackError: the model has no active new blocks.
    """

    def __init__(self, directory: str | Path | None = None) -> None:
        self.directory = None if directory is None else Path(directory)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuse what could not be saved, and spare the frozen blocks at the bottom a backward pass."""
        model = kwargs["model"]
        recorded = _check_trainable(model)
        _check_whole(model)
        _check_precision(model, recorded, args)
        _check_optimizer(recorded, kwargs.get("optimizer"), args)
        _check_checkpointing(model)
        model.disable_input_require_grads()

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Save beside the checkpoint just written."""
        checkpoint = Path(str(args.output_dir), f"checkpoint-{state.global_step}")
        _save(state, kwargs["model"], checkpoint / "blocks")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Save the result."""
        _save(state, kwargs["model"], self.directory or Path(str(args.output_dir), "blocks"))


def _save(state: TrainerState, model: nn.Module, directory: Path) -> None:
    _check_trainable(model)
    if state.is_world_process_zero:
        save_blocks(model, directory, overwrite=True)


def _check_trainable(model: nn.Module) -> Mapping[str, nn.Parameter]:
    """Return what is recorded as new, which is exactly what is trainable."""
    if not isinstance(model, PreTrainedModel):
        raise TrainingError(
            f"SaveBlocks: the trainer trains a {type(model).__name__}, not the expanded model itself\n"
            "leave out peft_config, and use DDP instead of FSDP"
        )
    recorded = new_parameters(model)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.requires_grad != (name in recorded):
            found = "is frozen but part of a" if name in recorded else "is trainable but part of no"
            raise TrainingError(
                f"SaveBlocks: parameter {name!r} {found} new block; a pack would not be what was trained\n"
                "call deepen.freeze_base(model) after the last change to the model, then make the trainer"
            )
    return recorded


def _check_whole(model: PreTrainedModel) -> None:
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor) or hasattr(parameter, "ds_id"):
            raise TrainingError(
                f"SaveBlocks: parameter {name!r} is sharded (FSDP or ZeRO-3), no process can save it\n"
                "use DDP, ZeRO-1 or ZeRO-2; `torchrun` with `deepen run` shards too, and saves packs"
            )


def _check_precision(
    model: PreTrainedModel, recorded: Mapping[str, nn.Parameter], args: TrainingArguments
) -> None:
    if args.deepspeed:
        return
    for name, parameter in recorded.items():
        if parameter.dtype.itemsize < torch.float32.itemsize:
            raise TrainingError(
                f"SaveBlocks: parameter {name!r} is {_word(parameter)}: steps smaller than its own are lost\n"
                "hold what trains in fp32: for p in deepen.freeze_base(model).values(): "
                "p.data = p.data.float()"
            )
    narrow = {_word(p) for p in model.parameters() if p.dtype in (torch.bfloat16, torch.float16)}
    if narrow and not (args.bf16 or args.fp16):
        raise TrainingError(
            f"SaveBlocks: the new blocks are float32, the base is {min(narrow)}\n"
            "compute in mixed precision: give the trainer's arguments bf16=True"
        )


def _check_optimizer(recorded: Mapping[str, nn.Parameter], optimizer: Any, args: TrainingArguments) -> None:
    """Check that an optimizer of the user's, made for the model as it was once, steps the new blocks."""
    if optimizer is None or args.deepspeed:
        return
    stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for name, parameter in recorded.items():
        if id(parameter) not in stepped:
            raise TrainingError(
                f"SaveBlocks: the optimizer does not hold parameter {name!r} of a new block\n"
                "make it, or the trainer, after deepen.freeze_base(model)"
            )


def _check_checkpointing(model: PreTrainedModel) -> None:
    if any(map(_is_reentrant, model.modules())):
        raise TrainingError(
            "SaveBlocks: the trainer's activation checkpointing is reentrant: behind frozen blocks that "
            "gives no gradient\n"
            "give activation_checkpointing_kwargs={'use_reentrant': False}, or leave them out"
        )


def _is_reentrant(module: nn.Module) -> bool:
    recompute = vars(module).get("_gradient_checkpointing_func")
    if not (isinstance(recompute, partial) and getattr(module, "gradient_checkpointing", False)):
        return False
    # Where it is not said, torch takes the reentrant one.
    return recompute.keywords.get("use_reentrant") is not False


def _word(parameter: torch.Tensor) -> str:
    return str(parameter.dtype).removeprefix("torch.")
