"""What a batch that does not fit the memory raises, and what is done before the next."""

import gc
from typing import Final

import torch

_SAID: Final = ("out of memory", "can't allocate memory", "not enough memory")


def lacks_memory(error: BaseException) -> bool:
    """Return whether an error says that there is too little memory."""
    said = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(word in said for word in _SAID)


def collect_memory() -> None:
    """Give back what nothing refers to; to be called outside the error's handler, which holds its tensors."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
