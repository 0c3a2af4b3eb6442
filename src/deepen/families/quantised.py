"""Quantised checkpoints: which of them can be expanded, and what in their config names blocks by number.

The zero byte of a float of 8 bits is zero, whatever scale stands beside it. Integers have zero points and
4-bit codes have tables: there a zero byte is some number.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

from deepen.errors import CheckpointError
from deepen.families.family import Family

# compressed-tensors' old files name it differently.
_KEYS: Final = ("quantization_config", "compression_config")
_FLOATS: Final = frozenset({"fp8", "fbgemm_fp8", "mxfp8"})
# How transformers turns the others back, where it can.
_DEQUANTISE: Final = {
    "bitsandbytes": "Load it with transformers, model.dequantize(), save_pretrained(NEW)",
    "compressed-tensors": "from_pretrained(…, quantization_config=CompressedTensorsConfig(dequantize=True)), "
    "save_pretrained(NEW)",
    "mxfp4": "from_pretrained(…, quantization_config=Mxfp4Config(dequantize=True)), save_pretrained(NEW)",
}
# How patterns say "any block", and what may stand before the blocks in names of the text tower.
_ANY_BLOCK: Final = re.compile(r"\(?(\\d[+*]|\[0-9\][+*]|\.[*+])")
_BEFORE_BLOCKS: Final = ("", "model", "language_model", "language_model.model", "model.language_model")


def check_quantised(config: Mapping[str, Any], where: str) -> None:
    """Refuse a checkpoint whose weights are packed.

    Args:
        config: the parsed `config.json`.
        where: the config, for messages.

    Raises:
        CheckpointError: zero bytes of its weights need not mean zero.
    """
    for key, quantisation in _held(config):
        if (method := _quantiser(quantisation)) in _FLOATS or _is_float(method, quantisation):
            continue
        turn_back = f"{_DEQUANTISE[method]}; or use" if method in _DEQUANTISE else "Use"
        raise CheckpointError(
            f"{where}: {key}: packed by {method[:40]}, where zero bytes need not mean zero.\n"
            f"{turn_back} the unquantised model; what you expand can be quantised afterwards"
        )


def renumbered_modules(
    config: Mapping[str, Any], family: Family, depth: int, origins: Sequence[int]
) -> dict[str, Any]:
    """Return what changes in a config whose lists of modules, quantised or not, name blocks by number.

    Args:
        config: the whole `config.json`, or the part of one tower.
        family: says what blocks are called.
        depth: the number of blocks that the config is for.
        origins: for each block of the new model, the block it is or copies.

    Raises:
        CheckpointError: a pattern picks blocks in a way that cannot be carried over.
    """

    def rename(name: str) -> list[str]:
        return _renumbered(name, family, depth, origins)

    return {key: _walk(quantisation, rename) for key, quantisation in _held(config)}


def _held(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    return ((key, config[key]) for key in _KEYS if config.get(key))


def _quantiser(quantisation: Any) -> str:
    held = quantisation if isinstance(quantisation, dict) else {}
    # Old configs of bitsandbytes do not name it.
    usual = "bitsandbytes" if {"load_in_4bit", "load_in_8bit"} & held.keys() else "an unknown method"
    method = held.get("quant_method", usual)
    return " ".join(method.split()) if isinstance(method, str) else usual


def _is_float(method: str, quantisation: Any) -> bool:
    """Whether compressed-tensors holds all its weights as floats of 8 bits, none of them left away."""
    if method != "compressed-tensors":
        return False
    groups, sparsity = (_table(quantisation.get(key)) for key in ("config_groups", "sparsity_config"))
    weights = [_table(_table(group).get("weights")) for group in groups.values()]
    floats = [(each.get("type"), each.get("num_bits")) == ("float", 8) for each in weights]
    return bool(floats) and all(floats) and sparsity.get("format", "dense") == "dense"


def _table(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _walk(value: Any, rename: Callable[[str], list[str]]) -> Any:
    """Rename the strings of every list, and the keys of every table."""
    if isinstance(value, list):
        return [
            new
            for each in value
            for new in (rename(each) if isinstance(each, str) else [_walk(each, rename)])
        ]
    if isinstance(value, Mapping):
        return {new: _walk(each, rename) for key, each in value.items() for new in rename(key)}
    return value


def _renumbered(name: str, family: Family, depth: int, origins: Sequence[int]) -> list[str]:
    """The names that stand in the new model for one name, or pattern, of the old."""
    blocks = re.escape(family.layers.removeprefix(family.prefix))
    found = re.search(rf"(?<!\w){blocks}\\?\.", name)
    before = name[: found.start()].removeprefix("re:").replace("\\", "").strip("^.") if found else ""
    anywhere = family.tower and bool(before) and set(before) <= set(".*+?()")
    if not found or (family.tower and not anywhere and before not in _BEFORE_BLOCKS):
        return [name]
    head, rest = name[: found.end()], name[found.end() :]
    number = re.match(r"[0-9]+(?![0-9])", rest)
    if number and not anywhere:
        old, tail = int(number.group()), rest[number.end() :]
        later = [old - depth + len(origins)] if old >= depth else []
        return [f"{head}{new}{tail}" for new in later or [j for j, o in enumerate(origins) if o == old]]
    if number or (rest.startswith(("[", "(", "\\")) and not _ANY_BLOCK.match(rest)):
        raise CheckpointError(
            f"config.json: quantization_config: {name!r:.80} picks blocks by number; list them by name"
        )
    return [name]
