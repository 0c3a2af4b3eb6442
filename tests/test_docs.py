"""The documentation cannot drift: its commands parse, its code runs, its generated pages and links hold."""

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import typer
import yaml
from test_surface import load_generate

import deepen
from deepen import cli
from deepen.config import load_recipe, parse_recipe
from deepen.expansion import Expansion
from deepen.records import (
    AuditResult,
    EvaluationPoint,
    EvaluationRecord,
    IdentityResult,
    Items,
    Metric,
    Parameters,
    Provenance,
    RunResult,
    TextResult,
    TrainingPoint,
)

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [
    ROOT / name for name in ("README.md", "README.zh-CN.md", "CONTRIBUTING.md", "CHANGELOG.md")
] + sorted(DOCS.rglob("*.md"))
FENCE = re.compile(r"(<!-- run -->\n+)?^ *```(\w*)[^\n]*\n(.*?)^ *```", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """A fenced block; `run` where `<!-- run -->` stands above it."""

    page: Path
    line: int
    text: str
    run: bool


def blocks(*languages: str) -> list[Block]:
    return [
        Block(page, content.count("\n", 0, match.start(3)) + 1, match[3], bool(match[1]))
        for page in PAGES
        for content in [page.read_text()]
        for match in FENCE.finditer(content)
        if match[2] in languages
    ]


def named(found: list[Block]) -> list:
    return [pytest.param(block, id=f"{block.page.relative_to(ROOT)}:{block.line}") for block in found]


def shell_commands(text: str) -> Iterator[list[str]]:
    """The simple commands of a script, as words."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line.removeprefix("$ "), comments=True)
        start = 0
        for end in [*(i for i, word in enumerate(words) if word in ("&&", "||", "|", ";")), len(words)]:
            part = words[start:end]
            while part and re.match(r"\w+=", part[0]):
                part = part[1:]
            if part:
                yield part
            start = end + 1


def find_command(words: list[str]):
    """Return (command, its name, what follows) for the words after `deepen`."""
    command, name = typer.main.get_command(cli._root), "deepen"
    while hasattr(command, "list_commands") and words and not words[0].startswith("-"):
        name, *words = words
        child = command.get_command(command.make_context("deepen", [], resilient_parsing=True), name)
        assert child, f"no command {name}"
        command = child
    return command, name, words


@pytest.mark.parametrize("block", named(blocks("bash", "sh", "console", "shell")))
def test_shell_blocks_say_commands_that_exist(block):
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for program, *words in shell_commands(block.text):
        if program == "make":
            assert {word for word in words if "=" not in word and word[0] != "-"} <= targets
        if program.rsplit("/", 1)[-1] == "deepen" and not {"--help", "-h"} & set(words):
            command, name, rest = find_command(words)
            command.make_context(name, rest)  # raises where an option or argument does not exist


def test_a_wrong_command_is_noticed():
    with pytest.raises(AssertionError, match="no command exapnd"):
        find_command(["exapnd", "a", "b"])
    command, name, rest = find_command(["expand", "a", "b", "--bloks", "8"])
    with pytest.raises(typer.TyperException, match="--bloks"):
        command.make_context(name, rest)


@pytest.mark.parametrize("page", [pytest.param(page, id=str(page.relative_to(ROOT))) for page in PAGES])
def test_commands_named_in_the_text_exist(page):
    for said in re.findall(r"(?<!`)`deepen ([^`\n]+)`", page.read_text()):
        words = [word for word in said.split() if word not in ("…", "[options]")]
        command, _, rest = find_command(words)
        known = {option for parameter in command.params for option in parameter.opts} | {"--help", "-h"}
        assert {word.split("=")[0] for word in rest if word.startswith("--")} <= known, said


@pytest.mark.parametrize("block", named(blocks("python", "py")))
def test_python_blocks_compile(block):
    compile(block.text, f"{block.page}:{block.line}", "exec")


RUN = [block for block in blocks("python", "py") if block.run]


def test_some_python_blocks_run():
    assert RUN


@pytest.mark.parametrize("page", sorted({block.page for block in RUN}), ids=lambda page: page.name)
def test_python_blocks_marked_so_run(page, tiny_llama, tmp_path, monkeypatch):
    tiny_llama("base")
    monkeypatch.chdir(tmp_path)
    for block in RUN:
        if block.page == page:
            exec(compile(block.text, f"{block.page}:{block.line}", "exec"), {})


@pytest.mark.parametrize("block", named([b for b in blocks("yaml") if b.text.startswith("base:")]))
def test_recipes_are_valid(block):
    parse_recipe(block.text)


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.yaml")), ids=lambda path: path.name)
def test_examples_are_valid(path):
    load_recipe(path)


def test_the_readme_quotes_the_records():
    readme = (ROOT / "README.md").read_text()
    assert load_generate().readme() == readme, "README.md: run python docs/generate.py"


def test_generated_pages_are_up_to_date():
    for name, content in load_generate().pages().items():
        assert (DOCS / name).read_text() == content, f"docs/{name}: run python docs/generate.py"


def test_the_example_of_expansion_json_is_one():
    (block,) = [block for block in blocks("json") if "new_blocks" in block.text]
    Expansion.model_validate(json.loads(block.text))


RECORDS = (
    *(Expansion, RunResult, Parameters, IdentityResult, AuditResult, Provenance),
    *(EvaluationRecord, Metric, TextResult, Items, TrainingPoint, EvaluationPoint),
)


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record.__name__)
def test_every_key_of_a_record_is_described(record):
    text = (DOCS / "formats.md").read_text()
    said = {name for code in re.findall(r"`([^`\n]+)`", text) for name in re.findall(r"\w+", code)}
    assert record.model_fields.keys() <= said


def test_python_page_shows_every_public_name():
    shown = re.findall(r"^::: ([\w.]+)", (DOCS / "python.md").read_text(), re.MULTILINE)
    assert {name.rsplit(".", 1)[-1] for name in shown} == {*deepen.__all__, "errors"} - {"DeepenError"}


def test_navigation_names_every_page():
    text = (ROOT / "mkdocs.yml").read_text()
    listed = re.findall(r"([\w./-]+\.md)$", text, re.MULTILINE)
    assert sorted(listed) == sorted(page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md"))
    assert yaml.safe_load(text)["docs_dir"] == "docs"


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as mkdocs and GitHub make them."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


@pytest.mark.parametrize("page", [pytest.param(page, id=str(page.relative_to(ROOT))) for page in PAGES])
def test_internal_links_resolve(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", page.read_text())):
        if re.match(r"\w+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_the_chinese_readme_has_the_same_commands():
    def commands(name):
        text = (ROOT / name).read_text()
        blocks = re.findall(r"^```(\w+)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
        return [(kind, re.sub(r" +# .*$", "", block, flags=re.MULTILINE)) for kind, block in blocks]

    assert commands("README.zh-CN.md") == commands("README.md")
