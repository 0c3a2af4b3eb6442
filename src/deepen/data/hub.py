"""Datasets of the Hugging Face hub, read through the `datasets` library without its progress bars."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from deepen.config import Place, TextSet
from deepen.errors import DataError


def load_hub(text: Place, cache: Path | None) -> Any:
    """Load one split as a `datasets.Dataset`.

    Args:
        text: names the dataset (a hub id, or a local directory of the same form), its subset and split.
        cache: directory of the Arrow copy; default: the library's own.

    Raises:
        DataError: it is not to be had; says what the library said.
    """
    import datasets

    name = str(text.hub)
    with quiet_datasets(), nullcontext() if Path(name).exists() or _answers(name) else _offline():
        try:
            return datasets.load_dataset(
                text.hub,
                text.subset,
                split=text.split,
                revision=text.revision,
                cache_dir=None if cache is None else str(cache),
            )
        except Exception as error:  # the library raises its own, the hub's, and any of a reader's
            raise DataError(_explain(text, error)) from error


def stream_hub(text: TextSet, cache: Path | None) -> tuple[Any, tuple[str, ...]]:
    """Open one split as a `datasets.IterableDataset`, of which nothing is downloaded before it is read.

    Returns:
        The dataset, and its files: paths, or addresses that hold the commit they are of.

    Raises:
        DataError: it is not to be had, or has no files to tell one state of it from another.
    """
    import datasets

    with quiet_datasets():
        try:
            builder = datasets.load_dataset_builder(
                text.hub,
                text.subset,
                revision=text.revision,
                cache_dir=None if cache is None else str(cache),
            )
            files = (builder.config.data_files or {}).get(text.split) or ()
            dataset = builder.as_streaming_dataset(split=text.split)
        except Exception as error:  # the library raises its own, the hub's, and any of a reader's
            raise DataError(_explain(text, error)) from error
    if not files:
        raise DataError(f"{text.hub}, split {text.split}: has no data files to stream; leave out stream")
    return dataset, tuple(map(str, files))


def _answers(name: str) -> bool:
    """Ask the hub once; `datasets` asks for half a minute before it looks into its cache."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        HfApi().dataset_info(name, timeout=10)
    except (HfHubHTTPError, ValueError):
        return True  # it says no, or the name is no name: `datasets` finds the words
    except Exception:  # whatever its network stack raises
        return False
    return True


@contextmanager
def _offline() -> Iterator[None]:
    from huggingface_hub import constants

    held, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = held


@contextmanager
def quiet_datasets() -> Iterator[None]:
    """Switch off the bars of `datasets`, and put them back as they were."""
    import datasets

    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def _explain(text: Place, error: Exception) -> str:
    subset = f" ({text.subset})" if text.subset else ""
    said = str(error).strip().splitlines()
    reason = said[0] if said else type(error).__name__
    if isinstance(error, ConnectionError):
        reason = (
            "the hub cannot be reached and no copy is cached; "
            "download the dataset elsewhere and give its directory as path"
        )
    return f"{text.hub}{subset}, split {text.split}: cannot be loaded: {reason}"
