"""Who can answer: a model and its base, found on disk and loaded, the base as the same network if it can."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from deepen.blocks import BLOCKS_NAME
from deepen.dialogue.network import Network, find_template
from deepen.errors import ChatError
from deepen.model import Switch, activate, attach, attached, load, read_switch, recorded_packs
from deepen.model.state import find_state
from deepen.pipeline.evaluate import choose_device
from deepen.pipeline.subject import Subject, find_subject, pack_directory
from deepen.pipeline.texts import load_tokenizer


@dataclass(frozen=True, kw_only=True)
class Cast:
    """A model and its base, ready to answer.

    Attributes:
        name: of the model, as it was given.
        base_name: of its base; None where none is known.
        model: the model.
        base: its base: the same network, of which no pack is on, or one of its own; None: not asked for.
        packs: the model's packs that are on at first, from the bottom.
        notes: what to know before talking, a line each.
        switch: decides for each question which of the packs answers; None: all that are on do.
    """

    name: str
    base_name: str | None
    model: Network
    base: Network | None
    packs: tuple[str, ...]
    notes: tuple[str, ...]
    switch: Switch | None = None


def load_cast(
    target: str,
    *,
    base: str | None = None,
    packs: Sequence[str] = (),
    switch: str | None = None,
    template: str | None = None,
    compare: bool = False,
    device: str = "auto",
) -> Cast:
    """Load a model, put packs on it, and find its base.

    Args:
        target: a run, a block pack, an adapter, or a checkpoint (a directory or a hub id).
        base: its base, where it does not say it or it has moved.
        packs: block packs, or runs that made one, to put on it as well; all are on at first.
        switch: `auto`, or the directory of a switch, which brings its packs.
        template: name of a chat template, or a path that ends in .jinja; default: the tokenizer's own.
        compare: with its base, which is loaded too where it is a model of its own.
        device: `auto`, `cpu`, `cuda` …

    Raises:
        ChatError: there is no base to compare with.
        DeepenError: one of them cannot be found or read, or a pack belongs to another base.
    """
    subject, place = find_subject(target, base), choose_device(device)
    if compare and not (subject.base or packs or switch):
        raise ChatError(f"{target}: has no base to compare with; give --base, or --pack and it is one itself")
    tokenizer = load_tokenizer(subject.model.tokenizer)
    chosen = find_template(tokenizer, template)  # what is wrong with it is said before the model loads
    named, deciding = _packs_and_switch(target, packs, switch)
    model = _load_model(target, subject, place)
    _attach_all(model, named)
    if deciding is not None:
        _check_switch(model, deciding)
    network = Network(model, tokenizer, chosen)
    beside = _base_network(subject, network, template, place) if compare else None
    return Cast(
        name=target,
        base_name=subject.base or (target if named else None),
        model=network,
        base=beside,
        packs=network.active,
        notes=_notes(network),
        switch=deciding,
    )


def _packs_and_switch(
    target: str, packs: Sequence[str], switch: str | None
) -> tuple[list[tuple[str, str | Path]], Switch | None]:
    """Return the names and places of the packs to attach, and what decides between them."""
    own = (target,) if _is_pack(target) else ()
    if switch is None or switch == "auto":
        named = [(_name(pack), pack_directory(pack)) for pack in (*own, *packs)]
        return [*named], Switch() if switch else None
    if packs:
        raise ChatError(f"--pack: the switch {switch} brings its own packs; leave --pack out")
    made, record = read_switch(Path(switch))
    places = recorded_packs(Path(switch), record, pack_directory(target) if own else None)
    return [*places.items()], made


def _check_switch(model: Any, switch: Switch) -> None:
    """Refuse a switch that could decide nothing."""
    if not isinstance(model, PreTrainedModel):
        raise ChatError("an adapter has no packs to switch")
    switch.candidates(model)


def _load_model(target: str, subject: Subject, place: torch.device) -> Any:
    """Load what packs are put on: of a pack its base, so that it is attached as the others are."""
    return load(subject.model.tokenizer, device=place) if _is_pack(target) else subject.model.load(place)


def _is_pack(target: str) -> bool:
    return (Path(pack_directory(target)) / BLOCKS_NAME).is_file()


def _base_network(subject: Subject, model: Network, template: str | None, place: torch.device) -> Network:
    side = subject.apart
    if side is None:
        return model
    tokenizer = load_tokenizer(side.tokenizer)
    # A base that was never tuned to talk is asked as the model is.
    return Network(side.load(place), tokenizer, find_template(tokenizer, template) or model.template)


def _attach_all(model: Any, packs: Sequence[tuple[str, str | Path]]) -> None:
    """Put packs on a model, all on at once, above those it came with."""
    if not packs:
        return
    if not isinstance(model, PreTrainedModel):
        raise ChatError("an adapter cannot carry block packs; give --pack with a checkpoint or a pack")
    state = find_state(model)
    before = state.active if state else ()
    for name, place in packs:
        attach(model, place, name)
    new = [name for name, _ in packs]
    held = attached(model)
    activate(model, *(name for name in (*before, *new) if name in held))


def _name(pack: str) -> str:
    """Name a pack by its directory, and that of a run, which is always called `blocks`, by the run's."""
    path = Path(pack).resolve() if Path(pack).exists() else Path(pack)
    return path.parent.name if path.name == "blocks" else path.name


def _notes(network: Network) -> tuple[str, ...]:
    if network.template is not None:
        return ()
    return (
        "the tokenizer has no chat template: each text is continued on its own, without those before it; "
        "choose a template with --template",
    )
