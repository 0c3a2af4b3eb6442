"""What a run survives: a damaged or incomplete checkpoint, a full disk; and what it reads when it goes on."""

import resource
import shutil
from contextlib import contextmanager

import pytest
from test_kill_training import lines
from tiny_run import write_base, write_recipe

from deepen.cli import main
from deepen.config import load_recipe
from deepen.data.batches import Mixture
from deepen.pipeline.reporter import Silent
from deepen.pipeline.run import run_recipe


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    root = tmp_path_factory.mktemp("endurance")
    write_base(root / "base")
    run_recipe(load_recipe(write_recipe(root, train__keep_checkpoints=3)))
    return root


@pytest.fixture
def stopped(undisturbed, tmp_path):
    """The run as it was just after step 6, the last: its checkpoints and metrics; and its recipe."""
    for name in ("recipe.yaml", "environment.json", "metrics.jsonl", "checkpoints"):
        source, target = undisturbed / "run" / name, tmp_path / "run" / name
        target.parent.mkdir(exist_ok=True)
        (shutil.copytree if source.is_dir() else shutil.copyfile)(source, target)
    return tmp_path / "run", load_recipe(undisturbed / "recipe.yaml", [f"output={tmp_path / 'run'}"])


class Notes(Silent):
    def __init__(self):
        self.lines = []

    def note(self, text):
        self.lines.append(text)


def check_same(run, undisturbed):
    blocks = "blocks/blocks.safetensors"
    assert (run / blocks).read_bytes() == (undisturbed / "run" / blocks).read_bytes()
    assert lines(run) == lines(undisturbed / "run")


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def halve(directory):
    (directory / "manifest.json").unlink()
    (directory / "optimizer.safetensors").unlink()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda newest: flip(newest / "optimizer.safetensors"), "optimizer.safetensors is damaged; skipped"),
        (halve, "incomplete or unreadable"),
    ],
)
def test_a_run_goes_on_from_before_a_damaged_checkpoint(undisturbed, stopped, damage, words):
    run, recipe = stopped
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-2", "step-4", "step-6"]
    damage(run / "checkpoints" / "step-6")
    notes = Notes()
    run_recipe(recipe, resume=True, reporter=notes)
    assert [words in line for line in notes.lines if "step-6" in line] == [True]
    assert "continuing after step 4 of 6" in notes.lines
    check_same(run, undisturbed)


def test_resuming_reads_no_batch_of_the_steps_before(undisturbed, stopped, monkeypatch):
    run, recipe = stopped
    shutil.rmtree(run / "checkpoints" / "step-6")
    read, honest = [], Mixture.batch

    def batch(mixture, step, windows):
        read.append(step)
        return honest(mixture, step, windows)

    monkeypatch.setattr(Mixture, "batch", batch)
    run_recipe(recipe, resume=True)
    assert read == [4, 5]
    check_same(run, undisturbed)


@contextmanager
def files_of_at_most(size):
    """What a disk with so much room does to a file that is being written: a real error of the system's."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("file", ["trainable.safetensors", "optimizer.safetensors"])
def test_a_full_disk_leaves_the_checkpoint_before(undisturbed, stopped, capsys, file):
    run, _ = stopped
    for step in (4, 6):
        shutil.rmtree(run / "checkpoints" / f"step-{step}")
    room = (run / "checkpoints" / "step-2" / file).stat().st_size - 1
    command = ["run", str(undisturbed / "recipe.yaml"), "--set", f"output={run}", "--resume"]
    with files_of_at_most(room):
        assert main(command) == 2
    *_, what, do = capsys.readouterr().err.splitlines()
    assert f"{run / 'checkpoints' / 'step-4'}: cannot be written" in what
    assert "make room, then continue with --resume" in do
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-2"]
    assert main(command) == 0
    check_same(run, undisturbed)
