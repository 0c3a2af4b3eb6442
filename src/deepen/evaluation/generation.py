"""Whoever continues token sequences: a transformers model, or vLLM in its place."""

from typing import Any, Protocol

import torch


class Generator(Protocol):
    """What the harness and conversations ask of a model that writes: a transformers model is one as it is.

    Attributes:
        config: the model's.
        generation_config: where its texts end, and its penalties.
    """

    config: Any
    generation_config: Any

    @property
    def device(self) -> torch.device:
        """Where token ids go."""

    def generate(
        self, *, input_ids: torch.Tensor, attention_mask: torch.Tensor, **options: Any
    ) -> torch.Tensor:
        """Continue each row, padded on the left; return it with what was written, padded on the right.

        Args:
            input_ids: shape (rows, width).
            attention_mask: the same shape, 0 where a row is padded.
            options: of transformers' `generate`: a `generation_config`, or its fields by name.
        """
