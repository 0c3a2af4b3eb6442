"""New blocks made from two neighbours, judged by transformers' own forward, torch and scipy."""

import itertools
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from family_table import DENSE, MIXED
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from deepen.blocks import unmerge
from deepen.errors import CheckpointError, LayoutError
from deepen.expansion import expand_checkpoint, plan_layout, read_expansion, verify_bytes
from deepen.expansion.fusion import align, narrow, widen
from deepen.families import Place, family_for, unit_places
from deepen.model import insert_blocks

LINES = {line.name: line for line in (*DENSE, *MIXED)}
TOKENS = torch.randint(3, 96, (2, 24), generator=torch.Generator().manual_seed(0))
# Biases, rotary halves, norms of heads, norms behind sub-layers, learned positions, no gate, other names.
ALIGNED = (
    *("llama tied and biased", "qwen3", "olmo2", "gemma3", "cohere biased, norms of queries and keys"),
    *("phi", "opt", "starcoder2", "nemotron"),
)


def logits(directory, dtype=torch.float64):
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()
        return model(TOKENS, use_cache=False).logits


def block_of(directory, number):
    config = json.loads((directory / "config.json").read_text())
    tensors = load_file(directory / "model.safetensors")
    family = family_for(config, tensors)
    placed = ((family.split(name), tensor) for name, tensor in tensors.items())
    return family, {place[1]: tensor for place, tensor in placed if place and place[0] == number}


def permuted(directory, block, generator):
    """Put a block's neurons, groups of heads and heads in each group in another order."""
    config = json.loads((directory / "config.json").read_text())
    heads, groups = config["num_attention_heads"], config.get("num_key_value_heads") or 4
    new, places = {}, unit_places({n: tuple(t.shape) for n, t in block.items()}, heads)
    group = torch.randperm(groups, generator=generator)
    inner = torch.stack([torch.randperm(heads // groups, generator=generator) for _ in range(groups)])
    head = (group[:, None] * (heads // groups) + inner).reshape(-1)
    wide = next(block[name].shape[place.axis] for name, place in places.items() if place.kind == "neurons")
    units = {"neurons": torch.randperm(wide, generator=generator), "groups": group, "heads": head}
    for name, tensor in block.items():
        new[name] = tensor
        if place := places.get(name):
            chosen = units[place.kind]
            size = tensor.shape[place.axis] // len(chosen)
            rows = (chosen[:, None] * size + torch.arange(size)).reshape(-1)
            new[name] = tensor.index_select(place.axis, rows).contiguous()
    return new


def put(directory, family, number, block):
    path = directory / "model.safetensors"
    tensors = load_file(path) | {family.join(number, name): tensor for name, tensor in block.items()}
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})


@pytest.mark.parametrize("name", ALIGNED)
def test_units_in_another_order_compute_the_same(tmp_path, name):
    """And transport finds the order again: of a block and its permuted copy it makes the block."""
    base = LINES[name].write(tmp_path / "base")
    family, below = block_of(base, 0)
    put(base, family, 1, below)
    before = logits(base)
    moved = permuted(base, below, torch.Generator().manual_seed(3))
    assert any(not torch.equal(moved[tensor], below[tensor]) for tensor in below)
    put(base, family, 1, moved)
    assert torch.allclose(logits(base), before, atol=1e-5)  # norms compute in fp32
    expand_checkpoint(base, tmp_path / "out", after=[0], init="transport")
    _, new = block_of(tmp_path / "out", 1)
    filled = {tensor for tensor in new if family.fill(tensor) is not None}
    assert filled
    assert all(torch.equal(new[tensor], below[tensor]) for tensor in new.keys() - filled)
    assert torch.equal(logits(tmp_path / "out"), logits(base))


@pytest.mark.parametrize("init", ["average", "transport"])
@pytest.mark.parametrize("name", ["llama tied and biased", "qwen3", "olmo2", "gemma3", "opt"])
def test_the_function_is_kept(tmp_path, name, init):
    """On disk and in memory, and both hold the same tensors."""
    base, out = LINES[name].write(tmp_path / "base"), tmp_path / "out"
    placed = {"after": [0, 2, 2]} if LINES[name].depth > 3 else {"after": [0, 0, 2]}
    expand_checkpoint(base, out, init=init, **placed)
    assert torch.equal(logits(out, torch.float32), logits(base, torch.float32))
    assert verify_bytes(base, out).identical
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    insert_blocks(model, plan_layout(LINES[name].depth, init=init, **placed))
    live, held = model.state_dict(), AutoModelForCausalLM.from_pretrained(out).state_dict()
    assert live.keys() == held.keys()
    assert all(torch.equal(live[tensor], held[tensor]) for tensor in held)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sharded", [True, False])
def test_the_average_is_torchs(tiny_llama, tmp_path, dtype, sharded):
    base = tiny_llama(bias=True, dtype=str(dtype).removeprefix("torch."), sharded=sharded)
    expand_checkpoint(base, tmp_path / "out", after=[1], init="average")
    tensors = [
        {k: v for path in where.glob("*.safetensors") for k, v in load_file(path).items()}
        for where in (base, tmp_path / "out")
    ]
    for name, tensor in tensors[1].items():
        if name.startswith("model.layers.2.") and tensor.any():
            pair = [tensors[0][name.replace("layers.2.", f"layers.{n}.")].float() for n in (1, 2)]
            assert torch.equal(tensor, ((pair[0] + pair[1]) / 2).to(dtype))


def test_bfloat16_rounds_as_torch_does():
    values = torch.randn(4096, generator=torch.Generator().manual_seed(1)) * 1e3
    values[:4] = torch.tensor([float("nan"), float("inf"), 3.4e38, 1e-40])
    ours = torch.frombuffer(bytearray(narrow("BF16", values.numpy())), dtype=torch.bfloat16)
    assert torch.equal(ours.nan_to_num(7), values.bfloat16().nan_to_num(7))
    assert np.array_equal(widen("BF16", narrow("BF16", values.numpy()))[1:], ours.float().numpy()[1:])


def test_heads_are_matched_inside_their_groups():
    """Of all orders of groups and of heads in them, the likest is found: every one is tried."""
    generator = torch.Generator().manual_seed(5)
    heads, groups, size = 6, 3, 2
    names = {
        "self_attn.q_proj.weight": Place("heads", 0),
        "self_attn.k_proj.weight": Place("groups", 0),
        "self_attn.o_proj.weight": Place("heads", 1),
    }
    shapes = {"self_attn.q_proj.weight": (12, 5), "self_attn.k_proj.weight": (6, 5)}

    def drawn():
        shape = shapes | {"self_attn.o_proj.weight": (5, 12)}
        return {name: torch.randn(shape[name], generator=generator).numpy() for name in names}

    below, above = drawn(), drawn()
    readers = [{name: (lambda a=array: a) for name, array in held.items()} for held in (below, above)]
    found = align(names, *readers, heads=heads, groups=groups)

    def likeness(head, group):
        wide = {"heads": head, "groups": group}
        total = 0.0
        for name, place in names.items():
            chosen = np.asarray(wide[place.kind])
            rows = (chosen[:, None] * 2 + np.arange(2)).reshape(-1)
            total += (below[name] * np.take(above[name], rows, place.axis)).sum()
        return total

    orders = [
        ([g * size + i for g, pair in zip(group, inner, strict=True) for i in pair], group)
        for group in itertools.permutations(range(groups))
        for inner in itertools.product(itertools.permutations(range(size)), repeat=groups)
    ]
    best = max(orders, key=lambda order: likeness(*order))
    assert found["heads"].tolist() == best[0]
    assert found["groups"].tolist() == list(best[1])


def test_record_says_how_blocks_came_to_be(tiny_llama, tmp_path):
    base, out = tiny_llama(), tmp_path / "out"
    result = expand_checkpoint(base, out, blocks=2, init="transport")
    assert [block.init for block in result.new_blocks] == ["transport", None]
    assert "topmost" in result.warnings[0]
    raw = json.loads((out / "expansion.json").read_text())
    assert [block.get("init") for block in raw["new_blocks"]] == ["transport", None]
    raw["new_blocks"][0]["init"] = "average"
    (out / "expansion.json").write_text(json.dumps(raw))
    assert "neighbours' mean" in verify_bytes(base, out).first_difference


def test_base_comes_back(tiny_llama, tmp_path):
    base, out = tiny_llama(sharded=True), tmp_path / "out"
    expand_checkpoint(base, out, blocks=3, init="average")
    assert unmerge(out, tmp_path / "back").byte_identical
    for path in base.iterdir():
        assert (tmp_path / "back" / path.name).read_bytes() == path.read_bytes()


def test_expanded_again(tiny_llama, tmp_path):
    base, once, twice = tiny_llama(), tmp_path / "once", tmp_path / "twice"
    expand_checkpoint(base, once, after=[0], init="transport")
    expand_checkpoint(once, twice, after=[0, 1, 2], init="average")
    assert torch.equal(logits(twice, torch.float32), logits(base, torch.float32))
    assert verify_bytes(once, twice).identical
    inits = {block.index: block.init for block in read_expansion(twice).new_blocks}
    assert inits == {1: "average", 2: "transport", 3: "average", 5: "average"}


@pytest.mark.parametrize(
    ("name", "after", "init", "why"),
    [
        ("gemma2", [1], "average", "of different kinds"),
        ("qwen3_moe as in memory", [0], "average", "only one of them has"),
        ("qwen3_moe", [0], "transport", "does not know the heads or neurons in 'mlp.experts"),
        ("stablelm 2, side by side", [0], "transport", "layernorm"),
        ("phi3 with a window", [0], "transport", "gate_up_proj"),
        ("falcon 7b", [0], "transport", "self_attention|dense"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, name, after, init, why):
    base = LINES[name].write(tmp_path / "base")
    with pytest.raises(LayoutError, match=why):
        expand_checkpoint(base, tmp_path / "out", after=after, init=init)
    assert not (tmp_path / "out").exists()
    model = AutoModelForCausalLM.from_pretrained(base)
    with pytest.raises(LayoutError, match="init "):
        insert_blocks(model, plan_layout(LINES[name].depth, after=after, init=init))


def test_a_base_that_is_not_finite_leaves_nothing(tiny_llama, tmp_path):
    base = tiny_llama()
    path = base / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="NaN or infinity"):
        expand_checkpoint(base, tmp_path / "out", after=[1], init="transport")
    assert [entry.name for entry in tmp_path.iterdir() if "out" in entry.name] == []


def test_a_copy_needs_no_numpy(tiny_llama, tmp_path):
    base = tiny_llama()
    script = (
        "import sys; from deepen.expansion import expand_checkpoint; "
        f"expand_checkpoint({str(base)!r}, {str(tmp_path / 'out')!r}, blocks=1); "
        "sys.exit('numpy' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
