"""A directory in which what a page says can run: stand-ins for its models, runs and texts, at toy size."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from page_blocks import ROOT
from tiny_run import sentences, write_base

from deepen.cli import main

# New blocks are at 4, 9 and 14, as in Llama 2 with one to four; its 32 blocks only where a page counts them.
BLOCKS, NEW = 12, 3
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
expand: {blocks: NEW}
data: {sequence_length: 32, heldout: 0.3, sources: [{path: train.jsonl}]}
train: {tokens: 128, batch_tokens: 64, learning_rate: 1e-2}
evaluate: {general: [{path: general.jsonl}], max_tokens: 400}
merge: true
"""


def records(count: int = 30) -> list[dict[str, str]]:
    """Records that hold a text under each of the keys that pages name."""
    return [
        {
            **dict.fromkeys(("text", "content", "code"), text),
            **{"instruction": text[:30], "output": text[30:60]},
        }
        for text in sentences(0, count // 2) + sentences(3, count - count // 2)
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
    rows = records()
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
    rows = [{"instruction": row["text"][:30], "output": row["text"][30:60]} for row in records()]
    path.parent.mkdir(parents=True, exist_ok=True)
    many = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_text(json.dumps(rows) if path.suffix == ".json" else many)


def lengthen(config: Path) -> None:
    """Give a model the context of Llama 2, for what is only planned."""
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": 4096}))


class Theatre:
    """What all pages share, made once: a base and a finished run of it."""

    def __init__(self, root: Path, blocks: int = BLOCKS) -> None:
        # Answers may be half as long as the context.
        self.base = write_base(root / "base", blocks=blocks, max_position_embeddings=96)
        self.root, self.new = root, blocks * NEW // BLOCKS

    @property
    def run(self) -> Path:
        run = self.root / "run"
        if not run.exists():
            for name in ("train.jsonl", "general.jsonl"):
                write_text(self.root / name)
            (self.root / "recipe.yaml").write_text(_RUN.replace("NEW", str(self.new)))
            assert main(["run", "recipe.yaml"]) == 0
        return run


class Stage:
    """The directory of one page."""

    def __init__(self, root: Path, theatre: Theatre) -> None:
        self.root, self.theatre, self.outputs = root, theatre, set[str]()
        for name in ("recipes", "examples", "studies", "constraints.txt"):
            (root / name).symlink_to(ROOT / name)
        shutil.copytree(theatre.base, root / "base")
        for hub_id in HUB_IDS:
            self._put_into_the_hub_cache(hub_id)

    def _put_into_the_hub_cache(self, hub_id: str) -> None:
        place = self.root / "hub" / f"models--{hub_id.replace('/', '--')}"
        shutil.copytree(self.theatre.base, place / "snapshots" / "0")
        lengthen(place / "snapshots" / "0" / "config.json")
        (place / "refs").mkdir()
        (place / "refs" / "main").write_text("0")

    def write_file(self, name: str, text: str) -> None:
        """Write a block of the page; a recipe at toy size, with the texts that it names."""
        if name.endswith((".yaml", ".yml")):
            content = self._toy(yaml.safe_load(text), "", chat=False)
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

    def provide(self, words: list[str]) -> None:
        """Put in place what a command reads and nothing on the page has made."""
        for option, value in zip(["", *words], words, strict=False):
            if option in ("--text", "--domain-text", "--measure"):
                write_text(self.root / value)
            else:
                self._provide_model(value)

    def _provide_model(self, word: str) -> None:
        run = re.match(r"runs/[\w-]+", word)
        target = self.root / (run[0] if run else word)
        if target.exists() or target.is_symlink() or (run and run[0] in self.outputs):
            return
        if run:
            shutil.copytree(self.theatre.run, target)
        elif re.fullmatch(r"path/to/llama|BASE", word):
            shutil.copytree(self.theatre.base, target)
        elif re.fullmatch(r"packs?/\w+|PACK|pack", word):
            shutil.copytree(self.theatre.run / "blocks", target)
        elif re.fullmatch(r"(expanded|other)/", word):
            shutil.copytree(self.theatre.run / "model", target)
        elif word == "config.json":
            shutil.copy(self.theatre.base / word, target)
            lengthen(target)
