"""After training: pruned and damped packs, and what new blocks are worth, each against plain transformers."""

import json
import re
import struct
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from family_table import LINES
from safetensors.torch import load_file, save_file
from test_importance import mean_loss
from test_model_insert import logits, move, plain
from torch import nn
from transformers import Gemma2Config, Gemma2ForCausalLM

import deepen
from deepen.blocks import damp_pack, inspect_blocks, merge_pack, open_pack, prune_pack
from deepen.blocks.scaling import damped_bytes
from deepen.cli import main
from deepen.config import TextSet
from deepen.data.evaluation_text import EvaluationText
from deepen.demo.demo import BASE
from deepen.errors import PackError
from deepen.evaluation.importance import contributions
from deepen.evaluation.worth import choose_alpha, compare_pool, pool_texts
from deepen.expansion import plan_layout, read_expansion
from deepen.model import damped, insert_blocks, load, save_blocks
from deepen.pipeline.losses import load_text_sets
from deepen.pipeline.worth import WorthRequest, measure_worth
from deepen.records import Metric, PathPoint, WorthRecord, read_record
from deepen.report import render_worth


def gemma2(directory):
    sizes = {"hidden_size": 16, "intermediate_size": 24, "vocab_size": 64, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 4}
    torch.manual_seed(0)
    Gemma2ForCausalLM(Gemma2Config(**sizes, **heads, query_pre_attn_scalar=8)).save_pretrained(directory)
    return directory


def trained(base, pack, after):
    model = plain(base)
    insert_blocks(model, plan_layout(len(model.model.layers), after=after))
    move(model)
    return save_blocks(model, pack)


@pytest.fixture(params=["llama", "llama bf16", "gemma2"])
def made(request, tiny_llama, tmp_path):
    """A base of 4 blocks, and a pack whose new blocks 1, 4, 5 and 7 have moved."""
    if request.param == "gemma2":
        base = gemma2(tmp_path / "base")
    else:
        base = tiny_llama(dtype="bfloat16" if "bf16" in request.param else "float32")
    return base, trained(base, tmp_path / "pack", [0, 2, 2, 3])


def merged(base, pack, out):
    merge_pack(base, pack, out)
    return plain(out)


def tensors(pack):
    return load_file(pack / "blocks.safetensors")


def test_a_pruned_pack_is_the_model_with_the_blocks_taken(made, tmp_path):
    base, pack = made
    result = prune_pack(pack, tmp_path / "pruned", without=[4, 1])
    assert (result.removed, result.kept) == ((1, 4), {5: 3, 7: 5})
    record = read_expansion(tmp_path / "pruned")
    assert [(b.index, b.after, b.copy_of) for b in record.new_blocks] == [(3, 2, 2), (5, 3, 3)]
    model = merged(base, pack, tmp_path / "whole")
    kept = [block for index, block in enumerate(model.model.layers) if index not in (1, 4)]
    for index, block in enumerate(kept):
        block.self_attn.layer_idx = index
    types = getattr(model.config, "layer_types", None)
    model.config.num_hidden_layers, model.model.layers = 6, nn.ModuleList(kept)
    if types:
        model.config.layer_types = [each for index, each in enumerate(types) if index not in (1, 4)]
    assert torch.equal(logits(merged(base, tmp_path / "pruned", tmp_path / "out")), logits(model))
    assert torch.equal(logits(load(base, tmp_path / "pruned")), logits(model))


def test_pruning_a_second_stage(tiny_llama, tmp_path):
    base = tiny_llama()
    merge_pack(base, trained(base, tmp_path / "first", [1]), tmp_path / "staged")
    pack = trained(tmp_path / "staged", tmp_path / "second", [0, 3])
    prune_pack(pack, tmp_path / "pruned", without=[1])
    record = read_expansion(tmp_path / "pruned")
    assert [(b.index, b.stage) for b in record.new_blocks] == [(2, 0), (4, 1)]
    assert all(f".{b.index}." in name for b in record.new_blocks for name in b.filled)
    wanted = load(tmp_path / "staged", pack)
    with damped(wanted, {1: 0}):
        found = merged(tmp_path / "staged", tmp_path / "pruned", tmp_path / "out")
        assert torch.allclose(logits(found), logits(wanted), atol=1e-6)


def test_damped_files_are_the_damped_live_model(made, tmp_path):
    base, pack = made
    model, whole = load(base, pack), logits(load(base, pack))
    for number, alpha in enumerate([0.7, {4: 0.5, 7: 1.25}]):
        out = tmp_path / f"damped{number}"
        damp_pack(pack, out, alpha=alpha)
        with damped(model, alpha):
            found = logits(model)
        assert torch.equal(logits(merged(base, out, tmp_path / f"out{number}")), found)
        assert not torch.equal(found, whole)
        assert torch.equal(logits(model), whole)  # every bit is back
    assert [b.damped for b in read_expansion(tmp_path / "out1").new_blocks] == [None, 0.5, None, 1.25]


# Fused experts in memory, and names without the usual prefix.
HARD = [line for line in LINES if line.name in ("mixtral", "gpt2, old files")]


@pytest.mark.parametrize("line", HARD, ids=lambda line: line.name)
def test_other_names_in_memory(line, tmp_path):
    model = load(line.write(tmp_path / "base"), dtype=torch.float32)
    insert_blocks(model, plan_layout(line.depth, after=[0, 1]))
    move(model)
    pack = save_blocks(model, tmp_path / "pack")
    damp_pack(pack, tmp_path / "damped", alpha=0.7)
    base = tmp_path / "base"
    with damped(model, 0.7):
        assert torch.equal(logits(merged(base, tmp_path / "damped", tmp_path / "out")), logits(model))
    prune_pack(pack, tmp_path / "pruned", without=[1])
    with damped(model, {1: 0}):
        assert torch.equal(logits(merged(base, tmp_path / "pruned", tmp_path / "less")), logits(model))


def test_what_a_damped_tensor_holds(made, tmp_path):
    _, pack = made
    damp_pack(pack, tmp_path / "damped", alpha=0.7)
    before, after = tensors(pack), tensors(tmp_path / "damped")
    filled = {n: f for b in read_expansion(pack).new_blocks for n, f in b.filled.items()}
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        if name not in filled:
            assert torch.equal(tensor, after[name])
            continue
        exact = filled[name] + 0.7 * (tensor.double() - filled[name])
        assert torch.allclose(
            after[name].double(), exact, rtol=4e-3 if tensor.dtype == torch.bfloat16 else 1e-6
        )
        assert after[name].dtype == tensor.dtype


def test_at_0_the_base_and_at_1_the_pack(made, tmp_path):
    base, pack = made
    for alpha in (0, 1):
        damp_pack(pack, tmp_path / f"{alpha}", alpha=alpha)
    assert (tmp_path / "1" / "blocks.safetensors").read_bytes() == (pack / "blocks.safetensors").read_bytes()
    assert (tmp_path / "1" / "expansion.json").read_bytes() == (pack / "expansion.json").read_bytes()
    assert torch.equal(logits(merged(base, tmp_path / "0", tmp_path / "out")), logits(plain(base)))
    model = load(base, pack)
    with damped(model, 0):
        assert torch.equal(logits(model), logits(plain(base)))


def test_the_record_of_damping(tiny_llama, tmp_path, capsys):
    base = tiny_llama()
    pack = trained(base, tmp_path / "pack", [0, 2])
    content = json.loads((pack / "expansion.json").read_text())
    (pack / "expansion.json").write_text(json.dumps(content | {"mine": 1}))
    damp_pack(pack, tmp_path / "a", alpha=0.5)
    damp_pack(tmp_path / "a", tmp_path / "b", alpha={1: 0.5, 4: 0})
    assert [b.block.damped for b in inspect_blocks(tmp_path / "b").blocks] == [0.25, 0]
    prune_pack(tmp_path / "b", tmp_path / "c", without=[1])
    found = json.loads((tmp_path / "c" / "expansion.json").read_text())
    assert (found["mine"], found["new_blocks"][0]["damped"], found["new_blocks"][0]["index"]) == (1, 0, 3)
    assert main(["blocks", "inspect", str(tmp_path / "b")]) == 0
    assert "0.25" in capsys.readouterr().out


def exact_bfloat16(value):
    """Nearest bfloat16 of an exact number, ties to even, by comparing with both neighbours."""
    bits = struct.unpack("<I", struct.pack("<f", float(value)))[0] >> 16
    near = [b for b in (bits - 1, bits, bits + 1) if 0 <= b & 0x7FFF < 0x7F80]
    distance = {b: abs(Fraction(struct.unpack("<f", struct.pack("<I", b << 16))[0]) - value) for b in near}
    return min(near, key=lambda b: (distance[b], b % 2))


@pytest.mark.parametrize("fill", [0.0, -1.0])
@pytest.mark.parametrize("alpha", [0.7, 0.5, 1.25])
def test_bfloat16_is_rounded_once(fill, alpha):
    draw = np.random.default_rng(0)
    weights = torch.from_numpy(draw.normal(size=400)).to(torch.bfloat16)
    data = weights.view(torch.int16).numpy().tobytes()
    found = np.frombuffer(damped_bytes("BF16", data, fill, alpha), "<u2")
    for weight, bits in zip(weights.tolist(), found.tolist(), strict=True):
        assert bits == exact_bfloat16(Fraction(fill + alpha * (weight - fill)))


def test_no_tie_is_made_up():
    # A hair above the middle of two neighbours: by way of float32 it would become the middle, and go to even.
    weight, alpha = 1.0, 1 + 2**-8 + 2**-40
    data = torch.tensor([weight], dtype=torch.bfloat16).view(torch.int16).numpy().tobytes()
    assert damped_bytes("BF16", data, 0.0, alpha) == struct.pack("<H", 0x3F81)
    assert damped_bytes("BF16", data, 0.0, 1 + 2**-8) == struct.pack("<H", 0x3F80)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda pack, out: damp_pack(pack, out, alpha={3: 0.5}),
            "block 3 is no new block of it; it has 1, 4",
        ),
        (lambda pack, out: damp_pack(pack, out, alpha=-1), "alpha is -1"),
        (lambda pack, out: damp_pack(pack, out, alpha=float("nan")), "alpha is nan"),
        (lambda pack, out: damp_pack(pack, out, alpha=1e300), "no finite number of F32"),
        (lambda pack, out: prune_pack(pack, out, without=[2]), "block 2 is no new block"),
        (lambda pack, out: prune_pack(pack, out, without=[1, 4]), "no new block is left"),
        (lambda pack, out: prune_pack(pack, out, without=[]), "no block is named"),
    ],
    ids=["other-block", "negative", "nan", "overflow", "not-new", "all", "none"],
)
def test_what_cannot_be(tiny_llama, tmp_path, change, words):
    pack = trained(tiny_llama(), tmp_path / "pack", [0, 2])
    with pytest.raises(PackError) as caught:
        change(pack, tmp_path / "out")
    assert words in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_pack_that_lacks_a_residual_write(tiny_llama, tmp_path):
    pack = trained(tiny_llama(), tmp_path / "pack", [0])
    held = tensors(pack)
    name = next(iter(read_expansion(pack).new_blocks[0].filled))
    save_file({n: t for n, t in held.items() if n != name}, pack / "blocks.safetensors")
    with pytest.raises(PackError, match="is missing"):
        damp_pack(pack, tmp_path / "out", alpha=0.5)
    save_file(held | {name: held[name].to(torch.int8)}, pack / "blocks.safetensors")
    with pytest.raises(PackError, match="is I8, which cannot be scaled"):
        damp_pack(pack, tmp_path / "out", alpha=0.5)


def test_contributions_are_of_hidden_states(tiny_llama):
    model = plain(tiny_llama())
    windows = [np.random.default_rng(0).integers(0, 96, length) for length in (12, 7)]
    found = contributions(model, list(model.model.layers), windows)
    shares = []
    with torch.no_grad():
        for window in windows:
            states = model(torch.from_numpy(window)[None], output_hidden_states=True).hidden_states
            # The last of transformers is normed.
            pairs = [(states[n], states[n + 1]) for n in range(3)]
            shares.append(torch.stack([((y - x).norm(dim=-1) / x.norm(dim=-1))[0] for x, y in pairs]))
    assert found[:3] == pytest.approx(torch.cat(shares, 1).mean(1).numpy(), abs=1e-5)


def point(alpha, general, domain):
    def metric(role, value, base):
        return Metric(
            task=role,
            metric="nats_per_token",
            value=value,
            stderr=None,
            n=9,
            base_value=base,
            delta=value - base,
        )

    return PathPoint(
        alpha=alpha, general=metric("general", general, 2.0), domain=metric("domain", domain, 5.0)
    )


PATH = [point(0, 2.0, 5.0), point(0.5, 2.25, 3.5), point(1, 3.0, 3.0), point(1.25, 4.0, 3.0)]


@pytest.mark.parametrize(("limit", "alpha"), [(None, 0.5), (0, 0), (0.25, 0.5), (0.9, 0.5), (1.0, 1), (9, 1)])
def test_the_choice(limit, alpha):
    assert choose_alpha(PATH[::-1], limit)[0] == alpha


def test_texts_of_a_role_are_one_task():
    def text(task, lengths, documents):
        windows = [np.arange(length) for length in lengths]
        return EvaluationText(
            task=task, role="domain", windows=windows, document=documents, bytes=lengths, digest=task
        )

    first = text("a", [3, 5] * 30, [n // 2 for n in range(60)])  # 30 documents of two windows each
    second = text("b", [9, 9], [0, 0])  # too few: windows
    pool = pool_texts([first, second], "domain")
    assert pool.items.tolist() == [*(n // 2 for n in range(60)), 30, 31]
    base, nats = np.full(62, 4.0), np.full(62, 5.0)
    (metric,) = compare_pool(pool, [nats], base)
    assert metric.delta == pytest.approx(62 / (2 * 30 + 4 * 30 + 16))
    assert (metric.role, metric.value) == ("domain", pytest.approx(5 * 62 / 196))


@pytest.fixture(scope="module")
def trial(tmp_path_factory):
    """A pack on the base that comes with a tokenizer, and two texts."""
    folder = tmp_path_factory.mktemp("trial")
    (folder / "domain.txt").write_text("def add(a, b):\n    return a + b\n" * 20)
    (folder / "general.txt").write_text("The sum of two numbers is returned. " * 20)
    model = plain(BASE)
    insert_blocks(model, plan_layout(len(model.model.layers), after=[1, 4]))
    move(model)
    return save_blocks(model, folder / "pack"), str(folder / "general.txt"), str(folder / "domain.txt")


def test_the_command(trial, tmp_path, capsys):
    pack, general, domain = trial
    command = ["blocks", "worth", str(BASE), str(pack), "--text", general, "--domain-text", domain]
    command += ["--max-tokens", "150", "--alphas", "0.5,1.25"]
    out, html = tmp_path / "worth.json", tmp_path / "worth.html"
    assert main([*command, "--out", str(out), "--html", str(html), "--max-general-loss", "0"]) == 0
    said = capsys.readouterr().out
    record = read_record(out, WorthRecord)
    assert [each.alpha for each in record.path] == [0, 0.5, 1, 1.25]
    assert f"chosen: α = {record.chosen:g}" in said
    assert "<svg" in html.read_text()
    assert render_worth(record) == html.read_text()
    windows = windows_of(domain, 150)
    assert record.path[0].domain.value == pytest.approx(mean_loss(plain(BASE), windows).item(), abs=1e-4)
    damp_pack(pack, tmp_path / "damped", alpha=0.5)
    half = mean_loss(merged(BASE, tmp_path / "damped", tmp_path / "half"), windows).item()
    assert record.path[1].domain.value == pytest.approx(half, abs=1e-4)
    assert record.path[1].domain.delta == pytest.approx(half - record.path[0].domain.value, abs=1e-4)
    prune_pack(pack, tmp_path / "pruned", without=[6])
    without = mean_loss(merged(BASE, tmp_path / "pruned", tmp_path / "without"), windows).item()
    assert [each.block for each in record.blocks] == [2, 6]
    assert record.blocks[1].domain.value == pytest.approx(without, abs=1e-4)
    assert record.blocks[1].domain.base_value == pytest.approx(record.path[2].domain.value)


def windows_of(path, tokens):
    (text,) = load_text_sets(BASE, [("domain", TextSet(path=path))], tokens)
    return text.windows


def test_an_expanded_checkpoint(trial, tmp_path):
    pack, general, domain = trial
    model = merged(BASE, pack, tmp_path / "merged")
    request = WorthRequest(
        base=str(tmp_path / "merged"),
        pack=None,
        texts=(TextSet(path=general),),
        domain_texts=(TextSet(path=domain),),
        alphas=(),
        max_tokens=60,
        device=torch.device("cpu"),
    )
    record = measure_worth(request)
    loss = mean_loss(model, windows_of(domain, 60)).item()
    assert record.path[1].domain.value == pytest.approx(loss, abs=1e-4)
    assert record.fingerprint == read_expansion(pack).base_fingerprint.fast
    with pytest.raises(PackError):
        measure_worth(replace(request, base=str(BASE)))


@pytest.mark.parametrize(
    "command",
    [
        "prune {pack} {out} --without x",
        "prune {pack} {out} --without 3",
        "prune {text} {out} --without 3",
        "damp {pack} {out} --alpha half",
        "damp {pack} {out} --alpha 2=0.5,2=1",
        "damp {pack} {out} --alpha=-0.5",
        "worth {base} {pack} --text {text} --domain-text {text} --alphas 1,a",
        "worth {base} {pack} --text {text} --domain-text {text} --alphas=-1",
        "worth {base} {pack} --text {text} --domain-text {text}",
        "worth {base} {pack} --text {text} --domain-text {out}",
        "worth {base} {text} --text {text} --domain-text {pack}/expansion.json",
    ],
)
def test_malformed_input_is_one_line(trial, tmp_path, capsys, command):
    pack, text, _ = trial
    places = {"pack": pack, "text": text, "base": BASE, "out": tmp_path / "out"}
    assert main(["blocks", *command.format(**places).split()]) == 2
    said = capsys.readouterr().err
    assert len(re.findall("^error: .+", said, re.M)) == 1
    assert "Traceback" not in said
    assert not (tmp_path / "out").exists()


def test_results_as_json(trial, tmp_path, capsys):
    pack = str(trial[0])
    assert main(["blocks", "damp", pack, str(tmp_path / "a"), "--alpha", "2=0.5", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["alphas"] == {"2": 0.5, "6": 1.0}
    assert main(["blocks", "prune", pack, str(tmp_path / "b"), "--without", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kept"] == {"6": 5}
    assert open_pack(tmp_path / "b").expansion.layout.new_indices == {5}
    assert main(["blocks", "damp", pack, str(tmp_path / "c"), "--alpha", "0.5"]) == 0
    assert "block 2 times 0.5, block 6 times 0.5" in capsys.readouterr().out
    assert main(["blocks", "prune", pack, str(tmp_path / "d"), "--without", "2"]) == 0
    assert "block 6 is 5 now" in capsys.readouterr().out
    assert isinstance(deepen.load(str(BASE), tmp_path / "d"), nn.Module)
