"""Write the texts of the small studies: what every installation of Python and torch holds, offline.

    python studies/texts.py DIR         default: runs/study-text

General text: docstrings. Domains: Python source without docstrings and comments, and the C++ headers that
torch ships, without comments. Documents are split by file into training, tuning and reported, the same way
everywhere. Nobody's text is shipped: both are read from the user's own installation, so numbers differ a
little between versions of Python and torch; the records hold the digests.
"""

import hashlib
import json
import re
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from deepen.checkpoint import write_file
from deepen.demo.text import code, documents_apart, module_name, prose, standard_library

TRAINING = 900_000  # characters of each domain
DOCUMENT = 1_000  # characters of each held-out document: many are scored and not a few long ones
LARGEST = 40_000  # characters of a header; longer ones are tables, or whole libraries in a file
HELDOUT = 70  # documents of each held-out text


def main(directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    root = Path(sysconfig.get_path("stdlib"))
    training, heldout = documents_apart(standard_library(), root)
    general = ((module_name(path, root), text) for path, text in prose(heldout))
    write(directory / "general.jsonl", cut(general, HELDOUT))
    python = [(module_name(path, root), text) for path, text in code(heldout)]
    # Tuned on modules that training leaves: reported ones choose nothing.
    tuning = [(module_name(path, root), text) for path, text in code(training[-2 * HELDOUT :])]
    write(directory / "python-reported.jsonl", cut(python, HELDOUT))
    write(directory / "python-tuning.jsonl", cut(tuning, HELDOUT))
    rest = ((module_name(path, root), text) for path, text in code(training[: -2 * HELDOUT]))
    write(directory / "python.jsonl", up_to(rest))
    headers = list(cpp(Path(torch.__file__).parent / "include"))
    write(directory / "cpp-reported.jsonl", cut(headers, HELDOUT))
    write(directory / "cpp-tuning.jsonl", cut(headers[HELDOUT:], HELDOUT))
    write(directory / "cpp.jsonl", up_to(headers[2 * HELDOUT :]))


def cpp(root: Path) -> Iterator[tuple[str, str]]:
    """Yield (name, source) of headers in an order that mixes folders; generated ones are left out."""
    paths = [
        path for path in root.rglob("*.h") if not path.name.endswith(("_ops.h", "_native.h", "_dispatch.h"))
    ]
    names = sorted((path.relative_to(root).as_posix() for path in paths), key=number)
    for name in names:
        text = (root / name).read_text("utf-8", errors="replace")
        text = re.sub(r"/\*.*?\*/|//[^\n]*", "", text, flags=re.DOTALL)
        text = re.sub(r"[ \t]+\n", "\n", text)
        text = re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"
        if "@generated" not in text and 1_500 <= len(text) <= LARGEST:
            yield name, text


def number(name: str) -> str:
    return hashlib.blake2b(name.encode()).hexdigest()


def cut(documents: Iterable[tuple[str, str]], most: int) -> list[tuple[str, str]]:
    return [(name, text[:DOCUMENT]) for name, text in documents][:most]


def up_to(documents: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    left = TRAINING
    for name, text in documents:
        if left <= 0:
            return
        left -= len(text)
        yield name, text


def write(path: Path, documents: Iterable[tuple[str, str]]) -> None:
    lines = [json.dumps({"name": name, "text": text}) + "\n" for name, text in documents]
    write_file(path, "".join(lines))
    print(f"{path}: {len(lines)} documents")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/study-text"))
