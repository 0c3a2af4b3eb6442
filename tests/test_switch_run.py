"""A run that measures a switch on its texts, and studies that table it."""

import json

import pytest
from test_model_insert import plain
from test_switch_fit import learn, rows_of
from tiny_run import sentences, write_base, write_recipe

from deepen.cli import main
from deepen.config import build_recipe, load_recipe
from deepen.errors import RecipeError, SwitchError
from deepen.pipeline.plan import tuning_recipe
from deepen.pipeline.run import run_recipe
from deepen.records import SwitchEvaluation, read_record
from deepen.report.page import render_report
from deepen.report.read import read_run

LENGTH = 96  # of the base's context, so that `deepen evaluate` cuts texts as the run does


def long_recipe(root):
    """A recipe of texts that go on behind a prompt; the base knows the general ones."""
    write_base(root / "base", max_position_embeddings=LENGTH)
    path = write_recipe(
        root, data__sequence_length=LENGTH, train__batch_tokens=2 * LENGTH, evaluate__switch={}
    )
    for name, offset in (("general", 0), ("heldout", 3)):
        lines = [json.dumps({"text": text}) for text in sentences(offset, 34, 120)]
        (root / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("run")
    path = long_recipe(root)
    model = plain(root / "base")
    learn(model, model.parameters(), rows_of(root, "general"), steps=20)
    model.save_pretrained(root / "base")
    run_recipe(load_recipe(path))
    return root, path


def test_a_run_finds_what_evaluate_finds_of_its_pack(run, tmp_path):
    root, _ = run
    found = read_record(root / "run/evaluation/switch.json", SwitchEvaluation)
    texts = ["--text", f"{root}/general.jsonl", "--domain-text", f"{root}/heldout.jsonl"]
    out = ["--switch", "auto", "--out", str(tmp_path)]
    assert main(["evaluate", f"{root}/run/blocks", *texts, *out]) == 0
    wanted = read_record(tmp_path / "switch.json", SwitchEvaluation)
    assert (found.prompt_tokens, found.threshold, found.kind) == (64, 0, "likelihood")
    assert found.unscored == wanted.unscored
    assert [row.answers for row in found.rows] == ["new", "switch"]
    for ours, theirs in zip(found.tallies, wanted.tallies, strict=True):
        assert (ours.prompts, ours.wrong) == (theirs.prompts, theirs.wrong)
        assert ours.wrong < ours.prompts // 2
    for ours, theirs in zip(found.rows, wanted.rows, strict=True):
        for mine, other in zip(ours.metrics, theirs.metrics, strict=True):
            assert (mine.task, mine.n) == (other.task, other.n)
            assert mine.value == pytest.approx(other.value, abs=1e-6)
            assert mine.base_value == pytest.approx(other.base_value, abs=1e-6)
        for mine, other in zip(ours.texts, theirs.texts, strict=True):
            assert mine.digest == other.digest
            assert mine.items.nll == pytest.approx(other.items.nll, abs=1e-4)
    assert found.cost == wanted.cost
    always, switched = found.rows
    assert always.metrics[1].delta < 0 < always.metrics[0].delta, "there is something to switch"
    assert switched.metrics[0].delta < always.metrics[0].delta


def test_the_page_shows_it(run):
    root, path = run
    page = (root / "run/report.html").read_text()
    assert "With a switch" in page
    record = read_record(root / "run/evaluation/switch.json", SwitchEvaluation)
    for tally in record.tallies:
        assert f"{tally.wrong} of {tally.prompts}" in page
    (root / "run/evaluation/switch.json").rename(root / "kept.json")
    assert "With a switch" not in render_report(read_run(root / "run"))
    # As a kill between this and the run's end leaves it: it is measured again, nothing is trained again.
    (root / "run/result.json").unlink()
    trained = (root / "run/metrics.jsonl").read_bytes()
    run_recipe(load_recipe(path), resume=True)
    again = read_record(root / "run/evaluation/switch.json", SwitchEvaluation)
    assert again.rows == record.rows
    assert (root / "run/metrics.jsonl").read_bytes() == trained


def test_what_leaves_nothing_to_score_is_said_before_training(tmp_path):
    recipe = load_recipe(long_recipe(tmp_path))
    (tmp_path / "general.jsonl").write_text('{"text": "block gate norm"}\n' * 3)
    with pytest.raises(SwitchError, match="general: no window is longer than the 64 tokens"):
        run_recipe(recipe)
    assert not (tmp_path / "run").exists()


def test_a_tuning_without_the_base_inside_has_no_switch(tmp_path):
    raw = {
        "base": "b",
        "output": "o",
        "expand": {"blocks": 1},
        "data": {"sequence_length": 128, "sources": [{"path": "t"}]},
        "train": {"tokens": 1024, "batch_tokens": 128, "learning_rate": 1e-3},
        "sft": {"data": [{"path": "c"}], "trainable": "all", "learning_rate": 1e-4},
        "evaluate": {"general": [{"path": "g"}], "switch": {"prompt_tokens": 16}},
    }
    recipe = build_recipe(raw, "recipe")
    assert recipe.evaluate.switch.prompt_tokens == 16
    assert tuning_recipe(recipe).evaluate.switch is None
    raw["sft"]["trainable"] = "new"
    assert tuning_recipe(build_recipe(raw, "recipe")).evaluate.switch.prompt_tokens == 16


REFUSED = [
    ({"train__method": "full", "expand": None}, "switch is about new blocks .* method full"),
    ({"evaluate__switch": {"prompt_tokens": 33}}, "33 leaves nothing to score .* 32"),
    ({"evaluate__switch": {"prompt_tokens": 1}}, "greater than or equal to 2"),
    ({"evaluate__general": None, "evaluate__domain": None}, "switch: no text to decide on"),
]


@pytest.mark.parametrize(("changes", "words"), REFUSED, ids=[words for _, words in REFUSED])
def test_faults_are_said_on_loading(tmp_path, changes, words):
    path = write_recipe(tmp_path, **{"evaluate__switch": {"prompt_tokens": 8}, **changes})
    with pytest.raises(RecipeError, match=words):
        load_recipe(path)
