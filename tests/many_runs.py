"""Run many recipes one after the other in the processes that torchrun started: one start for all of them."""

import sys
from pathlib import Path

import torch

from deepen.config import load_recipe
from deepen.pipeline.run import run_recipe

if __name__ == "__main__":
    torch.set_num_threads(1)
    for argument in sys.argv[1:]:
        run_recipe(load_recipe(Path(argument)), resume=True)
