import math
from dataclasses import replace

import numpy as np
import pytest
from run_directory import PROVENANCE, items, text, write_run

from deepen.data.evaluation_text import EvaluationText
from deepen.errors import DataError
from deepen.evaluation import build_record, compare_runs, nats_per_token, paired_difference
from deepen.evaluation.verdict import holm


def evaluation_text(task, role, documents, lengths, sizes):
    windows = [np.zeros(length + 1, dtype=np.int64) for length in lengths]
    return EvaluationText(
        task=task, role=role, windows=windows, document=documents, bytes=sizes, digest=f"digest of {task}"
    )


def build(texts, nll, base_nll):
    return build_record(texts, nll, base_nll, model="a run", base="a base", provenance=PROVENANCE)


@pytest.fixture
def many():
    """40 documents of one or two windows."""
    generator = np.random.default_rng(0)
    documents = sorted([*range(40), *range(0, 40, 2)])
    lengths = generator.integers(5, 50, len(documents)).tolist()
    sizes = generator.integers(10, 200, len(documents)).tolist()
    return evaluation_text("many", "domain", documents, lengths, sizes)


def scores(each, seed):
    return np.random.default_rng(seed).gamma(9, 1, len(each.windows))


def test_items_are_documents_where_there_are_enough(many):
    nll, base = scores(many, 1), scores(many, 2)
    record = build([many], {"many": nll}, {"many": base})
    found = record.texts[0].items
    assert (found.unit, len(found.nll)) == ("document", 40)
    both = [index for index, document in enumerate(many.document) if document == 4]
    assert len(both) == 2
    assert found.nll[4] == pytest.approx(nll[both].sum())
    assert found.base_nll[4] == pytest.approx(base[both].sum())
    assert found.bytes[4] == sum(many.bytes[index] for index in both)
    assert sum(found.tokens) == many.tokens
    assert record.texts[0].digest == many.digest


def test_items_are_windows_otherwise():
    few = evaluation_text("few", "general", [0, 0, 0, 1, 1], [9, 9, 4, 9, 2], [30, 31, 12, 33, 5])
    record = build([few], {"few": scores(few, 1)}, {"few": scores(few, 2)})
    found = record.texts[0].items
    assert (found.unit, found.tokens, found.bytes) == ("window", [9, 9, 4, 9, 2], few.bytes)
    np.testing.assert_allclose(found.nll, scores(few, 1))


def test_both_metrics_of_every_text(many):
    nll, base = scores(many, 1), scores(many, 2)
    record = build([many], {"many": nll}, {"many": base})
    nats, bits = record.metrics
    assert [metric.metric for metric in record.metrics] == ["nats_per_token", "bits_per_byte"]
    assert nats.value == pytest.approx(nll.sum() / many.tokens)
    assert bits.value == pytest.approx(nll.sum() / math.log(2) / sum(many.bytes))
    assert bits.base_value == pytest.approx(base.sum() / math.log(2) / sum(many.bytes))
    assert (nats.task, nats.role, nats.n) == ("many", "domain", 40)
    found = record.texts[0].items
    expected = paired_difference(found.nll, found.base_nll, found.tokens)
    for name in ("value", "stderr", "base_value", "delta", "ci_low", "ci_high"):
        assert getattr(nats, name) == getattr(expected, name)


def test_without_a_base_there_is_no_difference(many):
    record = build([many], {"many": scores(many, 1)}, None)
    assert record.texts[0].items.base_nll is None
    for metric in record.metrics:
        assert metric.stderr > 0
        assert metric.base_value is metric.delta is metric.ci_low is metric.ci_high is None


def test_the_mean_loss_for_the_log(many):
    nll = scores(many, 1)
    assert nats_per_token([many], {"many": nll}) == {"many": pytest.approx(nll.sum() / many.tokens)}


def texts(general, domain, **changes):
    return [
        text("stories", "general", items(1.5, general)),
        text("code", "domain", items(3.0, domain, seed=1, **changes)),
    ]


@pytest.fixture
def runs(tmp_path):
    return [
        write_run(tmp_path / "blocks", texts(0.02, -1.0)),
        write_run(tmp_path / "full", texts(0.4, -1.2), method="full"),
    ]


def test_rows_are_the_base_then_each_run(runs):
    found = compare_runs(runs)
    assert [row.label for row in found.rows] == ["base", "blocks", "full"]
    columns = [(column.name, column.role) for column in found.columns]
    assert columns == [("stories", "general"), ("code", "domain")]
    assert [row.method for row in found.rows] == [None, "blocks", "full"]
    assert [row.label for row in compare_runs(runs, ["a", "b"]).rows] == ["base", "a", "b"]


def test_differences_are_paired_from_the_base_and_from_the_first_run(runs):
    found = compare_runs(runs)
    ours, theirs = texts(0.02, -1.0)[1].items, texts(0.4, -1.2)[1].items
    base, first, second = (row.cells[1] for row in found.rows)
    assert base.value == pytest.approx(sum(ours.base_nll) / sum(ours.tokens))
    assert base.from_base is base.from_first is first.from_first is None
    from_base = paired_difference(theirs.nll, theirs.base_nll, theirs.tokens)
    assert second.value == from_base.value
    assert (second.from_base.delta, second.from_base.ci_low) == (from_base.delta, from_base.ci_low)
    from_first = paired_difference(theirs.nll, ours.nll, ours.tokens)
    assert (second.from_first.delta, second.from_first.ci_high) == (from_first.delta, from_first.ci_high)
    assert second.from_first.delta == pytest.approx(second.value - first.value)


def test_several_texts_of_a_role_are_also_pooled(tmp_path):
    given = [*texts(0.02, -1.0), text("maths", "domain", items(4.0, -2.0, n=30, seed=7))]
    found = compare_runs([write_run(tmp_path / "run", given)])
    assert [(column.name, column.pooled) for column in found.columns] == [
        ("stories", True), ("all domain", True), ("code", False), ("maths", False),
    ]  # fmt: skip
    pooled = found.rows[1].cells[1]
    nll = sum(given[1].items.nll) + sum(given[2].items.nll)
    assert pooled.value == pytest.approx(nll / (sum(given[1].items.tokens) + sum(given[2].items.tokens)))
    assert found.columns[1].n == 90


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (lambda: [text("other", "general", items(1.5, 0))], "not evaluated on the same texts.*code, other"),
        (
            lambda: [texts(0, -1)[0], texts(0, -1)[1].model_copy(update={"digest": "another"})],
            "not evaluated on the same texts.*code",
        ),
        (lambda: texts(0, -1, n=59), "code is not cut into the same items"),
        (
            lambda: [texts(0, -1)[0], text("code", "domain", items(3.2, -1, seed=1))],
            "its base scores code otherwise",
        ),
    ],
)
def test_what_cannot_be_paired_is_refused(runs, tmp_path, other, said):
    odd = write_run(tmp_path / "odd", other())
    with pytest.raises(DataError, match=said) as raised:
        compare_runs([*runs, odd])
    assert str(odd) in str(raised.value)


def test_texts_that_some_lack_are_left_out_and_named(runs, tmp_path):
    partly = write_run(tmp_path / "partly", texts(0.1, -1)[:1])
    found = compare_runs([*runs, partly])
    assert [column.name for column in found.columns] == ["stories"]
    assert found.left_out == [f"code: not evaluated in {partly}"]
    alone = compare_runs([runs[0], partly])
    assert alone.rows[1].cells[0].value == compare_runs(runs).rows[1].cells[0].value
    other = write_run(tmp_path / "other", texts(0.1, -1)[1:])
    with pytest.raises(DataError, match="no text or task was evaluated in all of them"):
        compare_runs([runs[0], partly, other])


def test_records_are_compared_as_runs_are(runs):
    found = compare_runs([runs[0], runs[1] / "evaluation" / "heldout.json"], ["a", "b"])
    whole = compare_runs(runs, ["a", "b"])
    assert found.rows[2].cells == whole.rows[2].cells
    assert (found.rows[2].method, found.rows[2].seconds) == (None, None)


def test_p_values_are_adjusted_over_runs_and_columns(runs, tmp_path):
    third = write_run(tmp_path / "third", texts(0.001, -1.001))
    rows = compare_runs([*runs, third]).rows[1:]
    for kind, count in (("from_base", 6), ("from_first", 4)):
        found = [each for row in rows for cell in row.cells if (each := getattr(cell, kind))]
        assert len(found) == count
        assert [each.p_holm for each in found] == holm([each.p for each in found])
        assert all(each.p_holm >= each.p for each in found)


def test_verdicts_and_p_values_of_texts(many):
    nll, other = scores(many, 1), scores(many, 3)
    second = replace(many, task="more", role="general")
    record = build([many, second], {"many": nll, "more": other}, {"many": nll + 1e-6, "more": other + 2.0})
    nats = [metric for metric in record.metrics if metric.metric == "nats_per_token"]
    assert [metric.p_holm for metric in nats] == holm([metric.p for metric in nats])
    assert [metric.verdict for metric in record.metrics] == ["kept"] * 4
    assert not any(metric.higher_is_better for metric in record.metrics)
    worse = build([many], {"many": nll + 2.0}, {"many": nll}).metrics
    assert [metric.verdict for metric in worse] == ["lost", "lost"]


def test_unfinished_or_unevaluated_runs_are_refused(runs, tmp_path):
    with pytest.raises(DataError, match="holds no evaluation"):
        compare_runs([*runs, write_run(tmp_path / "no", texts(0, -1), evaluated=False)])
    (runs[1] / "result.json").unlink()
    with pytest.raises(DataError, match=r"holds no finished run"):
        compare_runs(runs)
    with pytest.raises(DataError, match="no run given"):
        compare_runs([])
    with pytest.raises(DataError, match="1 labels for 2 runs"):
        compare_runs(runs, ["one"])
