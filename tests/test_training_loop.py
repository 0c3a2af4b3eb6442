import copy
import os
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import write_tiny_llama
from transformers import AutoModelForCausalLM

from deepen.data.batches import Batch
from deepen.errors import Interrupted, TrainingError
from deepen.expansion import plan_layout
from deepen.families import family_for
from deepen.model import freeze_base, insert_blocks
from deepen.training.checkpoints import newest_checkpoint, restore_checkpoint, save_checkpoint
from deepen.training.interface import Hooks, Settings
from deepen.training.loop import train
from deepen.training.meters import by_block, step_blocks
from deepen.training.metrics import MetricsLog
from deepen.training.nonfinite import explain
from deepen.training.optimizer import build_optimizer
from deepen.training.schedule import learning_rate
from deepen.training.signals import stop_on_signal
from deepen.training.world import World


def batch_at(step, windows):
    generator = np.random.default_rng(step)
    return Batch(generator.integers(0, 96, (windows, 17)), generator.integers(0, 2, windows))


def settings(**changes):
    defaults = {
        "steps": 4,
        "windows": 8,
        "micro_batch": 8,
        "learning_rate": 1e-2,
        "schedule": "cosine",
        "warmup": 0.25,
        "final_learning_rate": 0.1,
        "clip": 1.0,
        "autocast": None,
        "evaluate_every": 100,
        "checkpoint_every": 100,
    }
    return Settings(**{**defaults, **changes})


def hooks(log=None, evaluate=None, save=None, stop=None):
    return Hooks(
        log=log or (lambda report: None),
        evaluate=evaluate or (lambda step: None),
        save=save or (lambda step: None),
        stop=stop or (lambda: False),
    )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_tiny_llama(tmp_path_factory.mktemp("loop") / "base", blocks=3)


def expanded(checkpoint):
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    insert_blocks(model, plan_layout(3, blocks=2))
    return model, freeze_base(model)


def optimizer_of(parameters):
    return build_optimizer(parameters, betas=(0.9, 0.95), weight_decay=0.1)


def run(model, parameters, chosen, **kinds):
    reports = []
    train(model, parameters, optimizer_of(parameters), batch_at, chosen, hooks(log=reports.append, **kinds))
    return reports


def test_equals_a_loop_written_with_transformers_loss_and_torch_alone(checkpoint):
    model, parameters = expanded(checkpoint)
    reference = copy.deepcopy(model)
    named = dict(reference.named_parameters())
    trained = [named[name] for name in parameters]
    matrices, vectors = [p for p in trained if p.ndim > 1], [p for p in trained if p.ndim == 1]
    oracle = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
    )
    losses = []
    for step in range(4):
        for group in oracle.param_groups:
            group["lr"] = learning_rate(step, steps=4, peak=1e-2, warmup=0.25, final=0.1, shape="cosine")
        tokens = torch.from_numpy(batch_at(step, 8).tokens)
        loss = reference(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        oracle.step()
        oracle.zero_grad()
        losses.append(loss.item())

    reports = run(model, parameters, settings())

    assert [report.loss for report in reports] == pytest.approx(losses, abs=1e-5)
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter, named[name], atol=2e-4), name


@pytest.mark.parametrize("micro_batch", [1, 3])
def test_the_micro_batch_does_not_change_the_result(checkpoint, micro_batch):
    whole, first = expanded(checkpoint)
    parts, second = expanded(checkpoint)
    a = run(whole, first, settings())
    b = run(parts, second, settings(micro_batch=micro_batch))
    assert [r.loss for r in a] == pytest.approx([r.loss for r in b], abs=1e-5)
    assert [r.gradient_norm for r in a] == pytest.approx([r.gradient_norm for r in b], rel=1e-4)


def test_only_what_trains_moves_and_all_of_it_does(checkpoint):
    model, parameters = expanded(checkpoint)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    run(model, parameters, settings())
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == set(parameters)


def test_norms_do_not_decay():
    parameters = {"w": torch.nn.Parameter(torch.ones(2, 2)), "gain": torch.nn.Parameter(torch.ones(2))}
    optimizer = optimizer_of(parameters)
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    for parameter in parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert torch.equal(parameters["gain"], torch.ones(2))
    assert torch.allclose(parameters["w"], torch.full((2, 2), 1 - 0.1 * 0.1))


def test_bf16_compute_keeps_fp32_weights_for_what_trains(checkpoint):
    model, parameters = expanded(checkpoint)
    seen = []
    model.model.layers[0].mlp.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    run(model, parameters, settings(autocast=torch.bfloat16, steps=1))
    assert set(seen) == {torch.bfloat16}
    assert {p.dtype for p in parameters.values()} == {torch.float32}


def test_a_loss_that_is_not_finite_stops_before_the_update(checkpoint):
    model, parameters = expanded(checkpoint)
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    before = {name: p.detach().clone() for name, p in parameters.items()}
    with pytest.raises(TrainingError, match="step 1: loss nan"):
        run(model, parameters, settings())
    assert all(torch.equal(p, before[name]) for name, p in parameters.items())


def test_a_window_whose_loss_is_not_finite_is_named(checkpoint):
    """Token 95 has an embedding that is not finite, and stands in one window of the second step alone."""
    model, parameters = expanded(checkpoint)
    with torch.no_grad():
        model.model.embed_tokens.weight[95].fill_(float("inf"))

    def batches(step, windows):
        tokens = batch_at(step, windows).tokens % 95
        tokens[5, 3] = 95 if step == 1 else 0
        return Batch(tokens, np.zeros(windows, dtype=np.int64))

    before = []
    log = lambda report: before.extend(p.detach().clone() for p in parameters.values())  # noqa: E731
    chosen = replace(hooks(log=log), name_window=lambda step, row: f"window {10 * step + row} of code")
    with pytest.raises(TrainingError, match=r"step 2: loss nan.*\n.*8 windows, alone: window 15 of code;"):
        train(model, parameters, optimizer_of(parameters), batches, settings(micro_batch=3), chosen)
    assert all(torch.equal(p, held) for p, held in zip(parameters.values(), before, strict=True))


def test_a_gradient_that_is_not_finite_is_named_too(checkpoint):
    model, parameters = expanded(checkpoint)
    parameter = next(iter(parameters.values()))
    parameter.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(TrainingError, match=r"step 1: loss 4.*, gradient norm (inf|nan)(.|\n)*each window"):
        run(model, parameters, settings())


def test_what_is_said_of_a_step_that_is_not_finite():
    names = [f"window {number} of a" for number in range(7)]
    assert "alone: window 0 of a; look" in explain("step 3: loss nan", names[:1], 8)
    assert "window 4 of a and 2 more;" in explain("step 3: loss nan", names, 8)
    assert "weights have overflowed" in explain("step 3: loss nan", names, 7)
    assert "each window of the step alone is finite" in explain("step 3: loss inf", [], 7)
    assert all(explain("x", names[:n], 7).count("\n") == 1 for n in range(8))


def test_what_reaches_and_moves_each_block_is_measured(checkpoint):
    model, parameters = expanded(checkpoint)
    reference = copy.deepcopy(model)
    tokens = torch.from_numpy(batch_at(0, 8).tokens)
    reference(input_ids=tokens, labels=tokens).loss.backward()
    named = dict(reference.named_parameters())

    (report,) = run(model, parameters, settings(steps=1, clip=1e-3))

    assert list(report.blocks) == [block.index for block in plan_layout(3, blocks=2).new_blocks]
    for index, figures in report.blocks.items():
        names = [name for name in parameters if name.startswith(f"model.layers.{index}.")]
        before, after = (torch.cat([of[name].flatten() for name in names]) for of in (named, parameters))
        gradient = torch.cat([named[name].grad.flatten() for name in names])
        assert figures.gradient_norm == pytest.approx(gradient.norm().item(), rel=1e-4)
        assert figures.update == pytest.approx(((after - before).norm() / after.norm()).item(), rel=1e-4)
    squares = sum(figures.gradient_norm**2 for figures in report.blocks.values())
    assert squares == pytest.approx(report.gradient_norm**2, rel=1e-5)


def test_a_step_by_blocks_is_a_step():
    """Twelve blocks, so that the second's prefix begins the eleventh's; and a parameter outside them."""
    names = ["model.embed_tokens.weight", *(f"model.layers.{i}.mlp.up_proj.weight" for i in range(12))]
    family = family_for({"model_type": "llama"})
    torch.manual_seed(0)
    parameters = {name: torch.nn.Parameter(torch.randn(4, 3)) for name in names}
    straight = {name: torch.nn.Parameter(p.detach().clone()) for name, p in parameters.items()}
    blocks = by_block(parameters, family)
    assert {index: len(held) for index, held in blocks.items()} == dict.fromkeys(range(12), 1)
    ours, theirs = optimizer_of(parameters), optimizer_of(straight)
    for group in (*ours.param_groups, *theirs.param_groups):
        group["lr"] = 0.1
    for _ in range(3):
        for name, parameter in parameters.items():
            straight[name].grad = parameter.grad = torch.randn(4, 3)
        moved = step_blocks(ours, blocks, World())
        theirs.step()
    assert all(torch.equal(parameters[name], straight[name]) for name in names)
    assert [len(group["params"]) for group in ours.param_groups] == [13]
    assert all(size > 0 for size in moved.values())


def test_evaluates_and_saves_when_due_and_saves_at_the_end(checkpoint):
    model, parameters = expanded(checkpoint)
    events = []
    run(
        model,
        parameters,
        settings(steps=5, evaluate_every=2, checkpoint_every=3),
        evaluate=lambda step: events.append(("evaluate", step)),
        save=lambda step: events.append(("save", step)),
    )
    assert events == [("evaluate", 2), ("save", 3), ("evaluate", 4), ("save", 5)]


def test_a_request_to_stop_saves_first(checkpoint):
    model, parameters = expanded(checkpoint)
    saved = []
    with pytest.raises(Interrupted, match="step 1 of 4; continue with --resume") as stopped:
        run(model, parameters, settings(), save=saved.append, stop=lambda: True)
    assert saved == [1]
    assert stopped.value.exit_code == 130


@pytest.mark.parametrize("micro_batch", [8, 2])
def test_resumed_training_ends_on_the_same_bits(checkpoint, tmp_path, micro_batch):
    chosen = settings(steps=6, checkpoint_every=3, micro_batch=micro_batch)
    straight, parameters = expanded(checkpoint)
    reports = run(straight, parameters, chosen)

    first, kept = expanded(checkpoint)
    optimizer = optimizer_of(kept)

    def save(step):
        save_checkpoint(tmp_path, step, kept, optimizer, identity={"data": "x"}, keep=2)
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(first, kept, optimizer, batch_at, chosen, hooks(save=save))

    second, again = expanded(checkpoint)
    optimizer = optimizer_of(again)
    saved, damaged = newest_checkpoint(tmp_path)
    assert (saved.step, damaged) == (3, [])
    restore_checkpoint(saved, again, optimizer, identity={"data": "x"})
    later = []
    train(second, again, optimizer, batch_at, chosen, hooks(log=later.append), first_step=3)
    assert [report.loss for report in later] == [report.loss for report in reports[3:]]
    for name, parameter in parameters.items():
        assert torch.equal(parameter, again[name]), name


def test_the_schedule_rises_then_falls_to_its_end():
    rates = [
        learning_rate(s, steps=100, peak=2.0, warmup=0.06, final=0.1, shape="cosine") for s in range(100)
    ]
    assert rates[0] == pytest.approx(2.0 / 6)
    assert rates[5] == rates[6] == 2.0
    assert rates[6:] == sorted(rates[6:], reverse=True)
    assert rates[99] == pytest.approx(0.2)
    assert (rates[52] + rates[53]) / 2 == pytest.approx(1.1, abs=0.02)
    constant = [
        learning_rate(s, steps=10, peak=1.0, warmup=0.0, final=0.1, shape="constant") for s in range(10)
    ]
    assert constant == [1.0] * 10


def test_the_metrics_log_is_cut_back_on_resume_and_drops_a_torn_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 1}\n{"step": 2, "loss": 2}\n{"step": 3, "lo')
    log = MetricsLog(path, resume_after=1)
    log.write({"step": 2, "loss": 5})
    log.close()
    assert log.kept == [{"step": 1, "loss": 1}]
    assert path.read_text() == '{"step": 1, "loss": 1}\n{"step": 2, "loss": 5}\n'


@pytest.fixture
def _signals():
    """Python's own handlers, which a shell's background job does not have."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("_signals")
def test_the_first_signal_asks_and_the_second_acts():
    with stop_on_signal() as asked:
        assert not asked()
        os.kill(os.getpid(), signal.SIGINT)
        assert asked()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.usefixtures("_signals")
def test_a_signal_that_was_ignored_stays_ignored():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with stop_on_signal() as asked:
        os.kill(os.getpid(), signal.SIGINT)
        assert not asked()
        os.kill(os.getpid(), signal.SIGTERM)
        assert asked()
