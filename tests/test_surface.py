"""What users hold on to: public names and commands. `make snapshots` accepts a change."""

import inspect
import sys
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from pkgutil import iter_modules

import pytest
from pydantic import BaseModel

import deepen

ROOT = Path(__file__).parents[1]
SNAPSHOTS = Path(__file__).parent / "snapshots"
ROOMS = sorted(module.name for module in iter_modules(deepen.__path__) if module.name != "__main__")


def load_generate():
    """Import docs/generate.py, which is no part of a package, with what lies beside it."""
    sys.path.append(str(ROOT / "docs"))
    spec = spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_call(name: str) -> str:
    """A public name as it is called, without types: `f(base, *, blocks=)`."""
    value = getattr(deepen, name)
    if isinstance(value, type) and issubclass(value, BaseModel | Exception):
        return name
    parameters = [
        parameter.replace(
            annotation=parameter.empty,
            default=parameter.empty if parameter.default is parameter.empty else ...,
        )
        for parameter in inspect.signature(value).parameters.values()
    ]
    return name + str(inspect.Signature(parameters)).replace("=Ellipsis", "=")


def write_names() -> str:
    return "".join(write_call(name) + "\n" for name in sorted(deepen.__all__))


def write_cli() -> str:
    """Every command, and below it its arguments and options in the order of the help."""
    generate = load_generate()
    lines = []
    for name, command in generate.commands():
        options = [*generate.records(command, "argument"), *generate.records(command, "option")]
        lines += [name, *(f"  {written}" for written, _ in options)]
    return "\n".join(lines) + "\n"


SURFACES = {"names.txt": write_names, "cli.txt": write_cli}


@pytest.mark.parametrize("file", SURFACES)
def test_snapshot(file):
    assert SURFACES[file]() == (SNAPSHOTS / file).read_text(), "if this is meant: make snapshots"


def public_objects():
    for room in ROOMS:
        module = import_module(f"deepen.{room}")
        for name in getattr(module, "__all__", []):
            value = getattr(module, name)
            if isinstance(value, type) or inspect.isfunction(value):
                yield f"{room}.{name}", value
    for name in deepen.__all__:
        yield name, getattr(deepen, name)


def test_every_public_name_has_a_docstring():
    bare = [
        name
        for name, value in public_objects()
        # Its own: a class otherwise shows the docstring of its parent.
        if not (vars(value).get("__doc__") if isinstance(value, type) else value.__doc__)
    ]
    assert not bare


def test_every_command_and_option_has_help():
    generate = load_generate()
    for name, command in generate.commands():
        assert command.help, name
        said = [*generate.records(command, "argument"), *generate.records(command, "option")]
        assert not [written for written, help in said if not help.removesuffix("[required]").strip()], name


def test_names_are_listed():
    assert dir(deepen) == deepen.__all__
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = deepen.nothing


if __name__ == "__main__":
    for file, write in SURFACES.items():
        (SNAPSHOTS / file).write_text(write())
