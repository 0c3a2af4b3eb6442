"""Expansion side by side with `cp -r` of its output, and with the public tools that do the same.

For each shape a Llama-shaped bfloat16 checkpoint is written with random weights, and these take turns:

    expand        deepen expand: a new process, which ends with its output on the disk
    cp            cp -r of that output, which ends with the copy in memory
    cp_and_sync   cp -r of that output, then sync of the copy
    mergekit      mergekit-yaml, passthrough with filters that scale the new blocks' writes to 0 (--mergekit)
    llama_factory LLaMA-Factory's scripts/llama_pro.py (--llama-factory, --llama-factory-python)

The same bytes are written by all. Before each run everything is synced, and what it reads is brought into
the page cache (with --cold: put out of it). deepen syncs what it writes, so the ratio that is judged is that
to `cp_and_sync`; the one to plain `cp` is recorded beside it. Ratios are of medians. Peak memory is the
resident set as the kernel counts it, mapped files included.

    python benchmarks/expand.py [--shape 1.1b] [--shape 7b] [--rounds 5] [--directory DIR] [--out FILE]
        [--gigabytes 0.3] [--mergekit mergekit-yaml] [--llama-factory llama_pro.py] [--peer-rounds 2]

Exit code 1 if a judged ratio is over 1.1, or deepen's memory over 64 MB.
"""

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from deepen.checkpoint import INDEX, SINGLE, Checkpoint, byte_count, write_file, write_header
from deepen.records.provenance import capture_provenance

MAX_RATIO = 1.1
MAX_MEGABYTES = 64
WORDS = 32_000
# In a small process of its own: a child's peak starts at that of the process which started it.
MEASURE = """
import json, resource, subprocess, sys, time
start = time.perf_counter()
code = subprocess.call(sys.argv[1:], stdout=sys.stderr)
seconds = time.perf_counter() - start
print(json.dumps([code, seconds, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024]))
"""
CP_AND_SYNC = 'cp -r "$0" "$1" && sync "$1"/* "$1"'
PEERS = ("mergekit", "llama_factory")


@dataclass(frozen=True)
class Contender:
    """What it reads, the command line that writes to a directory, and how often it runs."""

    source: Path
    command: Callable[[Path], list[str | Path]]
    rounds: int


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A model to expand: its blocks, the new ones, and its sizes; `shard` is in bytes, 0 for one file."""

    blocks: int
    new: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    shard: int

    def block(self) -> dict[str, tuple[int, ...]]:
        kv = self.hidden // self.heads * self.kv_heads
        return {
            "input_layernorm.weight": (self.hidden,),
            "mlp.down_proj.weight": (self.hidden, self.inner),
            "mlp.gate_proj.weight": (self.inner, self.hidden),
            "mlp.up_proj.weight": (self.inner, self.hidden),
            "post_attention_layernorm.weight": (self.hidden,),
            "self_attn.k_proj.weight": (kv, self.hidden),
            "self_attn.o_proj.weight": (self.hidden, self.hidden),
            "self_attn.q_proj.weight": (self.hidden, self.hidden),
            "self_attn.v_proj.weight": (kv, self.hidden),
        }

    def tensors(self) -> dict[str, tuple[int, ...]]:
        inside = {
            f"model.layers.{i}.{name}": s for i in range(self.blocks) for name, s in self.block().items()
        }
        words = (WORDS, self.hidden)
        return {
            "model.embed_tokens.weight": words,
            **inside,
            "model.norm.weight": (self.hidden,),
            "lm_head.weight": words,
        }

    def of_size(self, gigabytes: float) -> "Shape":
        """Cut it to about that size; blocks stay a multiple of the new ones, as llama_pro.py needs."""
        block = sum(byte_count("BF16", shape) for shape in self.block().values())
        rest = gigabytes * 1e9 - 4 * WORDS * self.hidden
        new = min(self.new, max(1, round(rest / block)))
        return replace(self, new=new, blocks=new * max(1, round(rest / block / new)))

    def config(self) -> dict[str, object]:
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.inner,
            "num_attention_heads": self.heads,
            "num_hidden_layers": self.blocks,
            "num_key_value_heads": self.kv_heads,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "vocab_size": WORDS,
        }


SHAPES = {
    "1.1b": Shape(blocks=22, new=2, hidden=2048, inner=5632, heads=32, kv_heads=4, shard=0),
    "7b": Shape(blocks=32, new=8, hidden=4096, inner=11008, heads=32, kv_heads=32, shard=5_000_000_000),
}


def build_base(directory: Path, shape: Shape) -> None:
    """Write the checkpoint, with a tokenizer of no use that the other tools ask for."""
    directory.mkdir()
    tensors = shape.tensors()
    files = list(cut(tensors, shape.shard))
    finite = bytes(byte & 0b10111111 for byte in range(256))  # no exponent of all ones
    noise = random.Random(0).randbytes(16 << 20).translate(finite)
    places = {}
    for number, names in enumerate(files, 1):
        name = f"model-{number:05}-of-{len(files):05}.safetensors" if len(files) > 1 else SINGLE
        places |= dict.fromkeys(names, name)
        with (directory / name).open("wb") as file:
            file.write(write_header([(n, "BF16", tensors[n]) for n in names], {"format": "pt"}))
            for left in (byte_count("BF16", tensors[n]) for n in names):
                for start in range(0, left, len(noise)):
                    file.write(noise[: left - start])
    if len(files) > 1:
        total = sum(byte_count("BF16", held) for held in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (directory / INDEX).write_text(json.dumps(index))
    (directory / "config.json").write_text(json.dumps(shape.config()))
    write_tokenizer(directory)


def cut(tensors: dict[str, tuple[int, ...]], most: int) -> Iterator[list[str]]:
    names: list[str] = []
    held = 0
    for name, shape in tensors.items():
        size = byte_count("BF16", shape)
        if most and names and held + size > most:
            yield names
            names, held = [], 0
        names.append(name)
        held += size
    yield names


def write_tokenizer(directory: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    Tokenizer(WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>")).save(str(directory / "tokenizer.json"))
    words = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(words))


def mergekit_recipe(base: Path, shape: Shape) -> str:
    """JSON is YAML: each group as it is, then its last block again with its writes scaled to 0."""
    group = shape.blocks // shape.new
    zeros = [{"filter": name, "value": 0.0} for name in ("o_proj", "down_proj")]
    slices = []
    for end in range(group, shape.blocks + 1, group):
        new = {"layer_range": [end - 1, end], "parameters": {"scale": [*zeros, {"value": 1.0}]}}
        slices += [{"sources": [{"model": str(base), "layer_range": [end - group, end]}]}]
        slices += [{"sources": [{"model": str(base), **new}]}]
    return json.dumps({"slices": slices, "merge_method": "passthrough", "dtype": "bfloat16"})


def timed(command: list[str | Path]) -> tuple[float, float]:
    """Run it; return seconds and peak megabytes."""
    through = ["sh", "-c", '"$0" "$@"; exit $?', sys.executable, "-I", "-S", "-c", MEASURE]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([*through, *command], capture_output=True, text=True, check=True, env=environment)
    code, seconds, megabytes = json.loads(done.stdout)
    if code:
        sys.exit(f"{' '.join(map(str, command))}: exit code {code}\n{done.stderr[-2000:]}")
    return seconds, megabytes


def settle(place: Path, source: Path, cold: bool) -> None:
    """Bring the disk to rest and the page cache to a known state."""
    os.sync()
    for path in (path for path in place.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            while not cold and path.parent == source and file.read(16 << 20):
                pass


def measure(
    place: Path, contenders: dict[str, Contender], cold: bool
) -> dict[str, list[tuple[float, float]]]:
    """Let them take turns, each first in turn; every output is removed before the next."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    names, target = list(contenders), place / "new"
    wanted = tensors_in(place / "output")
    for number in range(max(contender.rounds for contender in contenders.values())):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            contender = contenders[name]
            if number < contender.rounds:
                settle(place, contender.source, cold)
                found[name].append(timed(contender.command(target)))
                assert tensors_in(target) == wanted, f"{name} wrote other tensors"
                shutil.rmtree(target)
    return found


def tensors_in(directory: Path) -> set[tuple[str, str, tuple[int, ...]]]:
    return {(t.name, t.dtype, t.shape) for t in Checkpoint.open(directory).tensors.values()}


def contenders_for(place: Path, shape: Shape, options: argparse.Namespace) -> dict[str, Contender]:
    base, output = place / "base", place / "output"
    deepen = [sys.executable, "-m", "deepen", "expand", base]
    found = {
        "expand": Contender(base, lambda out: [*deepen, out, "--blocks", str(shape.new)], options.rounds),
        "cp": Contender(output, lambda out: ["cp", "-r", output, out], options.rounds),
        "cp_and_sync": Contender(output, lambda out: ["sh", "-c", CP_AND_SYNC, output, out], options.rounds),
    }
    if options.mergekit:
        recipe = place / "recipe.yaml"
        recipe.write_text(mergekit_recipe(base, shape))
        merge = [options.mergekit, recipe]
        found["mergekit"] = Contender(
            base, lambda out: [*merge, out, "--lazy-unpickle", "--allow-crimes"], options.peer_rounds
        )
    if options.llama_factory:
        script = [options.llama_factory_python, options.llama_factory]
        told = ["--model_name_or_path", base, "--num_expand", str(shape.new), "--output_dir"]
        found["llama_factory"] = Contender(base, lambda out: [*script, *told, out], options.peer_rounds)
    return found


def run_shape(shape: Shape, options: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir=options.directory) as name:
        place = Path(name)
        build_base(place / "base", shape)
        contenders = contenders_for(place, shape, options)
        timed(contenders["expand"].command(place / "output"))  # what `cp` copies; also the warm-up
        found = measure(place, contenders, options.cold)
        sizes = {
            f"{what}_bytes": sum(path.stat().st_size for path in (place / what).iterdir())
            for what in ("base", "output")
        }
    seconds = {name: [round(took, 3) for took, _ in runs] for name, runs in found.items()}
    median = {name: statistics.median(runs) for name, runs in seconds.items() if runs}
    return {
        "shape": asdict(shape),
        **sizes,
        "seconds": seconds,
        "ratio": median["expand"] / median["cp_and_sync"],
        "ratio_to_unsynced_cp": median["expand"] / median["cp"],
        "ratio_of_fastest": min(seconds["expand"]) / min(seconds["cp_and_sync"]),
        "times_as_fast_as": {n: median[n] / median["expand"] for n in median if n in PEERS},
        "peak_megabytes": {n: round(max(peak for _, peak in runs), 1) for n, runs in found.items() if runs},
    }


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", action="append", choices=SHAPES, help="may be repeated; default: 1.1b")
    parser.add_argument("--gigabytes", type=float, help="fewer or more blocks, for a base of this size")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peer-rounds", type=int, default=2, help="of mergekit and LLaMA-Factory")
    parser.add_argument("--cold", action="store_true", help="read from the disk, not from the page cache")
    parser.add_argument("--mergekit", type=Path, help="its mergekit-yaml")
    parser.add_argument("--llama-factory", type=Path, help="its scripts/llama_pro.py")
    parser.add_argument("--llama-factory-python", type=Path, default=Path(sys.executable))
    parser.add_argument("--directory", type=Path, help="on the disk to measure; default: the system's")
    parser.add_argument("--out", type=Path, help="default: benchmarks/records/expand-SHAPE.json")
    options = parser.parse_args()
    options.shape = options.shape or ["1.1b"]
    name = "-".join(["expand", *options.shape]) + ".json"
    options.out = options.out or Path(__file__).parent / "records" / name
    return options


def main() -> int:
    options = parse_options()
    chosen = {name: SHAPES[name] for name in options.shape}
    if options.gigabytes:
        chosen = {name: shape.of_size(options.gigabytes) for name, shape in chosen.items()}
    shapes = {name: run_shape(shape, options) for name, shape in chosen.items()}
    record = {
        "what": "deepen expand against cp -r of its output, cp -r and sync, and other tools",
        "page_cache": "cold" if options.cold else "warm",
        "limits": {"ratio": MAX_RATIO, "peak_megabytes": MAX_MEGABYTES},
        "shapes": shapes,
        "provenance": capture_provenance(seed=0).model_dump(mode="json"),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_file(options.out, json.dumps(record, indent=1) + "\n")
    print(json.dumps(shapes, indent=1))
    return int(
        any(
            held["ratio"] > MAX_RATIO or held["peak_megabytes"]["expand"] > MAX_MEGABYTES
            for held in shapes.values()
        )
    )


if __name__ == "__main__":
    sys.exit(main())
