"""The rules of the family files against the config classes of transformers, which are what they describe."""

from itertools import product

import pytest
from transformers import AutoConfig

from deepen.errors import CheckpointError, LayoutError
from deepen.expansion import expand_config, plan_layout
from deepen.families import family_for, load_families

DEPTHS = (1, 2, 5, 12, 30)
LISTED = [
    (family.name, model_type)
    for family in load_families()
    for model_type in family.model_types
    if family.per_layer.lists
]
RULED = [
    model_type for f in load_families() for model_type in f.model_types if f.per_layer.keys or f.trailing_key
]


def choices(family):
    """For every config key its rules ask for: absent, and some values."""
    found = {}
    for rule in family.per_layer.lists:
        test = rule.predicate
        numbers = [n for n in (test.every, test.not_every, test.start, test.below) if n and n.key]
        found |= {number.key: [None, 2, 3] for number in numbers}
        # A window as small as the model, and none at all.
        found |= {setting.key: [None, 8, False] for setting in test.when}
    return found


def settings(family):
    keys = choices(family)
    for values in product(*keys.values()):
        chosen = {k: v for k, v in zip(keys, values, strict=True) if v is not None}
        # Booleans are booleans in the configs of transformers, and a window that is not there is null.
        yield {k: bool(v) if k.startswith("use_") else v or None for k, v in chosen.items()}


@pytest.mark.parametrize(("name", "model_type"), LISTED)
def test_lists_are_derived_as_transformers_does(name, model_type):
    family = family_for({"model_type": model_type})
    compared = 0
    for depth, chosen in product(DEPTHS, settings(family)):
        raw = {"model_type": model_type, "num_hidden_layers": depth, **chosen}
        config = AutoConfig.for_model(**raw)
        known = dict(raw)
        for rule in family.per_layer.lists:
            known[rule.key] = rule.derive(known, depth)
            assert known[rule.key] == list(getattr(config, rule.key)), (raw, rule.key)
            compared += 1
    assert compared >= len(DEPTHS)


@pytest.mark.parametrize("model_type", RULED)
def test_defaults_are_those_of_the_class(model_type):
    """A family file states what the class says where a config leaves a key away."""
    family, config = family_for({"model_type": model_type}), AutoConfig.for_model(model_type)
    rules = [*family.per_layer.lists, *family.per_layer.numbers]
    numbers = [n for r in rules for p in [r.predicate] for n in (p.every, p.not_every, p.start, p.below) if n]
    for number in numbers:
        if number.key and hasattr(config, number.key):
            assert getattr(config, number.key) == number.default
    for leading in family.per_layer.leading:
        assert (getattr(config, leading.key) or 0) == leading.default


@pytest.mark.parametrize("family", load_families(), ids=lambda family: family.name)
def test_what_is_tied_by_default(family):
    for model_type in family.model_types:
        config = AutoConfig.for_model(model_type)
        tied = getattr(config, "tie_word_embeddings", False)  # a text tower's says nothing
        assert tied == family.tied_by_default, model_type
        assert isinstance(getattr(config, family.depth_key), int)


def expanded(config, **placed):
    family = family_for(config)
    layout = plan_layout(config[family.depth_key], **placed)
    return expand_config(config, family, layout)


def test_a_list_in_the_config_is_extended_and_wins_over_the_rule():
    kinds = ["full_attention", "sliding_attention", "sliding_attention"]
    config = {"model_type": "gemma2", "num_hidden_layers": 3, "layer_types": kinds}
    assert expanded(config, after=[0, 1])["layer_types"] == [kinds[0]] * 2 + [kinds[1]] * 2 + [kinds[2]]


def test_a_list_of_another_length_is_refused():
    config = {"model_type": "gemma2", "num_hidden_layers": 3, "layer_types": ["full_attention"]}
    with pytest.raises(CheckpointError, match="layer_types has 1 entries for 3 blocks"):
        expanded(config, blocks=1)


def test_a_list_no_family_file_names_is_extended_too():
    config = {"model_type": "llama", "num_hidden_layers": 2, "layer_types": ["a", "b"]}
    assert expanded(config, after=[0])["layer_types"] == ["a", "a", "b"]


def test_a_derived_list_is_written_only_where_it_says_something():
    qwen = {"model_type": "qwen2", "num_hidden_layers": 4, "max_window_layers": 2}
    assert "layer_types" not in expanded(qwen, blocks=2)
    # All blocks are full here, but the rule would make the topmost ones of six slide.
    sliding = qwen | {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 4}
    assert expanded(sliding, blocks=2)["layer_types"] == ["full_attention"] * 6
    some = sliding | {"max_window_layers": 2}
    assert expanded(some, after=[1, 3])["layer_types"] == ["full_attention"] * 3 + ["sliding_attention"] * 3


def test_numbers_of_dense_blocks():
    config = {"model_type": "qwen3_moe", "num_hidden_layers": 4, "mlp_only_layers": [1]}
    assert expanded(config, after=[0, 1])["mlp_only_layers"] == [2, 3]
    stepped = config | {"decoder_sparse_step": 2}
    found = expanded(stepped, after=[2])
    assert (found["mlp_only_layers"], found["decoder_sparse_step"]) == ([0, 1, 2, 3], 1)
    assert "mlp_only_layers" not in expanded({"model_type": "qwen3_moe", "num_hidden_layers": 4}, blocks=1)


def test_a_number_of_leading_blocks():
    config = {"model_type": "deepseek_v3", "num_hidden_layers": 5, "first_k_dense_replace": 2}
    assert expanded(config, after=[1, 3])["first_k_dense_replace"] == 3
    assert expanded(config, after=[2])["first_k_dense_replace"] == 2
    assert expanded({"model_type": "deepseek_v3", "num_hidden_layers": 5}, after=[0])[
        "first_k_dense_replace"
    ] == (4)
    with pytest.raises(LayoutError, match="--after"):
        expanded(config, blocks=5, groups=1)
