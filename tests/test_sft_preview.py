import html
import json
import re

import pytest
from tiny_run import write_base, write_recipe
from transformers import AutoTokenizer

from deepen.cli import main

FOUND = [
    {"instruction": f"write the {word}", "input": "", "output": f"{word} stream " * count}
    for count, word in enumerate(("norm", "head", "gate", "block"), start=1)
]


@pytest.fixture
def recipe(tmp_path):
    write_base(tmp_path / "base")
    (tmp_path / "talk.json").write_text(json.dumps(FOUND))
    data = [{"path": str(tmp_path / "talk.json")}]
    return write_recipe(tmp_path, sft={"data": data, "template": "zephyr", "batch": 2})


def preview(capsys, *arguments) -> dict:
    capsys.readouterr()
    assert main(["data", "preview", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_what_is_learned_are_the_answers(tmp_path, recipe, capsys):
    facts = preview(capsys, recipe, "--set", "sft.sequence_length=64", "--set", "sft.batch=9")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    learned = []
    for example in facts["examples"]:
        assert len(example["token_ids"]) == len(example["trained"]) == 65
        assert example["stage"] == "sft"
        ids = [i for i, mark in zip(example["token_ids"], example["trained"], strict=True) if mark]
        learned += re.findall(r"(.+?)<\|endoftext\|>\n", tokenizer.decode(ids))
    assert set(learned) == {record["output"] for record in FOUND}
    (one,) = facts["sets"]
    assert one["forms"] == ["talk.json: alpaca (keys instruction, input, output)"]
    assert (facts["template"], one["counts"]["kept"], one["counts"]["cut"]) == ("zephyr", 4, 0)
    # The paper's length is more than this base has.
    assert preview(capsys, recipe)["sequence_length"] == 64


def test_what_is_cut_is_said(recipe, capsys):
    assert main(["data", "preview", str(recipe), "--set", "sft.sequence_length=44"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"window 1: talk \d, \d conversations?, \d+ of 44 targets trained", shown)
    assert re.search(r"talk: 4 conversations, \d+ tokens, \d+ learned; 1 cut at the end", shown)
    assert "95% have at most" in shown
    assert "chat template: zephyr; an epoch is 4 windows, the run 2 steps" in shown


def test_the_page_greys_what_is_not_learned(tmp_path, recipe, capsys):
    page = tmp_path / "preview.html"
    facts = preview(capsys, recipe, "--set", "sft.sequence_length=64", "--html", page)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    windows = re.findall(r'<pre class="window">(.*?)</pre>', page.read_text(), re.DOTALL)
    assert len(windows) == len(facts["examples"]) == 2
    for window, example in zip(windows, facts["examples"], strict=True):
        shown = re.findall(r'<span class="learned [^"]*"[^>]*>(.*?)</span>', window, re.DOTALL)
        ids = [i for i, mark in zip(example["token_ids"], example["trained"], strict=True) if mark]
        assert html.unescape("".join(shown)) == tokenizer.decode(ids)
        assert "write the" in re.sub(r'<span class="learned.*?</span>', "", window, flags=re.DOTALL)
    assert "chat template: zephyr" in page.read_text()


def test_both_stages_can_be_seen(recipe, capsys):
    facts = preview(capsys, recipe, "--stage", "train")
    assert {example["stage"] for example in facts["examples"]} == {"train"}
    assert facts["sources"][0]["name"] == "train"


FAULTS = {
    "sft.template=null": "the tokenizer has no chat template; choose one",
    "sft.template=chatml": "record 1: chat template chatml ends the assistant's turn with no special token",
    "sft.sequence_length=65": "sft.sequence_length: 65 is more than the base's 64 positions",
    "sft.data.0.format=sharegpt": "talk.json: record 1: none of the fields messages",
    "sft.data.0.path=nowhere.json": "nowhere.json: no file matches",
    "sft.data=[]": "sft.data: should not be empty",
    "sft.trainable=some": "sft.trainable",
    "sft.data=[{path: a.json},{path: b/a.json}]": "sft.data: two sets are called a",
    "sft=null": "sft: the recipe has no such section to show",
}


@pytest.mark.parametrize("setting", FAULTS)
def test_faults_are_said_in_a_line(recipe, capsys, setting):
    assert main(["data", "preview", str(recipe), "--stage", "sft", "--set", setting]) == 2
    assert FAULTS[setting] in capsys.readouterr().err
