from collections.abc import Iterable, Mapping

import torch
from torch import nn

from deepen.training.parallel import placed_like


def build_optimizer(
    parameters: Mapping[str, nn.Parameter], *, betas: tuple[float, float], weight_decay: float
) -> torch.optim.AdamW:
    """AdamW in which only matrices decay: norms and biases (fewer than two dimensions) do not."""
    groups = [
        {"params": [p for p in parameters.values() if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters.values() if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=0.0, betas=betas, fused=True)


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]
) -> dict[str, torch.Tensor]:
    """Return the optimiser's state as `parameter name/state name` -> tensor."""
    return {
        f"{name}/{key}": value
        for name, parameter in parameters.items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def restore_optimizer(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    tensors: Iterable[tuple[str, torch.Tensor]],
) -> None:
    """Put back what `optimizer_tensors` returned; the step counter stays where the optimiser keeps it."""
    for place, value in tensors:
        name, _, key = place.rpartition("/")
        optimizer.state[parameters[name]][key] = placed_like(value, parameters[name])
