import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import torch
from torch import nn
from transformers import PreTrainedModel

from deepen.checkpoint import Checkpoint
from deepen.config import PromptSection
from deepen.errors import TrainingError
from deepen.expansion import Progress
from deepen.methods.lora import ADAPTER
from deepen.methods.method import save_trained, widen
from deepen.model.structure import blocks_of, family_of


class Prompt:
    """LLaMA-Adapter (arXiv 2303.16199) by peft: learned prompts in the attention of the upper blocks.

    Their attention is gated by a value that begins as 0, so at first nothing changes.
    """

    name: Final = "prompt"
    keeps_base: Final = True

    def __init__(self, section: PromptSection) -> None:
        """Take the settings of a recipe."""
        self._section = section

    def prepare(self, model: PreTrainedModel) -> dict[str, nn.Parameter]:
        """Add the prompts.

        Raises:
            TrainingError: peft does not know the family.
        """
        from peft import AdaptionPromptConfig, get_peft_model

        depth = len(blocks_of(model, family_of(model)))
        layers = min(self._section.blocks or depth, depth)
        config = AdaptionPromptConfig(
            adapter_len=self._section.length, adapter_layers=layers, task_type="CAUSAL_LM"
        )
        try:
            with warnings.catch_warnings(category=FutureWarning, action="ignore"):
                get_peft_model(model, config)  # in place: the model's own attention modules are wrapped
        except ValueError as error:
            raise TrainingError(f"train.method: prompt: {error}") from None
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        for name, parameter in trained.items():
            if name.endswith("adaption_prompt"):  # drawn on the CPU in fp32: the same on any device
                parameter.data = torch.randn(parameter.shape).to(parameter.device)
        return widen(trained)

    def saved_dtypes(self, model: PreTrainedModel, base: Checkpoint) -> Mapping[str, torch.dtype]:
        """Nothing is rounded: an adapter is saved in fp32."""
        return {}

    def save(self, model: PreTrainedModel, run: Path, base: Checkpoint) -> Path:
        """Write `adapter/`: the prompts and gates, by their names in memory."""
        return save_trained(model, run / ADAPTER, "prompt.safetensors", base)

    def merge(
        self, model: PreTrainedModel, run: Path, base: Checkpoint, progress: Progress | None
    ) -> Path | None:
        """Return None: prompts have no place in the base's files."""
        return None
