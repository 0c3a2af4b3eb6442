"""What is evaluated: a run, a block pack, an expanded or plain checkpoint, an adapter; and its base."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from deepen.blocks import BLOCKS_NAME, open_pack
from deepen.checkpoint import Checkpoint, fast_fingerprint, resolve_base
from deepen.config import Recipe, load_recipe
from deepen.errors import CheckpointError, DeepenError
from deepen.expansion import MANIFEST_NAME, read_expansion
from deepen.model import load
from deepen.records import read_result

_ADAPTER = "adapter_config.json"


@dataclass(frozen=True, kw_only=True)
class Side:
    """A model that is not loaded yet.

    Attributes:
        name: name or path, as results call it.
        digest: of its tensors.
        tokenizer: directory its tokenizer lies in.
        load: loads it onto a device, in the precision of its files.
        merge: how an ordinary checkpoint is made of it; None where `tokenizer` is the directory of one.
    """

    name: str
    digest: str
    tokenizer: Path
    load: Callable[[torch.device], Any]
    merge: str | None = None


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model to evaluate and its base.

    Attributes:
        model: the model.
        base: name of its base; None where there is none to compare with.
        apart: the base as a model of its own; None where the model is its base but for its new blocks.
    """

    model: Side
    base: str | None
    apart: Side | None


def open_run_recipe(directory: Path) -> Recipe | None:
    """Return the recipe of a finished run; None for a directory that is no run.

    Raises:
        DataError: the run is not finished.
    """
    if not (directory / "recipe.yaml").is_file():
        return None
    read_result(directory)
    return load_recipe(directory / "recipe.yaml")


def find_subject(target: str, base: str | None = None) -> Subject:
    """Look at what `target` is; loads nothing.

    Args:
        target: a run, a block pack, an adapter, or a checkpoint (a directory or a hub id).
        base: the base to compare with. A run, a pack and an expanded checkpoint know theirs; another place of
            it may be given.

    Raises:
        DeepenError: there is no such thing, or its base is not where it says.
    """
    path = Path(target)
    if path.is_dir() and (recipe := open_run_recipe(path)):
        output = path / read_result(path).outputs[0]
        return find_subject(str(output), base or recipe.base)
    if (path / BLOCKS_NAME).is_file():
        return _of_pack(path, base)
    if (path / _ADAPTER).is_file():
        return _of_adapter(path, base)
    return _of_checkpoint(target, base)


def take_apart(subject: Subject) -> Subject:
    """Return the subject with its base as a model of its own, for those who switch no new blocks off.

    Raises:
        CheckpointError: the base is not where the model says.
    """
    if subject.base is None or subject.apart is not None or subject.model.merge is not None:
        return subject
    where = _base_directory(subject.base, Path(subject.model.name))
    return replace(subject, apart=_plain(subject.base, where))


def pack_directory(pack: str) -> str:
    """Return where a pack lies: of a run, what it saved; anything else is returned as it is.

    Raises:
        DataError: the run is not finished.
    """
    path = Path(pack)
    if path.is_dir() and open_run_recipe(path):
        return str(path / read_result(path).outputs[0])
    return pack


def _of_pack(pack: Path, base: str | None) -> Subject:
    opened = open_pack(pack)
    where = _base_directory(base or opened.expansion.base, pack)
    digest = hashlib.sha256(opened.expansion.base_fingerprint.fast.encode() + _file_digest(opened.shard.path))
    model = Side(
        name=str(pack),
        digest=digest.hexdigest(),
        tokenizer=where,
        load=lambda device: load(where, pack, device=device),
        merge=f"deepen blocks merge {base or opened.expansion.base} {pack} OUT",
    )
    return Subject(model=model, base=base or opened.expansion.base, apart=None)


def _of_adapter(adapter: Path, base: str | None) -> Subject:
    """Of an adapter on new blocks these lie beside it, in `blocks/`."""
    from peft import PeftConfig

    named = base or str(PeftConfig.from_pretrained(str(adapter)).base_model_name_or_path)
    apart = _plain(named, _base_directory(named, adapter))
    files, beneath = sorted(adapter.glob("adapter_*")), adapter.parent / "blocks"
    if (beneath / BLOCKS_NAME).is_file():
        files.append(beneath / BLOCKS_NAME)
    digest = hashlib.sha256(apart.digest.encode() + b"".join(map(_file_digest, files))).hexdigest()

    def load_adapted(device: torch.device) -> Any:
        from peft import PeftModel

        pack = beneath if beneath / BLOCKS_NAME in files else None
        return PeftModel.from_pretrained(load(apart.tokenizer, pack, device=device), str(adapter)).eval()

    model = Side(
        name=str(adapter),
        digest=digest,
        tokenizer=apart.tokenizer,
        load=load_adapted,
        merge="in Python, with peft: merge_and_unload() and save_pretrained()",
    )
    return Subject(model=model, base=named, apart=apart)


def _of_checkpoint(target: str, base: str | None) -> Subject:
    where = resolve_base(target)
    model = _plain(target, where)
    if (where / MANIFEST_NAME).is_file() and base is None:
        return Subject(model=model, base=read_expansion(where).base, apart=None)
    return Subject(model=model, base=base, apart=_plain(base, resolve_base(base)) if base else None)


def _plain(name: str, where: Path) -> Side:
    return Side(
        name=name,
        digest=fast_fingerprint(Checkpoint.open(where)),
        tokenizer=where,
        load=lambda device: load(where, device=device),
    )


def _base_directory(base: str, of: Path) -> Path:
    try:
        return resolve_base(base)
    except DeepenError as error:
        raise CheckpointError(f"{of}: its base {error}\nsay where it is: --base DIR") from None


def _file_digest(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def subject_digest(subject: Subject) -> str:
    """Return the digest of the model and its base."""
    base = subject.apart.digest if subject.apart else subject.base is not None
    return hashlib.sha256(json.dumps([subject.model.digest, base]).encode()).hexdigest()


def task_identity(subject: Subject, asked: str, label: str) -> str:
    """Return the digest of all that a task's result depends on: the model, the base, and what is asked."""
    content = json.dumps([subject_digest(subject), asked, label, version("lm_eval")])
    return hashlib.sha256(content.encode()).hexdigest()
