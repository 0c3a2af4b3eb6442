"""Studies over rows × domains × seeds, on tiny real runs: keys, choices, tables, pages."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from tiny_run import sentences, write_base

from deepen.cli import main
from deepen.config import (
    AblationRecipe,
    BaselinesRecipe,
    ContinualRecipe,
    DomainSection,
    KnowledgeRecipe,
    load_document,
    load_recipe,
)
from deepen.errors import DataError, RecipeError
from deepen.evaluation import compare_runs
from deepen.expansion.layout import least_important
from deepen.pipeline import baseline
from deepen.pipeline import run as pipeline_run
from deepen.pipeline.reporter import Silent
from deepen.records import (
    Difference,
    EvaluationRecord,
    ImportanceRecord,
    RunFacts,
    StudyPair,
    StudyRecord,
    read_record,
)
from deepen.report import render_study, study_figures, svg
from deepen.studies import engine
from deepen.studies.engine import Share, run_cells
from deepen.studies.pairs import study_pairs
from deepen.studies.study import collect_study, compute_study, open_study

ROOT = Path(__file__).parents[1]
RATES = [1e-3, 2e-2]
SEEDS = [3, 4]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny base and its texts."""
    root = tmp_path_factory.mktemp("studies")
    write_base(root / "base")
    domain = sentences(3, 100)
    texts = {"general": sentences(0, 40), "train": domain[:30], "tune": domain[30:65], "heldout": domain[65:]}
    for name, documents in texts.items():
        (root / f"{name}.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in documents))
    return root


def recipe(root, kind="baselines", **changes):
    """Write a study of four steps a cell below `root`; return its path."""
    shared = {
        "base": str(root / "base"),
        "data": {"sequence_length": 32, "cache": str(root / "cache")},
        "train": {"tokens": 4 * 128, "batch_tokens": 128, "evaluate_every": 100, "checkpoint_every": 100},
        "evaluate": {"general": [{"path": str(root / "general.jsonl")}]},
    }
    domain = {
        "sources": [{"path": str(root / "train.jsonl")}],
        "tuning": [{"path": str(root / "tune.jsonl")}],
        "reported": [{"path": str(root / "heldout.jsonl")}],
    }
    content = {
        "run": shared,
        "output": str(root / "study"),
        "domains": {"words": domain},
        "seeds": SEEDS,
        "learning_rates": RATES,
    }
    if kind == "baselines":
        content["methods"] = {
            "blocks": {"expand": {"blocks": 1}},
            "lora": {"train": {"method": "lora"}, "learning_rates": [5e-3]},
        }
        content["match"] = "blocks"
    else:
        content |= {"counts": [1, 2], "placements": ["interleaved", "suffix"], "learning_rates": [5e-3]}
        content["seeds"] = [0]
    path = root / f"{kind}.yaml"
    path.write_text(yaml.safe_dump(content | changes))
    return path


@pytest.fixture(autouse=True)
def traceable(monkeypatch):
    monkeypatch.setattr(engine, "traceable_code", lambda: "c0ffee")


@pytest.fixture(scope="module")
def finished(place):
    """A study computed to its end: (study, names of the cells computed)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "traceable_code", lambda: "c0ffee")
        of_base = []
        score = baseline.score_texts
        patch.setattr(baseline, "score_texts", lambda *all, **more: of_base.append(1) or score(*all, **more))
        study = open_study("baselines", recipe(place), None)
        return study, compute_study(study, Share(), Silent()).computed, len(of_base)


def test_the_base_is_scored_once_for_all_cells(finished):
    study, _, of_base = finished
    assert of_base == 1
    found = [path.read_text() for path in study.store.study.glob("cells/*/evaluation/base-windows.json")]
    assert len(found) == 5
    assert len(set(found)) == 1


@pytest.mark.parametrize("alike", [True, False])
def test_what_the_base_scores_counts_only_where_it_was_computed_alike(finished, tmp_path, alike):
    study, *_ = finished
    cell = next(study.store.study.glob("cells/*lora*"))
    content = json.loads((cell / "evaluation" / "base-windows.json").read_text())
    content["nats"] = {task: [9.0] * len(values) for task, values in content["nats"].items()}
    content["computed"][0] = "none" if alike else "4bit"
    (tmp_path / "other" / "evaluation").mkdir(parents=True)
    (tmp_path / "other" / "evaluation" / "base-windows.json").write_text(json.dumps(content))
    recipe = load_recipe(cell / "recipe.yaml").model_copy(update={"output": str(tmp_path / "run")})
    pipeline_run.run_recipe(recipe, beside=tmp_path / "other")
    held = json.loads((tmp_path / "run" / "evaluation" / "base-windows.json").read_text())
    assert (held["nats"] == content["nats"]) == alike


def test_every_cell_is_computed_once(finished, monkeypatch):
    study, computed, _ = finished
    # Two rates for blocks, one of which is the first seed's cell; a seed more; two seeds of lora.
    assert len(computed) == len(set(computed)) == 2 + 1 + 2
    monkeypatch.setattr(pipeline_run, "run_recipe", None)
    assert compute_study(study, Share(), Silent()).computed == []


def test_a_rate_is_chosen_by_the_tuning_text_alone(finished):
    study, *_ = finished
    record = collect_study(study)
    (choice,) = record.choices
    held = {}
    for rate, cell in zip(choice.losses, choice.cells, strict=True):
        texts = read_record(study.store.study / cell / "evaluation" / "heldout.json", EvaluationRecord).texts
        items = next(text.items for text in texts if text.task == "tune")
        held[rate] = sum(items.nll) / sum(items.tokens)
    assert choice.losses == pytest.approx(held)
    assert choice.chosen == float(min(held, key=held.get))
    assert choice.at_edge  # of a grid of two, either is
    assert choice.seed == SEEDS[0]


def test_the_table_is_of_the_reported_texts_and_of_all_seeds(finished):
    study, *_ = finished
    record = collect_study(study)
    assert record.finished == record.cells == 2 + 2 + 2
    assert [row.row for row in record.rows] == ["blocks", "lora"]
    for row in record.rows:
        assert row.seeds == SEEDS
        assert not row.missing
        runs = [study.store.study / cell for cell in row.cells]
        each = [column_of(run, "heldout") for run in runs]
        assert row.domain_score.texts == ["heldout"]
        assert row.domain_score.seed_deltas == pytest.approx([cell.from_base.delta for cell in each])
        assert row.domain_score.value == pytest.approx(np.mean([cell.value for cell in each]))
        assert row.domain_score.delta == pytest.approx(np.mean(row.domain_score.seed_deltas))
        assert row.domain_score.ci_low < row.domain_score.delta < row.domain_score.ci_high
        assert row.general.delta == pytest.approx(
            np.mean([column_of(run, "general").from_base.delta for run in runs])
        )
        assert row.tokens == 4 * 128
        assert row.flops > 0
        assert row.curve[-1][0] == row.tokens


def test_rows_are_paired_with_each_other_on_the_same_items(finished):
    study, *_ = finished
    record = collect_study(study)
    (pair,) = record.pairs
    assert (pair.row, pair.other, pair.seeds) == ("blocks", "lora", SEEDS)
    blocks, lora = record.rows
    assert pair.learned.delta == pytest.approx(blocks.domain_score.delta - lora.domain_score.delta)
    assert pair.kept.delta == pytest.approx(blocks.general.delta - lora.general.delta)
    # One seed alone is what `deepen compare` says of the two runs.
    alone = [row.model_copy(update={"seeds": row.seeds[:1], "cells": row.cells[:1]}) for row in record.rows]
    (pair,) = study_pairs(alone, study.store)
    compared = compare_runs([study.store.study / row.cells[0] for row in reversed(alone)])
    names = [column.name for column in compared.columns]
    for found, name in ((pair.learned, "heldout"), (pair.kept, "general")):
        expected = compared.rows[2].cells[names.index(name)].from_first
        assert (found.delta, found.ci_low) == pytest.approx((expected.delta, expected.ci_low))


@pytest.mark.parametrize(
    ("learned", "kept", "better"),
    [
        ((-0.2, -0.1), (-0.2, -0.1), "one"),
        ((0.1, 0.2), (0.1, 0.2), "other"),
        ((-0.2, -0.1), (0.1, 0.2), None),
        ((-0.2, -0.1), (-0.2, 0.1), None),
        ((-0.2, -0.1), None, None),
    ],
)
def test_a_row_is_beaten_where_both_intervals_are_clear_of_zero(learned, kept, better):
    def gap(ends):
        return ends and Difference(delta=sum(ends) / 2, ci_low=ends[0], ci_high=ends[1])

    pair = StudyPair(domain="d", row="one", other="other", seeds=[0], learned=gap(learned), kept=gap(kept))
    assert pair.better() == better


def test_no_two_rows_of_a_large_plane_look_alike():
    looks = {(number % len(svg.SERIES), number % len(study_figures._MARKERS)) for number in range(20)}
    assert len(looks) == 20


def column_of(run, name):
    comparison = compare_runs([run])
    return comparison.rows[1].cells[[column.name for column in comparison.columns].index(name)]


def test_parameters_are_matched(finished):
    study, *_ = finished
    record = collect_study(study)
    blocks, lora = record.rows
    assert record.matched == blocks.trainable
    assert lora.trainable == pytest.approx(blocks.trainable, rel=0.1)


def test_models_go_and_records_stay(finished):
    study, *_ = finished
    for cell in (study.store.study / "cells").iterdir():
        assert not {"checkpoints", "blocks", "adapter", "model"} & {path.name for path in cell.iterdir()}
        assert {"cell.json", "result.json", "metrics.jsonl", "report.html"} <= {
            p.name for p in cell.iterdir()
        }


def test_the_page_links_every_record(finished):
    study, *_ = finished
    page = (study.store.study / "report.html").read_text()
    record = read_record(study.store.study / "study.json", StudyRecord)
    assert page == render_study(record)
    for cell in (study.store.study / "cells").iterdir():
        assert f'href="cells/{cell.name}/cell.json"' in page
    assert "At the edge of the grid" in page
    assert "<svg" in page
    assert "http-equiv" not in page


def test_unfinished_cells_are_in_no_table_and_go_on_where_they_were(finished):
    """As a kill between a run's end and its cell's record leaves it: nothing is trained again."""
    study, *_ = finished
    whole = collect_study(study)
    cell = study.store.study / whole.rows[1].cells[1]
    (cell / "cell.json").unlink()
    cut = collect_study(study)
    assert cut.finished == whole.finished - 1
    assert (cut.rows[1].seeds, cut.rows[1].missing) == (SEEDS[:1], SEEDS[1:])
    assert cut.rows[0] == whole.rows[0]
    assert "not computed yet" in "".join(cut.waiting)
    assert "missing: 4" in render_study(cut)
    trained = (cell / "metrics.jsonl").stat().st_mtime_ns
    assert compute_study(study, Share(), Silent()).computed == [cell.name.rpartition("-")[0]]
    assert (cell / "metrics.jsonl").stat().st_mtime_ns == trained
    assert collect_study(study) == whole


def test_only_what_decides_a_result_is_in_its_key(place, tmp_path, finished):
    study, *_ = finished

    def keys(study):
        return [slot.cell.key for slot in study.slots() if slot.cell]

    known = keys(study)
    moved = tmp_path / "moved"
    shutil.copytree(place, moved, ignore=shutil.ignore_patterns("study", "cache"))
    same = open_study("baselines", recipe(moved), place / "study")
    assert keys(same) == known  # texts and base lie elsewhere
    (moved / "train.jsonl").write_text('{"text": "other words"}\n' * 30)
    changed = open_study("baselines", recipe(moved), place / "study")
    assert not set(keys(changed)) & set(known)
    longer = open_study("baselines", recipe(place), None, ["run.train.tokens=1024"])
    assert not set(keys(longer)) & set(known)
    machine = open_study("baselines", recipe(place), None, ["run.train.device=cpu"])
    assert keys(machine) == known


def test_the_anchor_of_a_row_counts_by_its_contents(place, tmp_path):
    def key(words, name):
        (tmp_path / name).write_text(json.dumps({"text": words}) + "\n")
        anchored = {"train": {"anchor": {"source": "general"}}, "learning_rates": [1e-3]}
        sources = {"anchor": [{"name": "kept", "path": str(tmp_path / name)}]}
        study = open_study(
            "baselines",
            recipe(
                place,
                methods={"blocks": {"expand": {"blocks": 1}, **anchored, "data": sources}},
                match=None,
            ),
            None,
        )
        return study.slots()[0].cell.key

    assert key("some words " * 50, "a.jsonl") == key("some words " * 50, "b.jsonl")
    assert key("some words " * 50, "a.jsonl") != key("other words " * 50, "a.jsonl")


def test_sources_of_a_row_are_read_beside_those_of_the_domain(place):
    more = [{"name": "more", "path": str(place / "general.jsonl"), "weight": 0.5}]
    rows = {
        "plain": {"expand": {"blocks": 1}},
        "replay": {"expand": {"blocks": 1}, "data": {"sources": more}},
    }
    path = recipe(place, methods=rows, match=None, learning_rates=[1e-3])
    grid = open_study("baselines", path, None).grid
    named = {
        at.row.label: [Path(s.path).stem for s in grid.recipe(at, 1e-3, 3).data.sources] for at in grid.places
    }
    assert named == {"plain": ["train"], "replay": ["train", "general"]}


def test_a_diverged_cell_is_said_and_in_no_mean(place, tmp_path, monkeypatch):
    """The rate that blows up is no choice; a seed that does is left out of its row."""
    path = recipe(
        place, learning_rates=[5e-3, 1e30], methods={"full": {"train": {"method": "full"}}}, match=None
    )
    study = open_study("baselines", path, tmp_path / "study", ["seeds=[0]"])
    run_cells(study.store, study.grid.plan, Share(), Silent())
    record = collect_study(study)
    (choice,) = record.choices
    assert choice.losses["1e+30"] is None
    assert choice.chosen == 5e-3
    assert record.rows[0].learning_rate == 5e-3
    assert "diverged" in render_study(record)
    diverged = study.store.finished(study.grid.cell(study.grid.places[0], 1e30, 0))
    assert "not finite" in RunFacts.model_validate(diverged.result).diverged


def test_an_ablation_has_counts_and_placements_on_its_axes(place, tmp_path, capsys):
    path = recipe(place, "ablation")
    out = str(tmp_path / "study")
    assert main(["study", "ablation", str(path), "--out", out, "--dry-run", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["left"] == 3  # a single new block stands on top, interleaved or not: one cell
    assert not Path(out).exists()
    assert main(["study", "ablation", str(path), "--out", out, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["facts"] for row in rows] == [
        {"blocks": count, "placement": where, "zeroed": "writes"}
        for where in ("interleaved", "suffix")
        for count in (1, 2)
    ]
    costs = {each["name"]: each["cost"] for each in planned["cells"]}
    for row in rows:
        name = row["row"].replace("suffix-1", "interleaved-1")
        cost = costs[f"words-{name}-rate0.005-seed0"]
        assert cost["trainable"] == row["trainable"]
        assert cost["flops"] == pytest.approx(row["flops"], rel=2e-3)
    page = (tmp_path / "study" / "report.html").read_text()
    assert page.count("<svg") == 3  # two over counts, one of curves
    assert "begins as the identity: what it writes is zero.<" in page
    assert main(["report", out]) == 0
    assert (tmp_path / "study" / "report.html").read_text() == page
    record = read_record(tmp_path / "study" / "study.json", StudyRecord)
    of_reads = [
        row.model_copy(update={"row": f"{row.row}-reads", "facts": row.facts | {"zeroed": "reads"}})
        for row in record.rows
    ]
    both = render_study(record.model_copy(update={"rows": [*record.rows, *of_reads]}))
    assert "or where a row says so what it reads" in both
    assert both.count("suffix, reads zero") == 2  # a line of its own over counts, domain and general
    # What was collected before there was a choice says nothing of it.
    old = [
        row.model_copy(update={"facts": {"blocks": row.facts["blocks"], "placement": row.facts["placement"]}})
        for row in record.rows
    ]
    assert render_study(record.model_copy(update={"rows": old})) == page


def test_what_is_zero_is_an_axis_of_the_ablation(place, tmp_path):
    def cells(*settings):
        study = open_study("ablation", recipe(place, "ablation"), tmp_path / "study", settings)
        return {slot.name: slot.cell for slot in study.grid.plan(study.store.finished)}

    alone, both = cells(), cells("zeroed=[writes, reads]")
    assert list(both)[: len(alone)] == list(alone)
    assert all(both[name].key == cell.key for name, cell in alone.items())
    assert list(both)[len(alone) :] == [name.replace("-rate", "-reads-rate") for name in alone]
    assert len({cell.key for cell in both.values()}) == 2 * len({cell.key for cell in alone.values()})
    with pytest.raises(RecipeError, match="zeroed"):
        cells("zeroed=[gates]")


def test_how_new_blocks_are_made_is_part_of_a_cell(place, tmp_path):
    """Where they stand and what they copy was all: rows that differ in no more were one cell."""
    made = [{}, {"init": "copy", "zero": "writes"}, {"init": "average"}, {"zero": "reads"}]
    made.append({"init": "average", "zero": "reads"})
    methods = {f"row{number}": {"expand": {"after": [0]} | each} for number, each in enumerate(made)}
    study = open_study(
        "baselines", recipe(place, methods=methods, match=None, seeds=[0], learning_rates=[1e-3]), None
    )
    cells = [slot.cell for slot in study.grid.plan(study.store.finished)]
    assert cells[0].inputs["layout"] == [[0, 0]]  # as ever: what is finished stays finished
    assert cells[0].key == cells[1].key
    assert len({cell.key for cell in cells}) == len(made) - 1


def test_an_ablation_of_placement_by_importance(place, tmp_path, capsys):
    record = tmp_path / "importance.json"
    text = str(place / "general.jsonl")
    command = ["inspect", str(place / "base"), "--text", text, "--max-tokens", "300", "--out", str(record)]
    assert main(command) == 0
    capsys.readouterr()
    least = least_important(read_record(record, ImportanceRecord).scores, 1)
    path = recipe(place, "ablation", placements=["importance", "prefix"], counts=[1], importance=str(record))
    study = open_study("ablation", path, tmp_path / "study", [])
    found, other = (slot.cell.inputs["layout"] for slot in study.grid.plan(study.store.finished))
    assert [after for after, _ in found] == least
    assert other == [[-1, 0]]
    with pytest.raises(RecipeError, match="needs a record"):
        open_study("ablation", recipe(place, "ablation", placements=["importance"]), tmp_path / "none", [])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["run.train.seed=1"], "run.train.seed: the study decides it"),
        (["domains.words.sorces=[]"], "did you mean sources?"),
        (["run.train.tokns=5"], "train.tokns: unknown key; did you mean tokens?"),
        (["domains.words.tuning=[]"], "no tuning text to choose by"),
        (["match=nothing"], "no row is called nothing"),
        (["match=lora"], "name a row of method blocks or full"),
        (["methods.lora.train.lora={rnak: 3}"], "did you mean rank?"),
        (["seeds=[1, 1]"], "one stands twice"),
        (["run.expand={blocks: 1}"], "run.expand: the study decides it"),
    ],
)
def test_faults_are_said_before_anything_is_computed(place, tmp_path, settings, said):
    with pytest.raises(RecipeError) as found:
        open_study("baselines", recipe(place), tmp_path / "study", settings)
    assert said in str(found.value)
    assert not (tmp_path / "study").exists()


def test_a_missing_text_is_said_at_once(place):
    with pytest.raises((DataError, RecipeError), match="no file matches"):
        open_study("baselines", recipe(place), None, ["domains.words.reported=[{path: none.txt}]"])


KINDS = {
    "baselines-small": BaselinesRecipe,
    "ablation-small": AblationRecipe,
    "ablation-zero": AblationRecipe,
    "continual-small": ContinualRecipe,
    "forgetting-books-4m": BaselinesRecipe,
    "forgetting-embedded": BaselinesRecipe,
    "forgetting-parts": BaselinesRecipe,
    "forgetting-stories260k": BaselinesRecipe,
    "knowledge-small": KnowledgeRecipe,
    "law": BaselinesRecipe,
    "trace-llama2-7b-chat": ContinualRecipe,
}


@pytest.mark.parametrize("path", sorted((ROOT / "recipes" / "studies").glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_recipes_are_valid(path):
    load_document(path, KINDS[path.stem])


def test_the_page_on_studies_shows_a_recipe_and_names_every_key(tmp_path):
    page = (ROOT / "docs" / "studies.md").read_text()
    (tmp_path / "study.yaml").write_text(page.split("```yaml\n")[1].split("```")[0])
    load_document(tmp_path / "study.yaml", BaselinesRecipe)
    kinds = (BaselinesRecipe, AblationRecipe, DomainSection, KnowledgeRecipe)
    keys = {key for kind in kinds for key in kind.model_fields}
    assert not {key for key in keys if f"`{key}`" not in page}
