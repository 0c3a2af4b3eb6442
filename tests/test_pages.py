"""What the pages say runs, at toy size: every command and Python block, but for what is marked."""

import io
import re
import subprocess
from functools import cache, partial
from pathlib import Path

import pytest
import yaml
from page_blocks import (
    ROOT,
    SHELLS,
    Block,
    after_deepen,
    read_blocks,
    shell_commands,
)
from page_stage import Stage, Theatre

from deepen.cli import main
from deepen.config import (
    AblationRecipe,
    BaselinesRecipe,
    ContinualRecipe,
    KnowledgeRecipe,
    Recipe,
    load_document,
)
from deepen.evaluation.suites import own_task, spec

PYTHON = ("python", "py")
BLOCKS = read_blocks(*SHELLS, *PYTHON, "yaml")
# (page, whether its Python or its commands). Chinese pages say the same: see test_docs.py.
STAGED = sorted(
    {
        (block.page, block.language in PYTHON)
        for block in BLOCKS
        if block.language != "yaml" and not block.why_not_run() and not block.page.stem.endswith("zh-CN")
    }
)


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.fixture(scope="module")
def theatres(tmp_path_factory):
    return cache(lambda blocks: Theatre(tmp_path_factory.mktemp("theatre"), blocks))


@pytest.fixture
def play(theatres, tmp_path, monkeypatch):
    """Run the blocks of a page in one directory, in their order."""
    monkeypatch.setenv("DEEPEN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)

    def run(blocks: list[Block], run_block) -> None:
        deep = any("plan_layout(32" in block.text for block in blocks)
        stage = Stage(tmp_path, theatres(32 if deep else 12))
        for block in blocks:
            if block.file:
                stage.write_file(block.file, block.text)
        for block in blocks:
            run_block(block, stage)

    return run


def run_shell(block: Block, stage: Stage, monkeypatch) -> None:
    if block.language not in SHELLS:
        return
    for words, reads in shell_commands(block.text):
        given = after_deepen(words)
        if given is None or block.why_not_run(" ".join(words)):
            continue
        stage.provide(given)
        said = subprocess.run(reads, capture_output=True, text=True, check=True).stdout if reads else ""
        monkeypatch.setattr("sys.stdin", io.StringIO(said))
        assert main(stage.shrink(given)) == 0, " ".join(words)


# Each of these takes ten seconds or more of a core, most of them for `deepen plan`.
PLANS = ("plan", "layout-and-rate", "one-gpu", "eight-gpus", "how-much-data")
SLOW = {f"docs/{page}.md" for page in (*PLANS, "worth", "own-data")}


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, id=name(page), marks=[pytest.mark.slow] * (name(page) in SLOW))
        for page, python in STAGED
        if not python
    ],
)
def test_the_commands_of_a_page_run(page, play, monkeypatch):
    blocks = [block for block in BLOCKS if block.page == page and block.language not in PYTHON]
    play([block for block in blocks if not block.why_not_run()], partial(run_shell, monkeypatch=monkeypatch))


@pytest.mark.parametrize("page", [page for page, python in STAGED if python], ids=name)
def test_the_python_of_a_page_runs(page, play):
    names = {}

    def run_python(block: Block, stage: Stage) -> None:
        stage.provide(re.findall(r'"([\w./-]+)"', block.given + block.text))
        exec(block.given, names)
        exec(compile(block.text, f"{page}:{block.line}", "exec"), names)

    blocks = [block for block in BLOCKS if block.page == page and block.language in PYTHON]
    play([block for block in blocks if not block.why_not_run()], run_python)


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
    "counts": AblationRecipe,
    "domains": BaselinesRecipe,
    "also": KnowledgeRecipe,
    "tasks": ContinualRecipe,
    "trace": ContinualRecipe,
    "deltas": ContinualRecipe,
}
METHOD = {"name": "a", "method": "full", "learning_rate": 1e-3}
# A whole one of each kind that pages show parts of.
WHOLE = {
    ContinualRecipe: {
        "base": "b",
        "output": "o",
        "sequence_length": 64,
        "methods": [METHOD],
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
    if kind is ContinualRecipe and "tasks" not in content:
        content.setdefault("trace", "t")
    (tmp_path / "block.yaml").write_text(yaml.safe_dump(content))
    load_document(tmp_path / "block.yaml", kind)
