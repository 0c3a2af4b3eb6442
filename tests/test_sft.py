"""Tuning on conversations: after training, alone, all parameters, the new blocks or adapters."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_run import write_base, write_recipe
from transformers import AutoModelForCausalLM, AutoTokenizer

import deepen
from deepen.checkpoint import Checkpoint, full_fingerprint
from deepen.cli import main
from deepen.config import load_recipe
from deepen.data.chat import choose_template
from deepen.data.evaluation_text import score_answers
from deepen.errors import Interrupted, RecipeError, TrainingError
from deepen.evaluation.heldout import evaluate_texts
from deepen.methods import Lora
from deepen.pipeline import training
from deepen.pipeline.plan import plan_run
from deepen.pipeline.run import run_recipe
from deepen.pipeline.subject import find_subject
from deepen.records import EvaluationRecord, read_record, read_result

ROOT = Path(__file__).parents[1]
WAYS = ("all", "new", "lora")
TALK = [
    {
        "instruction": f"say {number}",
        "input": "",
        "output": " ".join(["block gate norm head"] * (1 + number % 3)),
    }
    for number in range(40)
]


def write_talk(root):
    (root / "talk.json").write_text(json.dumps(TALK))
    return {
        "data": [{"path": str(root / "talk.json")}],
        "template": "zephyr",
        "sequence_length": 64,
        "heldout": 0.25,
        "batch": 4,
        "learning_rate": 5e-3,
        "epochs": 2,
        "evaluate_every": 100,
        "checkpoint_every": 4,
    }


def tuning(root, trainable, **changes):
    """A recipe that tunes alone, on the pack of the trained run."""
    alone = {"train": None, "data": None, "expand": None}
    sft = write_talk(root) | {"trainable": trainable, "cache": str(root / "cache")}
    pack = {"pack": str(root / "run" / "blocks")} if changes.pop("on_pack", True) else {}
    path = write_recipe(root, **{**alone, **pack, "sft": sft, **changes})
    return path.rename(root / f"{Path(changes.get('output', 'x')).name}.yaml")


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """A finished run of both stages on a bf16 base: all parameters are tuned."""
    root = tmp_path_factory.mktemp("sft")
    write_base(root / "base", dtype="bfloat16")
    recipe = write_recipe(root, sft=write_talk(root)).rename(root / "both.yaml")
    before = {path.name: path.read_bytes() for path in (root / "base").iterdir()}
    run_recipe(load_recipe(recipe))
    assert {path.name: path.read_bytes() for path in (root / "base").iterdir()} == before
    return root


@pytest.fixture(scope="module")
def tuned(both):
    """The same pack tuned in three ways by recipes of their own, and the base."""
    for way in WAYS:
        run_recipe(load_recipe(tuning(both, way, output=str(both / way), merge=way != "all")))
    path = tuning(both, "all", on_pack=False, output=str(both / "alone"))
    run_recipe(load_recipe(path))
    return both


def value(run, task, field="value"):
    record = read_record(run / "evaluation" / "heldout.json", EvaluationRecord)
    return next(getattr(m, field) for m in record.metrics if (m.task, m.metric) == (task, "nats_per_token"))


def test_three_rows_on_the_same_items(both, capsys):
    trained, tuned = both / "run", both / "run" / "sft"
    for task in ("general", "heldout", "talk-heldout"):
        assert value(trained, task, "base_value") == value(tuned, task, "base_value")
    assert value(tuned, "talk-heldout") < value(trained, "talk-heldout")
    assert main(["run", str(both / "both.yaml")]) == 0
    said = capsys.readouterr()
    assert "already finished" in said.err
    assert all(word in said.out for word in ("trained", "tuned", "talk-heldout"))
    assert "the base's tensors changed too" in said.out
    assert "<svg" in (trained / "stages.html").read_text()
    assert "All parameters" in (tuned / "report.html").read_text()
    assert main(["run", str(both / "both.yaml"), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["stage"], printed["sft"]["stage"], printed["sft"]["method"]) == ("train", "sft", "full")


def test_the_tuning_of_a_run_is_the_one_of_its_own_recipe(tuned):
    nested = load_recipe(tuned / "run" / "sft" / "recipe.yaml")
    assert (nested.train, nested.pack) == (None, str(tuned / "run" / "blocks"))
    ours, theirs = (load_file(tuned / run / "model" / "model.safetensors") for run in ("run/sft", "all"))
    assert ours.keys() == theirs.keys()
    assert all(tensor.equal(theirs[name]) for name, tensor in ours.items())


def test_the_first_line_is_what_training_left(both):
    first, *_, last = (
        json.loads(line) for line in (both / "run" / "sft" / "metrics.jsonl").read_text().splitlines()
    )
    assert first["step"] == 0
    for task, found in first["evaluation"].items():
        assert found == pytest.approx(value(both / "run", task), abs=2e-3)
    # What a run found at last is of the model as it is saved, and is not computed twice.
    tuned = both / "run" / "sft"
    assert last["evaluation"] == {task: value(tuned, task) for task in first["evaluation"]}


def test_what_tunes_all_leaves_an_ordinary_checkpoint_with_the_template(both):
    model = both / "run" / "sft" / "model"
    found = AutoModelForCausalLM.from_pretrained(model)
    assert (found.config.num_hidden_layers, found.dtype) == (5, torch.bfloat16)
    assert not (model / "expansion.json").exists()
    tokenizer, base = AutoTokenizer.from_pretrained(model), AutoTokenizer.from_pretrained(both / "base")
    assert tokenizer.chat_template == choose_template(base, "zephyr").source
    assert (model / "tokenizer.json").read_bytes() == (both / "base" / "tokenizer.json").read_bytes()
    trained = deepen.load(both / "base", both / "run" / "blocks").state_dict()
    moved = [name for name, tensor in found.state_dict().items() if not tensor.equal(trained[name])]
    assert {name.split(".")[2] for name in moved if ".layers." in name} == set("01234")


@pytest.mark.parametrize("way", [*WAYS, "alone"])
def test_answers_are_learned_in_every_way(tuned, way):
    run = tuned / way
    assert value(run, "talk-heldout") < value(run, "talk-heldout", "base_value") - 0.1
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("way", ["new", "lora"])
def test_what_keeps_the_base_keeps_its_bytes(tuned, way):
    audit = read_result(tuned / way).audit
    assert audit.unchanged
    assert audit.before == audit.after == full_fingerprint(Checkpoint.open(tuned / "base"))
    assert read_result(tuned / "all").audit is None


@pytest.mark.parametrize("way", [*WAYS, "alone"])
def test_what_was_saved_is_what_was_evaluated(tuned, way):
    subject = find_subject(str(tuned / way))
    assert subject.base == str(tuned / "base")
    loss = heldout_loss(tuned, subject.model.load(torch.device("cpu")).float())
    assert loss == pytest.approx(value(tuned / way, "talk-heldout"), abs=2e-2)


@pytest.mark.parametrize("way", ["new", "lora"])
def test_what_is_merged_is_the_same_model(tuned, way):
    model = AutoModelForCausalLM.from_pretrained(tuned / way / "model", dtype=torch.float32)
    assert model.config.num_hidden_layers == 5
    assert heldout_loss(tuned, model) == pytest.approx(value(tuned / way, "talk-heldout"), abs=5e-2)
    assert (tuned / way / "model" / "chat_template.jinja").is_file()


def heldout_loss(root, model):
    """Transformers' own loss of the answers alone, by the tokenizer's template."""
    tokenizer = AutoTokenizer.from_pretrained(root / "all" / "model")
    summed = count = 0
    for record in TALK:
        asked = [{"role": "user", "content": record["instruction"]}]
        whole = [*asked, {"role": "assistant", "content": record["output"]}]
        prompt = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        text = tokenizer.apply_chat_template(whole, tokenize=False)
        if not is_kept_out(text):
            continue
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        labels = ids.clone()
        labels[:, : len(tokenizer(prompt, add_special_tokens=False)["input_ids"])] = -100
        learned = int((labels != -100).sum())
        with torch.no_grad():
            summed += model(input_ids=ids, labels=labels).loss.item() * learned
        count += learned
    return summed / count


def is_kept_out(text):
    from deepen.data.build import is_heldout

    return is_heldout(text, 0.25)


def stop_after(step, patch):
    """Let the run be asked to stop once so many steps are done, as a signal would."""
    honest = training.train

    def train(*arguments, **keywords):
        *rest, hooks = arguments
        done = []
        log = hooks.log
        hooks = replace(
            hooks, log=lambda report: (log(report), done.append(report.step)), stop=lambda: step in done
        )
        honest(*rest, hooks, **keywords)

    patch.setattr(training, "train", train)


def test_stopped_in_the_second_stage_it_resumes_to_the_same_bytes(tuned, tmp_path, monkeypatch):
    changes = {"output": str(tmp_path / "stopped")}
    recipe = load_recipe(tuned / "both.yaml", [f"output={tmp_path}/stopped"])
    with monkeypatch.context() as patch:
        stop_after(5, patch)
        with pytest.raises(Interrupted):
            run_recipe(recipe)
        with pytest.raises(Interrupted):
            run_recipe(recipe, resume=True)  # the rest of training, and the first steps of tuning
    assert read_result(tmp_path / "stopped").stage == "train"
    assert main(["run", str(tuned / "both.yaml"), "--set", f"output={changes['output']}"]) == 2
    # A kill leaves an older checkpoint and a torn line.
    run = tmp_path / "stopped" / "sft"
    shutil.rmtree(run / "checkpoints" / "step-5")
    with (run / "metrics.jsonl").open("a") as log:
        log.write('{"step": 6, "lo')
    run_recipe(recipe, resume=True)
    for path in ("blocks/blocks.safetensors", "sft/model/model.safetensors"):
        assert (tmp_path / "stopped" / path).read_bytes() == (tuned / "run" / path).read_bytes()
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    wanted = [json.loads(line) for line in (tuned / "run/sft/metrics.jsonl").read_text().splitlines()]
    assert [line.get("loss") for line in steps] == [line.get("loss") for line in wanted]


@pytest.mark.parametrize("way", ["all", "lora"])
def test_an_expanded_checkpoint_is_a_base_like_any_other(tuned, tmp_path, way):
    merged = deepen.merge_pack(tuned / "base", tuned / "run" / "blocks", tmp_path / "merged").directory
    changes = {"sft__epochs": 0.1, "base": str(merged), "output": str(tmp_path / "run")}
    run = run_recipe(load_recipe(tuning(tuned, way, on_pack=False, **changes)))
    assert (run.layout, run.parameters.new) == (None, 0)
    assert way == "all" or run.audit.after == full_fingerprint(Checkpoint.open(merged))
    begun = json.loads((tuned / way / "metrics.jsonl").read_text().splitlines()[0])["evaluation"]
    assert value(tmp_path / "run", "general", "base_value") == pytest.approx(begun["general"], abs=5e-3)


def test_an_untrained_pack_is_reached_through_its_zeros(tiny_llama):
    model = expanded(tiny_llama())
    parameters = lora().prepare(model)
    ids = torch.arange(24).view(2, 12)
    optimizer = torch.optim.SGD(parameters.values(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    unreached = [name for name, p in parameters.items() if p.grad is None or not p.grad.any()]
    assert not unreached


def test_an_adapter_that_no_gradient_reaches_is_refused():
    from transformers import Olmo2Config, Olmo2ForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 24, "vocab_size": 96, "max_position_embeddings": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = expanded(Olmo2ForCausalLM(Olmo2Config(num_hidden_layers=3, **sizes, **heads)))
    with pytest.raises(TrainingError, match=r"new block 1 is untrained and its weight .*no gradient"):
        lora().prepare(model)
    with torch.no_grad():
        for parameter in deepen.model.new_parameters(model).values():
            parameter.add_(0.5)
    trained = expanded(Olmo2ForCausalLM(Olmo2Config(num_hidden_layers=3, **sizes, **heads)))
    with torch.no_grad():
        for parameter in deepen.model.new_parameters(trained).values():
            parameter.add_(0.5)
    assert lora().prepare(trained)


def expanded(base):
    model = deepen.load(base) if isinstance(base, Path) else base
    return deepen.insert_blocks(model, deepen.plan_layout(model.config.num_hidden_layers, after=[0, 2]))


def lora():
    from deepen.config import LoraSection

    return Lora(LoraSection(rank=2))


def test_only_answers_count_in_what_is_scored(tiny_llama):
    model = deepen.load(tiny_llama()).float()
    ids = [np.arange(3, 3 + length) for length in (9, 5)]
    learned = [np.arange(len(each)) % 3 == 1 for each in ids]
    text = score_answers(zip(ids, learned, strict=True), Decoder(), task="talk", max_tokens=100)
    (found,) = evaluate_texts(model, [text]).values()
    for window, flags, nats in zip(ids, learned, found, strict=True):
        labels = torch.from_numpy(np.where(flags, window, -100))[None]
        with torch.no_grad():
            loss = model(input_ids=torch.from_numpy(window)[None], labels=labels).loss.item()
        assert nats == pytest.approx(loss * flags[1:].sum(), abs=1e-4)
    assert text.predicted == [3, 2]
    # Which tokens are scored is part of what the text is.
    other = [np.roll(flags, 1) for flags in learned]
    moved = score_answers(zip(ids, other, strict=True), Decoder(), task="talk", max_tokens=100)
    assert moved.digest != text.digest


class Decoder:
    def decode(self, ids, **_):
        return "x" * len(ids)


FAULTS = {
    "sft.trainable=new": "sft: trainable new needs new blocks: give expand or pack",
    "sft.sequence_length=65": "sft.sequence_length: 65 is more than the base's 64 positions",
    "sft.data.0.path=nowhere.json": "sft.data.0",
    "pack=nowhere": "pack: ",
    "evaluate.shift=true": "shift needs the base inside the tuned model, which trainable all does not keep",
    "sft=null": "data: missing",
}


@pytest.mark.parametrize("setting", FAULTS)
def test_faults_of_tuning_alone_are_said_before_anything(both, tmp_path, setting, capsys):
    recipe = tuning(both, "all", on_pack=False, output=str(tmp_path / "run"))
    assert main(["run", str(recipe), "--set", setting]) == 2
    assert FAULTS[setting] in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_overwriting_the_run_that_holds_the_pack_is_refused(tuned, capsys):
    recipe = tuning(tuned, "new", output=str(tuned / "run"))
    assert main(["run", str(recipe), "--overwrite"]) == 2
    assert "blocks" in capsys.readouterr().err
    assert (tuned / "run" / "blocks" / "blocks.safetensors").is_file()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train__method": "full", "expand": None}, "sft: follows method blocks only, not full"),
        ({"train__quantise": "4bit"}, "sft: quantise is for what leaves the base as it is"),
        ({"pack": "somewhere"}, "train: pack is for tuning alone"),
        ({"data": None}, "train: needs a data section"),
    ],
)
def test_what_the_two_stages_cannot_do_together(tmp_path, changes, words):
    with pytest.raises(RecipeError, match=words):
        load_recipe(write_recipe(tmp_path, sft=write_talk(tmp_path), **changes))


def test_tuning_takes_over_how_training_computes(tmp_path):
    train = {"train__device": "cpu", "train__seed": 7, "train__weight_decay": 0.3}
    recipe = load_recipe(write_recipe(tmp_path, sft=write_talk(tmp_path) | {"seed": 1}, **train))
    assert (recipe.sft.device, recipe.sft.seed, recipe.sft.weight_decay) == ("cpu", 1, 0.0)


def test_bad_conversations_stop_a_run_before_it_trains(tmp_path):
    write_base(tmp_path / "base")
    recipe = load_recipe(write_recipe(tmp_path, sft=write_talk(tmp_path)))
    (tmp_path / "talk.json").write_text('[{"instruction": 1, "output": "x"}]')
    with pytest.raises(deepen.errors.DataError, match="'instruction' is a number, not text"):
        run_recipe(recipe)
    assert not (tmp_path / "run").exists()


def test_the_plan_knows_both_stages(both):
    outline = plan_run(load_recipe(both / "both.yaml"))
    counts = outline.parameters
    assert counts.trainable == counts.new
    assert outline.bytes_needed == 12 * (3 * counts.new + counts.base + counts.new)
    alone = plan_run(load_recipe(both / "run" / "sft" / "recipe.yaml"))
    assert (alone.name, alone.layout, alone.known_steps) == ("sft", outline.layout, None)
    assert alone.parameters.trainable == counts.base + counts.new


def test_the_papers_recipe_is_the_papers():
    recipe = load_recipe(ROOT / "recipes" / "llama-pro-8b-instruct.yaml")
    assert recipe.train is recipe.data is None
    sft = recipe.sft
    assert (sft.batch, sft.sequence_length, sft.warmup) == (128, 4096, 0.03)
    assert (sft.learning_rate, sft.schedule, sft.trainable, sft.precision) == (2e-5, "cosine", "all", "bf16")
    assert [(one.hub.rpartition("/")[2], one.format) for one in sft.data] == [
        ("ShareGPT_Vicuna_unfiltered", "sharegpt"),
        ("WizardLM_evol_instruct_V2_196k", "sharegpt"),
        ("SlimOrca", "sharegpt"),
        ("MetaMathQA", "prompt_completion"),
        ("evol-codealpaca-v1", "alpaca"),
    ]


def test_a_run_of_both_stages_leaves_no_scratch(tuned):
    for run in ("run", "run/sft", *WAYS, "alone"):
        assert not [name for name in os.listdir(tuned / run) if name.startswith(".")]
