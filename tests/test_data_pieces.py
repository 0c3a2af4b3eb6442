import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from test_data_corpus import TEXTS, corpora, expected_stream, stream, write_lines
from test_data_tokenizers import tiny_bpe

from deepen.config import TextSet
from deepen.data.corpus import prepare_corpus, prepare_piece
from deepen.data.pieces import Piece, _owners, parse_piece
from deepen.errors import DataError, RecipeError


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_bpe()


@pytest.fixture
def small_units(monkeypatch):
    monkeypatch.setattr("deepen.data.build._BATCH_BYTES", 500)
    monkeypatch.setattr("deepen.data.sources._PART_BYTES", 1500)


def one_file(folder: Path) -> TextSet:
    return TextSet(path=str(write_lines(folder / "texts.jsonl", TEXTS)))


def many_files(folder: Path) -> TextSet:
    for number in range(20):
        write_lines(folder / f"many/{number:02}.jsonl", TEXTS[number * 10 : number * 10 + 10])
    return TextSet(path=str(folder / "many"))


def uneven_files(folder: Path) -> TextSet:
    for number, (begin, end) in enumerate([(0, 5), (5, 170), (170, 171), (171, 200)]):
        write_lines(folder / f"uneven/{number}.jsonl", TEXTS[begin:end])
    return TextSet(path=str(folder / "uneven"))


def hub_dataset(folder: Path) -> TextSet:
    for number in range(3):
        write_lines(folder / f"hub/train-{number}.jsonl", TEXTS[number * 70 : number * 70 + 70])
    return TextSet(hub=str(folder / "hub"))


def hub_stream(folder: Path) -> TextSet:
    return hub_dataset(folder).model_copy(update={"stream": True})


SOURCES = [one_file, many_files, uneven_files, hub_dataset, hub_stream]


@pytest.mark.parametrize("count", [1, 3, 7])
@pytest.mark.parametrize("make", SOURCES)
def test_pieces_in_any_order_join_to_the_whole(tmp_path, tokenizer, make, count, small_units):
    text = make(tmp_path)
    whole = prepare_corpus(text, tokenizer, cache=tmp_path / "whole", heldout=0.1)
    numbers = list(range(1, count + 1))
    random.Random(count).shuffle(numbers)
    cache = tmp_path / "cache"
    made = [
        prepare_piece(text, tokenizer, Piece(number, count), cache=cache, heldout=0.1) for number in numbers
    ]
    assert made[:-1] == [None] * (count - 1)
    joined = made[-1]
    assert stream(joined) == stream(whole)
    assert joined.digest == whole.digest
    assert joined.document_ends.tolist() == whole.document_ends.tolist()
    assert list(joined.heldout_texts()) == list(whole.heldout_texts())
    kept = [
        dict(json.loads((each.directory / "corpus.json").read_text()).items()) for each in (joined, whole)
    ]
    assert kept[0] == kept[1]
    assert not list((cache / "pieces").iterdir())
    assert prepare_corpus(text, tokenizer, cache=cache, heldout=0.1).directory == joined.directory


def test_the_ends_of_documents(tmp_path, tokenizer, small_units):
    corpus = prepare_corpus(one_file(tmp_path), tokenizer, cache=tmp_path / "cache")
    lengths = [len(tokenizer(text)["input_ids"]) + 1 for text in TEXTS]
    assert corpus.document_ends.tolist() == np.cumsum(lengths).tolist()


def test_a_piece_reads_only_its_files(tmp_path, tokenizer, small_units, monkeypatch):
    from deepen.data import sources

    text, read = many_files(tmp_path), []
    real = sources.read_files
    monkeypatch.setattr(sources, "read_files", lambda files, text: read.extend(files) or real(files, text))
    for number in (1, 2, 3, 4):
        before = len(read)
        prepare_piece(text, tokenizer, Piece(number, 4), cache=tmp_path / "cache")
        assert 3 <= len(read) - before <= 7
    assert sorted(path.name for path in read) == [f"{number:02}.jsonl" for number in range(20)]


def test_parts_are_dealt_out_evenly():
    sizes = [random.Random(7).randint(1, 100) for _ in range(200)]
    owners = _owners(sizes, 8)
    loads = np.bincount(owners, weights=sizes, minlength=9)[1:]
    assert loads.max() <= loads.min() + 100
    assert _owners([1000, 1, 1], 2) == [None, 1, 2]


def test_an_empty_source_is_refused_when_the_last_piece_is_there(tmp_path, tokenizer):
    text = TextSet(path=str(write_lines(tmp_path / "a.jsonl", [" "])))
    assert prepare_piece(text, tokenizer, Piece(1, 2), cache=tmp_path / "cache") is None
    with pytest.raises(DataError, match="holds no text"):
        prepare_piece(text, tokenizer, Piece(2, 2), cache=tmp_path / "cache")
    assert not (tmp_path / "cache/corpora").exists()


@pytest.mark.parametrize("wrong", ["0/4", "5/4", "4", "a/b", "1/0", "-1/4", ""])
def test_a_wrong_piece_is_refused(wrong):
    with pytest.raises(RecipeError, match="counted 1/n to n/n"):
        parse_piece(wrong)
    assert parse_piece("4/4") == Piece(4, 4)


SLOW_PIECE = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_data_tokenizers import tiny_bpe
from deepen.config import TextSet
from deepen.data import build, corpus
from deepen.data.pieces import Piece
build._BATCH_BYTES = 500
real = build._tokenise_batch
def slowly(table, **arguments):
    print("at work", flush=True)
    time.sleep(0.5)
    return real(table, **arguments)
build._tokenise_batch = slowly
corpus.prepare_piece(TextSet(path="texts.jsonl"), tiny_bpe(), Piece(1, 2), cache=Path("cache"))
"""


def test_a_killed_piece_leaves_nothing_half(tmp_path, tokenizer, small_units):
    text = one_file(tmp_path)
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW_PIECE, str(Path(__file__).parent)],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        env={"PATH": os.environ["PATH"], "HOME": str(tmp_path / "home")},
    )
    assert process.stdout.readline() == b"at work\n"
    time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    cache = tmp_path / "cache"
    assert not list(cache.glob("pieces/*/1"))
    assert prepare_piece(text, tokenizer, Piece(2, 2), cache=cache) is None
    joined = prepare_piece(text, tokenizer, Piece(1, 2), cache=cache)
    assert stream(joined) == expected_stream(tokenizer, TEXTS)
    assert not [path for path in cache.rglob("*") if "partial" in path.name]
    assert len(corpora(cache)) == 1
