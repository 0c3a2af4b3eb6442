"""The fenced blocks of the documentation, their marks, and the commands in them.

A mark is an HTML comment above a block, which no reader sees:

    <!-- file: recipe.yaml -->                     the commands below read the block under this name
    <!-- given: model = deepen.load("base") -->    Python that is run before it
    <!-- not run: needs two GPUs -->               nothing of the block is run
    <!-- not run `--watch`, `chat`: serves -->     nor are commands that contain one of these texts
"""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import typer

from deepen import cli

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [
    ROOT / name for name in ("README.md", "README.zh-CN.md", "CONTRIBUTING.md", "CHANGELOG.md")
] + sorted(DOCS.rglob("*.md"))
SHELLS = ("bash", "sh", "console", "shell")
FENCE = re.compile(r"((?:^ *<!--[^\n]*-->\n+)*)^ *```(\w*)[^\n]*\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
_ENDS = ("&&", "||", "|", ";", "&")
_MARK = re.compile(r"<!-- *(file|given|not run) *((?:`[^`]+`,? *)*): *(.+?) *-->")


class Block(NamedTuple):
    """A fenced block; `marks` are (kind, texts it is limited to, what it says)."""

    page: Path
    line: int
    language: str
    text: str
    marks: tuple[tuple[str, tuple[str, ...], str], ...]

    @property
    def file(self) -> str | None:
        """The name under which the page's commands read it."""
        return next((said for kind, _, said in self.marks if kind == "file"), None)

    @property
    def given(self) -> str:
        """Python to run before it."""
        return "\n".join(said for kind, _, said in self.marks if kind == "given")

    def why_not_run(self, command: str = "") -> str | None:
        """Why the block, or one command of it, is not run; None where it is."""
        for kind, parts, said in self.marks:
            if kind == "not run" and (not parts or any(part in command for part in parts)):
                return said
        return None


def read_blocks(*languages: str) -> list[Block]:
    found = []
    for page in PAGES:
        content = page.read_text()
        for match in FENCE.finditer(content):
            if match[2] in languages:
                marks = tuple(
                    (mark[1], tuple(re.findall(r"`([^`]+)`", mark[2])), mark[3])
                    for mark in _MARK.finditer(match[1])
                )
                line = content.count("\n", 0, match.start(3)) + 1
                found.append(Block(page, line, match[2], match[3], marks))
    return found


class Command(NamedTuple):
    """A simple command, and the one whose output it reads, if any."""

    words: list[str]
    reads: list[str]


def shell_commands(text: str) -> Iterator[Command]:
    """The simple commands of a script."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line.removeprefix("$ "), comments=True)
        start, reads = 0, []
        for end in [*(i for i, word in enumerate(words) if word in _ENDS), len(words)]:
            part = words[start:end]
            while part and re.match(r"\w+=", part[0]):
                part = part[1:]
            if part:
                yield Command(part, reads)
            reads = part if words[end : end + 1] == ["|"] else []
            start = end + 1


def after_deepen(words: list[str]) -> list[str] | None:
    """What a command gives to deepen; None where it does not call it."""
    if words[0] in ("exec", "srun", "time"):
        words = words[1:]
    if words and words[0].rsplit("/", 1)[-1] == "deepen":
        return words[1:]
    for at in range(len(words) - 1):
        if words[at : at + 2] == ["-m", "deepen"]:
            return words[at + 2 :]
    return None


def find_command(words: list[str]):
    """Return (command, its name, what follows) for the words after `deepen`."""
    command, name = typer.main.get_command(cli._root), "deepen"
    while hasattr(command, "list_commands") and words and not words[0].startswith("-"):
        name, *words = words
        child = command.get_command(command.make_context("deepen", [], resilient_parsing=True), name)
        assert child, f"no command {name}"
        command = child
    return command, name, words


def parse_command(words: list[str]) -> None:
    """Parse the words after `deepen`; raises where a command, option or argument does not exist."""
    if not {"--help", "-h", "--version"} & set(words):
        command, name, rest = find_command(words)
        command.make_context(name, rest)
