"""Real `torchrun` processes on gloo: the same numbers and files whatever the method and the world size."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tiny_run import write_base, write_recipe
from torch.testing import assert_close

from deepen.config import load_recipe
from deepen.pipeline.run import run_recipe

SETTINGS = {
    "data__heldout": 0.1,
    "evaluate": {},
    "train__micro_batch": 1,
    "train__evaluate_every": 100,
    "train__checkpoint_every": 2,
    "train__keep_checkpoints": 3,
}
METHODS = {
    "blocks": {},
    "full": {},
    "freeze": {"train__freeze__blocks": 1},
    "lora": {},
    "dora": {"train__method": "lora", "train__lora__variant": "dora"},
    "moe": {},
    "scale": {},
    "prompt": {},
}
WORLDS = ["ddp", "fsdp"]


def launched(*command):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run([*launch, *command], capture_output=True, text=True, timeout=240, env=environment)


def recipe_of(root, method, name, **changes):
    changes = {"train__method": method, **METHODS[method], **changes}
    if method != "blocks":
        changes["expand"] = None
    path = write_recipe(root, output=str(root / name), **SETTINGS | changes)
    return path.rename(root / f"{name}.yaml")


def unfinished(root, finished, name):
    """Copy a finished run as it was after step 4 of 6; its recipe says `name`."""
    run = root / name
    shutil.copytree(root / finished, run)
    for path in run.iterdir():
        if path.name not in ("recipe.yaml", "environment.json", "metrics.jsonl", "checkpoints", "evaluation"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.rmtree(run / "checkpoints" / "step-6")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Every method by one process, by two in replicas and in shards, and resumed in another world.

    Runs are called METHOD-WORLD, or METHOD-BEFORE-to-WORLD where four steps were done in another world.
    """
    root = tmp_path_factory.mktemp("distributed")
    write_base(root / "base")
    double = []
    for method in METHODS:
        run_recipe(load_recipe(recipe_of(root, method, f"{method}-one")))
        for world in WORLDS:
            double.append(recipe_of(root, method, f"{method}-{world}", train__parallel=world))
        name = f"{method}-one-to-fsdp"
        double.append(recipe_of(root, method, name, train__parallel="fsdp"))
        unfinished(root, f"{method}-one", name)
    done = launched(str(Path(__file__).with_name("many_runs.py")), *map(str, double))
    assert done.returncode == 0, done.stderr
    for method in METHODS:
        name = f"{method}-fsdp-to-one"
        recipe = recipe_of(root, method, name)
        unfinished(root, f"{method}-fsdp", name)
        run_recipe(load_recipe(recipe), resume=True)
    return root


def losses(directory):
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def saved(run):
    result = json.loads((run / "result.json").read_text())
    (file,) = (run / result["outputs"][0]).glob("*.safetensors")
    return result, load_file(file)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("world", [*WORLDS, "one-to-fsdp", "fsdp-to-one"])
def test_two_processes_do_what_one_does(root, method, world):
    many, one = root / f"{method}-{world}", root / f"{method}-one"
    assert losses(many) == pytest.approx(losses(one), abs=1e-5)
    (result, tensors), (alone, wanted) = saved(many), saved(one)
    assert tensors.keys() == wanted.keys()
    for name, tensor in tensors.items():
        assert_close(tensor, wanted[name], rtol=1e-3, atol=2e-4)
    assert result["parameters"] == alone["parameters"]
    assert (result["audit"] is None) == (alone["audit"] is None)
    assert sorted(os.listdir(many)) == sorted(os.listdir(one))


def test_bad_input_is_said_once(root):
    recipe, out = str(root / "blocks-one.yaml"), root / "none"
    done = launched("-m", "deepen", "run", recipe, "--set", "train.device=cuda:7", "--set", f"output={out}")
    assert done.returncode != 0
    assert done.stderr.count("train.device") == 1
    assert not out.exists()
