"""The text model of a vision-language model, in the names of new files and of old ones."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_contract import differing, settled
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

import deepen
from deepen.checkpoint import Checkpoint, fast_fingerprint
from deepen.expansion import read_expansion
from deepen.model import new_tensors

TEXT = {
    "vocab_size": 96,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "num_hidden_layers": 7,
    "max_position_embeddings": 64,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


def gemma3():
    # Its head is its embeddings.
    text, vision = TEXT | {"sliding_window": 6}, VISION | {"model_type": "siglip_vision_model"}
    tokens = {"image_token_index": 95, "boi_token_index": 94, "eoi_token_index": 93}
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, **tokens)
    return Gemma3ForConditionalGeneration(config)


def llava():
    text = TEXT | {"model_type": "llama"}
    vision = VISION | {"model_type": "clip_vision_model", "projection_dim": 16}
    return LlavaForConditionalGeneration(
        LlavaConfig(text_config=text, vision_config=vision, image_token_index=95)
    )


def as_old(name):
    if name.startswith("lm_head"):
        return f"language_model.{name}"
    bare = name.removeprefix("model.")
    return bare.replace("language_model.", "language_model.model.", 1)


@torch.no_grad()
def observe(model):
    with settled(model):
        ids = torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(1))
        options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        decoded = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        return {"logits": model(input_ids=ids, use_cache=False).logits, "tokens": decoded}


@pytest.mark.parametrize("build", [gemma3, llava])
@pytest.mark.parametrize("files", ["new", "old"])
def test_the_text_model_of_two_towers(tmp_path, build, files):
    torch.manual_seed(0)
    model, base = build(), tmp_path / "base"
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(base)
    held = {n: t.clone() for n, t in model.state_dict().items() if build is llava or n != "lm_head.weight"}
    named = held if files == "new" else {as_old(name): tensor for name, tensor in held.items()}
    save_file(named, base / "model.safetensors", {"format": "pt"})

    model = deepen.load(base)
    assert type(model).__name__.endswith("ForConditionalGeneration")
    before = observe(model)
    deepen.insert_blocks(model, deepen.plan_layout(7, blocks=3))
    assert model.config.text_config.num_hidden_layers == 10
    assert not differing(observe(model), before)
    deepen.expand_checkpoint(base, tmp_path / "expanded", blocks=3)
    assert deepen.expansion_of(model) == read_expansion(tmp_path / "expanded").portable
    assert deepen.expansion_of(model).base_fingerprint.fast == fast_fingerprint(Checkpoint.open(base))

    with torch.no_grad():
        for tensor in new_tensors(model).values():
            tensor.add_(torch.randn(tensor.shape) * 0.1)
    moved = observe(model)
    pack = deepen.save_blocks(model, tmp_path / "pack")
    assert (
        load_file(pack / "blocks.safetensors").keys()
        <= load_file(tmp_path / "expanded/model.safetensors").keys()
    )
    live = deepen.attach(deepen.load(base), pack)
    assert not differing(observe(live), moved)
    live.save_pretrained(tmp_path / "saved")
    assert not differing(observe(deepen.load(tmp_path / "saved")), moved)
    with deepen.bypass(live):
        assert not differing(observe(live), before)
    deepen.merge_pack(base, pack, tmp_path / "merged")
    assert not differing(observe(deepen.load(tmp_path / "merged")), moved)
