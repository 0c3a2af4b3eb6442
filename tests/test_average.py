"""Packs averaged, against plain tensor arithmetic and a model of transformers averaged by hand."""

import hashlib

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_model_insert import logits, plain
from test_worth import gemma2, merged, trained

from deepen.blocks import average_packs, damp_pack, extract_pack, merge_pack, open_pack, stack_packs
from deepen.cli import main
from deepen.errors import PackError
from deepen.expansion import read_expansion
from deepen.model import load


@pytest.fixture(params=["llama", "llama bf16", "gemma2"])
def pair(request, tiny_llama, tmp_path):
    """A base and two packs of it whose blocks 1 and 4 have moved, each its own way."""
    if request.param == "gemma2":
        base = gemma2(tmp_path / "base")
    else:
        base = tiny_llama(dtype="bfloat16" if "bf16" in request.param else "float32")
    first = trained(base, tmp_path / "law", [0, 2])
    damp_pack(first, tmp_path / "maths", alpha=0.5)
    second = move_apart(tmp_path / "maths")
    return base, first, second


def move_apart(pack):
    torch.manual_seed(7)
    path = pack / "blocks.safetensors"
    moved = {name: t + (torch.randn(t.shape) * 0.1).to(t.dtype) for name, t in load_file(path).items()}
    save_file(moved, path, metadata={"format": "pt"})
    return pack


def tensors(pack):
    return load_file(pack / "blocks.safetensors")


def test_every_tensor_is_the_average(pair, tmp_path):
    _, first, second = pair
    result = average_packs([first, second], tmp_path / "out", weights=[3, 1])
    assert result.shares == {"law": 0.75, "maths": 0.25}
    ours, theirs, found = tensors(first), tensors(second), tensors(tmp_path / "out")
    assert ours.keys() == found.keys()
    for name, tensor in found.items():
        exact = 0.75 * ours[name].double() + 0.25 * theirs[name].double()
        assert tensor.dtype == ours[name].dtype
        assert torch.equal(tensor, exact.to(tensor.dtype))
    assert not torch.equal(found[name], ours[name])


def test_the_average_runs_as_a_model_averaged_by_hand(pair, tmp_path):
    base, first, second = pair
    average_packs([first, second], tmp_path / "out")
    hand, other = merged(base, first, tmp_path / "a"), merged(base, second, tmp_path / "b")
    with torch.no_grad():
        for one, two in zip(hand.parameters(), other.parameters(), strict=True):
            one.copy_((one.double() + two.double()) / 2)  # where both are the base's, exact
    assert torch.equal(logits(merged(base, tmp_path / "out", tmp_path / "c")), logits(hand))
    assert torch.equal(logits(load(base, tmp_path / "out")), logits(hand))


def test_the_record_says_what_went_in(pair, tmp_path):
    base, first, second = pair
    average_packs([first, second], tmp_path / "out", weights=[1, 3])
    record = read_expansion(tmp_path / "out")
    assert {name: (each.share, each.digest) for name, each in record.averaged.items()} == {
        pack.name: (share, hashlib.sha256((pack / "blocks.safetensors").read_bytes()).hexdigest())
        for pack, share in ((first, 0.25), (second, 0.75))
    }
    assert [block.damped for block in record.new_blocks] == [None, None]  # one was, the other not
    # The record goes along, and is the average's alone in a stack.
    merge_pack(base, tmp_path / "out", tmp_path / "merged")
    assert read_expansion(tmp_path / "merged").averaged == record.averaged
    stack_packs(base, [tmp_path / "out", first], tmp_path / "stack")
    assert not read_expansion(tmp_path / "stack").averaged
    extract_pack(tmp_path / "stack", tmp_path / "again", pack="out")
    assert (tmp_path / "again" / "expansion.json").read_bytes() == (
        tmp_path / "out" / "expansion.json"
    ).read_bytes()


def test_one_share_is_the_pack_itself(pair, tmp_path):
    _, first, second = pair
    average_packs([first, second], tmp_path / "out", weights=[1, 0])
    before, after = ((each / "blocks.safetensors").read_bytes() for each in (first, tmp_path / "out"))
    assert before == after


def other_base(tmp_path, tiny_llama):
    model = plain(tiny_llama())
    with torch.no_grad():
        model.model.norm.weight.add_(0.01)
    model.save_pretrained(tmp_path / "other")
    return trained(tmp_path / "other", tmp_path / "theirs", [0, 2])


def other_places(tmp_path, tiny_llama):
    return trained(tiny_llama(), tmp_path / "theirs", [0, 1])


def other_form(tmp_path, tiny_llama):
    pack = trained(tiny_llama(), tmp_path / "theirs", [0, 2])
    held = tensors(pack)
    name = min(held)
    save_file(held | {name: held[name].half()}, pack / "blocks.safetensors")
    return pack


def whole_numbers(tmp_path, tiny_llama):
    first, second = tmp_path / "first", trained(tiny_llama(), tmp_path / "theirs", [0, 2])
    for pack in (first, second):
        held = tensors(pack)
        name = min(held)
        save_file(held | {name: held[name].to(torch.int8)}, pack / "blocks.safetensors")
    return second


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (other_base, "which is not the same base"),
        (other_places, "stack them instead"),
        (other_form, "is not as in"),
        (whole_numbers, "which has no average"),
    ],
)
def test_what_has_no_average(tiny_llama, tmp_path, make, words):
    first = trained(tiny_llama(), tmp_path / "first", [0, 2])
    second = make(tmp_path, tiny_llama)
    with pytest.raises(PackError, match=words):
        average_packs([first, second], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("count", "weights", "words"),
    [
        (1, None, "two packs or more"),
        (2, [1], "1 weights for 2 packs"),
        (2, [1, -1], "a weight is -1"),
        (2, [float("inf"), 1], "a weight is inf"),
        (2, [0, 0], "every weight is 0"),
    ],
)
def test_weights_that_cannot_be(tiny_llama, tmp_path, count, weights, words):
    pack = trained(tiny_llama(), tmp_path / "pack", [0])
    with pytest.raises(PackError, match=words):
        average_packs([pack] * count, tmp_path / "out", weights=weights)


def test_the_command(pair, tmp_path, capsys):
    _, first, second = pair
    out = tmp_path / "out"
    assert main(["blocks", "average", str(out), str(first), str(second), "--weights", "0.7,0.7"]) == 0
    assert "0.5 × law + 0.5 × maths" in capsys.readouterr().out
    assert main(["blocks", "inspect", str(out)]) == 0
    assert "average: 0.5 × law + 0.5 × maths" in capsys.readouterr().out
    assert open_pack(out).parameters == open_pack(first).parameters
