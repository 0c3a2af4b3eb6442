"""A pack on the Hugging Face hub, named by an id like an adapter: fetched, and pushed with a model card."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Final

from deepen.checkpoint import is_repository, push_files
from deepen.errors import OutputError, PackError

if TYPE_CHECKING:
    from deepen.blocks.pack import Pack

CARD_NAME: Final = "README.md"
# The two files of a pack, and what is said about it: nothing that could run code.
_WANTED: Final = ("blocks.safetensors", "expansion.json", CARD_NAME, "LICENSE*")


def resolve_pack(pack: str | Path) -> Path:
    """Return the directory of a pack; a hub id is downloaded, or found in the hub's cache.

    A directory of that name wins. Only the pack's own files are fetched. `HF_HUB_OFFLINE=1` keeps the hub's
    client from the network.

    Args:
        pack: a directory or a hub id such as `someone/law-blocks`.

    Raises:
        PackError: it is neither, or the hub does not give it.
    """
    if str(pack) and os.path.isdir(pack):
        return Path(pack)
    if is_hub_id(pack):
        return _download(str(pack))
    found = "is not a directory" if str(pack) and os.path.lexists(pack) else "no such directory"
    raise PackError(f"{pack or '(nothing)'}: {found}, so not a block pack; give its directory or a hub id")


def is_hub_id(pack: str | Path) -> bool:
    """Return whether a pack is named by a hub id: nothing of that name is on this disk."""
    return isinstance(pack, str) and is_repository(pack) and not os.path.lexists(pack)


def push_pack(directory: str | Path, repo_id: str, *, private: bool = False, token: str | None = None) -> str:
    """Push a pack to the hub, in one commit, with a model card if it has none of its own.

    Args:
        directory: the pack.
        repo_id: where to: `someone/law-blocks`; created if it is not there.
        private: create it as a private one.
        token: the hub's; default: that of `hf auth login`.

    Returns:
        The address of the repository.

    Raises:
        PackError: it is no pack, or its tensors are not those of its new blocks.
        OutputError: the hub does not take it.
    """
    from deepen.blocks.pack import open_pack

    if not is_repository(repo_id):
        raise OutputError(f"{repo_id or '(nothing)'}: is not a hub id; write for example someone/law-blocks")
    pack = open_pack(Path(directory))
    pack.check_names()
    message = f"Blocks for {pack.expansion.base}"
    return push_files(pack_files(pack, repo_id), repo_id, message=message, private=private, token=token)


def write_card(pack: "Pack", repo_id: str) -> str:
    """Return a short model card: what it is, of which base, how to use it from where it is pushed to."""
    expansion = pack.expansion
    # A path may have the form of a hub id.
    known = is_repository(expansion.base) and not os.path.exists(expansion.base)
    base = expansion.base if known else None
    front = ["library_name: deepen", "tags:", "- deepen", "- block-expansion", "- llama-pro"]
    if base:
        front = [f"base_model: {base}", "base_model_relation: adapter", *front]
    named = base or "BASE"
    blocks = len(expansion.latest_blocks)
    return "\n".join(
        [
            "---",
            *front,
            "---",
            "",
            f"# Block pack for {base or f'a {expansion.family} of {expansion.base_blocks} blocks'}",
            "",
            f"{blocks} new transformer blocks ({pack.parameters:,} parameters, {', '.join(pack.dtypes)}) "
            "that stand on a base whose own weights are unchanged ([LLaMA Pro](https://arxiv.org/abs/2401.02415)).",
            "",
            f"    {expansion.layout.draw()}",
            "",
            "`■` is a block of the base, `□4` the new block at index 4. The base is recognised by the "
            f"fingerprint `{expansion.base_fingerprint.fast[:16]}…`; another one is refused.",
            "",
            "```",
            f"deepen blocks attach {named} {repo_id}        # does it fit?",
            f"deepen blocks merge {named} {repo_id} OUT     # an ordinary checkpoint",
            "```",
            "",
            "```python",
            "import deepen",
            f'model = deepen.load("{named}", "{repo_id}")',
            "```",
            "",
        ]
    )


def pack_files(pack: "Pack", repo_id: str) -> dict[str, Path | str]:
    """Return what of a pack's directory is pushed, with a card if it has none of its own."""
    files: dict[str, Path | str] = {
        path.name: path
        for path in sorted(pack.directory.iterdir())
        if any(path.match(pattern) for pattern in _WANTED) and path.is_file()
    }
    return {CARD_NAME: write_card(pack, repo_id)} | files


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(_WANTED), ignore_patterns=["*/*"]))
    except Exception as error:  # as above
        raise PackError(
            f"{name}: no such directory, and not from the hub ({_said(error)}).\n"
            "Check the spelling, log in for private packs, or download it elsewhere and give its directory"
        ) from None


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:100]}…"
