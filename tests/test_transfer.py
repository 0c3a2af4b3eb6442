import json
from pathlib import Path

import pytest

from deepen.records.transfer import backward_transfer, forward_transfer, overall_performance

PUBLISHED = json.loads((Path(__file__).parent / "published" / "trace-matrices.json").read_text())
MATRICES = PUBLISHED["matrices"]


# Printed beside this table is -0.457, of which its own scores make -0.458.
DISAGREES = {"LoRA, LLaMA2-7B-chat (Table 13)": -0.458}
ROUNDING = 0.0005 + 1e-9


@pytest.mark.parametrize("name", MATRICES)
def test_figures_are_those_that_trace_prints(name):
    table = MATRICES[name]
    bwt = DISAGREES.get(name, table["bwt"])
    assert overall_performance(table["R"]) == pytest.approx(table["op"], abs=ROUNDING)
    assert backward_transfer(table["R"]) == pytest.approx(bwt, abs=ROUNDING)


def test_one_printed_value_disagrees_with_its_own_table():
    off = {
        name: round(backward_transfer(table["R"]) - table["bwt"], 6)
        for name, table in MATRICES.items()
        if abs(backward_transfer(table["R"]) - table["bwt"]) > ROUNDING
    }
    assert off == dict.fromkeys(DISAGREES, -0.001)


def test_dividing_by_all_tasks_would_not_give_what_is_printed():
    off = [
        abs(backward_transfer(table["R"]) * 7 / 8 - table["bwt"])
        for table in MATRICES.values()
        if abs(table["bwt"]) > 0.05
    ]
    assert len(off) == 3
    assert min(off) > 0.005


def test_figures_by_hand():
    scores = [[0.5, None, None], [0.25, 0.75, None], [0.75, 0.5, 1.0]]
    assert overall_performance(scores) == 0.75
    assert backward_transfer(scores) == 0.0  # +0.25 and -0.25
    assert forward_transfer([0.0, 0.5, 0.75], [0.0, 0.25, 0.25]) == 0.375


def test_one_task_has_nothing_to_transfer():
    assert overall_performance([[0.5]]) == 0.5
    assert backward_transfer([[0.5]]) is None
    assert forward_transfer([0.5], [0.5]) is None


@pytest.mark.parametrize(
    "scores", [[], [[1.0, None]], [[None]], [[1.0, None], [None, 1.0]], [[1.0, None], [1.0]]]
)
def test_what_is_no_matrix_is_refused(scores):
    with pytest.raises(ValueError, match="R has"):
        backward_transfer(scores)


def test_forward_transfer_needs_the_base_on_every_task():
    with pytest.raises(ValueError, match="2 scores before training and 1"):
        forward_transfer([0.1, 0.2], [0.1])
