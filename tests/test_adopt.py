"""Checkpoints that other tools expanded, made here as their published algorithms do."""

import copy
import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from trained_files import assert_same_files, assert_same_tensors, in_place, new_indices, tensors
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from deepen.blocks import adopt, extract_pack, merge_pack, unmerge
from deepen.cli import main
from deepen.errors import CheckpointError, LayoutError, OutputError, PackError
from deepen.expansion import verify_bytes
from deepen.model import freeze_base, load


def by_llama_factory(base, out, expand):
    """scripts/llama_pro.py: after each group of L/N layers a copy with o_proj and down_proj zeroed."""
    config = json.loads((base / "config.json").read_text())
    layers = config["num_hidden_layers"]
    assert layers % expand == 0
    split, held, written, count = layers // expand, tensors(base), {}, 0
    for index in range(layers):
        ours = {key: value for key, value in held.items() if f".{index:d}." in key}
        written |= {key.replace(f".{index:d}.", f".{count:d}."): value for key, value in ours.items()}
        count += 1
        if (index + 1) % split == 0:
            for key, value in ours.items():
                zero = "down_proj" in key or "o_proj" in key
                written[key.replace(f".{index:d}.", f".{count:d}.")] = (
                    torch.zeros_like(value) if zero else value.clone()
                )
            count += 1
    written |= {key: value for key, value in held.items() if ".layers." not in key}
    out.mkdir()
    config["num_hidden_layers"] = layers + expand
    (out / "config.json").write_text(json.dumps(config, indent=2))
    save_file(written, out / "model.safetensors", {"format": "pt"})
    return out


def by_ms_swift(base, out, groups):
    """llamapro: deep copies of a stride's last block with zeroed projections, in a live model."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    stride, blocks = model.config.num_hidden_layers // groups, []
    for index, block in enumerate(model.model.layers):
        blocks.append(block)
        if (index + 1) % stride == 0:
            new = copy.deepcopy(block)
            for projection in (new.self_attn.o_proj, new.mlp.down_proj):
                torch.nn.init.zeros_(projection.weight)
                if projection.bias is not None:
                    torch.nn.init.zeros_(projection.bias)
            blocks.append(new)
    model.model.layers = torch.nn.ModuleList(blocks)
    model.config.num_hidden_layers = len(blocks)
    model.save_pretrained(out, max_shard_size="30KB")
    return out


MAKERS = {"LLaMA-Factory": by_llama_factory, "ms-swift": by_ms_swift}


@pytest.fixture(params=MAKERS)
def made(request, tiny_llama, tmp_path):
    base = tiny_llama(dtype="bfloat16", bias=True)
    return base, MAKERS[request.param](base, tmp_path / "expanded", 2)


def recorded(directory):
    raw = json.loads((directory / "expansion.json").read_text())
    return [(block["index"], block["after"], block["copy_of"]) for block in raw["new_blocks"]]


def assert_the_rest_works(base, expanded, tmp_path):
    """What can be done with deepen's own expansions can be done with this one."""
    assert verify_bytes(base, expanded, base_only=True).identical
    extract_pack(expanded, tmp_path / "pack")
    merge_pack(base, tmp_path / "pack", tmp_path / "merged")
    assert_same_tensors(expanded, tmp_path / "merged")
    assert unmerge(tmp_path / "merged", tmp_path / "base2").byte_identical
    assert_same_files(base, tmp_path / "base2")
    model = load(expanded)
    freeze_base(model)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    marks = tuple(f"model.layers.{index}." for index in new_indices(expanded))
    assert trained == {name for name, _ in model.named_parameters() if name.startswith(marks)}


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("given", ["base", "list", "both", "neither"])
def test_found(made, tmp_path, trained, given):
    base, expanded = made
    if trained:
        in_place(expanded, [2, 5])
    before = {path.name: path.read_bytes() for path in expanded.iterdir()}
    how = {"base": base} if given in ("base", "both") else {}
    how |= {"new": [5, 2]} if given in ("list", "both") else {}
    if given == "neither" and trained:
        with pytest.raises(PackError, match=r"--base.*--new"):
            adopt(expanded)
        assert not (expanded / "expansion.json").exists()
        return
    found = adopt(expanded, **how)
    assert [block.index for block in found.new_blocks] == [2, 5]
    assert recorded(expanded) == [(2, 1, 1), (5, 3, 3)]
    assert not found.warnings
    # It adds one file and edits none.
    assert before == {p.name: p.read_bytes() for p in expanded.iterdir() if p.name != "expansion.json"}
    assert_the_rest_works(base, expanded, tmp_path)
    if not trained:
        verified = verify_bytes(base, expanded)
        assert not verified.differing
        filled = json.loads((expanded / "expansion.json").read_text())["new_blocks"][0]["filled"]
        assert filled == {
            f"model.layers.2.{part}.{kind}": 0
            for part in ("self_attn.o_proj", "mlp.down_proj")
            for kind in ("weight", "bias")
        }
    if "base" in how:  # then the base comes back from the adopted checkpoint itself
        # These tools carry less over.
        missing = set(unmerge(expanded, tmp_path / "again").differing)
        assert missing - {"generation_config.json"} == {"LICENSE", "tokenizer.json"}
        for name in ("config.json", "model.safetensors"):
            assert (tmp_path / "again" / name).read_bytes() == (base / name).read_bytes()


def test_the_name_of_the_base(made):
    base, expanded = made
    assert adopt(expanded, base).base == str(base)
    assert adopt(expanded, base, name="someone/base", overwrite=True).base == "someone/base"
    config = json.loads((expanded / "config.json").read_text())
    (expanded / "config.json").write_text(json.dumps({**config, "_name_or_path": "meta/llama"}))
    assert adopt(expanded, overwrite=True).base == "meta/llama"


def test_a_base_that_was_trained_too(made):
    base, expanded = made
    in_place(expanded, [3])  # base block 2
    with pytest.raises(PackError, match=r"block 2 of .* is nowhere in it") as caught:
        adopt(expanded, base)
    assert "trained too" in str(caught.value)
    assert str(caught.value).count("\n") == 1
    with pytest.raises(PackError, match=r"block 2 of .* is nowhere in it"):
        adopt(expanded, base, [2, 5])
    assert not (expanded / "expansion.json").exists()


def test_another_precision(made):
    base, expanded = made
    for path in expanded.glob("*.safetensors"):
        save_file({name: t.half() for name, t in load_file(path).items()}, path, {"format": "pt"})
    with pytest.raises(PackError, match=r"is not the base's \(F16 .*, the base's BF16"):
        adopt(expanded, base)


def test_only_blocks_in_another_precision(made):
    base, expanded = made
    for path in expanded.glob("*.safetensors"):
        held = load_file(path)
        save_file({n: t.half() if ".layers." in n else t for n, t in held.items()}, path, {"format": "pt"})
    with pytest.raises(PackError, match=r"block 0 of .* is nowhere"):
        adopt(expanded, base)


@pytest.mark.parametrize(
    ("new", "words"),
    [
        ([6], "block 6 is out of range"),
        ([2, 2], "named twice"),
        ([], "names 0 of 6"),
        (range(6), "names 6 of 6"),
    ],
)
def test_lists_that_cannot_be(made, new, words):
    with pytest.raises(LayoutError, match=words):
        adopt(made[1], new=list(new))


def test_a_list_against_the_base(made):
    base, expanded = made
    with pytest.raises(PackError, match="nowhere"):
        adopt(expanded, base, [1, 5])


def test_what_is_no_expansion(tiny_llama, tmp_path):
    base = tiny_llama()
    with pytest.raises(PackError, match="no block has its last matrices zeroed"):
        adopt(base)
    with pytest.raises(PackError, match="no blocks besides"):
        adopt(base, shutil.copytree(base, tmp_path / "copy"))
    with pytest.raises(PackError, match="is not the base's"):
        adopt(base, tiny_llama("other", seed=1))
    (base / "model.safetensors").rename(base / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pickled weights"):
        adopt(base)


def test_a_record_stays(made):
    base, expanded = made
    adopt(expanded)
    before = (expanded / "expansion.json").read_bytes()
    with pytest.raises(OutputError, match="--overwrite"):
        adopt(expanded, base)
    assert (expanded / "expansion.json").read_bytes() == before
    assert adopt(expanded, base, overwrite=True).found_by == "base"
    assert not [name for name in os.listdir(expanded) if "partial" in name]


def test_copies_are_told_from_their_tensors(tiny_llama, tmp_path):
    """A new block need not copy the block it stands on."""
    base = tiny_llama()
    held = tensors(base)
    order = [(0, False), (1, False), (0, True), (1, True), (2, False), (3, False), (1, True)]
    written = {name: tensor for name, tensor in held.items() if ".layers." not in name}
    for index, (source, new) in enumerate(order):
        for name, tensor in held.items():
            if f".layers.{source}." in name:
                zero = new and ("o_proj" in name or "down_proj" in name)
                moved = name.replace(f".{source}.", f".{index}.", 1)
                written[moved] = torch.zeros_like(tensor) if zero else tensor.clone()
    out = tmp_path / "out"
    out.mkdir()
    save_file(written, out / "model.safetensors")
    config = json.loads((base / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 7}))
    adopt(out)
    assert recorded(out) == [(2, 1, 0), (3, 1, 1), (6, 3, 1)]
    assert verify_bytes(base, out, base_only=True).identical
    in_place(out, [2, 3, 6])  # now nothing tells: the block it stands on
    adopt(out, base, overwrite=True)
    assert recorded(out) == [(2, 1, 1), (3, 1, 1), (6, 3, 3)]


def test_llama_pro_8b_by_shape(tmp_path):
    """Its published geometry: 32 base blocks to 40, new at 4, 9, ..., 39; here with narrow blocks."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=32)).bfloat16()
    base = tmp_path / "base"
    model.save_pretrained(base)
    expanded = by_llama_factory(base, tmp_path / "pro", 8)
    wanted = list(range(4, 40, 5))
    for how in ({}, {"base": base}, {"new": wanted}):
        adopt(expanded, **how, overwrite=True)
        assert new_indices(expanded) == wanted
        assert recorded(expanded) == [(4 + 5 * i, 3 + 4 * i, 3 + 4 * i) for i in range(8)]
    in_place(expanded, wanted)
    adopt(expanded, base, overwrite=True)
    assert new_indices(expanded) == wanted
    assert_the_rest_works(base, expanded, tmp_path)


def test_post_norm_families_by_their_projections(tmp_path):
    """Other tools zero the last matrices there too, where deepen fills the gains behind them."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "head_dim": 8}
    config = Gemma2Config(**sizes, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2)
    base = tmp_path / "base"
    Gemma2ForCausalLM(config).save_pretrained(base)
    expanded = by_llama_factory(base, tmp_path / "expanded", 2)
    found = adopt(expanded)
    assert [block.index for block in found.new_blocks] == [2, 5]
    assert set(found.new_blocks[0].filled) == {
        f"model.layers.2.{part}_proj.weight" for part in ("self_attn.o", "mlp.down")
    }
    extract_pack(expanded, tmp_path / "pack")
    merge_pack(base, tmp_path / "pack", tmp_path / "merged")
    assert_same_tensors(expanded, tmp_path / "merged")


def test_a_head_repeated_in_the_base(tiny_llama, tmp_path):
    """transformers drops it when it saves: the fingerprint is of what stands in the checkpoint."""
    base = tiny_llama(tied=True)
    expanded = by_ms_swift(base, tmp_path / "expanded", 2)
    held = load_file(base / "model.safetensors")
    held["lm_head.weight"] = held["model.embed_tokens.weight"].clone()
    save_file(held, base / "model.safetensors", {"format": "pt"})
    found = adopt(expanded, base)
    assert [block.index for block in found.new_blocks] == [2, 5]
    assert "holds other tensors too" in found.warnings[0]
    extract_pack(expanded, tmp_path / "pack")


def test_an_expanded_base(tiny_llama, tmp_path):
    """Another tool expanded what deepen had: the stages before are kept."""
    from deepen.expansion import expand_checkpoint

    base, one = tiny_llama(), tmp_path / "one"
    expand_checkpoint(base, one, after=[1, 3])
    in_place(one, [2, 5])
    two = by_llama_factory(one, tmp_path / "two", 2)
    adopt(two, one)
    assert new_indices(two, stage=0) == [2, 6]
    assert new_indices(two, stage=1) == [3, 7]
    unmerge(two, tmp_path / "one2")
    for name in ("config.json", "expansion.json", "model.safetensors"):
        assert (tmp_path / "one2" / name).read_bytes() == (one / name).read_bytes()


def test_the_command(made, capsys):
    base, expanded = map(str, made)
    assert main(["blocks", "adopt", expanded]) == 0
    assert "■■ □2 ■■ □5" in capsys.readouterr().out
    assert main(["blocks", "adopt", expanded]) == 2
    assert "say --overwrite" in capsys.readouterr().err
    assert main(["blocks", "adopt", expanded, "--base", base, "--new", "2,5", "--overwrite", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert [block["index"] for block in said["new_blocks"]] == [2, 5]
    assert said["base"] == base
    assert main(["blocks", "adopt", expanded, "--new", "two"]) == 2
    assert "'--new'" in capsys.readouterr().err


def test_a_list_that_was_not_extended(tmp_path):
    """Kinds of attention for 4 blocks in a model of 6: said, and mended by extracting and merging."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "head_dim": 8}
    config = Qwen3Config(**sizes, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2)
    base = tmp_path / "base"
    Qwen3ForCausalLM(config).save_pretrained(base)
    assert "layer_types" in json.loads((base / "config.json").read_text())
    expanded = by_llama_factory(base, tmp_path / "expanded", 2)
    found = adopt(expanded, base)
    assert "layer_types has 4 entries for 6 blocks" in found.warnings[0]
    extract_pack(expanded, tmp_path / "pack")
    merge_pack(base, tmp_path / "pack", tmp_path / "merged")
    assert verify_bytes(base, tmp_path / "merged").identical
