from collections.abc import Iterator
from contextlib import contextmanager

from transformers import PreTrainedModel

from deepen.model.record import expansion_of, is_bypassed, mark_bypassed
from deepen.model.structure import blocks_of, depth_config, family_of, install_blocks


@contextmanager
def bypass(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """Run the model with its new blocks switched off: exactly the base.

    Inside the context the model *is* the base: its block list, its config and its cache slots are the
    base's. Bypassing again inside changes nothing. One thread at a time; a KV cache made inside must not be
    used outside.

    Raises:
        PackError: the model has no record of new blocks.
    """
    if is_bypassed(model):
        yield model
        return
    family, layout = family_of(model), expansion_of(model).layout
    blocks, config = list(blocks_of(model, family)), depth_config(model, family)
    base_config = {
        key: [value[position] for position in layout.base_positions] if isinstance(value, list) else value
        for key, value in config.items()
    }
    base_config[family.depth_key] = layout.base_blocks
    try:
        install_blocks(model, family, [blocks[position] for position in layout.base_positions], base_config)
        mark_bypassed(model, True)
        yield model
    finally:
        install_blocks(model, family, blocks, config)
        mark_bypassed(model, False)
