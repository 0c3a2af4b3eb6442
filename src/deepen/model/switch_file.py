"""A fitted switch on disk: `switch.json`, and for a classifier `switch.safetensors` beside it."""

import hashlib
from pathlib import Path
from typing import Final

from safetensors import SafetensorError
from safetensors.torch import load_file

from deepen.blocks import BLOCKS_NAME, open_pack
from deepen.checkpoint import atomic_directory, write_file
from deepen.errors import DataError, SwitchError
from deepen.model.classifier import Classifier
from deepen.model.decision import Decider, Likelihood, Switch
from deepen.model.tensors import save_tensors
from deepen.records import SwitchPack, SwitchRecord, read_record

SWITCH_NAME: Final = "switch.json"
_WEIGHTS_NAME: Final = "switch.safetensors"


def read_switch(directory: Path) -> tuple[Switch, SwitchRecord]:
    """Read a switch and its record.

    Raises:
        SwitchError: there is none, or a file of it is malformed.
    """
    try:
        record = read_record(directory / SWITCH_NAME, SwitchRecord)
    except DataError as error:
        raise SwitchError(f"{error}\nmake a switch with deepen blocks switch, or say auto") from None
    names = tuple(pack.name for pack in record.packs)
    decider: Decider = Likelihood()
    if record.kind == "classifier":
        decider = _read_classifier(directory / _WEIGHTS_NAME, names)
    made = Switch(
        decider=decider,
        threshold=record.threshold,
        prompt_tokens=record.prompt_tokens,
        fingerprint=record.fingerprint,
    )
    return made, record


def write_switch(directory: Path, switch: Switch, record: SwitchRecord, *, overwrite: bool = False) -> None:
    """Write a switch whole or not at all.

    Raises:
        OutputError: the directory exists, or cannot be written.
    """
    with atomic_directory(directory, overwrite=overwrite) as staged:
        if isinstance(switch.decider, Classifier):
            tensors = {"weight": switch.decider.weight, "bias": switch.decider.bias}
            save_tensors(staged / _WEIGHTS_NAME, tensors)
        write_file(staged / SWITCH_NAME, record.model_dump_json(indent=1) + "\n")


def pack_digest(pack: str | Path) -> str:
    """Return the SHA-256 of a pack's `blocks.safetensors`."""
    with (open_pack(pack).directory / BLOCKS_NAME).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def recorded_packs(directory: Path, record: SwitchRecord, pack: str | Path | None) -> dict[str, str | Path]:
    """Return name -> place of the packs that a switch decides on, each of the bytes it was made for.

    Args:
        directory: of the switch.
        record: its record.
        pack: where the only one lies now; None: they lie where the record says.

    Raises:
        SwitchError: a pack is not the one that is recorded.
        PackError: there is no pack.
    """
    if pack is not None and len(record.packs) > 1:
        raise SwitchError(
            f"{directory}: decides on {', '.join(each.name for each in record.packs)}; "
            "load the base without a pack, and they are attached"
        )
    places = {each.name: _place(directory, each) if pack is None else pack for each in record.packs}
    for each in record.packs:
        if pack_digest(places[each.name]) != each.digest:
            raise SwitchError(
                f"{directory}: was made for another {each.name} than {places[each.name]}; fit it anew"
            )
    return places


def _place(directory: Path, pack: SwitchPack) -> str | Path:
    beside = directory / pack.path
    return beside.resolve() if beside.exists() else pack.path


def _read_classifier(path: Path, packs: tuple[str, ...]) -> Classifier:
    try:
        held = load_file(path)
        weight, bias = held["weight"], held["bias"]
    except (OSError, SafetensorError, KeyError) as error:
        raise SwitchError(f"{path}: cannot be read as a classifier's weights ({error})") from None
    classes = 1 + len(packs)
    if weight.ndim != 2 or len(weight) != classes or bias.shape != (classes,):
        raise SwitchError(
            f"{path}: weight is {list(weight.shape)} and bias {list(bias.shape)}; "
            f"the packs of {SWITCH_NAME} need {classes} rows"
        )
    return Classifier(packs=packs, weight=weight.float(), bias=bias.float())
