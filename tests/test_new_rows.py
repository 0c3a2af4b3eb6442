"""New rows of the vocabulary that train beside new blocks: in the run, in the pack, on the base and off it.

The oracles are transformers on the base's own files, and the bytes of these files.
"""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from test_distributed import run_by_two
from test_sft import write_talk
from test_vocabulary import ENGLISH, FOREIGN, PIECES, ROWS, write_base, write_foreign
from transformers import AutoModelForCausalLM, AutoTokenizer

import deepen
from deepen.blocks import damp_pack, merge_pack, open_pack, prune_pack, stack_packs
from deepen.checkpoint import Checkpoint, fast_fingerprint
from deepen.cli import main
from deepen.config import load_recipe, parse_recipe
from deepen.errors import Interrupted, PackError, RecipeError, TrainingError
from deepen.methods import Blocks, Lora
from deepen.model import activate, attach, base_fingerprint, bypass, detach, load, new_parameters
from deepen.pipeline import training
from deepen.pipeline.run import run_recipe
from deepen.pipeline.subject import find_subject
from deepen.records import RunResult, read_record
from deepen.training.loss import summed_loss
from deepen.vocabulary import Text, extend_vocabulary

KINDS = {"own head": {"tied": False, "dtype": "bfloat16"}, "tied": {"tied": True, "dtype": "float32"}}
TEXT = FOREIGN[0] + ENGLISH[0]


def extended_base(root, **options):
    write_base(root / "plain", "byte_level", **options)
    text = Text(path=str(write_foreign(root / "foreign")))
    extend_vocabulary(root / "plain", root / "base", [text], pieces=PIECES)
    return root / "base"


def write_recipe(root, name="run", **changes):
    foreign = str(root / "foreign")
    recipe = {
        "base": str(root / "base"),
        "output": str(root / name),
        "expand": {"blocks": 1},
        "data": {"sequence_length": 32, "sources": [{"path": foreign}], "cache": str(root / "cache")},
        "train": {
            "new_rows": True,
            "tokens": 6 * 128,
            "batch_tokens": 128,
            "learning_rate": 0.02,
            "checkpoint_every": 2,
        },
        "evaluate": {"domain": [{"path": foreign}], "shift": True},
        "merge": True,
    }
    recipe["train"] |= changes.pop("train", {})
    path = root / f"{name}.yaml"
    path.write_text(json.dumps(recipe | changes))
    return path


@pytest.fixture(scope="module", params=KINDS)
def run(request, tmp_path_factory):
    """The directory of a finished run and its base."""
    root = tmp_path_factory.mktemp("rows")
    extended_base(root, **KINDS[request.param])
    run_recipe(load_recipe(write_recipe(root)))
    return root


def ids_of(root):
    ids = AutoTokenizer.from_pretrained(root / "base")(TEXT, return_tensors="pt")["input_ids"][:, :60]
    assert (ids >= ROWS).any()
    return ids


@torch.no_grad()
def logits(model, ids):
    return model.eval()(ids).logits


def plain(directory):
    return AutoModelForCausalLM.from_pretrained(directory, dtype="auto").eval()


def tables_of(directory):
    held = load_file(directory / "model.safetensors")
    return {name: held[name] for name in ("model.embed_tokens.weight", "lm_head.weight") if name in held}


def test_it_begins_as_the_base_and_the_base_stays(run):
    result = read_record(run / "run" / "result.json", RunResult)
    assert result.identity.identical
    assert f"{PIECES} new rows" in result.identity.checks
    assert result.audit.unchanged
    assert result.audit.tensors == len(load_file(run / "base" / "model.safetensors"))
    block = sum(p.numel() for p in plain(run / "base").model.layers[0].parameters())
    rows = sum(table[ROWS:].numel() for table in tables_of(run / "base").values())
    assert result.parameters.trainable == block + rows
    lines = [json.loads(line) for line in (run / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("run", ["tied"], indirect=True)
def test_the_plan_counts_them(run, capsys):
    assert main(["plan", str(run / "run.yaml"), "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)["parameters"]["trainable"]
    assert planned == read_record(run / "run" / "result.json", RunResult).parameters.trainable


def test_the_pack_holds_the_rows_and_says_so(run, capsys):
    pack = open_pack(run / "run" / "blocks")
    tables = tables_of(run / "base")
    assert set(pack.expansion.new_rows.tables) == set(tables)
    assert (pack.expansion.new_rows.first, pack.expansion.new_rows.count) == (ROWS, PIECES)
    held = load_file(run / "run" / "blocks" / "blocks.safetensors")
    for name, table in tables.items():
        rows = held[f"new_rows.{name}"]
        assert rows.dtype == table.dtype
        assert not torch.isclose(rows, table[ROWS:]).all(1).any()
    assert main(["blocks", "inspect", str(pack.directory)]) == 0
    assert f"the last {PIECES} rows of model.embed_tokens.weight" in capsys.readouterr().out
    assert deepen.blocks.fit_pack(run / "base", run / "run" / "blocks").tensors == len(held)


def test_on_the_base_and_off_it_again(run):
    base, pack, ids = run / "base", run / "run" / "blocks", ids_of(run)
    before = logits(plain(base), ids)
    model = load(base, pack)
    trained = logits(model, ids)
    assert not torch.equal(trained, before)
    for name, table in tables_of(base).items():
        live = model.get_parameter(name) if name in dict(model.named_parameters()) else None
        if live is not None:
            assert torch.equal(live[:ROWS], table[:ROWS])
            assert not torch.equal(live[ROWS:], table[ROWS:])
    with bypass(model):
        assert torch.equal(logits(model, ids), before)
    assert torch.equal(logits(model, ids), trained)
    held = {name: tensor.dtype for name, tensor in Checkpoint.open(base).tensors.items()}
    assert base_fingerprint(model, "fast", held) == fast_fingerprint(Checkpoint.open(base))
    attach(model, pack, "again")
    with pytest.raises(PackError, match="several of them bring new rows"):
        activate(model, "blocks", "again")
    activate(model)
    assert torch.equal(logits(model, ids), before)
    detach(model, "again")
    activate(model, "blocks")
    assert torch.equal(logits(model, ids), trained)
    detach(model, "blocks")
    assert torch.equal(logits(model, ids), before)


def test_what_is_merged_is_the_same_model_on_the_same_old_rows(run, capsys):
    merged, ids = run / "run" / "model", ids_of(run)
    assert not (merged / "expansion.json").exists()
    assert torch.equal(logits(plain(merged), ids), logits(load(run / "base", run / "run" / "blocks"), ids))
    held = load_file(run / "run" / "blocks" / "blocks.safetensors")
    new = load_file(merged / "model.safetensors")
    for name, table in tables_of(run / "base").items():
        assert torch.equal(new[name][:ROWS], table[:ROWS])
        assert torch.equal(new[name][ROWS:], held[f"new_rows.{name}"])
    assert deepen.expand_checkpoint(merged, run / "deeper", blocks=1, overwrite=True).new_blocks
    places = [str(place) for place in (run / "base", run / "run" / "blocks", run / "merged")]
    assert main(["blocks", "merge", *places]) == 0
    assert "keep the pack" in capsys.readouterr().out
    for name in ("model.safetensors", "config.json"):
        assert (run / "merged" / name).read_bytes() == (merged / name).read_bytes()


def test_saved_again_it_is_the_same_pack(run, tmp_path):
    model = load(run / "base", run / "run" / "blocks")
    deepen.save_blocks(model, tmp_path / "again")
    for name in ("blocks.safetensors", "expansion.json"):
        assert (tmp_path / "again" / name).read_bytes() == (run / "run" / "blocks" / name).read_bytes()


def test_what_a_pack_with_rows_cannot_do_is_said(run, tmp_path):
    pack = run / "run" / "blocks"
    with pytest.raises(PackError, match="fingerprint"):
        load(run / "plain", pack)
    with pytest.raises(PackError, match="merge it alone"):
        stack_packs(run / "base", [pack, pack], tmp_path / "out")
    with pytest.raises(PackError, match="new rows of the vocabulary too"):
        damp_pack(pack, tmp_path / "out", alpha=0.5)
    model = load(run / "base", pack)
    with pytest.raises(PackError, match="new rows of the vocabulary too"), deepen.model.damped(model, 0.5):
        pass
    with pytest.raises(deepen.errors.LayoutError, match="merge them"):
        deepen.insert_blocks(model, deepen.plan_layout(3, blocks=1))
    assert not (tmp_path / "out").exists()
    record = json.loads((pack / "expansion.json").read_text())
    record["new_rows"]["first"] -= 1
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "expansion.json").write_text(json.dumps(record))
    (tmp_path / "odd" / "blocks.safetensors").write_bytes((pack / "blocks.safetensors").read_bytes())
    with pytest.raises(PackError, match="new_rows are of"):
        merge_pack(run / "base", tmp_path / "odd", tmp_path / "out")
    with pytest.raises(PackError, match=r"has no tensor 'new_rows\..* of 30 rows"):
        attach(load(run / "base"), tmp_path / "odd")


def test_pruned_it_keeps_its_rows(tmp_path):
    extended_base(tmp_path, tied=False)
    model = load(tmp_path / "base")
    deepen.insert_blocks(model, deepen.plan_layout(2, blocks=2))
    trained = Blocks(new_rows=True).prepare(model)
    with torch.no_grad():
        for parameter in trained.values():
            parameter.add_(0.01)
    deepen.save_blocks(model, tmp_path / "pack")
    first = next(iter(open_pack(tmp_path / "pack").expansion.layout.new_indices))
    prune_pack(tmp_path / "pack", tmp_path / "less", without=[first])
    less, whole = (load_file(tmp_path / name / "blocks.safetensors") for name in ("less", "pack"))
    rows = [name for name in whole if name.startswith("new_rows.")]
    assert len(rows) == 2
    assert all(torch.equal(less[name], whole[name]) for name in rows)
    assert load(tmp_path / "base", tmp_path / "less").config.num_hidden_layers == 3


@pytest.mark.parametrize("kind", KINDS)
def test_decay_reaches_no_old_row_and_bypass_is_the_base_in_training(tmp_path, kind):
    base = extended_base(tmp_path, **KINDS[kind])
    model, ids = load(base), ids_of(tmp_path)
    before, opened = logits(model, ids), Checkpoint.open(base)
    held = {name: tensor.dtype for name, tensor in opened.tensors.items()}
    digest = base_fingerprint(model, "full", held)
    deepen.insert_blocks(model, deepen.plan_layout(2, blocks=1))
    method = Blocks(new_rows=True)
    trained = method.prepare(model)
    rows = trained.keys() - new_parameters(model).keys()
    assert len(rows) == (1 if KINDS[kind]["tied"] else 2)
    assert trained.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    compute = torch.autocast("cpu", torch.bfloat16, enabled=before.dtype == torch.bfloat16)
    with compute:
        torch.testing.assert_close(logits(model, ids).to(before.dtype), before, rtol=2e-2, atol=2e-2)
    optimizer = torch.optim.AdamW(trained.values(), lr=0.05, weight_decay=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        with compute:
            summed_loss(model, ids[:, :-1], ids[:, 1:]).backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for n, p in trained.items() if n in rows)
        optimizer.step()
    with bypass(model):
        assert torch.equal(logits(model, ids), before)
    assert base_fingerprint(model, "full", held) == digest
    for name, dtype in method.saved_dtypes(model, opened).items():
        trained[name].data = trained[name].data.to(dtype).float()
    assert method.saved_dtypes(model, opened).keys() == trained.keys()
    pack = method.save(model, tmp_path / "run", opened)
    with compute:
        again = logits(load(base, pack), ids)
        torch.testing.assert_close(again, logits(model, ids).to(again.dtype), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("run", ["tied"], indirect=True)
def test_a_resumed_run_ends_with_the_same_bytes(run, monkeypatch):
    recipe = load_recipe(write_recipe(run, "resumed"))
    train = training.train

    def stopped(*args, **kwargs):
        *rest, hooks = args
        done = []
        log = hooks.log
        train(
            *rest,
            replace(hooks, log=lambda r: (done.append(r), log(r)), stop=lambda: len(done) == 3),
            **kwargs,
        )

    with monkeypatch.context() as patch:
        patch.setattr(training, "train", stopped)
        with pytest.raises(Interrupted):
            run_recipe(recipe)
    run_recipe(recipe, resume=True)
    for place in ("blocks/blocks.safetensors", "model/model.safetensors"):
        old, new = ((run / name / place).read_bytes() for name in ("run", "resumed"))
        assert old == new, place
    files = [read_values(run / name) for name in ("run", "resumed")]
    assert files[0] == files[1]


def read_values(directory):
    record = json.loads((directory / "evaluation" / "heldout.json").read_text())
    return [(each["task"], each["metric"], each["value"], each["base_value"]) for each in record["metrics"]]


@pytest.mark.parametrize("run", ["tied"], indirect=True)
def test_blocks_are_tuned_on_their_rows(run):
    sft = write_talk(run) | {"trainable": "new", "epochs": 0.3, "cache": str(run / "cache")}
    recipe = {
        "base": str(run / "base"),
        "pack": str(run / "run" / "blocks"),
        "output": str(run / "tuned"),
        "sft": sft,
    }
    (run / "tuned.yaml").write_text(json.dumps(recipe))
    assert run_recipe(load_recipe(run / "tuned.yaml")).audit.unchanged
    held, before = (load_file(run / name / "blocks" / "blocks.safetensors") for name in ("tuned", "run"))
    rows = [name for name in before if name.startswith("new_rows.")]
    assert held.keys() == before.keys()
    assert all(torch.equal(held[name], before[name]) for name in rows)


@pytest.mark.slow
@pytest.mark.parametrize("run", ["own head"], indirect=True)
def test_whole_tables_beside_an_adapter_are_the_other_way(run):
    """As Chinese-LLaMA-Alpaca: old rows move too, in the adapter; the base's stay where they are."""
    lora = {"rank": 4, "modules_to_save": ["embed_tokens", "lm_head"]}
    train = {"method": "lora", "new_rows": False, "lora": lora, "precision": "bf16"}
    evaluate = {"domain": [{"path": str(run / "foreign")}]}
    recipe = load_recipe(write_recipe(run, "lora", expand=None, train=train, evaluate=evaluate))
    assert run_recipe(recipe).audit.unchanged
    old, new = (tables_of(where) for where in (run / "base", run / "lora" / "model"))
    assert not any(torch.equal(new[name][:ROWS], table[:ROWS]) for name, table in old.items())
    loaded = find_subject(str(run / "lora" / "adapter")).model.load(torch.device("cpu"))
    found, merged = (logits(model, ids_of(run)).float() for model in (loaded, plain(run / "lora" / "model")))
    torch.testing.assert_close(found, merged, rtol=0.1, atol=0.1)
    with pytest.raises(TrainingError, match="which a copy of the tables would hide"):
        Lora(recipe.train.lora).prepare(load(run / "base", run / "run" / "blocks"))


@pytest.mark.slow
@pytest.mark.parametrize("run", ["tied"], indirect=True)
def test_two_replicas_do_what_one_process_does(run):
    run_by_two([write_recipe(run, "two", train={"parallel": "ddp", "micro_batch": 1})])
    one, two = (load_file(run / name / "blocks" / "blocks.safetensors") for name in ("run", "two"))
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-3, atol=1e-4)


RECIPE = """
base: base
output: out
data: {sequence_length: 16, sources: [{path: a.txt}]}
expand: {blocks: 1}
train: {new_rows: true, tokens: 100, batch_tokens: 32, learning_rate: 1e-2}
"""


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["train.method=full", "expand=null"], "new_rows is for method blocks, not full"),
        (["train.prefix_cache=disk"], "new_rows trains in the embeddings"),
        (["train.parallel=fsdp"], "new_rows: tables cannot be cut over devices"),
    ],
)
def test_what_does_not_go_with_new_rows_is_said(settings, said):
    with pytest.raises(RecipeError, match=said):
        parse_recipe(RECIPE, settings)


def test_a_base_without_new_rows_is_refused_before_any_work(tmp_path, capsys):
    extended_base(tmp_path)
    recipe = write_recipe(tmp_path, base=str(tmp_path / "plain"))
    assert main(["run", str(recipe)]) == 2
    said = capsys.readouterr().err
    assert "train.new_rows" in said
    assert "has no vocabulary.json" in said
    assert not (tmp_path / "run").exists()
    model = load(tmp_path / "plain")
    deepen.insert_blocks(model, deepen.plan_layout(2, blocks=1))
    with pytest.raises(TrainingError, match="no vocabulary"):
        Blocks(new_rows=True).prepare(model)
