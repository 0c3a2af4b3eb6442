"""What of a new block is zero: judged by transformers' own forward and autograd."""

import json

import pytest
import torch
import transformers
from family_table import DENSE
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import deepen
from deepen.blocks import (
    average_packs,
    damp_pack,
    inspect_blocks,
    merge_pack,
    prune_pack,
    stack_packs,
    unmerge,
)
from deepen.cli import main
from deepen.config import LoraSection
from deepen.errors import FamilyError, LayoutError, PackError, TrainingError
from deepen.expansion import expand_checkpoint, plan_layout, read_expansion, verify_bytes
from deepen.families import family_for, family_named, generic, load_families
from deepen.families.names import spell_out
from deepen.methods import Lora
from deepen.model import damped, insert_blocks

LINES = {line.name: line for line in DENSE}
TOKENS = torch.randint(3, 96, (2, 24), generator=torch.Generator().manual_seed(0))
BOTH = ("llama tied and biased", "qwen2", "mistral with a window", "gemma biased, untied")


def plain(directory):
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()  # last bits depend on where a mapped tensor lies
    return model


@torch.no_grad()
def logits(model):
    return model(TOKENS, use_cache=False).logits


def loss_of(model):
    return model(TOKENS, labels=TOKENS, use_cache=False).loss


def family_of(name):
    model_type = getattr(transformers, f"{LINES[name].config}Config").model_type
    return family_for({"model_type": model_type})


def cases():
    """The first line of a family, and what has biases; the others with the slow tests."""
    seen = set()
    for name, line in LINES.items():
        chosen = line.config not in seen or name in BOTH
        for zero in family_of(name).instead:
            seen.add(line.config)
            yield pytest.param(name, zero, marks=() if chosen and line.depth < 6 else pytest.mark.slow)


FEW = [(name, zero) for name in BOTH for zero in ("reads", "norms")]


@pytest.fixture
def base(request, tmp_path):
    return LINES[request.param].write(tmp_path / "base")


@pytest.mark.parametrize(("base", "zero"), list(cases()), indirect=["base"])
def test_the_function_is_kept(base, zero, tmp_path):
    """On disk and in memory, in every family that says so, and both hold the same tensors."""
    out, before = tmp_path / "out", logits(plain(base))
    expand_checkpoint(base, out, after=[0, 2], zero=zero)
    expanded = plain(out)
    assert torch.equal(logits(expanded), before)
    assert verify_bytes(base, out).identical
    model = plain(base)
    insert_blocks(model, plan_layout(model.config.num_hidden_layers, after=[0, 2], zero=zero))
    assert torch.equal(logits(model), before)
    live, held = model.state_dict(), expanded.state_dict()
    assert live.keys() == held.keys()
    assert all(torch.equal(live[name], held[name]) for name in held)
    assert deepen.expansion_of(model) == read_expansion(out).portable


def gradients(model, place):
    model.zero_grad()
    loss_of(model).backward()
    found = {n: p.grad for n, p in model.named_parameters() if n.startswith(place)}
    return {n.removeprefix(place) for n, grad in found.items() if grad is not None and grad.abs().max() > 0}


STEP_0 = {  # of the paper's facts, checked there by finite differences
    "writes": {"self_attn.o_proj.weight", "mlp.down_proj.weight"},
    "reads": {"self_attn.v_proj.weight", "mlp.up_proj.weight"},
    "norms": {"input_layernorm.weight"},
}


@pytest.mark.parametrize("zero", STEP_0)
def test_where_gradients_fall(tiny_llama, zero):
    """At step 0 where the paper's facts say; from step 1 on everywhere, but behind a norm of zero."""
    model = plain(tiny_llama())
    insert_blocks(model, plan_layout(4, after=[1], zero=zero))
    place, names = "model.layers.2.", {n for n, _ in model.model.layers[2].named_parameters()}
    assert gradients(model, place) == STEP_0[zero]
    deepen.freeze_base(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    before = loss_of(model).item()
    optimizer.step()
    model.requires_grad_(True)
    dead = {n for n in names if n.startswith(("mlp.", "post_attention"))} if zero == "norms" else set()
    assert gradients(model, place) == names - dead
    for _ in range(5):
        optimizer.step()
        gradients(model, place)
    assert loss_of(model).item() < before - 1e-3
    assert gradients(model, place) == names - dead


@pytest.mark.parametrize(("base", "zero"), FEW, indirect=["base"])
def test_biases_that_would_be_written_go_too(base, zero, tmp_path):
    """Of each bias that is filled, another value shows; of each that is not, it does not."""
    model = plain(base)
    before = logits(model)
    insert_blocks(model, plan_layout(model.config.num_hidden_layers, after=[1], zero=zero))
    filled = {name.partition(".2.")[2] for name in deepen.expansion_of(model).new_blocks[0].filled}
    for name, bias in model.model.layers[2].named_parameters():
        if name.endswith("bias"):
            held = bias.detach().clone()
            bias.data.add_(1)
            # Behind a gate, a bias shows where the gate is open: up's does, gate's own does not.
            assert torch.equal(logits(model), before) == (name not in filled), name
            bias.data.copy_(held)


def trained(base, pack, zero, after=(0, 2), init="copy"):
    model = plain(base)
    insert_blocks(model, plan_layout(model.config.num_hidden_layers, after=list(after), zero=zero, init=init))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for tensor in deepen.freeze_base(model).values():
            tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.1)
    return model, deepen.save_blocks(model, pack)


@pytest.mark.parametrize("zero", ["reads", "norms"])
def test_packs(tiny_llama, tmp_path, zero):
    """Merged, taken off, stacked on another kind, pruned, loaded: what is computed is what was trained."""
    base = tiny_llama(bias=True, sharded=True)
    model, pack = trained(base, tmp_path / "pack", zero)
    merge_pack(base, pack, tmp_path / "merged")
    assert torch.equal(logits(plain(tmp_path / "merged")), logits(model))
    assert verify_bytes(base, tmp_path / "merged", base_only=True).identical
    assert not verify_bytes(base, tmp_path / "merged").identical
    assert unmerge(tmp_path / "merged", tmp_path / "back").byte_identical
    live = deepen.load(base, pack)
    assert torch.equal(logits(live), logits(model))
    with deepen.bypass(live):
        assert torch.equal(logits(live), logits(plain(base)))
    _, other = trained(base, tmp_path / "other", "writes", after=[1])
    stack_packs(base, [pack, other], tmp_path / "stack")
    kinds = [block.zero for block in read_expansion(tmp_path / "stack").new_blocks]
    assert kinds == [zero, None, zero]
    _, alike = trained(base, tmp_path / "alike", "writes")
    with pytest.raises(PackError, match="began otherwise"):
        average_packs([pack, alike], tmp_path / "average")
    prune_pack(pack, tmp_path / "less", without=[1])
    assert [block.zero for block in read_expansion(tmp_path / "less").new_blocks] == [zero]


@pytest.mark.parametrize("zero", ["reads", "norms"])
def test_damping_scales_what_is_written(tiny_llama, tmp_path, zero):
    """Residual writes, whatever was zero: at 0 the base, at 1 the pack, between them each write scaled."""
    base = tiny_llama(bias=True)
    model, pack = trained(base, tmp_path / "pack", zero)
    damp_pack(pack, tmp_path / "half", alpha=0.5)
    full, half = (load_file(where / "blocks.safetensors") for where in (pack, tmp_path / "half"))
    scaled = {name for name in full if not torch.equal(full[name], half[name])}
    assert scaled == {name for name in full if "o_proj" in name or "down_proj" in name}
    assert all(torch.equal(half[name], full[name] * 0.5) for name in scaled)
    with damped(model, 0.5):
        assert torch.equal(logits(model), logits(deepen.load(base, tmp_path / "half")))
    damp_pack(pack, tmp_path / "none", alpha=0)
    assert torch.equal(logits(deepen.load(base, tmp_path / "none")), logits(plain(base)))


def test_what_was_filled_is_what_is_inspected(tiny_llama, tmp_path):
    base = tiny_llama()
    _, pack = trained(base, tmp_path / "pack", "reads")
    (block, _) = inspect_blocks(pack, base).blocks
    assert {norm.name for norm in block.writes} == {"self_attn.v_proj.weight", "mlp.up_proj.weight"}
    assert {"self_attn.o_proj.weight", "mlp.down_proj.weight"} <= {norm.name for norm in block.others}


@pytest.mark.parametrize("init", ["average", "transport"])
def test_made_of_two_neighbours(tiny_llama, tmp_path, init):
    base = tiny_llama(bias=True)
    expand_checkpoint(base, tmp_path / "out", after=[0], zero="reads", init=init)
    assert torch.equal(logits(plain(tmp_path / "out")), logits(plain(base)))
    assert verify_bytes(base, tmp_path / "out").identical
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert not tensors["model.layers.1.mlp.up_proj.weight"].any()
    place = "model.layers.{}.mlp.down_proj.weight".format
    assert not torch.equal(tensors[place(1)], tensors[place(0)])
    model = plain(base)
    insert_blocks(model, plan_layout(4, after=[0], zero="reads", init=init))
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in model.state_dict().items())


def test_expanded_again(tiny_llama, tmp_path):
    base, once, twice = tiny_llama(), tmp_path / "once", tmp_path / "twice"
    expand_checkpoint(base, once, after=[0], zero="reads")
    expand_checkpoint(once, twice, after=[0, 2], zero="norms")
    assert torch.equal(logits(plain(twice)), logits(plain(base)))
    assert verify_bytes(once, twice).identical
    kinds = {block.index: block.zero for block in read_expansion(twice).new_blocks}
    assert kinds == {1: "norms", 2: "reads", 4: "norms"}


def test_the_record(tiny_llama, tmp_path, capsys):
    base, out = tiny_llama(), tmp_path / "out"
    assert main(["expand", str(base), str(out), "--blocks", "1", "--zero", "reads"]) == 0
    assert "zero: its reads" in capsys.readouterr().out
    assert main(["verify", str(base), str(out)]) == 0
    raw = json.loads((out / "expansion.json").read_text())
    (block,) = raw["new_blocks"]
    assert (block["zero"], set(block["filled"].values())) == ("reads", {0.0})
    for change in ({"zero": "norms"}, {"zero": None}):
        (out / "expansion.json").write_text(json.dumps(raw | {"new_blocks": [block | change]}))
        assert not verify_bytes(base, out).identical
    # A tensor that should be zero and is not is found.
    (out / "expansion.json").write_text(json.dumps(raw))
    tensors = load_file(out / "model.safetensors")
    tensors["model.layers.4.mlp.up_proj.weight"][0, 0] = 1e-30
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    assert "its fill" in verify_bytes(base, out).first_difference


def test_records_without_it_mean_writes(tiny_llama, tmp_path):
    expand_checkpoint(tiny_llama(), tmp_path / "out", blocks=2)
    record = (tmp_path / "out" / "expansion.json").read_text()
    assert "zero" not in record
    assert {block.zero for block in read_expansion(tmp_path / "out").layout.new_blocks} == {"writes"}


@pytest.mark.parametrize("base", ["gpt2", "gemma2", "arcee", "phi3 with a window"], indirect=True)
def test_what_is_not_known_to_be_exact_is_refused(base, tmp_path):
    config = json.loads((base / "config.json").read_text())
    family = family_for(config)
    depth = config[family.depth_key]
    for zero in {"reads", "norms"} - family.instead.keys():
        with pytest.raises(FamilyError, match=f"{zero}: .*the {family.name} family; choose zero writes"):
            expand_checkpoint(base, tmp_path / "out", blocks=1, zero=zero)
        assert not (tmp_path / "out").exists()
        model = plain(base)
        with pytest.raises(FamilyError, match="choose zero writes"):
            insert_blocks(model, plan_layout(depth, blocks=1, zero=zero))
        assert torch.equal(logits(model), logits(plain(base)))


def test_no_such_kind(tiny_llama, tmp_path, capsys):
    with pytest.raises(LayoutError, match="writes, reads or norms"):
        plan_layout(4, blocks=1, zero="all")
    assert main(["expand", str(tiny_llama()), str(tmp_path / "out"), "--blocks", "1", "--zero", "v"]) != 0
    assert "writes, reads or norms" in capsys.readouterr().err


def test_norms_are_warned_of(tiny_llama, tmp_path):
    base = tiny_llama()
    (warning,) = expand_checkpoint(base, tmp_path / "a", blocks=1, zero="norms").warnings
    assert "never learns" in warning
    assert not expand_checkpoint(base, tmp_path / "b", blocks=1, zero="reads").warnings


def test_every_family_that_says_so_is_tried():
    tried = {(family_of(name).name, zero) for name in LINES for zero in family_of(name).instead}
    tried |= {("qwen2_vl", zero) for zero in ("reads", "norms")}  # in `test_towers.py`
    assert tried == {(family.name, zero) for family in load_families() for zero in family.instead}


WRITTEN_BIASES = set(spell_out(["self_attn.{v,o}_proj.bias", "mlp.{up,down}_proj.bias"]))


def test_family_files_fill_every_half_of_a_block():
    for family in load_families():
        in_block = {name for each in family.block for name in (*each.required, *each.optional)}
        required = [
            {name for each in family.block if each.part == part for name in each.required}
            for part in family.parts
        ]
        for fills in family.instead.values():
            assert fills.keys() <= in_block
            assert all(names & fills.keys() for names in required)
            assert in_block & WRITTEN_BIASES <= fills.keys()
            assert all(generic(name) == name for name in fills)


def test_adapters_that_could_not_reach_an_untrained_block_are_refused(tiny_llama):
    base = tiny_llama(bias=True)

    def adapted(zero):
        model = plain(base)
        insert_blocks(model, plan_layout(4, after=[1], zero=zero))
        return Lora(LoraSection(rank=2)).prepare(model)

    assert any("layers.2.self_attn.v_proj" in name for name in adapted("reads"))
    with pytest.raises(TrainingError, match="no gradient would reach"):
        adapted("norms")


def test_families_named_where_it_is_known():
    with pytest.raises(FamilyError, match=r"known for .*llama, .*mistral"):
        family_named("gpt2", "here").fills("reads")
