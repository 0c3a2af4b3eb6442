"""What `test_distributed` starts: many recipes, one after the other, by two processes that say they are two.

They are forked from one that has imported everything, which costs a third of what torchrun's start does; like
torchrun it keeps the store they meet in. The last thing they are asked is what cannot be.
"""

import os
import socket
import sys
import traceback
from pathlib import Path

import peft  # noqa: F401
import torch
from conftest import without_curves
from torch.distributed import TCPStore

from deepen.cli import main
from deepen.config import load_recipe
from deepen.pipeline.run import run_recipe

SIZE = 2


def run_all(rank, port, recipes):
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(SIZE),
        "LOCAL_WORLD_SIZE": str(SIZE),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }
    with without_curves():
        for recipe in recipes:
            run_recipe(load_recipe(Path(recipe)), resume=True)
    none = Path(recipes[0]).with_name("none")
    return main(["run", recipes[0], "--set", "train.device=cuda:7", "--set", f"output={none}"])


def free_port():
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def fork(rank, port, recipes):
    child = os.fork()
    if child == 0:
        try:
            os._exit(run_all(rank, port, recipes))
        except SystemExit as end:
            os._exit(end.code)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return child


if __name__ == "__main__":
    torch.set_num_threads(1)
    port = free_port()
    children = [fork(rank, port, sys.argv[1:]) for rank in range(SIZE)]
    store = TCPStore("localhost", port, is_master=True, wait_for_workers=False)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    sys.exit(max(map(abs, codes)))
