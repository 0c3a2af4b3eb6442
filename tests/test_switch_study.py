"""Studies whose rows measure a switch: keys, the table of its own, pages."""

import json
from pathlib import Path

import numpy as np
import pytest
from test_studies import RATES, SEEDS, recipe
from test_studies import place as place  # the fixture
from test_studies import traceable as traceable
from test_surface import load_generate

from deepen.errors import RecipeError
from deepen.evaluation.statistics import paired_difference
from deepen.pipeline.reporter import Silent
from deepen.records import StudyRecord, SwitchEvaluation, read_record
from deepen.report.study import study_table
from deepen.report.study_switch import switched_table, switched_tables
from deepen.studies import engine
from deepen.studies.engine import Share
from deepen.studies.study import collect_study, compute_study, open_study

ROOT = Path(__file__).parents[1]
PROMPT = 8
METHODS = {
    "blocks": {"expand": {"blocks": 1}, "switch": {"prompt_tokens": PROMPT}},
    "full": {"train": {"method": "full"}},
}


@pytest.fixture(scope="module")
def study(place):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "traceable_code", lambda: "c0ffee")
        path = recipe(place, methods=METHODS, match=None, learning_rates=[5e-3])
        study = open_study("baselines", path, None)
        compute_study(study, Share(), Silent())
        return study


def test_a_row_with_a_switch_is_pooled_from_its_cells(study):
    record = collect_study(study)
    assert [row.row for row in record.rows] == ["blocks", "full"]
    (found,) = record.switched
    assert (found.row, found.beside, found.prompt_tokens) == ("blocks + switch", "blocks", PROMPT)
    assert (found.seeds, found.cells) == (SEEDS, record.rows[0].cells)
    cells = [
        read_record(study.store.study / cell / "evaluation/switch.json", SwitchEvaluation)
        for cell in found.cells
    ]
    for at, score in ((0, found.always_domain), (1, found.domain_score)):
        items = [{text.task: text.items for text in cell.rows[at].texts}["heldout"] for cell in cells]
        tokens = np.array(items[0].tokens)
        nll = np.mean([each.nll for each in items], axis=0)
        wanted = paired_difference(nll, items[0].base_nll, tokens)
        assert score.delta == pytest.approx((nll - items[0].base_nll).sum() / tokens.sum())
        assert (score.ci_low, score.ci_high) == (wanted.ci_low, wanted.ci_high)
        each = [{m.task: m for m in cell.rows[at].metrics}["heldout"].delta for cell in cells]
        assert score.seed_deltas == pytest.approx(each)
        assert score.texts == ["heldout"]
        assert score.tokens == tokens.sum() < record.rows[0].domain_score.tokens
    assert found.general.texts == found.always_general.texts == ["general"]
    for text, errors in (("general", found.general_errors), ("heldout", found.domain_errors)):
        tallies = [tally for cell in cells for tally in cell.tallies if tally.text == text]
        assert errors.wrong == sum(tally.wrong for tally in tallies)
        assert errors.decided == sum(tally.prompts for tally in tallies) > 0
    assert found.cost > 2, "one pass with the base, one with a pack that has more blocks"


def test_pages_and_terminal_show_it_beside_the_table(study):
    record = read_record(study.store.study / "study.json", StudyRecord)
    page = (study.store.study / "report.html").read_text()
    errors = record.switched[0].domain_errors
    for words in ("blocks + switch", f"{errors.wrong} of {errors.decided}", "behind the first 8 tokens"):
        assert page.count(words) == 1
    assert switched_table(record).row_count == study_table(record).row_count == 2
    docs = load_generate().filled_pages.__globals__["_domain"](record, "some-study", "words")
    assert "\n| blocks + switch | " in docs
    assert "behind the first 8 tokens of each window" in docs
    one, other = (
        row.model_copy(update={"prompt_tokens": n})
        for n, row in ((4, *record.switched), (9, *record.switched))
    )
    several = record.model_copy(update={"switched": [other, one, other]})
    assert [len(group) for group in switched_tables(several, "words")] == [1, 2]


def test_a_study_without_a_switch_says_nothing_of_it(study):
    record = collect_study(study).model_copy(update={"switched": []})
    held = json.loads(record.model_dump_json())
    del held["switched"]
    assert StudyRecord.model_validate(held) == record


def test_only_rows_with_a_switch_have_other_keys(place, study):
    plain = {name: {k: v for k, v in row.items() if k != "switch"} for name, row in METHODS.items()}
    path = recipe(place, methods=plain, match=None, learning_rates=[5e-3])
    keys = [[slot.cell.key for slot in each.slots()] for each in (study, open_study("baselines", path, None))]
    assert [a == b for a, b in zip(*keys, strict=True)] == [False, False, True, True]


def test_a_shipped_study_has_the_keys_it_always_had(tmp_path):
    """Those of cells computed before there was a switch: they are not computed again."""
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "one two three"}\n' * 3)

    def named(name):
        return json.dumps([{"name": name, "path": str(text)}])

    parts = {"sources": "python", "tuning": "python-tuning", "reported": "python-reported"}
    domain = ", ".join(f"{part}: {named(name)}" for part, name in parts.items())
    settings = [f"run.base={ROOT}/src/deepen/demo/base", f"run.evaluate.general={named('docstrings')}"]
    settings += [f"run.data.cache={tmp_path}/cache", f"domains={{python: {{{domain}}}}}"]
    path = ROOT / "recipes/studies/baselines-small.yaml"
    grid = open_study("baselines", path, tmp_path / "study", settings).grid
    found = {place.row.label: grid.cell(place, RATES[0], 0).key for place in grid.places}
    assert found["blocks-interleaved"] == "0ae59f5d128c"
    assert found["lora"] == "e2928c321c20"


def test_a_row_that_has_no_new_blocks_has_no_switch(place, tmp_path):
    methods = {"full": {"train": {"method": "full"}, "switch": {}}}
    path = recipe(place, methods=methods, match=None)
    with pytest.raises(RecipeError, match="full in words: evaluate: switch is about new blocks"):
        open_study("baselines", path, tmp_path)
