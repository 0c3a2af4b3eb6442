"""Scores are those that the reference libraries gave, recorded.

rouge-score 0.1.2; rouge 1.0.1 and fuzzywuzzy 0.18.0 (both TRACE's), thefuzz 0.22.1 and rapidfuzz 3.14; SARI
by the code of Hugging Face's evaluate on sacrebleu 2.6.
"""

import math

import pytest

from deepen.errors import EvaluationError
from deepen.evaluation import answers
from deepen.evaluation.answers import Answer, score_answers
from deepen.evaluation.sari import sari

BILL = Answer(
    "Those in favor of filing Bill 119111 relating to fees , the council approves it .",
    "The council approved Bill 119111, relating to fees.",
    "The Council approved the bill. It relates to fees and charges.",
)
POLICE = Answer(
    "Eine Frau ist am gestrigen Abend in Zürich von zwei Männern überfallen worden, nun sucht die Polizei "
    "nach Zeugen.",
    "Eine Frau wurde gestern in Zürich überfallen. Die Polizei sucht Zeugen.",
    "Die Polizei sucht Zeugen. Eine Frau wurde überfallen.",
)
REVERSED = Answer("a b c d e", "a b c d", "d c b a")
SAME = Answer("same text here", "same text here", "same text here")
EMPTY = Answer("not empty at all .", "", "not empty")

# Answer, ROUGE-L of rouge-score, that of rouge, SARI of evaluate.
TEXTS = {
    "bill": (BILL, 0.631578947368421, 0.42105262670360116, 0.5765211640211639),
    "police": (POLICE, 0.4, 0.8421052582825486, 0.8033728111127493),
    "reversed": (REVERSED, 0.25, 0.24999999500000009, 0.5),
    "same": (SAME, 1.0, 0.999999995, 1.0),
    "empty": (EMPTY, 0.0, 0.0, 0.6958333333333333),
}
# Given, wanted, rapidfuzz.fuzz.ratio; thefuzz and fuzzywuzzy give its nearest whole number.
CODE = {
    "a name": (
        "self . assertEqual ( x , <NUM_LIT:1> )",
        "self . assertEquals ( y , 1 ) ",
        93.10344827586206,
        93,
    ),
    "literals": ("return '<STR_LIT:abc>' + '<STR_LIT>'", "return 'abc' + ''", 100.0, 100),
    "empty": ("", ") ", 0.0, 0),
    "imports": ("import os", "from sys import path", 48.27586206896552, 48),
    "a number": ("x = <NUM_LIT>", "x = 0", 100.0, 100),
}


def one(answer, metric, scoring="standard"):
    return score_answers([answer], metric, scoring)[0]


@pytest.mark.parametrize("name", TEXTS)
def test_texts_score_as_the_libraries_do(name):
    answer, rouge_l, _, simplified = TEXTS[name]
    assert one(answer, "rouge_l") == pytest.approx(rouge_l, abs=1e-12)
    assert one(answer, "sari") == one(answer, "sari", "trace") == pytest.approx(simplified, abs=1e-12)


@pytest.mark.parametrize("name", TEXTS)
def test_traces_rouge_l_is_another_one(name):
    pytest.importorskip("rouge")
    answer, _, rouge_l, _ = TEXTS[name]
    assert one(answer, "rouge_l", "trace") == pytest.approx(rouge_l, abs=1e-12)


def test_a_package_that_is_missing_is_named(monkeypatch):
    def missing(module):
        raise ModuleNotFoundError(module)

    monkeypatch.setattr(answers, "import_module", missing)
    with pytest.raises(EvaluationError, match="needs the package rouge: pip install rouge"):
        one(BILL, "rouge_l", "trace")


def test_sari_of_several_references_is_that_of_evaluates_own_example():
    wanted = [
        "About 95 species are currently known .",
        "About 95 species are now accepted .",
        "95 species are now accepted .",
    ]
    found = sari("About 95 species are currently accepted .", "About 95 you now get in .", wanted)
    assert 100 * found == pytest.approx(26.953601953601954, abs=1e-10)


@pytest.mark.parametrize("name", CODE)
def test_code_is_compared_as_the_libraries_do(name):
    given, wanted, ratio, whole = CODE[name]
    answer = Answer("", given, wanted)
    assert 100 * one(answer, "edit_similarity") == pytest.approx(ratio, abs=1e-10)
    assert one(answer, "edit_similarity", "trace") == whole / 100


# Metric, given, wanted, standard score, TRACE's score.
MATCHES = [
    ("accuracy", "A", "A", 1.0, 1.0),
    ("accuracy", " A\n", "A", 1.0, 0.0),
    ("accuracy", "A.", "A", 0.0, 0.0),
    ("accuracy", "", "", 1.0, 0.0),
    ("choice", "B because", "B\nA clause …", 1.0, 1.0),
    ("choice", " B", "B", 1.0, 0.0),
    ("choice", "C", "B", 0.0, 0.0),
    ("choice", "", "B", 0.0, 0.0),
]


@pytest.mark.parametrize(("metric", "given", "wanted", "standard", "trace"), MATCHES)
def test_exact_matches(metric, given, wanted, standard, trace):
    answer = Answer("", given, wanted)
    assert [one(answer, metric), one(answer, metric, "trace")] == [standard, trace]


@pytest.mark.parametrize("metric", ["accuracy", "choice", "rouge_l", "edit_similarity", "sari"])
def test_every_score_lies_between_0_and_1(metric):
    found = score_answers([BILL, POLICE, REVERSED, SAME, EMPTY], metric)
    assert len(found) == 5
    assert all(0 <= value <= 1 and math.isfinite(value) for value in found)
