from torch import nn
from transformers import PreTrainedModel

from deepen.errors import PackError
from deepen.model.record import new_parameters


def freeze_base(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """Make the new blocks trainable and everything else not; return what trains, by exact name.

    Embeddings, head and final norm are frozen too (arXiv 2401.02415 section 3.2), and so are the new blocks
    of earlier expansions.

    Raises:
        PackError: the model has no active new blocks, or one of their parameters is the base's too.
    """
    recorded = new_parameters(model)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for parameter in recorded.values():
        parameter.requires_grad_(True)
    trained = {n for n, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}
    if odd := trained ^ recorded.keys():
        raise PackError(f"parameter {min(odd)!r} is shared with the base: it cannot train alone")
    return recorded


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return every parameter that requires a gradient, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}
