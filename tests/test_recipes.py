"""The recipes at the paper's scale: each loads, and is planned on a tiny model of its base's shape."""

import json
import re
from pathlib import Path

import pytest
import yaml
from conftest import write_tiny_llama

from deepen.config import load_recipe
from deepen.pipeline.plan import plan_run
from deepen.studies.study import open_study

ROOT = Path(__file__).parents[1] / "recipes"
RECIPES = sorted(ROOT.glob("*.yaml"))
# Name -> (blocks of the base, new ones, steps): arXiv 2401.02415, Table 6 and Figure 5.
PLANNED = {
    "llama-pro-8b": (32, [4, 9, 14, 19, 24, 29, 34, 39], 15_900),
    "mistral-pro": (32, [8, 17, 26, 35], 4769),
    "law": (32, [4, 9, 14, 19, 24, 29, 34, 39], 5000),
}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_loads(path):
    recipe = load_recipe(path)
    assert recipe.output == f"runs/{path.stem}"


@pytest.mark.parametrize("name", PLANNED)
def test_planned_as_the_paper_has_it(name, tmp_path):
    blocks, new, steps = PLANNED[name]
    path = next(path for path in RECIPES if path.stem == name)
    base = write_tiny_llama(tmp_path / "base", blocks=blocks, max_position_embeddings=4096)
    content = yaml.safe_load(path.read_text())
    for source in content["data"]["sources"]:
        if "path" in source:
            text = tmp_path / f"{source['name']}.jsonl"
            text.write_text(json.dumps({source.get("field", "text"): "text"}) + "\n")
            source["path"] = str(text)
    content |= {"base": str(base), "output": str(tmp_path / "run")}
    content["evaluate"] = {}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    plan = plan_run(load_recipe(tmp_path / "recipe.yaml"))
    assert sorted(plan.layout.new_indices) == new
    assert plan.known_steps == steps


def test_every_row_on_law_is_planned_as_the_paper_has_it(tmp_path, monkeypatch):
    (tmp_path / "data" / "freelaw").mkdir(parents=True)
    for name in ("freelaw/part", "freelaw-reported"):
        (tmp_path / "data" / f"{name}.jsonl").write_text('{"text": "text"}\n')
    base = write_tiny_llama(tmp_path / "base", blocks=32, max_position_embeddings=4096)
    monkeypatch.chdir(tmp_path)
    law = RECIPES[0].parent / "studies" / "law.yaml"
    study = open_study("baselines", law, None, [f"run.base={base}", "run.evaluate={}"])
    outlines = {place.row.label: study.grid.outline(place) for place in study.grid.places}
    assert {outline.known_steps for outline in outlines.values()} == {5000}
    assert {
        label: len(outline.layout.new_indices) for label, outline in outlines.items() if outline.layout
    } == {
        **{f"blocks-{count}": count for count in (1, 2, 4, 8, 16, 32)},
        **{"prefix-8": 8, "suffix-8": 8},
    }
    published = re.findall(r"^#   ([a-z]+(?:-\d+)?) +\d", law.read_text(), re.MULTILINE)
    assert sorted(published) == sorted(outlines)


def test_chinese_llama_trains_what_its_scripts_train():
    pretraining, tuning = (
        load_recipe(ROOT / f"{name}.yaml") for name in ("chinese-llama-2", "chinese-alpaca-2")
    )
    for lora in (pretraining.train.lora, tuning.sft.lora):
        assert (lora.rank, lora.alpha, lora.dropout) == (64, 128, 0.05)
        assert lora.modules_to_save == ("embed_tokens", "lm_head")
    rates = [(each.learning_rate, each.warmup, each.weight_decay) for each in (pretraining.train, tuning.sft)]
    assert rates == [(2e-4, 0.05, 0.01), (1e-4, 0.03, 0.0)]
    assert tuning.base == f"{pretraining.output}/model"
