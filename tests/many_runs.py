"""What `test_distributed` starts by torchrun: many recipes, one start of the processes for all of them."""

import sys
from pathlib import Path

import torch

from deepen.cli import main
from deepen.config import load_recipe
from deepen.pipeline.run import run_recipe

if __name__ == "__main__":
    torch.set_num_threads(1)
    for argument in sys.argv[1:]:
        run_recipe(load_recipe(Path(argument)), resume=True)
    none = Path(sys.argv[1]).with_name("none")
    sys.exit(main(["run", sys.argv[1], "--set", "train.device=cuda:7", "--set", f"output={none}"]))
