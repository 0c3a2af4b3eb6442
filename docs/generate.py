"""Write the pages that say what the code says, recipe.md, cli.md and families.md, and the tables of results.

    python docs/generate.py

Their words stand in the code: the docstrings under a recipe's fields, the help of a command, a family's file.
The results stand in the records of studies/records.
`tests/test_docs.py` fails where a page is not what this script would write.
"""

import json
import types
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from study_results import figures, filled_pages

from deepen import cli
from deepen.config.recipe import Recipe
from deepen.families import Family, family_for, load_families, load_refusals, load_towers

DOCS = Path(__file__).parent
ROOT = DOCS.parent
RECORDS = ROOT / "studies" / "records"
_BEGIN, _END = "<!-- results, by docs/generate.py -->\n\n", "<!-- end of results -->\n"
_NOTE = "<!-- Written by docs/generate.py from {source}; do not edit. -->\n\n"


def pages() -> dict[str, str]:
    """Return page -> content."""
    return {
        "recipe.md": _NOTE.format(source="src/deepen/config/recipe.py") + recipe_page(),
        "cli.md": _NOTE.format(source="src/deepen/cli/") + cli_page(),
        "families.md": _NOTE.format(source="src/deepen/families/*.toml") + families_page(),
        "conversations.md": _with_results(DOCS / "conversations.md", _record_table("stories260k-alpaca")),
        **filled_pages(DOCS, RECORDS),
    }


def readme() -> str:
    """Return the README with its results as they stand in the records."""
    return _with_results(ROOT / "README.md", results())


def _with_results(page: Path, text: str) -> str:
    before, _, rest = page.read_text().partition(_BEGIN)
    return before + _BEGIN + text + _END + rest.partition(_END)[2]


def commands() -> Iterator[tuple[str, Any]]:
    """Yield (full name, command) of every command that does something, in the order of the help."""
    yield from _leaves("deepen", typer.main.get_command(cli._root))


def records(command: Any, kind: Literal["argument", "option"]) -> list[tuple[str, str]]:
    """Return (how it is written, its help) of a command's arguments or options."""
    context = command.make_context(command.name, [], resilient_parsing=True)
    found = (p.get_help_record(context) for p in command.params if p.param_type_name == kind)
    return [record for record in found if record]


def _leaves(name: str, command: Any) -> Iterator[tuple[str, Any]]:
    if not hasattr(command, "list_commands"):
        yield name, command
        return
    context = command.make_context(name, [], resilient_parsing=True)
    for child in command.list_commands(context):
        yield from _leaves(f"{name} {child}", command.get_command(context, child))


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return (
        "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)
        + "\n"
    )


# --- the README's results


_STUDIES = {
    "demo": "The embedded base (1.35 M parameters, trained on docstrings) learns Python code: `make demo`.",
    "stories260k-gsm8k": "A real pretrained Llama (stories260k, TinyStories) learns GSM8K word problems: "
    "`examples/stories260k-gsm8k.yaml` and its control.",
}


def results() -> str:
    """Return a table a record: held-out loss on general and domain text, base and runs."""
    tables = "".join(f"{title}\n\n{_record_table(name)}" for name, title in _STUDIES.items())
    return tables + _expand_result() + _train_result()


def _expand_result() -> str:
    records = sorted((ROOT / "benchmarks" / "records").glob("expand-*.json"))
    shapes = {name: held for path in records for name, held in json.loads(path.read_text())["shapes"].items()}
    head = ["`deepen expand`, base of", "of `cp` and sync", "of `cp` alone", "memory", *_PEERS.values()]
    rows = []
    for shape in shapes.values():
        rows.append(
            [
                f"{shape['base_bytes'] / 1e9:.1f} GB",
                f"{shape['ratio']:.2f}×",
                f"{shape['ratio_to_unsynced_cp']:.2f}×",
                f"{shape['peak_megabytes']['expand']:.0f} MB",
                *(_peer(shape, name) for name in _PEERS),
            ]
        )
    return (
        "Time of an expansion against a copy of its output. deepen brings what it writes to the disk, `cp`\n"
        "alone leaves it in memory. The other tools write the same tensors, in so many times our time:\n\n"
        f"{_table(head, rows)}<sub>`make bench`; records: benchmarks/records.</sub>\n\n"
    )


def _train_result() -> str:
    record = json.loads((ROOT / "benchmarks" / "records" / "train.json").read_text())
    rows = [
        [name, f"{figure['tokens_per_second']:,.0f}", f"{1e3 * figure['seconds_low']:.0f} ms"]
        for name, figure in record["figures"].items()
    ]
    hardware, packages = record["provenance"]["hardware"], record["provenance"]["packages"]
    where = f"{hardware['processor']}, {hardware['cores']} cores; torch {packages['torch']}"
    return (
        "Training steps on one model (8 blocks of width 256, 2 new ones, 1,024 tokens a step, fp32) and the\n"
        "same batches, in turns. On a GPU: not measured.\n\n"
        f"{_table(['', 'tokens/s, median', 'fastest step'], rows)}"
        f"<sub>{where}; `benchmarks/train.py`, record: benchmarks/records/train.json.</sub>\n\n"
    )


_PEERS = {"mergekit": "mergekit", "llama_factory": "LLaMA-Factory"}


def _peer(shape: dict[str, Any], name: str) -> str:
    if name not in shape["times_as_fast_as"]:
        return "not measured"
    return f"{shape['times_as_fast_as'][name]:.1f}×, {shape['peak_megabytes'][name]:,.0f} MB"


def _record_table(name: str) -> str:
    return _results_table(json.loads((RECORDS / f"{name}.json").read_text()))


def _results_table(record: dict[str, Any]) -> str:
    comparison = record["comparison"]
    columns = comparison["columns"]
    kept = {"general": "to be kept", "domain": "to be learned"}
    head = ["", *(f"{column['name']}, {kept[column['role']]}" for column in columns), "trained", "tokens"]
    rows = []
    for row in comparison["rows"]:
        trained = f"{row['trainable'] / 1e6:.2f} M" if row["trainable"] else ""
        tokens = f"{row['tokens'] / 1e6:.2f} M" if row["tokens"] else ""
        rows.append([row["label"], *map(_result, row["cells"]), trained, tokens])
    run = next(iter(record["runs"].values()))
    hardware, packages = run["provenance"]["hardware"], run["provenance"]["packages"]
    where = f"{hardware['processor']}, {hardware['cores']} cores; torch {packages['torch']}"
    return _table(head, rows) + f"<sub>{where}; record: studies/records.</sub>\n\n"


def _result(cell: dict[str, Any]) -> str:
    change = cell["from_base"]
    if change is None:
        return f"{cell['value']:.3f}"
    return f"{cell['value']:.3f} ({change['ci_low']:+.3f} to {change['ci_high']:+.3f})"


# --- cli.md


_CLI = """\
# Commands

Every command answers `--help`. With `--json` it prints one JSON object on stdout and nothing else there;
progress, warnings and errors go to stderr.

| exit code | meaning |
| --- | --- |
| 0 | done |
| 1 | a bug of ours: a traceback |
| 2 | the input is at fault: a message says what, where and what to do; nothing half-written is left |
| 3 | a check that ran and said no, for example `deepen verify` |
| 130 | stopped by SIGINT or SIGTERM; training saves a checkpoint first |

"""


def cli_page() -> str:
    """Return the page of commands."""
    return _CLI + "".join(_command(name, command) for name, command in commands()).rstrip() + "\n"


def _command(name: str, command: Any) -> str:
    arguments, options = records(command, "argument"), records(command, "option")
    written = " ".join([name, *(said.split(" <")[0].upper() for said, _ in arguments), "[options]"])
    text = f"## `{name}`\n\n{_joined(command.help)}\n\n```text\n{written}\n```\n\n"
    if arguments:
        rows = [[f"`{said.split(' <')[0].upper()}`", _plain(help)] for said, help in arguments]
        text += _table(["argument", "meaning"], rows)
    return text + _table(["option", "meaning"], [[f"`{said}`", _plain(help)] for said, help in options])


def _plain(help: str) -> str:
    return _joined(help.removesuffix("[required]"))


def _joined(text: str | None) -> str:
    return " ".join((text or "").split())


# --- recipe.md


_RECIPE = """\
# Recipe

A recipe is a YAML file; `deepen run RECIPE` carries it out and writes it, complete with every default, to
`recipe.yaml` in the run directory. `--set section.key=value` overrides a key. An unknown key, a wrong type or
a value out of range is an error before any work, and all faults are reported together. Paths are relative to
the directory the command runs in. Numbers may be written as `2e9`.

```yaml
base: meta-llama/Llama-2-7b-hf
output: runs/code
expand: {blocks: 8}
data:
  sequence_length: 4096
  heldout: 0.005
  sources:
    - {name: code, path: "data/python/*.jsonl", weight: 1.5}
    - {name: math, path: "data/math/*.parquet"}
train: {tokens: 2e9, batch_tokens: 1e6, learning_rate: 2e-4}
evaluate:
  general:
    - {path: data/general.txt}
```

Some rules bind several keys: a text has either `path` or `hub`, and at most one of `field` and `template`;
`expand` has `blocks` or `after`, is required by method `blocks` and not allowed with `full`;
`train.batch_tokens` is at least one window of `data.sequence_length`.

"""


def recipe_page() -> str:
    """Return the page of recipe keys, section by section."""
    shown: dict[type[BaseModel], str] = {}
    text = _RECIPE
    for place, model in _sections("", Recipe):
        if (first := shown.setdefault(model, place)) == place:
            text += _section(place, model)
        else:
            text += f"## `{place}`\n\nAs [`{first}`](#{_anchor(first)}).\n\n"
    return text.rstrip() + "\n"


def _sections(place: str, model: type[BaseModel]) -> Iterator[tuple[str, type[BaseModel]]]:
    yield place, model
    for name, field in model.model_fields.items():
        if inner := _section_in(field.annotation):
            yield from _sections(f"{place}.{name}".lstrip("."), inner)


def _section_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in get_args(annotation) if (found := _section_in(part))), None)


def _section(place: str, model: type[BaseModel]) -> str:
    rows = [
        [f"`{name}`", _value(field), _default(field), _meaning(name, field, place)]
        for name, field in model.model_fields.items()
    ]
    title = f"## `{place}`" if place else "## The recipe"
    return f"{title}\n\n{_joined(model.__doc__)}\n\n" + _table(["key", "value", "default", "meaning"], rows)


def _meaning(name: str, field: FieldInfo, place: str) -> str:
    if inner := _section_in(field.annotation):
        anchor = _anchor(f"{place}.{name}")
        words = field.description or _joined(inner.__doc__)
        return f"{_joined(words)} See [below](#{anchor})."
    return _joined(field.description)


def _anchor(place: str) -> str:
    return place.replace(".", "")


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    default = field.default
    if default is None or default == () or isinstance(default, BaseModel):
        return "–"
    words = {True: "true", False: "false"}
    plain = (
        words[default]
        if isinstance(default, bool)
        else list(default)
        if isinstance(default, tuple)
        else default
    )
    return f"`{plain}`"


def _value(field: FieldInfo) -> str:
    limits = dict([*_limits(field.metadata), *_inner_limits(field.annotation)])
    return ", ".join([_kind(field.annotation), *(f"{sign} {number}" for sign, number in limits.items())])


def _kind(annotation: Any) -> str:
    """Return the type in words."""
    plain = {int: "whole number", float: "number", str: "text", bool: "true or false"}
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation in plain:
        return plain[annotation]
    if origin is Annotated:
        return _kind(arguments[0])
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(_kind(part) for part in arguments if part is not type(None))
    if origin is tuple:
        return (
            f"list of {_kind(arguments[0])}s"
            if arguments[-1] is ...
            else f"{len(arguments)} {_kind(arguments[0])}s"
        )
    return "section"


def _inner_limits(annotation: Any) -> Iterator[tuple[str, Any]]:
    if get_origin(annotation) is Annotated:
        yield from _limits(annotation.__metadata__)
    for part in get_args(annotation):
        if part is not ... and get_origin(annotation) is not tuple:
            yield from _inner_limits(part)


def _limits(metadata: Any) -> Iterator[tuple[str, Any]]:
    """Yield (sign, number); where a sign comes twice the last, which is the narrower, counts."""
    signs = {annotated_types.Ge: ("≥", "ge"), annotated_types.Gt: (">", "gt")}
    signs |= {annotated_types.Le: ("≤", "le"), annotated_types.Lt: ("<", "lt")}
    for entry in metadata:
        if isinstance(entry, FieldInfo):
            yield from _limits(entry.metadata)
        elif type(entry) in signs:
            sign, attribute = signs[type(entry)]
            yield sign, getattr(entry, attribute)


# --- families.md


_FAMILIES = """\
# Families

What deepen knows of a model family is one small file; there is no code per family. A checkpoint whose
`model_type` stands in no file, or that holds a tensor its family does not name, is refused, not guessed at.

A *residual write* is a parameter whose value below makes a sub-layer add nothing to the residual stream. New
blocks are copies of base blocks with exactly these filled (see [Concepts](concepts.md)); `*` is a number.
Where it is known to be as exact, something else may be filled: [`expand.zero`](drift.md#what-of-it-is-zero).
Where the config says what kind each block is, or transformers derives it from the block's number, expansion
writes it out: every base block keeps its kind, and a new block has that of the block it copies.
*GGUF* is llama.cpp's name of the architecture where deepen writes such files itself, see [Export](export.md).

"""

_TOWERS = """\
## Models of several towers

Of these the text tower is expanded, where it is one of the families above; the other towers stay as they are.
Which one it is stands in the text config.

"""

_REFUSED = """\
## Refused

These are known and refused, because new blocks could not be exact.

"""


def families_page() -> str:
    """Return the page of families."""
    own = "of each block's own kind in the config"
    head = ["family", "`model_type`", "residual writes", "or `zero`", own, "GGUF"]
    families = _table(head, [_family(family) for family in load_families()])
    refused = _table(["in `config.json`", "why"], list(_refusals()))
    head = ["`model_type`", "family where the text config does not say", "the text config"]
    towers = _table(head, list(_towers()))
    return _FAMILIES + families + _TOWERS + towers + _REFUSED + refused.rstrip() + "\n"


def _family(family: Family) -> list[str]:
    fills: dict[float, list[str]] = {}
    for name, value in family.residual_writes.items():
        if not name.endswith("bias"):
            fills.setdefault(value, []).append(name.removesuffix(".weight"))
    biased = any(name.endswith("bias") for name in family.residual_writes)
    writes = "; ".join(f"{_names(names)} = {value:g}" for value, names in fills.items())
    keys = _names(family.per_layer.keys) if family.per_layer.keys else ""
    gguf = f"`{family.gguf.architecture}`" if family.gguf else ""
    writes += ", with biases" if biased else ""
    return [family.name, _names(family.model_types), writes, _names(family.instead), keys, gguf]


def _towers() -> Iterator[list[str]]:
    for model_type, tower in load_towers().items():
        place = "`text_config`" + (", or beside the model's own values" if tower.get("flat") else "")
        yield [f"`{model_type}`", family_for({"model_type": tower["text"]}).name, place]


def _refusals() -> Iterator[list[str]]:
    known = load_refusals()
    for key, why in known["keys"].items():
        yield [f"`{key}`", why]
    for family in load_families():
        for refusal in family.refusals:
            yield [f"{family.name}: `{refusal.key}: {json.dumps(refusal.value)}`", refusal.why]
    reasons: dict[str, list[str]] = {}
    for model_type, why in known["model_types"].items():
        reasons.setdefault(why, []).append(model_type)
    for why, model_types in reasons.items():
        yield [f"`model_type`: {_names(tuple(model_types))}", why]


def _names(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


if __name__ == "__main__":
    for page, content in pages().items():
        (DOCS / page).write_text(content)
    for name, drawing in figures(RECORDS).items():
        (DOCS / "images" / name).write_text(drawing)
    (ROOT / "README.md").write_text(readme())
