import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from deepen.errors import CheckpointError, FamilyError
from deepen.families import check_tensors, family_for, generic, load_families, load_refusals

LLAMA = family_for({"model_type": "llama"})
SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 64,
}


def names_of(**config):
    """The tensors of the real class."""
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(**SIZES, **config)).state_dict().keys()


def config_of(depth, **more):
    return {"model_type": "llama", "num_hidden_layers": depth, **more}


@pytest.mark.parametrize("depth", [1, 2, 12])
@pytest.mark.parametrize("bias", [False, True])
def test_every_tensor_of_the_real_class_is_accounted_for(depth, bias):
    names = names_of(num_hidden_layers=depth, attention_bias=bias, mlp_bias=bias)
    assert check_tensors(LLAMA, config_of(depth), names, "here") == depth
    tied = names - {"lm_head.weight"}
    assert check_tensors(LLAMA, config_of(depth, tie_word_embeddings=True), tied, "here") == depth
    assert check_tensors(LLAMA, config_of(depth, tie_word_embeddings=True), names, "here") == depth


def test_residual_writes_are_what_the_real_block_adds_to_the_stream():
    # With them, and only them, filled the real block is the identity.
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, attention_bias=True, mlp_bias=True, **SIZES))
    states = model.state_dict()
    for name, tensor in states.items():
        tensor.normal_()
        place = LLAMA.split(name)
        if place and (value := LLAMA.fill(place[1])) is not None:
            tensor.fill_(value)
    with torch.no_grad():
        below, above = model(torch.tensor([[1, 2, 3]]), output_hidden_states=True).hidden_states
        assert torch.equal(model.model.norm(below), above)
        states["model.layers.0.mlp.down_proj.bias"].fill_(1)
        below, above = model(torch.tensor([[1, 2, 3]]), output_hidden_states=True).hidden_states
        assert not torch.equal(model.model.norm(below), above)


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("model.layers.3.mlp.up_proj.weight", (3, "mlp.up_proj.weight")),
        ("model.layers.30.mlp.up_proj.weight", (30, "mlp.up_proj.weight")),
        ("model.layers.0.x", (0, "x")),
        ("model.layers.03.x", None),
        ("model.layers.-1.x", None),
        ("model.layers.٣.x", None),
        ("model.layers.1²", None),
        ("model.layers.3", None),
        ("model.layers.3.", None),
        ("model.layers." + "9" * 5000 + ".x", None),
        ("xmodel.layers.3.x", None),
        ("model.norm.weight", None),
        ("lm_head.weight", None),
    ],
)
def test_splitting_names(name, place):
    assert LLAMA.split(name) == place
    if place:
        assert LLAMA.join(*place) == name


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda names: names | {"model.layers.0.mlp.gate.weight"},
            "'model.layers.0.mlp.gate.weight' has no pl",
        ),
        (lambda names: names | {"score.weight"}, "'score.weight' has no place in the llama family"),
        (lambda names: names - {"model.norm.weight"}, "'model.norm.weight' is missing"),
        (lambda names: names - {"lm_head.weight"}, "'lm_head.weight' is missing"),
        (
            lambda names: names - {"model.layers.1.mlp.up_proj.weight"},
            "'model.layers.1.mlp.up_proj.weight' is m",
        ),
        (
            lambda names: names | {"model.layers.1.mlp.up_proj.bias"},
            "only one of them has 'mlp.up_proj.bias'",
        ),
        (
            lambda names: {n for n in names if ".1." not in n},
            "num_hidden_layers 3, the files hold blocks 0, 2",
        ),
        (
            lambda names: {n for n in names if ".2." not in n},
            "num_hidden_layers 3, the files hold blocks 0–1",
        ),
        (lambda names: {n for n in names if "layers" not in n}, "the files hold blocks none"),
    ],
)
def test_checkpoints_that_do_not_fit(change, words):
    names = set(names_of(num_hidden_layers=3))
    with pytest.raises(CheckpointError) as caught:
        check_tensors(LLAMA, config_of(3), change(names), "here")
    assert words in str(caught.value)
    assert str(caught.value).startswith("here: ")


@pytest.mark.parametrize("depth", [None, True, "3", 0, 2.0])
def test_depths_that_are_none(depth):
    with pytest.raises(CheckpointError, match="num_hidden_layers"):
        check_tensors(LLAMA, config_of(depth), names_of(num_hidden_layers=2), "here")


@pytest.mark.parametrize(
    "config", [{}, {"model_type": "bert"}, {"model_type": None}, {"model_type": ["llama"]}]
)
def test_unknown_families(config):
    with pytest.raises(FamilyError, match=r"known: .*llama") as caught:
        family_for(config, where="here")
    assert str(caught.value).startswith("here: ")


def test_blocks_that_differ_in_config():
    with pytest.raises(FamilyError, match="per_layer_config"):
        family_for({"model_type": "llama", "per_layer_config": {"0": {}}})


def test_family_files_are_consistent():
    for family in load_families():
        for each in family.block:
            assert not set(each.required) & set(each.optional)
            assert all(generic(name) == name for name in (*each.required, *each.optional))
        in_block = {name for each in family.block for name in (*each.required, *each.optional)}
        assert in_block & family.residual_writes.keys()
        assert family.buffers <= in_block
        assert not family.buffers & family.residual_writes.keys()
        outside = {*family.outside_required, *family.outside_optional}
        assert family.tied.keys() <= outside
        assert set(family.tied.values()) <= outside
        assert not set(family.model_types) & load_refusals()["model_types"].keys()
