"""What a step of each method costs and stores, as `test_training_cost` holds it for new blocks.

The closed form, per token: u = 2 FLOPs for each weight of a block's matrices; a block below the first that
trains costs 1u, one above it 2u, and 1u more where its own matrices train. Of the block where training
begins, the gradient of an input that nothing trainable stands before is left out.
"""

import pytest
import torch
from test_methods_adapters import method_of
from test_training_cost import BLOCKS, COUNT, INNER, TOKENS, WIDTH, WORDS, executed, llama

from deepen.training.loss import summed_loss
from deepen.training.recompute import choose_blocks, measure_blocks, recompute

SQUARE, WIDE = 2 * COUNT * WIDTH * WIDTH, 2 * COUNT * WIDTH * INNER
UNIT = 4 * SQUARE + 3 * WIDE
HEAD = 2 * COUNT * WIDTH * WORDS
RANK, LENGTH = 4, 5


SMALL = 2 * COUNT * RANK * (4 * 2 * WIDTH + 3 * (WIDTH + INNER))  # LoRA's matrices of a block
# Of a prompt: its keys and values; and attention to it, which is two products.
OWN, SEEN = 2 * 2 * LENGTH * WIDTH * WIDTH, 2 * COUNT * LENGTH * WIDTH


def lora_flops():
    """Forward, gradient of the input and of the weight of both matrices, but for that of the first input."""
    first = 3 * SQUARE + 3 * 2 * COUNT * RANK * WIDTH
    return BLOCKS * (2 * UNIT + 3 * SMALL) - first


def moe_flops():
    """The second expert is a matrix that trains; the first block's inputs need no gradient."""
    return BLOCKS * (2 * UNIT + 3 * WIDE) - (UNIT + WIDE)


def prompt_flops():
    """Peft computes queries and values again, and the output projection of what prompts add by itself."""
    again = 3 * SQUARE + OWN + 2 * SEEN
    first = SQUARE + 3 * WIDE + OWN + 3 * SEEN
    second = UNIT + 2 * SQUARE + OWN + 4 * SEEN
    return BLOCKS * UNIT + 2 * again + first + second


# Method -> settings, first block that trains, closed form of all blocks, forward pass of one that trains.
METHODS = {
    "full": ([], 0, 3 * BLOCKS * UNIT, UNIT),
    "freeze": (["train.freeze.blocks=3"], 1, (1 + 3 * 3 + 2 * 2) * UNIT, UNIT),
    "lora": ([f"train.lora.rank={RANK}"], 0, lora_flops(), UNIT + SMALL),
    "scale": ([], 0, 2 * BLOCKS * UNIT, UNIT),
    "moe": ([], 0, moe_flops(), UNIT + WIDE),
    "prompt": (
        ["train.prompt.blocks=2", f"train.prompt.length={LENGTH}"],
        4,
        prompt_flops(),
        UNIT + 3 * SQUARE + OWN + 2 * SEEN,
    ),
}


def prepared(name):
    model = llama()
    return model, method_of("lora", f"train.method={name}", *METHODS[name][0]).prepare(model)


def measured(model):
    return measure_blocks(list(model.model.layers), lambda: forward(model))


def forward(model):
    return model.base_model(TOKENS[:, :-1], use_cache=False).last_hidden_state


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("mode", ["none", "auto", "full"])
def test_flops_of_a_step(name, mode):
    model, _ = prepared(name)
    _, first, floor, again = METHODS[name]
    floor += HEAD * (3 if model.lm_head.weight.requires_grad else 2)
    memory = measured(model)
    chosen = choose_blocks(memory, mode, sum(block.saved for block in memory) * 3 // 4)
    assert all(index >= first for index in chosen)
    assert bool(chosen) == (mode != "none")
    recompute([model.model.layers[index] for index in chosen])
    assert executed(model) <= 1.02 * (floor + len(chosen) * again)
    if mode == "none":
        assert executed(model) == floor


@pytest.mark.parametrize("name", METHODS)
def test_nothing_below_the_first_block_that_trains_is_stored_or_has_a_gradient(name):
    model, named = prepared(name)
    first = METHODS[name][1]
    entered, left = [], []
    for block in model.model.layers:
        block.register_forward_pre_hook(lambda _, states: entered.append(states[0].grad_fn is not None))
        block.register_forward_hook(lambda _, __, states: left.append(states.grad_fn is not None))
    summed_loss(model, TOKENS[:, :-1], TOKENS[:, 1:]).backward()
    embedded = model.model.embed_tokens.weight.requires_grad
    assert entered == [embedded or index > first for index in range(BLOCKS)]
    stores = [index >= first for index in range(BLOCKS)]
    assert left == stores
    assert [block.saved > 0 for block in measured(model)] == stores
    with_gradient = {key for key, parameter in model.named_parameters() if parameter.grad is not None}
    assert with_gradient == named.keys()


@pytest.mark.parametrize("name", METHODS)
def test_what_is_measured_is_what_is_stored(name):
    """Held to autograd itself: bytes that live from the forward pass to the backward pass."""
    model, _ = prepared(name)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    held = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    expected = sum(block.saved for block in measured(model))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        states = forward(model)
    assert states.requires_grad
    assert expected == pytest.approx(sum(held.values()), rel=0.05)
