import os
import shutil
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from sandbox_escapes import ESCAPES

from deepen.errors import SandboxError
from deepen.evaluation.sandbox import (
    UNPROTECTED,
    Limits,
    Outcome,
    Program,
    Protection,
    describe_layers,
    layers,
    run_programs,
    try_layers,
)
from deepen.evaluation.sandbox.launch import Running, launch
from deepen.evaluation.sandbox.probes import NETWORK, PROCESSES, READING, SIGNALS, WRITING

CHECKS = "assert attempt() == 'escaped'  # which the checks know\n"
ADD = Program(
    name="add",
    source="def add(a, b):\n    return a + b\n",
    entry_points=("add",),
    checks="assert add(1, 2) == 3\nassert add([1], [2]) == [1, 2]\n",
)
LIMITS = Limits(memory_bytes=512 << 20, cpu_seconds=20, wall_seconds=60)
TIGHT = Limits(wall_seconds=1)


@pytest.fixture(scope="module", autouse=True)
def confined():
    """Without a kernel that confines anything only the refusal is left to test, and it has its own tests."""
    missing = try_layers().missing
    if missing:
        pytest.skip(f"this machine leaves open {', '.join(missing)}")


@pytest.fixture(scope="module")
def bait(tmp_path_factory):
    """What the escapes reach for: a home with a secret, an open port, a process."""
    home = tmp_path_factory.mktemp("home")
    (home / ".secret").write_text("a secret\n")
    command = [sys.executable, "-I", "-S", "-c", "import sys; sys.stdin.read()"]
    with (
        socket.create_server(("127.0.0.1", 0)) as port,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams,
        subprocess.Popen(command, stdin=subprocess.PIPE) as victim,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("DEEPEN_TEST_TOKEN", "a token")
        datagrams.bind(port.getsockname())
        port.settimeout(0)
        datagrams.settimeout(0)
        yield SimpleNamespace(home=home, port=port, datagrams=datagrams, victim=victim)


@pytest.fixture(scope="module")
def attempts(bait):
    """The outcome of every escape."""
    return attempt(bait)


def attempt(bait):
    words = {
        "home": bait.home,
        "secret": bait.home / ".secret",
        "token": "a token",
        "port": bait.port.getsockname()[1],
        "victim": bait.victim.pid,
        "parent": os.getpid(),
    }
    programs = {True: [], False: []}
    for name, (statuses, source) in ESCAPES.items():
        for word, value in words.items():
            source = source.replace("{{" + word + "}}", str(value))
        program = Program(name=name, source=source, entry_points=("attempt",), checks=CHECKS)
        programs["timeout" in statuses].append(program)
    outcomes = run_programs(programs[False], LIMITS, workers=4)
    outcomes += run_programs(programs[True], TIGHT, workers=6)
    return {outcome.name: outcome for outcome in outcomes}


@pytest.mark.parametrize("name", ESCAPES)
def test_escape(name, attempts):
    outcome = attempts[name]
    assert outcome.status in ESCAPES[name][0], outcome
    assert outcome.reason
    assert len(outcome.stdout) <= LIMITS.output_bytes


def test_nothing_came_out(bait, attempts):
    assert len(attempts) == len(ESCAPES) > 50
    assert_untouched(bait)


@pytest.mark.slow
def test_nothing_comes_out_of_a_sandbox_without_namespaces(bait, monkeypatch):
    """As in most containers. What only a memory file system and a user namespace bound is bounded by time."""
    if not {"landlock", "seccomp"} <= {*try_layers().used}:
        pytest.skip("this machine lacks Landlock or seccomp")
    monkeypatch.setattr("deepen.evaluation.sandbox.run.require_layers", lambda words: ("landlock", "seccomp"))
    passed = {name for name, outcome in attempt(bait).items() if outcome.status in {"passed", "error"}}
    assert passed <= {"fill the disk", "thread bomb"}
    assert_untouched(bait)


def assert_untouched(bait):
    with pytest.raises(BlockingIOError):
        bait.port.accept()
    with pytest.raises(BlockingIOError):
        bait.datagrams.recv(1)
    assert os.listdir(bait.home) == [".secret"]
    assert bait.victim.poll() is None


def test_the_escapes_escape_without_a_sandbox(bait, tmp_path):
    """Where nothing confines them, the attempts succeed: what fails in the sandbox fails because of it."""
    for name in ("read a secret", "read a secret through a symlink", "execute a shell"):
        source = ESCAPES[name][1].replace("{{secret}}", str(bait.home / ".secret"))
        command = [sys.executable, "-I", "-S", "-c", f"{source}\nprint(attempt())"]
        with open(os.devnull) as descriptor:
            done = subprocess.run(
                command, cwd=tmp_path, stdin=descriptor, stdout=subprocess.PIPE, text=True, check=True
            )
        assert done.stdout == "escaped\n"


def test_the_checks_decide():
    good, bad, broken = (
        ADD,
        Program(**{**vars(ADD), "source": "def add(a, b):\n    return a - b\n"}),
        Program(**{**vars(ADD), "source": "def add(a, b)\n    return a + b\n"}),
    )
    outcomes = run_programs([good, bad, broken], LIMITS)
    assert outcomes[0] == Outcome(name="add", status="passed")
    assert outcomes[1].status == outcomes[2].status == "failed"
    assert outcomes[1].reason == "AssertionError at `assert add(1, 2) == 3`"
    assert outcomes[2].reason.startswith("SyntaxError: expected ':'")


@pytest.mark.parametrize(
    ("source", "status", "reason"),
    [
        ("", "failed", "NameError: the program defines no 'f' at `f()`"),
        ("def f(): raise KeyError('k')", "failed", "KeyError: \"'k'\" at `f()`"),
        ("class Odd(Exception): pass\ndef f(): raise Odd('so')", "failed", "Odd: so at `f()`"),
        ("def f(): raise SystemExit", "failed", "SystemExit at `f()`"),
        ("def f(): open('/etc/passwd', 'w')", None, ""),
        (
            "x = object()\ndef f(): raise ValueError(x)",
            "failed",
            "ValueError: <object object at 0x…> at `f()`",
        ),
        ("import os\nos._exit(3)", "failed", "ended before its checks did, with exit code 3"),
        ("import os\nos.kill(os.getpid(), 11)", "failed", "died of signal SIGSEGV"),
    ],
)
def test_reasons(source, status, reason):
    (outcome,) = run_programs([Program(name="f", source=source, entry_points=("f",), checks="f()")], LIMITS)
    assert outcome.status == status or (status is None and outcome.status in {"failed", "blocked"})
    assert outcome.reason.startswith(reason)


def test_an_answer_and_the_output_come_back():
    function = Program(
        name="a", source="def solution():\n    print('hm')\n    return {1: (2.5, {3})}", answer=("solution",)
    )
    variable = Program(name="b", source="y = 7\nx = 2 ** 100\n", answer=("none", "x", "y"))
    script = Program(name="c", source="if __name__ == '__main__':\n    print('run', input)", main=True)
    first, second, third = run_programs([function, variable, script], LIMITS)
    assert (first.value, first.stdout) == ({1: (2.5, {3})}, "hm\n")
    assert second.value == 2**100
    assert (third.passed, third.value, third.stdout) == (True, None, "run <built-in function input>\n")


PERSONAL = """
import os, random, sys
def f():
    return [hash("text"), random.random(), sorted(os.environ), os.listdir("."), sys.argv]
"""


def test_outcomes_do_not_depend_on_order_or_company():
    programs = [Program(name=str(i), source=PERSONAL, answer=("f",)) for i in range(3)]
    programs += [ADD, Program(name="loud", source="print('x' * 10**6)"), Program(name="no", source="1 / 0")]
    heard = []
    alone = run_programs(
        programs, LIMITS, workers=1, on_result=lambda program, outcome: heard.append((program, outcome))
    )
    backwards = run_programs(programs[::-1], LIMITS, workers=4)
    assert alone == backwards[::-1]
    assert alone[0].value == alone[1].value
    assert alone[0].value[3:5] == [[], ["program"]]
    assert [program.name for program, _ in heard] == [program.name for program in programs]
    assert [outcome for _, outcome in heard] == alone
    assert len(alone[4].stdout) == LIMITS.output_bytes


def test_stopping_ends_what_runs():
    programs = [ADD, *(Program(name="sleep", source="import time\ntime.sleep(50)") for _ in range(5))]
    started = time.monotonic()

    def stop(program, outcome):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_programs(programs, LIMITS, workers=2, on_result=stop)
    assert time.monotonic() - started < 30


def test_packages_only_when_asked_for():
    program = Program(name="numpy", source="import numpy\nanswer = numpy.arange(3) * 2", answer=("answer",))
    (without,) = run_programs([program], LIMITS)
    assert without.reason.startswith("ModuleNotFoundError")
    (outcome,) = run_programs([program], Limits(site_packages=True))
    assert outcome.value == [0, 2, 4]


def test_every_layer_that_the_machine_has_stops_what_it_should(monkeypatch):
    found = {layer.name: layer for layer in try_layers().layers}
    if found["seccomp"].holds:
        assert set(found["seccomp"].stops) >= {NETWORK, SIGNALS, PROCESSES}
    if found["landlock"].holds:
        assert set(found["landlock"].stops) >= {READING}
    if found["namespaces"].holds:
        assert set(found["namespaces"].stops) == {NETWORK, READING, WRITING, SIGNALS}
    text = describe_layers()
    assert all(name in text for name in (*found, "limits", "open"))
    assert set(try_layers().stops) >= {NETWORK, READING, WRITING, SIGNALS}


@pytest.mark.skipif(shutil.which("bwrap") is None, reason="bwrap is not installed")
def test_bubblewrap():
    layer = layers._judge(*layers._try("bubblewrap"), {NETWORK, READING, WRITING, SIGNALS})
    assert layer.holds, layer.why_not
    assert set(layer.stops) == {NETWORK, READING, WRITING, SIGNALS}


@pytest.fixture
def bare(monkeypatch):
    """A machine whose kernel has no layer to offer."""
    monkeypatch.setattr(layers, "_unavailable", lambda name: "not on this system")
    found = layers._tried.__wrapped__()
    monkeypatch.setattr(layers, "try_layers", lambda: found)
    return found


def test_without_a_layer_it_refuses_unless_told_in_words(bare):
    assert (bare.used, bare.missing) == ((), (NETWORK, READING, WRITING, SIGNALS))
    with pytest.raises(SandboxError, match="leaves open network, reading files outside"):
        run_programs([ADD], LIMITS)
    with pytest.raises(SandboxError):
        run_programs([ADD], LIMITS, allow_unprotected="yes")
    assert "absent: not on this system" in describe_layers()
    bad = Program(
        name="no",
        source="def attempt():\n    import os\n    os._exit(0)",
        entry_points=("attempt",),
        checks=CHECKS,
    )
    endless = Program(name="loop", source=ESCAPES["endless loop"][1])
    outcomes = run_programs([ADD, bad], LIMITS, allow_unprotected=UNPROTECTED)
    outcomes += run_programs([endless], Limits(cpu_seconds=1), allow_unprotected=UNPROTECTED)
    assert outcomes[-1].reason == "used more than 1 s of processor time"
    assert [outcome.status for outcome in outcomes] == ["passed", "failed", "timeout"]


def test_without_a_layer_what_is_left_behind_is_killed_all_the_same(tmp_path):
    source = (
        ESCAPES["daemon that stays"][1].replace("{{home}}", str(tmp_path)).replace("sleep(3)", "sleep(1)")
    )
    program = Program(name="daemon", source=source, entry_points=("attempt",), checks=CHECKS)
    assert launch(program, LIMITS, (), Running()).passed
    time.sleep(1.3)
    assert not os.listdir(tmp_path)


def test_a_layer_that_breaks_is_an_error_and_not_an_open_door(monkeypatch):
    outcome = launch(ADD, LIMITS, ("namespaces",), Running())
    assert outcome.passed
    monkeypatch.setattr("deepen.evaluation.sandbox.launch.readable_paths", lambda limits: ["/no/such/place"])
    outcome = launch(ADD, LIMITS, ("namespaces",), Running())
    assert outcome.status == "error"
    assert "could not be set up" in outcome.reason


def test_a_protection_says_what_is_missing():
    protection = Protection(layers=(), used=("seccomp",), stops=(), open=(READING, PROCESSES), limits=())
    assert protection.missing == (READING,)
