"""What lies below the first block that trains is run once, and training does not notice."""

import json

import numpy as np
import pytest
import torch
from test_pipeline import losses, stopped_after
from test_training_cost import BLOCKS, COUNT, INNER, WIDTH, WORDS, executed, llama
from tiny_run import write_base, write_recipe
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from deepen.cli import main
from deepen.config import load_recipe
from deepen.data.batches import Batch
from deepen.errors import OutputError, RecipeError, TrainingError
from deepen.expansion import plan_layout
from deepen.model import bypass, freeze_base, insert_blocks
from deepen.pipeline import prefix as prefix_module
from deepen.pipeline.plan import plan_run
from deepen.pipeline.run import run_recipe
from deepen.training.interface import Hooks, Settings
from deepen.training.loop import train
from deepen.training.optimizer import build_optimizer
from deepen.training.prefix import PrefixCache, find_prefix
from deepen.training.prefix_file import PrefixFile
from deepen.training.world import World

LENGTH, WINDOWS = 32, 4
SIZES = {"vocab_size": WORDS, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
QUIET = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
GEMMA = {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 4}
FAMILIES = {
    "llama": {},
    "gemma3_text": {"head_dim": 8, "num_key_value_heads": 2, **GEMMA},
    "gpt2": QUIET,
    "gpt_neox": {},
    "falcon": {},
    "bloom": {"hidden_dropout": 0.0, "attention_dropout": 0.0},
    "qwen3_moe": {
        **{"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
        **{"num_key_value_heads": 2, "head_dim": 8},
    },
}


def expanded(family, **changes):
    options = {**SIZES, "intermediate_size": 48, **FAMILIES.get(family, {}), **changes}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **options), dtype=torch.float32)
    insert_blocks(model, plan_layout(4, blocks=1, placement="suffix"))
    return model, freeze_base(model)


def cache_at(model, path, autocast=None):
    prefix = find_prefix(model, autocast)
    return PrefixCache(prefix, PrefixFile(path, WINDOWS, (LENGTH, *prefix.width), prefix.dtype))


def batch_at(masks):
    """Two of four windows a step, in an order that changes."""
    tokens = np.random.default_rng(0).integers(0, WORDS, (WINDOWS, LENGTH + 1))
    starts = np.random.default_rng(1).integers(3, LENGTH - 3, WINDOWS)
    places = np.arange(LENGTH)
    positions = np.stack([np.where(places < start, places, places - start) for start in starts])

    def batch(step, windows):
        numbers = np.concatenate([np.random.default_rng(e).permutation(WINDOWS) for e in range(9)])
        numbers = numbers[step * windows : (step + 1) * windows]
        placed = positions[numbers] if masks else None
        return Batch(tokens[numbers], numbers * 0, positions=placed, numbers=numbers)

    return batch


def run(model, parameters, cache=None, *, masks=False, micro=1, autocast=None):
    """Train for three epochs; return losses and gradient norms, to the bit."""
    found = []
    hooks = Hooks(
        log=lambda report: found.append((report.loss, report.gradient_norm)),
        evaluate=lambda step: None,
        save=lambda step: None,
        stop=lambda: False,
    )
    numbers = Settings(
        **{"steps": 6, "windows": 2, "micro_batch": micro, "learning_rate": 1e-2, "schedule": "cosine"},
        **{"warmup": 0.0, "final_learning_rate": 0.1, "clip": 1.0, "autocast": autocast},
        **{"evaluate_every": 99, "checkpoint_every": 99},
    )
    optimizer = build_optimizer(parameters, betas=(0.9, 0.95), weight_decay=0.1)
    train(model, parameters, optimizer, batch_at(masks), numbers, hooks, prefix=cache)
    return found


@pytest.mark.parametrize(
    ("family", "masks"),
    [*((family, False) for family in FAMILIES), *((f, True) for f in ("llama", "gemma3_text", "gpt2"))],
)
def test_training_is_the_same_to_the_bit(family, masks, tmp_path):
    plain = run(*expanded(family), masks=masks)
    model, parameters = expanded(family)
    names = dict(model.named_parameters()).keys()
    cache = cache_at(model, tmp_path / "states")
    assert run(model, parameters, cache, masks=masks) == plain
    assert cache.held == WINDOWS
    assert dict(model.named_parameters()).keys() == names


def test_a_second_run_passes_by_the_lower_blocks_from_the_beginning(tmp_path):
    plain = run(*expanded("llama"))
    for held in (0, WINDOWS):
        model, parameters = expanded("llama")
        cache = cache_at(model, tmp_path / "states")
        assert cache.held == held
        calls = []
        model.model.layers[1].register_forward_hook(lambda *_, calls=calls: calls.append(1))
        assert run(model, parameters, cache) == plain
        assert len(calls) == WINDOWS - held


def test_bf16_compute_is_the_same_to_the_bit(tmp_path):
    plain = run(*expanded("llama"), autocast=torch.bfloat16)
    model, parameters = expanded("llama")
    cache = cache_at(model, tmp_path / "states", torch.bfloat16)
    assert run(model, parameters, cache, autocast=torch.bfloat16) == plain


def test_several_windows_a_pass(tmp_path):
    """Each epoch puts other windows beside a window: kernels may add in another order."""
    plain = run(*expanded("llama"), micro=2)
    model, parameters = expanded("llama")
    found = run(model, parameters, cache_at(model, tmp_path / "states"), micro=2)
    assert np.asarray(found) == pytest.approx(np.asarray(plain), rel=1e-5)


def test_states_keep_the_precision_of_the_residual_stream(tmp_path):
    torch.manual_seed(0)
    model = llama(blocks=1, placement="suffix")
    new = dict(freeze_base(model))
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data if name in new else parameter.data.bfloat16()
    assert find_prefix(model, torch.bfloat16).dtype == torch.bfloat16
    assert find_prefix(llama(blocks=1, placement="suffix"), torch.bfloat16).dtype == torch.float32


def test_flops_from_the_second_epoch_on(tmp_path):
    """Of 6 base blocks and 2 on top: 2 that train at 3u, the frozen head at 2h, and nothing else."""
    model = llama(blocks=2, placement="suffix")
    first = executed(model)
    prefix = find_prefix(model)
    cache = PrefixCache(prefix, PrefixFile(tmp_path / "states", 2, (COUNT // 2, WIDTH), torch.float32))
    numbers = np.array([1, 0])
    unit = 2 * COUNT * (4 * WIDTH * WIDTH + 3 * WIDTH * INNER)
    head = 2 * COUNT * WIDTH * WORDS
    with cache.passing(numbers):
        assert executed(model) == first == (prefix.depth + 2 * 3) * unit + 2 * head
    model.zero_grad()
    with cache.passing(numbers):
        assert executed(model) == 2 * 3 * unit + 2 * head
    tokens = torch.arange(20)[None]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(tokens)
    assert prefix.depth == BLOCKS == 6
    assert counter.get_total_flops() == (BLOCKS + 2) * unit // COUNT * 20 + head // COUNT * 20


def test_bypass_and_evaluation_between_passes_are_as_ever(tmp_path):
    model, parameters = expanded("llama")
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        before = model.eval()(tokens).logits
    cache = cache_at(model, tmp_path / "states")
    with bypass(model):
        pass
    run(model, parameters, cache)
    assert cache.held == WINDOWS
    with torch.no_grad(), bypass(model.eval()):
        assert torch.equal(model(tokens).logits, before)


@pytest.mark.parametrize("damage", ["states", "digest", "size"])
def test_a_damaged_window_is_computed_anew(tmp_path, damage):
    path = tmp_path / "states"
    states = torch.arange(4 * 3 * 2, dtype=torch.bfloat16).view(4, 3, 2)
    file = PrefixFile(path, 4, (3, 2), torch.bfloat16)
    assert file.read(np.array([1])) is None
    file.write(np.array([1, 3]), states[[1, 3]])
    file.close()
    file = PrefixFile(path, 4, (3, 2), torch.bfloat16)
    assert file.held == 2
    assert torch.equal(file.read(np.array([3, 1])), states[[3, 1]])
    assert file.read(np.array([3, 0])) is None
    file.close()
    content = bytearray(path.read_bytes())
    content[{"states": 4 * 8 + 3 * 12 + 5, "digest": 3 * 8, "size": -1}[damage]] ^= 1
    path.write_bytes(content if damage != "size" else content[:-1])
    file = PrefixFile(path, 4, (3, 2), torch.bfloat16)
    assert file.read(np.array([3])) is None
    assert torch.equal(file.read(np.array([1])), states[[1]])
    file.write(np.array([3]), states[[3]])
    assert torch.equal(file.read(np.array([3])), states[[3]])


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("gpt2", {**QUIET, "resid_pdrop": 0.1}, "draws random numbers"),
        ("gpt2", {**QUIET, "embd_pdrop": 0.1}, "draws random numbers"),
        ("gpt2", {**QUIET, "attn_pdrop": 0.1}, "draws random numbers"),
    ],
)
def test_a_lower_part_that_is_not_the_same_every_time_is_refused(family, changes, words):
    model, _ = expanded(family, **changes)
    with pytest.raises(TrainingError, match=words):
        find_prefix(model)


def test_a_model_in_which_other_things_train_below_is_refused():
    model, _ = expanded("llama")
    model.get_input_embeddings().requires_grad_(True)
    with pytest.raises(TrainingError, match="below the first block that trains are trained"):
        find_prefix(model)
    model.requires_grad_(True)
    with pytest.raises(TrainingError, match="nothing lies below"):
        find_prefix(model)


def test_upper_blocks_that_read_more_than_the_stream_are_refused():
    model, _ = expanded("llama")
    lower, upper = model.model.layers[0], model.model.layers[4]
    seen = []
    lower.register_forward_hook(lambda _, __, states: seen.append(states))
    read = upper.register_forward_hook(lambda _, __, states: states + seen.pop())
    with pytest.raises(TrainingError, match="does not run without its lower blocks"):
        find_prefix(model)
    read.remove()
    seen.clear()
    upper.register_forward_hook(lambda _, __, states: states + (seen.pop() if seen else 0))
    with pytest.raises(TrainingError, match="read more than the residual stream"):
        find_prefix(model)


RECIPE = {
    **{"expand": {"blocks": 1, "placement": "suffix"}, "train__tokens": None, "train__epochs": 2},
    **{"data__document_masks": True, "train__batch_tokens": 512, "train__micro_batch": 1},
    "train__evaluate_every": 100,
}


def test_a_run_with_resume_is_the_same_and_leaves_states_for_the_next(tmp_path, monkeypatch, capsys):
    write_base(tmp_path / "base")
    path = write_recipe(tmp_path, **RECIPE)
    run_recipe(load_recipe(path))
    kept = ["train.prefix_cache=disk", f"output={tmp_path}/kept"]
    assert main(["run", str(path), "--set", kept[0], "--dry-run"]) == 0
    assert "the lower 3 blocks run once a window; a token of the texts takes 64 B" in capsys.readouterr().out
    stopped_after(7, load_recipe(path, kept), monkeypatch)
    run_recipe(load_recipe(path, kept), resume=True)
    assert losses(tmp_path / "kept") == losses(tmp_path / "run")
    assert blocks_in(tmp_path / "kept") == blocks_in(tmp_path / "run")
    (states,) = (tmp_path / "cache" / "prefixes").iterdir()
    before = states.stat().st_mtime_ns
    other = [*kept[:1], f"output={tmp_path}/other", "train.learning_rate=0.001", "train.seed=5"]
    run_recipe(load_recipe(path, other))
    assert states.stat().st_mtime_ns == before
    lines = [json.loads(line) for line in (tmp_path / "other" / "metrics.jsonl").read_text().splitlines()]
    held = {line["prefix_windows"] for line in lines if "loss" in line}
    assert len(held) == 1


def blocks_in(directory):
    return (directory / "blocks" / "blocks.safetensors").read_bytes()


def test_refusals_of_a_run(tmp_path, monkeypatch):
    write_base(tmp_path / "base")
    path = write_recipe(tmp_path, **RECIPE, train__prefix_cache="disk")
    with pytest.raises(RecipeError, match=r"prefix_cache has nothing to keep: method lora trains in every"):
        load_recipe(path, ["train.method=lora", "expand=null"])
    with pytest.raises(RecipeError, match="a new block stands at the bottom"):
        run_recipe(load_recipe(path, ["expand.placement=prefix"]))
    with pytest.raises(TrainingError, match="serves a run of one process, this one has 2"):
        prefix_module.open_prefix(plan_run(load_recipe(path)), None, None, World(size=2), None)

    def full(directory, needed):
        assert needed > 0
        raise OutputError(f"{directory}: needs {needed}")

    monkeypatch.setattr(prefix_module, "check_space", full)
    with pytest.raises(OutputError, match=r"prefixes.*needs"):
        run_recipe(load_recipe(path))
