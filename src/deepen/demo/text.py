"""Text that every Python installation holds.

General text: English prose, the docstrings of a package's modules and the language's own help topics.
Domain text: Python source with docstrings and comments stripped. Nobody's text is shipped: both are read
from the user's own installation. Documents are split into training and held-out *by module*.
"""

import ast
import hashlib
import io
import re
import sysconfig
import tokenize
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

HELDOUT_SHARE: Final = 0.12
_SKIPPED: Final = frozenset(
    {
        "test",
        "tests",
        "testing",
        "idle_test",
        "lib2to3",
        "site-packages",
        "__pycache__",
        "encodings",
        "pydoc_data",
    }
)
_LARGEST: Final = 200_000  # bytes; larger modules are tables


def standard_library() -> tuple[Path, ...]:
    """Return the modules of the standard library, sorted; tests and bundled packages left out."""
    return modules_below(Path(sysconfig.get_path("stdlib")))


def modules_below(root: Path) -> tuple[Path, ...]:
    """Return the Python files below `root`, sorted, without tests."""
    files = (path for path in root.rglob("*.py") if not _SKIPPED.intersection(path.relative_to(root).parts))
    return tuple(sorted(path for path in files if path.stat().st_size <= _LARGEST))


def is_heldout(module: str) -> bool:
    """Whether a module, by its dotted name, belongs to the held-out part: the same on every machine."""
    return _number(module) < HELDOUT_SHARE * 2**64


def _number(module: str) -> int:
    return int.from_bytes(hashlib.blake2b(module.encode(), digest_size=8).digest(), "big")


def documents_apart(files: Iterable[Path], root: Path) -> tuple[list[Path], list[Path]]:
    """Split modules into (training, held-out), each in an order that mixes packages, the same everywhere."""
    ordered = sorted(files, key=lambda path: _number(module_name(path, root)))
    training = [path for path in ordered if not is_heldout(module_name(path, root))]
    return training, [path for path in ordered if is_heldout(module_name(path, root))]


def module_name(path: Path, root: Path) -> str:
    """Return the dotted name of a file below `root`."""
    return ".".join(path.relative_to(root).with_suffix("").parts)


def prose(files: Iterable[Path]) -> Iterator[tuple[Path, str]]:
    """Yield (file, its docstrings as one text) for files that have prose enough to read."""
    for path in files:
        if (tree := _parsed(path)) is None:
            continue
        paragraphs = [text for text in map(_readable, _docstrings(tree)) if text]
        if sum(map(len, paragraphs)) >= 200:
            yield path, "\n\n".join(dict.fromkeys(paragraphs))


def help_topics() -> list[tuple[str, str]]:
    """Return (name, text) of the language's help topics, `pydoc_data.topics`."""
    from pydoc_data.topics import topics

    return [(f"pydoc_data.topics.{name}", _plain(text)) for name, text in sorted(topics.items())]


def code(files: Iterable[Path]) -> Iterator[tuple[Path, str]]:
    """Yield (file, its source without docstrings and comments), indented as the author did."""
    for path in files:
        if (tree := _parsed(path)) is None:
            continue
        stripped = _without_comments(_source(path), _docstring_lines(tree))
        if len(stripped) >= 400:
            yield path, stripped


def _source(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="strict")


def _parsed(path: Path) -> ast.Module | None:
    try:
        return ast.parse(_source(path))
    except (SyntaxError, ValueError, OSError, RecursionError):
        return None


_Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def _docstrings(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, _Documented) and (text := ast.get_docstring(node)):
            yield text


def _docstring_lines(tree: ast.Module) -> set[int]:
    lines: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, _Documented) and ast.get_docstring(node, clean=False) is not None:
            first = node.body[0]
            lines.update(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    return lines


def _without_comments(source: str, dropped: set[int]) -> str:
    lines = source.splitlines()
    try:
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if token.type == tokenize.COMMENT:
                row, column = token.start
                lines[row - 1] = lines[row - 1][:column]
    except (tokenize.TokenError, IndentationError):
        return ""
    kept = [line.rstrip() for number, line in enumerate(lines, 1) if number not in dropped]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(kept)).strip() + "\n"


def _readable(docstring: str) -> str:
    """Drop a docstring's examples and tables, keep its sentences; empty when none are left."""
    text = _plain(docstring)
    letters = sum(character.isalpha() or character == " " for character in text)
    return text if len(text) >= 40 and letters >= 0.75 * len(text) else ""


def _plain(text: str) -> str:
    lines = (line.rstrip() for line in text.splitlines())
    kept = [
        line for line in lines if not re.match(r"\s*(>>>|\.\.\.|[-=*~^+|#]{3,})", line) and "::" not in line
    ]
    joined = re.sub(r"``?|\*\*|:\w+:(?=`)", "", "\n".join(kept))
    return re.sub(r"\n{3,}", "\n\n", joined).strip()
