"""A directory in which what a page says can run: stand-ins for its models, runs and texts, at toy size."""

import json
import random
import re
import shutil
from contextlib import chdir
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from page_blocks import ROOT
from tiny_run import WORDS, write_base

from deepen.cli import main

# With three new ones these are at 4, 9 and 14, as of Llama 2's 32 with eight.
BLOCKS = 12
HUB_IDS = ("meta-llama/Llama-2-7b-hf", "meta-llama/Llama-2-7b-chat-hf")
_TOY = {
    **{"sequence_length": 32, "tokens": 128, "batch_tokens": 64, "batch": 2, "epochs": 0.1, "heldout": 0.3},
    **{
        "max_tokens": 200,
        "micro_batch": 2,
        "workers": 1,
        "precision": "fp32",
        "train_items": 4,
        "test_items": 2,
    },
    **{"seeds": [0], "answer_tokens": 4},
}
_RUN = """
base: base
output: run
expand: {blocks: 3}
data: {sequence_length: 32, heldout: 0.3, sources: [{path: train.jsonl}]}
train: {tokens: 128, batch_tokens: 64, learning_rate: 1e-2}
evaluate: {general: [{path: general.jsonl}], max_tokens: 400}
merge: true
"""


def records(seed: str, count: int = 30) -> list[dict[str, str]]:
    """Records that hold a text under each of the keys that pages name; files share no 13 words in a row."""
    draw = random.Random(seed)
    texts = [" ".join(draw.choices(WORDS, k=40)) + "." for _ in range(count)]
    return [
        {**dict.fromkeys(("text", "content", "code"), text), "instruction": text[:30], "output": text[30:60]}
        for text in texts
    ]


def write_text(path: Path) -> None:
    """Write a file, or a directory of one, of the form that its name says."""
    path = Path(str(path).replace("*", "part"))
    if path.exists():
        return
    if not path.suffix:
        write_text(path / "part.txt")
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = records(path.name)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("\n\n".join(row["text"] for row in rows))


def write_chat(path: Path) -> None:
    """Write conversations in Alpaca's form."""
    path = path if path.suffix else path.with_suffix(".jsonl")
    rows = [{key: row[key] for key in ("instruction", "output")} for row in records(path.name)]
    path.parent.mkdir(parents=True, exist_ok=True)
    many = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_text(json.dumps(rows) if path.suffix == ".json" else many)


class Theatre:
    """What all pages share, made once: a base and a finished run of it."""

    def __init__(self, root: Path, blocks: int = BLOCKS) -> None:
        # Answers may be half as long as the context.
        self.base = write_base(root / "base", blocks=blocks, max_position_embeddings=96)
        self.root = root

    @property
    def run(self) -> Path:
        run = self.root / "run"
        if not run.exists():
            for name in ("train.jsonl", "general.jsonl"):
                write_text(self.root / name)
            (self.root / "recipe.yaml").write_text(_RUN)
            with chdir(self.root):
                assert main(["run", "recipe.yaml"]) == 0
        return run

    @cached_property
    def shallow(self) -> Path:
        """A model with the context of Llama 2, which is only planned."""
        return write_base(self.root / "shallow", blocks=4, max_position_embeddings=4096)


class Stage:
    """The directory of one page."""

    def __init__(self, root: Path, theatre: Theatre) -> None:
        self.root, self.theatre, self.outputs = root, theatre, set[str]()
        for name in ("recipes", "examples", "studies", "constraints.txt"):
            (root / name).symlink_to(ROOT / name)
        shutil.copytree(theatre.base, root / "base")

    def _put_into_the_hub_cache(self, hub_id: str) -> None:
        place = self.root / "hub" / f"models--{hub_id.replace('/', '--')}"
        if place.exists():
            return
        shutil.copytree(self.theatre.shallow, place / "snapshots" / "0")
        (place / "refs").mkdir()
        (place / "refs" / "main").write_text("0")

    def write_file(self, name: str, text: str) -> None:
        """Write a block of the page; a recipe at toy size, with the texts that it names."""
        if name.endswith((".yaml", ".yml")):
            content = self._toy(yaml.safe_load(text), "", chat=False)
            self._provide_model(str(content.get("base", "")))
            self.outputs.add(str(content.get("output")))
            text = yaml.safe_dump(content)
        (self.root / name).write_text(text)

    def _toy(self, node: Any, key: str, *, chat: bool) -> Any:
        """Make everything small that a recipe says the size of, and lay out its texts."""
        if key in _TOY:
            return _TOY[key]
        if isinstance(node, list):
            return [self._toy(each, key, chat=chat) for each in node]
        if not isinstance(node, dict):
            return node
        if node.get("kind") == "multiple_choice":
            rows = [
                {"query": f"{n} or {n + 1}?", "choices": [f"{n}", f"{n + 1}"], "gold": n % 2}
                for n in range(8)
            ]
            (self.root / node["path"]).write_text("".join(json.dumps(row) + "\n" for row in rows))
            return node
        if "hub" in node:
            name = node["hub"].rsplit("/", 1)[-1]
            node = {k: v for k, v in node.items() if k not in ("hub", "subset", "split")}
            node |= {"path": f"hub-data/{name}.jsonl"}
        for name in ("path", "train", "test"):
            if isinstance(node.get(name), str):
                (write_chat if chat or name != "path" else write_text)(self.root / node[name])
        return {
            name: self._toy(value, name, chat=chat or name == "sft")
            for name, value in node.items()
            if name not in ("suites", "format")
        }

    def shrink(self, words: list[str]) -> list[str]:
        """A command with what it sets at toy size, too."""
        sizes = "|".join(_TOY)
        return [
            re.sub(rf"((?:\w+\.)*({sizes}))=.*", lambda m: f"{m[1]}={_TOY[m[2]]}", word) for word in words
        ]

    def provide(self, words: list[str]) -> None:
        """Put in place what a command reads and nothing on the page has made."""
        for option, value in zip(["", *words], words, strict=False):
            if option in ("--text", "--domain-text", "--measure", "--general"):
                write_text(self.root / value)
            elif option == "--pack" and ":" in value:  # NAME=PACK:TEXTS
                pack, _, texts = value.partition("=")[2].partition(":")
                self._provide_model(pack)
                write_text(self.root / texts)
            else:
                self._provide_model(value)

    def _provide_model(self, word: str) -> None:
        run = re.match(r"runs/[\w-]+", word)
        target = self.root / (run[0] if run else word)
        if not word or target.exists() or target.is_symlink() or (run and run[0] in self.outputs):
            return
        if run:
            shutil.copytree(self.theatre.run, target)
        elif re.fullmatch(r"path/to/llama|BASE", word):
            shutil.copytree(self.theatre.base, target)
        elif word in HUB_IDS:
            self._put_into_the_hub_cache(word)
        elif re.fullmatch(r"packs/\w+|PACK|law|maths", word):
            shutil.copytree(self.theatre.run / "blocks", target)
        elif re.fullmatch(r"(expanded|other)/", word):
            shutil.copytree(self.theatre.run / "model", target)
        elif word == "config.json":
            shutil.copy(self.theatre.shallow / word, target)
        elif word == "recipe.yaml":
            self.write_file(word, _RUN)
