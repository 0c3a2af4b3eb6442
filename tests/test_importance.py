"""How much each block matters: against models from which the block was really taken."""

import json

import numpy as np
import pytest
import torch
from conftest import write_tiny_llama
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM

from deepen.cli import main
from deepen.config import load_recipe
from deepen.demo.demo import BASE
from deepen.errors import DataError, RecipeError
from deepen.evaluation.importance import cosines, gradient_importance, losses_without
from deepen.expansion import least_important
from deepen.pipeline.plan import plan_run
from deepen.records import ImportanceRecord, read_record


@pytest.fixture
def model(tmp_path):
    return AutoModelForCausalLM.from_pretrained(write_tiny_llama(tmp_path / "base", blocks=3))


@pytest.fixture
def windows():
    draw = np.random.default_rng(0)
    return [draw.integers(0, 96, length) for length in (12, 7, 12, 3)]


def mean_loss(model, windows):
    """By transformers' own forward, a window at a time."""
    nats = 0.0
    for window in windows:
        tokens = torch.from_numpy(window)[None]
        logits = model(input_ids=tokens, use_cache=False).logits[0, :-1].double()
        nats = nats + functional.cross_entropy(logits, tokens[0, 1:], reduction="sum")
    return nats / sum(len(window) - 1 for window in windows)


def test_a_skipped_block_is_as_if_it_were_not_there(model, windows):
    blocks = list(model.model.layers)
    found = losses_without(model, blocks, windows)
    with torch.no_grad():
        assert found[0] == pytest.approx(mean_loss(model, windows).item(), abs=1e-5)
        for number in range(3):
            model.model.layers = nn.ModuleList(blocks[:number] + blocks[number + 1 :])
            model.config.num_hidden_layers = 2
            assert found[number + 1] == pytest.approx(mean_loss(model, windows).item(), abs=1e-5)
            model.model.layers, model.config.num_hidden_layers = nn.ModuleList(blocks), 3
        # Nothing is left behind.
        assert mean_loss(model, windows).item() == pytest.approx(found[0], abs=1e-5)


def test_gradients_are_autograds(model, windows):
    frozen = model.model.layers[1].mlp.up_proj.weight.requires_grad_(False)
    found = gradient_importance(model, list(model.model.layers), windows)
    assert not frozen.requires_grad
    assert model.lm_head.weight.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())
    frozen.requires_grad_(True)
    mean_loss(model, windows).backward()
    for number, block in enumerate(model.model.layers):
        expected = sum((p * p.grad).abs().sum().item() for p in block.parameters())
        assert found[number] == pytest.approx(expected, rel=1e-4)


def test_cosines_are_of_hidden_states(model, windows):
    found = cosines(model, list(model.model.layers), windows)
    pairs = [[], []]
    with torch.no_grad():
        for window in windows:
            states = model(torch.from_numpy(window)[None], output_hidden_states=True).hidden_states
            for number in range(2):  # the last one of transformers is normed
                pairs[number].append(functional.cosine_similarity(states[number], states[number + 1], dim=-1))
    for number in range(2):
        assert found[number] == pytest.approx(torch.cat(pairs[number], 1).mean().item(), abs=1e-5)


@pytest.mark.parametrize(
    ("blocks", "after"),
    [(1, [2]), (2, [0, 2]), (4, [0, 1, 2, 3]), (6, [0, 0, 1, 2, 2, 3])],
    ids=["one", "two", "all", "more"],
)
def test_new_blocks_stand_where_least_is_lost(blocks, after):
    assert least_important([0.2, 0.9, 0.1, 0.4], blocks) == after


def recipe(tmp_path, record, **expand):
    content = {
        "base": str(BASE),
        "output": str(tmp_path / "run"),
        "expand": {"blocks": 2, "placement": "importance", "importance": str(record), **expand},
        "data": {"sequence_length": 32, "sources": [{"path": str(tmp_path / "text.txt")}]},
        "train": {"tokens": 64, "batch_tokens": 64, "learning_rate": 1e-3},
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(content))
    return load_recipe(tmp_path / "recipe.yaml")


def test_the_command_and_a_recipe(tmp_path, capsys):
    (tmp_path / "text.txt").write_text("def add(a, b):\n    return a + b\n" * 20)
    (tmp_path / "other.txt").write_text("The sum of two numbers is returned. " * 20)
    out = tmp_path / "importance.json"
    command = ["inspect", str(BASE), "--text", str(tmp_path / "other.txt"), "--out", str(out)]
    command += ["--domain-text", str(tmp_path / "text.txt"), "--blocks", "2", "--max-tokens", "100"]
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    record = read_record(out, ImportanceRecord)
    assert len(record.blocks) == 6
    scores = [each["general"] - each["domain"] for each in found["blocks"]]
    assert found["after"] == least_important(scores, 2) == sorted(np.argsort(scores)[:2].tolist())
    layout = plan_run(recipe(tmp_path, out)).layout
    assert [block.after for block in layout.new_blocks] == found["after"]
    # Measured on another base: refused.
    out.write_text(record.model_copy(update={"fingerprint": "0" * 64}).model_dump_json())
    with pytest.raises(RecipeError, match=r"fingerprint 0000000000000000…,\nnot on this base"):
        plan_run(recipe(tmp_path, out))


@pytest.mark.parametrize(
    ("expand", "said"),
    [
        ({"importance": None}, "needs a record"),
        ({"placement": "suffix"}, "needs a record"),
        ({"blocks": None, "after": [1]}, "give blocks, not after"),
    ],
    ids=["no-record", "not-asked", "after"],
)
def test_recipes_that_contradict_themselves(tmp_path, expand, said):
    (tmp_path / "text.txt").write_text("text")
    with pytest.raises(RecipeError, match=said):
        recipe(tmp_path, tmp_path / "importance.json", **expand)


def test_no_record_there(tmp_path):
    (tmp_path / "text.txt").write_text("text " * 50)
    with pytest.raises(RecipeError, match=r"absent\.json: cannot be read"):
        plan_run(recipe(tmp_path, tmp_path / "absent.json"))
    with pytest.raises(DataError):
        read_record(tmp_path / "absent.json", ImportanceRecord)
