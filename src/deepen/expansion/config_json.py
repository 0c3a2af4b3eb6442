"""The `config.json` of a model whose blocks stand in another order."""

from collections.abc import Mapping, Sequence
from typing import Any

from deepen.expansion.layout import Layout
from deepen.families import Family, renumbered_modules


def expand_config(config: Mapping[str, Any], family: Family, layout: Layout) -> dict[str, Any]:
    """Return the `config.json` of the expanded model: its depth, and all that depends on block numbers.

    Raises:
        CheckpointError: a per-layer list has not one entry a block.
        LayoutError: the config has no words for the kinds of blocks in this order.
    """
    return reordered_config(config, family, layout.base_blocks, layout.origins)


def reordered_config(
    config: Mapping[str, Any], family: Family, depth: int, origins: Sequence[int]
) -> dict[str, Any]:
    """Return the `config.json` of a model whose block j is block `origins[j]` of a model of `depth` blocks.

    Raises:
        CheckpointError: a per-layer list has not one entry a block.
        LayoutError: the config has no words for the kinds of blocks in this order.
    """
    text = family.text_config(config)
    changed = family.per_layer.reorder(text, depth, origins)
    changed |= renumbered_modules(text, family, depth, origins)
    reordered = {**text, family.depth_key: len(origins), **changed}
    if not family.section:
        return reordered
    return {**config, **renumbered_modules(config, family, depth, origins), family.section: reordered}
