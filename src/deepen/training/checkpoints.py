"""Training checkpoints: `checkpoints/step-N/`, complete or absent, no pickle.

Each holds only what trains (fp32), the optimiser's state, the random state and the step; `manifest.json` is
written last and names every file with its size and digest, so a damaged checkpoint is recognised. Several
processes leave the same files as one: sharded tensors are put together, and one process writes.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file
from torch import nn

from deepen.checkpoint import atomic_directory, write_file
from deepen.errors import OutputError, TrainingError
from deepen.model.tensors import save_tensors
from deepen.training.optimizer import optimizer_tensors, restore_optimizer
from deepen.training.parallel import placed_like, share, whole
from deepen.training.world import World

FORMAT_VERSION: Final = 1
_RANDOM: Final = "random/"


@dataclass(frozen=True)
class SavedStep:
    """A valid checkpoint on disk."""

    step: int
    directory: Path


def save_checkpoint(
    root: Path,
    step: int,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    *,
    identity: Mapping[str, Any],
    keep: int,
    world: World | None = None,
) -> Path:
    """Write `root/step-N` and keep it and those before it, `keep` in all.

    Later ones are of no use: a run goes on from an earlier step only where they are damaged.

    Args:
        root: the run's `checkpoints` directory.
        step: optimiser steps done.
        parameters: what trains, by name.
        optimizer: its optimiser.
        identity: settings that a resumed run must share, checked by `restore_checkpoint`.
        keep: checkpoints to keep.
        world: the processes of the run, each of which calls this; the first one writes.

    Raises:
        OutputError: the disk refuses it; the checkpoints before are as they were.
    """
    world = world or World()
    trained = whole(parameters, world)
    moments = whole(optimizer_tensors(optimizer, parameters), world)
    return world.first(lambda: _write(root, step, trained, moments | _random_state(), identity, keep))


def _write(
    root: Path,
    step: int,
    trained: Mapping[str, torch.Tensor],
    state: Mapping[str, torch.Tensor],
    identity: Mapping[str, Any],
    keep: int,
) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    target = root / f"step-{step}"
    head = {"format_version": FORMAT_VERSION, "step": step, "identity": dict(identity)}
    try:
        with atomic_directory(target, overwrite=True) as staged:
            save_tensors(staged / "trainable.safetensors", trained)
            save_tensors(staged / "optimizer.safetensors", state)
            files = {file.name: _description(file) for file in sorted(staged.iterdir())}
            write_file(staged / "manifest.json", json.dumps(head | {"files": files}, indent=1) + "\n")
    except OutputError as error:
        reason = str(error).rpartition(": ")[2]  # the file it names is the temporary directory's
        raise OutputError(
            f"{target}: cannot be written: {reason}; the checkpoints before it are intact\n"
            "make room, then continue with --resume"
        ) from None
    found = _by_step(root)
    kept = [saved for saved in found if saved.step <= step][:keep]
    for saved in found:
        if saved not in kept:
            shutil.rmtree(saved.directory)
    return target


def newest_checkpoint(root: Path) -> tuple[SavedStep | None, list[str]]:
    """Return the newest valid checkpoint, and a line about each damaged one passed over."""
    damaged = []
    for saved in _by_step(root):
        if fault := _fault(saved.directory):
            damaged.append(f"{saved.directory}: {fault}; skipped")
        else:
            return saved, damaged
    return None, damaged


def restore_checkpoint(
    saved: SavedStep,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    *,
    identity: Mapping[str, Any],
    world: World | None = None,
) -> None:
    """Put parameters, optimiser and random state back as they were, over however many processes there are.

    The first process reads; the random state is its own.

    Raises:
        TrainingError: the checkpoint belongs to a run with other settings or other trainable parameters.
    """
    world = world or World()
    tensors, moments = world.first_only(lambda: _read(saved, parameters, identity)) or ({}, {})
    if world.is_first:
        _restore_random({k: moments.pop(k) for k in list(moments) if k.startswith(_RANDOM)})
    device = next(iter(parameters.values())).device
    with torch.no_grad():
        for name, tensor in share(tensors, world, device):
            parameters[name].copy_(placed_like(tensor, parameters[name]))
    restore_optimizer(optimizer, parameters, share(moments, world, device))


def _read(
    saved: SavedStep, parameters: Mapping[str, nn.Parameter], identity: Mapping[str, Any]
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    recorded = json.loads((saved.directory / "manifest.json").read_text())["identity"]
    for key, value in identity.items():
        if recorded.get(key) != value:
            raise TrainingError(
                f"{saved.directory}: was made with {key} {recorded.get(key)!r}, the run has {value!r}\n"
                "resume with the recipe it was started with, or start anew with --overwrite"
            )
    tensors = load_file(saved.directory / "trainable.safetensors")
    if tensors.keys() != parameters.keys():
        odd = min(tensors.keys() ^ parameters.keys())
        raise TrainingError(f"{saved.directory}: its trainable parameters are not this run's (first: {odd})")
    return tensors, load_file(saved.directory / "optimizer.safetensors")


def _by_step(root: Path) -> list[SavedStep]:
    found = []
    for directory in root.glob("step-*"):
        number = directory.name.removeprefix("step-")
        if number.isdecimal():
            found.append(SavedStep(int(number), directory))
    return sorted(found, key=lambda saved: saved.step, reverse=True)


def _fault(directory: Path) -> str | None:
    try:
        manifest = json.loads((directory / "manifest.json").read_text())
        if manifest["format_version"] != FORMAT_VERSION:
            return f"format_version {manifest['format_version']!r}, this deepen reads {FORMAT_VERSION}"
        for name, expected in manifest["files"].items():
            if _description(directory / name) != expected:
                return f"{name} is damaged"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"incomplete or unreadable ({error})"
    return None


def _description(file: Path) -> dict[str, int | str]:
    with file.open("rb") as content:
        digest = hashlib.file_digest(content, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    return {"bytes": file.stat().st_size, "blake2b": digest}


def _random_state() -> dict[str, torch.Tensor]:
    states = {_RANDOM + "cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states |= {f"{_RANDOM}cuda:{i}": s for i, s in enumerate(torch.cuda.get_rng_state_all())}
    return states


def _restore_random(states: Mapping[str, torch.Tensor]) -> None:
    torch.set_rng_state(states[_RANDOM + "cpu"])
    for name, state in states.items():
        device = name.removeprefix(_RANDOM)
        if device != "cpu" and torch.cuda.is_available() and int(device[5:]) < torch.cuda.device_count():
            torch.cuda.set_rng_state(state, device)
