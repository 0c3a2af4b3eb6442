import difflib
import inspect
import re
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from deepen.config.recipe import Recipe
from deepen.errors import RecipeError


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 2e9 as a string; this reads it as the number it is. Duplicate keys are refused."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key.value!r} stands twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:float"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:[0-9][0-9_]*)?(?:\.[0-9_]*)?(?:(?<=[0-9.])[eE][-+]?[0-9]+)?$(?<=[0-9.])(?<![-+]\.)"
    ),
    list("-+0123456789."),
)


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file.

    Args:
        path: YAML file.
        overrides: `section.key=value` settings that win over the file; values are YAML.

    Raises:
        RecipeError: the file is missing or not YAML, or the recipe has faults; all are named.
    """
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read ({error})") from None
    return parse_recipe(text, overrides, str(path))


def parse_recipe(text: str, overrides: Sequence[str] = (), where: str = "recipe") -> Recipe:
    """Read a recipe from YAML text; see `load_recipe`."""
    raw = _yaml(text, where)
    if not isinstance(raw, dict):
        raise RecipeError(f"{where}: holds {type(raw).__name__}, not keys such as base, output, data, train")
    for override in overrides:
        _override(raw, override)
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        faults = [
            _fault(fault["loc"], fault["type"], fault["msg"], fault["input"]) for fault in error.errors()
        ]
        raise RecipeError("\n".join(f"{where}: {fault}" for fault in dict.fromkeys(faults))) from None


def dump_recipe(recipe: Recipe) -> str:
    """Return the resolved, complete recipe as YAML that `parse_recipe` reads back to an equal one."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise RecipeError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise RecipeError(f"{where}: not valid YAML: nested too deeply") from None


def _override(raw: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key.strip():
        raise RecipeError(f"--set {override}: not of the form section.key=value")
    *sections, last = key.strip().split(".")
    at: Any = raw
    for section in sections:
        at = _step(at, section, override)
    if isinstance(at, list):
        at[_position(at, last, override)] = _yaml(value, f"--set {override}")
    elif isinstance(at, dict):
        at[last] = _yaml(value, f"--set {override}")
    else:
        raise RecipeError(f"--set {override}: {'.'.join(sections)} is a value, not a section")


def _step(at: Any, section: str, override: str) -> Any:
    if isinstance(at, list):
        return at[_position(at, section, override)]
    if not isinstance(at, dict):
        raise RecipeError(f"--set {override}: there is no section {section} to set a key in")
    if at.get(section) is None:
        at[section] = {}
    return at[section]


def _position(at: list[Any], number: str, override: str) -> int:
    if not number.isdecimal() or int(number) >= len(at):
        raise RecipeError(f"--set {override}: {number} is not a position in a list of {len(at)}")
    return int(number)


def _fault(loc: tuple[int | str, ...], kind: str, message: str, value: Any) -> str:
    where = ".".join(map(str, loc)) or "recipe"
    if kind == "extra_forbidden":
        return f"{where}: unknown key{_nearest(loc)}"
    if kind == "missing":
        return f"{where}: missing"
    if kind == "value_error":
        return f"{where}: {message.removeprefix('Value error, ')}"
    shown = repr(value) if len(repr(value)) <= 60 else repr(value)[:57] + "…"
    return f"{where}: {message[0].lower()}{message[1:]}, found {shown}"


def _nearest(loc: tuple[int | str, ...]) -> str:
    model: Any = Recipe
    for part in loc[:-1]:
        if isinstance(part, str):
            model = _section(model.model_fields[part].annotation)
    known = list(model.model_fields)
    close = difflib.get_close_matches(str(loc[-1]), known, n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else f" (known: {', '.join(known)})"


def _section(annotation: Any) -> type[BaseModel]:
    """Find the section class inside `Section | None`, `tuple[Section, ...]` and the like."""
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        return annotation
    for argument in typing.get_args(annotation):
        try:
            return _section(argument)
        except LookupError:
            continue
    raise LookupError
