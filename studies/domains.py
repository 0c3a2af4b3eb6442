"""Write the texts of the studies of forgetting from public data sets that lie in a folder.

    python studies/domains.py DATA DIR         default of DIR: runs/study-text

DATA holds `math/gsm8k-{train,test}.jsonl` (GSM8K), `text/tinyshakespeare.txt`, `text/tinystories.txt` and
`law/court-opinions.jsonl` (opinions of the US Supreme Court, one a line, its words under `text`). Each domain
becomes training text, held-out text that chooses learning rates, and held-out text that is reported; no
document is in two of them. Of the stories, which are general text, the last quarter is written: their
beginning is what is evaluated.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

from texts import DOCUMENT, HELDOUT, cut, number, up_to, write


def main(data: Path, directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    train, test = (list(problems(data / "math" / f"gsm8k-{part}.jsonl")) for part in ("train", "test"))
    write(directory / "gsm8k-reported.jsonl", cut(test, 2 * HELDOUT))  # they are short
    write(directory / "gsm8k-tuning.jsonl", cut(train[-2 * HELDOUT :], 2 * HELDOUT))
    write(directory / "gsm8k.jsonl", up_to(train[: -2 * HELDOUT]))
    # From the front to be learned, from the back to be held out: neighbours are of one play.
    plays = list(passages((data / "text" / "tinyshakespeare.txt").read_text("utf-8")))
    write(directory / "shakespeare-reported.jsonl", plays[-HELDOUT:])
    write(directory / "shakespeare-tuning.jsonl", plays[-2 * HELDOUT : -HELDOUT])
    write(directory / "shakespeare.jsonl", up_to(plays[: -2 * HELDOUT]))
    opinions = sorted(lines(data / "law" / "court-opinions.jsonl"), key=lambda named: number(named[1]))
    write(directory / "law-reported.jsonl", cut(opinions, HELDOUT))
    write(directory / "law-tuning.jsonl", cut(opinions[HELDOUT:], HELDOUT))
    write(directory / "law.jsonl", up_to(opinions[2 * HELDOUT :]))
    stories = (data / "text" / "tinystories.txt").read_text("utf-8")
    write(directory / "stories.jsonl", list(passages(stories[-len(stories) // 4 :])))


def lines(path: Path) -> Iterator[tuple[str, str]]:
    for place, line in enumerate(path.read_text("utf-8").splitlines()):
        yield str(place), json.loads(line)["text"].strip()


def problems(path: Path) -> Iterator[tuple[str, str]]:
    for place, line in enumerate(path.read_text("utf-8").splitlines()):
        problem = json.loads(line)
        yield str(place), f"{problem['question']}\n{problem['answer']}"


def passages(text: str) -> Iterator[tuple[str, str]]:
    """Yield whole speeches or paragraphs, as many as make a document."""
    passage = ""
    for speech in text.split("\n\n"):
        passage += f"{speech}\n\n"
        if len(passage) >= DOCUMENT:
            yield passage.partition("\n")[0].rstrip(":"), passage
            passage = ""


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2] if len(sys.argv) > 2 else "runs/study-text"))
