"""Expansion against `cp -r` of its output: time, side by side on one disk, and memory.

Builds a Llama-shaped bfloat16 checkpoint (2 GB by default) in a temporary directory and alternates the two.
Each starts after a sync, on files in the page cache. `deepen expand` is timed as a user runs it: a new
process, ending with its output on the disk. `cp` ends with its output in memory, so the ratio that is judged
is against `cp` followed by `sync` of the copy; the one against plain `cp` is recorded beside it.

    python benchmarks/expand.py [--gigabytes 2] [--rounds 5] [--directory DIR] [--out FILE]

Exit code 1 if the median over the rounds of the judged ratio is over 1.2, or memory over 64 MB.
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
import time
from pathlib import Path

from deepen.checkpoint import byte_count, write_file, write_header
from deepen.records.provenance import capture_provenance

MAX_RATIO = 1.2
MAX_MEGABYTES = 64
HIDDEN, INNER, WORDS, NEW = 2048, 5632, 32_000, 4
MEASURED = """
import resource, sys
from deepen.cli import main
code = main(sys.argv[1:])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, "torch" in sys.modules)
sys.exit(code)
"""


def build_base(directory: Path, gigabytes: float) -> int:
    """Write the checkpoint; return its number of blocks."""
    block = {
        "input_layernorm.weight": (HIDDEN,),
        "post_attention_layernorm.weight": (HIDDEN,),
        **{f"self_attn.{part}_proj.weight": (HIDDEN, HIDDEN) for part in "qo"},
        **{f"self_attn.{part}_proj.weight": (HIDDEN // 8, HIDDEN) for part in "kv"},
        "mlp.gate_proj.weight": (INNER, HIDDEN),
        "mlp.up_proj.weight": (INNER, HIDDEN),
        "mlp.down_proj.weight": (HIDDEN, INNER),
    }
    ends = {"lm_head.weight": (WORDS, HIDDEN), "model.embed_tokens.weight": (WORDS, HIDDEN)}
    ends["model.norm.weight"] = (HIDDEN,)
    size = sum(byte_count("BF16", shape) for shape in block.values())
    blocks = round((gigabytes * 1e9 - sum(byte_count("BF16", shape) for shape in ends.values())) / size)
    shapes = ends | {
        f"model.layers.{i}.{name}": shape for i in range(blocks) for name, shape in block.items()
    }
    finite = bytes(byte & 0b10111111 for byte in range(256))
    noise = random.Random(0).randbytes(16 << 20).translate(finite)
    directory.mkdir()
    with (directory / "model.safetensors").open("wb") as file:
        held = sorted(shapes.items())
        file.write(write_header([(name, "BF16", shape) for name, shape in held], {"format": "pt"}))
        for _, shape in held:
            left = byte_count("BF16", shape)
            while left:
                left -= file.write(noise[:left])
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": blocks}
    config |= {"hidden_size": HIDDEN, "intermediate_size": INNER, "vocab_size": WORDS}
    (directory / "config.json").write_text(json.dumps(config))
    return blocks


def timed(*command: str | Path) -> tuple[float, str]:
    os.sync()
    start = time.perf_counter()
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return time.perf_counter() - start, done.stdout


def expand(base: Path, out: Path) -> tuple[float, str]:
    # Through a shell: ru_maxrss of a direct child would start at this process's own.
    return timed(
        *("sh", "-c", '"$0" "$@"; exit $?', sys.executable, "-c", MEASURED),
        *("expand", base, out, "--blocks", str(NEW), "--json"),
    )


def measure(place: Path, base: Path, rounds: int) -> dict[str, list[float]]:
    """Alternate the three, each first in turn; every output is removed before the next."""
    output = place / "output"
    expand(base, output)  # what `cp` copies; also the warm-up
    found: dict[str, list[float]] = {"expand": [], "cp": [], "cp_and_sync": [], "megabytes": []}

    def run_expand() -> None:
        seconds, said = expand(base, place / "new")
        kilobytes, torch = said.splitlines()[-1].split()
        assert torch == "False", "torch was imported"
        found["expand"].append(seconds)
        found["megabytes"].append(int(kilobytes) / 1024)

    def run_cp() -> None:
        found["cp"].append(timed("cp", "-r", output, place / "new")[0])

    def run_cp_and_sync() -> None:
        command = 'cp -r "$0" "$1" && sync "$1"/* "$1"'
        found["cp_and_sync"].append(timed("sh", "-c", command, output, place / "new")[0])

    kinds = [run_expand, run_cp, run_cp_and_sync]
    for number in range(rounds):
        for kind in kinds[number % 3 :] + kinds[: number % 3]:
            kind()
            shutil.rmtree(place / "new")
    return found


def median_ratio(ours: list[float], theirs: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--directory", type=Path, default=None, help="on the disk to measure; default: the system's"
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "records" / "expand.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.directory) as name:
        place = Path(name)
        blocks = build_base(place / "base", options.gigabytes)
        found = measure(place, place / "base", options.rounds)
        written = (place / "output" / "model.safetensors").stat().st_size
    record = {
        "what": f"deepen expand, {blocks} blocks + {NEW} new, against cp -r of its output",
        "base_gigabytes": options.gigabytes,
        "output_bytes": written,
        "seconds": {name: found[name] for name in ("expand", "cp", "cp_and_sync")},
        "ratio": median_ratio(found["expand"], found["cp_and_sync"]),
        "ratio_to_unsynced_cp": median_ratio(found["expand"], found["cp"]),
        "peak_megabytes": max(found["megabytes"]),
        "limits": {"ratio": MAX_RATIO, "peak_megabytes": MAX_MEGABYTES},
        "provenance": capture_provenance(seed=0).model_dump(mode="json"),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_file(options.out, json.dumps(record, indent=1) + "\n")
    shown = ("seconds", "ratio", "ratio_to_unsynced_cp", "peak_megabytes")
    print(json.dumps({key: record[key] for key in shown}, indent=1))
    return int(record["ratio"] > MAX_RATIO or record["peak_megabytes"] > MAX_MEGABYTES)


if __name__ == "__main__":
    sys.exit(main())
