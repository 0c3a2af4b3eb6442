"""The tiny checkpoints that `test_contract.py` holds every family to: one line a configuration."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Tensors = dict[str, Any]

SIZES = {
    "vocab_size": 96,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


@dataclass(frozen=True, kw_only=True)
class Line:
    """One configuration.

    Attributes:
        name: says what is special about it.
        config: name of the config class without `Config`.
        depth: number of base blocks.
        placed: where new blocks go, as keywords of `expand_checkpoint`.
        fields: config fields besides `SIZES` and the depth.
        hub: what stands otherwise in the config.json of the hub: None for a key that is not there.
        files: what the tensors of hub files are otherwise.
    """

    name: str
    config: str
    depth: int
    placed: Mapping[str, Any]
    fields: Mapping[str, Any] = field(default_factory=dict)
    hub: Mapping[str, Any] = field(default_factory=dict)
    files: Callable[[Tensors], Tensors] | None = None

    def write(self, directory: Path) -> Path:
        """Write the checkpoint, every weight perturbed: a tensor in the wrong place shows."""
        import torch
        import transformers
        from safetensors.torch import load_file, save_file

        kind = getattr(transformers, f"{self.config}Config")
        known = {*kind.__dataclass_fields__, *kind.attribute_map}
        sizes = {key: value for key, value in SIZES.items() if key in known}
        torch.manual_seed(0)
        config = kind(**{**sizes, "num_hidden_layers": self.depth, **self.fields})
        model = transformers.AutoModelForCausalLM.from_config(config).float()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        model.save_pretrained(directory)
        stored = json.loads((directory / "config.json").read_text()) | self.hub
        absent = {key for key, value in self.hub.items() if value is None}
        kept = {key: value for key, value in stored.items() if key not in absent}
        (directory / "config.json").write_text(json.dumps(kept))
        if self.files:
            path = directory / "model.safetensors"
            save_file(self.files(load_file(path)), path, metadata={"format": "pt"})
        return directory


def line(
    name: str,
    config: str,
    depth: int,
    placed: int | list[int] | Mapping[str, Any],
    fields: Mapping[str, Any] | None = None,
    **more: Any,
) -> Line:
    """Write a line short: `placed` is a number of new blocks, or the blocks they stand on."""
    if isinstance(placed, int):
        placed = {"blocks": placed}
    elif isinstance(placed, list):
        placed = {"after": placed}
    return Line(name=name, config=config, depth=depth, placed=placed, fields=fields or {}, **more)


# --- what hub files have and transformers no longer writes


def old_llama(tensors: Tensors) -> Tensors:
    """Llama 2 files hold the frequencies of the positions in every block."""
    return _with_buffers(tensors, "model.layers.{}.", {"self_attn.rotary_emb.inv_freq": [2]})


def old_gpt2(tensors: Tensors) -> Tensors:
    """GPT-2's have no prefix, and a causal mask in every block."""
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    return _with_buffers(bare, "h.{}.", {"attn.bias": [1, 1, 64, 64], "attn.masked_bias": []})


def old_gptj(tensors: Tensors) -> Tensors:
    """GPT-J's have a causal mask in every block."""
    return _with_buffers(tensors, "transformer.h.{}.", {"attn.bias": [1, 1, 64, 64], "attn.masked_bias": []})


def old_neox(tensors: Tensors) -> Tensors:
    """Pythia's have a causal mask and frequencies in every block."""
    buffers = {"bias": [1, 1, 64, 64], "masked_bias": [], "rotary_emb.inv_freq": [2]}
    return _with_buffers(tensors, "gpt_neox.layers.{}.attention.", buffers)


def bare(tensors: Tensors) -> Tensors:
    """BLOOM's and some of OPT's leave the base model's prefix away."""
    return {name.removeprefix("transformer.").removeprefix("model."): t for name, t in tensors.items()}


def _with_buffers(tensors: Tensors, place: str, shapes: Mapping[str, list[int]]) -> Tensors:
    import torch

    depth = 0
    while any(name.startswith(place.format(depth)) for name in tensors):
        depth += 1
    made = {
        place.format(block) + name: torch.full(shape, 1.0)
        for block in range(depth)
        for name, shape in shapes.items()
    }
    return tensors | made


# --- dense families

_TIED, _UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}
_BIASED = {"attention_bias": True, "mlp_bias": True}
_WINDOW = {"sliding_window": 6}
_NO_LIST = {"layer_types": None}
_QWEN_WINDOW = {"use_sliding_window": True, "sliding_window": 6}
_SMOLL_WINDOW = {"no_rope_layer_interval": 2, **_QWEN_WINDOW}
_FALCON_40B = {"new_decoder_architecture": True, "num_kv_heads": 2}
_FALCON_RW = {"alibi": True, "parallel_attn": False, "multi_query": False, "bias": True}
_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
_MIXED = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]

DENSE = (
    line("llama", "Llama", 4, 2),
    line("llama tied and biased", "Llama", 5, 3, {**_TIED, **_BIASED}),
    line("llama 2, old files", "Llama", 4, [-1, 1, 1, 3], files=old_llama),
    line("llama 24+8", "Llama", 24, 8),
    line("llama 36+9", "Llama", 36, 9),
    line("llama 40+10", "Llama", 40, 10),
    line("internlm3 biased", "InternLM3", 4, 3, _BIASED),
    line("seed_oss", "SeedOss", 3, 2, {"attention_bias": True, "attention_out_bias": True, "mlp_bias": True}),
    line("helium", "Helium", 3, 2),
    line("mistral with a window", "Mistral", 4, 3, _WINDOW),
    line("mistral without", "Mistral", 4, 1, {"sliding_window": None, **_TIED}),
    line("ministral, mixed", "Ministral", 4, [0, 1, 2], {"layer_types": _MIXED, **_WINDOW, **_ROPE}),
    line("ministral, no list", "Ministral", 3, [0, 0], _WINDOW | _ROPE, hub=_NO_LIST),
    line("ministral3", "Ministral3", 3, 2),
    line("qwen2", "Qwen2", 4, 3, _TIED),
    line(
        "qwen2, upper blocks slide, no list",
        "Qwen2",
        4,
        [0, 1, 3],
        {**_QWEN_WINDOW, "max_window_layers": 2},
        hub=_NO_LIST,
    ),
    line(
        "qwen2, a list of its own, 24+8",
        "Qwen2",
        24,
        8,
        {**_WINDOW, "use_sliding_window": True, "layer_types": _MIXED * 6},
    ),
    line(
        "qwen2, none slides until it grows, no list",
        "Qwen2",
        4,
        2,
        {**_QWEN_WINDOW, "max_window_layers": 4},
        hub=_NO_LIST,
    ),
    line("qwen3", "Qwen3", 4, 2, _TIED),
    line(
        "qwen3 biased, upper blocks slide, no list",
        "Qwen3",
        4,
        [0, 1],
        {**_QWEN_WINDOW, "max_window_layers": 2, "attention_bias": True},
        hub=_NO_LIST,
    ),
    line("gemma", "Gemma", 3, 2),
    line("gemma biased, untied", "Gemma", 3, 2, {"attention_bias": True, **_UNTIED}),
    line("gemma2", "Gemma2", 4, 2, _WINDOW),
    line(
        "gemma2, biased, no list",
        "Gemma2",
        5,
        [-1, 1, 2, 2],
        {**_WINDOW, "attention_bias": True},
        hub=_NO_LIST,
    ),
    line("gemma3", "Gemma3Text", 7, 2, _WINDOW),
    line("gemma3, no list", "Gemma3Text", 7, [1, 4, 5], _WINDOW, hub=_NO_LIST),
    line(
        "gemma3, every third, no list",
        "Gemma3Text",
        4,
        3,
        {**_WINDOW, "layer_types": None},
        hub=_NO_LIST | {"sliding_window_pattern": 3},
    ),
    line("phi", "Phi", 3, 2),
    line("phi 2, norms of queries and keys", "Phi", 3, [0, 0], {"qk_layernorm": True}),
    line("phi3 with a window", "Phi3", 4, 3, _WINDOW),
    line("phi4 mini, tied", "Phi3", 4, 2, {**_TIED, "partial_rotary_factor": 0.5}),
    line("olmo", "Olmo", 4, 3, {"clip_qkv": 2.0}),
    line("olmo biased, tied", "Olmo", 3, 2, {"attention_bias": True, **_TIED}),
    line("olmo2", "Olmo2", 4, 2),
    line("olmo2 biased", "Olmo2", 5, 3, {"attention_bias": True}),
    line("olmo3", "Olmo3", 5, 2, _WINDOW),
    line("olmo3, no list", "Olmo3", 5, [0, 2, 4], _WINDOW, hub=_NO_LIST),
    line("glm", "Glm", 3, 2, {"attention_bias": True}),
    line("glm unbiased", "Glm", 3, 2),
    line("glm4", "Glm4", 4, 3, {"attention_bias": True}),
    line("cohere", "Cohere", 3, 2),
    line(
        "cohere biased, norms of queries and keys",
        "Cohere",
        3,
        2,
        {"attention_bias": True, "use_qk_norm": True},
    ),
    line("cohere2", "Cohere2", 5, 2, _WINDOW),
    line("cohere2, no list", "Cohere2", 5, [0, 2, 3], _WINDOW, hub=_NO_LIST | {"sliding_window_pattern": 4}),
    line("starcoder2", "Starcoder2", 3, 2, _WINDOW),
    line("starcoder2 unbiased, untied", "Starcoder2", 3, 2, {"use_bias": False, **_UNTIED}),
    line("gpt2", "GPT2", 4, 3),
    line("gpt2, old files", "GPT2", 4, [-1, 0, 3, 3], files=old_gpt2),
    line("pythia, side by side", "GPTNeoX", 4, 3),
    line(
        "gpt_neox, one after the other, unbiased, old files",
        "GPTNeoX",
        4,
        2,
        {"use_parallel_residual": False, "attention_bias": False},
        files=old_neox,
    ),
    line("gpt_neox tied", "GPTNeoX", 3, 2, _TIED),
    line("gptj", "GPTJ", 3, 2, {"rotary_dim": 4}),
    line("gptj, old files", "GPTJ", 3, 2, {"rotary_dim": 4}, files=old_gptj),
    line("falcon 7b", "Falcon", 3, 2),
    line("falcon 40b", "Falcon", 3, 2, _FALCON_40B),
    line("falcon, new with one norm", "Falcon", 3, 2, {**_FALCON_40B, "num_ln_in_parallel_attn": 1}),
    line("falcon rw", "Falcon", 3, 2, _FALCON_RW),
    line("opt", "OPT", 4, 3, {"ffn_dim": 24}),
    line(
        "opt without biases and norms, bare names",
        "OPT",
        3,
        2,
        {"ffn_dim": 24, "enable_bias": False, "layer_norm_elementwise_affine": False},
        files=bare,
    ),
    line("bloom", "Bloom", 3, 2),
    line("bloom, bare names", "Bloom", 4, [0, 0, 3], files=bare),
    line(
        "granite",
        "Granite",
        4,
        2,
        {"residual_multiplier": 0.22, "embedding_multiplier": 12.0, "logits_scaling": 8.0},
    ),
    line("granite biased, tied", "Granite", 3, 2, {**_BIASED, **_TIED}),
    line("smollm3", "SmolLM3", 5, 2),
    line("smollm3, no lists", "SmolLM3", 5, [0, 2, 3], hub={"no_rope_layers": None, "layer_types": None}),
    line(
        "smollm3, every second slides, no lists",
        "SmolLM3",
        4,
        3,
        _SMOLL_WINDOW,
        hub={"no_rope_layers": None, "layer_types": None},
    ),
    line(
        "smollm3, positions everywhere, no lists",
        "SmolLM3",
        4,
        2,
        {"no_rope_layer_interval": 50},
        hub={"no_rope_layers": None, "layer_types": None},
    ),
    line("stablelm", "StableLm", 3, 2),
    line(
        "stablelm 2, side by side",
        "StableLm",
        3,
        2,
        {"use_parallel_residual": True, "qk_layernorm": True, "use_qkv_bias": True},
    ),
    line("ernie4_5", "Ernie4_5", 3, 2, {"use_bias": True}),
    line("arcee", "Arcee", 3, 2, _BIASED),
    line("nemotron", "Nemotron", 3, 2, _BIASED),
    line("hunyuan", "HunYuanDenseV1", 3, 2, {"attention_bias": True, **_TIED, **_ROPE}),
    line("exaone4", "Exaone4", 5, 2, _WINDOW),
    line("exaone4, no list", "Exaone4", 5, [0, 2, 3], _WINDOW, hub=_NO_LIST),
    line("apertus", "Apertus", 3, 2, {"attention_bias": True}),
)

# --- mixtures of experts


def in_memory(tensors: Tensors) -> Tensors:
    """What was saved as transformers holds it has the experts of a block in one matrix."""
    import re

    import torch

    numbers = {}
    for name in tensors:
        if found := re.fullmatch(r"(.*\.experts)\.(\d+)\.(\w+)\.weight", name):
            numbers.setdefault((found[1], found[3]), set()).add(int(found[2]))

    def stacked(place: str, kind: str) -> torch.Tensor:
        count = len(numbers[place, kind])
        return torch.stack([tensors[f"{place}.{expert}.{kind}.weight"] for expert in range(count)])

    made = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    for place in {place for place, _ in numbers}:
        gate, up, down = ("w1", "w3", "w2") if (place, "w1") in numbers else _PROJECTIONS
        made[f"{place}.gate_up_proj"] = torch.cat([stacked(place, gate), stacked(place, up)], dim=1)
        made[f"{place}.down_proj"] = stacked(place, down)
    return {name.replace("block_sparse_moe", "mlp"): tensor for name, tensor in made.items()}


_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
_MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
_LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
_EXPERTS = {"num_experts": 4, **_MOE}
_SHARED = {"shared_expert_intermediate_size": 20, **_EXPERTS}
_ROUTED = {"n_routed_experts": 4, "n_shared_experts": 1, "n_group": 2, "topk_group": 1, **_MOE}
_RANKS = {"kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 4}
_LATENT = {"q_lora_rank": 8, "num_key_value_heads": 4, **_RANKS, **_ROUTED}
_LITE = {**_LATENT, "q_lora_rank": None}
_HEADS = {"linear_num_value_heads": 4, "linear_num_key_heads": 2}
_LINEAR = {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "head_dim": 8, **_HEADS}
_DELTA = {**_LINEAR, **_SHARED}

MIXED = (
    line("mixtral", "Mixtral", 4, 2, _LOCAL),
    line(
        "mixtral, 12 experts, tied", "Mixtral", 5, 3, {**_LOCAL, "num_local_experts": 12, **_TIED, **_WINDOW}
    ),
    line("mixtral as in memory", "Mixtral", 3, [-1, 1, 1], _LOCAL, files=in_memory),
    line("qwen2_moe", "Qwen2Moe", 4, 2, _SHARED),
    line(
        "qwen2_moe, some dense, every second slides, no list",
        "Qwen2Moe",
        5,
        [0, 1, 3],
        # Of two experts a token, two are so near a tie that any step swaps them.
        {**_SHARED, **_QWEN_WINDOW, "mlp_only_layers": [1], "max_window_layers": 3, "num_experts_per_tok": 1},
        hub=_NO_LIST,
    ),
    line(
        "qwen2_moe, every second dense, unbiased",
        "Qwen2Moe",
        6,
        4,
        {**_SHARED, **_QWEN_WINDOW, "mlp_only_layers": [3], "decoder_sparse_step": 2, "qkv_bias": False},
    ),
    line("qwen2_moe as in memory", "Qwen2Moe", 3, 2, {**_SHARED, "mlp_only_layers": [0]}, files=in_memory),
    line("qwen3_moe", "Qwen3Moe", 4, 3, _EXPERTS),
    line(
        "qwen3_moe, some dense, biased",
        "Qwen3Moe",
        4,
        [0, 2, 3],
        {**_EXPERTS, **_QWEN_WINDOW, "mlp_only_layers": [0, 2], "attention_bias": True},
    ),
    line("qwen3_moe, every second dense", "Qwen3Moe", 5, [0, 1, 4], {**_EXPERTS, "decoder_sparse_step": 2}),
    line("qwen3_moe, all dense", "Qwen3Moe", 3, 2, {**_EXPERTS, "mlp_only_layers": [0, 1, 2]}),
    line("qwen3_moe as in memory", "Qwen3Moe", 3, 2, {**_EXPERTS, "mlp_only_layers": [0]}, files=in_memory),
    line("qwen3_next", "Qwen3Next", 4, 2, _DELTA),
    line(
        "qwen3_next, every third full, some dense, no list",
        "Qwen3Next",
        6,
        [1, 5],
        {**_DELTA, "mlp_only_layers": [1], "attention_bias": True, "full_attention_interval": 3},
        hub=_NO_LIST | {"full_attention_interval": 3},
    ),
    line(
        "qwen3_next, every second dense, no list",
        "Qwen3Next",
        4,
        [1, 3],
        {**_DELTA, "decoder_sparse_step": 2},
        hub=_NO_LIST,
    ),
    line("qwen3_5", "Qwen3_5Text", 4, [1, 3], _LINEAR),
    line(
        "qwen3_5, every third full, no list",
        "Qwen3_5Text",
        5,
        [1, 2],
        {**_LINEAR, "full_attention_interval": 3},
        hub=_NO_LIST | {"full_attention_interval": 3},
    ),
    line("qwen3_5_moe", "Qwen3_5MoeText", 4, [1, 3], _DELTA),
    line("olmoe", "Olmoe", 4, 3, {"num_experts": 4, "num_experts_per_tok": 2, "clip_qkv": 2.0}),
    line(
        "olmoe biased, tied",
        "Olmoe",
        3,
        2,
        {"num_experts": 4, "num_experts_per_tok": 2, "attention_bias": True, **_TIED},
    ),
    line("gpt_oss", "GptOss", 4, 2, {**_LOCAL, **_WINDOW}),
    line("gpt_oss, no list", "GptOss", 5, [0, 1, 4], {**_LOCAL, **_WINDOW}, hub=_NO_LIST),
    line("gpt_oss unbiased", "GptOss", 3, 2, {**_LOCAL, **_WINDOW, "attention_bias": False}),
    line("deepseek_v2", "DeepseekV2", 4, 2, {**_LATENT, "first_k_dense_replace": 1}),
    line(
        "deepseek_v2 lite, biased, two dense",
        "DeepseekV2",
        4,
        [0, 1, 3],
        {**_LITE, "first_k_dense_replace": 2, "attention_bias": True, "mlp_bias": True},
    ),
    line("deepseek_v3", "DeepseekV3", 5, 2, {**_LATENT, "first_k_dense_replace": 3}),
    line(
        "deepseek_v3, a dense copy below",
        "DeepseekV3",
        4,
        [-1, 0, 2],
        {**_LATENT, "first_k_dense_replace": 1, "attention_bias": True},
    ),
    line("deepseek_v3, no dense", "DeepseekV3", 3, 2, {**_LITE, "first_k_dense_replace": 0}),
    line(
        "granitemoe",
        "GraniteMoe",
        4,
        2,
        {**_LOCAL, "residual_multiplier": 0.22, "embedding_multiplier": 12.0, "logits_scaling": 8.0},
    ),
    line("granitemoe biased, tied", "GraniteMoe", 3, 2, {**_LOCAL, "attention_bias": True, **_TIED}),
    line("phimoe", "Phimoe", 4, 2, _LOCAL),
    line(
        "phimoe biased",
        "Phimoe",
        3,
        2,
        {**_LOCAL, **_WINDOW, "attention_bias": True, "lm_head_bias": True},
    ),
    line(
        "glm4_moe",
        "Glm4Moe",
        4,
        2,
        {**_ROUTED, "first_k_dense_replace": 1, "attention_bias": True, "use_qk_norm": True},
    ),
    line(
        "dots1, upper blocks slide, no list",
        "Dots1",
        4,
        [0, 1, 3],
        {**_ROUTED, **_WINDOW, "first_k_dense_replace": 1, "max_window_layers": 2},
        hub=_NO_LIST,
    ),
)

LINES = (*DENSE, *MIXED)
