import os
import signal
import subprocess
import sys

import pytest

from deepen.checkpoint import atomic, atomic_directory, rename, write_file
from deepen.errors import OutputError


def fill(target, content, **options):
    with atomic_directory(target, **options) as partial:
        (partial / "sub").mkdir()
        (partial / "sub" / "file").write_text(content)


def read(target):
    return (target / "sub" / "file").read_text()


def test_a_new_directory_with_parents(tmp_path):
    fill(tmp_path / "a" / "b", "new")
    assert read(tmp_path / "a" / "b") == "new"
    assert os.listdir(tmp_path / "a") == ["b"]


def test_an_existing_one_is_refused_and_kept(tmp_path):
    fill(tmp_path / "out", "old")
    with pytest.raises(OutputError, match="--overwrite"):
        fill(tmp_path / "out", "new")
    assert read(tmp_path / "out") == "old"
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("can_exchange", [True, False])
def test_overwrite_replaces_all_of_it(tmp_path, monkeypatch, can_exchange):
    if not can_exchange:
        monkeypatch.setattr(rename, "_libc_renameat2", lambda: None)
    fill(tmp_path / "out", "old")
    (tmp_path / "out" / "stale").write_text("")
    fill(tmp_path / "out", "new", overwrite=True)
    assert read(tmp_path / "out") == "new"
    assert os.listdir(tmp_path / "out") == ["sub"]
    assert os.listdir(tmp_path) == ["out"]


def test_without_exchange_the_old_one_is_put_back(tmp_path):
    # What a process leaves that died between the two renames of the fallback.
    fill(tmp_path / "out", "old")
    (tmp_path / "out").rename(tmp_path / ".out.replaced-0123456789ab")
    with pytest.raises(OutputError, match="--overwrite"):
        fill(tmp_path / "out", "new")
    assert read(tmp_path / "out") == "old"


def test_an_exception_leaves_nothing(tmp_path):
    def fail():
        with atomic_directory(tmp_path / "a" / "out") as partial:
            (partial / "file").write_text("x")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert os.listdir(tmp_path) == []


def test_a_full_disk_is_the_users_error(tmp_path):
    with pytest.raises(OutputError, match="No space left"), atomic_directory(tmp_path / "out"):
        raise OSError(28, "No space left on device")
    assert os.listdir(tmp_path) == []


def test_a_directory_that_appears_meanwhile_is_kept(tmp_path):
    def race():
        with atomic_directory(tmp_path / "out"):
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "theirs").write_text("x")

    with pytest.raises(OutputError, match="exists"):
        race()
    assert os.listdir(tmp_path / "out") == ["theirs"]


@pytest.mark.parametrize("target", ["base/out", "base", "."])
def test_output_and_input_apart(tmp_path, target):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "file").write_text("x")
    with pytest.raises(OutputError, match="the input"):
        fill(tmp_path / target, "new", overwrite=True, inside=(tmp_path / "base",))
    assert (tmp_path / "base" / "file").read_text() == "x"


def test_an_input_through_a_link(tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "base")
    with pytest.raises(OutputError, match="inside the input"):
        fill(tmp_path / "link" / "out", "new", inside=(tmp_path / "base",))


def test_a_file_is_not_replaced(tmp_path):
    (tmp_path / "out").write_text("x")
    with pytest.raises(OutputError, match="not a directory"):
        fill(tmp_path / "out", "new", overwrite=True)


def test_the_working_directory_is_not_replaced(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    with pytest.raises(OutputError, match="working directory"):
        fill(tmp_path / "out", "new", overwrite=True)


@pytest.mark.skipif(os.getuid() == 0, reason="root may write anywhere")
def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(OutputError, match="Permission denied"):
        fill(tmp_path / "closed" / "out", "new")


def test_modes_are_the_umasks(tmp_path):
    before = os.umask(0o027)
    try:
        write_file(tmp_path / "file", "x")
        fill(tmp_path / "out", "x")
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o750


def test_write_file_replaces_whole(tmp_path):
    write_file(tmp_path / "file", "héllo")
    write_file(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["file"]
    with pytest.raises(OutputError, match="cannot be"):
        write_file(tmp_path / "absent" / "file", "x")


def test_write_file_keeps_the_old_one_on_failure(tmp_path, monkeypatch):
    write_file(tmp_path / "file", "old")

    def refuse(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(atomic.os, "fsync", refuse)
    with pytest.raises(OutputError, match="No space left"):
        write_file(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


HANG = """
import sys, time
from pathlib import Path
from deepen.checkpoint import atomic_directory
with atomic_directory(Path(sys.argv[1])) as partial:
    (partial / "file").write_text("x")
    print("ready", flush=True)
    time.sleep(60)
"""


def test_leftovers_of_the_dead_are_removed_those_of_the_living_are_not(tmp_path):
    target = tmp_path / "out"
    process = subprocess.Popen([sys.executable, "-c", HANG, target], stdout=subprocess.PIPE)
    try:
        process.stdout.readline()
        (left,) = os.listdir(tmp_path)
        write_file(tmp_path / "other", "")
        fill(tmp_path / "another", "")
        fill(target, "mine")
        assert (tmp_path / left / "file").exists()
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    fill(target, "again", overwrite=True)
    assert sorted(os.listdir(tmp_path)) == ["another", "other", "out"]
    assert read(target) == "again"
