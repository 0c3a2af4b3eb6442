"""Whatever holds a trained model, as one ordinary checkpoint."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from deepen.blocks import BLOCKS_NAME, merge_pack, open_pack
from deepen.checkpoint import CONFIG, resolve_base
from deepen.errors import CheckpointError, DeepenError
from deepen.expansion import Progress
from deepen.records import read_result

_ADAPTER = "adapter_config.json"


@contextmanager
def whole_checkpoint(
    target: str, base: str | None, scratch: Path, progress: Progress | None = None
) -> Iterator[Path]:
    """Give the directory of a checkpoint that holds everything of a model.

    Args:
        target: a checkpoint (a directory or a hub id), a block pack, or the directory of a finished run.
        base: where a pack's base is; default: where the pack says.
        scratch: directory on whose disk a pack and its base are merged, for as long as they are needed.
        progress: called with (bytes done, bytes in all) while merging.

    Raises:
        DeepenError: there is no such model, or it is an adapter, which peft must merge.
    """
    place = model_place(Path(target))
    if (place / _ADAPTER).is_file():
        raise CheckpointError(
            f"{place}: is an adapter, not a whole model; merge it first with peft's merge_and_unload"
        )
    if not (place / BLOCKS_NAME).is_file():
        yield resolve_base(str(place))
        return
    with tempfile.TemporaryDirectory(dir=scratch, prefix=".merge-") as directory:
        merged = Path(directory) / "model"
        merge_pack(_base_of(place, base), place, merged, progress=progress)
        yield merged


def model_place(target: Path) -> Path:
    """Return where a model is: of a finished run the checkpoint it wrote, or else what it saved.

    Raises:
        DataError: the run's result cannot be read.
    """
    if not (target / "result.json").is_file():
        return target
    outputs = [target / output for output in read_result(target).outputs]
    return next((output for output in outputs if (output / CONFIG).is_file()), outputs[0])


def _base_of(pack: Path, base: str | None) -> Path:
    try:
        return resolve_base(base or open_pack(pack).expansion.base)
    except DeepenError as error:
        raise CheckpointError(f"{pack}: its base {error}\nsay where it is: --base DIR") from None
