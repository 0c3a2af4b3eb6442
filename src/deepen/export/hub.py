"""A finished model on the Hugging Face hub."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from deepen.blocks import BLOCKS_NAME, open_pack, pack_files
from deepen.checkpoint import Checkpoint, is_repository, push_files
from deepen.errors import CheckpointError, OutputError
from deepen.expansion import MANIFEST_NAME, open_base, read_expansion
from deepen.export.whole import model_place

# What a model is made of; nothing that could run code, no optimiser state, no logs.
_WANTED: Final = (
    *("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", MANIFEST_NAME),
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.jinja"),
    *("preprocessor_config.json", "processor_config.json", "vocabulary.json"),
    *("README.md", "LICENSE*", "NOTICE*", "USE_POLICY*"),
)
_CARD: Final = "README.md"


@dataclass(frozen=True, kw_only=True)
class Upload:
    """What would be pushed.

    Attributes:
        repo_id: where to.
        directory: the checkpoint or pack it comes from.
        files: file -> bytes; the card stands among them where the directory has none.
    """

    repo_id: str
    directory: str
    files: dict[str, int]

    @property
    def bytes(self) -> int:
        """Bytes in all."""
        return sum(self.files.values())


def plan_upload(target: str | Path, repo_id: str) -> Upload:
    """Look at what would be pushed; nothing leaves the machine.

    Args:
        target: a checkpoint, a block pack, or the directory of a finished run, whose model is meant.
        repo_id: where to: `someone/llama-law`.

    Raises:
        DeepenError: there is no such model, it is malformed, or `repo_id` is no hub id.
    """
    place = model_place(Path(target))
    files = _files(place, repo_id)
    sizes = {name: f.stat().st_size if isinstance(f, Path) else len(f) for name, f in sorted(files.items())}
    return Upload(repo_id=repo_id, directory=str(place), files=sizes)


def push_checkpoint(
    target: str | Path, repo_id: str, *, private: bool = False, token: str | None = None
) -> str:
    """Push a model to the hub in one commit; see `plan_upload` for the arguments.

    Args:
        target: as there.
        repo_id: as there.
        private: create the repository as a private one.
        token: the hub's; default: that of `hf auth login`.

    Returns:
        The address of the repository.

    Raises:
        DeepenError: as there, or the hub does not take it.
    """
    files = _files(model_place(Path(target)), repo_id)
    return push_files(files, repo_id, message="Model", private=private, token=token)


def _files(directory: Path, repo_id: str) -> dict[str, Path | str]:
    """Return what of a pack or checkpoint is pushed, with a card if it has none of its own.

    Raises:
        DeepenError: it is no whole checkpoint or pack, or `repo_id` is no hub id.
    """
    if not is_repository(repo_id):
        raise OutputError(f"{repo_id or '(nothing)'}: is not a hub id; write for example someone/llama-law")
    if (directory / BLOCKS_NAME).is_file():
        pack = open_pack(directory)
        pack.check_names()
        return pack_files(pack, repo_id)
    checkpoint = open_base(directory).checkpoint
    if not checkpoint.config.get("architectures"):
        raise CheckpointError(f"{directory}/config.json: names no architectures to load it as")
    files: dict[str, Path | str] = {
        path.name: path
        for path in sorted(directory.iterdir())
        if path.is_file() and any(path.match(pattern) for pattern in _WANTED)
    }
    return {_CARD: _card(checkpoint, repo_id)} | files


def _card(checkpoint: Checkpoint, repo_id: str) -> str:
    """Return a short model card for a checkpoint without one: a run writes a better one."""
    front = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["deepen"]}
    about = "An ordinary checkpoint; no custom code."
    if (checkpoint.directory / MANIFEST_NAME).is_file():
        expansion = read_expansion(checkpoint.directory)
        front["tags"] = ["deepen", "block-expansion", "llama-pro"]
        if is_repository(expansion.base) and not Path(expansion.base).exists():
            front |= {"base_model": expansion.base, "base_model_relation": "finetune"}
        about = (
            f"{len(expansion.new_blocks)} new transformer blocks stand on an unchanged base of "
            f"{expansion.base_blocks} ([LLaMA Pro](https://arxiv.org/abs/2401.02415)). It loads as any other "
            f"checkpoint does, without custom code.\n\n    {expansion.layout.draw()}"
        )
    head = "\n".join(f"{key}: {json.dumps(value)}" for key, value in front.items())
    return f"---\n{head}\n---\n\n# {repo_id.split('/')[1]}\n\n{about}\n"
