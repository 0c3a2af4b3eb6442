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

from deepen.blocks import extract_pack, merge_pack, stack_packs
from deepen.checkpoint import write_header
from deepen.expansion import expand_checkpoint, verify_bytes

FINITE = bytes(byte & 0b10111111 for byte in range(256))  # no exponent of all ones
RUN = """
import sys, {module}
print("go", flush=True)
{call}
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A Llama-shaped checkpoint of about 25 MB in two shards."""
    directory = tmp_path_factory.mktemp("kill") / "base"
    directory.mkdir()
    hidden, inner, words, blocks = 384, 1024, 2048, 6
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


@pytest.fixture(scope="module")
def made(base, tmp_path_factory):
    """The arguments of each operation: what it reads besides the base."""
    directory = tmp_path_factory.mktemp("inputs")
    for name, blocks in (("law", 4), ("maths", 3)):
        expand_checkpoint(base, directory / f"{name}-expanded", blocks=blocks)
        extract_pack(directory / f"{name}-expanded", directory / name)
    return directory


# Operation -> (module, how it is called with base, inputs and output; what stands there before, likewise).
OPERATIONS = {
    "expand": (
        "deepen.expansion",
        lambda base, inputs, out: f"expand_checkpoint({base!r}, {out!r}, blocks=3, overwrite=True)",
        lambda base, inputs, out: expand_checkpoint(base, out, blocks=1, overwrite=True),
        lambda base, inputs, out: expand_checkpoint(base, out, blocks=3, overwrite=True),
    ),
    "merge": (
        "deepen.blocks",
        lambda base, inputs, out: f"merge_pack({base!r}, {inputs + '/law'!r}, {out!r}, overwrite=True)",
        lambda base, inputs, out: merge_pack(base, inputs + "/maths", out, overwrite=True),
        lambda base, inputs, out: merge_pack(base, inputs + "/law", out, overwrite=True),
    ),
    "extract": (
        "deepen.blocks",
        lambda base, inputs, out: f"extract_pack({inputs + '/law-expanded'!r}, {out!r}, overwrite=True)",
        lambda base, inputs, out: extract_pack(inputs + "/maths-expanded", out, overwrite=True),
        lambda base, inputs, out: extract_pack(inputs + "/law-expanded", out, overwrite=True),
    ),
    "stack": (
        "deepen.blocks",
        lambda base, inputs, out: (
            f"stack_packs({base!r}, {[inputs + '/law', inputs + '/maths']!r}, {out!r}, overwrite=True)"
        ),
        lambda base, inputs, out: stack_packs(base, [inputs + "/maths"], out, overwrite=True),
        lambda base, inputs, out: stack_packs(
            base, [inputs + "/law", inputs + "/maths"], out, overwrite=True
        ),
    ),
}


def digest(directory):
    """Every name and byte of a directory; None where it is absent."""
    if not directory.exists():
        return None
    total = hashlib.blake2b()
    for path in sorted(directory.iterdir()):
        total.update(path.name.encode() + path.read_bytes())
    return total.hexdigest()


def killed(command, after):
    """Run a command and kill it some seconds after its imports; return whether it died of that."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    process.stdout.readline()
    time.sleep(after)
    process.send_signal(signal.SIGKILL)
    process.stdout.close()
    return process.wait() == -signal.SIGKILL


def timed(operate):
    durations = []
    for _ in range(2):  # the first may wait for the disk
        start = time.perf_counter()
        operate()
        durations.append(time.perf_counter() - start)
    return min(durations)


def kill_at_random_moments(operation, base, made, tmp_path, count, existing):
    """Kill an operation `count` times, spread over its duration; return how often it died of that."""
    module, call, before, after = OPERATIONS[operation]
    arguments = str(base), str(made)
    duration = timed(lambda: after(*arguments, str(tmp_path / "new")))
    new, old = digest(tmp_path / "new"), None
    out = tmp_path / "place" / "out"
    out.parent.mkdir()
    if existing:
        before(*arguments, str(out))
        old = digest(out)
    begun, deaths, rng = old, 0, random.Random(f"{operation} {existing}")
    run = RUN.format(module=module, call=f"{module}.{call(*arguments, str(out))}")
    for moment in range(count):
        # Early, middle and late moments are all hit; with others at work it takes longer than it took.
        after_go = 1.3 * duration * (moment + rng.random()) / count
        deaths += killed([sys.executable, "-c", run], after_go)
        state = digest(out)
        assert state in (old, new)
        if state == new and new != begun:
            old = new  # and never back
    left = {name for name in os.listdir(out.parent) if name != "out"}
    assert all(name.startswith(".out.partial-") for name in left)
    after(*arguments, str(out))
    assert os.listdir(out.parent) == ["out"]
    assert digest(out) == new
    if operation != "extract":
        assert verify_bytes(base, out, base_only=True).identical
    return deaths


@pytest.mark.parametrize(
    ("operation", "existing"), [("expand", False), ("merge", True), ("extract", False), ("stack", True)]
)
def test_killed_at_random_moments(base, made, tmp_path, operation, existing):
    assert kill_at_random_moments(operation, base, made, tmp_path, 4, existing) >= 2


@pytest.mark.slow
def test_killed_200_times(base, made, tmp_path):
    """50 times each: expand, merge, extract, stack; half of them over an earlier output."""
    deaths = {}
    for operation in OPERATIONS:
        for existing in (False, True):
            place = tmp_path / f"{operation}-{existing}"
            place.mkdir()
            died = kill_at_random_moments(operation, base, made, place, 25, existing)
            deaths[operation] = deaths.get(operation, 0) + died
    print(f"died of the kill, of 50 each: {deaths}")
    assert all(died >= 20 for died in deaths.values()), deaths
