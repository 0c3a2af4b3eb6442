"""Compute a study's cells on a Ray cluster, one GPU for each share, then write its table.

    python examples/ray_study.py baselines study.yaml --shares 8

Every machine has deepen installed, and sees the study's recipe, its texts and its output at the same paths.
What is finished is never computed again: after a failure, call it again.
"""

import argparse
import subprocess

import ray


@ray.remote(num_gpus=1, max_retries=2)
def compute(study: str, recipe: str, share: str) -> None:
    """Compute one share of the cells that can be computed now."""
    subprocess.run(["deepen", "study", study, recipe, "--cell", share], check=True)


def main() -> None:
    """Compute all shares twice, then what is left."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("study", choices=["baselines", "ablation", "knowledge", "continual"])
    parser.add_argument("recipe")
    parser.add_argument("--shares", type=int, default=8, help="how many cells are computed at once")
    args = parser.parse_args()

    for _ in range(2):  # what others wait for (grids of learning rates, trained blocks), then what waited
        shares = [f"{number}/{args.shares}" for number in range(1, args.shares + 1)]
        ray.get([compute.remote(args.study, args.recipe, share) for share in shares])
    subprocess.run(["deepen", "study", args.study, args.recipe], check=True)


if __name__ == "__main__":
    main()
