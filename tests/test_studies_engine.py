"""Cells are computed once each: whatever the order, the shares, the processes, the kills."""

import os
import signal
import subprocess
import sys
import time
from functools import partial

import pytest

from deepen.errors import Interrupted, RecipeError, StudyError, TrainingError
from deepen.pipeline.reporter import Silent
from deepen.records import Provenance
from deepen.studies import code, engine
from deepen.studies.cells import Cell, Computed, Store
from deepen.studies.engine import Share, Slot, run_cells

WHERE = Provenance(command="test", started="2026-01-01", python="3", packages={}, git=None, hardware={})


@pytest.fixture(autouse=True)
def traceable(monkeypatch):
    monkeypatch.setattr(engine, "traceable_code", lambda: "commit")


def work(name, directory, reporter):
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "log").open("a") as log:
        log.write("computed\n")
    return Computed(result={"name": name}, provenance=WHERE)


def cell(name, **inputs):
    return Cell(name=name, inputs={"name": name, **inputs}, compute=partial(work, name))


def slots(*cells):
    return [Slot(name=each.name, cell=each) for each in cells]


def times_computed(store):
    return {path.parent.name: len(path.read_text().splitlines()) for path in store.study.rglob("log")}


def test_a_key_is_of_the_inputs_alone():
    assert cell("a", x=1, y=2).key == cell("a", y=2, x=1).key
    assert len({cell("a", x=1).key, cell("a", x=2).key, cell("b", x=1).key}) == 3
    renamed = Cell(name="other", inputs={"name": "a", "x": 1}, compute=partial(work, "a"))
    assert renamed.key == cell("a", x=1).key


def test_finished_cells_are_never_computed_again(tmp_path):
    store, cells = Store(tmp_path), [cell("a"), cell("b")]
    assert run_cells(store, lambda _: slots(*cells), Share(), Silent()).computed == ["a", "b"]
    assert run_cells(store, lambda _: slots(*cells, cell("c")), Share(), Silent()).computed == ["c"]
    assert set(times_computed(store).values()) == {1}
    renamed = Cell(name="new-name", inputs=cells[0].inputs, compute=cells[0].compute)
    assert run_cells(store, lambda _: slots(renamed), Share(), Silent()).computed == []
    assert store.finished(renamed).code == "commit"


def test_a_cell_that_others_decide_is_computed_once_it_is_known(tmp_path):
    store, first = Store(tmp_path), cell("first")

    def plan(finished):
        found = finished(first)
        second = Slot(name="second", cell=cell(f"after-{found.result['name']}") if found else None)
        return [*slots(first), second]

    assert run_cells(store, plan, Share(), Silent()).computed == ["first", "after-first"]


def test_shares_are_disjoint_and_leave_nothing(tmp_path):
    cells = [cell(str(number)) for number in range(7)]
    store = Store(tmp_path)
    done = [
        run_cells(store, lambda _: slots(*cells), Share.parse(f"{i}/3"), Silent()).computed for i in (1, 2, 3)
    ]
    assert [len(each) for each in done] == [3, 2, 2]
    assert sorted(name for each in done for name in each) == [each.name for each in cells]
    assert set(times_computed(store).values()) == {1}


@pytest.mark.parametrize("text", ["3", "0/2", "3/2", "a/b", "1/0", "-1/2"])
def test_a_share_that_is_none_is_refused(text):
    with pytest.raises(RecipeError, match="i/n"):
        Share.parse(text)


def test_a_cell_that_another_process_computes_is_left_to_it(tmp_path):
    store, cells = Store(tmp_path), [cell("a"), cell("b")]
    with store.hold(cells[0]) as ours:
        assert ours
        outcome = run_cells(store, lambda _: slots(*cells), Share(), Silent())
    assert (outcome.busy, outcome.computed) == (["a"], ["b"])
    assert run_cells(store, lambda _: slots(*cells), Share(), Silent()).computed == ["a"]


def test_a_cell_that_cannot_be_computed_is_named_and_the_finished_stay(tmp_path):
    def fail(directory, reporter):
        raise TrainingError("no device")

    store, bad = Store(tmp_path), Cell(name="bad", inputs={}, compute=fail)
    with pytest.raises(TrainingError, match=r"cells/bad-.*: no device"):
        run_cells(store, lambda _: slots(cell("a"), bad, cell("b")), Share(), Silent())
    assert store.finished(cell("a"))
    assert store.finished(bad) is None
    assert store.finished(cell("b")) is None


def test_a_stop_ends_the_study_and_says_how_to_go_on(tmp_path):
    def stop(directory, reporter):
        raise Interrupted("stopped after step 2; continue with --resume")

    stopped = Cell(name="long", inputs={}, compute=stop)
    with pytest.raises(Interrupted, match="stopped in long, after saving; call again"):
        run_cells(Store(tmp_path), lambda _: slots(stopped, cell("a")), Share(), Silent())
    assert not times_computed(Store(tmp_path))


def test_code_that_could_not_be_traced_computes_nothing(tmp_path, monkeypatch):
    def git(directory, command, *rest):
        return {"ls-files": "__init__.py", "status": " M studies/engine.py", "rev-parse": "c0ffee"}[command]

    monkeypatch.setattr(code, "_git", git)
    monkeypatch.setattr(engine, "traceable_code", code.traceable_code)
    store = Store(tmp_path)
    with pytest.raises(StudyError, match=r"studies/engine\.py"):
        run_cells(store, lambda _: slots(cell("a")), Share(), Silent())
    assert not times_computed(store)
    monkeypatch.setattr(code, "_git", lambda d, command, *r: "" if command == "status" else "c0ffee")
    run_cells(store, lambda _: slots(cell("a")), Share(), Silent())
    assert store.finished(cell("a")).code == "c0ffee"


KILLED = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import test_studies_engine as t
t.engine.traceable_code = lambda: "commit"

def work(number, directory, reporter):
    directory.mkdir(parents=True, exist_ok=True)
    for part in range(4):  # goes on from what it finds
        if not (directory / str(part)).exists():
            time.sleep(0.01)
            (directory / str(part)).write_text("x")
            with (directory / "log").open("a") as log:
                log.write(f"{part}\\n")
    return t.Computed(result={"number": number}, provenance=t.WHERE)

cells = [t.Cell(name=f"n{n}", inputs={"n": n}, compute=t.partial(work, n)) for n in range(6)]
print("ready", flush=True)
t.run_cells(t.Store(Path(sys.argv[1])), lambda _: t.slots(*cells), t.Share(), t.Silent())
"""


def test_kills_lose_no_cell_and_compute_none_twice(tmp_path):
    """Two processes at once, both killed again and again at different moments."""
    command = [sys.executable, "-c", KILLED, str(tmp_path / "study"), os.path.dirname(__file__)]
    for round_ in range(12):
        running = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(2)]
        for process in running:
            process.stdout.readline()
        if round_ < 3:
            time.sleep(0.02 + 0.04 * round_)
            for process in running:
                process.send_signal(signal.SIGKILL)
        codes = []
        for process in running:
            codes.append(process.wait())
            process.stdout.close()
        if codes == [0, 0]:
            break
    store = Store(tmp_path / "study")
    records = sorted(path.parent for path in store.study.glob("cells/*/cell.json"))
    assert [path.name[:2] for path in records] == [f"n{n}" for n in range(6)]
    # A part may be written again where a kill fell between it and its line, never after that.
    assert all(len(set((path / "log").read_text().split())) == 4 for path in records)
    assert all(len((path / "log").read_text().split()) == 4 for path in records)
