import json
import os
import stat

import pytest
import torch

from deepen.errors import TrainingError
from deepen.training.checkpoints import newest_checkpoint, restore_checkpoint, save_checkpoint
from deepen.training.optimizer import build_optimizer


def trained(value):
    parameters = {"a": torch.nn.Parameter(torch.full((3, 2), value)), "b": torch.nn.Parameter(torch.ones(2))}
    optimizer = build_optimizer(parameters, betas=(0.9, 0.95), weight_decay=0.0)
    for parameter in parameters.values():
        parameter.grad = torch.full_like(parameter, 0.5)
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    optimizer.step()
    return parameters, optimizer


def save(root, step, value=1.0, keep=10, **identity):
    parameters, optimizer = trained(value)
    return save_checkpoint(root, step, parameters, optimizer, identity=identity, keep=keep)


def test_restores_parameters_moments_and_randomness(tmp_path):
    torch.manual_seed(7)
    parameters, optimizer = trained(3.0)
    save_checkpoint(tmp_path, 4, parameters, optimizer, identity={}, keep=1)
    drawn = torch.rand(3)
    other, fresh = trained(0.0)
    saved, _ = newest_checkpoint(tmp_path)
    restore_checkpoint(saved, other, fresh, identity={})
    assert torch.equal(torch.rand(3), drawn)
    for name, parameter in parameters.items():
        assert torch.equal(parameter, other[name])
        for key, value in optimizer.state[parameter].items():
            assert torch.equal(value, fresh.state[other[name]][key]), key


def test_holds_no_pickle_and_is_readable_by_others(tmp_path):
    before = os.umask(0o022)
    try:
        directory = save(tmp_path, 1)
    finally:
        os.umask(before)
    names = {path.name for path in directory.iterdir()}
    assert names == {"trainable.safetensors", "optimizer.safetensors", "manifest.json"}
    assert {stat.S_IMODE(path.stat().st_mode) for path in directory.iterdir()} == {0o644}


def test_keeps_only_the_newest(tmp_path):
    for step in (2, 4, 10, 12):
        save(tmp_path, step, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-10", "step-12"]


def test_a_damaged_one_from_before_does_not_take_the_place_of_the_newest(tmp_path):
    save(tmp_path, 2, keep=1)
    (save(tmp_path, 6, keep=2) / "manifest.json").unlink()
    save(tmp_path, 4, keep=1)  # training went on from step 2
    assert [path.name for path in tmp_path.iterdir()] == ["step-4"]
    assert newest_checkpoint(tmp_path)[0].step == 4


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (lambda d: (d / "manifest.json").unlink(), "incomplete or unreadable"),
        (lambda d: (d / "manifest.json").write_text("{"), "incomplete or unreadable"),
        (lambda d: (d / "manifest.json").write_text('{"format_version": 9}'), "format_version 9"),
        (lambda d: (d / "optimizer.safetensors").unlink(), "incomplete or unreadable"),
        (lambda d: os.truncate(d / "trainable.safetensors", 90), "trainable.safetensors is damaged"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_passed_over(tmp_path, damage, word):
    save(tmp_path, 2)
    damage(save(tmp_path, 4))
    saved, damaged = newest_checkpoint(tmp_path)
    assert saved.step == 2
    assert len(damaged) == 1
    assert "step-4" in damaged[0]
    assert word in damaged[0]


def test_one_flipped_bit_is_noticed(tmp_path):
    directory = save(tmp_path, 4)
    file = directory / "trainable.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert newest_checkpoint(tmp_path)[0] is None


def test_another_runs_checkpoint_is_refused(tmp_path):
    save(tmp_path, 4, data="one", steps=10)
    saved, _ = newest_checkpoint(tmp_path)
    parameters, optimizer = trained(0.0)
    with pytest.raises(TrainingError, match="data 'one', the run has 'two'"):
        restore_checkpoint(saved, parameters, optimizer, identity={"data": "two", "steps": 10})
    del parameters["b"]
    with pytest.raises(TrainingError, match=r"not this run's \(first: b\)"):
        restore_checkpoint(saved, parameters, optimizer, identity={"data": "one", "steps": 10})


def test_the_manifest_is_json_with_every_file(tmp_path):
    manifest = json.loads((save(tmp_path, 3, data="d") / "manifest.json").read_text())
    assert manifest["step"] == 3
    assert manifest["identity"] == {"data": "d"}
    assert set(manifest["files"]) == {"trainable.safetensors", "optimizer.safetensors"}
