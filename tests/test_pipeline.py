import json
import math
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_run import write_base, write_recipe
from transformers import AutoModelForCausalLM, AutoTokenizer

import deepen
from deepen.cli import main
from deepen.cli.output import human_count
from deepen.config import load_recipe, parse_recipe
from deepen.data.batches import Mixture
from deepen.errors import CheckFailed, DataError, Interrupted, OutputError, RecipeError, TrainingError
from deepen.expansion import verify_bytes
from deepen.pipeline import curve, directory, run, trainee, training
from deepen.pipeline.directory import open_run
from deepen.pipeline.material import note_repeats
from deepen.pipeline.plan import count_steps, plan_run
from deepen.pipeline.reporter import Silent
from deepen.pipeline.run import run_recipe
from deepen.pipeline.texts import prepare_texts
from deepen.records import EvaluationRecord, RunResult, read_record


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished `blocks` run on a bf16 base, merged."""
    root = tmp_path_factory.mktemp("pipeline")
    write_base(root / "base", dtype="bfloat16")
    recipe = write_recipe(root, merge=True, evaluate__shift=True)
    before = {path.name: path.read_bytes() for path in (root / "base").iterdir()}
    result = run_recipe(load_recipe(recipe))
    assert {path.name: path.read_bytes() for path in (root / "base").iterdir()} == before
    return root, result


def record_of(root):
    return read_record(root / "run" / "evaluation" / "heldout.json", EvaluationRecord)


def test_a_run_leaves_the_files_of_the_design(finished):
    root, _ = finished
    assert {path.name for path in (root / "run").iterdir()} == {
        "README.md", "blocks", "checkpoints", "environment.json", "evaluation", "metrics.jsonl", "model",
        "recipe.yaml", "report.html", "result.json",
    }  # fmt: skip
    assert not [path for path in (root / "run").rglob("*") if path.suffix in {".pt", ".pth", ".bin", ".pkl"}]
    assert load_recipe(root / "run" / "recipe.yaml") == load_recipe(root / "recipe.yaml")


def test_the_record_proves_identity_before_and_the_base_after(finished):
    root, result = finished
    assert result == read_record(root / "run" / "result.json", RunResult)
    assert result.identity.identical
    assert result.identity.max_abs_difference == 0
    assert result.audit.unchanged
    assert result.audit.before == result.audit.after == deepen_full_fingerprint(root / "base")
    assert result.steps == 6
    assert result.tokens == 768
    assert (result.parameters.trainable, result.parameters.new) == (result.parameters.new, new_elements(root))


def deepen_full_fingerprint(directory):
    from deepen.checkpoint import Checkpoint, full_fingerprint

    return full_fingerprint(Checkpoint.open(directory))


def new_elements(root):
    from safetensors import safe_open

    with safe_open(root / "run" / "blocks" / "blocks.safetensors", "pt") as pack:
        return sum(math.prod(pack.get_slice(name).get_shape()) for name in pack.keys())  # noqa: SIM118


def test_the_pack_the_merged_model_and_the_evaluated_one_are_the_same_model(finished):
    root, _ = finished
    merged = AutoModelForCausalLM.from_pretrained(root / "run" / "model", dtype=torch.float32)
    packed = deepen.load(root / "base", root / "run" / "blocks", dtype=torch.float32)
    tokens = torch.arange(40).view(2, 20)
    with torch.no_grad():
        assert torch.equal(merged(tokens).logits, packed(tokens).logits)
    assert verify_bytes(root / "base", root / "run" / "model", base_only=True).identical
    assert not verify_bytes(root / "base", root / "run" / "model").identical

    tokenizer = AutoTokenizer.from_pretrained(root / "base")
    texts = [json.loads(line)["text"] for line in (root / "heldout.jsonl").read_text().splitlines()]
    assert heldout_loss(packed, tokenizer, texts) == pytest.approx(
        value(record_of(root), "heldout"), abs=1e-5
    )
    with deepen.bypass(packed):
        base = heldout_loss(packed, tokenizer, texts)
    assert base == pytest.approx(value(record_of(root), "heldout", "base_value"), abs=1e-5)


def heldout_loss(model, tokenizer, texts):
    """Transformers' own loss over windows of 32 predicted tokens, none across documents."""
    summed, count = 0.0, 0
    for text in texts:
        ids = torch.tensor(tokenizer(text)["input_ids"])
        for start in range(0, len(ids) - 1, 32):
            window = ids[start : start + 33][None]
            with torch.no_grad():
                summed += model(input_ids=window, labels=window).loss.item() * (window.shape[1] - 1)
            count += window.shape[1] - 1
    return summed / count


def value(record, task, field="value"):
    return next(getattr(m, field) for m in record.metrics if (m.task, m.metric) == (task, "nats_per_token"))


def test_the_domain_is_learned_and_intervals_hold_the_difference(finished):
    root, _ = finished
    metrics = {(m.task, m.metric): m for m in record_of(root).metrics}
    assert set(metrics) == {
        (t, m) for t in ("general", "heldout") for m in ("nats_per_token", "bits_per_byte")
    }
    learned = metrics["heldout", "nats_per_token"]
    assert learned.delta == pytest.approx(learned.value - learned.base_value)
    assert learned.ci_low < learned.delta < learned.ci_high < 0


def test_the_shift_from_the_base_is_that_of_the_saved_model(finished):
    root, _ = finished
    record = record_of(root)
    assert [each.task for each in record.shift] == [text.task for text in record.texts]
    for each, held in zip(record.shift, record.texts, strict=True):
        assert each.unshifted + each.marginal + each.shifted == pytest.approx(1)
        assert each.kl > 0
        assert (each.n, each.tokens) == (len(held.items.tokens), sum(held.items.tokens))


def test_a_verdict_stands_beside_every_difference(finished):
    root, _ = finished
    for metric in record_of(root).metrics:
        assert metric.verdict in ("kept", "lost", "not enough items")
        assert metric.p_holm >= metric.p


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_shift_needs_the_base_in_the_model(tmp_path, method):
    recipe = write_recipe(tmp_path, train__method=method, expand=None, evaluate__shift=True)
    with pytest.raises(RecipeError, match=f"evaluate.*method {method} does not keep"):
        load_recipe(recipe)


def test_metrics_have_every_step_and_evaluation(finished):
    root, _ = finished
    lines = [json.loads(line) for line in (root / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in lines if "evaluation" in line] == [0, 3, 6]
    assert lines[-2]["source_tokens"] == {"train": 768}
    for line in lines:
        if "loss" in line:
            assert line["flops_per_second"] > 0
            assert "utilisation" not in line  # too short a run to measure the device for
            assert line["blocks"].keys() == {"1", "4"}
            assert sum(b["gradient_norm"] ** 2 for b in line["blocks"].values()) == pytest.approx(
                line["gradient_norm"] ** 2, rel=1e-4
            )
            assert all(0 < block["update"] < 0.1 for block in line["blocks"].values())
    assert lines[0]["evaluation"]["general"] == pytest.approx(value(record_of(root), "general", "base_value"))


def test_a_finished_run_does_nothing_and_says_so(finished, capsys):
    root, _ = finished
    before = {path: path.stat().st_mtime_ns for path in (root / "run").rglob("*")}
    assert main(["run", str(root / "recipe.yaml")]) == 0
    assert "already finished; nothing to do" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in (root / "run").rglob("*")} == before


def test_pages_lost_to_a_kill_are_written_again(finished):
    root, _ = finished
    (root / "run" / "report.html").unlink()
    assert main(["run", str(root / "recipe.yaml")]) == 0
    assert "<html" in (root / "run" / "report.html").read_text()


def test_an_output_with_another_recipe_is_refused_by_its_first_difference(finished):
    root, _ = finished
    recipe = load_recipe(root / "recipe.yaml", ["train.learning_rate=0.5"])
    with pytest.raises(OutputError, match=r"train.learning_rate: 0.01 there, 0.5 here"):
        run_recipe(recipe)


def test_json_is_one_object_with_the_metrics(finished, capsys):
    root, _ = finished
    assert main(["run", str(root / "recipe.yaml"), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert {"identity", "audit", "metrics", "parameters"} <= printed.keys()


def test_compare_puts_two_runs_beside_the_base(finished, tmp_path, capsys):
    root, _ = finished
    recipe = load_recipe(
        root / "recipe.yaml",
        [
            "train.method=full",
            "expand=null",
            "merge=false",
            "evaluate.shift=false",
            f"output={root}/full",
        ],
    )
    result = run_recipe(recipe)
    assert result.audit is None
    assert result.identity is None
    assert result.parameters.trainable == result.parameters.base
    page = tmp_path / "page.html"
    assert main(["compare", str(root / "full"), str(root / "run"), "--html", str(page)]) == 0
    out = capsys.readouterr().out
    assert all(word in out for word in ("base", "full", "run"))
    assert "<svg" in page.read_text()
    trained = AutoModelForCausalLM.from_pretrained(root / "full" / "model")
    assert trained.dtype == torch.bfloat16


def test_a_run_whose_recipe_is_not_text_is_refused(tmp_path):
    write_base(tmp_path / "base")
    recipe = load_recipe(write_recipe(tmp_path))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_bytes(b"base: \xff")
    with pytest.raises(OutputError, match=r"its recipe\.yaml cannot be read"):
        run_recipe(recipe, resume=True)


def test_dry_run_writes_nothing(tmp_path, capsys):
    write_base(tmp_path / "base")
    recipe = write_recipe(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert main(["run", str(recipe), "--dry-run"]) == 0
    out = capsys.readouterr().out
    printed, facts = out.split("\nlayout", 1)
    assert parse_recipe(printed, where="stdout") == load_recipe(recipe)
    assert "■ □1 ■■ □4" in facts
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    new = human_count(2 * count(model.model.layers[0]))
    assert f"{human_count(count(model))} base + {new} new; {new} train" in facts
    assert "768 in 6 steps of 4 windows × 32 tokens" in facts
    assert sorted(tmp_path.rglob("*")) == before


def test_a_dry_run_says_that_the_output_would_be_refused(tmp_path, capsys):
    write_base(tmp_path / "base")
    recipe = write_recipe(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "letter.txt").write_text("mine")
    assert main(["run", str(recipe), "--dry-run"]) == 2
    assert "exists and is not a run; choose another output" in capsys.readouterr().err


@pytest.mark.parametrize("steps", [9, 19, 49])
def test_a_run_is_evaluated_ten_times_at_most_unless_asked(tmp_path, steps):
    write_base(tmp_path / "base")
    changes = {"tokens": steps * 128, "batch_tokens": 128, "evaluate_every": None, "checkpoint_every": None}
    recipe = load_recipe(write_recipe(tmp_path, **{f"train__{key}": value for key, value in changes.items()}))
    plan = count_steps(plan_run(recipe), mixture=None)
    assert plan.steps == steps
    assert math.ceil(steps / plan.evaluate_every) <= 10
    assert math.ceil(steps / plan.checkpoint_every) <= 10


@pytest.mark.parametrize(
    ("tokens", "said"), [(10, []), (11, ["train: all of it is seen 11 times; give more"])]
)
def test_few_texts_seen_over_and_over_are_said(tmp_path, tokens, said):
    write_base(tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    recipe = write_recipe(tmp_path, data__sequence_length=8, train__batch_tokens=8)
    mixture = prepare_texts(load_recipe(recipe), tokenizer, tmp_path / "cache", Silent()).mixture
    windows = mixture.windows_per_epoch
    asked = load_recipe(recipe, [f"train.tokens={tokens * windows * 8}"])
    reporter = Notes()
    note_repeats(count_steps(plan_run(asked), mixture), mixture, reporter)
    assert [note[: len(words)] for note, words in zip(reporter.notes, said, strict=True)] == said


class Notes(Silent):
    def __init__(self):
        self.notes = []

    def note(self, text):
        self.notes.append(text)


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("method", ["blocks", "full"])
def test_bf16_compute_is_proved_and_audited_too(tmp_path, method):
    write_base(tmp_path / "base", dtype="bfloat16")
    changes = {"expand": None} if method == "full" else {}
    recipe = write_recipe(tmp_path, train__precision="bf16", train__method=method, **changes)
    result = run_recipe(load_recipe(recipe))
    if method == "blocks":
        assert result.identity.checks == ["bfloat16, uncached", "bfloat16, cached"]
        assert result.audit.unchanged
    assert value(record_of(tmp_path), "heldout") < value(record_of(tmp_path), "heldout", "base_value")


def test_code_in_a_base_is_neither_run_nor_passed_on(tmp_path):
    base = write_base(tmp_path / "base")
    (base / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    for name, keys in {
        "config.json": ["AutoConfig", "AutoModelForCausalLM"],
        "tokenizer_config.json": ["AutoTokenizer"],
    }.items():
        content = json.loads((base / name).read_text())
        where = ["evil.Evil", None] if name.startswith("tok") else "evil.Evil"
        (base / name).write_text(json.dumps(content | {"auto_map": dict.fromkeys(keys, where)}))
    run_recipe(load_recipe(write_recipe(tmp_path, merge=True)))
    assert not (tmp_path / "ran").exists()
    assert not list((tmp_path / "run").rglob("*.py"))


def test_heldout_documents_of_a_source_are_evaluated(tmp_path):
    write_base(tmp_path / "base")
    repeats = {"action": "report"}
    recipe = write_recipe(tmp_path, data__heldout=0.2, data__deduplicate=repeats, evaluate__domain=[])
    run_recipe(load_recipe(recipe))
    assert {metric.task for metric in record_of(tmp_path).metrics} == {"general", "train-heldout"}
    found = json.loads((tmp_path / "run" / "findings.json").read_text())
    assert " repeat an earlier one " in found["line"]
    for page in ("report.html", "README.md"):
        assert f"Checked before training: {found['line']}." in (tmp_path / "run" / page).read_text()


def test_the_device_is_measured_and_a_windows_place_is_told(tmp_path, monkeypatch):
    write_base(tmp_path / "base")
    recipe = load_recipe(write_recipe(tmp_path))
    monkeypatch.setattr(training, "_CALIBRATION_SHARE", 0)
    monkeypatch.setattr(training, "attained", lambda device, dtype: 2e9)
    honest, told = training.train, []

    def begun(*arguments, **keywords):
        told.append(arguments[-1].name_window(1, 2))
        honest(*arguments, **keywords)

    monkeypatch.setattr(training, "train", begun)
    monkeypatch.setattr(Mixture, "places", lambda self, step, windows: [(0, 10 * step + i) for i in range(4)])
    run_recipe(recipe)
    assert told == ["window 12 of train"]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert [line["utilisation"] for line in steps] == pytest.approx(
        [line["flops_per_second"] / 2e9 for line in steps], rel=0.01, abs=1e-4
    )


def test_a_base_that_moves_fails_the_audit_and_leaves_no_result(tmp_path, monkeypatch):
    write_base(tmp_path / "base")
    recipe = load_recipe(write_recipe(tmp_path))
    honest = training.train

    def leaky(model, *arguments, **keywords):
        honest(model, *arguments, **keywords)
        with torch.no_grad():
            model.model.norm.weight[0] += 1e-3

    monkeypatch.setattr(training, "train", leaky)
    with pytest.raises(CheckFailed, match="a base tensor changed"):
        run_recipe(recipe)
    assert not (tmp_path / "run" / "result.json").exists()
    assert not (tmp_path / "run" / "blocks").exists()


def test_a_base_whose_every_weight_moves_by_less_than_its_precision_fails_the_audit(tmp_path, monkeypatch):
    write_base(tmp_path / "base", dtype="bfloat16")
    honest = training.train

    def leaky(model, *arguments, **keywords):
        honest(model, *arguments, **keywords)
        with torch.no_grad():
            model.model.layers[0].self_attn.q_proj.weight.mul_(1 + 1e-4)

    monkeypatch.setattr(training, "train", leaky)
    with pytest.raises(CheckFailed, match="a base tensor changed"):
        run_recipe(load_recipe(write_recipe(tmp_path)))


def test_an_expansion_that_is_not_the_identity_is_stopped_before_training(tmp_path, monkeypatch):
    write_base(tmp_path / "base")
    recipe = load_recipe(write_recipe(tmp_path))
    honest = trainee.insert_blocks

    def wrong(model, *arguments, **keywords):
        honest(model, *arguments, **keywords)
        with torch.no_grad():
            model.model.layers[1].mlp.down_proj.weight[0, 0] = 0.5

    monkeypatch.setattr(trainee, "insert_blocks", wrong)
    with pytest.raises(CheckFailed, match="not the base before training"):
        run_recipe(recipe)


def test_every_fault_of_a_recipe_against_its_base_is_named_at_once(tmp_path):
    write_base(tmp_path / "base")
    recipe = write_recipe(
        tmp_path,
        expand={"after": [7]},
        data__sequence_length=128,
        evaluate__general=[{"path": str(tmp_path / "nowhere.txt")}],
        evaluate__domain=[{"path": str(tmp_path / "train.jsonl")}, {"path": str(tmp_path / "train.jsonl")}],
    )
    with pytest.raises(RecipeError) as error:
        run_recipe(load_recipe(recipe))
    lines = str(error.value).splitlines()
    assert len(lines) == 4
    for line, words in zip(
        lines, ["block 7 is out of range", "128", "nowhere.txt", "called train"], strict=True
    ):
        assert words in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"base": "nowhere/at-all/x"}, "nowhere/at-all/x"),
        ({"train__device": "cuda:99"}, "cuda:99 cannot be used"),
        ({"train__tokens": 0}, "train.tokens"),
        ({"expand__blocks": 0}, "expand.blocks"),
        ({"data__sources": [{"path": "gone.jsonl"}]}, "gone.jsonl"),
        ({"expand": None}, "method blocks needs an expand section"),
    ],
)
def test_bad_input_is_two_lines_and_exit_code_2(tmp_path, capsys, change, words):
    write_base(tmp_path / "base")
    recipe = write_recipe(tmp_path, **change)
    assert main(["run", str(recipe)]) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if "error" in line or words in line]
    assert 1 <= len(said) <= 2
    assert words in said[0]
    assert not (tmp_path / "run").exists()


def test_an_empty_corpus_is_refused(tmp_path, capsys):
    write_base(tmp_path / "base")
    recipe = write_recipe(tmp_path)
    (tmp_path / "train.jsonl").write_text("")
    assert main(["run", str(recipe)]) == 2
    assert "train.jsonl" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_what_is_wrong_shows_before_training_and_can_be_mended(tmp_path):
    write_base(tmp_path / "base")
    wrong = load_recipe(write_recipe(tmp_path), ["data.sources.0.field=nowhere"])
    with pytest.raises(DataError):
        run_recipe(wrong)
    assert not (tmp_path / "run").exists()
    recipe = load_recipe(tmp_path / "recipe.yaml")
    with open_run(recipe):
        pass
    with pytest.raises(DataError), open_run(recipe, resume=True):
        raise DataError("what an earlier process began is not this one's to remove")
    assert (tmp_path / "run" / "recipe.yaml").exists()


def test_a_finished_run_is_answered_without_torch(finished):
    root, _ = finished
    code = "import sys; from deepen.cli import main; main(sys.argv[1:]); print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code, "run", str(root / "recipe.yaml")],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "nothing to do" in done.stderr
    assert done.stdout.splitlines()[-1] == "False"


@pytest.mark.parametrize("evaluate", [{}, {"evaluate": None}])
def test_a_tokenizer_of_another_model_is_refused(tmp_path, capsys, evaluate):
    write_base(tmp_path / "base", vocab_size=100)
    assert main(["run", str(write_recipe(tmp_path, **evaluate))]) == 2
    assert "the model has 100 embeddings; its tokenizer is another model's" in capsys.readouterr().err


def test_an_unfinished_run_wants_a_word_and_a_strangers_directory_is_left_alone(tmp_path):
    write_base(tmp_path / "base")
    recipe = load_recipe(write_recipe(tmp_path))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    with pytest.raises(OutputError, match="is not a run"):
        run_recipe(recipe)
    (tmp_path / "run" / "thesis.txt").unlink()
    with open_run(recipe), pytest.raises(OutputError, match="another process"):
        run_recipe(recipe, resume=True)
    with pytest.raises(OutputError, match=r"unfinished; continue with --resume"):
        run_recipe(recipe)
    assert run_recipe(recipe, overwrite=True).steps == 6


def test_overwrite_is_for_runs_alone(tmp_path):
    write_base(tmp_path / "base")
    recipe = load_recipe(write_recipe(tmp_path))
    thesis = tmp_path / "run" / "model" / "thesis.txt"
    thesis.parent.mkdir(parents=True)
    thesis.write_text("mine")
    with pytest.raises(OutputError, match="is not a run"):
        run_recipe(recipe, overwrite=True)
    assert thesis.read_text() == "mine"


@pytest.mark.parametrize(("base", "output"), [("base", "base/run"), ("run/model", "run")])
@pytest.mark.parametrize("overwrite", [False, True])
def test_output_and_base_apart(tmp_path, base, output, overwrite):
    write_base(tmp_path / base)
    (tmp_path / "run").mkdir(exist_ok=True)
    recipe = write_recipe(tmp_path, base=str(tmp_path / base), output=str(tmp_path / output))
    (tmp_path / "run" / "recipe.yaml").write_text(recipe.read_text())
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(OutputError, match="the input"):
        run_recipe(load_recipe(recipe), overwrite=overwrite)
    assert sorted(tmp_path.rglob("*")) == before


def test_what_a_kill_at_the_very_beginning_leaves_is_no_strangers(tmp_path):
    write_base(tmp_path / "base")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".recipe.yaml.partial-0123456789ab").write_text("base: ")
    assert run_recipe(load_recipe(write_recipe(tmp_path))).steps == 6
    assert not list((tmp_path / "run").glob(".*"))


def test_a_run_that_began_while_this_one_was_planned_is_not_mixed_with_it(tmp_path, monkeypatch):
    write_base(tmp_path / "base")
    recipe = load_recipe(write_recipe(tmp_path))
    other = load_recipe(tmp_path / "recipe.yaml", ["train.learning_rate=0.5"])
    honest = run.plan_run

    def slow(asked):
        with open_run(other):
            return honest(asked)

    monkeypatch.setattr(run, "plan_run", slow)
    with pytest.raises(OutputError, match=r"train.learning_rate: 0.5 there, 0.01 here"):
        run_recipe(recipe)
    assert load_recipe(tmp_path / "run" / "recipe.yaml") == other


@pytest.mark.parametrize("removed", range(5))
def test_an_overwrite_cut_short_leaves_a_run_that_resumes_to_the_same_result(
    tmp_path, finished, monkeypatch, removed
):
    root, _ = finished
    shutil.copytree(root / "run", tmp_path / "run")
    recipe = load_recipe(root / "recipe.yaml", [f"output={tmp_path / 'run'}"])
    honest, left = shutil.rmtree, iter(range(removed))

    def remove(*arguments, **keywords):
        if next(left, None) is None:
            raise KeyboardInterrupt
        honest(*arguments, **keywords)

    def write(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", remove)
        patch.setattr(directory, "write_file", write)
        with pytest.raises(KeyboardInterrupt):
            run_recipe(recipe, overwrite=True)
    with pytest.raises(OutputError, match="another recipe"):
        run_recipe(load_recipe(root / "recipe.yaml", [f"output={tmp_path / 'run'}", "train.seed=5"]))
    run_recipe(recipe, resume=True)
    for file in ("blocks/blocks.safetensors", "model/model.safetensors"):
        assert (tmp_path / "run" / file).read_bytes() == (root / "run" / file).read_bytes()
    assert losses(tmp_path / "run") == losses(root / "run")


def losses(path):
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line.get("loss"), line.get("evaluation")) for line in lines]


def test_what_overwrite_cannot_remove_stops_it(tmp_path, finished, monkeypatch):
    root, _ = finished
    shutil.copytree(root / "run", tmp_path / "run")
    recipe = load_recipe(root / "recipe.yaml", [f"output={tmp_path / 'run'}", "train.learning_rate=0.5"])

    def refused(*arguments, **keywords):
        if not keywords.get("ignore_errors"):
            raise PermissionError(13, "Permission denied", "step-6")

    monkeypatch.setattr(shutil, "rmtree", refused)
    with pytest.raises(OutputError, match="Permission denied"):
        run_recipe(recipe, overwrite=True)


def stopped_after(step, recipe, monkeypatch):
    """Run a recipe and stop it as a signal would."""
    honest = training.train

    def asked(*arguments, **keywords):
        *rest, hooks = arguments
        done = []
        stop = replace(
            hooks, log=lambda report: (done.append(report.step), hooks.log(report)), stop=lambda: step in done
        )
        honest(*rest, stop, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(training, "train", asked)
        with pytest.raises(Interrupted):
            run_recipe(recipe)


def test_a_base_that_changed_since_the_run_was_stopped_is_refused(tmp_path, monkeypatch):
    write_base(tmp_path / "base")
    recipe = load_recipe(write_recipe(tmp_path))
    stopped_after(3, recipe, monkeypatch)
    path = tmp_path / "base" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.0.mlp.up_proj.weight"] += 0.25
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(TrainingError, match="was made with base"):
        run_recipe(recipe, resume=True)


def test_how_a_run_is_carried_out_may_change_when_it_resumes(tmp_path, finished, monkeypatch):
    root, _ = finished
    for name in ("base", "train.jsonl", "general.jsonl", "heldout.jsonl"):
        os.symlink(root / name, tmp_path / name)
    recipe = write_recipe(tmp_path, merge=True)
    stopped_after(3, load_recipe(recipe), monkeypatch)
    changes = ["train.micro_batch=1", "train.device=cpu", f"data.cache={tmp_path}/other"]
    run_recipe(load_recipe(recipe, changes), resume=True)
    ours, theirs = losses(tmp_path / "run"), losses(root / "run")
    assert [step for step, *_ in ours] == [step for step, *_ in theirs]
    assert [loss for _, loss, _ in ours if loss] == pytest.approx([loss for _, loss, _ in theirs if loss])


def test_a_signal_during_the_last_step_stops_before_the_rest(tmp_path, monkeypatch):
    write_base(tmp_path / "base")
    recipe = load_recipe(write_recipe(tmp_path))
    honest = training.train

    def signalled(*arguments, **keywords):
        honest(*arguments, **keywords)
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(training, "train", signalled)
        with pytest.raises(Interrupted, match="continue with --resume"):
            run_recipe(recipe)
    assert not (tmp_path / "run" / "blocks").exists()

    def killed(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run, "audit_base", killed)
        with pytest.raises(KeyboardInterrupt):
            run_recipe(recipe, resume=True)
    whole, scored, score = losses(tmp_path / "run"), [], curve.score_texts
    assert [step for step, _, found in whole if found] == [0, 3, 6]
    monkeypatch.setattr(curve, "score_texts", lambda *all, **more: scored.append(1) or score(*all, **more))
    assert run_recipe(recipe, resume=True).steps == 6
    assert (losses(tmp_path / "run"), scored) == (whole, [1])


def test_a_run_the_disk_cannot_hold_is_refused_before_anything_is_written(tmp_path, capsys, monkeypatch):
    write_base(tmp_path / "base")
    recipe = write_recipe(tmp_path)
    full = os.statvfs_result((4096, 4096, 100, 1, 1, 0, 0, 0, 0, 255))
    monkeypatch.setattr(os, "statvfs", lambda path: full)
    assert main(["run", str(recipe)]) == 2
    assert "are free on its disk" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_sigterm_saves_stops_and_resumes_to_the_same_bytes(tmp_path, finished, monkeypatch, capsys):
    root, _ = finished
    for name in ("base", "train.jsonl", "general.jsonl", "heldout.jsonl"):
        os.symlink(root / name, tmp_path / name)
    recipe, honest = write_recipe(tmp_path), training.train

    def signalled(*arguments, **keywords):
        *rest, hooks = arguments

        def log(report):
            hooks.log(report)
            if report.step == 3:
                os.kill(os.getpid(), signal.SIGTERM)

        honest(*rest, replace(hooks, log=log), **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(training, "train", signalled)
        assert main(["run", str(recipe)]) == 130
    assert "continue with --resume" in capsys.readouterr().err
    assert (tmp_path / "run" / "checkpoints" / "step-3").is_dir()
    run_recipe(load_recipe(recipe), resume=True)
    blocks = "blocks/blocks.safetensors"
    assert (tmp_path / "run" / blocks).read_bytes() == (root / "run" / blocks).read_bytes()
