"""Quantised checkpoints: 8-bit floats are expanded where zero bytes are zero, packed weights are refused."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from family_table import MIXED, Line, line
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import deepen
from deepen.blocks import unmerge
from deepen.errors import CheckpointError
from deepen.families import check_quantised, family_for, renumbered_modules

FLOAT8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FLOAT8).max
SIDE = 8
Tensors = dict[str, torch.Tensor]


def blocks_of_scales(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One scale for each square of the matrix."""
    rows, columns = (-(-size // SIDE) for size in weight.shape)
    padded = torch.zeros(rows * SIDE, columns * SIDE)
    padded[: weight.shape[0], : weight.shape[1]] = weight
    scales = padded.view(rows, SIDE, columns, SIDE).abs().amax((1, 3)) / LARGEST
    return (weight / spread(scales, weight)).to(FLOAT8), scales


def spread(scales: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    wide = scales.repeat_interleave(SIDE, 0).repeat_interleave(SIDE, 1)
    return wide[: weight.shape[0], : weight.shape[1]]


def row_scales(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scales = weight.abs().amax(1, keepdim=True) / LARGEST
    return (weight / scales).to(FLOAT8), scales


def one_scale(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scale = weight.abs().max() / LARGEST
    return (weight / scale).to(FLOAT8), scale


def is_kept(name: str, kept: Iterable[str]) -> bool:
    module = name.removesuffix(".weight")
    return "_proj" not in name or any(module == each or module.startswith(f"{each}.") for each in kept)


def quantise(directory: Path, kept: list[str], config: dict[str, Any], scaled: Any, last: str) -> Path:
    """Quantise the projections of a checkpoint, but for the modules kept, and say so in its config."""
    path = directory / "model.safetensors"
    made: Tensors = {}
    for name, tensor in load_file(path).items():
        if is_kept(name, kept) or tensor.ndim != 2:
            made[name] = tensor
            continue
        made[name], made[name.replace("weight", last)] = scaled(tensor)
        if config.get("activation_scheme") == "static" or scaled is row_scales:
            made[name.replace("weight", "input_scale")] = torch.tensor(0.5 + len(made) / 64)
    save_file(made, path, metadata={"format": "pt"})
    stored = json.loads((directory / "config.json").read_text()) | {"quantization_config": config}
    (directory / "config.json").write_text(json.dumps(stored))
    return directory


def dequantise(directory: Path, last: str) -> Path:
    """Turn a checkpoint back by hand: every weight times its scale."""
    held = load_file(directory / "model.safetensors")
    made = {name: tensor for name, tensor in held.items() if not name.endswith("_scale")}
    for name, tensor in made.items():
        if tensor.dtype == FLOAT8:
            made[name] = tensor.float() * held[name.replace("weight", last)]
    out = directory.with_name(f"{directory.name}-turned-back")
    out.mkdir()
    config = json.loads((directory / "config.json").read_text())
    del config["quantization_config"]
    (out / "config.json").write_text(json.dumps(config))
    save_file(made, out / "model.safetensors", metadata={"format": "pt"})
    return out


@torch.no_grad()
def observe(directory: Path) -> list[torch.Tensor]:
    """What plain transformers computes and decodes; without a GPU it turns fp8 back by itself."""
    model, found = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True
    )
    assert not found["missing_keys"], found
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    ids = torch.randint(3, 96, (2, 20), generator=torch.Generator().manual_seed(7))
    decoded = model.eval().generate(ids[:, :8], max_new_tokens=5, do_sample=False, eos_token_id=None)
    return [model(ids).logits, decoded]


def same(one: Path, other: Path) -> bool:
    return all(torch.equal(a, b) for a, b in zip(observe(one), observe(other), strict=True))


def check_new_blocks(base: Path, expanded: Path, new: Iterable[Any]) -> None:
    """Quantised residual writes hold zero bytes, and everything else is that of the block they copy."""
    before, after = (load_file(each / "model.safetensors") for each in (base, expanded))
    for block in new:
        places = f"model.layers.{block.copy_of}.", f"model.layers.{block.index}."
        held = {name.removeprefix(places[0]): t for name, t in before.items() if name.startswith(places[0])}
        found = {name.removeprefix(places[1]): t for name, t in after.items() if name.startswith(places[1])}
        assert held.keys() == found.keys()
        for name, tensor in held.items():
            assert found[name].dtype == tensor.dtype, name
            wanted = torch.zeros_like(tensor) if places[1] + name in block.filled else tensor
            assert torch.equal(found[name].float(), wanted.float()), name
        assert any(found[n.removeprefix(places[1])].dtype == FLOAT8 for n in block.filled)


LINES = [
    line("llama", "Llama", 3, [0, 1, 1], {"attention_bias": True}),
    *(each for each in MIXED if each.name in ("qwen3_moe, some dense, biased", "deepseek_v3")),
]


@pytest.mark.parametrize("each", LINES, ids=lambda each: each.name)
def test_fp8_in_squares(each: Line, tmp_path: Path) -> None:
    base = each.write(tmp_path / "base")
    kept = [f"model.layers.1.mlp.{kind}_proj" for kind in ("gate", "up", "down")] + ["model.layers.2"]
    config = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [SIDE, SIDE],
        "modules_to_not_convert": ["lm_head", *kept],
    }
    quantise(base, kept, config, blocks_of_scales, "weight_scale_inv")
    result = deepen.expand_checkpoint(base, tmp_path / "expanded", **each.placed)
    new = [block for block in result.new_blocks if block.copy_of not in (1, 2)]
    assert new
    check_new_blocks(base, tmp_path / "expanded", new)
    assert same(base, tmp_path / "expanded")
    assert deepen.verify_bytes(base, tmp_path / "expanded").identical


HAND_MADE = {
    "compressed-tensors, a scale a row": (
        {
            "quant_method": "compressed-tensors",
            "format": "float-quantized",
            "config_groups": {
                "group_0": {"targets": ["Linear"], "weights": {"type": "float", "num_bits": 8}}
            },
        },
        "ignore",
        row_scales,
    ),
    "fp8 of vLLM, a scale a matrix": (
        {"quant_method": "fp8", "activation_scheme": "static"},
        "ignored_layers",
        one_scale,
    ),
}


@pytest.mark.parametrize(("config", "key", "scaled"), HAND_MADE.values(), ids=HAND_MADE)
def test_fp8_turned_back_by_hand(config: dict[str, Any], key: str, scaled: Any, tmp_path: Path) -> None:
    base = line("base", "Llama", 4, 1).write(tmp_path / "base")
    kept = ["model.layers.0.self_attn.o_proj", "model.layers.3.mlp"]
    quantise(base, kept, {**config, key: ["lm_head", *kept, "re:.*gate$"]}, scaled, "weight_scale")
    result = deepen.expand_checkpoint(base, tmp_path / "expanded", after=[-1, 2, 3])
    check_new_blocks(base, tmp_path / "expanded", result.new_blocks)
    stored = json.loads((tmp_path / "expanded" / "config.json").read_text())["quantization_config"]
    attention = [f"model.layers.{block}.self_attn.o_proj" for block in (0, 1)]
    assert stored == {
        **config,
        key: ["lm_head", *attention, "model.layers.5.mlp", "model.layers.6.mlp", "re:.*gate$"],
    }
    assert same(dequantise(base, "weight_scale"), dequantise(tmp_path / "expanded", "weight_scale"))


def test_blocks_behind_the_last_move_too(tmp_path: Path) -> None:
    config = {"model_type": "deepseek_v3", "num_hidden_layers": 3, "quantization_config": {}}
    config["quantization_config"] = {"ignore": ["model.layers.3.eh_proj", "model.layers.2.mlp.gate"]}
    changed = renumbered_modules(config, family_for(config), 3, (0, 1, 1, 2))
    assert changed["quantization_config"]["ignore"] == ["model.layers.4.eh_proj", "model.layers.3.mlp.gate"]


LLAMA = {"model_type": "llama"}
LLAVA = {"model_type": "llava", "text_config": {"model_type": "llama"}}


@pytest.mark.parametrize(
    ("config", "name", "names"),
    [
        (LLAMA, "lm_head", ["lm_head"]),
        (LLAMA, "mlp.gate", ["mlp.gate"]),
        (LLAMA, "model.layers.1", ["model.layers.1", "model.layers.2"]),
        (LLAMA, "model.layers.0.mlp", ["model.layers.0.mlp"]),
        (LLAMA, "layers.2.mlp.experts.1.w1", ["layers.3.mlp.experts.1.w1"]),
        (LLAMA, "model.layers.10", ["model.layers.11"]),
        (LLAMA, r"re:.*layers\.1\..*", [r"re:.*layers\.1\..*", r"re:.*layers\.2\..*"]),
        (LLAMA, r"re:.*layers\.\d+\.mlp", [r"re:.*layers\.\d+\.mlp"]),
        (LLAMA, "re:model.layers.*mlp.gate", ["re:model.layers.*mlp.gate"]),
        (LLAMA, r"re:.*layers\.([0-9]+)\.mlp", [r"re:.*layers\.([0-9]+)\.mlp"]),
        (LLAMA, "sublayers.1.x", ["sublayers.1.x"]),
        (LLAVA, "vision_tower.encoder.layers.1.mlp", ["vision_tower.encoder.layers.1.mlp"]),
        (LLAVA, "language_model.model.layers.2.mlp", ["language_model.model.layers.3.mlp"]),
        (LLAVA, "model.language_model.layers.2", ["model.language_model.layers.3"]),
        (LLAVA, r"re:vision_tower.*layers\.1\..*", [r"re:vision_tower.*layers\.1\..*"]),
    ],
)
def test_names_of_modules(config: dict[str, Any], name: str, names: list[str]) -> None:
    config = {**config, "quantization_config": {"ignore": [name, "x"], "layers": {name: 8}}}
    changed = renumbered_modules(config, family_for(config), 3, (0, 1, 1, 2))["quantization_config"]
    assert changed == {"ignore": [*names, "x"], "layers": dict.fromkeys(names, 8)}


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (LLAMA, r"re:.*layers\.(0|1)\..*"),
        (LLAMA, r"re:.*layers\.[0-2]\..*"),
        (LLAMA, r"re:.*layers\.\d\.mlp"),
        (LLAVA, r"re:.*layers\.1\..*"),
    ],
)
def test_patterns_that_cannot_be_carried_over(config: dict[str, Any], name: str) -> None:
    config = {**config, "quantization_config": {"ignore": [name]}}
    with pytest.raises(CheckpointError, match="picks blocks by number"):
        renumbered_modules(config, family_for(config), 3, (0, 1, 1, 2))


def group(**weights: Any) -> dict[str, Any]:
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": weights}}}


@pytest.mark.parametrize(
    "config",
    [
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "awq", "bits": 4},
        {"quant_method": "mxfp4"},
        {"quant_method": "quanto", "weights": "int8"},
        {"quant_method": "torchao"},
        {"load_in_4bit": True},
        {"quant_method": "bitsandbytes", "load_in_8bit": True},
        group(type="int", num_bits=4),
        group(type="int", num_bits=8),
        group(type="float", num_bits=4),
        group(type="float", num_bits=8) | {"sparsity_config": {"format": "sparse-24-bitmask"}},
        {"quant_method": "compressed-tensors"},
        {"quant_method": "compressed-tensors", "config_groups": {"group_0": {}}},
        {"quant_method": "compressed-tensors", "config_groups": {"group_0": None}},
        {"quant_method": "compressed-tensors", "config_groups": ["weights"], "sparsity_config": 3},
        {"bits": 4},
        "4bit",
    ],
    ids=str,
)
@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_packed_weights_are_refused(config: Any, key: str) -> None:
    with pytest.raises(CheckpointError, match="need not mean zero") as caught:
        check_quantised({"model_type": "llama", key: config}, "here/config.json")
    first, *second = str(caught.value).split("\n")
    assert first.startswith(f"here/config.json: {key}: packed by ")
    assert len(second) == 1
    assert "the unquantised model" in second[0]


def test_floats_are_not() -> None:
    check_quantised({"quantization_config": group(type="float", num_bits=8)}, "here")
    check_quantised({"quantization_config": {"quant_method": "fp8"}}, "here")
    check_quantised({"quantization_config": None}, "here")
    check_quantised({}, "here")


def test_a_gain_that_must_be_minus_one_is_refused(tmp_path: Path) -> None:
    base = line("base", "Gemma2", 2, 1).write(tmp_path / "base")
    path = base / "model.safetensors"
    held = load_file(path)
    gain = "model.layers.1.post_feedforward_layernorm.weight"
    save_file({**held, gain: held[gain].to(FLOAT8)}, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"{gain}' is F8_E4M3") as caught:
        deepen.expand_checkpoint(base, tmp_path / "expanded", after=[1])
    assert str(caught.value).count("\n") == 1
    assert not (tmp_path / "expanded").exists()


def test_taken_off_again_byte_for_byte(tmp_path: Path) -> None:
    base = line("base", "Llama", 3, 1).write(tmp_path / "base")
    kept = ["model.layers.1.mlp"]
    config = {"quant_method": "fp8", "weight_block_size": [SIDE, SIDE], "modules_to_not_convert": kept}
    quantise(base, kept, config, blocks_of_scales, "weight_scale_inv")
    deepen.expand_checkpoint(base, tmp_path / "expanded", after=[1, 1, 2])
    unmerge(tmp_path / "expanded", tmp_path / "again")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (base / name).read_bytes()
