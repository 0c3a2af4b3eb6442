"""The demo, on a hundredth of its tokens; `make demo` runs the whole."""

import ast
import json
import sysconfig
from pathlib import Path

import pytest

from deepen.checkpoint import Checkpoint
from deepen.cli import main
from deepen.demo import demo
from deepen.demo.text import (
    code,
    documents_apart,
    help_topics,
    is_heldout,
    module_name,
    modules_below,
    prose,
    standard_library,
)
from deepen.expansion import open_base


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    directory = tmp_path_factory.mktemp("texts")
    demo.write_texts(directory)
    return directory


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_embedded_base_is_a_small_llama_with_its_training_record():
    base = open_base(demo.BASE)
    assert 1e6 <= base.parameters <= 4e6
    assert sum(path.stat().st_size for path in demo.BASE.iterdir()) <= 8e6
    record = json.loads((demo.BASE / "training.json").read_text())
    start, end = record["heldout_loss"][0][1], record["heldout_loss"][-1][1]
    assert end < 4 < 7 < start
    assert {"provenance", "recipe", "tokens", "text"} <= record.keys()
    assert Checkpoint.open(demo.BASE).config["tie_word_embeddings"]


def test_what_the_demo_says_of_its_rates_is_what_the_study_recorded():
    record = Path(__file__).parents[1] / "studies" / "demo_rates" / "record.json"
    losses = json.loads(record.read_text())["losses"]
    recipes = demo.demo_recipes(Path("out"))
    for row in ("full", "blocks"):
        rates = {name: loss["tuning"] for name, loss in losses.items() if name.rpartition("-")[0] == row}
        assert min(rates, key=rates.get) == f"{row}-{recipes[row].train.learning_rate:g}"
    lower, blocks = losses["full-0.001"], losses[f"blocks-{recipes['blocks'].train.learning_rate:g}"]
    assert lower["docstrings"] == pytest.approx(blocks["docstrings"], abs=0.005)
    assert lower["tuning"] < blocks["tuning"]


def test_no_module_is_on_both_sides(texts):
    trained = {record["module"] for record in records(texts / "domain.jsonl")}
    general = {record["module"] for record in records(texts / "general-heldout.jsonl")}
    domain = {record["module"] for record in records(texts / "domain-heldout.jsonl")}
    assert trained
    assert len(general) >= 30
    assert len(domain) >= 30
    assert not trained & (general | domain)
    assert all(map(is_heldout, general | domain))
    assert not any(map(is_heldout, trained))


def test_code_has_neither_comments_nor_docstrings_and_still_parses(tmp_path):
    file = tmp_path / "module.py"
    body = "\n".join(f"value_{number} = {number}  # not this" for number in range(40))
    file.write_text(f'"""Not this."""\n\n# nor this\nname = "a # b"\n{body}\n')
    [(_, stripped)] = code([file])
    assert "not this" not in stripped.lower()
    assert 'name = "a # b"' in stripped
    assert ast.unparse(ast.parse(stripped)) == ast.unparse(ast.parse(stripped.replace("\n\n", "\n")))


def test_prose_is_sentences_without_examples(tmp_path):
    file = tmp_path / "module.py"
    sentence = "This function returns the number of things that were counted before. "
    file.write_text(f'def f():\n    """{sentence * 4}\n\n    >>> f()\n    3\n    """\n')
    [(_, text)] = prose([file])
    assert "counted before" in text
    assert ">>>" not in text


def test_help_topics_are_prose():
    topics = dict(help_topics())
    assert len(topics["pydoc_data.topics.assert"]) > 300


def test_files_that_cannot_be_parsed_are_passed_over(tmp_path):
    (tmp_path / "a.py").write_bytes(b"\xff\xfe not python")
    (tmp_path / "b.py").write_text("def (:")
    files = modules_below(tmp_path)
    assert len(files) == 2
    assert list(prose(files)) == []
    assert list(code(files)) == []


def test_the_split_does_not_depend_on_the_order():
    root, files = Path(sysconfig.get_path("stdlib")), standard_library()
    assert documents_apart(files, root) == documents_apart(files[::-1], root)
    assert module_name(root / "json" / "decoder.py", root) == "json.decoder"


def test_the_whole_demo_on_few_tokens(texts, tmp_path, monkeypatch, capsys):
    honest, few = demo.demo_recipes, {"tokens": 3072, "batch_tokens": 1024, "evaluate_every": 2}

    def shortened(out):
        return {
            name: recipe.model_copy(
                update={
                    "train": recipe.train.model_copy(update=few),
                    "evaluate": recipe.evaluate.model_copy(update={"max_tokens": 2000}),
                }
            )
            for name, recipe in honest(out).items()
        }

    monkeypatch.setattr(demo, "demo_recipes", shortened)
    out = tmp_path / "out"
    assert main(["demo", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    for word in (
        "base",
        "full fine-tuning",
        "new blocks",
        "must be kept",
        "must be learned",
        "What to try next",
    ):
        assert word in printed
    for path in texts.iterdir():  # the same each time
        assert (out / "text" / path.name).read_bytes() == path.read_bytes()
    assert "<svg" in (out / "comparison.html").read_text()
    result = json.loads((out / "blocks" / "result.json").read_text())
    assert result["identity"]["identical"]
    assert result["audit"]["unchanged"]
    assert main(["demo", "--out", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"][0]["label"] == "base"
