"""Training by transformers' Trainer (or TRL's): the pack is saved from there."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from deepen.model.pack import save_blocks


class SaveBlocks(TrainerCallback):  # type: ignore[misc]
    """Save the new blocks as a block pack: beside each of the trainer's checkpoints, and at the end.

    ::

        Trainer(model=model, args=arguments, callbacks=[deepen.SaveBlocks()], ...)

    Args:
        directory: where the pack goes at the end; default: `blocks` in the trainer's output directory.
            Each checkpoint gets `blocks` of its own.
    """

    def __init__(self, directory: str | Path | None = None) -> None:
        self.directory = None if directory is None else Path(directory)

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


def _save(state: TrainerState, model: PreTrainedModel, directory: Path) -> None:
    if state.is_world_process_zero:
        save_blocks(model, directory, overwrite=True)
