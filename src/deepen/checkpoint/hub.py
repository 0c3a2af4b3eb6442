"""The Hugging Face hub: a base named by an id, and files pushed to a repository."""

import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from deepen.errors import CheckpointError, OutputError

# Only files that cannot run code, and only the model's own folder.
_WANTED: Final = ("*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "LICENSE*", "NOTICE*")
_HUB_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_REPOSITORY: Final = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def resolve_base(base: str | Path) -> Path:
    """Return the directory of a base; a hub id is downloaded, or found in the hub's cache.

    A directory of that name wins. `HF_HUB_OFFLINE=1` keeps the hub's client from the network.

    Args:
        base: a directory or a hub id such as `meta-llama/Llama-2-7b-hf`.

    Raises:
        CheckpointError: it is neither, or the hub does not give it.
    """
    if str(base) and os.path.isdir(base):
        return Path(base)
    if isinstance(base, Path) or not _HUB_ID.fullmatch(base) or os.path.lexists(base):
        raise CheckpointError(
            f"{base or '(nothing)'}: no such directory; give a checkpoint's directory or a hub id"
        )
    return _download(base)


def resolve_config(base: str | Path) -> Path:
    """Return where the config of a base is: its directory, a `config.json`, or the hub's, downloaded alone.

    Raises:
        CheckpointError: it is none of these, or the hub does not give it.
    """
    if str(base).endswith(".json") and os.path.isfile(base):
        return Path(base)
    if os.path.isdir(base) or not isinstance(base, str) or not _HUB_ID.fullmatch(base):
        return resolve_base(base)
    return _download(base, config_only=True)


def _download(name: str, *, config_only: bool = False) -> Path:
    from huggingface_hub import hf_hub_download, snapshot_download

    try:
        if config_only:
            return Path(hf_hub_download(name, "config.json"))
        return Path(snapshot_download(name, allow_patterns=list(_WANTED), ignore_patterns=["*/*"]))
    except Exception as error:  # the hub's client lets through whatever its network stack raises
        raise CheckpointError(
            f"{name}: no such directory, and not from the hub ({_refusal(error)}).\n"
            "Check the spelling, log in for gated models, or download it elsewhere and give its directory"
        ) from None


# What the hub's client raises, the most special first.
_REFUSALS: Final = {
    "GatedRepoError": "gated: ask for access on its page there, then `hf auth login`",
    "RepositoryNotFoundError": "there is none of that name, or it is private",
    "OfflineModeIsEnabled": "HF_HUB_OFFLINE is set, and its cache does not hold it",
}


def _refusal(error: Exception) -> str:
    """Say why the hub gave nothing. That it could not be asked is the cause of what its client raises."""
    cause = error.__cause__ or error
    kinds = {kind.__name__ for each in (error, cause) for kind in type(each).__mro__}
    for name, reason in _REFUSALS.items():
        if name in kinds:
            return reason
    told = cause if "LocalEntryNotFoundError" in kinds else error
    text = " ".join(str(told).split())
    return f"{type(told).__name__}: {text[:100] + '…' if len(text) > 100 else text}"


def is_repository(name: str) -> bool:
    """Return whether a name has the form of a repository on the hub, `someone/something`."""
    return bool(_REPOSITORY.fullmatch(name))


def push_files(
    files: Mapping[str, Path | str],
    repo_id: str,
    *,
    message: str,
    private: bool = False,
    token: str | None = None,
) -> str:
    """Push files to a repository of the hub in one commit; it is created if it is not there.

    Args:
        files: name in the repository -> a file, or text.
        repo_id: where to: `someone/law-blocks`.
        message: of the commit.
        private: create it as a private one.
        token: the hub's; default: that of `hf auth login`.

    Returns:
        The address of the repository.

    Raises:
        OutputError: it has no such name, or the hub does not take it.
    """
    from huggingface_hub import HfApi

    if not is_repository(repo_id):
        raise OutputError(f"{repo_id or '(nothing)'}: is not a hub id; write for example someone/law-blocks")
    with tempfile.TemporaryDirectory() as staged:
        for name, content in files.items():
            if isinstance(content, Path):
                (Path(staged) / name).symlink_to(content.resolve())
            else:
                (Path(staged) / name).write_text(content, "utf-8")
        try:
            api = HfApi(token=token)
            url = api.create_repo(repo_id, private=private, exist_ok=True)
            api.upload_folder(repo_id=repo_id, folder_path=staged, commit_message=message)
        except Exception as error:  # as above
            raise OutputError(
                f"{repo_id}: the hub does not take it ({type(error).__name__}: "
                f"{' '.join(str(error).split())[:100]}…).\n"
                "Check the name, and log in with `hf auth login` or give a token with the right to write"
            ) from None
    return str(url)
