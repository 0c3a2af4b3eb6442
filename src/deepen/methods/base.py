"""The base inside a model that is being trained: the model without what trains."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from transformers import PreTrainedModel

from deepen.methods.method import Method
from deepen.model import bypass


def base_inside(
    method: Method,
) -> Callable[[PreTrainedModel], AbstractContextManager[PreTrainedModel]] | None:
    """Return the context in which a model is its base; None where it is not inside it any more."""
    return {"blocks": bypass, "lora": without_adapter}.get(method.name)


@contextmanager
def without_adapter(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """Run a model with its adapters (by peft) switched off."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import AuxiliaryTrainingWrapper

    kinds = (BaseTunerLayer, AuxiliaryTrainingWrapper)
    layers = [module for module in model.modules() if isinstance(module, kinds)]
    held = [layer._disable_adapters for layer in layers]
    try:
        for layer in layers:
            # peft's own switch freezes the adapters too, which processes that train together would see.
            layer._disable_adapters = True
        yield model
    finally:
        for layer, before in zip(layers, held, strict=True):
            layer._disable_adapters = before
