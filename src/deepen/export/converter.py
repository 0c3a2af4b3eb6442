"""llama.cpp's own converter, run on a checkpoint."""

import subprocess
import sys
from pathlib import Path

from deepen.errors import CheckpointError


def run_converter(converter: Path, directory: Path, out: Path, type: str) -> None:
    """Have llama.cpp's `convert_hf_to_gguf.py` write a checkpoint as a GGUF file.

    It runs with this Python, which must have what it imports.

    Args:
        converter: the script.
        directory: the checkpoint.
        out: the file to write.
        type: `f32`, `f16`, `bf16` or `q8_0`.

    Raises:
        CheckpointError: the script is not there, or fails; with the last line it printed.
    """
    if not converter.is_file():
        raise CheckpointError(f"{converter}: no such file; give llama.cpp's convert_hf_to_gguf.py")
    command = [sys.executable, str(converter), str(directory), "--outfile", str(out), "--outtype", type]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    if found.returncode or not out.stat().st_size:
        said = (found.stderr.strip() or found.stdout.strip() or "it wrote nothing").splitlines()[-1]
        raise CheckpointError(f"{directory}: llama.cpp's converter failed: {said[:200]}")
