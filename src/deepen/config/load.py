import copy
import difflib
import inspect
import reprlib
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from deepen.config.document import read_yaml, write_yaml
from deepen.config.recipe import Recipe
from deepen.config.section import Section
from deepen.errors import RecipeError

_WORDS = {
    "model_type": "input should be a section (keys and values)",
    "tuple_type": "input should be a list",
    "too_short": "should not be empty",
    "int_type": "input should be a whole number, such as 4096 or 2e9",
    "int_parsing": "input should be a whole number, such as 4096 or 2e9",
}
_SHOWN = reprlib.Repr()
_SHOWN.maxstring = _SHOWN.maxother = _SHOWN.maxlong = 60
_SHOWN.maxlevel, _SHOWN.maxlist, _SHOWN.maxdict = 2, 3, 3


_S = TypeVar("_S", bound=BaseModel)


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file.

    Args:
        path: YAML file, in UTF-8.
        overrides: `section.key=value` settings that win over the file; values are YAML.

    Raises:
        RecipeError: the file is missing or not YAML, or the recipe has faults; all are named.
    """
    return load_document(path, Recipe, overrides)


def load_document(path: Path, kind: type[_S], overrides: Sequence[str] = ()) -> _S:
    """Read a YAML file as one of the models of this room; see `load_recipe`."""
    try:
        text = path.read_text("utf-8")
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read ({error.strerror}); give a recipe, a YAML file") from None
    except UnicodeDecodeError as error:
        raise RecipeError(
            f"{path}: not UTF-8: byte {error.start} is 0x{error.object[error.start]:02x}"
        ) from None
    return _parse(text, kind, overrides, str(path))


def parse_recipe(text: str, overrides: Sequence[str] = (), where: str = "recipe") -> Recipe:
    """Read a recipe from YAML text; see `load_recipe`."""
    return _parse(text, Recipe, overrides, where)


def build_recipe(raw: Mapping[str, Any], where: str) -> Recipe:
    """Make a recipe of plain data, as YAML would hold it.

    Raises:
        RecipeError: it has faults; all are named.
    """
    return _validate(raw, Recipe, [], where)


def _parse(text: str, kind: type[_S], overrides: Sequence[str], where: str) -> _S:
    raw = read_yaml(text, where)
    if not isinstance(raw, dict):
        held = "nothing" if raw is None else type(raw).__name__
        keys = ", ".join([*kind.model_fields][:4])
        raise RecipeError(f"{where}: holds {held}, not keys such as {keys}")
    faults = [fault for override in overrides if (fault := _override(raw, override))]
    return _validate(raw, kind, faults, where)


def _validate(raw: Mapping[str, Any], kind: type[_S], faults: list[str], where: str) -> _S:
    try:
        document = kind.model_validate(raw)
    except ValidationError as error:
        faults += [f"{where}: {_fault(fault, kind)}" for fault in error.errors(include_url=False)]
    if faults:
        raise RecipeError("\n".join(dict.fromkeys(faults)))
    return document


def make_section(kind: type[_S], values: Mapping[str, Any], where: str) -> _S:
    """Make one section of a recipe from values that did not come from a file.

    Raises:
        RecipeError: its faults, each after `where`.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        faults = (f"{where}{_fault(fault, kind)}" for fault in error.errors(include_url=False))
        raise RecipeError("\n".join(faults)) from None


def dump_recipe(recipe: Section) -> str:
    """Return the resolved, complete recipe as YAML that reads back to an equal one."""
    return write_yaml(recipe.model_dump(mode="json"))


def _override(raw: dict[str, Any], override: str) -> str | None:
    """Apply one setting; return what is wrong with it, if anything."""
    key, equals, value = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        return f"--set {override}: not of the form section.key=value"
    try:
        _put(raw, parts, read_yaml(value, f"--set {override}"))
    except RecipeError as error:
        return str(error)
    except LookupError as error:
        return f"--set {override}: {error.args[0]}"
    return None


def _put(raw: dict[str, Any], parts: Sequence[str], value: Any) -> None:
    at: Any = raw
    for depth, part in enumerate(parts):
        place: Any = _place(at, part, parts[:depth])
        if depth == len(parts) - 1:
            at[place] = value
            return
        held = at[place] if isinstance(at, list) else at.get(place)
        # A copy: two sections may be aliases of one.
        at[place] = {} if held is None else copy.copy(held)
        at = at[place]


def _place(at: Any, part: str, above: Sequence[str]) -> int | str:
    if isinstance(at, dict):
        return part
    if not isinstance(at, list):
        raise LookupError(f"{'.'.join(above)} is a value, not a section")
    if not part.isdecimal() or int(part) >= len(at):
        raise LookupError(f"{part} is not a position in a list of {len(at)}")
    return int(part)


def _fault(error: ErrorDetails, document: type[BaseModel]) -> str:
    """Say one of pydantic's errors in the words of YAML."""
    kind, message = error["type"], error["msg"]
    where = ".".join(map(str, error["loc"])) or "recipe"
    if kind == "extra_forbidden":
        return f"{where}: unknown key{_nearest(error['loc'], document)}"
    if kind == "missing":
        return f"{where}: missing"
    if kind == "value_error":
        return f"{where}: {message.removeprefix('Value error, ')}"
    message = _WORDS.get(kind, message[0].lower() + message[1:])
    return f"{where}: {message}, found {_SHOWN.repr(error['input'])}"


def _nearest(loc: tuple[int | str, ...], document: type[BaseModel]) -> str:
    model: Any = document
    for part in loc[:-1]:
        if part in model.model_fields:  # else a position in a list, or a name that the user gives
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
