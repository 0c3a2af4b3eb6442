"""Models of several towers: the text tower grows, the others stay, and an image is read as before."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

import deepen
from deepen.errors import FamilyError
from deepen.families import family_for, load_families, load_refusals, load_towers

IMAGE_TOKEN = 60
TEXT = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
AXES = {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}}
DELTA = {"linear_key_head_dim": 8, "linear_value_head_dim": 8}
DELTA |= {"linear_num_value_heads": 4, "linear_num_key_heads": 2}
MARKS = {"video_token_id": 59, "vision_start_token_id": 58, "vision_end_token_id": 57}


@dataclass(frozen=True, kw_only=True)
class Model:
    """One model of several towers.

    Attributes:
        config: name of the config class without `Config`.
        text: its text config, besides `TEXT`.
        vision: its vision config.
        fields: its other config fields.
        pixels: shape of an image.
        tokens: how many tokens stand for the image.
        image: further inputs that go with the image.
        marks: name of the input that says which tokens are the image's.
        absent: fields of the config.json of the hub that are not there.
    """

    config: str
    text: Mapping[str, Any]
    vision: Mapping[str, Any]
    fields: Mapping[str, Any] = field(default_factory=dict)
    pixels: tuple[int, ...] = (1, 3, 16, 16)
    tokens: int = 4
    image: Mapping[str, Any] = field(default_factory=dict)
    marks: str | None = None
    absent: tuple[str, ...] = ()

    def write(self, directory: Path) -> Path:
        """Write a tiny one, every weight perturbed."""
        kind = getattr(transformers, f"{self.config}Config")
        key = "image_token_index" if "image_token_index" in kind.__dataclass_fields__ else "image_token_id"
        text, vision = TEXT | self.text, dict(self.vision)
        config = kind(text_config=text, vision_config=vision, **{key: IMAGE_TOKEN}, **self.fields)
        torch.manual_seed(0)
        model = getattr(transformers, f"{self.config}ForConditionalGeneration")(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        model.save_pretrained(directory)
        stored = json.loads((directory / "config.json").read_text())
        stored["text_config"] = {k: v for k, v in stored["text_config"].items() if k not in self.absent}
        (directory / "config.json").write_text(json.dumps(stored))
        return directory

    def inputs(self) -> list[dict[str, Any]]:
        """A text alone, and a text about an image."""
        generator = torch.Generator().manual_seed(1)
        text = torch.randint(3, 50, (1, 12), generator=generator)
        image = torch.full((1, self.tokens), IMAGE_TOKEN)
        both = torch.cat([text[:, :4], torch.tensor([[MARKS["vision_start_token_id"]]]), image, text], dim=1)
        seen = {"pixel_values": torch.randn(self.pixels, generator=generator)}
        seen |= {key: torch.tensor(value) for key, value in self.image.items()}
        if self.marks:
            seen[self.marks] = (both == IMAGE_TOKEN).long()
        return [{"input_ids": text}, {"input_ids": both, **seen}]


def clip(**fields: Any) -> dict[str, Any]:
    return {"model_type": "clip_vision_model", "projection_dim": 16, **VISION, **fields}


def siglip(**fields: Any) -> dict[str, Any]:
    return {"model_type": "siglip_vision_model", **VISION, **fields}


_QWEN = {"patch_size": 4, "in_channels": 3, "depth": 2, "num_heads": 2, "hidden_size": 16}
_LISTLESS = ("layer_types",)
MODELS = {
    "llava of llama": Model(
        config="Llava", text={"model_type": "llama", "num_hidden_layers": 3}, vision=clip()
    ),
    "llava of qwen2": Model(
        config="Llava",
        text={"model_type": "qwen2", "num_hidden_layers": 4, "use_sliding_window": True}
        | {"sliding_window": 6, "max_window_layers": 2},
        vision=clip(),
        absent=_LISTLESS,
    ),
    "llava that leaves the depth to its class": Model(
        config="Llava",
        text={"model_type": "llama", "num_hidden_layers": 32, "hidden_size": 8, "head_dim": 4},
        vision=clip(),
        absent=("num_hidden_layers",),
    ),
    "llava_next": Model(
        config="LlavaNext",
        text={"model_type": "mistral", "num_hidden_layers": 3},
        vision=clip(),
        fields={"image_grid_pinpoints": [[16, 16]]},
        pixels=(1, 2, 3, 16, 16),
        tokens=10,
        image={"image_sizes": [[16, 16]]},
    ),
    "llava_onevision": Model(
        config="LlavaOnevision",
        text={"model_type": "qwen2", "num_hidden_layers": 3},
        vision=siglip(),
        fields={"image_grid_pinpoints": [[16, 16]]},
        pixels=(1, 2, 3, 16, 16),
        tokens=10,
        image={"image_sizes": [[16, 16]]},
    ),
    "gemma3": Model(
        config="Gemma3",
        text={"model_type": "gemma3_text", "num_hidden_layers": 7, "sliding_window": 6},
        vision=siglip(),
        fields={"mm_tokens_per_image": 4, "boi_token_index": 61, "eoi_token_index": 62},
        marks="token_type_ids",
        absent=_LISTLESS,
    ),
    "mistral3": Model(
        config="Mistral3",
        text={"model_type": "mistral", "num_hidden_layers": 3},
        vision={"model_type": "pixtral", "head_dim": 8, **VISION, "image_size": 32},
        fields={"spatial_merge_size": 2},
        pixels=(1, 3, 32, 32),
        image={"image_sizes": [[32, 32]]},
    ),
    "paligemma": Model(
        config="PaliGemma",
        text={"model_type": "gemma", "num_hidden_layers": 3},
        vision=siglip(projection_dim=16),
        fields={"projection_dim": 16},
        marks="token_type_ids",
    ),
    "aya_vision": Model(
        config="AyaVision",
        text={"model_type": "cohere2", "num_hidden_layers": 5, "sliding_window": 6},
        vision=siglip(),
        fields={"vision_feature_layer": -1, "downsample_factor": 2, "adapter_layer_norm_eps": 1e-6},
        tokens=1,
    ),
    "internvl": Model(
        config="InternVL",
        text={"model_type": "qwen2", "num_hidden_layers": 3},
        vision={"model_type": "internvl_vision", **VISION, "image_size": [16, 16], "patch_size": [4, 4]},
    ),
    "qwen2_vl": Model(
        config="Qwen2VL",
        text={"num_hidden_layers": 4, "use_sliding_window": True, "sliding_window": 6, **AXES}
        | {"max_window_layers": 3},
        vision={"embed_dim": 16, "mlp_ratio": 2, **_QWEN},
        fields=MARKS,
        pixels=(16, 96),
        image={"image_grid_thw": [[1, 4, 4]]},
        marks="mm_token_type_ids",
        absent=_LISTLESS,
    ),
    "qwen3_5": Model(
        config="Qwen3_5",
        text={"model_type": "qwen3_5_text", "num_hidden_layers": 5, **DELTA, **AXES},
        vision={**_QWEN, "intermediate_size": 24, "out_hidden_size": 16},
        fields=MARKS,
        pixels=(16, 96),
        image={"image_grid_thw": [[1, 4, 4]]},
        marks="mm_token_type_ids",
        absent=_LISTLESS,
    ),
    "qwen3_5_moe": Model(
        config="Qwen3_5Moe",
        text={"model_type": "qwen3_5_moe_text", "num_hidden_layers": 4, **DELTA, **AXES}
        | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
        | {"shared_expert_intermediate_size": 20},
        vision={**_QWEN, "intermediate_size": 24, "out_hidden_size": 16},
        fields=MARKS,
        pixels=(16, 96),
        image={"image_grid_thw": [[1, 4, 4]]},
        marks="mm_token_type_ids",
    ),
    "qwen2_5_vl": Model(
        config="Qwen2_5_VL",
        text={"num_hidden_layers": 3, **AXES},
        vision={**_QWEN, "intermediate_size": 24, "out_hidden_size": 16}
        | {"fullatt_block_indexes": [1], "window_size": 16},
        fields=MARKS,
        pixels=(16, 96),
        image={"image_grid_thw": [[1, 4, 4]]},
        marks="mm_token_type_ids",
    ),
}


@torch.no_grad()
def observe(directory: Path, model: Model, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """What the real class computes of a text and of an image, and decodes on the cache."""
    live, found = AutoModelForImageTextToText.from_pretrained(
        directory, dtype=dtype, output_loading_info=True
    )
    assert not found["missing_keys"] | found["unexpected_keys"], found
    # A tensor used where its file is mapped gives last bits that depend on where in a cache line it lies.
    for tensor in (*live.parameters(), *live.buffers()):
        tensor.data = tensor.data.clone()
    seen = []
    for inputs in model.inputs():
        cast = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
        seen.append(live.eval()(**cast).logits)
        seen.append(live.generate(**cast, max_new_tokens=5, do_sample=False, eos_token_id=None))
    return seen


def equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def text_config(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "config.json").read_text())["text_config"]


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_the_text_tower_grows_and_an_image_is_read_as_before(model: Model, tmp_path: Path) -> None:
    base = model.write(tmp_path / "base")
    observed = observe(base, model)
    assert not torch.equal(observed[2][:, -1], observed[0][:, -1]), "the image is not seen"
    result = deepen.expand_checkpoint(base, tmp_path / "expanded", after=[-1, 0, 1])
    assert equal(observe(tmp_path / "expanded", model), observed)
    narrow = [observe(tmp_path / name, model, torch.bfloat16) for name in ("base", "expanded")]
    assert equal(*narrow)
    assert deepen.verify_bytes(base, tmp_path / "expanded").identical

    before, after = (json.loads((tmp_path / n / "config.json").read_text()) for n in ("base", "expanded"))
    assert {k: v for k, v in after.items() if k != "text_config"} == {
        k: v for k, v in before.items() if k != "text_config"
    }
    changed = {k for k, v in after["text_config"].items() if before["text_config"].get(k) != v}
    assert "num_hidden_layers" in changed
    assert changed <= {"num_hidden_layers", "layer_types"}

    old, new = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "expanded"))
    apart = {name for name in new if name not in old or not torch.equal(old[name], new[name])}
    blocks = {name.partition(".layers.")[0] for block in result.new_blocks for name in block.filled}
    assert len(blocks) == 1
    assert all(name.startswith(f"{min(blocks)}.layers.") for name in apart)


@pytest.mark.parametrize("zero", ["reads", "norms"])
def test_something_else_is_zero(zero: str, tmp_path: Path) -> None:
    base = MODELS["qwen2_vl"].write(tmp_path / "base")
    deepen.expand_checkpoint(base, tmp_path / "expanded", after=[0, 2], zero=zero)
    observed = (observe(tmp_path / name, MODELS["qwen2_vl"]) for name in ("base", "expanded"))
    assert equal(*observed)


@pytest.mark.parametrize("name", ["llava of llama", "gemma3", "qwen2_vl"])
def test_names_as_in_memory(name: str, tmp_path: Path) -> None:
    base = MODELS[name].write(tmp_path / "base")
    live = AutoModelForImageTextToText.from_pretrained(base)
    held = {name: t.clone() for name, t in live.state_dict().items()}
    if live.config.tie_word_embeddings:
        del held["lm_head.weight"]
    assert any(name.startswith("model.language_model.layers.") for name in held)
    save_file(held, base / "model.safetensors", metadata={"format": "pt"})
    observed = observe(base, MODELS[name])
    deepen.expand_checkpoint(base, tmp_path / "expanded", blocks=2)
    assert equal(observe(tmp_path / "expanded", MODELS[name]), observed)


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl"])
def test_the_flat_configs_of_the_hub(name: str, tmp_path: Path) -> None:
    base = MODELS[name].write(tmp_path / "base")
    stored = json.loads((base / "config.json").read_text())
    text = stored.pop("text_config")
    del text["model_type"]
    (base / "config.json").write_text(json.dumps(text | stored))
    observed = observe(base, MODELS[name])
    deepen.expand_checkpoint(base, tmp_path / "expanded", after=[0, 2])
    assert equal(observe(tmp_path / "expanded", MODELS[name]), observed)


def test_a_llava_without_its_text_config_is_refused() -> None:
    with pytest.raises(FamilyError, match="'llava' is not a family"):
        family_for({"model_type": "llava"})


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "qwen3_vl", "text_config": {"model_type": "qwen3_vl_text"}}, "DeepStack"),
        ({"model_type": "mllama", "text_config": {"model_type": "mllama_text_model"}}, "fixed numbers"),
        ({"model_type": "gemma3n", "text_config": {"model_type": "gemma3n_text"}}, "share"),
        ({"model_type": "gemma3n_text"}, "share"),
        ({"model_type": "llava", "text_config": {"model_type": "mamba"}}, "'llava' with a text_config of"),
        ({"model_type": "none_such", "text_config": {"model_type": "llama"}}, "'none_such' with a text"),
        (
            {"model_type": "llava", "text_config": {"model_type": "llama", "per_layer_config": {"0": {}}}},
            "per",
        ),
    ],
)
def test_what_is_refused(config: dict[str, Any], words: str) -> None:
    with pytest.raises(FamilyError, match=words) as caught:
        family_for(config)
    assert str(caught.value).count("\n") <= 1


def test_every_tower_has_a_model() -> None:
    tested = {getattr(transformers, f"{m.config}Config").model_type: m for m in MODELS.values()}
    assert tested.keys() == load_towers().keys()
    known = {model_type for family in load_families() for model_type in family.model_types}
    for model_type, tower in load_towers().items():
        assert tower["text"] in known
        config = getattr(transformers, f"{tested[model_type].config}Config")()
        assert config.text_config.model_type == tower["text"], model_type


@pytest.mark.parametrize("text", [None, False, True])
@pytest.mark.parametrize("whole", [None, False, True])
@pytest.mark.parametrize("model_type", load_towers())
def test_who_says_that_the_embeddings_are_tied(
    model_type: str, whole: bool | None, text: bool | None
) -> None:
    tower, inner, config = load_towers()[model_type], {}, {"model_type": model_type}
    if text is not None:
        inner["tie_word_embeddings"] = text
    if whole is not None:
        config["tie_word_embeddings"] = whole
    configs = [config | {"text_config": inner | {"model_type": tower["text"]}}]
    if tower.get("flat"):
        configs.append(config | {"hidden_size": 16})
    for each in configs:
        real = transformers.AutoConfig.for_model(**each)
        assert family_for(each).is_tied(each) == real.tie_word_embeddings


def test_what_is_refused_by_name_is_real() -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    refused = load_refusals()["model_types"]
    assert refused.keys() - CONFIG_MAPPING_NAMES.keys() == {"phi4flash"}  # comes with code of its own
    assert not refused.keys() & load_towers().keys()
