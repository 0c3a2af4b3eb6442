"""What runs a model that is evaluated: transformers all of it, or vLLM what is generated."""

from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any, Protocol

import torch

from deepen.errors import EvaluationError
from deepen.evaluation.generation import Generator
from deepen.pipeline.subject import Side, Subject, take_apart

NAMES = ("transformers", "vllm")


class Backend(Protocol):
    """One way to run a model.

    Attributes:
        label: as records and identities name it; empty for transformers.
        rows: of a batch where no size is asked for; None: found by what fits.
    """

    label: str
    rows: int | None

    def takes(self, kinds: Set[str]) -> bool:
        """Return whether it can answer a task of such requests of the harness."""

    def load(self, side: Side, device: torch.device) -> Generator:
        """Load a model, or say why it cannot be."""

    def release(self) -> None:
        """Free the memory of what was loaded and is of no more use."""


class _Transformers:
    label = ""
    rows: int | None = None

    def takes(self, kinds: Set[str]) -> bool:
        return True

    def load(self, side: Side, device: torch.device) -> Generator:
        loaded: Generator = side.load(device)
        return loaded

    def release(self) -> None:
        """Nothing is held here."""


class _Vllm:
    # It chooses the size of its batches itself.
    rows: int | None = 4096

    def __init__(self, options: Mapping[str, Any]) -> None:
        from deepen.evaluation.vllm_model import VllmEngines

        self._engines = VllmEngines(options)
        self.label = f"vllm {self._engines.version}"

    def takes(self, kinds: Set[str]) -> bool:
        return kinds == {"generate_until"}

    def load(self, side: Side, device: torch.device) -> Generator:
        from deepen.evaluation.vllm_model import VllmModel

        return VllmModel(_ordinary(side), self._engines)

    def release(self) -> None:
        self._engines.release()


TRANSFORMERS: Backend = _Transformers()


def name_backend(backend: Backend) -> dict[str, str]:
    """Return what a record's provenance says of it: nothing of transformers."""
    return {"backend": backend.label} if backend.label else {}


def find_backends(name: str, options: Mapping[str, Any], subject: Subject) -> tuple[list[Backend], Subject]:
    """Return who may run the models, the preferred one first, and the subject as they can run it.

    Args:
        name: `transformers` or `vllm`.
        options: of vLLM's engine.
        subject: what is evaluated; vLLM needs its base as a checkpoint of its own.

    Raises:
        EvaluationError: there is no such backend, it is not installed, or it cannot load the subject.
        CheckpointError: the base is not where it is said to be.
    """
    if name not in NAMES:
        raise EvaluationError(f"backend {name}: there is none such; choose from {', '.join(NAMES)}")
    if name == "transformers":
        if options:
            raise EvaluationError(f"{', '.join(options)}: an option of vLLM; give --backend vllm too")
        return [TRANSFORMERS], subject
    found = take_apart(subject)
    for side in (found.model, found.apart):
        if side is not None:
            _ordinary(side)
    return [_Vllm(options), TRANSFORMERS], found


def _ordinary(side: Side) -> Path:
    """Return the directory of a checkpoint that stands by itself."""
    if side.merge is not None:
        raise EvaluationError(
            f"{side.name}: vLLM loads ordinary checkpoints only; write one, and evaluate that:\n{side.merge}"
        )
    return side.tokenizer
