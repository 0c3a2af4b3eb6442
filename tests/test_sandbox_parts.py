"""The parts of the sandbox that need no process: its messages, its filter, its verdicts."""

import math
import re
import struct
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepen.evaluation.sandbox.inside import codec, frames
from deepen.evaluation.sandbox.inside.seccomp import build
from deepen.evaluation.sandbox.inside.system_calls import ARCHITECTURES, FATAL, NUMBERS, REFUSED, number
from deepen.evaluation.sandbox.inside.verdict import Ending, settle

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False),
    st.complex_numbers(allow_nan=False),
    st.text(),
    st.binary(),
    st.fractions(),
)
PLAIN = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner),
        st.lists(inner).map(tuple),
        st.sets(SCALARS),
        st.frozensets(SCALARS),
        st.dictionaries(SCALARS, inner),
    ),
    max_leaves=20,
)


def types_of(value):
    if isinstance(value, list | tuple):
        return [type(value), *map(types_of, value)]
    if isinstance(value, dict):
        return [dict, *((types_of(key), types_of(item)) for key, item in value.items())]
    return type(value)


@settings(max_examples=25, deadline=None)
@given(PLAIN)
def test_plain_data_crosses_unchanged(value):
    copy = codec.decode(codec.encode(value))
    assert copy == value
    assert types_of(copy) == types_of(value)


@settings(max_examples=60, deadline=None)
@given(st.one_of(st.binary(), st.recursive(st.text() | st.integers(), st.lists).map(str).map(str.encode)))
def test_hostile_bytes_are_refused_or_plain(data):
    try:
        value = codec.decode(data)
    except ValueError:
        return
    assert type(value).__module__ in {"builtins", "fractions", "decimal", codec.__name__}


@pytest.mark.parametrize(
    "text",
    [
        '["system", "id"]',
        '["list"]',
        '["list", 3]',
        '["int", "x"]',
        '["set", [["list", []]]]',
        "[[], 1]",
        "[" * 10**5,
        "{}x",
    ],
)
def test_what_is_no_message_is_refused(text):
    with pytest.raises(ValueError, match="not a message"):
        codec.decode(text.encode())


def test_subclasses_iterators_and_numbers():
    from collections import Counter, deque, namedtuple

    class Lying(int):
        def __eq__(self, other):
            return True

        __hash__ = int.__hash__

    pair = namedtuple("pair", "a b")
    value = [
        Counter("aa"),
        pair(1, 2),
        deque([1]),
        range(2),
        Lying(3),
        {1: 2}.keys(),
        Decimal("0.1"),
        math.inf,
    ]
    copy = codec.decode(codec.encode(value))
    assert copy == [{"a": 2}, (1, 2), [1], range(2), 3, {1}, Decimal("0.1"), math.inf]
    assert {type(item) for item in copy} == {dict, tuple, list, range, int, set, Decimal, float}
    assert list(codec.decode(codec.encode(x for x in range(3)))) == [0, 1, 2]
    assert codec.decode(codec.encode(Fraction(1, 3))) == Fraction(1, 3)


def test_of_other_objects_only_their_truth_crosses():
    class Equal:
        def __eq__(self, other):
            return True

        __hash__ = object.__hash__

    class Empty:
        def __len__(self):
            return 0

    whole, empty = codec.decode(codec.encode(codec.decode(codec.encode([Equal(), Empty()]))))
    assert (bool(whole), bool(empty)) == (True, False)
    assert whole != 1
    assert whole != Equal.__new__(type("Plain", (), {}))
    assert repr(whole) == "<an object of type Equal>"


def test_frames(tmp_path):
    assert frames.complete(frames.pack(b"abc") + b"more") == b"abc"
    assert frames.complete(frames.pack(b"abc")[:-1]) is None
    assert frames.complete(b"") is None


def decide(filter_, audit, call, arguments=(0,)):
    """Run a classic BPF filter as the kernel does (Documentation/networking/filter.rst)."""
    data = struct.pack("<IIQ6Q", call, audit, 0, *arguments, *[0] * (6 - len(arguments)))
    at, accumulator = 0, 0
    while True:
        operation, yes, no, constant = filter_[at]
        at += 1
        if operation == 0x06:
            return constant
        if operation == 0x20:
            (accumulator,) = struct.unpack_from("<I", data, constant)
            continue
        truth = {0x15: accumulator == constant, 0x25: accumulator > constant, 0x45: accumulator & constant}
        at += yes if truth[operation] else no


ALLOW, KILL, EPERM, ENOSYS = 0x7FFF0000, 0x80000000, 0x00050001, 0x00050026
READ = {"x86_64": 0, "aarch64": 63}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_filter_decides(name):
    architecture = ARCHITECTURES[name]
    filter_ = build(architecture, 42)

    def of(call, *arguments):
        code = call if isinstance(call, int) else number(call, architecture)
        return decide(filter_, architecture.audit, code, arguments or (0,))

    for kind, action in ((FATAL, KILL), (REFUSED, EPERM)):
        assert {of(call) for call in kind if number(call, architecture) is not None} == {action}
    assert of(READ[name]) == ALLOW
    assert (of("clone", 0x10F00), of("clone", 17), of("clone", 0x10000000)) == (ALLOW, EPERM, EPERM)
    assert (of("kill", 42), of("kill", 41), of("kill", 2**64 - 1), of("kill", 2**32 + 42)) == (
        ALLOW,
        EPERM,
        EPERM,
        EPERM,
    )
    assert (of("tgkill", 42, 7), of("tgkill", 1, 7)) == (ALLOW, EPERM)
    assert (of("prlimit64", 0), of("prlimit64", 42), of("prlimit64", 1)) == (ALLOW, ALLOW, EPERM)
    assert (of("prctl", 1), of("prctl", 15)) == (EPERM, ALLOW)
    assert (of("clone3"), of("memfd_create"), of(451), of(2**30 + 41)) == (ENOSYS,) * 4
    assert decide(filter_, 0x40000003, READ[name]) == KILL  # i386


HEADERS = {
    0: Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h"),
    1: Path("/usr/include/asm-generic/unistd.h"),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_numbers_are_the_kernels(name):
    column = ARCHITECTURES[name].column
    if not HEADERS[column].is_file():
        pytest.skip(f"no {HEADERS[column]}")
    found = dict(re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", HEADERS[column].read_text()))
    assert {call: columns[column] for call, columns in NUMBERS.items()} == {
        call: found.get(call, "-") for call in NUMBERS
    }


@pytest.mark.parametrize(
    ("code", "cpu", "timed_out", "status"),
    [
        (0, 0.1, False, "failed"),
        (3, 0.1, False, "failed"),
        (-9, 9.5, False, "timeout"),
        (137, 9.5, False, "timeout"),
        (152, 9.5, False, "timeout"),
        (137, 0.1, False, "memory"),
        (-9, 0.1, True, "timeout"),
        (159, 0.1, False, "blocked"),
        (-25, 0.1, False, "blocked"),
        (139, 0.1, False, "failed"),
        (None, 0.1, False, "failed"),
    ],
)
def test_a_lost_program_is_told_by_its_end(code, cpu, timed_out, status):
    ending = Ending(code=code, cpu_seconds=cpu, timed_out=timed_out)
    limits = {"cpu_seconds": 10, "wall_seconds": 30, "file_bytes": 1}
    assert settle({"status": "lost"}, ending, limits)["status"] == status


def test_no_verdict_is_never_a_pass():
    ending = Ending(code=0, cpu_seconds=0, timed_out=False)
    assert settle(None, ending, {})["status"] == "failed"
