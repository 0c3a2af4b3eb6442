"""Learning rates of their own for units: against autograd on whole logits, scipy's ranks, and plain runs."""

import shutil

import numpy as np
import pytest
import torch
from conftest import write_tiny_llama
from safetensors.torch import load_file
from scipy.stats import rankdata
from tiny_run import write_base, write_recipe
from torch.nn import functional
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from deepen.config import TrainSection, load_recipe, parse_recipe
from deepen.data.batches import Batch
from deepen.errors import RecipeError
from deepen.expansion import plan_layout
from deepen.model import freeze_base, insert_blocks
from deepen.pipeline.run import run_recipe
from deepen.records import read_metrics
from deepen.training.interface import Hooks, Settings
from deepen.training.loop import train
from deepen.training.optimizer import build_optimizer
from deepen.training.rates import RATE, UnitRates, unit_rates


def drawn(seed):
    def batch_at(step, count):
        generator = np.random.default_rng([seed, step])
        return Batch(generator.integers(3, 96, (count, 17)), np.zeros(count, np.int64))

    return batch_at


domain_at, general_at = drawn(0), drawn(1)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_tiny_llama(tmp_path_factory.mktemp("rates") / "base", blocks=3)


def trained(checkpoint, steps, said=None, **rates):
    """Train new blocks; return their parameters, the optimiser, and their weights after each step."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    insert_blocks(model, plan_layout(3, blocks=2))
    parameters = freeze_base(model)
    optimizer = build_optimizer(parameters, betas=(0.9, 0.95), weight_decay=0.1)
    settings = Settings(
        steps=steps,
        windows=4,
        micro_batch=2,
        learning_rate=1e-2,
        schedule="constant",
        warmup=0,
        final_learning_rate=0.1,
        clip=1.0,
        autocast=None,
        evaluate_every=100,
        checkpoint_every=100,
    )
    path = []

    def note(report):
        if said is not None:
            said.append(report.unit_rates)
        path.append({name: p.detach().clone() for name, p in parameters.items()})

    hooks = Hooks(log=note, evaluate=lambda _: None, save=lambda _: None, stop=bool)
    how = UnitRates(general_at=general_at, **{"windows": 3, "every": 2, **rates}) if rates else None
    train(model, parameters, optimizer, domain_at, settings, hooks, rates=how)
    return parameters, optimizer, path


def test_rates_are_ranks_of_the_share_that_general_text_has():
    general, domain = torch.rand(50), torch.rand(50)
    general[:3], domain[:3] = 0, 0  # of no importance to either: in the middle
    general[5:9], domain[5:9] = general[5], domain[5]
    kept, learned = general.double() / general.double().sum(), domain.double() / domain.double().sum()
    score = (kept / (kept + learned)).nan_to_num(0.5).numpy()
    wanted = 1.75 - 1.5 * (rankdata(score) - 1) / 49
    found = unit_rates(general, domain, lower=0.25, upper=1.75)
    assert_close(found, torch.from_numpy(wanted))
    assert found.mean().item() == pytest.approx(1)
    assert_close(found, unit_rates(1000 * general, domain, lower=0.25, upper=1.75))
    assert unit_rates(general[:1], domain[:1], lower=0, upper=2).tolist() == [1]
    assert unit_rates(0 * general, 0 * domain, lower=0, upper=2).tolist() == [1] * 50


@pytest.mark.parametrize("rows", [False, True])
def test_a_rate_of_one_is_the_plain_run_to_the_bit(checkpoint, rows):
    plain, _, _ = trained(checkpoint, 5)
    found, optimizer, _ = trained(checkpoint, 5, rows=rows, lower=1.0, upper=1.0)
    assert all(RATE in optimizer.state[parameter] for parameter in found.values())
    assert all(torch.equal(found[name], plain[name]) for name in plain)


def test_a_rate_scales_the_update_and_its_decay(checkpoint):
    _, _, plain = trained(checkpoint, 3)
    _, _, found = trained(checkpoint, 3, lower=0.3, upper=0.3)
    for name in plain[0]:
        assert torch.equal(found[1][name], plain[1][name])  # the third step is the first with rates
        assert_close(
            found[2][name] - found[1][name], 0.3 * (plain[2][name] - plain[1][name]), rtol=1e-3, atol=1e-7
        )


def importance(model, name, batch, rows):
    """Mean |gradient × weight| by autograd on whole logits in fp64."""
    tokens = torch.from_numpy(batch.tokens)
    logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
    nll = functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    weight = model.get_parameter(name)
    product = (torch.autograd.grad(nll, weight)[0] * weight).abs().detach()
    return product.mean(1) if rows and product.ndim > 1 else product.mean().reshape(1)


@pytest.mark.parametrize("rows", [False, True])
def test_what_general_text_needs_moves_less(checkpoint, rows):
    parameters, optimizer, path = trained(checkpoint, 3, rows=rows)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float64)
    insert_blocks(model, plan_layout(3, blocks=2))
    model.load_state_dict(path[1], strict=False)
    texts = [general_at(2, 3), domain_at(2, 3)]
    kept, learned = (torch.cat([importance(model, n, text, rows) for n in parameters]) for text in texts)
    kept, learned = kept / kept.sum(), learned / learned.sum()
    wanted = 2 - 2 * (rankdata((kept / (kept + learned)).numpy()) - 1) / (len(kept) - 1)
    found = torch.cat([optimizer.state[p][RATE].reshape(-1) for p in parameters.values()]).double()
    assert len(found) == len(wanted)
    assert np.abs(found.numpy() - wanted).mean() < (0.05 if rows else 0.01)  # near ties swap in fp32
    if not rows:
        still = min(parameters, key=lambda name: optimizer.state[parameters[name]][RATE].item())
        moved = {name: (path[2][name] - path[1][name]).abs().max().item() for name in parameters}
        assert moved[still] == 0
        assert all(size > 0 for name, size in moved.items() if name != still)


def test_each_measurement_is_told(checkpoint):
    said = []
    parameters, optimizer, _ = trained(checkpoint, 6, said, lower=0.5)
    assert [spread is not None for spread in said] == [False, False, True, False, True, False]
    rates = sorted(optimizer.state[parameter][RATE].item() for parameter in parameters.values())
    last = said[4]
    assert (last.least, last.greatest) == pytest.approx((rates[0], rates[-1])) == (0.5, 2.0)
    assert last.median == pytest.approx(rates[(len(rates) - 1) // 2])


def test_without_rates_of_their_own_nothing_is_hooked(checkpoint, monkeypatch):
    monkeypatch.setattr(torch.optim.Optimizer, "register_step_pre_hook", None)
    said = []
    trained(checkpoint, 2, said)
    assert said == [None, None]


# --- recipes and runs

RECIPE = """
base: b
output: o
expand: {blocks: 2}
data: {sequence_length: 64, sources: [{path: x.txt}]}
train: {tokens: 1e6, batch_tokens: 4096, learning_rate: 1e-3, unit_rates: {}, preset: balanced}
"""


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ("train.anchor=null", "give train.anchor"),
        ("train.parallel=fsdp", "unit_rates: the units"),
        ('train.unit_rates={"lower": 3}', "above upper 2"),
        ("train.unit_rates.evry=3", "did you mean every"),
    ],
)
def test_faults(change, why):
    assert parse_recipe(RECIPE).train.unit_rates.every == 50
    with pytest.raises(RecipeError, match=why):
        parse_recipe(RECIPE, [change])


def test_what_measuring_costs_is_counted():
    section = TrainSection(tokens=1, batch_tokens=1, learning_rate=1, unit_rates={"windows": 8, "every": 50})
    assert section.measured_share(16) == pytest.approx(2 * 8 / (50 * 16))
    assert TrainSection(tokens=1, batch_tokens=1, learning_rate=1).measured_share(16) == 0


def test_a_resumed_run_is_the_unbroken_one_to_the_bit(tmp_path):
    """Broken before a measurement, and between two."""
    write_base(tmp_path / "base")
    changes = {
        "train__anchor": {"share": 0.5},
        "train__unit_rates": {"every": 2, "windows": 2, "units": "row"},
        "train__checkpoint_every": 1,
        "train__keep_checkpoints": 9,
        "evaluate": {},
    }
    whole = tmp_path / "whole"
    run_recipe(load_recipe(write_recipe(tmp_path, output=str(whole), **changes)))
    wanted = load_file(whole / "blocks" / "blocks.safetensors")
    assert f"{next(iter(wanted))}/{RATE}" in load_file(whole / "checkpoints/step-3/optimizer.safetensors")
    points, _ = read_metrics(whole / "metrics.jsonl")
    spreads = {point.step: point.unit_rates for point in points if point.unit_rates}
    assert list(spreads) == [3, 5]
    assert (spreads[3].least, spreads[3].greatest) == (0, 2)
    for step in (2, 3):
        run = tmp_path / f"from-{step}"
        run.mkdir()
        for name in ("recipe.yaml", "environment.json", "metrics.jsonl"):
            shutil.copyfile(whole / name, run / name)
        shutil.copytree(whole / f"checkpoints/step-{step}", run / f"checkpoints/step-{step}")
        run_recipe(load_recipe(write_recipe(tmp_path, output=str(run), **changes)), resume=True)
        found = load_file(run / "blocks" / "blocks.safetensors")
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
