import sys
from types import SimpleNamespace

import pytest

from deepen.errors import TrainingError
from deepen.training.sinks import flatten, open_sinks

LINES = [
    {"step": 0, "tokens": 0, "evaluation": {"stories": 2.5}},
    {"step": 1, "tokens": 64, "loss": 3.0, "source_tokens": {"code": 48, "math": 16}},
    {"step": 2, "tokens": 128, "loss": 2.0, "source_tokens": {"code": 96, "math": 32}},
]


def test_a_line_as_numbers():
    assert flatten(LINES[0]) == {"tokens": 0, "evaluation/stories": 2.5}
    assert flatten(LINES[1]) == {
        "tokens": 64,
        "loss": 3.0,
        "source_tokens/code": 48,
        "source_tokens/math": 16,
    }


def show_all(names, run):
    with open_sinks(names, run, {"base": "b"}, 0) as show:
        for line in LINES:
            show(line)


def test_tensorboard_reads_what_was_written(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    show_all(["tensorboard"], tmp_path)
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 3.0), (2, 2.0)]
    assert [(e.step, e.value) for e in events.Scalars("evaluation/stories")] == [(0, 2.5)]
    assert [e.value for e in events.Scalars("source_tokens/math")] == [16, 32]


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_trackers_are_told(tmp_path, monkeypatch, name):
    calls = []
    tracker = SimpleNamespace(
        init=lambda **given: calls.append(("init", given)),
        log=lambda values, step: calls.append(("log", step, values)),
        finish=lambda: calls.append(("finish",)),
    )
    monkeypatch.setitem(sys.modules, name, tracker)
    show_all([name], tmp_path / "run")
    assert [call[0] for call in calls] == ["init", "log", "log", "log", "finish"]
    assert calls[0][1]["config"] == {"base": "b"}
    assert calls[0][1]["name"] == "run"
    assert calls[2] == ("log", 1, flatten(LINES[1]))


def test_a_sink_is_closed_when_training_fails(tmp_path, monkeypatch):
    closed = []
    tracker = SimpleNamespace(init=lambda **_: None, log=None, finish=lambda: closed.append(True))
    monkeypatch.setitem(sys.modules, "wandb", tracker)
    with pytest.raises(KeyboardInterrupt), open_sinks(["wandb"], tmp_path, {}, 0):
        raise KeyboardInterrupt
    assert closed == [True]


@pytest.mark.parametrize("name", ["tensorboard", "trackio", "wandb"])
def test_a_package_that_is_not_there(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(TrainingError, match=f"pip install {name}"), open_sinks([name], tmp_path, {}, 0):
        pass


def test_a_run_shows_its_metrics(tmp_path, monkeypatch):
    from tiny_run import write_base, write_recipe

    from deepen.config import load_recipe
    from deepen.pipeline.run import run_recipe

    shown = []
    tracker = SimpleNamespace(
        init=lambda **_: None, log=lambda values, step: shown.append(step), finish=lambda: shown.append("end")
    )
    monkeypatch.setitem(sys.modules, "trackio", tracker)
    write_base(tmp_path / "base")
    write_recipe(tmp_path, train__log=["trackio"])
    run_recipe(load_recipe(tmp_path / "recipe.yaml"))
    assert shown == [0, 1, 2, 3, 3, 4, 5, 6, 6, "end"]
