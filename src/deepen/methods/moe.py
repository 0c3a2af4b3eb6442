from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from deepen.checkpoint import Checkpoint
from deepen.errors import TrainingError
from deepen.families import Family, generic
from deepen.methods.full import Full
from deepen.methods.method import widen
from deepen.model.structure import blocks_of, family_of


class Moe(Full):
    """The paper's mixture of two experts (arXiv 2401.02415, Table 6): a second output matrix a feed-forward.

    Both experts are always active: W = p1 W3 + p2 W3', with p = softmax(a) and a learned in each block. W3 is
    frozen and W3' begins as its copy, so at first nothing changes. What is saved is W, in an ordinary
    checkpoint.
    """

    name: Final = "moe"  # type: ignore[misc]

    def prepare(self, model: PreTrainedModel) -> dict[str, nn.Parameter]:
        """Put a second matrix beside the last one of every feed-forward.

        Raises:
            TrainingError: a block has no such matrix, or several.
        """
        model.requires_grad_(False)
        family = family_of(model)
        for index, block in enumerate(blocks_of(model, family)):
            for parent, name, linear in _outputs(block, family, index):
                setattr(parent, name, TwoExperts(linear))
        return widen({name: p for name, p in model.named_parameters() if p.requires_grad})

    def saved_dtypes(self, model: PreTrainedModel, base: Checkpoint) -> Mapping[str, torch.dtype]:
        """Nothing is rounded before the two experts are one matrix."""
        return {}

    def save(self, model: PreTrainedModel, run: Path, base: Checkpoint) -> Path:
        """Write `model/`, with the two experts of each block as one matrix; so they stay in memory too."""
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, TwoExperts):
                    setattr(parent, name, child.fold())
        return super().save(model, run, base)


class TwoExperts(nn.Module):
    """A linear layer whose matrix is a learned average of a frozen one and one that trains."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.expert = nn.Parameter(linear.weight.detach().clone())
        self.mixture = nn.Parameter(torch.zeros(2, device=linear.weight.device))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Return both experts' outputs, averaged."""
        first, second = self.mixture.softmax(0).to(states.dtype)
        frozen = functional.linear(states, self.weight)
        mixed: torch.Tensor = first * frozen + second * functional.linear(states, self.expert)
        return mixed if self.bias is None else mixed + self.bias

    def fold(self) -> nn.Linear:
        """Return an ordinary layer that computes the same."""
        first, second = self.mixture.detach().softmax(0)
        weight = first * self.weight.float() + second * self.expert.float()
        outputs, inputs = weight.shape
        linear = nn.Linear(inputs, outputs, bias=self.bias is not None, device="meta")
        linear.weight = nn.Parameter(weight.to(self.weight.dtype), requires_grad=False)
        linear.bias = self.bias
        return linear


def _outputs(block: nn.Module, family: Family, index: int) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    names = {name for part in family.block if part.part == "mlp" for name in part.required}
    wanted = names & {*family.residual_writes, *family.projections}
    found = [path for path, _ in block.named_modules() if generic(f"{path}.weight") in wanted]
    linears = [path for path in found if isinstance(block.get_submodule(path), nn.Linear)]
    if not linears:
        raise TrainingError(
            f"train.method: moe: block {index} has no feed-forward output matrix of its own\n"
            "(its experts are fused, or its class is no linear layer): choose another method"
        )
    for path in linears:
        parent, _, last = path.rpartition(".")
        linear = block.get_submodule(path)
        assert isinstance(linear, nn.Linear)
        yield block.get_submodule(parent), last, linear
