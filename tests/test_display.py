"""What a run shows: a bar on a terminal, lines with loss, tokens/s and time left elsewhere; all on stderr."""

import io

import pytest
from rich.console import Console

from deepen.cli import display


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(display.time, "monotonic", lambda: now[0])
    return now


def test_without_a_terminal_lines_tell_loss_speed_and_time_left(clock, capsys):
    with display.display() as reporter:
        reporter.stage("training")
        for step in range(1, 41):
            clock[0] += 1
            reporter.progress(step, 100, f"loss {5 - step / 100:.3f}  1,000 tokens/s")
        reporter.note("step 40: general 1.5000")
    assert capsys.readouterr() == (
        "",
        "starting …\n"
        "training …\n"
        "training: 15/100, 85 s left  loss 4.850  1,000 tokens/s\n"
        "training: 30/100, 70 s left  loss 4.700  1,000 tokens/s\n"
        "  step 40: general 1.5000\n",
    )


def test_what_a_resumed_run_had_done_took_no_time_of_this_one(clock, capsys):
    with display.display() as reporter:
        reporter.stage("training")
        reporter.progress(80, 100)
        clock[0] += 20
        reporter.progress(90, 100)
    assert "training: 90/100, 20 s left\n" in capsys.readouterr().err


def test_on_a_terminal_a_bar_is_redrawn_with_loss_speed_and_time_left(monkeypatch):
    written = io.StringIO()
    terminal = Console(file=written, force_terminal=True, width=100)
    monkeypatch.setattr(display, "Console", lambda stderr: terminal)
    with display.display() as reporter:
        reporter.stage("training")
        reporter.progress(1, 4, "loss 5.000  1,000 tokens/s")
        reporter.note("step 1: [general] 1.5")
        reporter.stage("saving")
    text = written.getvalue()
    assert all(words in text for words in ("training", "loss 5.000  1,000 tokens/s", "step 1: [general] 1.5"))
    assert text.count("training") > 1
    assert "saving" in text
