"""A step does what its gradients need and no more, by torch's own FLOP counter and saved-tensor hooks.

The closed form, per token: u = 2 FLOPs for each weight of a block's matrices. A block below the first that
trains costs 1u (forward), a frozen one above it 2u (and the gradient of its input), one that trains 3u;
computed again it costs up to 1u more. A frozen head costs 2h, with h = 2 × width × vocabulary.
"""

import pytest
import torch
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from deepen.config import TrainSection
from deepen.expansion import plan_layout
from deepen.methods import build_method
from deepen.model import freeze_base, insert_blocks
from deepen.training import loss as loss_module
from deepen.training.flops import attained, attention_flops, count_flops
from deepen.training.loss import summed_loss
from deepen.training.parallel import Root
from deepen.training.recompute import BlockMemory, choose_blocks, measure_blocks, recompute

WIDTH, INNER, WORDS, BLOCKS = 64, 172, 96, 6
SIZES = {"vocab_size": WORDS, "hidden_size": WIDTH, "num_hidden_layers": BLOCKS, "num_attention_heads": 4}
TOKENS = torch.randint(WORDS, (2, 33), generator=torch.Generator().manual_seed(0))
COUNT = 2 * 32

LAYOUTS = {
    "interleaved": {"blocks": 2},
    "suffix": {"blocks": 2, "placement": "suffix"},
    "prefix": {"blocks": 2, "placement": "prefix"},
    "explicit": {"after": [0, 3, 3]},
}


def llama(**placed):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, intermediate_size=INNER)).train()
    if placed:
        insert_blocks(model, plan_layout(BLOCKS, **placed))
        freeze_base(model)
    return model


def kinds(model):
    """For each block: below the first that trains, frozen above it, or training."""
    trains = [any(p.requires_grad for p in block.parameters()) for block in model.model.layers]
    first = trains.index(True)
    return ["trains" if t else "frozen" if i > first else "below" for i, t in enumerate(trains)]


def floor(model, recomputed=()):
    unit = 2 * COUNT * (4 * WIDTH * WIDTH + 3 * WIDTH * INNER)
    head = 2 * COUNT * WIDTH * WORDS
    units = sum({"below": 1, "frozen": 2, "trains": 3}[kind] for kind in kinds(model))
    frozen_head = not model.lm_head.weight.requires_grad
    return (units + len(recomputed)) * unit + (2 if frozen_head else 3) * head


def counted(model, length=32):
    """The product's closed form for the batch, without attention, which torch does not count on a CPU."""
    blocks = list(model.model.layers)
    cost = count_flops(Root(model), model, blocks, length)
    attention = sum(
        attention_flops(model, index, length)
        * ({"below": 1, "frozen": 3.5, "trains": 3.5}[kind] + block.gradient_checkpointing)
        for index, (kind, block) in enumerate(zip(kinds(model), blocks, strict=True))
    )
    return COUNT * (cost.total - attention)


def executed(model):
    with FlopCounterMode(display=False) as counter:
        summed_loss(model, TOKENS[:, :-1], TOKENS[:, 1:]).backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", ["none", "auto", "full"])
def test_flops_of_a_step(layout, mode):
    model = llama(**LAYOUTS[layout])
    blocks = list(model.model.layers)
    memory = measure_blocks(blocks, lambda: model.base_model(TOKENS[:, :-1], use_cache=False))
    budget = sum(block.saved for block in memory) * 3 // 4
    chosen = choose_blocks(memory, mode, budget)
    assert all(kinds(model)[index] != "below" for index in chosen)
    assert bool(chosen) == (mode != "none")
    recompute([blocks[index] for index in chosen])
    done = executed(model)
    assert done <= 1.02 * floor(model, chosen)
    assert counted(model) == pytest.approx(done, rel=0.02)
    if mode == "none":
        assert done == floor(model)


def test_flops_of_full_fine_tuning():
    assert executed(llama()) == floor(llama())


METHODS = ["full", "freeze", "lora", "moe", "scale"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("mode", ["none", "full"])
def test_the_flops_that_a_run_reports_are_those_of_its_step(method, mode):
    model = llama()
    section = TrainSection(method=method, tokens=1, batch_tokens=1, learning_rate=1, freeze={"blocks": 2})
    build_method(section).prepare(model.train())
    recompute(list(model.model.layers) if mode == "full" else [])
    assert counted(model) == pytest.approx(executed(model), rel=0.02)


FAMILIES = {
    "mixtral": {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2},
    "gpt2": {"attn_pdrop": 0.0, "bos_token_id": 1, "eos_token_id": 1},
    "qwen3": {"head_dim": 32, "num_key_value_heads": 2},
}


@pytest.mark.parametrize("name", FAMILIES)
def test_experts_and_other_linear_layers_are_counted(name):
    sizes = SIZES | {"num_hidden_layers": 2, "intermediate_size": INNER}
    config = AutoConfig.for_model(name, **FAMILIES[name], **sizes)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()
    if name == "mixtral":
        model.set_experts_implementation("eager")  # torch does not count grouped products
    blocks = list(model.transformer.h if name == "gpt2" else model.model.layers)
    cost = count_flops(Root(model), model, blocks, 32)
    attention = 3.5 * sum(attention_flops(model, index, 32) for index in range(2))
    assert COUNT * (cost.total - attention) == pytest.approx(executed(model), rel=0.02)


def test_attention_is_counted_as_half_the_square_of_its_products():
    """Eager attention is ordinary products, which torch counts: of all pairs, and 2 for each gradient."""
    fused, eager = llama(blocks=2), llama(blocks=2)
    eager.set_attn_implementation("eager")
    passes = sum({"below": 1, "frozen": 3, "trains": 3}[kind] for kind in kinds(fused))
    assert executed(eager) - executed(fused) == 2 * COUNT * passes * attention_flops(fused, 0, 32)


def test_a_window_of_attention_bounds_it():
    config = AutoConfig.for_model("mistral", **SIZES, sliding_window=8)
    model = AutoModelForCausalLM.from_config(config)
    pairs = sum(min(place + 0.5, 8) for place in range(32))
    assert attention_flops(model, 0, 32) == pytest.approx(4 * WIDTH * pairs / 32, rel=0.01)
    assert attention_flops(model, 0, 8) == 2 * WIDTH * 8


def test_what_lies_below_the_first_trained_block_is_told_apart():
    suffix = llama(blocks=2, placement="suffix")
    cost = count_flops(Root(suffix), suffix, list(suffix.model.layers), 32)
    unit = 2 * (4 * WIDTH * WIDTH + 3 * WIDTH * INNER) + 2 * 32 * WIDTH
    assert cost.below == kinds(suffix).count("below") * unit
    assert suffix.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in suffix.modules())


def test_a_device_attains_something():
    assert 1e8 < attained(torch.device("cpu"), torch.float32) < 1e14


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nothing_below_the_first_new_block_is_stored_or_has_a_gradient(layout):
    model = llama(**LAYOUTS[layout])
    needs = []
    for block in model.model.layers:
        block.register_forward_hook(lambda _, __, states: needs.append(states.requires_grad))
    memory = measure_blocks(list(model.model.layers), lambda: model.base_model(TOKENS, use_cache=False))
    expected = [kind != "below" for kind in kinds(model)]
    assert needs == expected
    assert [block.saved > 0 for block in memory] == expected
    summed_loss(model, TOKENS[:, :-1], TOKENS[:, 1:]).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


def test_what_is_measured_is_what_is_stored():
    """Held to autograd itself: bytes that live from the forward pass to the backward pass."""
    model = llama(blocks=3)
    forward = lambda: model.base_model(TOKENS[:, :-1], use_cache=False).last_hidden_state  # noqa: E731
    measured = sum(block.saved for block in measure_blocks(list(model.model.layers), forward))
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    held = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        states = forward()
    assert states.requires_grad
    assert measured == pytest.approx(sum(held.values()), rel=0.05)


def test_frozen_blocks_are_computed_again_first_and_no_more_than_needed():
    frozen = BlockMemory(saved=100, kept=10, frozen=True)
    trains = BlockMemory(saved=150, kept=10, frozen=False)
    below = BlockMemory(saved=0, kept=0, frozen=True)
    memory = [below, trains, frozen, frozen, trains]
    assert choose_blocks(memory, "none", 0) == ()
    assert choose_blocks(memory, "full", 10**9) == (1, 2, 3, 4)
    assert choose_blocks(memory, "auto", 500) == ()
    assert choose_blocks(memory, "auto", 499) == (2, 3)  # one alone would hold 410 + 100 while it runs
    assert choose_blocks(memory, "auto", 0) == (1, 2, 3, 4)


@pytest.mark.parametrize("mode", ["auto", "full"])
def test_computing_again_changes_no_gradient(mode):
    gradients = []
    for used in ("none", mode):
        model = llama(blocks=2)
        blocks = list(model.model.layers)
        memory = measure_blocks(blocks, lambda model=model: model.base_model(TOKENS, use_cache=False))
        chosen = choose_blocks(memory, used, sum(block.saved for block in memory) // 2)
        recompute([blocks[index] for index in chosen])
        summed_loss(model, TOKENS[:, :-1], TOKENS[:, 1:]).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    plain, again = gradients
    assert plain.keys() == again.keys()
    assert all(torch.equal(plain[name], again[name]) for name in plain)


HEADS = {
    "llama": {},
    "llama, tied": {"model_type": "llama", "tie_word_embeddings": True},
    "gemma2": {"head_dim": 8, "num_key_value_heads": 2, "final_logit_softcapping": 3.0},
    "cohere": {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    "granite": {"logits_scaling": 3.0},
    "gpt2": {},
    "gpt_neox": {},
    "opt": {"word_embed_proj_dim": WIDTH, "ffn_dim": INNER},
    "bloom": {},
    "falcon": {},
    "gptj": {"rotary_dim": 8},
    "mixtral": {"num_key_value_heads": 2, "num_local_experts": 2},
}


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("frozen", [False, True])
def test_the_loss_is_cross_entropy_of_the_models_own_logits(name, frozen, monkeypatch):
    monkeypatch.setattr(loss_module, "_MOST_LOGITS", 5 * 2 * WORDS)  # seven parts, the last one shorter
    options = {"model_type": name} | HEADS[name]
    config = AutoConfig.for_model(**options, **SIZES | {"num_hidden_layers": 1}, intermediate_size=INNER)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in model.get_output_embeddings().parameters():
        parameter.requires_grad_(not frozen)
    logits = model(TOKENS[:, :-1], use_cache=False).logits.flatten(0, 1)
    (functional.cross_entropy(logits, TOKENS[:, 1:].flatten(), reduction="sum") / 7).backward()
    wanted = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    (summed_loss(model, TOKENS[:, :-1], TOKENS[:, 1:]) / 7).backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == wanted.keys()
    for key, gradient in wanted.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-4, atol=1e-5)


def test_the_logits_of_a_batch_are_never_whole(monkeypatch):
    monkeypatch.setattr(loss_module, "_MOST_LOGITS", 4 * 2 * WORDS)
    model = llama(blocks=1)
    positions = []
    model.lm_head.register_forward_hook(lambda _, __, logits: positions.append(logits.shape[1]))
    summed_loss(model, TOKENS[:, :-1], TOKENS[:, 1:]).backward()
    assert positions == [4] * 8


def test_parted_documents_have_the_gradients_they_have_alone():
    first, second = TOKENS[:1, :20], TOKENS[1:, :12]
    inputs = torch.cat([first[:, :-1], second[:, :-1]], dim=1)
    targets = torch.cat([first[:, 1:], second[:, 1:]], dim=1)
    targets[0, 3] = loss_module.IGNORED
    positions = torch.cat([torch.arange(19), torch.arange(11)])[None]
    model = llama(blocks=2)
    packed = summed_loss(model, inputs, targets, positions)
    packed.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    alone = 0
    for document in (first, second):
        logits = model(document[:, :-1], use_cache=False).logits
        each = functional.cross_entropy(logits[0], document[0, 1:], reduction="none")
        alone = alone + each.sum() - (each[3] if document is first else 0)
    alone.backward()
    torch.testing.assert_close(packed, alone)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, model.get_parameter(name).grad, rtol=1e-4, atol=1e-5)
