import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_model_insert import plain

from deepen.expansion import expand_checkpoint
from deepen.model import compare_logits, compare_probes, probe_logits


@pytest.mark.parametrize(
    ("options", "checks"),
    [
        ({}, ("float32, uncached", "float32, cached")),
        (
            {"dtype": "bfloat16", "tied": True, "bias": True},
            ("bfloat16, uncached", "bfloat16, cached", "float32, uncached", "float32, cached"),
        ),
        ({"max_position_embeddings": 4}, ("float32, uncached", "float32, cached")),
    ],
    ids=str,
)
def test_an_expanded_checkpoint_is_its_base(tiny_llama, tmp_path, options, checks):
    base = tiny_llama(**options)
    expand_checkpoint(base, tmp_path / "expanded", after=[-1, 1, 1])
    found = compare_logits(base, tmp_path / "expanded")
    assert found.identical
    assert found.max_abs_difference == 0
    assert found.checks == checks


@pytest.mark.parametrize(
    "name", ["model.layers.3.mlp.up_proj.weight", "model.layers.2.mlp.down_proj.weight", "model.norm.weight"]
)
def test_one_changed_element(tiny_llama, tmp_path, name):
    base, expanded = tiny_llama(), tmp_path / "expanded"
    expand_checkpoint(base, expanded, blocks=2)
    held = load_file(expanded / "model.safetensors")
    held[name].view(-1)[0] += 0.5
    save_file(held, expanded / "model.safetensors", {"format": "pt"})
    found = compare_logits(base, expanded)
    assert not found.identical
    # The oracle: the same difference by transformers alone.
    ids = torch.randint(96, (2, 48), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        outputs = [plain(where)(input_ids=ids, use_cache=False).logits for where in (base, expanded)]
    difference = (outputs[0] - outputs[1]).abs().max().item()
    assert difference > 0
    assert found.max_abs_difference == pytest.approx(difference, rel=1e-3)


def test_the_models_modes_are_restored(tiny_llama):
    model = plain(tiny_llama(attention_dropout=0.5))
    expected = probe_logits(model)
    model.train()
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    again = probe_logits(model)
    assert [module.training for module in model.modules()] == modes
    assert len(set(modes)) == 2
    assert all(torch.equal(expected[name], again[name]) for name in expected)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_modes_are_restored_after_a_failure(tiny_llama):
    model = plain(tiny_llama()).train()
    model.config.vocab_size = 10_000
    with pytest.raises(IndexError):
        probe_logits(model)
    assert model.training


def test_both_probes_see_the_same_tokens(tiny_llama):
    probes = probe_logits(plain(tiny_llama()))
    assert probes["uncached"].shape == (2, 48, 96)
    assert probes["cached"].shape == (2, 8, 96)
    torch.testing.assert_close(probes["cached"], probes["uncached"][:, -8:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("base", "other", "identical", "difference"),
    [
        ([1.0, 2.0], [1.0, 2.0], True, 0.0),
        ([1.0, 2.0], [1.5, 2.0], False, 0.5),
        ([1.0, math.nan], [1.0, math.nan], True, 0.0),
        ([1.0, math.inf], [1.0, math.inf], True, 0.0),
        ([1.0, 2.0], [1.0, math.nan], False, math.inf),
        ([1.0, math.inf], [1.0, -math.inf], False, math.inf),
        ([1.0, 2.0], [1.0, 2.0, 3.0], False, math.inf),
    ],
)
def test_comparing(base, other, identical, difference):
    found = compare_probes({"uncached": torch.tensor(base)}, {"uncached": torch.tensor(other)})
    assert found.identical is identical
    assert found.max_abs_difference == difference


def test_comparing_precisions():
    ones = torch.ones(2)
    assert not compare_probes({"cached": ones}, {"cached": ones.bfloat16()}).identical
