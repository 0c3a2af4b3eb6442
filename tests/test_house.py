"""The house keeps its shape: short functions, short files, rooms with a noun for a name."""

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "deepen"
FILES = sorted(SOURCE.rglob("*.py"))
LONGEST_FUNCTION, LONGEST_FILE = 60, 400

# Path, or path:function -> why it may be longer.
ALLOWED: dict[str, str] = {}


def sizes(path: Path) -> dict[str, int]:
    """Lines of a file and of each function in it, decorators and docstring included."""
    source = path.read_text()
    name = path.relative_to(SOURCE).as_posix()
    found = {name: len(source.splitlines())}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            found[f"{name}:{node.name}"] = node.end_lineno - first + 1
    return found


@pytest.fixture(scope="module")
def all_sizes() -> dict[str, int]:
    return {place: lines for path in FILES for place, lines in sizes(path).items()}


def test_lengths(all_sizes):
    long = {
        place: lines
        for place, lines in all_sizes.items()
        if lines > (LONGEST_FUNCTION if ":" in place else LONGEST_FILE) and place not in ALLOWED
    }
    assert not long, "cut them, or list them in ALLOWED with a reason"


def test_what_is_allowed_is_still_there(all_sizes):
    assert ALLOWED.keys() <= all_sizes.keys()


def test_lengths_are_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(f"{__name__}.SOURCE", tmp_path)
    (tmp_path / "a.py").write_text("import x\n\n\n@x.y\ndef f():\n    '''Doc.'''\n    return 1\n")
    assert sizes(tmp_path / "a.py") == {"a.py": 7, "a.py:f": 4}


def test_every_module_has_a_noun():
    vague = {"utils", "util", "common", "helpers", "helper", "misc"}
    assert not [path for path in FILES if vague & {path.stem, path.parent.name}]
