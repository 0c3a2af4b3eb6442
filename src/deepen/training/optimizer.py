from collections.abc import Iterable, Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Final, Literal

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from deepen.errors import TrainingError
from deepen.training.parallel import placed_like

Kind = Literal["adamw", "adamw_8bit"]

_PACKAGE: Final = "bitsandbytes"


def build_optimizer(
    parameters: Mapping[str, nn.Parameter],
    *,
    betas: tuple[float, float],
    weight_decay: float,
    kind: Kind = "adamw",
) -> torch.optim.Optimizer:
    """AdamW in which only matrices decay: norms and biases (fewer than two dimensions) do not.

    `adamw_8bit` is that of bitsandbytes (arXiv 2110.02861), which holds the moments of tensors of 4,096
    elements and more in 8 bits, with a scale for every 256.

    Raises:
        TrainingError: bitsandbytes is not installed, or was asked for over sharded parameters.
    """
    groups = [
        {"params": [p for p in parameters.values() if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters.values() if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if kind == "adamw_8bit":
        return _adamw_8bit(groups, betas)
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, fused=True)


def check_optimizer(kind: Kind) -> None:
    """Check that an optimiser's package is installed.

    Raises:
        TrainingError: it is not.
    """
    if kind == "adamw_8bit" and find_spec(_PACKAGE) is None:
        raise TrainingError(f"train.optimizer: {kind} needs {_PACKAGE}: pip install {_PACKAGE}")


def _adamw_8bit(groups: list[dict[str, Any]], betas: tuple[float, float]) -> torch.optim.Optimizer:
    check_optimizer("adamw_8bit")
    if any(isinstance(parameter, DTensor) for group in groups for parameter in group["params"]):
        raise TrainingError("train.optimizer: adamw_8bit cannot train sharded parameters; say parallel: ddp")
    optimizer: torch.optim.Optimizer = import_module(f"{_PACKAGE}.optim").AdamW8bit(
        groups, lr=0.0, betas=betas
    )
    return optimizer


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]
) -> dict[str, torch.Tensor]:
    """Return the optimiser's state as `parameter name/state name` -> tensor; whole numbers become int64."""
    return {
        f"{name}/{key}": value if isinstance(value, torch.Tensor) else torch.tensor(value)
        for name, parameter in parameters.items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def restore_optimizer(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    tensors: Iterable[tuple[str, torch.Tensor]],
) -> None:
    """Put back what `optimizer_tensors` returned; torch's step counter, a float, stays where it is kept."""
    for place, value in tensors:
        name, _, key = place.rpartition("/")
        held = int(value) if value.dtype == torch.int64 else placed_like(value, parameters[name])
        optimizer.state[parameters[name]][key] = held
