"""A study of knowledge on tiny real runs: its cells, what they hang on, its table and page."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from test_sft import write_talk
from tiny_run import write_base, write_recipe

from deepen.cli import main
from deepen.config import KnowledgeRecipe, build_recipe, load_document
from deepen.errors import RecipeError
from deepen.pipeline import run as pipeline_run
from deepen.pipeline.reporter import Silent
from deepen.records import EvaluationRecord, KnowledgeRecord, RunFacts, read_record
from deepen.report.knowledge import render_knowledge
from deepen.studies import engine
from deepen.studies.engine import Share
from deepen.studies.study import compute_study, open_study

SEEDS = [3, 4]
ROWS = ["base + SFT", "expanded", "expanded + SFT", "expanded + new"]


def write_study(root, **changes):
    """Write a study of four steps of training and a few of tuning below `root`; return its path."""
    run = yaml.safe_load(
        write_recipe(
            root, train__tokens=4 * 128, train__evaluate_every=100, evaluate__max_tokens=800
        ).read_text()
    )
    sft = write_talk(root) | {"epochs": 1}
    del run["output"]
    content = {
        "run": run | {"sft": sft},
        "output": str(root / "study"),
        "seeds": SEEDS,
        "also": {"new": {"trainable": "new", "learning_rate": 1e-2}},
    }
    path = root / "knowledge.yaml"
    path.write_text(yaml.safe_dump(content | changes))
    return path


def quicken(patch):
    """Let code that is not committed compute, and no run write pages of its own: half of the time."""
    patch.setattr(engine, "traceable_code", lambda: "c0ffee")
    patch.setattr(pipeline_run, "complete_pages", lambda run: None)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    quicken(monkeypatch)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("knowledge")
    write_base(root / "base")
    return root


@pytest.fixture(scope="module")
def finished(place):
    """A study computed in two halves, as on two machines: (study, names of the cells computed)."""
    with pytest.MonkeyPatch.context() as patch:
        quicken(patch)
        study = open_study("knowledge", write_study(place), None)
        first = compute_study(study, Share(2, 2), Silent()).computed
        return study, [first, compute_study(study, Share(), Silent()).computed]


def losses(study, cell, task, column="nll"):
    places = [study.store.study / cell / name for name in ("evaluation/heldout.json", "heldout.json")]
    record = read_record(next(path for path in places if path.exists()), EvaluationRecord)
    return np.array(next(getattr(text.items, column) for text in record.texts if text.task == task))


def test_every_cell_is_computed_once(finished, monkeypatch):
    study, (first, rest) = finished
    # Of the second share's places the trainings are not its own: only the tunings of the base are known.
    assert first == [f"base-sft-seed{seed}" for seed in SEEDS]
    assert sorted(rest) == sorted(
        f"{name}-seed{seed}"
        for name in ("trained", "answers", "expanded-sft", "expanded-new")
        for seed in SEEDS
    )
    monkeypatch.setattr(pipeline_run, "run_recipe", None)
    assert compute_study(study, Share(), Silent()).computed == []


def test_tunings_begin_with_the_blocks_that_training_left(finished):
    study, _ = finished
    cells = {cell.name.rpartition("-")[0]: cell for cell in (study.store.study / "cells").iterdir()}
    for seed in SEEDS:
        trained, tuned = cells[f"trained-seed{seed}"], cells[f"expanded-sft-seed{seed}"]
        facts = RunFacts.model_validate(json.loads((trained / "cell.json").read_text())["result"])
        before = json.loads((tuned / "cell.json").read_text())["inputs"]["begins_with"]
        assert before == {"cell": trained.name.rpartition("-")[2], "pack": facts.pack}
        assert (trained / "blocks").is_dir()
        assert not {"model", "blocks", "checkpoints"} & {path.name for path in tuned.iterdir()}
        # The log of the tuning begins where the training ended.
        first = json.loads((tuned / "metrics.jsonl").read_text().splitlines()[0])["evaluation"]
        for task, cell in (("heldout", trained), ("talk-heldout", cells[f"answers-seed{seed}"])):
            held = [
                losses(study, cell.relative_to(study.store.study), task, key) for key in ("nll", "tokens")
            ]
            assert first[task] == pytest.approx(held[0].sum() / held[1].sum(), rel=1e-4)


def test_the_table_pairs_the_means_over_seeds(finished):
    study, _ = finished
    record = read_record(study.store.study / "study.json", KnowledgeRecord)
    comparison = record.comparison
    assert record.finished == record.cells == 10
    assert [row.label for row in comparison.rows] == ["base", *ROWS]
    assert [row.label for row in record.rows] == ROWS
    assert not comparison.left_out
    names = [column.name for column in comparison.columns]
    assert {"general", "heldout", "talk-heldout"} <= set(names)
    base, expanded = record.rows[0], record.rows[2]
    for task in ("general", "heldout", "talk-heldout"):
        tokens = losses(study, base.cells[0], task, "tokens").sum()
        ours, theirs = (
            [losses(study, cell, task).sum() / tokens for cell in row.cells] for row in (expanded, base)
        )
        cell = comparison.rows[3].cells[names.index(task)]
        assert cell.value == pytest.approx(np.mean(ours))
        assert cell.from_first.delta == pytest.approx(np.mean(ours) - np.mean(theirs))
        assert cell.from_first.ci_low < cell.from_first.delta < cell.from_first.ci_high
        assert expanded.values[names.index(task)] == pytest.approx(ours)
    assert base.trainable < expanded.trainable
    assert record.rows[3].method == "blocks"
    assert record.rows[3].trainable == record.rows[1].trainable


def test_the_page_links_every_row_and_is_made_again(finished, capsys):
    study, _ = finished
    place = study.store.study
    record = read_record(place / "study.json", KnowledgeRecord)
    page = (place / "report.html").read_text()
    assert page == render_knowledge(record)
    for row in record.rows:
        assert all(f'href="{cell}/cell.json"' in page for cell in row.cells)
    assert page.count("<svg") == 1
    assert "Δ from base + SFT" in page
    assert main(["report", str(place)]) == 0
    assert (place / "report.html").read_text() == page
    assert main(["study", "knowledge", str(place.parent / "knowledge.yaml")]) == 0
    assert "expanded + SFT against base + SFT" in " ".join(capsys.readouterr().out.split())


def test_tasks_have_a_figure_of_their_own(finished):
    record = finished[0].collect()
    first, *rest = record.comparison.columns
    task = first.model_copy(update={"metric": "acc", "tokens": None, "higher_is_better": True})
    mixed = record.comparison.model_copy(update={"columns": [task, *rest]})
    page = render_knowledge(record.model_copy(update={"comparison": mixed}))
    assert page.count("<svg") == 2
    assert "acc, higher is better" in page


def test_a_study_that_has_just_begun_has_a_page(place, tmp_path):
    record = open_study("knowledge", write_study(place), tmp_path / "study").collect()
    assert (record.finished, record.rows, record.comparison) == (0, [], None)
    page = render_knowledge(record)
    assert "10 of 10 cells are not finished" in page
    assert "expanded-sft-seed3: waits for the new blocks" in page


def test_what_is_cut_short_goes_on_and_is_in_no_mean(finished):
    study, _ = finished
    whole = study.collect()
    cells = study.store.study / "cells"
    (cut,) = cells.glob("expanded-sft-seed4-*")
    (answers,) = cells.glob("answers-seed3-*")
    record = (cut / "cell.json").rename(cut / "away")
    shutil.rmtree(answers)
    found = study.collect()
    assert found.finished == whole.finished - 2
    rows = {row.label: row for row in found.rows}
    assert (rows["expanded"].seeds, rows["expanded"].missing) == ([4], [3])
    assert (rows["expanded + SFT"].seeds, rows["expanded + SFT"].missing) == ([3], [4])
    assert "missing: 4" in render_knowledge(found)
    trained = (cut / "metrics.jsonl").stat().st_mtime_ns
    record.unlink()
    assert sorted(compute_study(study, Share(), Silent()).computed) == ["answers-seed3", "expanded-sft-seed4"]
    assert (cut / "metrics.jsonl").stat().st_mtime_ns == trained
    assert study.collect().comparison == whole.comparison


def names_kept(place, changed, known):
    """Names of the cells whose keys stay when the recipe or its inputs change."""
    study = open_study("knowledge", place / "knowledge.yaml", known.store.study, changed)
    keys = {slot.cell.key for slot in known.plan(known.store.finished)}
    return {
        slot.name.rpartition("-")[0] for slot in study.plan(study.store.finished) if slot.cell.key in keys
    }


def test_each_cell_hangs_on_what_decides_it_alone(place, finished):
    study, _ = finished
    every = {"trained", "base-sft", "answers", "expanded-sft", "expanded-new"}
    assert names_kept(place, [], study) == every
    assert names_kept(place, ["run.sft.device=cpu"], study) == every
    assert names_kept(place, ["run.sft.epochs=3"], study) == {"trained"}
    assert names_kept(place, ["also.new.learning_rate=0.5"], study) == every - {"expanded-new"}


def test_conversations_decide_by_their_contents(place, tmp_path, finished):
    study, _ = finished
    moved = tmp_path / "moved"
    shutil.copytree(place, moved, ignore=shutil.ignore_patterns("study", "cache"))
    write_study(moved)
    every = {"trained", "base-sft", "answers", "expanded-sft", "expanded-new"}
    assert names_kept(moved, [], study) == every  # texts, conversations and base lie elsewhere
    (moved / "talk.json").write_text((moved / "talk.json").read_text().replace("say", "tell"))
    assert names_kept(moved, [], study) == {"trained"}
    write_study(moved)
    (moved / "train.jsonl").write_text('{"text": "other words"}\n' * 30)
    open_again = open_study("knowledge", moved / "knowledge.yaml", study.store.study)
    kept = {slot.cell.key for slot in study.plan(study.store.finished)}
    found = {slot.name: slot.cell and slot.cell.key in kept for slot in open_again.plan(study.store.finished)}
    assert found["base-sft-seed3"]  # the base is tuned without having seen those
    assert not found["trained-seed3"]
    assert found["expanded-sft-seed3"] is None  # not known before the new blocks are


def test_a_dry_run_lists_every_cell_and_computes_nothing(place, tmp_path, capsys):
    out = tmp_path / "study"
    path = str(place / "knowledge.yaml")
    assert main(["study", "knowledge", path, "--out", str(out), "--dry-run", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert (planned["left"], len(planned["cells"])) == (10, 10)
    assert not out.exists()
    costs = {each["name"]: each["cost"] for each in planned["cells"]}
    assert costs["trained-seed3"]["trainable"] == costs["expanded-new-seed3"]["trainable"]
    assert costs["base-sft-seed3"]["trainable"] < costs["expanded-sft-seed3"]["trainable"]
    assert costs["trained-seed3"]["tokens"] == 4 * 128
    waiting = {each["name"]: each["waits_for"] for each in planned["cells"]}
    assert waiting["expanded-sft-seed4"] == "the new blocks"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["run.sft.seed=1"], "run.sft.seed: the study decides it"),
        (["run.sft.trainable=new"], "run.sft.trainable: the study decides it"),
        (["run.sft=null"], "run.sft: missing"),
        (["run.expand=null"], "run.expand: missing"),
        (["also.new.trainable=lora"], "neither of all, new"),
        (["also.new.heldout=0"], "the same for all rows"),
        (["also={SFT: {}}"], "choose another name"),
        (["run.sft.epochss=1"], "did you mean epochs?"),
        (["seeds=[1, 1]"], "one stands twice"),
    ],
)
def test_faults_are_said_before_anything_is_computed(place, tmp_path, settings, said):
    path = write_study(place)
    with pytest.raises(RecipeError) as found:
        open_study("knowledge", path, tmp_path / "study", settings)
    assert said in str(found.value)
    assert not (tmp_path / "study").exists()


@pytest.mark.parametrize("source", ["docs/studies.md", "recipes/studies/knowledge-small.yaml"])
def test_the_recipes_shown_are_valid(source, tmp_path):
    text = (Path(__file__).parents[1] / source).read_text()
    shown = [block.split("```")[0] for block in text.split("```yaml\n")[1:]] or [text]
    (tmp_path / "study.yaml").write_text(next(each for each in shown if "\n  sft:" in each))
    study = load_document(tmp_path / "study.yaml", KnowledgeRecipe)
    assert build_recipe({**study.run, "output": "cell"}, source).sft.heldout
