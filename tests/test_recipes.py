"""The recipes at the paper's scale: each loads, and is planned on a tiny model of its base's shape."""

import json
from pathlib import Path

import pytest
import yaml
from conftest import write_tiny_llama

from deepen.config import load_recipe
from deepen.pipeline.plan import plan_run

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))
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
