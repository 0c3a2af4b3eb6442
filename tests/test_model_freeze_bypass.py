import pytest
import torch
from test_model_insert import TINY, generated, logits, move, plain, tokens
from transformers import LlamaForCausalLM

from deepen.checkpoint import Checkpoint, full_fingerprint
from deepen.errors import PackError
from deepen.expansion import expand_checkpoint, plan_layout, read_expansion
from deepen.model import (
    base_fingerprint,
    base_tensors,
    bypass,
    freeze_base,
    insert_blocks,
    new_parameters,
    save_blocks,
    trainable_parameters,
)

BLOCK = {
    "input_layernorm.weight",
    "post_attention_layernorm.weight",
    *(f"self_attn.{p}_proj.weight" for p in "qkvo"),
    *(f"mlp.{p}_proj.weight" for p in ("gate", "up", "down")),
}
BIASES = {name.replace("weight", "bias") for name in BLOCK if "proj" in name}


def of_blocks(indices, names):
    return {f"model.layers.{index}.{name}" for index in indices for name in names}


@pytest.mark.parametrize(
    ("base", "placed", "new"),
    [
        ({}, {"blocks": 2}, [2, 5]),
        ({"bias": True}, {"after": [-1, 2, 2]}, [0, 4, 5]),
        ({"tied": True}, {"blocks": 1}, [4]),
        # A prefix `layers.3` would also match 30 and 31; 24 + 8 = 32 blocks.
        ({"blocks": 24, **TINY}, {"blocks": 8}, [3, 7, 11, 15, 19, 23, 27, 31]),
        ({"blocks": 31, **TINY}, {"after": [2]}, [3]),
    ],
    ids=str,
)
@pytest.mark.parametrize("live", [True, False])
def test_what_trains(tiny_llama, tmp_path, base, placed, new, live):
    directory = tiny_llama(**base)
    if live:
        model = plain(directory)
        insert_blocks(model, plan_layout(model.config.num_hidden_layers, **placed))
    else:
        expand_checkpoint(directory, tmp_path / "expanded", **placed)
        model = plain(tmp_path / "expanded")
    wanted = of_blocks(new, BLOCK | BIASES if base.get("bias") else BLOCK)
    everything = {name for name, _ in model.named_parameters()}
    trained = freeze_base(model)
    assert set(trained) == wanted
    assert {name for name, p in model.named_parameters() if p.requires_grad} == wanted
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == everything - wanted
    assert trainable_parameters(model).keys() == wanted
    assert all(trained[name] is model.get_parameter(name) for name in trained)
    assert not model.get_output_embeddings().weight.requires_grad
    assert not model.get_input_embeddings().weight.requires_grad


def test_freezing_twice_or_after_other_freezing(tiny_llama):
    model = plain(tiny_llama())
    insert_blocks(model, plan_layout(4, blocks=2))
    model.requires_grad_(False)
    assert set(freeze_base(model)) == set(freeze_base(model)) == of_blocks([2, 5], BLOCK)


def test_no_record(tiny_llama, tmp_path):
    model = plain(tiny_llama())
    for work in (freeze_base, new_parameters, lambda m: save_blocks(m, tmp_path / "pack")):
        with pytest.raises(PackError, match="no record of new blocks"):
            work(model)
    with pytest.raises(PackError, match="no record of new blocks"), bypass(model):
        pass
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not (tmp_path / "pack").exists()


def test_a_record_of_another_depth(tiny_llama, tmp_path):
    expand_checkpoint(tiny_llama(), tmp_path / "expanded", blocks=2)
    expand_checkpoint(tiny_llama(), tmp_path / "more", blocks=3)
    (tmp_path / "expanded" / "expansion.json").write_bytes((tmp_path / "more/expansion.json").read_bytes())
    with pytest.raises(PackError, match="describes 7 blocks, the model has 6"):
        freeze_base(plain(tmp_path / "expanded"))


def test_where_gradient_flows(tiny_llama):
    # arXiv 2401.02415 section 3.2: with zeroed residual writes nothing else learns in the first step only.
    model = plain(tiny_llama(bias=True))
    insert_blocks(model, plan_layout(4, blocks=2))
    trained = freeze_base(model)
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-3)

    def step():
        optimizer.zero_grad()
        model(input_ids=tokens(model), labels=tokens(model), use_cache=False).loss.backward()
        assert {n for n, p in model.named_parameters() if p.grad is not None} == set(trained)
        return {name for name, parameter in trained.items() if parameter.grad.any()}

    places = ("self_attn.o_proj", "mlp.down_proj")
    writes = {f"{place}.{kind}" for place in places for kind in ("weight", "bias")}
    assert step() == of_blocks([2, 5], writes)
    optimizer.step()
    assert step() == set(trained)


@pytest.mark.parametrize(
    ("options", "placed"),
    [
        ({}, {"blocks": 2}),
        ({"bias": True, "tied": True, "dtype": "bfloat16"}, {"after": [-1, 1, 1]}),
        ({"blocks": 12, **TINY}, {"blocks": 5}),
    ],
    ids=str,
)
def test_bypass_is_the_base(tiny_llama, options, placed):
    directory = tiny_llama(**options)
    base, model = plain(directory), plain(directory)
    insert_blocks(model, plan_layout(len(base.model.layers), **placed))
    move(model)
    moved, moved_text, depth = logits(model), generated(model), len(model.model.layers)
    blocks = list(model.model.layers)
    with bypass(model) as inside:
        assert inside is model
        assert torch.equal(logits(model), logits(base))
        assert torch.equal(generated(model), generated(base))
        assert model.config.num_hidden_layers == len(base.model.layers)
        assert [b.self_attn.layer_idx for b in model.model.layers] == list(range(len(base.model.layers)))
        held, wanted = model.state_dict(), base.state_dict()
        assert held.keys() == wanted.keys()
        assert all(torch.equal(held[name], wanted[name]) for name in wanted)
    assert not torch.equal(moved, logits(base))
    assert torch.equal(logits(model), moved)
    assert torch.equal(generated(model), moved_text)
    assert model.config.num_hidden_layers == depth
    assert list(model.model.layers) == blocks
    assert [block.self_attn.layer_idx for block in blocks] == list(range(depth))


@pytest.fixture
def moved(tiny_llama):
    model = plain(tiny_llama())
    insert_blocks(model, plan_layout(4, blocks=2))
    move(model)
    return model


def test_bypass_ends_after_an_exception(moved):
    before = logits(moved)
    with pytest.raises(ZeroDivisionError), bypass(moved):
        raise ZeroDivisionError
    assert torch.equal(logits(moved), before)
    assert set(freeze_base(moved)) == of_blocks([2, 5], BLOCK)


def test_bypass_inside_bypass(moved):
    before = logits(moved)
    with bypass(moved):
        base = logits(moved)
        with bypass(moved):
            assert torch.equal(logits(moved), base)
        assert torch.equal(logits(moved), base)
        assert len(moved.model.layers) == 4
    assert torch.equal(logits(moved), before)


def test_what_makes_no_sense_while_bypassed(moved, tmp_path):
    with bypass(moved):
        for work in (freeze_base, new_parameters, lambda m: save_blocks(m, tmp_path / "pack")):
            with pytest.raises(PackError, match="bypass"):
                work(moved)
        with pytest.raises(PackError, match="bypassed"):
            insert_blocks(moved, plan_layout(4, blocks=1))
    assert set(new_parameters(moved)) == of_blocks([2, 5], BLOCK)


def test_the_bases_tensors_inside_and_outside(moved):
    base = plain(moved.name_or_path).state_dict()
    on_disk = full_fingerprint(Checkpoint.open(moved.name_or_path))
    for inside in (False, True):
        if inside:
            with bypass(moved):
                held, live = base_tensors(moved), base_fingerprint(moved, "full")
        else:
            held, live = base_tensors(moved), base_fingerprint(moved, "full")
        assert held.keys() == base.keys()
        assert all(torch.equal(held[name], base[name]) for name in base)
        assert live == on_disk


def test_bypass_of_a_model_loaded_by_transformers(tiny_llama, tmp_path):
    base = tiny_llama()
    expand_checkpoint(base, tmp_path / "expanded", blocks=2)
    model = plain(tmp_path / "expanded")
    assert isinstance(model, LlamaForCausalLM)
    for index in (2, 5):
        torch.nn.init.normal_(model.model.layers[index].mlp.down_proj.weight)
    with bypass(model):
        assert torch.equal(logits(model), logits(plain(base)))
        # The record in the model's directory speaks of more blocks than there are now.
        with bypass(model):
            assert base_tensors(model).keys() == plain(base).state_dict().keys()
    assert not torch.equal(logits(model), logits(plain(base)))
    assert read_expansion(tmp_path / "expanded").layout.depth == len(model.model.layers)


def test_the_bases_config_is_left_alone_for_training(moved):
    # Dropout and gradient modes are the model's own business.
    moved.train()
    freeze_base(moved)
    with bypass(moved):
        assert moved.training
    assert trainable_parameters(moved).keys() == of_blocks([2, 5], BLOCK)
