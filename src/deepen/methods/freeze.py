from typing import Final

from torch import nn
from transformers import PreTrainedModel

from deepen.config import FreezeSection
from deepen.expansion.layout import plan_layout
from deepen.methods.full import Full
from deepen.methods.method import nearest, widen
from deepen.model.structure import blocks_of, family_of


class Freeze(Full):
    """Train some existing blocks and freeze the rest: what new blocks are to be compared with.

    The blocks are those that `blocks` would copy at the same number, so both train equally many parameters at
    equal places.
    """

    name: Final = "freeze"  # type: ignore[misc]

    def __init__(self, section: FreezeSection, match_parameters: int | None = None) -> None:
        """Take the settings of a recipe; `match_parameters` decides the number of blocks instead."""
        self._section, self._match = section, match_parameters

    def prepare(self, model: PreTrainedModel) -> dict[str, nn.Parameter]:
        """Make the chosen blocks trainable and everything else not."""
        blocks = blocks_of(model, family_of(model))
        count = self._section.blocks
        if self._match is not None:
            count = nearest(self._match, sum(p.numel() for p in blocks[0].parameters()))
        layout = plan_layout(len(blocks), blocks=min(count, len(blocks)), placement=self._section.placement)
        model.requires_grad_(False)
        for chosen in layout.new_blocks:
            blocks[chosen.copy_of].requires_grad_(True)
        return widen({name: p for name, p in model.named_parameters() if p.requires_grad})
