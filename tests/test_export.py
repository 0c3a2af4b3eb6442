"""Models to the hub and to servers; llama.cpp has a file of its own."""

import json

import pytest
import yaml

import deepen
from deepen.cli import main
from deepen.demo.demo import BASE
from deepen.errors import CheckpointError, OutputError
from deepen.export.hub import plan_upload, push_checkpoint
from deepen.export.serving import check_serving


@pytest.fixture
def expanded(tmp_path):
    deepen.expand_checkpoint(BASE, tmp_path / "expanded", blocks=2)
    return tmp_path / "expanded"


def test_an_expanded_checkpoint_is_pushed(expanded, hub):
    (expanded / "optimizer.bin").write_bytes(b"private")
    (expanded / "LICENSE").write_text("a licence")
    assert push_checkpoint(expanded, "someone/deeper", private=True, token="t").endswith("someone/deeper")
    (_, token, name, options), (_, _, _, held) = hub
    assert (token, name, options["private"]) == ("t", "someone/deeper", True)
    assert {"config.json", "model.safetensors", "expansion.json", "tokenizer.json", "LICENSE"} < set(held)
    assert "optimizer.bin" not in held
    assert held["model.safetensors"] == (expanded / "model.safetensors").read_bytes()
    card = held["README.md"].decode()
    assert yaml.safe_load(card.split("---")[1])["tags"] == ["deepen", "block-expansion", "llama-pro"]
    assert "2 new transformer blocks stand on an unchanged base of 6" in card
    assert str(BASE) not in card


def test_a_dry_run_asks_nothing_of_the_hub(expanded, hub, capsys):
    (expanded / "README.md").write_text("my own card")
    assert main(["export", "hub", str(expanded), "someone/deeper", "--dry-run", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert not hub
    assert found["url"] is None
    assert found["files"]["README.md"] == len("my own card")
    assert found["bytes"] == sum(found["files"].values())
    push_checkpoint(expanded, "someone/deeper")
    assert set(hub[1][3]) == set(found["files"])


def test_a_pack_goes_as_a_pack(expanded, hub, tmp_path):
    deepen.extract_pack(expanded, tmp_path / "pack")
    planned = plan_upload(tmp_path / "pack", "someone/pack")
    push_checkpoint(tmp_path / "pack", "someone/pack")
    assert set(hub[1][3]) == set(planned.files) == {"README.md", "blocks.safetensors", "expansion.json"}


@pytest.mark.parametrize("repository", ["", "word", "a/b/c", "https://x/y"])
def test_no_repository(expanded, hub, repository):
    with pytest.raises(OutputError, match="is not a hub id"):
        push_checkpoint(expanded, repository)
    assert not hub


def test_what_is_no_model_is_not_pushed(tmp_path, hub):
    (tmp_path / "notes").mkdir()
    with pytest.raises(CheckpointError):
        push_checkpoint(tmp_path / "notes", "someone/notes")
    assert not hub


def test_serving(expanded, capsys):
    assert main(["export", "serving", str(expanded), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["architecture"], found["blocks"]) == ("LlamaForCausalLM", 8)
    assert found["commands"]["vLLM"] == f"vllm serve {expanded.resolve()}"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"auto_map": {"AutoModel": "code.Model"}}, "asks servers to run code"),
        ({"architectures": None}, "names no architectures"),
        ({"num_hidden_layers": 7}, "says num_hidden_layers 7"),
    ],
    ids=["code", "architectures", "depth"],
)
def test_what_servers_would_stumble_over(expanded, change, said):
    config = json.loads((expanded / "config.json").read_text())
    (expanded / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(CheckpointError, match=said):
        check_serving(expanded)


def test_no_tokenizer(expanded):
    (expanded / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="no tokenizer files"):
        check_serving(expanded)
