"""Servers need no export: a merged checkpoint is an ordinary one. What is checked, and what to type."""

from dataclasses import dataclass
from pathlib import Path

from deepen.errors import CheckpointError
from deepen.expansion import open_base


@dataclass(frozen=True, kw_only=True)
class Serving:
    """How a checkpoint is served.

    Attributes:
        directory: the checkpoint.
        architecture: the class servers load it as.
        blocks: number of blocks.
        commands: server -> what to type.
    """

    directory: str
    architecture: str
    blocks: int
    commands: dict[str, str]


def check_serving(directory: str | Path) -> Serving:
    """Check that a checkpoint is one that servers load as it is: every tensor accounted for, no custom code.

    Raises:
        CheckpointError: it is not; says what a server would stumble over.
        FamilyError: its family is unknown.
    """
    directory = Path(directory)
    opened = open_base(directory)
    config = opened.checkpoint.config
    if config.get("auto_map"):
        raise CheckpointError(f"{directory}/config.json: auto_map asks servers to run code; remove the key")
    named = config.get("architectures")
    if not (isinstance(named, list) and named and isinstance(named[0], str)):
        raise CheckpointError(f"{directory}/config.json: names no architectures; servers need one")
    if not any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise CheckpointError(f"{directory}: has no tokenizer files; copy them from the base")
    place = directory.resolve()
    return Serving(
        directory=str(directory),
        architecture=named[0],
        blocks=opened.depth,
        commands={
            "vLLM": f"vllm serve {place}",
            "TGI": f"text-generation-launcher --model-id {place}",
            "SGLang": f"python -m sglang.launch_server --model-path {place}",
        },
    )
