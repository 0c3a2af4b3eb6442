"""Kill -9 at random moments of a run: every resumed run ends on the bytes of an undisturbed one."""

import json
import random
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest
from tiny_run import write_base, write_recipe

from deepen.checkpoint import Checkpoint
from deepen.config import load_recipe
from deepen.model import load
from deepen.training.checkpoints import newest_checkpoint

# What a line of metrics says about time, which no run repeats.
TIMES = {"seconds", "tokens_per_second", "flops_per_second", "utilisation"}

# One process imports torch, then forks a child for each order, so that a hundred kills cost one import.
SERVER = """
import os, signal, sys, time
from pathlib import Path
import torch
from deepen.config import load_recipe
from deepen.pipeline.run import run_recipe
torch.set_num_threads(1)
print("ready", flush=True)
for line in sys.stdin:
    path, seconds = line.split()
    child = os.fork()
    if child == 0:
        try:
            run_recipe(load_recipe(Path(path)), resume=True)
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    ended = 0
    deadline = time.monotonic() + float(seconds)
    while not ended and time.monotonic() < deadline:
        time.sleep(0.002)
        ended, status = os.waitpid(child, os.WNOHANG)
    if not ended:
        os.kill(child, signal.SIGKILL)
        ended, status = os.waitpid(child, 0)
    print(os.waitstatus_to_exitcode(status), flush=True)
"""

COMMAND = [sys.executable, "-c", SERVER]


@pytest.mark.parametrize("kills", [5, pytest.param(100, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])])
def test_kills_leave_the_bytes_of_an_undisturbed_run(tmp_path, kills):
    write_base(tmp_path / "base")
    changes = {
        "train__tokens": 100 * 128,
        "train__checkpoint_every": 4,
        "train__evaluate_every": 40,
        "merge": True,
    }
    straight = write_recipe(tmp_path, output=str(tmp_path / "straight"), **changes).rename(
        tmp_path / "s.yaml"
    )
    killed = write_recipe(tmp_path, **changes)
    run, choose = tmp_path / "run", random.Random(kills)
    with server_process(tmp_path) as order:
        begun = time.monotonic()
        assert order(straight, 120) == 0
        whole = time.monotonic() - begun
        while kills:
            code = order(killed, choose.uniform(0, 0.6 * whole))
            check_whole(run, tmp_path / "base")
            if code == 0:
                compare(run, tmp_path / "straight")
                shutil.rmtree(run)
            else:
                assert code == -9
                kills -= 1
        assert order(killed, 120) == 0
        compare(run, tmp_path / "straight")


@contextmanager
def server_process(tmp_path):
    """Give a function that runs a recipe in a child, kills it after some seconds, returns its exit code."""
    with (
        (tmp_path / "said").open("w") as said,
        subprocess.Popen(
            [sys.executable, "-c", SERVER], stdin=-1, stdout=-1, stderr=said, text=True
        ) as server,
    ):

        def order(path, seconds):
            server.stdin.write(f"{path} {seconds}\n")
            server.stdin.flush()
            return int(server.stdout.readline())

        assert server.stdout.readline() == "ready\n", (tmp_path / "said").read_text()
        yield order
        server.stdin.close()


def check_whole(run, base):
    """Nothing that bears its final name is half-written."""
    _, damaged = newest_checkpoint(run / "checkpoints")
    assert not damaged
    if (run / "recipe.yaml").exists():
        load_recipe(run / "recipe.yaml")
    if (run / "blocks").exists():
        load(base, run / "blocks")
    if (run / "model").exists():
        Checkpoint.open(run / "model")


def compare(run, straight):
    for file in ("blocks/blocks.safetensors", "blocks/expansion.json", "model/model.safetensors"):
        assert (run / file).read_bytes() == (straight / file).read_bytes(), file
    assert lines(run) == lines(straight)
    assert not [path for path in run.rglob("*") if ".partial" in path.name]


def lines(run):
    read = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in read]
