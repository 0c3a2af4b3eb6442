"""The engine that writes weights: several files at once, every means of copying, every way to fail."""

import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from safetensors.numpy import load_file
from tiny_checkpoint import SHARD, SINGLE, hollow, sharded, single

from deepen.cli import main
from deepen.errors import CheckpointError, OutputError
from deepen.expansion import apply, expand_checkpoint

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="stands in for Linux's own calls")
CUT = {"blocks": 3, "shard_size": 300}  # about ten files


def weights(directory):
    return {path.name: path.read_bytes() for path in sorted(directory.glob("*.safetensors"))}


def held(directory):
    return sorted(path.name for path in directory.iterdir())


def copying(monkeypatch, instead):
    """Put `instead(real, *arguments)` in the place of os.copy_file_range."""
    real = os.copy_file_range
    monkeypatch.setattr(os, "copy_file_range", lambda *arguments: instead(real, *arguments))


def fails_with(code):
    def refuse(*arguments):
        raise OSError(code, os.strerror(code))

    return refuse


def test_files_at_once_are_the_files_one_by_one(tmp_path, monkeypatch):
    base = sharded(tmp_path / "base")
    monkeypatch.setattr(apply, "_STEP", 10)
    expand_checkpoint(base, tmp_path / "together", **CUT)
    monkeypatch.setattr(apply, "_FILES_AT_ONCE", 1)
    expand_checkpoint(base, tmp_path / "alone", **CUT)
    assert len(weights(tmp_path / "alone")) > 8
    assert weights(tmp_path / "together") == weights(tmp_path / "alone")


def test_files_are_written_at_once(tmp_path, monkeypatch):
    meeting = threading.Barrier(4, timeout=20)
    met = threading.local()

    def meet(real, *arguments):
        if not hasattr(met, "once"):
            met.once = meeting.wait()
        return real(*arguments)

    copying(monkeypatch, meet)
    expand_checkpoint(sharded(tmp_path / "base"), tmp_path / "out", **CUT)
    assert not meeting.broken


def test_progress_is_one_count_in_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(apply, "_STEP", 10)
    seen, inside = [], []

    def progress(done, total):
        inside.append(1)
        seen.append((done, total))
        assert len(inside) == 1
        inside.pop()

    result = expand_checkpoint(sharded(tmp_path / "base"), tmp_path / "out", **CUT, progress=progress)
    assert seen == sorted(set(seen))
    assert seen[-1] == (result.bytes_written, result.bytes_written)
    assert result.bytes_written == sum(map(len, weights(tmp_path / "out").values()))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_in_the_middle(tmp_path, monkeypatch, code):
    calls = []

    def fill_up(real, *arguments):
        calls.append(1)
        if len(calls) > 5:
            raise OSError(code, os.strerror(code))
        return real(*arguments)

    base = sharded(tmp_path / "base")
    copying(monkeypatch, fill_up)
    with pytest.raises(OutputError, match="nothing was left behind"):
        expand_checkpoint(base, tmp_path / "new" / "out", **CUT)
    assert held(tmp_path) == ["base"]


@contextmanager
def disk_of(size, place: Path):
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("may not mount a small disk here")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_a_disk_that_is_full(tmp_path, capfd, monkeypatch):
    with disk_of("16k", tmp_path / "small") as small:
        command = ["expand", str(hollow(tmp_path / "base", 1 << 12)), str(small / "out"), "--blocks", "1"]
        assert main(command) == 2
        assert "are free on its disk" in capfd.readouterr().err
        # Another process may take the space after it was looked at.
        monkeypatch.setattr("deepen.expansion.expand.check_space", lambda directory, needed: None)
        assert main(command) == 2
        assert "No space left on device" in capfd.readouterr().err
        assert held(small) == []


def test_a_limit_on_the_size_of_files(tmp_path):
    base = single(tmp_path / "base")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, before[1]))
    try:
        with pytest.raises(OutputError, match="nothing was left behind"):
            expand_checkpoint(base, tmp_path / "out", blocks=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert held(tmp_path) == ["base"]


def test_a_failure_stops_the_other_files(tmp_path, monkeypatch):
    """One source has shrunk; the rest would take minutes at this pace."""
    base, after = sharded(tmp_path / "base"), []
    failed, size = threading.Event(), (base / SHARD).stat().st_size
    monkeypatch.setattr(apply, "_STEP", 1)

    def slow(real, source, target, count, offset, position):
        if failed.is_set():
            after.append(1)
            time.sleep(0.05)
        moved = real(source, target, count, offset, position)
        if moved == 0:
            failed.set()
        elif os.readlink(f"/proc/self/fd/{source}").endswith(SHARD):
            os.truncate(base / SHARD, size - 200)
        else:
            failed.wait(0.05)
        return moved

    copying(monkeypatch, slow)
    with pytest.raises(CheckpointError, match=f"{SHARD}: ended early"):
        expand_checkpoint(base, tmp_path / "out", blocks=1)
    assert held(tmp_path) == ["base"]
    assert len(after) < 40


def test_progress_may_end_the_work(tmp_path):
    def enough(done, total):
        raise ValueError("enough")

    with pytest.raises(ValueError, match="enough"):
        expand_checkpoint(sharded(tmp_path / "base"), tmp_path / "out", **CUT, progress=enough)
    assert held(tmp_path) == ["base"]


def test_a_source_that_vanishes(tmp_path):
    base = sharded(tmp_path / "base")
    remove = threading.Lock()

    def vanish(done, total):
        with remove:
            shutil.rmtree(base, ignore_errors=True)

    with pytest.raises(CheckpointError, match=r"model-0000.*: cannot be read: No such file"):
        expand_checkpoint(base, tmp_path / "out", **CUT, progress=vanish)
    assert held(tmp_path) == []


def test_a_source_that_cannot_be_read(tmp_path, monkeypatch):
    base = single(tmp_path / "base")
    for name in ("copy_file_range", "sendfile"):
        monkeypatch.setattr(os, name, fails_with(errno.EIO))
    real = os.pread

    def broken(descriptor, count, offset):
        if "_read_write" in {sys._getframe(depth).f_code.co_name for depth in (1, 2)}:
            fails_with(errno.EIO)()
        return real(descriptor, count, offset)

    monkeypatch.setattr(os, "pread", broken)
    with pytest.raises(CheckpointError, match=f"{SINGLE}: cannot be read: Input/output error"):
        expand_checkpoint(base, tmp_path / "out", blocks=1)
    assert held(tmp_path) == ["base"]


def test_interrupted(tmp_path, monkeypatch):
    """Ctrl-C reaches the thread that waits; the others stop at their next step."""
    base, steps = sharded(tmp_path / "base"), []
    monkeypatch.setattr(apply, "_STEP", 1)

    def press(done, total):
        steps.append(done)
        if len(steps) == 20:
            os.kill(os.getpid(), signal.SIGINT)
        threading.Event().wait(0.002)

    # A shell's background job, which a test run may be, ignores SIGINT.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            expand_checkpoint(base, tmp_path / "out", **CUT, progress=press)
    finally:
        signal.signal(signal.SIGINT, before)
    assert held(tmp_path) == ["base"]
    assert len(steps) < 300


UNSUPPORTED = [errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM, errno.EIO]


@pytest.mark.parametrize("code", [*UNSUPPORTED, 0])
@pytest.mark.parametrize("refusing", [["copy_file_range"], ["copy_file_range", "sendfile"]])
def test_the_next_means_takes_over(tmp_path, monkeypatch, code, refusing):
    """Some kernels refuse; some answer that nothing is left to copy (code 0 here)."""
    base = sharded(tmp_path / "base")
    expand_checkpoint(base, tmp_path / "fast", **CUT)
    for name in refusing:
        monkeypatch.setattr(os, name, fails_with(code) if code else lambda *arguments: 0)
    monkeypatch.setattr(apply, "_BUFFER", 100)
    expand_checkpoint(base, tmp_path / "slow", **CUT)
    assert weights(tmp_path / "slow") == weights(tmp_path / "fast")


def test_short_copies_are_continued(tmp_path, monkeypatch):
    base = sharded(tmp_path / "base")
    expand_checkpoint(base, tmp_path / "whole", **CUT)
    copying(monkeypatch, lambda real, a, b, count, *places: real(a, b, min(count, 7), *places))
    expand_checkpoint(base, tmp_path / "short", **CUT)
    assert weights(tmp_path / "short") == weights(tmp_path / "whole")


def test_a_base_on_another_disk(tmp_path):
    memory = Path("/dev/shm")
    if not memory.is_dir() or memory.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("only one disk here")
    expand_checkpoint(sharded(tmp_path / "base"), tmp_path / "near", **CUT)
    place = memory / f"deepen-test-{os.getpid()}"
    place.mkdir()
    try:
        expand_checkpoint(sharded(place / "base"), tmp_path / "far", **CUT)
    finally:
        shutil.rmtree(place)
    assert weights(tmp_path / "far") == weights(tmp_path / "near")


def room(path):
    return path.stat().st_blocks * 512


def test_holes(tmp_path):
    """In the source they read as zeros; new zeros are holes in turn, where the file system has them."""
    base = hollow(tmp_path / "base", 1 << 17)  # 2 MiB a matrix
    if room(base / SINGLE) > 1 << 20:
        pytest.skip("a file system without holes")
    expand_checkpoint(base, tmp_path / "out", after=[0] * 8)
    old, new = load_file(base / SINGLE), load_file(tmp_path / "out" / SINGLE)
    assert (new["model.layers.9.mlp.down_proj.weight"] == old["model.layers.1.mlp.down_proj.weight"]).all()
    assert new["model.layers.9.mlp.down_proj.weight"][-1, -1] == 0.5
    assert not new["model.layers.4.mlp.down_proj.weight"].any()
    written = (tmp_path / "out" / SINGLE).stat().st_size
    assert written - room(tmp_path / "out" / SINGLE) >= 15 << 20


SLOW = """
import os, resource, sys
def refuse(*arguments):
    raise OSError(18, "Invalid cross-device link")
os.copy_file_range = os.sendfile = refuse
from deepen.cli import main
code = main(["expand", sys.argv[1], sys.argv[2], "--blocks", "2", "--shard-size", "20MB"])
print(code, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_memory_is_small_by_the_slowest_means(tmp_path):
    base = hollow(tmp_path / "base", 1 << 20)  # 100 MB
    assert (base / SINGLE).stat().st_size > 96 << 20
    # ru_maxrss of a direct child would start at this process's own; that of the shell's child does not.
    command = ["sh", "-c", '"$0" "$@"; exit $?', sys.executable, "-c", SLOW, base, tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    code, kilobytes = done.stdout.split()[-2:]
    assert code == "0"
    assert len(weights(tmp_path / "out")) > 8
    assert int(kilobytes) < 64 * 1024
