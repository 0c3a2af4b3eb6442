import json
from pathlib import Path

import pytest
from tiny_run import write_base, write_recipe

from deepen.cli import main
from deepen.config import load_recipe


@pytest.fixture
def recipe(tmp_path):
    write_base(tmp_path / "base")
    return write_recipe(tmp_path)


def run(capsys, *arguments) -> dict:
    capsys.readouterr()
    assert main(["data", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_prepare_makes_what_a_run_finds(tmp_path, recipe, capsys):
    facts = run(capsys, "prepare", recipe)
    (source,) = facts["sources"]
    assert facts["ready"]
    assert source["documents"] == 40
    assert facts["windows_per_epoch"] == source["windows_per_epoch"] == -(-source["tokens"] // 32)
    assert [path.name for path in (tmp_path / "cache/corpora").iterdir()] == [source["digest"][:32]]
    assert run(capsys, "prepare", recipe)["sources"] == facts["sources"]
    assert not (tmp_path / "run").exists()


def test_prepare_says_what_is_held_out_and_what_is_not_read(tmp_path, capsys):
    write_base(tmp_path / "base")
    recipe = write_recipe(tmp_path, data__heldout=0.3)
    source = load_recipe(recipe).data.sources[0]
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "train.jsonl").write_bytes(Path(source.path).read_bytes())
    (folder / "scan.pdf").write_bytes(b"%PDF")
    there = ["--set", f"data.sources=[{{path: {folder}}}]"]
    heldout = run(capsys, "prepare", recipe, *there)["sources"][0]["heldout_documents"]
    assert 0 < heldout < 40
    assert main(["data", "prepare", str(recipe), *there]) == 0
    said = capsys.readouterr()
    assert f" {40 - heldout} documents (" in said.out
    assert f", {heldout} documents held out, " in said.out
    assert f"{folder}: 1 of other kinds not read (.pdf)" in said.err


def test_pieces_make_the_same_corpus(tmp_path, recipe, capsys):
    whole = run(capsys, "prepare", recipe)["sources"][0]
    there = ["--set", f"data.cache={tmp_path / 'other'}"]
    first = run(capsys, "prepare", recipe, "--shard", "2/2", *there)
    assert first["sources"] == [{"name": "train", "ready": False}]
    assert not first["ready"]
    last = run(capsys, "prepare", recipe, "--shard", "1/2", *there)
    assert last["ready"]
    assert {**last["sources"][0], "directory": ""} == {**whole, "directory": ""}
    assert main(["data", "prepare", str(recipe), "--shard", "1/2", *there]) == 0
    assert "train: " in capsys.readouterr().out


def test_prepare_says_what_is_wrong_in_a_line(recipe, capsys):
    for arguments in (["--shard", "3/2"], ["--set", "data.sources.0.path=nowhere.txt"]):
        assert main(["data", "prepare", str(recipe), *arguments]) == 2
        assert "error: " in capsys.readouterr().err


def test_preview_shows_what_a_run_trains_on(tmp_path, recipe, capsys):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    packed = ["--set", "data.packing=best_fit", "--set", "data.document_masks=true"]
    facts = run(capsys, "preview", recipe, "--windows", "3", *packed)
    assert len(facts["examples"]) == 3
    texts = [json.loads(line)["text"] for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    for example in facts["examples"]:
        length = len(example["token_ids"])
        assert length == len(example["trained"]) == 33
        assert example["trained"][0] == 0
        assert set(example["trained"]) <= {0, 1}
        ends = [*example["starts"][1:], length]
        for begin, end in zip(example["starts"], ends, strict=True):
            if begin >= length - example["padding"]:
                assert not any(example["trained"][begin:])
                continue
            assert not example["trained"][begin]
            assert all(example["trained"][begin + 1 : end])
            assert example["positions"][begin : min(end, 32)] == list(range(min(end, 32) - begin))
            piece = tokenizer.decode(example["token_ids"][begin:end], skip_special_tokens=True)
            assert any(piece in text for text in texts)
    counts = facts["sources"][0]["packing"]
    assert counts["trained"] + counts["padding"] <= counts["places"]


def test_preview_is_the_runs_batch(tmp_path, recipe, capsys):
    from deepen.data.batches import Mixture
    from deepen.data.corpus import Corpus

    facts = run(capsys, "preview", recipe, "--step", "3")
    corpus = Corpus(next((tmp_path / "cache/corpora").iterdir()))
    batch = Mixture([(corpus, 1.0)], 32, load_recipe(recipe).train.seed).batch(2, 4)
    assert [example["token_ids"] for example in facts["examples"]] == batch.tokens.tolist()
    assert all(sum(example["trained"]) == 32 for example in facts["examples"])


def test_preview_in_words(recipe, capsys):
    assert main(["data", "preview", str(recipe), "--windows", "1"]) == 0
    shown = capsys.readouterr().out
    assert "window 1: train" in shown
    assert "32 of 32 targets trained" in shown
    assert "block" in shown
    assert "packing stream, no document masks" in shown


def test_checks_are_made_and_said(tmp_path, recipe, capsys):
    lines = (tmp_path / "train.jsonl").read_text() + (tmp_path / "heldout.jsonl").read_text()
    extra = "".join(
        json.dumps({"text": " ".join(f"{number}x{place}" for place in range(30))}) + "\n"
        for number in range(9)
    )
    (tmp_path / "train.jsonl").write_text(lines + extra)
    facts = run(capsys, "prepare", recipe, "--set", "data.decontaminate={}", "--set", "data.deduplicate={}")
    found = facts["findings"]["sources"][0]
    assert found["all"]["documents"] == 69
    assert found["overlapping"]["documents"] >= 20
    assert found["by_text"].keys() <= {"general", "heldout"}
    assert facts["sources"][0]["documents"] == 69 - found["dropped"]["documents"] >= 9


def test_a_check_against_nothing_is_refused(recipe, capsys):
    empty = ["--set", "evaluate.general=[]", "--set", "evaluate.domain=[]", "--set", "data.decontaminate={}"]
    assert main(["data", "prepare", str(recipe), *empty]) == 2
    assert "error: data.decontaminate: there is nothing to check against" in capsys.readouterr().err
