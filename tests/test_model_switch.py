"""Attaching, switching and detaching: what is refused, and what follows the model."""

import pytest
import torch
from test_model_insert import TINY, generated, logits, move, plain, tokens
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import deepen
from deepen.errors import FamilyError, LayoutError, PackError
from deepen.expansion import plan_layout
from deepen.families import load_families
from deepen.model import file_dtypes, new_parameters, new_tensors, parameter_dtypes
from deepen.model.source import source_checkpoint


@pytest.fixture
def made(tiny_llama, tmp_path):
    """A base and two packs of it."""
    base = tiny_llama()
    for name, after in {"one": [1], "two": [1, 3]}.items():
        model = plain(base)
        deepen.insert_blocks(model, plan_layout(4, after=after))
        move(model)
        deepen.save_blocks(model, tmp_path / name)
    return base, tmp_path / "one", tmp_path / "two"


def test_names(made):
    base, one, two = made
    model = deepen.attach(deepen.attach(plain(base), one), two, name="second")
    assert deepen.attached(model) == ("one", "second")
    assert len(model.model.layers) == 6
    with pytest.raises(PackError, match="'one' is attached already"):
        deepen.attach(model, one)
    for call in (deepen.activate, deepen.detach):
        with pytest.raises(PackError, match=r"nothing is attached as 'third'; there is 'one', 'second'"):
            call(model, "third")
    with pytest.raises(PackError, match="only once"):
        deepen.activate(model, "one", "one")
    assert len(model.model.layers) == 6
    deepen.detach(model, "one")
    assert len(model.model.layers) == 6, "what is active stays"
    assert deepen.attached(model) == ("second",)
    assert deepen.attached(plain(base)) == ()


def test_a_pack_of_another_base(made, tiny_llama):
    base, one, _ = made
    for other, words in (
        ({"seed": 1}, "fingerprint"),
        ({"blocks": 5}, "of 4 blocks"),
        ({"dtype": "bfloat16"}, "fingerprint"),
    ):
        model = plain(tiny_llama("other", **other))
        before = logits(model)
        with pytest.raises(PackError, match=words) as caught:
            deepen.attach(model, one)
        assert str(base) in str(caught.value)
        assert deepen.attached(model) == ()
        assert torch.equal(logits(model), before)
    with pytest.raises(PackError, match="not a block pack"):
        deepen.attach(plain(base), base)


def test_a_base_in_another_precision_is_still_the_base(made):
    base, one, _ = made
    model = deepen.attach(plain(base, torch.bfloat16), one)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert torch.equal(logits(model), logits(deepen.load(base, one, dtype=torch.bfloat16)))


def test_a_failure_leaves_what_was(made, tmp_path):
    from safetensors.torch import load_file, save_file

    base, one, two = made
    held = load_file(two / "blocks.safetensors")
    del held["model.layers.2.mlp.up_proj.weight"]
    save_file(held, two / "blocks.safetensors")
    model = deepen.attach(plain(base), one)
    before = generated(model)
    with pytest.raises(PackError, match=r"layers\.2\.mlp\.up_proj\.weight' is missing"):
        deepen.attach(model, two)
    assert deepen.attached(model) == ("one",)
    assert torch.equal(generated(model), before)
    fresh = plain(base)
    with pytest.raises(PackError):
        deepen.attach(fresh, two)
    assert torch.equal(logits(fresh), logits(plain(base)))
    assert not hasattr(fresh, "_weight_conversions") or fresh._weight_conversions == []


def test_a_pack_may_not_touch_the_base(made):
    from safetensors.torch import load_file, save_file

    base, one, _ = made
    held = load_file(one / "blocks.safetensors")
    save_file(held | {"model.norm.weight": torch.zeros(32)}, one / "blocks.safetensors")
    model = plain(base)
    with pytest.raises(PackError, match=r"'model\.norm\.weight' belongs to no new block"):
        deepen.attach(model, one)
    assert model.model.norm.weight.any()


def test_what_is_inactive_follows_when_it_is_switched_on(made):
    base, one, two = made
    model = deepen.attach(deepen.attach(plain(base), one), two)
    model.to("meta").train()
    deepen.activate(model, "one", "two")
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert all(module.training for module in model.modules())


def test_new_blocks_share_the_models_config(tiny_llama):
    # What is set later, such as the kind of attention, holds for them too.
    model = deepen.insert_blocks(plain(tiny_llama()), plan_layout(4, blocks=2))
    configs = {id(module.config) for module in model.modules() if hasattr(module, "config")}
    assert configs == {id(model.config)}
    before = logits(model)
    model.set_attn_implementation("eager")
    torch.testing.assert_close(logits(model), before)
    assert all(b.self_attn.config._attn_implementation == "eager" for b in model.model.layers)


def test_the_second_domain_starts_from_the_base(made):
    base, one, _ = made
    model = deepen.attach(plain(base), one)
    deepen.activate(model)
    with pytest.raises(PackError, match="none of the model's block packs is active"):
        deepen.freeze_base(model)
    deepen.insert_blocks(model, plan_layout(4, blocks=1), name="code")
    assert torch.equal(logits(model), logits(plain(base)))
    assert deepen.attached(model) == ("one", "code")
    assert deepen.expansion_of(model).stage == 0
    assert set(deepen.freeze_base(model)) == {n for n, _ in model.named_parameters() if ".layers.4." in n}
    deepen.activate(model, "one")
    assert torch.equal(logits(model), logits(deepen.load(base, one)))


def test_a_pack_of_the_second_stage_goes_on_the_first(made, tmp_path):
    base, one, _ = made
    from deepen.blocks import merge_pack

    merge_pack(base, one, tmp_path / "merged")
    model = deepen.insert_blocks(plain(tmp_path / "merged"), plan_layout(5, blocks=1))
    move(model)
    deepen.save_blocks(model, tmp_path / "later")
    live = deepen.attach(deepen.attach(plain(base), one), tmp_path / "later")
    assert torch.equal(logits(live), logits(model))
    assert deepen.attached(live) == ("later",)
    deepen.detach(live, "later")
    assert deepen.attached(live) == ("one",)
    assert torch.equal(logits(live), logits(deepen.load(base, one)))
    with pytest.raises(PackError):
        deepen.attach(plain(base), tmp_path / "later")


def test_what_makes_no_sense_while_bypassed(made):
    base, one, two = made
    model = deepen.attach(plain(base), one)
    with deepen.bypass(model):
        for call in (deepen.attach, deepen.detach, deepen.activate):
            with pytest.raises(PackError, match="bypassed"):
                call(model, two if call is deepen.attach else "one")
    assert len(model.model.layers) == 5


def test_a_shared_parameter_cannot_train_alone(tiny_llama):
    model = deepen.insert_blocks(plain(tiny_llama()), plan_layout(4, blocks=1))
    model.model.layers[4].mlp.up_proj.weight = model.model.layers[3].mlp.up_proj.weight
    with pytest.raises(PackError, match=r"up_proj\.weight' is shared with the base"):
        deepen.freeze_base(model)


@pytest.mark.parametrize("gone", ["mlp.down_proj.weight", "self_attn.o_proj.weight"])
def test_a_write_that_is_not_filled_is_noticed(tiny_llama, monkeypatch, gone):
    from dataclasses import replace

    family = next(family for family in load_families() if family.name == "llama")
    known = {name: value for name, value in family.residual_writes.items() if name != gone}
    lacking = replace(family, residual_writes=known)
    monkeypatch.setattr("deepen.model.structure.family_for", lambda *_: lacking)
    model = plain(tiny_llama())
    with pytest.raises(FamilyError, match=f"{gone}' has another name in memory"):
        deepen.insert_blocks(model, plan_layout(4, blocks=1))
    monkeypatch.setattr("deepen.model.names.family_for", lambda *_: lacking)
    with pytest.raises(FamilyError, match="nothing to fill in its"):
        deepen.insert_blocks(model, plan_layout(4, blocks=1))
    assert len(model.model.layers) == 4


def test_precisions_of_fused_experts(tmp_path):
    from family_table import LINES

    base = next(line for line in LINES if line.name == "mixtral").write(tmp_path / "base")
    plain(base, torch.bfloat16).save_pretrained(tmp_path / "narrow")
    model = deepen.insert_blocks(plain(tmp_path / "narrow", torch.float32), plan_layout(4, blocks=1))
    files = source_checkpoint(model)
    dtypes = file_dtypes(model, files)
    assert "model.layers.4.block_sparse_moe.experts.3.w2.weight" in dtypes
    assert set(dtypes.values()) == {torch.bfloat16}
    found = parameter_dtypes(model, dtypes, new_parameters(model))
    assert found.keys() == new_parameters(model).keys() == new_tensors(model).keys()


def test_the_trainer_saves_packs(tiny_llama, tmp_path):
    base = tiny_llama()
    model = deepen.insert_blocks(plain(base), plan_layout(4, blocks=1))
    deepen.freeze_base(model)
    rows = [{"input_ids": row, "labels": row} for row in tokens(model)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "run"),
        max_steps=2,
        save_steps=1,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )
    Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[deepen.SaveBlocks()]).train()
    model.eval()
    assert not torch.equal(logits(model), logits(plain(base)))
    for place in ("blocks", "checkpoint-2/blocks"):
        assert torch.equal(logits(deepen.load(base, tmp_path / "run" / place)), logits(model))
    assert not torch.equal(logits(deepen.load(base, tmp_path / "run/checkpoint-1/blocks")), logits(model))


def test_names_already_taken(tiny_llama):
    model = deepen.insert_blocks(
        LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, **TINY)), plan_layout(2, blocks=1)
    )
    deepen.activate(model)
    with pytest.raises(LayoutError, match="'new' is attached already"):
        deepen.insert_blocks(model, plan_layout(2, blocks=1))
