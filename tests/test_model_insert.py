import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, CTRLConfig, CTRLLMHeadModel, LlamaConfig, LlamaModel

from deepen.checkpoint import Checkpoint, fast_fingerprint
from deepen.errors import FamilyError, LayoutError
from deepen.expansion import expand_checkpoint, plan_layout, read_expansion
from deepen.model import expansion_of, insert_blocks, new_parameters

TINY = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 64,
}


def plain(directory, dtype="auto"):
    """The model as anyone loads it: transformers is the oracle of these tests."""
    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, local_files_only=True).eval()


def tokens(model, length=24):
    generator = torch.Generator().manual_seed(7)
    return torch.randint(3, model.config.vocab_size, (2, length), generator=generator)


@torch.no_grad()
def logits(model):
    return model(input_ids=tokens(model), use_cache=False).logits


def generated(model, **options):
    prompt = tokens(model, 6)
    return model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=12,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        **options,
    )


@torch.no_grad()
def move(model):
    """Let the new blocks learn something: without weight changes many mistakes do not show."""
    generator = torch.Generator().manual_seed(3)
    for parameter in new_parameters(model).values():
        parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * 0.2)


CASES = [
    ({}, {"blocks": 2}),
    ({"dtype": "bfloat16"}, {"blocks": 2}),
    ({"tied": True}, {"blocks": 1}),
    ({"bias": True}, {"blocks": 2}),
    ({"bias": True, "tied": True, "dtype": "bfloat16"}, {"blocks": 3}),
    ({"dtype": "float16"}, {"blocks": 2}),
    ({}, {"blocks": 3, "placement": "suffix"}),
    ({}, {"blocks": 3, "placement": "prefix"}),
    ({}, {"blocks": 6}),
    ({"blocks": 5}, {"blocks": 3}),
    ({"blocks": 5}, {"blocks": 4, "groups": 2}),
    ({}, {"after": [-1, 0, 2, 2, 2]}),
    ({"blocks": 1}, {"blocks": 3}),
    ({"sharded": True}, {"blocks": 2}),
    ({"blocks": 36, **TINY}, {"blocks": 9}),
    ({"blocks": 40, **TINY}, {"blocks": 10}),
]


@pytest.mark.parametrize(("base", "placed"), CASES, ids=str)
def test_it_computes_what_it_did_and_is_what_the_byte_engine_writes(tiny_llama, tmp_path, base, placed):
    directory = tiny_llama(**base)
    model = plain(directory)
    before = logits(model)
    layout = plan_layout(model.config.num_hidden_layers, **placed)
    assert insert_blocks(model, layout) is model

    assert model.config.num_hidden_layers == len(model.model.layers) == layout.depth
    assert torch.equal(logits(model), before)

    expand_checkpoint(directory, tmp_path / "expanded", **placed)
    files = {k: v for f in (tmp_path / "expanded").glob("*.safetensors") for k, v in load_file(f).items()}
    held = model.state_dict()
    assert held.keys() - {"lm_head.weight"} == files.keys() - {"lm_head.weight"}
    for name, tensor in files.items():
        assert held[name].dtype == tensor.dtype
        assert torch.equal(held[name], tensor), name
    assert expansion_of(model) == read_expansion(tmp_path / "expanded").portable


@pytest.mark.parametrize("options", [{}, {"bias": True, "tied": True}, {"dtype": "bfloat16"}], ids=str)
def test_cached_decoding(tiny_llama, options):
    base = tiny_llama(**options)
    model, before = plain(base), generated(plain(base))
    insert_blocks(model, plan_layout(4, after=[-1, 0, 0, 3]))
    assert torch.equal(generated(model), before)
    assert torch.equal(generated(model, use_cache=False), generated(plain(base), use_cache=False))


@pytest.mark.parametrize("placed", [{"blocks": 2}, {"after": [1, 1]}, {"blocks": 3, "placement": "prefix"}])
def test_cached_decoding_after_the_new_blocks_have_moved(tiny_llama, placed):
    # Two blocks that share a cache slot decode rightly until their weights matter.
    model = plain(tiny_llama())
    before = logits(model)
    insert_blocks(model, plan_layout(4, **placed))
    move(model)
    assert not torch.allclose(logits(model), before, atol=1e-2)
    indices = [block.self_attn.layer_idx for block in model.model.layers]
    assert indices == list(range(len(indices)))
    ids = tokens(model)
    with torch.no_grad():
        whole = model(input_ids=ids, use_cache=False).logits
        first = model(input_ids=ids[:, :10], use_cache=True)
        rest = model(input_ids=ids[:, 10:], past_key_values=first.past_key_values, use_cache=True)
    torch.testing.assert_close(rest.logits, whole[:, 10:], atol=1e-5, rtol=1e-5)
    assert torch.equal(generated(model), generated(model, use_cache=False))


@pytest.mark.parametrize("options", [{}, {"bias": True, "tied": True, "dtype": "bfloat16"}], ids=str)
def test_saved_and_loaded_by_transformers(tiny_llama, tmp_path, options):
    model = plain(tiny_llama(**options))
    insert_blocks(model, plan_layout(4, blocks=2))
    move(model)
    model.save_pretrained(tmp_path / "saved")
    again = plain(tmp_path / "saved")
    assert again.config.num_hidden_layers == 6
    assert torch.equal(logits(again), logits(model))
    assert torch.equal(generated(again), generated(model))


def test_the_new_blocks_are_copies(tiny_llama):
    model = plain(tiny_llama())
    insert_blocks(model, plan_layout(4, blocks=1))
    held = model.state_dict()
    with torch.no_grad():
        model.model.layers[4].mlp.up_proj.weight.zero_()
    assert held["model.layers.3.mlp.up_proj.weight"].any()


def test_gradients_are_not_copied(tiny_llama):
    # A stale gradient would move the new block at the first step of an optimiser.
    model = plain(tiny_llama())
    model(input_ids=tokens(model), labels=tokens(model)).loss.backward()
    insert_blocks(model, plan_layout(4, blocks=2))
    assert all(parameter.grad is None for parameter in new_parameters(model).values())
    assert model.model.layers[0].mlp.up_proj.weight.grad is not None


def test_a_model_that_lies_nowhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(num_hidden_layers=3, **TINY)).eval()
    before = logits(model)
    insert_blocks(model, plan_layout(3, blocks=2))
    assert torch.equal(logits(model), before)
    assert expansion_of(model).base == "unnamed"
    assert insert_blocks(
        AutoModelForCausalLM.from_config(LlamaConfig(num_hidden_layers=3, **TINY)),
        plan_layout(3, blocks=1),
        base="mine",
    )


def test_a_layout_of_another_depth(tiny_llama):
    with pytest.raises(LayoutError, match="for 5 base blocks, the model has 4"):
        insert_blocks(plain(tiny_llama()), plan_layout(5, blocks=1))


def test_unknown_models():
    ctrl = CTRLLMHeadModel(CTRLConfig(n_layer=2, n_embd=16, dff=16, n_head=2, vocab_size=64, n_positions=32))
    with pytest.raises(FamilyError, match="ctrl"):
        insert_blocks(ctrl, plan_layout(2, blocks=1))


def test_a_model_without_a_head(tiny_llama):
    # As text encoders are: names in memory lack the prefix that those of the files have.
    base = tiny_llama()
    model = LlamaModel.from_pretrained(base).eval()
    with torch.no_grad():
        before = model(input_ids=tokens(model)).last_hidden_state
        insert_blocks(model, plan_layout(4, blocks=2))
        after = model(input_ids=tokens(model)).last_hidden_state
    assert len(model.layers) == 6
    assert torch.equal(before, after)
    assert expansion_of(model).base_fingerprint.fast == fast_fingerprint(Checkpoint.open(base))
    assert "model.layers.2.mlp.down_proj.weight" in expansion_of(model).new_blocks[0].filled


def test_packed_integer_weights_are_refused(tiny_llama):
    # Zero bytes of a quantised matrix need not mean zero.
    model = plain(tiny_llama())
    block = model.model.layers[3]
    packed = torch.zeros(8, dtype=torch.uint8)
    block.self_attn.o_proj.weight = torch.nn.Parameter(packed, requires_grad=False)
    with pytest.raises(FamilyError, match=r"layers\.3\.self_attn\.o_proj\.weight"):
        insert_blocks(model, plan_layout(4, blocks=1))
    assert len(model.model.layers) == 4
