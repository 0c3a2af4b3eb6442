"""What holds a model to its base: the anchor, what it costs, the penalty, and the runs that use them."""

import json
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from conftest import write_tiny_llama
from tiny_run import write_base, write_recipe
from torch.nn import functional
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from deepen.config import TrainSection, dump_recipe, load_recipe, parse_recipe
from deepen.data.batches import Batch
from deepen.data.corpus import Corpus
from deepen.data.written import write_written
from deepen.errors import Interrupted, RecipeError
from deepen.expansion import plan_layout
from deepen.methods import build_method
from deepen.methods.base import base_inside
from deepen.model import bypass, freeze_base, insert_blocks, new_parameters
from deepen.model.write import write_documents
from deepen.pipeline import training
from deepen.pipeline.run import run_recipe
from deepen.training import loss as loss_module
from deepen.training.anchor import Anchor, anchor_flops, anchor_loss, divergence
from deepen.training.flops import attention_flops
from deepen.training.interface import Hooks, Settings
from deepen.training.loop import train
from deepen.training.loss import IGNORED, summed_loss
from deepen.training.optimizer import build_optimizer
from deepen.training.parallel import Root
from deepen.training.penalty import penalised
from deepen.training.prefix import find_prefix
from deepen.training.recompute import recompute

LAYOUTS = {
    "interleaved": {"blocks": 2},
    "suffix": {"blocks": 2, "placement": "suffix"},
    "prefix": {"blocks": 2, "placement": "prefix"},
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_tiny_llama(tmp_path_factory.mktemp("anchor") / "base", blocks=3)


def expanded(checkpoint, **placed):
    """A model whose new blocks have moved, and which trains in them."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    insert_blocks(model, plan_layout(3, **(placed or {"blocks": 2})))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in new_parameters(model).values():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.train(), freeze_base(model)


def adapted(checkpoint, method):
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    section = TrainSection(method=method, tokens=1, batch_tokens=1, learning_rate=1)
    torch.manual_seed(0)
    method = build_method(section)
    parameters = method.prepare(model)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.train(), parameters, method


def windows(count=3, length=12, seed=0):
    tokens = torch.randint(96, (count, length + 1), generator=torch.Generator().manual_seed(seed))
    targets = tokens[:, 1:].clone()
    targets[0, :4] = IGNORED
    return tokens[:, :-1], targets


def oracle(model, base, inputs, targets):
    """KL by torch, on whole logits in fp64, of the positions that count."""
    wanted = base(input_ids=inputs, use_cache=False).logits.detach().double().log_softmax(-1)
    found = model(input_ids=inputs, use_cache=False).logits.double().log_softmax(-1)
    each = functional.kl_div(found, wanted, reduction="none", log_target=True).sum(-1)
    return each[targets != IGNORED].sum()


def gradients(loss, parameters):
    return torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)


def check_equal(model, parameters, loss, checkpoint, inputs, targets):
    base = AutoModelForCausalLM.from_pretrained(checkpoint)
    wanted = oracle(model, base, inputs, targets)
    found = loss(model, inputs, targets)
    assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)
    assert wanted > 0.1
    for ours, theirs in zip(gradients(found, parameters), gradients(wanted, parameters), strict=True):
        assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


# Below new blocks at the bottom there is nothing to share.
SHARING = [
    (layout, shared) for layout in LAYOUTS for shared in (False, True) if (layout, shared) != ("prefix", True)
]


@pytest.mark.parametrize(("layout", "shared"), SHARING)
def test_divergence_and_gradient_are_those_of_whole_logits(checkpoint, layout, shared, monkeypatch):
    monkeypatch.setattr(loss_module, "_MOST_LOGITS", 4 * 96 * 3 * 5)  # parts of five positions, then of two
    model, parameters = expanded(checkpoint, **LAYOUTS[layout])
    prefix = find_prefix(model) if shared else None
    check_equal(model, parameters, anchor_loss(bypass, prefix), checkpoint, *windows())
    assert model.training
    assert all(module.training for module in model.modules())


def test_lora_and_a_copy(checkpoint):
    model, parameters, method = adapted(checkpoint, "lora")
    check_equal(model, parameters, anchor_loss(base_inside(method)), checkpoint, *windows())
    assert all(parameter.requires_grad for parameter in parameters.values())
    model, parameters, method = adapted(checkpoint, "full")
    assert base_inside(method) is None
    copy = AutoModelForCausalLM.from_pretrained(checkpoint).requires_grad_(False)
    check_equal(model, parameters, anchor_loss(lambda _: nullcontext(copy)), checkpoint, *windows())


def test_nothing_diverges_before_training(checkpoint):
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    insert_blocks(model, plan_layout(3, blocks=2))
    parameters = freeze_base(model)
    found = anchor_loss(bypass, find_prefix(model))(model.train(), *windows())
    assert found.item() == pytest.approx(0, abs=1e-6)
    assert all(g is None or g.abs().max() < 1e-6 for g in gradients(found, parameters))


def test_words_that_a_head_rules_out_add_nothing():
    base, model = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    wanted = divergence(base[..., :4], model[..., :4])
    for logits in (base, model):
        logits[..., 4] = -torch.inf
    model.requires_grad_(True)
    found = divergence(base, model)
    assert_close(found, wanted)
    found.sum().backward()
    assert model.grad.isfinite().all()


def test_dropout_is_off_in_the_base(checkpoint):
    model, _ = expanded(checkpoint)
    for block in model.model.layers:
        block.mlp.act_fn = torch.nn.Sequential(torch.nn.SiLU(), torch.nn.Dropout(0.5))
    inputs, targets = windows()
    before = []
    hook = model.model.norm.register_forward_hook(lambda *found: before.append(found[2].detach()))
    for _ in range(2):
        anchor_loss(bypass)(model, inputs, targets)
    hook.remove()
    assert before[0].equal(before[2])  # base, model, base, model
    assert not before[1].equal(before[3])


WORDS, WIDTH, INNER = 96, 64, 172


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("again", [False, True])
def test_flops_of_a_step_of_the_anchor(shared, again):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=6,
        num_attention_heads=4,
    )
    model = LlamaForCausalLM(config).train()
    insert_blocks(model, plan_layout(6, blocks=2))
    freeze_base(model)
    blocks = list(model.model.layers)
    recompute(blocks[3:] if again else [])
    prefix = find_prefix(model) if shared else None
    inputs = torch.randint(WORDS, (2, 32))
    with FlopCounterMode(display=False) as counter:
        anchor_loss(bypass, prefix)(model, inputs, inputs).backward()
    unit, head = 2 * (4 * WIDTH * WIDTH + 3 * WIDTH * INNER), 2 * WIDTH * WORDS
    # Three below, once or twice; two new ones; three frozen above, with the base's passes through them.
    exact = (6 if not shared else 3) + 2 * 3 + 3 * (2 + 1) + 5 * again
    anchor = Anchor(batch_at=batch_at, windows=1, weight=1.0, base=bypass, prefix=prefix)
    closed = anchor_flops(Root(model), model, blocks, 32, anchor)
    attention = attention_flops(model, 0, 32) * ((6 if not shared else 3) + 5 * (3.5 + again) + 3)
    done = counter.get_total_flops() / 64
    assert closed - attention == pytest.approx(done, rel=0.02)
    if not again:
        assert done == exact * unit + 3 * head


def test_flops_with_a_copy(checkpoint):
    model, _, _ = adapted(checkpoint, "full")
    copy = AutoModelForCausalLM.from_pretrained(checkpoint).requires_grad_(False)
    inputs, targets = windows(2, 32)

    anchor = Anchor(batch_at=batch_at, windows=1, weight=1.0, base=lambda _: nullcontext(copy))
    with FlopCounterMode(display=False) as counter:
        anchor_loss(anchor.base)(model, inputs, targets).backward()
    closed = anchor_flops(Root(model), model, list(model.model.layers), 32, anchor)
    attention = 3 * 4.5 * attention_flops(model, 0, 32)
    assert closed - attention == pytest.approx(counter.get_total_flops() / 64, rel=0.02)


# --- in a step


def batch_at(step, count):
    generator = np.random.default_rng(step)
    return Batch(generator.integers(0, 96, (count, 17)), generator.integers(0, 2, count))


def further_at(step, count):
    generator = np.random.default_rng(1000 + step)
    trained = generator.random((count, 16)) < 0.7
    return Batch(generator.integers(0, 96, (count, 17)), np.zeros(count, np.int64), trained=trained)


def step(checkpoint, micro, **changes):
    model, parameters = expanded(checkpoint)
    optimizer = build_optimizer(parameters, betas=(0.9, 0.95), weight_decay=0.1)
    settings = Settings(
        **{
            "steps": 2,
            "windows": 8,
            "micro_batch": micro,
            "learning_rate": 1e-2,
            "schedule": "cosine",
            "warmup": 0.25,
            "final_learning_rate": 0.1,
            "clip": None,
            "autocast": None,
            "evaluate_every": 100,
            "checkpoint_every": 100,
            **changes,
        }
    )
    reports = []
    hooks = Hooks(log=reports.append, evaluate=lambda _: None, save=lambda _: None, stop=bool)
    anchor = Anchor(batch_at=further_at, windows=3, weight=0.5, base=bypass, prefix=find_prefix(model))
    train(model, parameters, optimizer, batch_at, settings, hooks, anchor=anchor)
    return reports, parameters


def test_the_objective_is_loss_plus_weighted_divergence(checkpoint):
    reports, _ = step(checkpoint, 8, steps=1)
    model, parameters = expanded(checkpoint)
    base = AutoModelForCausalLM.from_pretrained(checkpoint)
    batch, further = batch_at(0, 8), further_at(0, 3)
    tokens, others = torch.from_numpy(batch.tokens), torch.from_numpy(further.tokens)
    logits = model(input_ids=tokens[:, :-1], use_cache=False).logits.double()
    nll = functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    targets = others[:, 1:].masked_fill(~torch.from_numpy(further.trained), IGNORED)
    kl = oracle(model, base, others[:, :-1], targets) / int(further.trained.sum())
    assert reports[0].loss == pytest.approx(nll.item(), rel=1e-5)
    assert reports[0].anchor == pytest.approx(kl.item(), rel=1e-5)
    found = gradients(nll + 0.5 * kl, parameters)
    assert reports[0].gradient_norm == pytest.approx(
        torch.stack([g.norm() for g in found if g is not None]).norm().item(), rel=1e-4
    )


def test_micro_batches_change_nothing(checkpoint):
    (whole, weights), (parts, others) = step(checkpoint, 8), step(checkpoint, 2)
    for one, other in zip(whole, parts, strict=True):
        assert (one.loss, one.anchor) == pytest.approx((other.loss, other.anchor), rel=1e-5)
    for name, weight in weights.items():
        assert_close(weight, others[name], rtol=1e-4, atol=1e-5)


# --- the penalty


@pytest.mark.parametrize("again", [False, True])
def test_the_penalty_is_the_mean_relative_size_of_what_new_blocks_add(checkpoint, again):
    model, parameters = expanded(checkpoint)
    recompute(list(model.model.layers) if again else [])
    inputs, targets = windows()
    new = plan_layout(3, blocks=2).new_indices
    plain = summed_loss(model, inputs, targets)
    found = penalised(summed_loss, 0.3, new)(model, inputs, targets)
    assert found.item() == pytest.approx(plain.item())

    states = []
    hooks = [
        model.model.layers[i].register_forward_hook(
            lambda block, args, kwargs, out: states.append((args[0], out)), with_kwargs=True
        )
        for i in new
    ]
    wanted = summed_loss(model.eval(), inputs, targets)
    for hook in hooks:
        hook.remove()
    for before, after in states:
        ratio = (after - before).square().sum(-1) / before.square().sum(-1).detach()
        wanted = wanted + 0.3 / len(new) * ratio[targets != IGNORED].sum()
    for ours, theirs in zip(gradients(found, parameters), gradients(wanted, parameters), strict=True):
        assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


# --- what the base writes


def test_a_base_writes_from_its_own_distribution(checkpoint):
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    model.generation_config.update(repetition_penalty=3.0, min_p=0.2, suppress_tokens=[5, 6, 7, 8])
    state = torch.get_rng_state()
    documents = list(write_documents(model, [1], 2, tokens=6000, length=3, temperature=2.0, seed=0))
    assert torch.get_rng_state().equal(state)
    again = list(write_documents(model, [1], 2, tokens=6000, length=3, temperature=2.0, seed=0))
    other = list(write_documents(model, [1], 2, tokens=6000, length=3, temperature=2.0, seed=1))
    assert documents == again != other
    assert all(ids[0] == 1 and (len(ids) == 3 or ids[-1] == 2) for ids in documents)
    assert 6000 <= sum(map(len, documents)) < 6003
    first = torch.tensor([ids[1] for ids in documents])
    expected = (model(torch.tensor([[1]])).logits[0, 0].double() / 2).softmax(-1) * len(first)
    counts = torch.bincount(first, minlength=96)
    kept = expected >= 5
    chi = ((counts - expected)[kept].square() / expected[kept]).sum()
    freedom = int(kept.sum())
    assert chi < freedom + 5 * (2 * freedom) ** 0.5


def test_a_tokenizer_without_a_frame_begins_after_the_end_of_another(checkpoint):
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    documents = list(write_documents(model, [], 2, tokens=100, length=8, temperature=1.0, seed=0))
    assert all(len(ids) == 8 or ids[-1] == 2 for ids in documents)
    assert all(2 not in ids[:-1] for ids in documents)


def test_what_was_written_opens_as_a_corpus(tmp_path):
    written = [[1, 5, 6, 2], [1, 7], [1, 8, 9]]
    write_written(tmp_path / "w", iter(written), np.dtype(np.uint16), "key", "a test")
    corpus = Corpus(tmp_path / "w")
    assert corpus.read(0, 9).tolist() == [1, 5, 6, 2, 1, 7, 1, 8, 9]
    assert corpus.document_ends.tolist() == [4, 6, 9]
    assert list(corpus.heldout_texts()) == []


# --- recipes

PRESET = """
base: b
output: o
expand: {blocks: 2}
data: {sequence_length: 64, sources: [{path: x.txt}]}
train: {tokens: 1e6, batch_tokens: 4096, learning_rate: 1e-3, preset: PRESET}
"""


def test_presets_are_defaults_that_explicit_keys_override():
    paper = parse_recipe(PRESET.replace("PRESET", "paper").replace("batch_tokens: 4096,", "")).train
    assert (paper.batch_tokens, paper.learning_rate, paper.warmup) == (1024 * 4096, 1e-3, 0.06)
    assert paper.anchor is None
    recipe = parse_recipe(PRESET.replace("PRESET", "balanced"), ["train.anchor.share=0.1"])
    assert (recipe.train.anchor.share, recipe.train.anchor.source) == (0.1, "self")
    assert parse_recipe(dump_recipe(recipe)) == recipe
    assert parse_recipe(PRESET.replace("PRESET", "keep"), ["train.anchor=null"]).train.anchor is None


FAULTS = {
    "train.anchor.source=general": "give them in data.anchor",
    'data.anchor=[{"path": "y.txt"}]': "data.anchor is not read",
    "train.drift_penalty=0": "greater than 0",
    "train.max_general_loss=0.1": "general: missing",
    "train.anchor.sahre=0.1": "did you mean share?",
}


@pytest.mark.parametrize("change", FAULTS)
def test_faults_of_a_recipe(change):
    with pytest.raises(RecipeError, match=FAULTS[change].replace("?", r"\?")):
        parse_recipe(PRESET.replace("preset: PRESET", "anchor: null"), [change])


def test_methods_without_new_blocks():
    text = PRESET.replace("expand: {blocks: 2}\n", "").replace("preset: PRESET", "method: full")
    with pytest.raises(RecipeError, match="method full does not add"):
        parse_recipe(text, ["train.drift_penalty=0.1"])
    with pytest.raises(RecipeError, match="cannot be cut over devices"):
        parse_recipe(text, ["train.preset=balanced", "train.parallel=fsdp"])


# --- runs


def lines(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def steps_of(run):
    return [line for line in lines(run) if "loss" in line]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    write_base(root / "base")
    return root


def recipe_at(root, name, **changes):
    return load_recipe(write_recipe(root, output=str(root / name), **changes))


@pytest.mark.parametrize("method", ["blocks", "full", "lora"])
def test_a_run_with_an_anchor_drifts_less(root, method):
    changes = {"train__method": method, **({} if method == "blocks" else {"expand": None})}
    run_recipe(recipe_at(root, f"{method}-free", **changes))
    run_recipe(recipe_at(root, f"{method}-held", **changes, train__anchor={"weight": 10.0, "share": 0.5}))
    free, held = steps_of(root / f"{method}-free"), steps_of(root / f"{method}-held")
    assert all("anchor" not in line for line in free)
    assert held[0]["anchor"] == pytest.approx(0, abs=1e-5)
    assert held[-1]["anchor"] > 1e-5
    assert held[0]["loss"] == free[0]["loss"]
    general = [lines(root / f"{method}-{name}")[-1]["evaluation"]["general"] for name in ("free", "held")]
    base = lines(root / f"{method}-free")[0]["evaluation"]["general"]
    assert abs(general[1] - base) < abs(general[0] - base)


def test_general_texts_anchor_too(root):
    recipe = recipe_at(
        root,
        "general",
        train__anchor={"source": "general"},
        data__anchor=[{"path": str(root / "general.jsonl")}],
        data__decontaminate={"action": "report"},
    )
    run_recipe(recipe)
    assert steps_of(root / "general")[-1]["anchor"] > 0


def test_a_resumed_run_ends_at_the_same_bits(root, monkeypatch):
    changes = {"train__anchor": {"tokens": 500}, "train__drift_penalty": 0.1}
    run_recipe(recipe_at(root, "whole", **changes))
    cut = recipe_at(root, "cut", **changes)
    kept = training.save_checkpoint

    def interrupted(where, step, *args, **kwargs):
        kept(where, step, *args, **kwargs)
        if step == 4:
            raise Interrupted("here")

    monkeypatch.setattr(training, "save_checkpoint", interrupted)
    with pytest.raises(Interrupted):
        run_recipe(cut)
    monkeypatch.undo()
    run_recipe(cut, resume=True)
    figures = [
        [(line["loss"], line["anchor"]) for line in steps_of(root / name)] for name in ("whole", "cut")
    ]
    assert figures[0] == figures[1]
    packs = [(root / name / "blocks" / "blocks.safetensors").read_bytes() for name in ("whole", "cut")]
    assert packs[0] == packs[1]


def test_training_ends_where_too_much_general_text_is_lost(root):
    digits = "".join(json.dumps({"text": str(7**place)}) + "\n" for place in range(50, 90))
    (root / "digits.jsonl").write_text(digits)
    changes = {
        "train__tokens": 8 * 128,
        "train__evaluate_every": 1,
        "evaluate__general": [{"path": str(root / "digits.jsonl")}],
    }
    run_recipe(recipe_at(root, "unbound", **changes))
    found = [line["evaluation"]["digits"] for line in lines(root / "unbound") if "evaluation" in line]
    rises = [value - found[0] for value in found]
    bound = (rises[4] + rises[5]) / 2
    assert max(0, *rises[:5]) < bound < rises[5]
    result = run_recipe(recipe_at(root, "bound", **changes, train__max_general_loss=bound))
    assert (result.stopped.step, result.stopped.kept, result.steps) == (5, 4, 4)
    assert result.stopped.rise == pytest.approx(rises[5])
    assert len(steps_of(root / "bound")) == 5
    record = json.loads((root / "bound" / "evaluation" / "heldout.json").read_text())
    (general,) = (m for m in record["metrics"] if (m["task"], m["metric"]) == ("digits", "nats_per_token"))
    assert general["delta"] == pytest.approx(rises[4], abs=1e-4)
    for page in ("report.html", "README.md"):
        assert "Training ended after step 5: the loss of digits" in (root / "bound" / page).read_text()


def test_a_bound_broken_at_once_leaves_the_base(root):
    changes = {"evaluate__general": [{"path": str(root / "train.jsonl")}], "train__learning_rate": 10.0}
    result = run_recipe(recipe_at(root, "at once", **changes, train__max_general_loss=1e-3))
    assert (result.stopped.step, result.stopped.kept, result.tokens) == (3, 0, 0)
    record = json.loads((root / "at once" / "evaluation" / "heldout.json").read_text())
    assert {metric["delta"] for metric in record["metrics"]} == {0.0}
