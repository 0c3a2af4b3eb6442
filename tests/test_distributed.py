"""Real processes on gloo: the same numbers and files whatever the method and the world size."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from test_sft import write_talk
from tiny_run import write_base, write_recipe
from torch.testing import assert_close

from deepen.config import load_recipe
from deepen.pipeline.run import run_recipe

# Eight windows a step: accumulated over eight passes by one process, over four by two.
SETTINGS = {
    "data__heldout": 0.1,
    "evaluate": {},
    "train__tokens": 5 * 256,
    "train__batch_tokens": 256,
    "train__micro_batch": 1,
    "train__evaluate_every": 100,
    "train__checkpoint_every": 2,
    "train__keep_checkpoints": 3,
}
METHODS = {
    "blocks": {"evaluate": {"shift": True}},
    "full": {},
    "freeze": {"train__freeze__blocks": 1},
    "lora": {},
    "dora": {"train__method": "lora", "train__lora__variant": "dora"},
    "moe": {},
    "scale": {},
    "prompt": {},
    "one pass": {"train__method": "blocks", "train__micro_batch": 8},
    "tuned": {"train__method": "blocks"},
}
# Frozen weights in bf16 beside trained ones in fp32, in one group of FSDP.
NARROW = {
    f"{method} in bf16": {"train__method": method, "train__precision": "bf16", "base": "narrow"}
    for method in ("blocks", "full", "lora", "moe", "scale", "prompt")
}
# Held to the base by an anchor of three windows a step: a process has two of them, the other one.
ANCHORED = {
    f"{method} anchored": {"train__method": method, "train__anchor": {"share": 0.4, "weight": 2.0}}
    for method in ("blocks", "lora", "full")
}
RATED = "blocks with unit rates"
ANCHORED[RATED] = ANCHORED["blocks anchored"] | {"train__unit_rates": {"every": 2, "windows": 3}}
HELD = [
    (method, route)
    for method in ANCHORED
    for route in ("ddp", "fsdp")
    if (method, route) not in (("full anchored", "fsdp"), (RATED, "fsdp"))
]
# Where a run trains; BEFORE-to-WORLD: its first two steps were done in another world.
SHARDED = ["blocks", "full", "dora", "moe", "scale", "prompt", "tuned"]
DAILY = [
    *((method, "fsdp") for method in SHARDED),
    *((method, "one-to-ddp") for method in ("blocks", "dora")),
]
FRESH = [(method, route) for route in ("ddp", "fsdp") for method in METHODS if (method, route) not in DAILY]
RESUMED = [
    (method, f"{before}-to-{after}")
    for before in ("one", "ddp", "fsdp")
    for after in ("one", "ddp", "fsdp")
    for method in METHODS
    if (method, f"{before}-to-{after}") not in DAILY
]


def recipe_of(root, method, route):
    world = route.rpartition("-")[2]
    changes = SETTINGS | {"train__method": method} | (METHODS | NARROW | ANCHORED)[method]
    changes["base"] = str(root / changes.get("base", "base"))
    if method == "tuned":
        changes["sft"] = write_talk(root) | {"epochs": 1, "learning_rate": 1e-3}
    if world != "one":
        changes["train__parallel"] = world
    if changes["train__method"] != "blocks":
        changes["expand"] = None
    if "-to-" in route:
        before = root / f"{method}-{route.partition('-to-')[0]}"
        copy_after_two_steps(before, root / f"{method}-{route}")
    path = write_recipe(root, output=str(root / f"{method}-{route}"), **changes)
    return path.rename(root / f"{method}-{route}.yaml")


def copy_after_two_steps(finished, run):
    run.mkdir()
    for name in ("recipe.yaml", "environment.json", "metrics.jsonl"):
        shutil.copyfile(finished / name, run / name)
    shutil.copytree(finished / "checkpoints" / "step-2", run / "checkpoints" / "step-2")


def process(*command):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    # transformers reads files by threads; after many runs in one process PyTorch's pool failed there.
    environment["HF_DEACTIVATE_ASYNC_LOAD"] = "1"
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, timeout=600, env=environment
    )


def run_by_two(recipes):
    done = process(Path(__file__).with_name("many_runs.py"), *recipes)
    assert done.returncode == 2, done.stderr  # of the last thing they are asked
    return done.stderr


def run_by_one(recipe):
    run_recipe(load_recipe(recipe), resume=True)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The runs of the daily suite, METHOD-ROUTE; and what two processes said."""
    root = tmp_path_factory.mktemp("distributed")
    write_base(root / "base")
    for method in SHARDED:
        run_by_one(recipe_of(root, method, "one"))
    return root, run_by_two([recipe_of(root, method, route) for method, route in DAILY])


@pytest.fixture(scope="module")
def more_runs(runs):
    root, _ = runs
    write_base(root / "narrow", dtype="bfloat16")
    for method in [*NARROW, *(METHODS.keys() - {*SHARDED})]:
        run_by_one(recipe_of(root, method, "one"))
    run_by_two([recipe_of(root, *case) for case in [*FRESH, *((method, "fsdp") for method in NARROW)]])
    recipes = {case: recipe_of(root, *case) for case in RESUMED}
    run_by_two([path for (_, route), path in recipes.items() if not route.endswith("one")])
    for (_, route), path in recipes.items():
        if route.endswith("one"):
            run_by_one(path)
    return root


def steps(directory):
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def losses(directory):
    return [line["loss"] for line in steps(directory)]


def shifts(directory):
    return json.loads((directory / "evaluation" / "heldout.json").read_text()).get("shift") or []


def check_blocks(many, one):
    for ours, alone in zip(many, one, strict=True):
        assert ours["flops_per_second"] > 0
        assert ours["blocks"].keys() == alone["blocks"].keys()
        for index, figures in alone["blocks"].items():
            assert ours["blocks"][index] == pytest.approx(figures, rel=0.01)


def saved(run):
    result = json.loads((run / "result.json").read_text())
    (file,) = (run / result["outputs"][0]).glob("*.safetensors")
    return result, load_file(file)


def check_same(root, method, route):
    many, one = root / f"{method}-{route}", root / f"{method}-one"
    check_same_run(many, one)
    if method == "tuned":
        check_same_run(many / "sft", one / "sft")


def check_same_run(many, one):
    assert losses(many) == pytest.approx(losses(one), abs=1e-5)
    check_blocks(steps(many), steps(one))
    for mine, theirs in zip(shifts(many), shifts(one), strict=True):
        assert mine["kl"] == pytest.approx(theirs["kl"], rel=1e-2)
        assert mine["unshifted"] == pytest.approx(theirs["unshifted"], abs=0.02)
    (result, tensors), (alone, wanted) = saved(many), saved(one)
    assert tensors.keys() == wanted.keys()
    for name, tensor in tensors.items():
        assert_close(tensor, wanted[name], rtol=1e-3, atol=2e-4)
    assert result["parameters"] == alone["parameters"]
    assert (result["audit"] or alone["audit"] or {}).get("unchanged", True)
    assert sorted(os.listdir(many)) == sorted(os.listdir(one))


@pytest.mark.parametrize(("method", "route"), DAILY)
def test_two_processes_do_what_one_does(runs, method, route):
    check_same(runs[0], method, route)


def test_bad_input_is_said_once(runs):
    root, said = runs
    assert said.count("train.device") == 1
    assert not (root / "none").exists()


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("method", "route"), FRESH + RESUMED)
def test_a_run_goes_on_in_any_other_world(more_runs, method, route):
    check_same(more_runs, method, route)
    before, _, world = route.partition("-to-")
    if before == world:
        (_, tensors), (_, wanted) = (saved(more_runs / f"{method}-{name}") for name in (route, world))
        assert losses(more_runs / f"{method}-{route}") == losses(more_runs / f"{method}-{world}")
        assert all(tensor.equal(wanted[name]) for name, tensor in tensors.items())


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("method", NARROW)
def test_shards_of_two_precisions(more_runs, method):
    many, one = (losses(more_runs / f"{method}-{route}") for route in ("fsdp", "one"))
    assert many == pytest.approx(one, abs=5e-3)


@pytest.fixture(scope="module")
def anchored_runs(runs):
    root, _ = runs
    for method in ANCHORED:
        run_by_one(recipe_of(root, method, "one"))
    run_by_two([recipe_of(root, *case) for case in HELD])
    return root


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("method", "route"), HELD)
def test_an_anchor_in_two_processes(anchored_runs, method, route):
    check_same(anchored_runs, method, route)
    many, one = ([s["anchor"] for s in steps(anchored_runs / f"{method}-{r}")] for r in (route, "one"))
    assert many == pytest.approx(one, abs=1e-5)
    assert one[-1] > 1e-4


def torchrun(*command):
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "deepen", "run"]
    return process(*launch, *command)


@pytest.mark.slow
def test_torchrun_says_as_much(runs):
    root, _ = runs
    recipe, out = str(root / "blocks-fsdp.yaml"), root / "blocks-torchrun"
    done = torchrun(recipe, "--set", f"output={out}")
    assert done.returncode == 0, done.stderr
    check_same(root, "blocks", "torchrun")
    done = torchrun(recipe, "--set", "train.device=cuda:7", "--set", f"output={root / 'none'}")
    assert done.returncode != 0
    assert done.stderr.count("train.device") == 1
    assert not (root / "none").exists()
