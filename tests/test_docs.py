"""The documentation cannot drift: its commands parse, its generated pages and links hold."""

import json
import re
import subprocess
from pathlib import Path

import pytest
import typer
import yaml
from page_blocks import (
    DOCS,
    FENCE,
    PAGES,
    ROOT,
    SHELLS,
    Block,
    after_deepen,
    find_command,
    parse_command,
    read_blocks,
    shell_commands,
)
from test_surface import load_generate

import deepen
from deepen.config import load_recipe
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


def named(found: list[Block]) -> list:
    return [pytest.param(block, id=f"{block.page.relative_to(ROOT)}:{block.line}") for block in found]


@pytest.mark.parametrize("block", named(read_blocks(*SHELLS)))
def test_shell_blocks_say_commands_that_exist(block):
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for (program, *words), _ in shell_commands(block.text):
        if program == "make":
            assert {word for word in words if "=" not in word and word[0] != "-"} <= targets
        if program == "python" and words[0].endswith(".py"):
            assert (ROOT / words[0]).is_file()
        rest = after_deepen([program, *words])
        if rest is not None:
            parse_command(rest)


def test_a_wrong_command_is_noticed():
    with pytest.raises(AssertionError, match="no command exapnd"):
        parse_command(["exapnd", "a", "b"])
    with pytest.raises(typer.TyperException, match="--bloks"):
        parse_command(["expand", "a", "b", "--bloks", "8"])
    [_, (words, _)] = shell_commands(
        "make demo && torchrun --nproc-per-node 8 -m deepen run recipe.yaml --resum"
    )
    with pytest.raises(typer.TyperException, match="--resum"):
        parse_command(after_deepen(words))


@pytest.mark.parametrize("page", [pytest.param(page, id=str(page.relative_to(ROOT))) for page in PAGES])
def test_commands_named_in_the_text_exist(page):
    for said in re.findall(r"(?<!`)`deepen ([^`\n]+)`", page.read_text()):
        words = [word for word in said.split() if word not in ("…", "[options]")]
        command, _, rest = find_command(words)
        known = {option for parameter in command.params for option in parameter.opts} | {"--help", "-h"}
        assert {word.split("=")[0] for word in rest if word.startswith("--")} <= known, said


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.yaml")), ids=lambda path: path.name)
def test_examples_are_valid(path):
    load_recipe(path)


def test_the_readme_quotes_the_records():
    readme = (ROOT / "README.md").read_text()
    assert load_generate().readme() == readme, "README.md: run python docs/generate.py"


def test_the_table_of_rates_is_the_record():
    losses = json.loads((ROOT / "studies" / "demo_rates" / "record.json").read_text())["losses"]
    shown = re.findall(r"^\| (0\.\d+) \|(.*)\|$", (DOCS / "layout-and-rate.md").read_text(), re.MULTILINE)
    assert {rate for rate, _ in shown} == {name.split("-")[1] for name in losses if name.startswith("full")}
    for rate, cells in shown:
        rows = [losses[f"{row}-{rate}"] for row in ("full", "blocks")]
        assert cells.split("|") == [f" {row[text]:.3f} " for row in rows for text in ("docstrings", "tuning")]


def test_generated_pages_are_up_to_date():
    for name, content in load_generate().pages().items():
        assert (DOCS / name).read_text() == content, f"docs/{name}: run python docs/generate.py"


def test_the_example_of_expansion_json_is_one():
    (block,) = [block for block in read_blocks("json") if "new_blocks" in block.text]
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


@pytest.mark.parametrize("page", ["README.md", "docs/quickstart.md"])
def test_the_chinese_page_has_the_same_commands(page):
    def commands(name):
        blocks = re.findall(r"^```(\w+)\n(.*?)^```", (ROOT / name).read_text(), re.DOTALL | re.MULTILINE)
        return [(kind, re.sub(r" +# .*$", "", block, flags=re.MULTILINE)) for kind, block in blocks]

    assert commands(page.replace(".md", ".zh-CN.md")) == commands(page)


def _commented(path: Path) -> str:
    """The commands in the comments of an example or a recipe."""
    lines = path.read_text().replace("\\\n", " ").splitlines()
    found = [
        line.strip("# ").split("   ")[0]
        for line in lines
        if re.match(r"# {2,}(RUN=|deepen |torchrun )", line)
    ]
    return "\n".join(found)


FILES = sorted([*(ROOT / "examples").glob("*"), *(ROOT / "recipes").rglob("*.yaml")])


@pytest.mark.parametrize(
    "path", [pytest.param(p, id=p.relative_to(ROOT).as_posix()) for p in FILES if p.is_file()]
)
def test_examples_and_recipes_say_commands_that_exist(path):
    if path.parent.name == "examples":
        assert len(path.read_text().splitlines()) < 80
    text = _commented(path)
    if path.suffix == ".sh":
        subprocess.run(["bash", "-n", str(path)], check=True)
        text += "\n" + re.sub(r"^ *#.*\n", "", path.read_text(), flags=re.MULTILINE)
    if path.suffix == ".py":
        compile(path.read_text(), str(path), "exec")
    for words, _ in shell_commands(text):
        rest = after_deepen(words)
        if rest is not None:
            parse_command([re.sub(r"^\$\w+$|^\$\{.*\}$", "baselines", word) for word in rest])
