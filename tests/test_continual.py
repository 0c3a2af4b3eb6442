import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import write_tiny_llama
from safetensors.torch import load_file
from scipy.stats import sem
from tiny_run import WORDS, write_base
from transformers import AutoModelForCausalLM

from deepen.cli import main
from deepen.cli.output import table_console
from deepen.config import ContinualRecipe, load_document
from deepen.errors import DataError, RecipeError, TrainingError
from deepen.pipeline.reporter import Silent
from deepen.pipeline.texts import load_tokenizer
from deepen.records import ContinualRecord, TaskAnswers, read_record
from deepen.report import print_continual
from deepen.studies import engine
from deepen.studies.continual import sequence
from deepen.studies.continual.study import (
    collect_continual,
    compute_continual,
    open_continual,
    overall_width,
    transfer_width,
)
from deepen.studies.continual.tasks import cut_middle
from deepen.studies.engine import Share

ROOT = Path(__file__).parents[1]
METHODS = [
    {"name": "seqft", "method": "full", "learning_rate": 1e-2},
    {"name": "lora", "method": "lora", "learning_rate": 1e-2, "lora": {"rank": 2}},
    {"name": "replay", "method": "full", "learning_rate": 1e-2, "replay": 0.5},
    {"name": "once", "method": "blocks", "expand": {"blocks": 2}, "learning_rate": 1e-2},
    {"name": "each", "method": "blocks", "expand": {"blocks": 1}, "each_task": True, "learning_rate": 1e-2},
]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture
def recipe(base, tmp_path, monkeypatch):
    """Write a recipe of tasks, each of a word and one some words later; `changes` are its keys."""
    monkeypatch.setattr(engine, "traceable_code", lambda: None)
    monkeypatch.setenv("DEEPEN_CACHE", str(tmp_path / "cache"))

    def write(*names, **changes):
        tasks = []
        for step, name in enumerate(names or ("first", "second"), start=1):
            pairs = [
                {"prompt": f"{word} {step}", "answer": WORDS[(at + step) % 10]}
                for at, word in enumerate(WORDS)
            ]
            for split, records in (("train", pairs), ("test", pairs[:4])):
                (tmp_path / f"{name}-{split}.json").write_text(json.dumps(records))
            paths = {split: str(tmp_path / f"{name}-{split}.json") for split in ("train", "test")}
            tasks.append({"name": name, "metric": "accuracy", **paths})
        content = {
            "base": str(base),
            "output": str(tmp_path / "study"),
            "tasks": tasks,
            "methods": METHODS[:1],
            "template": "plain",
            "sequence_length": 32,
            "batch": 4,
            **changes,
        }
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(content))
        return path

    return write


def compute(path):
    study = open_continual(path)
    compute_continual(study, Share(), Silent())
    return study, collect_continual(study)


def test_every_method_learns_the_sequence(recipe, base, tmp_path, capsys):
    (tmp_path / "general.jsonl").write_text("".join(json.dumps({"text": f"{w} gate"}) + "\n" for w in WORDS))
    path = recipe(methods=METHODS, general=[{"path": str(tmp_path / "general.jsonl")}])
    assert main(["study", "continual", str(path), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    cells = {cell["method"]: cell for cell in told["cells"]}
    assert list(cells) == [method["name"] for method in METHODS]
    assert told["missing"] == []
    for cell in cells.values():
        assert [[value is None for value in row] for row in cell["R"]] == [[False, True], [False, False]]
        assert cell["op"] == pytest.approx(sum(cell["R"][1]) / 2)
        assert cell["bwt"] == pytest.approx(cell["R"][1][0] - cell["R"][0][0])
        assert cell["op_low"] <= cell["op"] <= cell["op_high"]
        assert len(cell["general_course"]["general"]) == 2
        assert cell["general"][0]["delta"] is not None
    assert {key: told[key] for key in ("R", "op", "bwt")} == {
        key: cells["seqft"][key] for key in ("R", "op", "bwt")
    }
    steps = {name: [task["steps"] for task in cell["learned"]] for name, cell in cells.items()}
    assert steps["replay"][1] > steps["seqft"][1]  # it sees more windows
    page = (tmp_path / "study" / "report.html").read_text()
    assert page.count("<svg") == 5
    assert main(["report", str(tmp_path / "study")]) == 0
    assert (tmp_path / "study" / "report.html").read_text() == page
    for cell in cells.values():
        assert f'href="{cell["directory"]}/cell.json"' in page
    _check_models(tmp_path / "study", cells, base)


def _check_models(study, cells, base):
    """What each method leaves of its base."""
    original = load_file(base / "model.safetensors")

    def trained(name, task):
        return study / cells[name]["directory"] / task / "trained"

    assert (
        AutoModelForCausalLM.from_pretrained(trained("each", "2-second") / "model").config.num_hidden_layers
        == 5
    )
    held = load_file(trained("each", "2-second") / "model" / "model.safetensors")
    # Blocks on top of three of the base: each task's are those of the tasks before, unmoved, and its own.
    earlier = load_file(trained("each", "1-first") / "model" / "model.safetensors")
    assert all(torch.equal(held[name], tensor) for name, tensor in original.items() if name in held)
    assert all(torch.equal(held[name], tensor) for name, tensor in earlier.items())
    packs = [
        load_file(trained("once", task) / "blocks" / "blocks.safetensors") for task in ("1-first", "2-second")
    ]
    assert packs[0].keys() == packs[1].keys()
    assert not all(torch.equal(packs[0][name], packs[1][name]) for name in packs[0])
    adapters = [
        load_file(trained("lora", task) / "adapter" / "adapter_model.safetensors")
        for task in ("1-first", "2-second")
    ]
    # One step further with the same adapter: another one would begin elsewhere.
    assert all((adapters[1][name] - tensor).abs().max() < 0.05 for name, tensor in adapters[0].items())


@pytest.mark.parametrize("method", [METHODS[1], METHODS[4]], ids=lambda method: method["name"])
def test_a_study_cut_short_goes_on_after_the_last_task(recipe, tmp_path, monkeypatch, method):
    whole = tmp_path / "whole"
    _, expected = compute(recipe(methods=[method], output=str(whole)))
    path = recipe(methods=[method])
    learn, learned = sequence.learn_task, []

    def dying(*arguments):
        if learned:
            raise TrainingError("killed")
        learned.append(arguments[5].name)
        return learn(*arguments)

    monkeypatch.setattr(sequence, "learn_task", dying)
    with pytest.raises(TrainingError, match="killed"):
        compute(path)
    study = open_continual(path)
    assert collect_continual(study).missing == [f"{method['name']}-0"]
    monkeypatch.setattr(
        sequence, "learn_task", lambda *arguments: learned.append(arguments[5].name) or learn(*arguments)
    )
    _, found = compute(path)
    assert learned == ["1-first", "2-second"]
    assert found.cells[0].R == expected.cells[0].R
    assert found.cells[0].directory == expected.cells[0].directory
    one, other = (
        next((root / found.cells[0].directory / "2-second" / "trained").rglob("*.safetensors"))
        for root in (tmp_path / "study", whole)
    )
    assert one.read_bytes() == other.read_bytes()
    monkeypatch.setattr(sequence, "learn_task", None)
    monkeypatch.setattr(sequence, "answer_tasks", None)
    assert compute(path)[1].cells == found.cells  # nothing is computed again


def test_a_task_cut_short_goes_on_from_its_checkpoint(recipe, tmp_path, monkeypatch):
    from deepen.studies.continual import training

    _, expected = compute(recipe("first", epochs=8.0, output=str(tmp_path / "whole")))
    path = recipe("first", epochs=8.0)
    save, saved = training.save_checkpoint, []

    def dying(*arguments, **options):
        save(*arguments, **options)
        saved.append(arguments[1])
        if len(saved) == 2:
            raise TrainingError("killed")

    monkeypatch.setattr(training, "save_checkpoint", dying)
    with pytest.raises(TrainingError, match="killed"):
        compute(path)
    _, found = compute(path)
    assert found.cells[0].R == expected.cells[0].R
    taken = [(one.first_loss, one.last_loss, one.steps) for one in found.cells[0].learned]
    assert taken == [(one.first_loss, one.last_loss, one.steps) for one in expected.cells[0].learned]
    assert saved[:2] == sorted(set(saved[:2]))


def test_shares_of_the_cells_make_one_study(recipe, capsys):
    path = str(recipe("first", seeds=[0, 1]))
    assert main(["study", "continual", path, "--cell", "1/2", "--json"]) == 0
    told = capsys.readouterr()
    content = json.loads(told.out)
    assert content["missing"] == ["seqft-0"]
    assert [cell["seed"] for cell in content["cells"]] == [1]
    assert content["R"] == content["cells"][0]["R"]
    assert "not finished yet: seqft-0" in told.err
    assert main(["study", "continual", path, "--cell", "2/2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["missing"] == []


def test_intervals_are_of_test_items():
    """Against scipy's standard errors; an answer that stays right or wrong adds nothing to BWT's."""
    draws = np.random.default_rng(0).random((2, 3, 30)) < 0.5
    last, own = (
        [
            TaskAnswers(task=str(i), answers=[None] * 30, scores=[float(s) for s in row])
            for i, row in enumerate(half)
        ]
        for half in draws
    )
    errors = sem(draws[0].astype(float), axis=1)
    assert overall_width(last) == pytest.approx(1.959964 * np.sqrt((errors**2).sum()) / 3)
    moved = sem(draws[0].astype(float) - draws[1], axis=1)[:2]
    assert transfer_width(last, own) == pytest.approx(1.959964 * np.sqrt((moved**2).sum()) / 2)
    assert transfer_width(last, last) == 0


def test_prompts_are_cut_in_their_middle(base):
    tokenizer = load_tokenizer(base)
    text = "first " + " ".join(WORDS * 3) + " — 天地 — last"
    for most in (8, 9, 20, 31):
        cut = cut_middle(text, tokenizer, most)
        assert len(tokenizer(cut, add_special_tokens=False)["input_ids"]) <= most
        assert cut[:3] == "fir"
        assert cut[-3:] == "ast"
    assert cut_middle(text, tokenizer, 1000) == text


def test_its_table_is_not_cut_where_there_is_no_terminal(capsys):
    committed = ROOT / "studies" / "records" / "continual-small.json"
    print_continual(read_record(committed, ContinualRecord), table_console())
    assert "…" not in capsys.readouterr().out


def test_what_was_cut_is_said(recipe, tmp_path, capsys):
    path = recipe()
    long = {"prompt": "token " * 60, "answer": "stream " * 30}
    records = json.loads((tmp_path / "second-train.json").read_text())
    (tmp_path / "second-train.json").write_text(json.dumps([long, *records]))
    assert main(["study", "continual", str(path), "--dry-run"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "second: cut in their middle 1 of 11 prompts learned, 0 of 4 tested; 1 answers" in said
    assert not (tmp_path / "study").exists()


FAULTS = {
    "both": ({"trace": "somewhere"}, "give either trace or tasks"),
    "expand": ({"methods": [{**METHODS[0], "expand": {"blocks": 1}}]}, "belongs to method blocks"),
    "no expand": (
        {"methods": [{"name": "a", "method": "blocks", "learning_rate": 1e-3}]},
        "belongs to method blocks",
    ),
    "each": ({"methods": [{**METHODS[0], "each_task": True}]}, "which method full does not add"),
    "names": ({"methods": [METHODS[0], METHODS[0]]}, "two are called seqft"),
    "answers": ({"answer_tokens": 20}, "answer_tokens 20 leaves less than half of a window"),
    "length": ({"sequence_length": 65}, "65 is more than the base's 64 positions"),
    "key": ({"epoch": 1}, "epoch: unknown key; did you mean epochs?"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_of_the_recipe(recipe, name):
    changes, said = FAULTS[name]
    with pytest.raises(RecipeError, match=said.replace("?", r"\?")):
        open_continual(recipe(**changes))


def test_a_file_of_trace_that_is_missing_is_named(recipe, tmp_path):
    path = recipe(tasks=[], trace=str(tmp_path))
    with pytest.raises(DataError, match=r"C-STANCE: .*C-STANCE/train\.json"):
        open_continual(path)


def test_conversations_of_several_turns_are_no_task(recipe, tmp_path):
    path = recipe()
    turns = [{"role": role, "content": "a"} for role in ("user", "assistant", "user", "assistant")]
    (tmp_path / "first-test.json").write_text(json.dumps([{"messages": turns}]))
    with pytest.raises(DataError, match=r"first: .*record 1: is not one prompt and its answer"):
        open_continual(path)


RECIPES = {
    "docs": re.search("```yaml\n(output:.*?)```", (ROOT / "docs/continual.md").read_text(), re.DOTALL)[1],
    "small": (ROOT / "recipes/studies/continual-small.yaml").read_text(),
    "paper": (ROOT / "recipes/studies/trace-llama2-7b-chat.yaml").read_text(),
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_shown_are_valid(tmp_path, name):
    (tmp_path / "r.yaml").write_text(RECIPES[name])
    assert len(load_document(tmp_path / "r.yaml", ContinualRecipe).sequence) == 8


def test_the_recipe_of_trace_is_planned_as_its_paper_has_it(data_dir, tmp_path, monkeypatch):
    """Its eight tasks, with the epochs of its scripts, for the three methods of its tables and two more."""
    (tmp_path / "data").mkdir()
    whole = data_dir / "trace" / "LLM-CL-Benchmark_500"
    shutil.copytree(whole, tmp_path / "data" / "LLM-CL-Benchmark_5000")
    meetings = tmp_path / "data" / "LLM-CL-Benchmark_5000" / "MeetingBank"
    if not (meetings / "train.json").exists():
        shutil.copy(meetings / "eval.json", meetings / "train.json")
    base = write_tiny_llama(tmp_path / "base", blocks=32, max_position_embeddings=4096, vocab_size=512)
    for file in (data_dir / "models" / "stories260k").glob("tokenizer*"):
        shutil.copy(file, base)
    monkeypatch.chdir(tmp_path)
    path = ROOT / "recipes" / "studies" / "trace-llama2-7b-chat.yaml"
    study = open_continual(path, None, [f"base={base}", "deltas={}"])
    assert [method.name for method in study.recipe.methods] == [
        *("seqft", "lora", "replay", "blocks-once", "blocks-each")
    ]
    assert [task.epochs for task in study.recipe.sequence] == [5, 3, 7, 5, 3, 5, 5, 7]
    assert len(study.slots()) == 1 + 5  # the base is asked too


def test_trace_itself_is_read(data_dir, tmp_path):
    """All eight tasks in their order, with their scores; only the folder is named."""
    path = tmp_path / "r.yaml"
    content = {
        "base": "x",
        "output": "y",
        "trace": str(data_dir / "trace" / "LLM-CL-Benchmark_500"),
        "methods": METHODS[:1],
        "sequence_length": 512,
    }
    path.write_text(yaml.safe_dump(content))
    tasks = load_document(path, ContinualRecipe).sequence
    assert [(task.name, task.metric, task.epochs) for task in tasks][2:5] == [
        ("MeetingBank", "rouge_l", 7.0),
        ("Py150", "edit_similarity", 5.0),
        ("ScienceQA", "choice", 3.0),
    ]
    for task in tasks:
        assert json.loads(Path(task.test).read_text())[0].keys() == {"prompt", "answer"}
