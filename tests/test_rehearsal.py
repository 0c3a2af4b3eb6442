"""Steps worked out from a few blocks: the arithmetic exactly, the blocks by their FLOPs, the command."""

import json
from dataclasses import replace

import pytest
from test_planner import INTERLEAVED, RECIPE, SIZES, SUFFIX, allocated, job_of
from test_planner import config as config  # the fixture
from transformers import AutoConfig

from deepen.cli import main
from deepen.cli.plan_page import print_plan
from deepen.errors import TrainingError
from deepen.expansion import plan_layout
from deepen.model.structure import blocks_of, family_of
from deepen.planner import devices, rehearsal
from deepen.planner.anchored import base_of
from deepen.planner.devices import find_device
from deepen.planner.estimate import measure
from deepen.planner.job import TeacherFiles
from deepen.planner.rehearsal import find_kinds, list_probes, rehearse, solve_steps, step_loads
from deepen.planner.stage import set_stage
from deepen.training.flops import count_flops
from deepen.training.parallel import Root

CPU = find_device("cpu")


def test_blocks_are_solved_exactly():
    counts = [[1, 1, 1], [3, 1, 1], [1, 3, 1], [1, 1, 3], [3, 3, 3]]
    true = [([2e-3, 5e-3, 7e-3], 0.04), ([3e-3, 8e-3, 9e-3], 0.05)]
    seconds = [
        [rest + sum(n * t for n, t in zip(row, each, strict=True)) for row in counts] for each, rest in true
    ]
    each, rest, apart = solve_steps(counts, seconds, [-3.0, 4.0])
    assert each == pytest.approx([4 * b - 3 * a for a, b in zip(true[0][0], true[1][0], strict=True)])
    assert rest == pytest.approx(4 * 0.05 - 3 * 0.04)
    assert apart < 1e-9
    seconds[0][-1] *= 1.1  # the deepest does not lie on the line
    assert solve_steps(counts, seconds, [-3.0, 4.0])[2] > 0.01


def test_a_kind_that_costs_nothing_takes_no_negative_time():
    assert solve_steps([[1], [3]], [[1.0, 0.9]], [1.0])[0] == [0.0]


LOADS = {
    "one pass": {"windows": 2, "micro": 2},
    "four passes": {"windows": 8, "micro": 2},
    "a pass and a half": {"windows": 3, "micro": 2},
    "two devices": {"windows": 8, "micro": 2, "devices": 2},
    "an anchor": {"windows": 8, "micro": 2, "anchor": {"share": 0.5}},
    "an anchor smaller than a pass": {"windows": 2, "micro": 2, "anchor": {"share": 0.5}},
}


@pytest.mark.parametrize("name", LOADS)
def test_a_step_is_made_up_of_those_that_are_made(name, config):
    job = job_of(config, SUFFIX, **LOADS[name])

    def seconds(windows, anchored):
        return 7 + 3 * windows + 5 * anchored

    loads = step_loads(job)
    made = sum(weight * seconds(passes * job.micro_batch, held) for (passes, held), weight in loads.items())
    assert made == pytest.approx(seconds(job.windows / job.devices, job.anchor_windows / job.devices))
    assert len(loads) == 1 + ("anchor" in LOADS[name]) + (job.windows / job.devices > job.micro_batch)


DEPTH = 8
MODELS = {
    "interleaved": ({"blocks": 2}, {}),
    "suffix, computed again": ({"blocks": 3, "placement": "suffix"}, {"recompute": "full"}),
    "prefix": ({"blocks": 2, "placement": "prefix"}, {}),
    "freeze": (None, {"method": "freeze", "freeze": {"blocks": 3}}),
    "lora": (None, {"method": "lora"}),
    "prompt": (None, {"method": "prompt", "prompt": {"blocks": 3}}),
    "full": (None, {"method": "full"}),
}
KINDS = {
    "llama": {},
    "gemma3_text": {"sliding_window": 16, "head_dim": 16},
}
CASES = [*(("llama", name) for name in MODELS), ("gemma3_text", "interleaved")]
OFTEN = (("gemma3_text", "interleaved"),)


def deep_job(tmp_path, kind, name, **more):
    sizes = {**SIZES, "num_hidden_layers": DEPTH, **KINDS[kind]}
    AutoConfig.for_model(kind, **sizes, dtype="float32").save_pretrained(tmp_path)
    layout, options = MODELS[name]
    job = job_of(tmp_path / "config.json", None, method="full")
    options = {"method": "blocks", "tokens": 1, "batch_tokens": 1, "learning_rate": 1e-3, **options, **more}
    return replace(
        job,
        layout=plan_layout(DEPTH, **layout) if layout else None,
        train=type(job.train)(**({"recompute": "none"} | options)),
    )


@pytest.mark.parametrize(
    ("kind", "name"), [pytest.param(*case, marks=[pytest.mark.slow] * (case not in OFTEN)) for case in CASES]
)
def test_flops_of_the_whole_are_those_worked_out_from_few_blocks(kind, name, tmp_path):
    found = measure(deep_job(tmp_path, kind, name), CPU)
    kinds = find_kinds(found)
    probes = list_probes(kinds, 1)
    stage = set_stage(found.job, CPU, probes[-1], found.again).with_values(CPU)
    model = stage.ghost.model
    counts, flops = [], []
    for probe in probes:
        trained = stage.show(probe)
        blocks = list(blocks_of(model, family_of(model)))
        cost = count_flops(Root(model), model, blocks, found.job.length)
        assert cost.blocks == tuple(found.cost.blocks[index] for index in probe)
        inside = [{id(p) for p in block.parameters()} for block in blocks]
        held = [sum(p.numel() for p in trained.values() if id(p) in each) for each in inside]
        assert held == [found.trained[index] for index in probe]
        counts.append([len(set(each.positions) & set(probe)) for each in kinds])
        flops.append(cost.total)
    several = [i for i, each in enumerate(kinds) if len(each.positions) > 1]
    chosen = [[row[i] for i in several] for row in counts]
    each, rest, apart = solve_steps(chosen, [flops], [1.0])
    whole = rest + sum(t * len(kinds[i].positions) for t, i in zip(each, several, strict=True))
    assert whole == pytest.approx(found.flops.step, rel=1e-6)
    assert apart < 1e-6


def test_kinds_are_told_apart(tmp_path):
    found = measure(deep_job(tmp_path, "llama", "interleaved"), CPU)
    assert {kind.state: kind.positions for kind in find_kinds(found)} == {
        "below": (0, 1, 2, 3),
        "trains": (4, 9),
        "frozen": (5, 6, 7, 8),
    }
    assert list_probes(find_kinds(found), 2) == [
        (0, 4, 5),
        (0, 1, 2, 4, 5),
        (0, 4, 5, 9),
        (0, 4, 5, 6, 7),
        (0, 1, 2, 4, 5, 6, 7, 9),
    ]


@pytest.mark.parametrize(
    "name", ["interleaved", *(pytest.param(name, marks=pytest.mark.slow) for name in ("lora", "full"))]
)
def test_an_anchored_model_of_few_blocks_trains(name, tmp_path):
    found = measure(deep_job(tmp_path, "llama", name, anchor={}), CPU)
    (*_, probe), job = list_probes(find_kinds(found), 1), found.job
    stage = set_stage(job, CPU, probe, found.again)
    assert 0 < stage.needed(CPU) < CPU.memory
    stage = stage.with_values(CPU)
    assert len(stage.train(probe, 1, 1, 2)) == 2
    new = job.layout.new_indices if job.layout else frozenset()
    with base_of(stage.ghost, job)(stage.ghost.model) as base:
        assert len(blocks_of(base, family_of(base))) == len(set(probe) - new)
    assert len(stage.blocks.model.model.layers) == len(probe)


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(rehearsal, "_ROUNDS", (2, 2))


@pytest.mark.usefixtures("quick")
def test_the_command_says_that_its_times_were_measured(tiny_llama, tmp_path, capsys):
    (tmp_path / "text.txt").write_text("some text\n" * 50)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(base=tiny_llama(), output=tmp_path / "run", text=tmp_path / "text.txt"))
    penalty = ["--set", "train.drift_penalty=0.1", "--set", "train.micro_batch=1"]
    assert main(["plan", str(recipe), "--measure", "--json", *penalty]) == 0
    out, err = capsys.readouterr()
    facts = json.loads(out)
    assert "measurement here" in facts["basis"]["time"]
    assert not facts["basis"]["calibrate"]
    measured, cost = facts["measured"], facts["cost"]
    assert cost["step"] == measured["step"]
    assert cost["seconds"]["expected"] == pytest.approx(2 * measured["step"]["expected"])
    assert measured["step"]["low"] < measured["step"]["expected"] < measured["step"]["high"]
    assert {kind["state"] for kind in measured["blocks"]} == {"below", "trains", "frozen"}
    assert "training a few blocks" in err
    print_plan(facts)
    out = capsys.readouterr().out
    assert "by measurement here" in out
    assert "2 that train ×" in out
    assert not (tmp_path / "run").exists()


REFUSED = {
    ("--device", "h100"): "trains on this machine, and --device is h100",
    ("--quantise", "4bit"): "random weights cannot be packed",
}


@pytest.mark.parametrize("options", REFUSED, ids=" ".join)
def test_what_cannot_be_measured_is_refused(options, config, capsys):
    assert main(["plan", str(config), "--blocks", "1", "--sequence", "64", "--measure", *options]) == 2
    assert REFUSED[options] in capsys.readouterr().err


def test_blocks_that_do_not_fit_are_not_trained(config, capsys, monkeypatch):
    monkeypatch.setattr(devices, "this_device", lambda *_: replace(CPU, key="here", memory=1000))
    assert main(["plan", str(config), "--blocks", "1", "--sequence", "64", "--measure"]) == 2
    said = capsys.readouterr().err
    assert "training 3 of 3 blocks needs 0.2 GB" in said
    assert "smaller micro-batch" in said


@pytest.mark.slow
def test_fewer_blocks_are_trained_where_more_do_not_fit(tmp_path, monkeypatch):
    found = measure(deep_job(tmp_path, "llama", "interleaved"), CPU)
    many, few = (
        set_stage(found.job, CPU, list_probes(find_kinds(found), more)[-1], ()).needed(CPU) for more in (2, 1)
    )
    assert few < many
    monkeypatch.setattr(rehearsal, "_ROUNDS", (2, 2))
    assert rehearse(found, replace(CPU, memory=few)).deepest == 6
    with pytest.raises(TrainingError, match="6 of 10 blocks"):
        rehearse(found, replace(CPU, memory=few - 1))


@pytest.mark.parametrize(
    "expanded", [pytest.param(False, id="plain", marks=pytest.mark.slow), pytest.param(True, id="expanded")]
)
def test_a_teacher_counts(expanded, config, tmp_path):
    AutoConfig.for_model("llama", **{**SIZES, "num_hidden_layers": 3}, dtype="float32").save_pretrained(
        tmp_path
    )
    files = TeacherFiles(tmp_path / "config.json", plan_layout(3, blocks=1) if expanded else None)
    job = replace(job_of(config, INTERLEAVED, teacher="another"), teacher=files)
    found = measure(job, CPU)
    unit = (found.cost.blocks[0].forward, found.cost.blocks[0].attention)
    assert found.flops.teacher == (3 + expanded) * sum(unit) + found.cost.outside
    assert found.flops.total == found.flops.step + found.flops.teacher
    assert found.step.peak == pytest.approx(allocated(job), rel=0.01)
