"""What torchrun says of this process; no torch is needed to read it."""

import os
from typing import Final

_SAID: Final = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def launched() -> bool:
    """Return whether torchrun, or something that says as much as torchrun, started this process."""
    return all(name in os.environ for name in _SAID)


def launch_rank() -> int:
    """Return the number of this process among those started together; 0 where it is alone."""
    return int(os.environ["RANK"]) if launched() else 0
