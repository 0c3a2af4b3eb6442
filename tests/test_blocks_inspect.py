"""What was learned, in numbers: held to torch's own arithmetic."""

import json
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from trained_files import in_place, tensors

from deepen.blocks import extract_pack, inspect_blocks, stack_packs
from deepen.blocks.norms import Compared, decode_floats, sum_squares
from deepen.checkpoint import read_shard
from deepen.cli import main
from deepen.errors import CheckpointError, PackError
from deepen.expansion import expand_checkpoint


@pytest.fixture
def made(tiny_llama, tmp_path):
    base, expanded, pack = tiny_llama(dtype="bfloat16", bias=True), tmp_path / "expanded", tmp_path / "pack"
    expand_checkpoint(base, expanded, blocks=2)
    in_place(expanded, [2, 5])
    extract_pack(expanded, pack)
    return base, expanded, pack


def norm(tensor):
    return tensor.double().norm().item()


@pytest.mark.parametrize("what", ["expanded", "pack"])
def test_norms_against_the_base(made, what):
    base, expanded, pack = made
    facts = inspect_blocks({"expanded": expanded, "pack": pack}[what], base)
    ours, theirs = tensors(pack), tensors(base)
    assert facts.reference == base
    for block, index, copied in zip(facts.blocks, (2, 5), (1, 3), strict=True):
        assert (block.block.index, block.block.copy_of) == (index, copied)
        assert {n.name for n in block.writes} == {
            f"{part}.{kind}" for part in ("self_attn.o_proj", "mlp.down_proj") for kind in ("weight", "bias")
        }
        for found in block.writes:
            new = ours[f"model.layers.{index}.{found.name}"]
            copy = theirs[f"model.layers.{copied}.{found.name}"]
            assert found.parameters == new.numel()
            assert found.frobenius == pytest.approx(norm(new))
            assert found.rms == pytest.approx(new.double().square().mean().sqrt().item())
            assert found.relative == pytest.approx(norm(new) / norm(copy))
        changes, whole = 0.0, 0.0
        for found in block.others:
            new = ours[f"model.layers.{index}.{found.name}"].double()
            copy = theirs[f"model.layers.{copied}.{found.name}"].double()
            assert found.frobenius == pytest.approx(norm(new - copy))
            assert found.relative == pytest.approx(norm(new - copy) / norm(copy))
            changes, whole = changes + norm(new - copy) ** 2, whole + norm(copy) ** 2
        assert len(block.others) == 12
        assert block.changed.relative == pytest.approx((changes / whole) ** 0.5)


def test_a_pack_alone(made):
    _, _, pack = made
    facts = inspect_blocks(pack)
    assert facts.reference is None
    assert facts.base_unchanged is None
    held = tensors(pack)
    for block in facts.blocks:
        assert not block.others
        assert block.changed is None
        for found in block.writes:
            assert found.relative is None
            assert found.frobenius == pytest.approx(
                norm(held[f"model.layers.{block.block.index}.{found.name}"])
            )


def test_an_expanded_checkpoint_holds_its_own_reference(made):
    base, expanded, _ = made
    alone, compared = inspect_blocks(expanded), inspect_blocks(expanded, base)
    assert alone.blocks == compared.blocks
    assert alone.reference == expanded
    assert alone.base_unchanged is True
    in_place(expanded, [0])
    assert inspect_blocks(expanded).base_unchanged is False


def test_nothing_learned(tiny_llama, tmp_path):
    base = tiny_llama()
    expand_checkpoint(base, tmp_path / "expanded", blocks=1)
    (block,) = inspect_blocks(tmp_path / "expanded").blocks
    assert [found.frobenius for found in (*block.writes, *block.others)] == [0] * 9
    assert block.changed.relative == 0


def test_fills_that_are_not_zero(tmp_path):
    """Gemma's gains count from -1, where the block adds nothing."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "head_dim": 8}
    model = Gemma2ForCausalLM(
        Gemma2Config(**sizes, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2)
    )
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(tmp_path / "base")
    expand_checkpoint(tmp_path / "base", tmp_path / "expanded", blocks=2)
    for block in inspect_blocks(tmp_path / "expanded").blocks:
        assert {found.name for found in block.writes} == {
            "post_attention_layernorm.weight",
            "post_feedforward_layernorm.weight",
        }
        assert [found.frobenius for found in block.writes] == [0, 0]
    in_place(tmp_path / "expanded", [2])
    held = tensors(tmp_path / "expanded")
    for found in inspect_blocks(tmp_path / "expanded").blocks[0].writes:
        new, copy = (held[f"model.layers.{index}.{found.name}"] for index in (2, 1))
        assert found.relative == pytest.approx(norm(new + 1) / norm(copy + 1))


ALL = torch.arange(256, dtype=torch.uint8)
HALVES = torch.arange(65536, dtype=torch.int32).to(torch.uint16)


@pytest.mark.parametrize(
    ("name", "dtype", "values"),
    [
        ("F8_E4M3", torch.float8_e4m3fn, ALL),
        ("F8_E5M2", torch.float8_e5m2, ALL),
        ("F8_E4M3FNUZ", torch.float8_e4m3fnuz, ALL),
        ("F8_E5M2FNUZ", torch.float8_e5m2fnuz, ALL),
        ("BF16", torch.bfloat16, HALVES),
        ("F16", torch.float16, HALVES),
        ("F32", torch.float32, torch.tensor([1.5, -0.0, 1e-40, float("inf")]).view(torch.uint8)),
        ("F64", torch.float64, torch.tensor([1.5, 1e300], dtype=torch.float64).view(torch.uint8)),
    ],
)
def test_every_value_of_every_dtype(name, dtype, values):
    wanted = values.view(dtype).double().numpy()
    found = decode_floats(name, values.view(torch.uint8).numpy().tobytes())
    with np.errstate(invalid="ignore"):  # NaN that signal
        np.testing.assert_array_equal(found.astype(np.float64), wanted)


def test_memory_is_bounded(tmp_path):
    """64 MB of tensors, compared in pieces."""
    big = {name: torch.randn(2**22).bfloat16() for name in "abcd"}
    save_file(big, tmp_path / "a.safetensors")
    save_file({name: tensor + 1 for name, tensor in big.items()}, tmp_path / "b.safetensors")
    first, second = (read_shard(tmp_path / f"{name}.safetensors").tensors for name in "ab")
    tracemalloc.start()
    sums = sum_squares([Compared(tensor=x, origin=y) for x, y in zip(first, second, strict=True)])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sums[0].count == 2**22
    difference = big["a"].double() - (big["a"] + 1).double()
    assert sums[0].change == pytest.approx(difference.square().sum().item())
    assert peak < 64e6


def test_lineage(tiny_llama, tmp_path):
    base = tiny_llama()
    expand_checkpoint(base, tmp_path / "one", blocks=2)
    in_place(tmp_path / "one", [2, 5])
    expand_checkpoint(tmp_path / "one", tmp_path / "two", after=[0, 5])
    facts = inspect_blocks(tmp_path / "two")
    assert [(stage.stage, stage.base) for stage in facts.lineage] == [
        (0, str(base)),
        (1, str(tmp_path / "one")),
    ]
    assert [stage.layout.draw() for stage in facts.lineage] == ["■■ □2 ■■ □5", "■ □1 ■■■■■ □7"]
    assert [block.block.index for block in facts.blocks] == [1, 7]


def test_another_base(made, tiny_llama):
    base, expanded, pack = made
    other = tiny_llama("other", seed=1, dtype="bfloat16", bias=True)
    for path in (expanded, pack):
        with pytest.raises(PackError, match="fingerprint"):
            inspect_blocks(path, other)
    with pytest.raises(CheckpointError, match="not found"):
        inspect_blocks(base)


def test_what_is_printed(made, tmp_path, capsys):
    base, _, pack = made
    assert main(["blocks", "inspect", str(pack), "--base", str(base)]) == 0
    out = capsys.readouterr().out
    assert "■■ □2 ■■ □5" in out
    rows = [line for line in out.splitlines() if " % " in f"{line} "]
    assert len(rows) == 2
    assert len({len(row.rstrip()) for row in rows}) == 1  # aligned
    title = next(line for line in out.splitlines() if "copy of" in line)
    assert "mlp.down_proj" in title
    assert "the rest moved" in title
    assert main(["blocks", "inspect", str(pack), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["blocks"][0]["block"]["index"] == 2
    assert said["blocks"][0]["writes"][0]["relative"] is None
    assert said["layout"] == "■■ □2 ■■ □5"
    stack_packs(base, [pack], tmp_path / "stacked")
    assert main(["blocks", "inspect", str(tmp_path / "stacked")]) == 0
    assert "packs, bottom to top: pack" in capsys.readouterr().out
    assert "base_files" not in json.dumps(said)


def test_a_tensor_of_no_numbers(made):
    """A zero bias copied: no ratio, said as null, not as infinity."""
    base, _, pack = made
    held = load_file(base / "model.safetensors")
    held["model.layers.1.mlp.down_proj.bias"].zero_()
    save_file(held, base / "model.safetensors", {"format": "pt"})
    expand_checkpoint(base, pack.parent / "again", blocks=2)
    in_place(pack.parent / "again", [2])
    code = "import sys; from deepen.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "blocks", "inspect", str(pack.parent / "again")]
    shown = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "rms" in shown.stdout
    found = json.loads(subprocess.run([*command, "--json"], capture_output=True, check=True).stdout)
    relative = {norm["name"]: norm["relative"] for norm in found["blocks"][0]["writes"]}
    assert relative["mlp.down_proj.bias"] is None
    assert relative["mlp.down_proj.weight"] > 0


def test_the_package_needs_no_numpy_until_it_measures():
    code = "import sys, deepen.blocks; sys.exit('numpy' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
