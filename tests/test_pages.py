"""What the pages say runs: every command and every Python block, page by page, at toy size, or a mark says why not."""

import io
import subprocess
from functools import cache
from pathlib import Path

import pytest
import yaml
from page_blocks import (
    PAGES,
    ROOT,
    SHELLS,
    Block,
    after_deepen,
    read_blocks,
    shell_commands,
)
from page_stage import Stage, Theatre

from deepen.cli import main
from deepen.config import BaselinesRecipe, ContinualRecipe, KnowledgeRecipe, Recipe, load_document
from deepen.evaluation.suites import own_task, spec

PYTHON = ("python", "py")
BLOCKS = read_blocks(*SHELLS, *PYTHON, "yaml")
# Chinese pages say the commands of the English ones, which test_docs.py holds them to.
STAGED = [
    page
    for page in PAGES
    if not page.stem.endswith("zh-CN")
    and any(
        block.page == page and (block.language != "yaml" or block.file) and not block.why_not_run()
        for block in BLOCKS
    )
]


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.fixture(scope="module")
def theatres(tmp_path_factory):
    return cache(lambda blocks: Theatre(tmp_path_factory.mktemp("theatre"), blocks))


@pytest.fixture
def stage(page, theatres, tmp_path, monkeypatch):
    theatre = theatres(32 if "plan_layout(32" in page.read_text() else 12)
    monkeypatch.setenv("DEEPEN_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(theatre.root)
    assert theatre.run
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return Stage(tmp_path, theatre)


def run_shell(block: Block, stage: Stage, monkeypatch) -> None:
    for words, reads in shell_commands(block.text):
        given = after_deepen(words)
        if given is None or block.why_not_run(" ".join(words)):
            continue
        stage.provide(given)
        said = subprocess.run(reads, capture_output=True, text=True, check=True).stdout if reads else ""
        monkeypatch.setattr("sys.stdin", io.StringIO(said))
        assert main(given) == 0, " ".join(words)


@pytest.mark.parametrize("page", STAGED, ids=name)
def test_what_a_page_says_runs(page, stage, monkeypatch):
    names, blocks = {}, [block for block in BLOCKS if block.page == page and not block.why_not_run()]
    for block in blocks:
        if block.file:
            stage.write_file(block.file, block.text)
    for block in blocks:
        exec(block.given, names)
        if block.language in SHELLS:
            run_shell(block, stage, monkeypatch)
        elif block.language in PYTHON:
            exec(compile(block.text, f"{page}:{block.line}", "exec"), names)


@pytest.mark.parametrize("block", [pytest.param(b, id=f"{name(b.page)}:{b.line}") for b in BLOCKS])
def test_marks_are_of_use(block):
    if block.language in PYTHON:
        compile(block.text, "block", "exec")
    for kind, parts, said in block.marks:
        assert kind != "not run" or len(said.split()) > 1, "a mark says why"
        assert all(part in block.text for part in parts), "a mark names what stands in its block"


# What a YAML block is, by a key that only it has; what is none of these is of a recipe.
KINDS = {
    "role": spec._Suite,
    "kind": own_task.OwnTask,
    "domains": BaselinesRecipe,
    "also": KnowledgeRecipe,
    "tasks": ContinualRecipe,
    "trace": ContinualRecipe,
}
# A whole one of each kind that pages show parts of.
WHOLE = {
    ContinualRecipe: {
        "base": "b",
        "output": "o",
        "sequence_length": 64,
        "methods": [{"name": "a", "method": "full"}],
    },
    Recipe: {
        **{"base": "b", "output": "o", "expand": {"blocks": 2}},
        "data": {"sequence_length": 64, "sources": [{"path": "a.txt"}]},
        "train": {"tokens": 1e6, "batch_tokens": 1e4, "learning_rate": 1e-3},
    },
}


def merged(whole: dict, part: dict) -> dict:
    both = {key: merged(whole[key], part[key]) for key in part if isinstance(whole.get(key), dict)}
    return whole | part | both


@pytest.mark.parametrize(
    "block", [pytest.param(b, id=f"{name(b.page)}:{b.line}") for b in BLOCKS if b.language == "yaml"]
)
def test_yaml_blocks_are_valid(block, tmp_path):
    content = yaml.safe_load(block.text)
    kind = next((kind for key, kind in KINDS.items() if key in content), Recipe)
    if "base" not in content and kind in WHOLE:
        content = merged(WHOLE[kind], content)
    (tmp_path / "block.yaml").write_text(yaml.safe_dump(content))
    load_document(tmp_path / "block.yaml", kind)
