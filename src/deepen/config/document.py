"""YAML as recipes use it: 2e9 is a number, and no key stands twice."""

import re
from typing import Any

import yaml

from deepen.errors import RecipeError

_FLOAT = "tag:yaml.org,2002:float"
# YAML 1.1 reads 2e9 as a string. Here every decimal number with a point or an exponent is one, nothing else.
_NUMBER = re.compile(r"[-+]?(?:[0-9][0-9_]*(?:\.[0-9_]*)?|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?")
# What PyYAML's constructors let through for tagged or impossible values, as 2024-13-45.
_ILL_FORMED = (yaml.YAMLError, ValueError, TypeError, AttributeError, KeyError, OverflowError)
# What PyYAML says of the mistakes that are made most, and what to do.
_REMEDIES = {
    r"character '\t'": "indent with spaces, not tabs",
    "alias": "text that begins with * stands in quotes",
    "'%'": "text that begins with % stands in quotes",
}


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key.value!r} stands twice", key.start_mark
                )
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else id(key))
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes the strings that `_Loader` would take for numbers."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _side in (_Loader, _Dumper):
    _side.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != _FLOAT]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    _side.add_implicit_resolver(_FLOAT, re.compile(f"^(?:{_NUMBER.pattern})$"), list("-+0123456789."))


def read_yaml(text: str, where: str) -> Any:
    """Parse YAML text.

    Raises:
        RecipeError: it is not YAML, or a key stands twice.
    """
    try:
        return yaml.load(text, _Loader)
    except _ILL_FORMED as error:
        raise RecipeError(f"{where}: not valid YAML: {_reason(error)}") from None
    except RecursionError:
        raise RecipeError(f"{where}: not valid YAML: nested too deeply") from None


def _reason(error: Exception) -> str:
    """Say in one line where the reader stopped, why, and what to do if that is known."""
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem is None:
        return " ".join(str(error).split())[:200]
    said = f"{error.context} {error.problem}"
    remedy = next((f"; {remedy}" for sign, remedy in _REMEDIES.items() if sign in said), "")
    mark = error.problem_mark
    return f"{f'line {mark.line + 1}: ' if mark else ''}{error.problem}{remedy}"


def write_yaml(content: Any) -> str:
    """Return plain data as YAML text that `read_yaml` reads back to equal data."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
