from dataclasses import replace

from torch import nn
from transformers import PreTrainedModel

from deepen.errors import PackError
from deepen.expansion import NewRows
from deepen.model.record import new_parameters
from deepen.model.rows import part_rows
from deepen.model.state import state_of


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


def train_rows(model: PreTrainedModel, rows: NewRows) -> dict[str, nn.Parameter]:
    """Have rows of new tokens train beside the new blocks, and belong to them: both are bypassed together.

    They are parameters of their own beside their tables, which stay as they are; `save_blocks` writes both.

    Args:
        model: with one pack of new blocks active.
        rows: the last ones of the base's tables.

    Returns:
        The rows, by exact name.

    Raises:
        PackError: several packs are active, or none.
    """
    state = state_of(model)
    if len(state.active) != 1:
        raise PackError(f"rows train with one pack of new blocks, and {len(state.active)} are active")
    name = state.active[0]
    held = state.packs[name]
    state.packs[name] = replace(held, expansion=held.expansion.model_copy(update={"new_rows": rows}))
    return part_rows(model, rows, lambda: name in state.active)


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return every parameter that requires a gradient, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}
