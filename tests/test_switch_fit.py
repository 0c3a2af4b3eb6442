"""Deciders, switches fitted on texts, and the commands, against plain transformers."""

import io
import json
import re

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_model_insert import plain
from tiny_run import sentences, write_base
from torch.nn import functional

import deepen
from deepen.cli import main
from deepen.config import TextSet
from deepen.data.evaluation_text import EvaluationText
from deepen.errors import SwitchError
from deepen.evaluation.switching import after_prompt, conformal_threshold
from deepen.model import fit_classifier, mean_log_likelihood, playing, pooled_states, read_switch
from deepen.pipeline.losses import load_text_sets

PROMPT = 12


@pytest.fixture(scope="module")
def trial(tmp_path_factory):
    """A base that learned one kind of sentence, two packs of which `law` learned another, and texts."""
    root = tmp_path_factory.mktemp("trial")
    write_base(root / "base", max_position_embeddings=96)
    for name, offset, documents in (("general", 0, 60), ("law", 3, 60)):
        lines = [json.dumps({"text": text}) for text in sentences(offset, documents)]
        (root / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    model = plain(root / "base")
    learn(model, model.parameters(), rows_of(root, "general"))
    model.save_pretrained(root / "base")
    for name, steps in (("law", 30), ("idle", 1)):
        model = plain(root / "base")
        deepen.insert_blocks(model, deepen.plan_layout(3, blocks=2))
        learn(model, deepen.freeze_base(model).values(), rows_of(root, "law")[:40], steps)
        deepen.save_blocks(model, root / name)
    return root


def rows_of(root, name):
    [text] = load_text_sets(root / "base", [("general", TextSet(path=str(root / f"{name}.jsonl")))], 100_000)
    return [torch.from_numpy(window) for window in text.windows]


def learn(model, parameters, rows, steps=30):
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(list(parameters), lr=1e-2)
    ids = torch.stack([row[:40] for row in rows if len(row) >= 40])
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()


@pytest.fixture(scope="module")
def fitted(trial):
    """The switches that the command makes of each kind."""
    for by in ("classifier", "likelihood"):
        assert main(command(trial, by, trial / by)) == 0
    return trial


def command(trial, by, out, *more):
    packs = [f"law={trial}/law:{trial}/law.jsonl", "--general", f"{trial}/general.jsonl"]
    options = ["--by", by, "--prompt-tokens", str(PROMPT), "--false-positives", "0.1", "--out", str(out)]
    return ["blocks", "switch", f"{trial}/base", "--pack", *packs, *options, *more]


@torch.no_grad()
def mean_loss(model, ids):
    return model(input_ids=ids[None], labels=ids[None]).loss.item()


def test_likelihood_is_the_loss_of_transformers(trial):
    model = deepen.load(trial / "base", trial / "law", switch="auto")
    prompts = [row[:length] for row, length in zip(rows_of(trial, "law"), (30, 2, 17, 1), strict=False)]
    found = deepen.Switch().decide(model, prompts)
    base, law = plain(trial / "base"), deepen.load(trial / "base", trial / "law")
    for prompt, decision in zip(prompts[:3], found, strict=False):
        wanted = mean_loss(base, prompt) - mean_loss(law, prompt)
        assert decision.advantages["law"] == pytest.approx(wanted, abs=1e-5)
        assert decision.pack == ("law" if wanted > 0 else None)
    assert found[3].pack is None
    assert np.isnan(found[3].advantages["law"]), "one token tells nothing"
    assert deepen.Switch().decide(model, [prompts[0][:0]])[0].tokens == 0


def test_several_packs_compete(trial):
    model = deepen.load(trial / "base", trial / "law", switch=deepen.Switch(threshold=0.1))
    deepen.attach(model, trial / "idle")
    ids = torch.stack([rows_of(trial, kind)[50][:24] for kind in ("law", "general")])
    model.generate(ids, max_new_tokens=1)
    first, second = deepen.decisions(model)
    assert set(first.advantages) == {"law", "idle"}
    assert first.pack == "law" == max(first.advantages, key=first.advantages.get)
    assert second.pack is None
    assert max(second.advantages.values()) <= 0.1
    with playing(model, ("idle",)):
        theirs = mean_log_likelihood(model, list(ids))
    assert theirs.shape == (2,)


def test_states_are_the_mean_of_the_bases_last(trial):
    model, base = deepen.load(trial / "base", trial / "law"), plain(trial / "base")
    prompts = [rows_of(trial, "general")[0][:length] for length in (20, 7, 1)]
    found = pooled_states(model, prompts)
    for row, prompt in zip(found, prompts, strict=True):
        with torch.no_grad():
            states = base(input_ids=prompt[None], output_hidden_states=True).hidden_states[-1]
        torch.testing.assert_close(row, states[0].mean(0))


def test_a_classifier_has_the_log_odds_of_two_normal_classes():
    """Of normal classes of one covariance the log odds are linear: the middle has 0, the means the most."""
    generator = torch.Generator().manual_seed(0)
    centre = torch.tensor([[2.0, 0.0, 0.0], [0.0, 40.0, 0.0]])
    spread = torch.tensor([1.0, 20.0, 1e-3])
    many = [torch.randn(count, 3, generator=generator) * spread for count in (900, 300)]
    states = torch.cat([each + mean for each, mean in zip(many, centre, strict=True)])
    labels = torch.tensor([0] * 900 + [1] * 300)
    made = fit_classifier(states, labels, ["law"])
    scores = functional.linear(centre, made.weight, made.bias)
    odds = (scores[:, 1] - scores[:, 0]).tolist()
    # Squared distance of the means is 2² + 2², so at a mean the log odds are ± 4; shrunk a little.
    assert odds == pytest.approx([-4, 4], abs=0.8)
    again = fit_classifier(states, labels, ["law"])
    assert torch.equal(made.weight, again.weight)
    with pytest.raises(SwitchError, match="code: no prompt"):
        fit_classifier(states, labels, ["law", "code"])


@pytest.mark.parametrize("rate", [0.1, 0.25, 0.5])
def test_the_threshold_keeps_its_rate(rate):
    """Of n + 1 exchangeable prompts each is as likely the new one: how many pass the others' threshold?"""
    values = np.random.default_rng(0).normal(size=21)
    above = [values[i] > conformal_threshold(np.delete(values, i), rate) for i in range(21)]
    assert sum(above) == int(rate * 21)
    with pytest.raises(SwitchError, match="give text for 9 to calibrate"):
        conformal_threshold(values[:8], 0.1)
    assert conformal_threshold(np.array([np.nan] * 9), 0.1) == -np.inf


@pytest.mark.parametrize("by", ["classifier", "likelihood"])
def test_a_fitted_switch_is_read_as_it_was_written(fitted, by, monkeypatch, tmp_path):
    switch, record = read_switch(fitted / by)
    assert (switch.threshold, switch.prompt_tokens) == (record.threshold, PROMPT)
    assert [pack.name for pack in record.packs] == ["law"]
    held = {tally.text: tally for tally in record.held_out}
    assert held["law"].wrong <= held["law"].prompts // 4, "the two kinds differ plainly"
    assert held["general"].answered["law"] == held["general"].wrong
    monkeypatch.chdir(tmp_path)  # packs lie where the switch says, from wherever it is used
    model = deepen.load(fitted / "base", switch=fitted / by)
    rows = [row[:PROMPT] for row in rows_of(fitted, "law")]
    assert switch.decide(model, rows) == switch.decide(deepen.load(fitted / "base", fitted / "law"), rows)
    ids = torch.stack(rows[:6])
    model.generate(ids, max_new_tokens=1)
    assert [each.pack for each in deepen.decisions(model)] == [
        each.pack for each in switch.decide(model, rows[:6])
    ]


def test_a_switch_for_others_is_refused(fitted, tmp_path):
    with pytest.raises(SwitchError, match=r"another law than .*idle"):
        deepen.load(fitted / "base", fitted / "idle", switch=fitted / "classifier")
    model = deepen.load(fitted / "base", fitted / "idle")
    with pytest.raises(SwitchError, match="decides on 'law', which is not attached; there is 'idle'"):
        deepen.set_switch(model, fitted / "classifier")
    deepen.attach(model, fitted / "law")
    deepen.set_switch(model, fitted / "classifier")
    record = json.loads((fitted / "likelihood/switch.json").read_text())
    (tmp_path / "switch.json").write_text(json.dumps(record | {"fingerprint": "0" * 64}))
    with pytest.raises(SwitchError, match="made for a base with fingerprint 0000"):
        deepen.set_switch(model, tmp_path)
    (tmp_path / "switch.json").write_text((fitted / "classifier/switch.json").read_text())
    with pytest.raises(SwitchError, match=r"switch\.safetensors: cannot be read"):
        deepen.set_switch(model, tmp_path)
    held = load_file(fitted / "classifier/switch.safetensors")
    save_file({**held, "weight": held["weight"][:1].clone()}, tmp_path / "switch.safetensors")
    with pytest.raises(SwitchError, match="need 2 rows"):
        deepen.set_switch(model, tmp_path)
    with pytest.raises(SwitchError, match="at least one token"):
        deepen.Switch(prompt_tokens=0)


def test_only_what_follows_the_prompt_is_scored():
    windows = [np.arange(length) for length in (5, 3, 4)]
    text = EvaluationText(
        task="a", role="general", windows=windows, document=[0, 1, 2], bytes=[1, 1, 1], digest="d"
    )
    left = after_prompt(text, 3)
    assert [len(window) for window in left.windows] == [5, 4]
    assert (left.document, left.predicted) == ([0, 2], [2, 1])
    assert [flags.tolist() for flags in left.counted] == [[False, False, True, True], [False, False, True]]


@torch.no_grad()
def test_evaluation_of_a_switch(fitted, tmp_path, capsys):
    texts = ["--text", f"{fitted}/general.jsonl", "--domain-text", f"{fitted}/law.jsonl"]
    switch = ["--switch", str(fitted / "classifier"), "--out", str(tmp_path / "out")]
    capsys.readouterr()
    assert main(["evaluate", f"{fitted}/base", *texts, *switch, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["switch"]
    assert found == json.loads((tmp_path / "out/switch.json").read_text())
    assert [row["answers"] for row in found["rows"]] == ["law", "switch"]
    base, law = plain(fitted / "base"), deepen.load(fitted / "base", fitted / "law")
    made = read_switch(fitted / "classifier")[0]
    for at, name in enumerate(("general", "law")):
        windows = [row for row in rows_of(fitted, name) if len(row) > PROMPT]
        who = [each.pack for each in made.decide(law, windows)]
        wanted = [behind(law if pack else base, row) for pack, row in zip(who, windows, strict=True)]
        tokens = sum(len(row) - PROMPT for row in windows)
        metric = found["rows"][1]["metrics"][at]
        assert metric["task"] == name
        assert metric["value"] == pytest.approx(sum(wanted) / tokens, abs=1e-4)
        assert metric["base_value"] == pytest.approx(
            sum(behind(base, row) for row in windows) / tokens, abs=1e-4
        )
        assert found["tallies"][at]["answered"] == {"base": who.count(None), "law": who.count("law")}
    assert found["cost"]["tokens"] == PROMPT
    assert 0 < found["cost"]["flops"] < found["cost"]["prefill_flops"], "a classifier runs no head"
    assert main(["evaluate", f"{fitted}/law", *texts, "--switch", "auto"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"^general +law on ", said, re.M)
    assert re.search(r"^law +switch ", said, re.M)
    assert "a decision passes" in said


def behind(model, row):
    """Nats of the tokens behind the prompt."""
    logits = model(input_ids=row[None]).logits[0, PROMPT - 1 : -1]
    return functional.cross_entropy(logits, row[PROMPT:], reduction="sum").item()


def test_chat_says_who_answered(fitted, capsys, monkeypatch):
    questions = [sentences(0, 9)[8], sentences(3, 9)[8]]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join([*questions, "/off law", questions[1]])))
    capsys.readouterr()
    options = ["--switch", str(fitted / "likelihood"), "--max-tokens", "6"]
    assert main(["chat", f"{fitted}/base", *options, "--json"]) == 0
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [each["decided"]["pack"] for each in said] == [None, "law", None]
    assert said[1]["answers"]["model"]["text"] != said[2]["answers"]["model"]["text"]
    monkeypatch.setattr("sys.stdin", io.StringIO(questions[1]))
    assert main(["chat", f"{fitted}/law", "--switch", "auto", "--max-tokens", "6"]) == 0
    assert "(law answered; law +" in capsys.readouterr().err


REFUSED = [
    ("--pack law --general {general} --out {out}", "write for example law="),
    ("--pack base={law}:{general} --general {general} --out {out}", "cannot be called 'base'"),
    (
        "--pack law={law}:{general} --general {general} --out {out} --false-positives 0.001",
        "give text for 999",
    ),
    ("--pack law={law}:{short} --general {general} --out {out}", "law: 2 prompts are too few"),
    ("--pack law={base}:{general} --general {general} --out {out}", "not a block pack"),
    ("--pack law={law}:{general} --general {general} --out {law}", "exists already"),
]


@pytest.mark.parametrize(("options", "words"), REFUSED, ids=[words for _, words in REFUSED])
def test_what_cannot_be_fitted_is_one_line(trial, tmp_path, capsys, options, words):
    (tmp_path / "short.jsonl").write_text('{"text": "block gate"}\n' * 2)
    places = {"base": trial / "base", "law": trial / "law", "general": trial / "general.jsonl"}
    given = options.format(**places, short=tmp_path / "short.jsonl", out=tmp_path / "out")
    assert main(["blocks", "switch", f"{trial}/base", *given.split()]) == 2
    said = capsys.readouterr().err
    assert words in said
    assert len(re.findall("^error: .+", said, re.M)) == 1
    assert not (tmp_path / "out").exists()
