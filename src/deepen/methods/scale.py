from collections.abc import Mapping
from pathlib import Path
from typing import Final

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from deepen.checkpoint import Checkpoint
from deepen.expansion import Progress
from deepen.methods.lora import ADAPTER
from deepen.methods.method import save_trained, widen


class Scale:
    """LLaMA-Adapter V2 (arXiv 2304.15010): norms train, and a bias and a scale on every linear layer.

    y = s (W x + b), with s beginning as 1 and b as 0, so at first nothing changes.
    """

    name: Final = "scale"
    keeps_base: Final = False

    def prepare(self, model: PreTrainedModel) -> dict[str, nn.Parameter]:
        """Add scales and biases, and make norms trainable."""
        model.requires_grad_(False)
        head = model.get_output_embeddings()
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Linear) and child is not head:
                    setattr(parent, name, Scaled(child))
                elif "norm" in type(child).__name__.lower():
                    child.requires_grad_(True)
        return widen({name: p for name, p in model.named_parameters() if p.requires_grad})

    def saved_dtypes(self, model: PreTrainedModel, base: Checkpoint) -> Mapping[str, torch.dtype]:
        """Nothing is rounded: an adapter is saved in fp32."""
        return {}

    def save(self, model: PreTrainedModel, run: Path, base: Checkpoint) -> Path:
        """Write `adapter/`: what trained, by its name in memory."""
        return save_trained(model, run / ADAPTER, "scale.safetensors", base)

    def merge(
        self, model: PreTrainedModel, run: Path, base: Checkpoint, progress: Progress | None
    ) -> Path | None:
        """Return None: the biases have no place in the base's files."""
        return None


class Scaled(nn.Linear):
    """A frozen linear layer with a trained scale and bias for each of its outputs."""

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.scale = nn.Parameter(torch.ones(linear.out_features, device=linear.weight.device))
        self.shift = nn.Parameter(torch.zeros(linear.out_features, device=linear.weight.device))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Return s (W x + b)."""
        plain = functional.linear(states, self.weight, self.bias)
        return (plain + self.shift.to(plain.dtype)) * self.scale.to(plain.dtype)
