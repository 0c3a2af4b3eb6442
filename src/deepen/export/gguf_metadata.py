"""What a GGUF file says of a model, but for its tokenizer."""

import math
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from gguf import GGUFWriter, RopeScalingType
from numpy.typing import NDArray

from deepen.errors import CheckpointError

# Rotary embeddings with which llama.cpp computes what transformers does, given the values written here.
_ROTARY: Final = frozenset({"default", "linear", "llama3", "yarn"})


def add_metadata(writer: GGUFWriter, config: Any, name: str) -> None:
    """Write a model's sizes and constants.

    Args:
        writer: of the file.
        config: transformers' config of the model, in which every default is filled in.
        name: of the model.

    Raises:
        CheckpointError: its rotary embedding is of a kind llama.cpp has no words for.
    """
    writer.add_name(name)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(head_size(config))
    writer.add_value_length(head_size(config))
    writer.add_vocab_size(config.vocab_size)
    _add_rotary(writer, config)


def head_size(config: Any) -> int:
    """Return the width of one attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def rotary_factors(config: Any) -> NDArray[np.float32] | None:
    """Return by what the rotary frequencies of Llama 3.1 are divided; None for models of another kind.

    The frequencies of f = theta^(-2i/d): long waves are slowed down by `factor`, short ones stay, those in
    between are blended. llama.cpp takes the quotients as a tensor.

    Returns:
        (head size / 2,), float32.
    """
    rotary = _rotary(config)
    if rotary["rope_type"] != "llama3":
        return None
    size = head_size(config)
    frequencies = float(rotary["rope_theta"]) ** (-np.arange(0, size, 2, dtype=np.float64) / size)
    context = rotary.get("original_max_position_embeddings", config.max_position_embeddings)
    turns = context * frequencies / (2 * math.pi)
    low, high = float(rotary["low_freq_factor"]), float(rotary["high_freq_factor"])
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    factors: NDArray[np.float32] = (1 / (kept + (1 - kept) / float(rotary["factor"]))).astype(np.float32)
    return factors


def _add_rotary(writer: GGUFWriter, config: Any) -> None:
    rotary = _rotary(config)
    writer.add_rope_dimension_count(head_size(config))
    writer.add_rope_freq_base(float(rotary["rope_theta"]))
    kind = rotary["rope_type"]
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(RopeScalingType(kind))
        writer.add_rope_scaling_factor(float(rotary["factor"]))
    if kind == "yarn":
        context = rotary.get("original_max_position_embeddings", config.max_position_embeddings)
        writer.add_rope_scaling_orig_ctx_len(int(context))


def _rotary(config: Any) -> Mapping[str, Any]:
    rotary: Mapping[str, Any] = config.rope_parameters
    kind = rotary.get("rope_type", "default")
    if kind not in _ROTARY or rotary.get("partial_rotary_factor", 1.0) != 1.0:
        raise CheckpointError(
            f"config.json: rope_type {kind!r} is not one deepen writes to GGUF; "
            "use llama.cpp's own converter: --converter convert_hf_to_gguf.py"
        )
    return rotary
