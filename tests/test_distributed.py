"""Real `torchrun` processes on gloo: the same numbers and files whatever the world size."""

import json
import os
import subprocess
import sys

import pytest
from safetensors.torch import load_file
from tiny_run import write_base, write_recipe
from torch.testing import assert_close

SETTINGS = {"data__heldout": 0.1, "train__micro_batch": 1, "evaluate__shift": True}


def run(root, *options, processes):
    launch = [sys.executable, "-m"]
    if processes > 1:
        launch += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [*launch, "deepen", "run", str(root / "recipe.yaml"), *options],
        capture_output=True,
        text=True,
        timeout=240,
        env=environment,
    )


def losses(directory):
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def shifts(directory):
    return json.loads((directory / "evaluation" / "heldout.json").read_text())["shift"]


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    root = tmp_path_factory.mktemp("distributed")
    write_base(root / "base")
    write_recipe(root, **SETTINGS)
    done = run(root, processes=1)
    assert done.returncode == 0, done.stderr
    return root


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_do_what_one_does(single, parallel):
    out = single / parallel
    done = run(single, "--set", f"train.parallel={parallel}", "--set", f"output={out}", processes=2)
    assert done.returncode == 0, done.stderr
    assert losses(out) == pytest.approx(losses(single / "run"), abs=1e-5)
    ours, alone = (load_file(d / "blocks" / "blocks.safetensors") for d in (out, single / "run"))
    assert ours.keys() == alone.keys()
    for name, tensor in ours.items():
        assert_close(tensor, alone[name], rtol=1e-3, atol=1e-4)
    for mine, theirs in zip(shifts(out), shifts(single / "run"), strict=True):
        assert mine["kl"] == pytest.approx(theirs["kl"], rel=1e-2)
        assert mine["unshifted"] == pytest.approx(theirs["unshifted"], abs=0.02)
    result = json.loads((out / "result.json").read_text())
    assert result["audit"]["unchanged"]
    assert sorted(os.listdir(out)) == sorted(os.listdir(single / "run"))


def test_bad_input_is_said_once(single):
    done = run(single, "--set", "train.device=cuda:7", "--set", f"output={single / 'none'}", processes=2)
    assert done.returncode != 0
    assert done.stderr.count("train.device") == 1
    assert not (single / "none").exists()
