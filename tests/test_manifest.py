import json

import pytest

from deepen.errors import CheckpointError, FamilyError
from deepen.expansion import (
    Fingerprint,
    base_name,
    describe_expansion,
    expand_config,
    plan_layout,
    read_expansion,
)
from deepen.families import check_tensors, family_for

LLAMA = family_for({"model_type": "llama"})
BLOCK = ("self_attn.o_proj.weight", "self_attn.o_proj.bias", "mlp.down_proj.weight", "mlp.up_proj.weight")


def example(**layout):
    plan = plan_layout(4, **(layout or {"blocks": 2}))
    tensors = dict.fromkeys(range(4), BLOCK)
    return describe_expansion(plan, LLAMA, tensors, "base", Fingerprint(fast="f" * 64))


def as_json():
    return json.loads(example().to_json())


def write(directory, content):
    text = content if isinstance(content, str) else json.dumps(content)
    (directory / "expansion.json").write_text(text)
    return directory


def test_content(tmp_path):
    recorded = as_json()
    assert recorded["format_version"] == 1
    assert recorded["base_fingerprint"] == {"fast": "f" * 64, "full": None}
    assert recorded["new_blocks"][0] == {
        "index": 2,
        "after": 1,
        "copy_of": 1,
        "filled": {
            "model.layers.2.self_attn.o_proj.weight": 0,
            "model.layers.2.self_attn.o_proj.bias": 0,
            "model.layers.2.mlp.down_proj.weight": 0,
        },
        "stage": 0,
    }
    assert read_expansion(write(tmp_path, recorded)) == example()


def test_unknown_keys_are_kept(tmp_path):
    content = as_json()
    content["later"] = {"a": 1}
    content["new_blocks"][0]["colour"] = "red"
    again = json.loads(read_expansion(write(tmp_path, content)).to_json())
    assert again["later"] == {"a": 1}
    assert again["new_blocks"][0]["colour"] == "red"


def test_unknown_version_names_both(tmp_path):
    with pytest.raises(CheckpointError, match="format_version is 2; this deepen reads format_version 1"):
        read_expansion(write(tmp_path, {**as_json(), "format_version": 2}))


def broken(**changes):
    content = as_json()
    content["new_blocks"][0] |= changes
    return content


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "not readable as JSON"),
        ("[" * 100_000, "not readable as JSON"),
        ("[]", "format_version is None"),
        ({**as_json(), "base_blocks": 0}, "base_blocks"),
        ({**as_json(), "base_blocks": "4"}, "base_blocks"),
        ({**as_json(), "new_blocks": []}, "new_blocks"),
        ({**as_json(), "new_blocks": as_json()["new_blocks"][::-1]}, "ascending"),
        (broken(index=3), "contradicts"),
        (broken(copy_of=4), "contradicts"),
        (broken(after=0), "contradicts"),
        (broken(index=-1), "index"),
        ({key: value for key, value in as_json().items() if key != "base_fingerprint"}, "base_fingerprint"),
    ],
)
def test_refused(tmp_path, content, words):
    with pytest.raises(CheckpointError, match=words) as caught:
        read_expansion(write(tmp_path, content))
    assert "expansion.json" in str(caught.value)


def test_absent(tmp_path):
    with pytest.raises(CheckpointError, match="not found"):
        read_expansion(tmp_path)


def test_names_of_base_tensors():
    expansion = example()  # base blocks stand at 0, 1, 3, 4
    named = [base_name(expansion, LLAMA, f"model.layers.{index}.mlp.up_proj.weight") for index in range(6)]
    at = "model.layers.{}.mlp.up_proj.weight".format
    assert named == [at(0), at(1), None, at(2), at(3), None]
    assert base_name(expansion, LLAMA, "model.norm.weight") == "model.norm.weight"


def test_config_keeps_keys_order_and_values():
    config = {"b": 1e-05, "num_hidden_layers": 4, "a": None, "x": [1, 2, 3, 4]}
    expanded = expand_config(config, LLAMA, plan_layout(4, blocks=2))
    assert list(expanded.items()) == [
        ("b", 1e-05),
        ("num_hidden_layers", 6),
        ("a", None),
        ("x", [1, 2, 3, 4]),
    ]


def test_layer_numbers_are_matched_whole():
    assert LLAMA.split("model.layers.30.mlp.up_proj.weight") == (30, "mlp.up_proj.weight")
    for name in ("model.layers.03.x", "model.layers.x.y", "model.layers.3", "layers.3.x", "model.layers.3."):
        assert LLAMA.split(name) is None
    assert LLAMA.split(f"model.layers.{'9' * 5000}.x") is None


def names(blocks=2):
    inside = [
        LLAMA.join(block, rest) for block in range(blocks) for part in LLAMA.block for rest in part.required
    ]
    return [*LLAMA.outside_required, "lm_head.weight", *inside]


@pytest.mark.parametrize(
    ("config", "held", "words"),
    [
        ({"num_hidden_layers": 3}, names(), "num_hidden_layers 3, the files hold blocks 0–1"),
        ({"num_hidden_layers": 1}, names(), "num_hidden_layers 1"),
        ({}, names(), "num_hidden_layers is None"),
        ({"num_hidden_layers": True}, names(), "num_hidden_layers is True"),
        ({"num_hidden_layers": 2}, [*names(), "score.weight"], "'score.weight' has no place"),
        ({"num_hidden_layers": 2}, names()[:-1], "'model.layers.1.mlp.down_proj.weight' is missing"),
        ({"num_hidden_layers": 2}, names()[1:], "'model.embed_tokens.weight' is missing"),
        (
            {"num_hidden_layers": 2},
            [n for n in names() if n != "lm_head.weight"],
            "'lm_head.weight' is missing",
        ),
        (
            {"num_hidden_layers": 2},
            [*names(), "model.layers.1.self_attn.o_proj.bias"],
            "blocks 0 and 1 differ",
        ),
    ],
)
def test_every_tensor_is_accounted_for(config, held, words):
    with pytest.raises(CheckpointError, match=words):
        check_tensors(LLAMA, config, held, "somewhere")


def test_tied_models_need_no_head():
    held = [name for name in names() if name != "lm_head.weight"]
    assert check_tensors(LLAMA, {"num_hidden_layers": 2, "tie_word_embeddings": True}, held, "x") == 2


@pytest.mark.parametrize("config", [{}, {"model_type": "bert"}, {"model_type": ["llama"]}])
def test_unknown_family(config):
    with pytest.raises(FamilyError, match="not a family deepen knows"):
        family_for(config)
