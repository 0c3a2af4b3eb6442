import json
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final

import yaml

from deepen.checkpoint import write_file
from deepen.config import Recipe, parse_recipe
from deepen.demo.text import (
    code,
    documents_apart,
    module_name,
    prose,
    standard_library,
)
from deepen.pipeline.reporter import Reporter
from deepen.pipeline.run import run_recipe

BASE: Final = Path(__file__).parent / "base"
_DOMAIN_CHARACTERS: Final = 1_500_000
# Of each held-out module: many modules are scored and not a few long ones.
_HELDOUT_CHARACTERS: Final = 4_000


def run_demo(out: Path, *, overwrite: bool, reporter: Reporter) -> list[Path]:
    """Teach the embedded base Python code twice, in full and by new blocks; return the two runs.

    Args:
        out: directory for texts, runs and the comparison.
        overwrite: replace earlier runs there.
        reporter: told what goes on.
    """
    reporter.stage("reading this installation's docstrings and source")
    write_texts(out / "text")
    recipes = demo_recipes(out)
    for name, recipe in recipes.items():
        reporter.note(f"{name}: {_DESCRIPTIONS[name]}")
        run_recipe(recipe, resume=True, overwrite=overwrite, reporter=reporter)
    return [Path(recipe.output) for recipe in recipes.values()]


_DESCRIPTIONS: Final = {
    "full": "every parameter of the base trains",
    "blocks": "only new blocks train; the base's bytes stay",
}


def demo_recipes(out: Path) -> dict[str, Recipe]:
    """Return the demo's two recipes, complete; they differ in the method and its tuned learning rate."""
    settings = yaml.safe_load((BASE.parent / "settings.yaml").read_text())
    shared = settings.pop("shared")
    return {name: _recipe(name, shared, own, out) for name, own in settings.items()}


def _recipe(name: str, shared: dict[str, Any], own: dict[str, Any], out: Path) -> Recipe:
    text = out / "text"
    raw: dict[str, Any] = {
        "base": str(BASE),
        "output": str(out / name),
        "data": shared["data"]
        | {
            "sources": [{"name": "python-code", "path": str(text / "domain.jsonl")}],
            "cache": str(out / "cache"),
        },
        "train": shared["train"] | own["train"],
        "evaluate": shared["evaluate"]
        | {
            "general": [{"name": "docstrings", "path": str(text / "general-heldout.jsonl")}],
            "domain": [{"name": "python-code", "path": str(text / "domain-heldout.jsonl")}],
        },
    }
    if "expand" in own:
        raw["expand"] = own["expand"]
    return parse_recipe(yaml.safe_dump(raw), where="demo")


def write_texts(directory: Path) -> None:
    """Write the demo's texts as JSONL, read from this installation: what is trained on and two held-out."""
    directory.mkdir(parents=True, exist_ok=True)
    root = Path(sysconfig.get_path("stdlib"))
    training, heldout = documents_apart(standard_library(), root)
    _write(directory / "general-heldout.jsonl", _documents(prose(heldout), root))
    _write(directory / "domain.jsonl", _up_to(_documents(code(training), root), _DOMAIN_CHARACTERS))
    beginnings = ((path, text[:_HELDOUT_CHARACTERS]) for path, text in code(heldout))
    _write(directory / "domain-heldout.jsonl", _documents(beginnings, root))


def _documents(texts: Iterable[tuple[Path, str]], root: Path) -> Iterator[dict[str, str]]:
    for path, text in texts:
        yield {"module": module_name(path, root), "text": text}


def _up_to(records: Iterator[dict[str, str]], size: int) -> Iterator[dict[str, str]]:
    for record in records:
        if size <= 0:
            return
        size -= len(record["text"])
        yield record


def _write(path: Path, records: Iterable[dict[str, str]]) -> None:
    write_file(path, "".join(json.dumps(record) + "\n" for record in records))
