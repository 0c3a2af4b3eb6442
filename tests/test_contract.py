"""The contract of every family: expanded, it is the base; trained, it is still well-behaved.

Each line of `family_table.py` is a tiny real checkpoint. Plain transformers says what it computes.
"""

import copy
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from family_table import LINES, Line, line
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import deepen
from deepen.blocks import unmerge
from deepen.families import load_families


class Made(NamedTuple):
    """One line of the table, on disk.

    Attributes:
        base: its directory.
        expanded: the expanded checkpoint.
        record: the content of its `expansion.json`.
        observed: what the base computes.
        loaded: the expanded model, by plain transformers; tests that change it take a copy.
    """

    base: Path
    expanded: Path
    record: Mapping[str, Any]
    observed: dict[str, torch.Tensor]
    loaded: PreTrainedModel

    def is_new(self, name: str) -> bool:
        """Whether a parameter belongs to a new block, by the names in `expansion.json` alone."""
        return any(f".{place}" in f".{name}" for place in new_places(self.record))


@pytest.fixture(scope="module", params=LINES, ids=lambda line: line.name)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    line: Line = request.param
    folder = tmp_path_factory.mktemp("line")
    base = line.write(folder / "base")
    deepen.expand_checkpoint(base, folder / "expanded", **line.placed)
    record = json.loads((folder / "expanded" / "expansion.json").read_text())
    return Made(base, folder / "expanded", record, observe(plain(base)), plain(folder / "expanded"))


def plain(directory: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    model, found = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, output_loading_info=True)
    assert not found["missing_keys"], found
    # A tensor used where its file is mapped gives last bits that depend on where in a cache line it lies.
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()
    return model.eval()


def tokens(length: int) -> torch.Tensor:
    return torch.randint(3, 96, (2, length), generator=torch.Generator().manual_seed(7))


@torch.no_grad()
def observe(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Everything that is compared: a whole forward, and greedy decoding on the cache with its logits."""
    with settled(model):
        prompt = tokens(10)
        decoded = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=4,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
        return {
            "logits": model(input_ids=tokens(20), use_cache=False).logits,
            "tokens decoded on the cache": decoded.sequences,
            "logits on the cache": torch.stack(decoded.logits),
        }


@contextmanager
def settled(model: PreTrainedModel) -> Iterator[None]:
    """Let equal numbers give equal results.

    How torch multiplies by a matrix on a CPU, and so the last bit, depends on where the matrix lies (in a
    mapped file at any multiple of 8 bytes) and on whether it requires a gradient, even where none is taken.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.requires_grad_(False)
    for parameter in model.parameters():
        if parameter.data_ptr() % 64:
            parameter.data = parameter.data.clone()
    yield
    for parameter in trained:
        parameter.requires_grad_(True)


def differing(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> list[str]:
    return [what for what in one if not torch.equal(one[what], other[what])]


def new_places(record: Mapping[str, Any]) -> set[str]:
    """What the names of a new block's tensors begin with, such as `model.layers.4.`."""
    places = set()
    for block in record["new_blocks"]:
        head, number, _ = min(block["filled"]).partition(f".{block['index']}.")
        places.add(head + number)
    return places


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {k: v for f in sorted(directory.glob("*.safetensors")) for k, v in load_file(f).items()}


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@torch.no_grad()
def move(model: PreTrainedModel, names: set[str]) -> None:
    """Let the new blocks learn something: without weight changes many mistakes do not show."""
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if name in names:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


def test_expanded_it_is_the_base(made: Made, tmp_path: Path) -> None:
    assert not differing(observe(made.loaded), made.observed), "float32"
    made.loaded.save_pretrained(tmp_path / "again")
    assert not differing(observe(plain(tmp_path / "again")), made.observed), "after save_pretrained"
    narrow = [observe(plain(directory, torch.bfloat16)) for directory in (made.base, made.expanded)]
    assert not differing(*narrow), "bfloat16"


def test_every_tensor_is_the_bases_or_a_copy(made: Made) -> None:
    base, expanded, record = tensors(made.base), tensors(made.expanded), made.record
    place = min(new_places(record)).rstrip("0123456789.")
    new = {block["index"]: block for block in record["new_blocks"]}
    depth = record["base_blocks"] + len(new)
    kept = [index for index in range(depth) if index not in new]
    wanted = {name: tensor for name, tensor in base.items() if not name.startswith(f"{place}.")}
    for index in range(depth):
        origin = f"{place}.{new[index]['copy_of'] if index in new else kept.index(index)}."
        for name in (name for name in base if name.startswith(origin)):
            renamed = f"{place}.{index}.{name.removeprefix(origin)}"
            value = new[index]["filled"].get(renamed) if index in new else None
            wanted[renamed] = base[name] if value is None else torch.full_like(base[name], value)
    assert wanted.keys() == expanded.keys()
    assert not differing(wanted, expanded)
    verified = deepen.verify_bytes(made.base, made.expanded)
    assert verified.identical, verified.first_difference


def test_one_optimiser_step_is_a_small_one(made: Made) -> None:
    model = copy.deepcopy(made.loaded)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(made.is_new(name))
    new = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model(input_ids=tokens(20), labels=tokens(20), use_cache=False).loss.backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in new), (
        "no gradient reaches the new blocks"
    )
    torch.optim.AdamW(new, lr=1e-5).step()
    with torch.no_grad():
        moved = model(input_ids=tokens(20), use_cache=False).logits - made.observed["logits"]
    assert 0 < moved.abs().max() <= 0.01


def test_trained_bypassed_and_carried_as_a_pack(made: Made, tmp_path: Path) -> None:
    model = copy.deepcopy(made.loaded)
    wanted = {name for name, _ in model.named_parameters() if made.is_new(name)}
    assert deepen.freeze_base(model).keys() == wanted
    assert {name for name, p in model.named_parameters() if p.requires_grad} == wanted
    move(model, wanted)
    moved = observe(model)
    assert "logits" in differing(moved, made.observed), "the new blocks do nothing"
    with deepen.bypass(model):
        assert not differing(observe(model), made.observed), "bypassed"
    assert not differing(observe(model), moved), "after bypass"

    pack = deepen.save_blocks(model, tmp_path / "pack")
    assert not differing(observe(deepen.load(made.base, pack)), moved), "base and pack"
    deepen.merge_pack(made.base, pack, tmp_path / "merged")
    assert not differing(observe(plain(tmp_path / "merged")), moved), "merged"
    check_bytes(made, pack, tmp_path)
    extracted = tmp_path / "extracted"
    if tensors(extracted).keys() != tensors(pack).keys():  # it holds buffers of old files, too
        assert not differing(observe(deepen.load(made.base, extracted)), moved), "base and extracted"


def check_bytes(made: Made, pack: Path, folder: Path) -> None:
    """Take `folder / "merged"` apart and put it together again."""
    deepen.extract_pack(folder / "merged", folder / "extracted")
    held, extracted = tensors(pack), tensors(folder / "extracted")
    assert not held.keys() - extracted.keys()
    assert not differing(held, extracted), "extracted"
    deepen.merge_pack(made.base, folder / "extracted", folder / "remerged")
    assert contents(folder / "remerged") == contents(folder / "merged")
    deepen.extract_pack(folder / "remerged", folder / "reextracted")
    assert contents(folder / "reextracted") == contents(folder / "extracted")
    unmerge(folder / "merged", folder / "unmerged")
    assert contents(folder / "unmerged") == contents(made.base)


_WITHOUT_LIST: dict[str, Any] = {"layer_types": None}
REFUSED = [
    ("OPT", {"do_layer_norm_before": False}, {}, "do_layer_norm_before is False: the norm stands on"),
    ("GPT2", {"scale_attn_by_inverse_layer_idx": True}, {}, "scale_attn_by_inverse_layer_idx is True"),
    ("GPT2", {"add_cross_attention": True}, {}, "add_cross_attention is True"),
    ("Bloom", {"apply_residual_connection_post_layernorm": True}, {}, "is True: the residual stream is"),
    ("DiffLlama", {}, {}, "'diffllama' cannot be expanded exactly: attention is weighted by the number"),
    ("GPT2", {}, {"num_hidden_layers": 2}, "num_hidden_layers overrides n_layer"),
    ("GPT2", {}, {"num_hidden_layers": 2, "n_layer": None}, "num_hidden_layers overrides n_layer"),
    ("Gemma2", {}, {"layer_types": ["full_attention"]}, "layer_types has 1 entries for 2 blocks"),
    ("Gemma3Text", {}, _WITHOUT_LIST | {"sliding_window_pattern": 0}, "sliding_window_pattern is 0, not"),
    (
        "Cohere2",
        {},
        _WITHOUT_LIST | {"sliding_window_pattern": "LLLG"},
        "sliding_window_pattern is 'LLLG', not",
    ),
    ("Qwen2", {}, _WITHOUT_LIST | {"max_window_layers": 1.5}, "max_window_layers is 1.5, not"),
    ("Exaone4", {}, _WITHOUT_LIST | {"sliding_window_pattern": -1}, "sliding_window_pattern is -1, not"),
]


@pytest.mark.parametrize(("config", "fields", "hub", "words"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_cannot_be_exact_is_refused(config, fields, hub, words, tmp_path: Path) -> None:
    base = line("refused", config, 2, 1, fields, hub=hub).write(tmp_path / "base")
    with pytest.raises(deepen.DeepenError) as caught:
        deepen.expand_checkpoint(base, tmp_path / "expanded", blocks=1)
    assert words in str(caught.value)
    assert str(caught.value).count("\n") < 2
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


@pytest.mark.parametrize("family", load_families(), ids=lambda family: family.name)
def test_tied_as_the_class_is(family) -> None:
    for model_type in family.model_types:
        config = AutoConfig.for_model(model_type)
        assert getattr(config, "tie_word_embeddings", False) == family.tied_by_default, model_type


def test_every_family_has_a_line() -> None:
    import transformers

    listed = {getattr(transformers, f"{line.config}Config").model_type for line in LINES}
    listed |= {"qwen2_vl_text", "qwen2_5_vl_text"}  # only ever text towers: see test_towers.py
    for family in load_families():
        assert listed >= set(family.model_types), family.name
