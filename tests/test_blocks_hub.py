"""Packs on the hub, without it: its client's calls are recorded, its cache is laid out by hand."""

import json
import os
import re

import huggingface_hub
import pytest
import yaml
from safetensors.torch import load_file, save_file
from trained_files import assert_same_files, in_place

import deepen
from deepen.blocks import extract_pack, fit_pack, inspect_blocks, merge_pack, push_pack, stack_packs
from deepen.blocks.hub import resolve_pack
from deepen.cli import main
from deepen.errors import OutputError, PackError
from deepen.expansion import expand_checkpoint


@pytest.fixture
def made(tiny_llama, tmp_path):
    base, pack = tiny_llama(), tmp_path / "pack"
    expand_checkpoint(base, tmp_path / "expanded", blocks=2, name="someone/base")
    in_place(tmp_path / "expanded", [2, 5])
    extract_pack(tmp_path / "expanded", pack)
    return base, pack


@pytest.fixture
def cached(made, tmp_path, monkeypatch):
    """The pack as the hub's client would have left it: links from a snapshot into blobs."""
    base, pack = made
    home, commit = tmp_path / "hub" / "models--someone--law", "0" * 40
    for folder in ("refs", "blobs", f"snapshots/{commit}"):
        (home / folder).mkdir(parents=True)
    (home / "refs" / "main").write_text(commit)
    for number, path in enumerate(sorted(pack.iterdir())):
        path.rename(home / "blobs" / str(number))
        (home / "snapshots" / commit / path.name).symlink_to(f"../../blobs/{number}")
    pack.rmdir()
    for place in ("huggingface_hub.constants.HF_HUB_CACHE", "huggingface_hub.file_download.HF_HUB_CACHE"):
        monkeypatch.setattr(place, str(tmp_path / "hub"), raising=False)
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return base


def test_every_place_takes_a_hub_id(cached, tmp_path, capsys):
    base, expanded = cached, tmp_path / "expanded"
    assert fit_pack(base, "someone/law").tensors == 18
    merge_pack(base, "someone/law", tmp_path / "merged")
    assert_same_files(expanded, tmp_path / "merged")
    stack_packs(base, ["someone/law"], tmp_path / "stacked")
    assert inspect_blocks(tmp_path / "stacked").packs == ("law",)
    assert inspect_blocks("someone/law", base).parameters > 0
    assert deepen.load(base, "someone/law").config.num_hidden_layers == 6
    for command in (["attach", base, "someone/law"], ["inspect", "someone/law"]):
        assert main(["blocks", *map(str, command), "--json"]) == 0
    assert main(["blocks", "merge", str(base), "someone/law", str(tmp_path / "again")]) == 0


def test_only_a_packs_files_are_asked_for(monkeypatch, made):
    asked = {}

    def download(name, **options):
        asked.update(options, name=name)
        return str(made[1])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve_pack("someone/law") == made[1]
    assert asked["name"] == "someone/law"
    assert set(asked["allow_patterns"]) == {"blocks.safetensors", "expansion.json", "README.md", "LICENSE*"}
    assert asked["ignore_patterns"] == ["*/*"]


@pytest.mark.parametrize("name", ["", "word", "a/b/c", "/absent/pack", "../pack", "someone/absent", "-x/y"])
def test_names_that_lead_nowhere(made, tmp_path, capsys, name):
    with pytest.raises(PackError) as caught:
        resolve_pack(name)
    assert str(caught.value).count("\n") <= 1
    assert main(["blocks", "merge", str(made[0]), "--", name, str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.count("\n") <= 2
    assert not (tmp_path / "out").exists()


def test_pushing(made, hub):
    _, pack = made
    assert push_pack(pack, "someone/law", private=True, token="t") == "https://huggingface.co/someone/law"
    (_, token, name, options), (_, upload_token, _, held) = hub
    assert (name, token, upload_token) == ("someone/law", "t", "t")
    assert options == {"private": True, "exist_ok": True}
    assert set(held) == {"README.md", "blocks.safetensors", "expansion.json"}
    assert held["blocks.safetensors"] == (pack / "blocks.safetensors").read_bytes()
    assert sorted(os.listdir(pack)) == ["blocks.safetensors", "expansion.json"]
    card = held["README.md"].decode()
    front = yaml.safe_load(re.match(r"---\n(.*?)\n---\n", card, re.S)[1])
    assert front["library_name"] == "deepen"
    assert front["base_model"] == "someone/base"
    assert "block-expansion" in front["tags"]
    assert "■■ □2 ■■ □5" in card
    assert "merge someone/base someone/law OUT" in card


def test_a_base_without_a_hub_id_is_not_named(made, hub):
    _, pack = made
    raw = json.loads((pack / "expansion.json").read_text())
    (pack / "expansion.json").write_text(json.dumps({**raw, "base": "/home/me/private/base"}))
    push_pack(pack, "someone/law")
    card = hub[1][3]["README.md"].decode()
    assert "base_model" not in card
    assert "/home/me" not in card


def test_other_files(made, hub):
    _, pack = made
    (pack / "README.md").write_text("my own card")
    (pack / "LICENSE").write_text("a licence")
    (pack / "notes.txt").write_text("not for others")
    (pack / "code.py").write_text("print('no')")
    push_pack(pack, "someone/law")
    assert set(hub[1][3]) == {"README.md", "LICENSE", "blocks.safetensors", "expansion.json"}
    assert hub[1][3]["README.md"] == b"my own card"


def test_what_is_not_pushed(made, hub, tmp_path):
    base, pack = made
    with pytest.raises(PackError, match="not a block pack"):
        push_pack(base, "someone/law")
    with pytest.raises(PackError, match="not a block pack"):
        push_pack("someone/law", "someone/other")
    for name in ("law", "", "a/b/c", "https://x/y"):
        with pytest.raises(OutputError, match="not a hub id"):
            push_pack(pack, name)
    held = load_file(pack / "blocks.safetensors")
    save_file({**held, "x": held[min(held)].clone()}, pack / "blocks.safetensors")
    with pytest.raises(PackError, match="'x' belongs to no new block"):
        push_pack(pack, "someone/law")
    assert not hub


def test_the_hub_says_no(made, capsys):
    """HF_HUB_OFFLINE: the client itself refuses."""
    assert main(["blocks", "push", str(made[1]), "someone/law"]) == 2
    said = capsys.readouterr().err
    assert "someone/law: the hub does not take it" in said
    assert said.count("\n") <= 2


def test_the_command(made, hub, capsys):
    assert main(["blocks", "push", str(made[1]), "someone/law", "--private", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "repo": "someone/law",
        "url": "https://huggingface.co/someone/law",
    }
    assert hub[0][3]["private"] is True
