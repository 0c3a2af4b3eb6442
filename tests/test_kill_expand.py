"""Kill -9 at random moments: the complete old state or the complete new one; the next run cleans up."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from deepen.checkpoint import write_header
from deepen.expansion import expand_checkpoint, verify_bytes

FINITE = bytes(byte & 0b10111111 for byte in range(256))  # no exponent of all ones
RUN = """
import sys
from deepen.expansion import expand_checkpoint
print("go", flush=True)
expand_checkpoint(sys.argv[1], sys.argv[2], blocks=int(sys.argv[3]), overwrite=True)
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A Llama-shaped checkpoint of about 100 MB in two shards."""
    directory = tmp_path_factory.mktemp("kill") / "base"
    directory.mkdir()
    hidden, inner, words, blocks = 512, 2048, 8192, 10
    block = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        **{f"self_attn.{part}_proj.weight": (hidden, hidden) for part in "qkvo"},
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
    }
    shapes = {"model.embed_tokens.weight": (words, hidden), "model.norm.weight": (hidden,)}
    shapes |= {f"model.layers.{i}.{name}": shape for i in range(blocks) for name, shape in block.items()}
    names = list(shapes)
    weight_map = {}
    for number, held in enumerate((names[: len(names) // 2], names[len(names) // 2 :]), 1):
        file = f"model-{number:05}-of-00002.safetensors"
        with (directory / file).open("wb") as target:
            target.write(write_header([(name, "BF16", shapes[name]) for name in held], {"format": "pt"}))
            for name in held:
                size = 2 * shapes[name][0] * (*shapes[name], 1)[1]
                target.write(random.Random(name).randbytes(size).translate(FINITE))
        weight_map |= dict.fromkeys(held, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    config = {"model_type": "llama", "num_hidden_layers": blocks, "tie_word_embeddings": True}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def digest(directory):
    """Every name and byte of a directory; None where it is absent."""
    if not directory.exists():
        return None
    total = hashlib.blake2b()
    for path in sorted(directory.iterdir()):
        total.update(path.name.encode() + path.read_bytes())
    return total.hexdigest()


def killed(base, out, blocks, after):
    """Run an expansion and kill it some seconds after its imports; return whether it died of that."""
    command = [sys.executable, "-c", RUN, base, out, str(blocks)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    process.stdout.readline()
    time.sleep(after)
    process.send_signal(signal.SIGKILL)
    process.stdout.close()
    return process.wait() == -signal.SIGKILL


def timed(base, out, blocks):
    durations = []
    for _ in range(2):  # the first may wait for the disk
        start = time.perf_counter()
        expand_checkpoint(base, out, blocks=blocks, overwrite=True)
        durations.append(time.perf_counter() - start)
    return digest(out), min(durations)


@pytest.mark.parametrize("existing", [False, True])
def test_killed_at_random_moments(base, tmp_path, existing):
    rng = random.Random(existing)
    new, duration = timed(base, tmp_path / "new", 3)
    old = timed(base, tmp_path / "old", 1)[0] if existing else None
    out = tmp_path / "place" / "out"
    out.parent.mkdir()
    if existing:
        expand_checkpoint(base, out, blocks=1)
    deaths = 0
    for moment in range(10):
        # Spread over the whole run, so that early, middle and late moments are all hit.
        deaths += killed(base, out, 3, duration * (moment + rng.random()) / 10)
        state = digest(out)
        assert state in (old, new)
        if state == new:  # and never back
            old = new
    assert deaths >= 4
    left = {name for name in os.listdir(out.parent) if name != "out"}
    assert all(name.startswith(".out.partial-") for name in left)
    expand_checkpoint(base, out, blocks=3, overwrite=True)
    assert os.listdir(out.parent) == ["out"]
    assert digest(out) == new
    assert verify_bytes(base, out).identical
