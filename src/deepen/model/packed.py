"""Layers that bitsandbytes holds in 4 or 8 bits, and what the model would look like without them."""

from typing import Any, cast

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D


def packed_layers(module: nn.Module) -> dict[str, nn.Module]:
    """Return the layers below a module whose matrix is packed, by name."""
    # By name: the package need not be there to find out that nothing is packed.
    named = module.named_modules()
    return {name: each for name, each in named if type(each).__module__.startswith("bitsandbytes.nn")}


def plain_layer(layer: nn.Module, dtype: torch.dtype, device: torch.device | None = None) -> nn.Module:
    """Return an ordinary layer of the shape and mode of a packed one, whose values are still to be given.

    Args:
        layer: the packed layer.
        dtype: precision of the ordinary one.
        device: where it goes; default: where the packed one is.
    """
    packed = cast(Any, layer)
    inputs, outputs, has_bias = packed.in_features, packed.out_features, packed.bias is not None
    with torch.device("meta"):
        kind = getattr(packed, "source_cls", nn.Linear)
        plain = Conv1D(outputs, inputs) if kind is Conv1D else nn.Linear(inputs, outputs, bias=has_bias)
    moved: nn.Module = plain.to(dtype).to_empty(device=device or packed.weight.device)
    return moved.train(layer.training)


def plain_dtype(module: nn.Module) -> torch.dtype:
    """Return the precision of what is not packed in a module; fp32 where everything is."""
    dtypes = (parameter.dtype for parameter in module.parameters())
    return next((dtype for dtype in dtypes if dtype.is_floating_point), torch.float32)


def plain_state(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return the module's `state_dict` under the names it has without packed layers.

    The tensors of a packed layer, whose values are no longer those of the files, have none here: they lie on
    the meta device.
    """
    state: dict[str, torch.Tensor] = dict(module.state_dict())
    dtype, meta = plain_dtype(module), torch.device("meta")
    for name, layer in packed_layers(module).items():
        for key in layer.state_dict(prefix=f"{name}."):
            del state[key]
        state |= plain_layer(layer, dtype, meta).state_dict(prefix=f"{name}.")
    return state
