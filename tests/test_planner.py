"""The planner against what it plans: PyTorch's own counters on real training steps, and sums of bytes."""

import gc
import json
from dataclasses import replace
from math import ceil

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, LlamaConfig

from deepen.cli import main
from deepen.config import TrainSection
from deepen.errors import CheckpointError, TrainingError
from deepen.expansion import plan_layout
from deepen.model.structure import blocks_of, family_of
from deepen.pipeline import cost as cost_module
from deepen.pipeline import doctor
from deepen.planner import calibration
from deepen.planner.devices import device_table, find_device
from deepen.planner.estimate import cost_of, largest_micro_batch, least_memory, measure, memory_of
from deepen.planner.ghost import embody, meta_base, prepare_ghost, trained_model
from deepen.planner.job import Job
from deepen.planner.levers import list_levers
from deepen.planner.memory import is_cut
from deepen.planner.paper import FLOPS_PER_TOKEN, paper_run
from deepen.planner.speed import Speed, read_speed, write_speed
from deepen.planner.step import Work, optimizer_bytes, run_step
from deepen.planner.timing import time_steps
from deepen.training.loss import summed_loss
from deepen.training.optimizer import build_optimizer
from deepen.training.recompute import recompute

CPU = torch.device("cpu")
WIDTH, INNER, WORDS, BLOCKS, LENGTH = 64, 172, 512, 2, 64
SIZES = {
    "vocab_size": WORDS,
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}
INTERLEAVED, SUFFIX = {"blocks": 2}, {"blocks": 2, "placement": "suffix"}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    directory = tmp_path_factory.mktemp("config")
    LlamaConfig(**SIZES, dtype="float32").save_pretrained(directory)
    return directory / "config.json"


def job_of(source, layout=None, *, windows=2, micro=2, length=LENGTH, devices=1, tokens=None, **train):
    section = {"tokens": 1, "batch_tokens": 1, "learning_rate": 1e-3, "recompute": "none"} | train
    return Job(
        source=source,
        layout=plan_layout(BLOCKS, **layout) if layout else None,
        train=TrainSection(method="blocks" if layout else section.pop("method"), **section),
        length=length,
        windows=windows,
        micro_batch=micro,
        devices=devices,
        tokens=tokens,
    )


def allocated(job):
    """The most bytes PyTorch's allocator held while a model was built and trained two steps."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        time_steps(job, CPU, steps=2)
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def products(job):
    """FLOPs a token by PyTorch's counter, which counts no fused attention on a CPU."""
    model, _ = trained_model(job, "fp32", CPU)
    model.train()
    if job.train.recompute == "full":
        recompute(list(blocks_of(model, family_of(model))))
    tokens = torch.zeros(1, job.length + 1, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        summed_loss(model, tokens[:, :-1], tokens[:, 1:]).backward()
    return counter.get_total_flops() / job.length


@pytest.mark.slow
def test_a_job_that_parts_its_documents_stores_a_mask_and_computes_the_same(config):
    plain = job_of(config, INTERLEAVED)
    whole, parted = (measure(replace(plain, document_masks=m), find_device("cpu")) for m in (False, True))
    assert parted.flops == whole.flops
    assert parted.step.peak >= whole.step.peak


REAL = {
    "interleaved": (INTERLEAVED, {}),
    "suffix, two passes": (SUFFIX, {"micro": 1}),
    "interleaved, again": (INTERLEAVED, {"recompute": "full"}),
    "freeze, again, two passes": (None, {"method": "freeze", "recompute": "full", "micro": 1}),
    "lora": (None, {"method": "lora"}),
}
ANCHORED = {
    "interleaved": (INTERLEAVED, {"windows": 4, "anchor": {"share": 0.5}}),
    "suffix, an anchor of many windows": (SUFFIX, {"anchor": {"share": 4}, "micro": 8}),
    "lora": (None, {"method": "lora", "anchor": {}}),
    "full, with a copy of the base": (None, {"method": "full", "anchor": {"share": 1}}),
}


SELDOM = ("suffix, two passes", "interleaved, again", "lora")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SELDOM)) for name in REAL]
)
def test_the_plan_is_what_pytorch_allocates_and_computes(name, config):
    layout, options = REAL[name]
    job = job_of(config, layout, **options)
    found = measure(job, find_device("cpu"))
    assert found.step.peak == pytest.approx(allocated(job), rel=0.01)
    attention = sum(
        block.attention * ((3.5 + (index in found.again)) if stored.saved else 1)
        for index, (block, stored) in enumerate(zip(found.cost.blocks, found.blocks, strict=True))
    )
    assert found.flops.total - attention == pytest.approx(products(job), rel=1e-6)
    model, parameters = trained_model(job, "fp32", CPU)
    trainable = sum(p.numel() for p in parameters.values())
    assert found.parameters.trainable == trainable
    assert found.step.gradients == 4 * trainable
    assert found.step.weights == sum(4 * p.numel() for p in model.parameters()) + sum(
        b.numel() * b.element_size() for b in model.buffers()
    )
    assert found.parameters.base == sum(
        p.numel() for p in trained_model(job_of(config, None, method="full"), "fp32", CPU)[0].parameters()
    )


@pytest.mark.parametrize(
    "name",
    ["interleaved", *(pytest.param(n, marks=pytest.mark.slow) for n in ANCHORED if n != "interleaved")],
)
def test_what_an_anchor_adds_is_planned_too(name, config):
    layout, options = ANCHORED[name]
    job = job_of(config, layout, **options)
    found = measure(job, find_device("cpu"))
    assert found.step.peak == pytest.approx(allocated(job), rel=0.01)
    work = FlopCounterMode(display=False)
    with work:
        time_steps(job, CPU, steps=2)
    assert found.step.work.products == pytest.approx(work.get_total_flops() / 2, rel=0.02)
    learned = job.windows * job.length
    done = (found.step.work.products + found.step.work.attention) / learned
    assert found.flops.total == pytest.approx(done, rel=0.02)
    plain = measure(replace(job, train=job.train.model_copy(update={"anchor": None})), find_device("cpu"))
    assert (plain.flops.anchor, found.flops.step) == (0, plain.flops.step)


def test_full_fine_tuning_is_three_passes_of_everything(config):
    found = measure(job_of(config, SUFFIX), find_device("cpu")).flops
    unit = 2 * (4 * WIDTH * WIDTH + 3 * WIDTH * INNER)
    attention, head = 2 * LENGTH * WIDTH, 2 * WIDTH * WORDS
    assert found.full_finetune == BLOCKS * (3 * unit + 3.5 * attention) + 3 * head
    assert found.forward == (BLOCKS + 2) * (unit + attention) + head
    assert found.total == BLOCKS * (unit + attention) + 2 * (3 * unit + 3.5 * attention) + 2 * head


def test_bf16_halves_what_is_frozen_and_attention_stores_no_square(config):
    narrow = AutoConfig.for_model("llama", **SIZES, dtype="bfloat16")
    narrow.save_pretrained(config.parent / "narrow")
    job = job_of(config.parent / "narrow" / "config.json", SUFFIX, length=256)
    device = find_device("h100")
    found = measure(job, device)
    frozen, new = found.parameters.base, found.parameters.new
    buffers = found.step.weights - 2 * frozen - 4 * new
    assert 0 <= buffers < 1000
    assert all(stored.saved < 256 * 256 * 4 * 4 * 2 for stored in found.blocks)  # fp32 scores of all heads


@pytest.mark.parametrize("kind", ["adamw", "adamw_8bit"])
def test_bytes_of_the_optimiser(kind):
    if kind == "adamw_8bit":
        pytest.importorskip("bitsandbytes")
    parameters = {
        "matrix": torch.nn.Parameter(torch.ones(128, 64)),
        "norm": torch.nn.Parameter(torch.ones(64)),
    }
    optimizer = build_optimizer(parameters, betas=(0.9, 0.95), weight_decay=0.1, kind=kind)
    for parameter in parameters.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    states = [v for p in parameters.values() for v in optimizer.state[p].values()]
    tensors = {v.data_ptr(): v for v in states if isinstance(v, torch.Tensor)}
    held = sum(t.numel() * t.element_size() for t in tensors.values())
    shared = 2 * 256 * 4 if kind == "adamw_8bit" else 0  # the two maps of values, the same for all tensors
    assert optimizer_bytes(list(parameters.values()), kind) == held - shared


def test_packed_layers_take_what_bitsandbytes_takes(config):
    functional = pytest.importorskip("bitsandbytes").functional
    weight = torch.randn(INNER, WIDTH)
    codes, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    held = codes.numel() + state.absmax.numel() + 4 * state.state2.absmax.numel()
    job = job_of(config, SUFFIX, quantise="4bit")
    plain = embody(prepare_ghost(job, meta_base(job, "fp32"), "fp32"), None)
    packed = embody(prepare_ghost(job, meta_base(job, "fp32"), "fp32"), 4)
    saved = plain.weight_bytes - packed.weight_bytes
    linear = BLOCKS * (4 * WIDTH * WIDTH + 3 * WIDTH * INNER)
    assert saved == pytest.approx(linear * (4 - held / weight.numel()), rel=0.01)
    assert packed.trainable == plain.trainable
    assert run_step(packed, job, 2).peak < run_step(plain, job, 2).peak


def test_levers_are_near_the_step_they_speak_of(config):
    device = find_device("cpu")
    job = job_of(config, INTERLEAVED, windows=4, length=128)
    before = measure(job, device)
    levers = {lever.name: lever for lever in list_levers(before, device)}
    others = {
        "half as many new blocks": replace(job, layout=plan_layout(BLOCKS, blocks=1)),
        "all new blocks at the top": replace(job, layout=plan_layout(BLOCKS, **SUFFIX)),
        "all blocks computed again": job_of(config, INTERLEAVED, windows=4, length=128, recompute="full"),
    }
    before = before.flops.total
    assert {"4-bit base", "8-bit Adam", "2 devices"} <= levers.keys()
    for name, changed in others.items():
        found = measure(changed, device)
        assert levers[name].memory.total == pytest.approx(found.step.peak, rel=0.06), name
        if levers[name].time is not None:
            assert levers[name].time == pytest.approx(found.flops.total / before, rel=0.01), name


def test_auto_computes_again_what_the_device_asks_for(config):
    device = find_device("cpu")
    roomy = measure(job_of(config, INTERLEAVED, recompute="auto"), device)
    assert not roomy.again
    held = roomy.step.weights + roomy.step.gradients + roomy.step.optimizer
    tight = replace(device, memory=int(1.6 * held))
    found = measure(job_of(config, INTERLEAVED, recompute="auto", length=256, windows=8, micro=8), tight)
    assert found.again


def test_the_largest_micro_batch_fits_and_the_next_does_not(config):
    found = measure(job_of(config, INTERLEAVED, windows=64, micro=1), find_device("cpu"))
    each = found.other[1].peak - found.step.peak
    room = int(1.02 * (found.step.peak + 9.5 * each) + 1e8)  # the allocator's waste, and the runtime's own
    device = replace(find_device("cpu"), memory=room)
    largest = largest_micro_batch(found, device)
    assert largest == 10

    def needed(micro):
        return memory_of(
            measure(job_of(config, INTERLEAVED, windows=64, micro=micro), device), device
        ).expected

    assert needed(largest) <= device.memory
    assert needed(largest + 1) > device.memory


def test_time_energy_and_money_are_their_products(config):
    device = find_device("h100")
    found = measure(job_of(config, SUFFIX, tokens=10**6), device)
    cost = cost_of(found, device, None, 2.0)
    steps = ceil(10**6 / (2 * LENGTH))
    assert cost.seconds.expected == pytest.approx(steps * cost.step.expected)
    assert cost.dollars.high == pytest.approx(cost.seconds.high / 3600 * 2.0)
    assert cost.kilowatt_hours.low == pytest.approx(cost.seconds.low * device.watts / 3.6e6)
    assert cost.step.low < cost.step.expected < cost.step.high
    assert cost.step.expected >= found.flops.total * 2 * LENGTH / (0.4 * device.flops)
    assert cost_of(found, device, None, None).dollars is None


def test_a_model_that_does_not_fit_one_device_is_cut_over_several(config):
    found = measure(job_of(config, SUFFIX), find_device("h100"))
    step, held = found.step, found.step.weights + found.step.gradients + found.step.optimizer
    several = replace(found.job, devices=4)
    small = replace(find_device("h100"), memory=int(held * 1.5))
    assert is_cut(step, several, small)
    assert not is_cut(step, several, find_device("h100"))
    assert not is_cut(step, found.job, small)
    memory = memory_of(replace(found, job=several), small)
    assert memory.weights == ceil(step.weights / 4)
    assert memory.activations == step.activations + 2 * found.largest_block


def test_the_paper():
    run = paper_run(find_device("h100"), 3.0)
    assert run.tokens == 66_689_433_600
    assert run.flops_per_second / 1e12 == pytest.approx(255, abs=1)
    assert run.hours_here.expected * 3600 * 0.4 * 989e12 == pytest.approx(run.flops)


@pytest.mark.slow
def test_the_papers_flops_are_those_of_its_model(tmp_path):
    LlamaConfig(hidden_size=4096, intermediate_size=11008, dtype="bfloat16").save_pretrained(tmp_path)
    section = TrainSection(tokens=1, batch_tokens=1, learning_rate=1.0, recompute="none")
    layout = plan_layout(32, blocks=8)
    job = Job(
        source=tmp_path / "config.json", layout=layout, train=section, length=4096, windows=1, micro_batch=1
    )
    assert measure(job, find_device("h200")).flops.total == pytest.approx(FLOPS_PER_TOKEN, rel=1e-4)


def test_a_calibration_finds_the_speed_it_was_made_with():
    true = {"products": 2e-11, "attention": 4e-11, "traffic": 3e-11, "streamed": 5e-11, "calls": 7e-6}
    works = [
        Work(
            products=1e9 * i,
            attention=1e8 * i * i,
            traffic=3e8 * (7 - i),
            streamed=1e8 * (i % 4),
            calls=1000 * (1 + i % 3),
        )
        for i in range(1, 7)
    ]
    seconds = [sum(true[name] * value for name, value in vars(work).items()) for work in works]
    found, error = calibration._fit(works, seconds)
    assert found == pytest.approx(true)
    assert error < 1e-6


def test_a_calibration_is_kept_for_the_machine_it_is_of(tmp_path):
    here = replace(find_device("cpu"), key="here")
    speed = Speed(
        device=here.name, threads=torch.get_num_threads(), precision="fp32", products=1.0, attention=2.0,
        traffic=3.0, streamed=3.0, calls=4.0, error=0.1, measured="2026-01-01",
    )  # fmt: skip
    path = tmp_path / "cache" / "speed.json"
    assert read_speed(path, here, "fp32") is None
    write_speed(path, speed)
    assert read_speed(path, here, "fp32") == speed
    assert read_speed(path, here, "bf16") is None
    assert read_speed(path, replace(here, name="another"), "fp32") is None
    assert read_speed(path, find_device("cpu"), "fp32") is None
    path.write_text("{")
    assert read_speed(path, here, "fp32") is None


def test_a_machine_is_calibrated(monkeypatch):
    monkeypatch.setitem(calibration._SHAPES, "cpu", calibration._SHAPES["cpu"][:2])
    monkeypatch.setattr(calibration, "_STEPS", 3)
    speed = calibration.calibrate(find_device("cpu"))
    assert speed.seconds(Work(products=1e9, calls=1e3, traffic=1e8, attention=1e8)) > 0


def test_the_table_of_devices():
    table = device_table()
    assert {
        "h100",
        "h200",
        "a100-40",
        "a100-80",
        "l40s",
        "rtx4090",
        "rtx3090",
        "a10g",
        "t4",
        "mi300x",
        "cpu",
    } <= set(table)
    with pytest.raises(TrainingError, match="choose here, h100"):
        find_device("abacus")


def plan(capsys, *arguments):
    assert main(["plan", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_command(config, capsys):
    facts = plan(capsys, config, "--blocks", 2, "--sequence", 64, "--device", "h100", "--batch-tokens", 256)
    assert facts["parameters"]["new"] == 2 * (4 * WIDTH * WIDTH + 3 * WIDTH * INNER + 2 * WIDTH)
    flops, memory = facts["flops_per_token"], facts["memory_bytes"]
    assert flops["total"] == flops["forward"] + flops["backward"]
    assert memory["total"] == sum(memory[k] for k in ("weights", "gradients", "optimizer", "activations"))
    assert facts["fits"] is True
    assert facts["paper"]["gpu_hours"] == 2830
    assert facts["measured"] is None
    assert main(["plan", str(config), "--blocks", "2", "--sequence", "64", "--device", "h100"]) == 0
    said = capsys.readouterr().out
    assert "2,830 GPU hours" in said
    assert "what would change that" in said
    assert "8-bit Adam" in said


WRONG = {
    ("--blocks", "0"): "--blocks",
    (): "--blocks: say how many",
    ("--method", "lora", "--blocks", "2"): "trains on the base itself",
    ("--blocks", "2", "--precision", "fp8"): "--precision: input should be",
    ("--blocks", "2", "--device", "abacus"): "is not in the table",
}


@pytest.mark.parametrize("options", WRONG, ids=" ".join)
def test_wrong_options_are_said_in_a_line(options, config, capsys):
    assert main(["plan", str(config), *options]) == 2
    assert WRONG[options] in capsys.readouterr().err


def test_a_config_of_no_model_is_refused(tmp_path, capsys):
    (tmp_path / "config.json").write_text(
        '{"model_type": "llama", "num_hidden_layers": 2, "hidden_size": "x"}'
    )
    assert main(["plan", str(tmp_path / "config.json"), "--blocks", "1"]) == 2
    assert "transformers makes no model" in capsys.readouterr().err
    with pytest.raises(CheckpointError):
        least_memory(job_of(tmp_path / "config.json", method="full"), find_device("cpu"))


RECIPE = """
base: {base}
output: {output}
expand: {{blocks: 2}}
data: {{sequence_length: 32, sources: [{{path: {text}}}]}}
train: {{tokens: 128, batch_tokens: 64, learning_rate: 0.001}}
"""


def test_a_run_that_cannot_fit_is_refused_before_it_starts(tiny_llama, tmp_path, capsys, monkeypatch):
    text = tmp_path / "text.txt"
    text.write_text("some text\n" * 50)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(base=tiny_llama(), output=tmp_path / "run", text=text))
    facts = plan(capsys, recipe, "--device", "rtx4090")
    assert facts["job"]["steps"] == 2
    facts = plan(capsys, tiny_llama("other"), "--blocks", "1", "--sequence", "32", "--batch-tokens", "2e3")
    assert facts["job"]["windows_per_step"] == 62
    small = replace(find_device("cpu"), memory=1000)
    monkeypatch.setattr(cost_module, "this_device", lambda _: small)
    for more in ([], ["--resume"]):  # what has not begun is not gone on with
        assert main(["run", str(recipe), *more]) == 2
        said = capsys.readouterr().err
        assert "needs at least" in said
        assert "--force" in said
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(cost_module, "this_device", lambda _: find_device("cpu"))
    assert main(["run", str(recipe)]) == 2  # it goes on, to what else is wrong: the base has no tokenizer
    assert "tokenizer" in capsys.readouterr().err


def test_the_doctor_never_fails(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("DEEPEN_CACHE", str(tmp_path / "none" / "yet"))

    def broken():
        raise RuntimeError("no such thing")

    monkeypatch.setattr(doctor, "_kernels", broken)
    monkeypatch.setattr(doctor, "_version", lambda name: None if name == "wandb" else "1.0")
    assert main(["doctor", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["kernels"] == {"unknown": "RuntimeError: no such thing"}
    assert facts["calibration"] is None
    assert {"cpu"} <= {row["device"] for row in facts["devices"]}
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert "pip install wandb" in said
    assert "pip install tensorboard" not in said
