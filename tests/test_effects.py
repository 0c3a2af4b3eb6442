"""What each new block does, against transformers' own hidden states, norms and heads."""

import json
import re

import numpy as np
import pytest
import torch
from family_table import LINES
from run_directory import write_run
from test_model_insert import move
from test_report import two_texts
from test_worth import trial as trial  # the fixture
from tiny_run import write_base, write_recipe

from deepen.cli import main
from deepen.config import load_recipe
from deepen.data.evaluation_text import EvaluationText
from deepen.demo.demo import BASE
from deepen.errors import RecipeError
from deepen.evaluation import effects
from deepen.evaluation.effects import describe_effects, measure_effects
from deepen.expansion import plan_layout
from deepen.model import expansion_of, insert_blocks, load
from deepen.model.lens import logit_lens
from deepen.pipeline.run import run_recipe
from deepen.records import EffectsRecord, read_record
from deepen.report import render_effects, write_report

HEADS = {
    "llama": lambda model, states: model.lm_head(model.model.norm(states)),
    "gemma2": lambda model, states: 30 * torch.tanh(model.lm_head(model.model.norm(states)) / 30),
    "cohere": lambda model, states: model.lm_head(model.model.norm(states)) * model.config.logit_scale,
    "gpt2": lambda model, states: model.lm_head(model.transformer.ln_f(states)),
}
FAMILIES = [line for line in LINES if line.name in HEADS]


def expanded(line, directory):
    """A model whose new blocks, one of them the last, have moved."""
    model = load(line.write(directory), dtype=torch.float32)
    insert_blocks(model, plan_layout(line.depth, after=[0, 1, line.depth - 1]))
    move(model)
    return model.eval()


def windows_of(lengths, words=96):
    draw = np.random.default_rng(0)
    return [draw.integers(words, size=length) for length in lengths]


def by_hand(line, model, index, window):
    """The columns of one window from transformers' hidden states; the last of those is normed already."""
    ids = torch.from_numpy(window)[None]
    head = HEADS[line.name]
    with torch.no_grad():
        found = model(ids[:, :-1], output_hidden_states=True, use_cache=False)
        states = found.hidden_states
        last = index + 1 == len(states) - 1
        below = head(model, states[index]).log_softmax(-1)[0]
        above = (found.logits if last else head(model, states[index + 1])).log_softmax(-1)[0]
        share = None
        if not last:
            share = ((states[index + 1] - states[index]).norm(dim=-1) / states[index].norm(dim=-1))[0]
    places = range(len(window) - 1), window[1:]
    return share, -below[places], -above[places], below.argmax(-1), above.argmax(-1)


@pytest.mark.parametrize("line", FAMILIES, ids=lambda line: line.name)
def test_equals_hidden_states_read_by_hand(line, tmp_path, monkeypatch):
    model = expanded(line, tmp_path / "base")
    monkeypatch.setattr(effects, "_WIDENED_LOGITS", 3 * 5 * 96)  # a few positions at a time
    windows = windows_of([12, 3, 1, 30, 12])
    indices = sorted(expansion_of(model).layout.new_indices)
    found = measure_effects(model, indices, windows)
    for index, effect in zip(indices, found, strict=True):
        hands = [by_hand(line, model, index, window) for window in windows if len(window) > 1]
        columns = [torch.cat(each).numpy() for each in list(zip(*hands, strict=True))[1:]]
        assert effect.before == pytest.approx(columns[0], abs=1e-4)
        assert effect.after == pytest.approx(columns[1], abs=1e-4)
        assert effect.first_before.tolist() == columns[2].tolist()
        assert effect.first_after.tolist() == columns[3].tolist()
        if hands[0][0] is not None:
            assert effect.share == pytest.approx(torch.cat([hand[0] for hand in hands]).numpy(), abs=1e-4)
    assert (found[0].first_before != found[0].first_after).any()


@pytest.mark.parametrize("line", FAMILIES, ids=lambda line: line.name)
def test_above_the_last_block_the_lens_is_the_model_to_the_bit(line, tmp_path):
    model = expanded(line, tmp_path / "base")
    ids = torch.from_numpy(np.stack(windows_of([9, 9])))
    blocks = model.get_submodule("transformer.h" if line.name == "gpt2" else "model.layers")
    kept = []
    hook = blocks[-1].register_forward_hook(
        lambda _, given, made: kept.append(made[0] if isinstance(made, tuple) else made)
    )
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        hook.remove()
        with logit_lens(model) as look:
            assert torch.equal(look(kept[0]), whole)
        assert torch.equal(model(ids, use_cache=False).logits, whole)  # nothing is left behind


def text_of(windows, task="text", role="general", counted=None):
    lengths = [len(window) for window in windows]
    return EvaluationText(
        task=task, role=role, windows=windows, document=list(range(len(windows))), bytes=lengths, digest="d",
        counted=counted,
    )  # fmt: skip


def decode(ids):
    return "".join(f" {number}" for number in ids).removeprefix(" ")


def test_a_block_that_changes_nothing_has_no_effect(tmp_path):
    line = FAMILIES[0]
    model = load(line.write(tmp_path / "base"), dtype=torch.float32)
    insert_blocks(model, plan_layout(line.depth, after=[1]))
    text = text_of(windows_of([9, 20]))
    ((found,),) = describe_effects([text], [measure_effects(model, [2], text.windows)], decode, most=3)
    assert (found.share, found.changed, found.loss.delta) == (0, 0, 0)
    assert [each.gain for each in found.tokens] == [0, 0, 0]


def test_the_summary_is_of_the_tokens_that_count():
    windows = [np.array([7, 5, 6, 5]), np.array([5, 8, 5])]
    columns = {
        "share": [0.5, 0.1, 0.3, 0.1, 9.0],
        "before": [3.0, 1.0, 2.0, 1.5, 9.0],
        "after": [1.0, 1.2, 2.5, 1.0, 0.0],
        "first_before": [1, 2, 3, 4, 9],
        "first_after": [5, 2, 3, 8, 9],
    }
    effect = effects.Effect(**{name: np.asarray(column) for name, column in columns.items()})
    counted = [np.array([True, True, True]), np.array([True, False])]
    ((found,),) = describe_effects([text_of(windows, counted=counted)], [[effect]], decode, most=2)
    assert (found.share, found.changed) == (pytest.approx(0.25), 0.5)
    assert (found.loss.base_value, found.loss.value) == (pytest.approx(7.5 / 4), pytest.approx(5.7 / 4))
    first, second = found.tokens
    # 5 gains 2 and loses 0.5; 8 gains 0.5; 6 loses 0.2.
    assert (first.token, first.count, first.gain) == (" 5", 2, pytest.approx(0.75))
    assert (first.context, first.context_gain, first.before, first.after) == ("7", 2, " 1", " 5")
    assert (second.token, second.count, second.context) == (" 8", 1, "5")


def test_the_command(trial, tmp_path, capsys):
    pack, general, domain = trial
    out, html = tmp_path / "effects.json", tmp_path / "effects.html"
    command = [
        "blocks",
        "effects",
        str(pack),
        "--base",
        str(BASE),
        "--text",
        general,
        "--domain-text",
        domain,
    ]
    assert main([*command, "--max-tokens", "150", "--out", str(out), "--html", str(html)]) == 0
    assert "nats" in capsys.readouterr().out
    record = read_record(out, EffectsRecord)
    assert [(block.block, [text.role for text in block.texts]) for block in record.blocks] == [
        (2, ["general", "domain"]),
        (6, ["general", "domain"]),
    ]
    page = html.read_text()
    assert page == render_effects(record)
    assert len(re.findall("<svg", page)) == 1
    assert page.count("<tr>") == 2 + 4 + sum(
        len(text.tokens) for block in record.blocks for text in block.texts
    )
    assert main([*command[:5]]) == 2
    assert "no text is given" in capsys.readouterr().err
    assert main([*command[:2], str(BASE), *command[5:]]) == 2


def test_a_run_measures_what_its_blocks_do(tmp_path):
    write_base(tmp_path / "base")
    recipe = load_recipe(write_recipe(tmp_path, evaluate__effects=True))
    run_recipe(recipe)
    record = read_record(tmp_path / "run" / "evaluation" / "effects.json", EffectsRecord)
    heldout = json.loads((tmp_path / "run" / "evaluation" / "heldout.json").read_text())
    assert list(record.tokens) == [text["task"] for text in heldout["texts"]]
    # The last block stands at the top: above it the loss is the model's.
    top = record.blocks[-1]
    losses = {
        each["task"]: each["value"] for each in heldout["metrics"] if each["metric"] == "nats_per_token"
    }
    for text in top.texts:
        assert text.loss.value == pytest.approx(losses[text.task], abs=1e-5)
    assert "What each new block does" in (tmp_path / "run" / "report.html").read_text()
    # The command reads a run's own texts, and its page shows what it finds.
    for name in ("evaluation/effects.json", "report.html"):
        (tmp_path / "run" / name).unlink()
    assert main(["blocks", "effects", str(tmp_path / "run"), "--max-tokens", "300"]) == 0
    again = read_record(tmp_path / "run" / "evaluation" / "effects.json", EffectsRecord)
    assert list(again.tokens) == list(record.tokens)
    assert "What each new block does" in (tmp_path / "run" / "report.html").read_text()


def test_a_page_without_the_record_says_nothing_of_it(tmp_path):
    assert (
        "What each new block does" not in write_report(write_run(tmp_path / "run", two_texts())).read_text()
    )


def test_other_methods_have_no_new_blocks(tmp_path):
    recipe = write_recipe(tmp_path, train__method="full", expand=None, evaluate__effects=True)
    with pytest.raises(RecipeError, match="effects is about new blocks that train, which method full"):
        load_recipe(recipe)


def test_the_beginning_of_a_text():
    text = text_of(windows_of([4, 4, 4]))
    assert [text.beginning(tokens).tokens for tokens in (1, 3, 4, 9, 99)] == [3, 3, 6, 9, 9]
