import json
import os
import pickle
import shutil
import subprocess
import sys
import tracemalloc
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_data_tokenizers import real_tokenizer, tiny_bpe
from transformers import ByT5Tokenizer

from deepen.config import TextSet
from deepen.data.build import is_heldout
from deepen.data.corpus import Corpus, prepare_corpus
from deepen.errors import DataError, OutputError

TEXTS = [f"the cat {number} sat on 天地 😀 number {number * 7919}\n" for number in range(200)]


def write_lines(path: Path, texts: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture
def source(tmp_path) -> TextSet:
    return TextSet(path=str(write_lines(tmp_path / "source/texts.jsonl", TEXTS)))


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_bpe()


def stream(corpus: Corpus) -> list[int]:
    return corpus.window(0, corpus.tokens).tolist()[:-1]


def expected_stream(tokenizer, texts: list[str]) -> list[int]:
    return list(
        chain.from_iterable([*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in texts)
    )


def corpora(cache: Path) -> list[str]:
    return sorted(path.name for path in (cache / "corpora").iterdir())


@pytest.mark.parametrize("workers", [1, 2])
def test_the_stream_is_the_documents_joined(tmp_path, source, tokenizer, workers, monkeypatch):
    monkeypatch.setattr("deepen.data.build._BATCH_BYTES", 1500)
    corpus = prepare_corpus(source, tokenizer, cache=tmp_path / "cache", workers=workers)
    assert stream(corpus) == expected_stream(tokenizer, TEXTS)
    assert corpus.documents == len(TEXTS)
    assert corpus.bytes == len("".join(TEXTS).encode())
    assert corpus.heldout_documents == 0
    assert list(corpus.heldout_texts()) == []


def test_a_tokenizer_that_ends_documents_itself_ends_them_once(tmp_path, source):
    tokenizer = ByT5Tokenizer()
    corpus = prepare_corpus(source, tokenizer, cache=tmp_path / "cache")
    assert stream(corpus) == list(chain.from_iterable(tokenizer(text)["input_ids"] for text in TEXTS))
    assert stream(corpus).count(tokenizer.eos_token_id) == len(TEXTS)


@pytest.mark.parametrize("name", ["stories260k", "llama2", "gpt2"])
def test_real_tokenizers_frame_documents_as_they_do(tmp_path, data_dir, name):
    tokenizer = real_tokenizer(name, data_dir)
    text = TextSet(path=str(data_dir / "math/gsm8k-test.jsonl"), template="{question}\n{answer}")
    rows = [json.loads(line) for line in Path(text.path).read_text().splitlines()]
    texts = [f"{row['question']}\n{row['answer']}" for row in rows]
    corpus = prepare_corpus(text, tokenizer, cache=tmp_path)
    assert stream(corpus) == expected_stream(tokenizer, texts)
    if name == "stories260k":
        assert stream(corpus)[0] == tokenizer.bos_token_id


def test_every_kind_of_file_gives_the_same_stream(tmp_path, source, tokenizer):
    pq.write_table(pa.table({"body": TEXTS}), tmp_path / "texts.parquet")
    (tmp_path / "texts.txt").write_text("<|>".join(TEXTS))
    hub = tmp_path / "hub"
    write_lines(hub / "train.jsonl", TEXTS)
    sources = [
        source,
        TextSet(path=str(tmp_path / "texts.parquet"), field="body"),
        TextSet(path=str(tmp_path / "texts.txt"), separator="<|>"),
        TextSet(hub=str(hub)),
    ]
    streams = [stream(prepare_corpus(each, tokenizer, cache=tmp_path / "cache")) for each in sources]
    assert all(each == expected_stream(tokenizer, TEXTS) for each in streams)
    assert len(corpora(tmp_path / "cache")) == 4


def test_ids_are_stored_in_the_smallest_type(tmp_path, source, tokenizer):
    corpus = prepare_corpus(source, tokenizer, cache=tmp_path)
    (file,) = corpus.directory.glob("tokens-*.arrow")
    with pa.memory_map(str(file)) as mapped:
        assert pa.ipc.open_stream(mapped).schema.field("tokens").type == pa.large_list(pa.uint16())


@settings(max_examples=60, deadline=None)
@given(length=st.integers(1, 9000), index=st.integers(0, 2000))
def test_a_window_is_a_cut_of_the_circle(shared_corpus, length, index):
    corpus, tokens = shared_corpus
    positions = (index * length + np.arange(length + 1)) % len(tokens)
    window = corpus.window(index, length)
    assert window.dtype == np.int64
    assert np.array_equal(window, tokens[positions])


@settings(max_examples=20, deadline=None)
@given(length=st.integers(1, 9000))
def test_the_windows_predict_every_token(shared_corpus, length):
    corpus, tokens = shared_corpus
    count = corpus.windows(length)
    assert (count - 1) * length < len(tokens) <= count * length
    predicted = np.concatenate([corpus.window(index, length)[1:] for index in range(count)])
    assert np.array_equal(predicted[: len(tokens)], np.roll(tokens, -1))


@pytest.fixture(scope="module")
def shared_corpus(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("shared")
    path = write_lines(folder / "texts.jsonl", TEXTS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("deepen.data.build._BATCH_BYTES", 700)
        corpus = prepare_corpus(TextSet(path=str(path)), tokenizer, cache=folder / "cache")
    assert len(corpus._chunks) > 10
    return corpus, np.asarray(expected_stream(tokenizer, TEXTS))


def test_the_same_content_elsewhere_is_a_hit(tmp_path, source, tokenizer, monkeypatch):
    cache = tmp_path / "cache"
    first = prepare_corpus(source, tokenizer, cache=cache)
    os.utime(source.path, ns=(1, 1))
    monkeypatch.setattr("deepen.data.corpus.build_corpus", None)  # building again would fail
    assert prepare_corpus(source, tokenizer, cache=cache).digest == first.digest
    elsewhere = shutil.copy(source.path, tmp_path / "other name.jsonl")
    again = prepare_corpus(TextSet(path=str(elsewhere)), tiny_bpe(), cache=cache)
    assert (again.digest, again.directory) == (first.digest, first.directory)


def test_what_changes_the_stream_is_a_miss(tmp_path, source, tokenizer):
    cache = tmp_path / "cache"
    prepare_corpus(source, tokenizer, cache=cache)
    changed = write_lines(tmp_path / "changed.jsonl", [*TEXTS[:-1], TEXTS[-1].replace("cat", "dog")])
    prepare_corpus(TextSet(path=str(changed)), tokenizer, cache=cache)
    prepare_corpus(source, tiny_bpe(vocab_size=300), cache=cache)
    prepare_corpus(source, tokenizer, cache=cache, heldout=0.1)
    prepare_corpus(TextSet(path=source.path, template="{text}!"), tokenizer, cache=cache)
    assert len(corpora(cache)) == 5


def test_a_file_changed_in_place_is_seen(tmp_path, source, tokenizer):
    first = prepare_corpus(source, tokenizer, cache=tmp_path / "cache")
    status = os.stat(source.path)
    write_lines(Path(source.path), [text.replace("cat", "dog") for text in TEXTS])
    os.utime(source.path, ns=(status.st_atime_ns, status.st_mtime_ns))  # same size, same time, and recent
    second = prepare_corpus(source, tokenizer, cache=tmp_path / "cache")
    assert second.digest != first.digest
    assert stream(second) != stream(first)


def test_a_known_file_is_not_hashed_again(tmp_path, source, tokenizer, monkeypatch):
    os.utime(source.path, ns=(10**18, 10**18))
    prepare_corpus(source, tokenizer, cache=tmp_path / "cache")
    monkeypatch.setattr("deepen.data.digests._hash", None)
    prepare_corpus(source, tokenizer, cache=tmp_path / "cache")
    (tmp_path / "cache/digests.json").write_text("{broken")
    with pytest.raises(TypeError):
        prepare_corpus(source, tokenizer, cache=tmp_path / "cache")


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path, source, tokenizer, monkeypatch):
    from deepen.data import sources

    def growing(files, text):
        yield "one"
        with open(files[0], "a") as file:
            file.write('{"text": "late"}\n')

    monkeypatch.setattr(sources, "read_files", growing)
    with pytest.raises(DataError, match=r"texts\.jsonl: changed while it was read"):
        prepare_corpus(source, tokenizer, cache=tmp_path / "cache")
    assert not (tmp_path / "cache/corpora").exists()


def test_the_sides_of_the_split_are_disjoint_and_complete(tmp_path, tokenizer):
    texts = [*TEXTS, *TEXTS[:50]]
    path = write_lines(tmp_path / "a.jsonl", texts)
    corpus = prepare_corpus(TextSet(path=str(path)), tokenizer, cache=tmp_path / "cache", heldout=0.2)
    held = list(corpus.heldout_texts())
    trained = [text for text in texts if text not in set(held)]
    assert held == [text for text in texts if text in set(held)]
    assert len(held) == corpus.heldout_documents > 0
    assert stream(corpus) == expected_stream(tokenizer, trained)
    assert corpus.bytes == len("".join(trained).encode())


def test_the_split_does_not_depend_on_order(tmp_path, tokenizer):
    sides = []
    for name, texts in (("a", TEXTS), ("b", TEXTS[::-1])):
        path = write_lines(tmp_path / f"{name}.jsonl", texts)
        corpus = prepare_corpus(TextSet(path=str(path)), tokenizer, cache=tmp_path / "cache", heldout=0.2)
        sides.append(set(corpus.heldout_texts()))
    assert sides[0] == sides[1]


def test_the_share_held_out_is_the_one_asked_for():
    held = sum(is_heldout(f"document {number}", 0.1) for number in range(20_000))
    assert abs(held - 2000) < 5 * (20_000 * 0.1 * 0.9) ** 0.5
    assert not any(is_heldout(text, 0.0) for text in TEXTS)


@pytest.mark.parametrize(
    ("texts", "heldout", "message"),
    [
        ([], 0.0, "holds no text"),
        (["", " \n"], 0.0, "holds no text"),
        (["one"], 1e-9, "none of 1 documents falls to the held-out side"),
        (["one"], 1 - 1e-9, "all 1 documents fall to the held-out side"),
    ],
)
def test_an_empty_side_is_refused_and_leaves_nothing(tmp_path, tokenizer, texts, heldout, message):
    path = write_lines(tmp_path / "a.jsonl", texts)
    with pytest.raises(DataError, match=message):
        prepare_corpus(TextSet(path=str(path)), tokenizer, cache=tmp_path / "cache", heldout=heldout)
    assert not (tmp_path / "cache/corpora").exists()


def test_a_tokenizer_without_end_of_text_is_refused_first(tmp_path):
    with pytest.raises(DataError, match="no end-of-text token"):
        prepare_corpus(TextSet(path="missing.txt"), tiny_bpe(eos=None), cache=tmp_path)


def test_a_cache_that_cannot_be_written_is_named(tmp_path, source, tokenizer):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="file/cache: cannot hold the cache: Not a directory"):
        prepare_corpus(source, tokenizer, cache=tmp_path / "file/cache")


def test_opening_reads_nothing_into_memory(tmp_path, tokenizer):
    path = write_lines(tmp_path / "long.jsonl", ["the cat sat on the mat, the dog did not " * 20_000] * 3)
    directory = prepare_corpus(TextSet(path=str(path)), tokenizer, cache=tmp_path / "cache").directory
    size = sum(file.stat().st_size for file in directory.iterdir())
    arrow_before = pa.total_allocated_bytes()
    tracemalloc.start()
    corpus = Corpus(directory)
    corpus.window(corpus.tokens // 2, 16)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert size > 500_000
    assert peak < size / 10
    assert pa.total_allocated_bytes() - arrow_before < size / 10


def test_a_damaged_corpus_says_what_to_do(tmp_path, source, tokenizer):
    corpus = prepare_corpus(source, tokenizer, cache=tmp_path / "cache")
    meta = corpus.directory / "corpus.json"
    content = json.loads(meta.read_text())
    for damage, message in (
        (json.dumps(content | {"tokens": 1}), "corpus.json says 1; remove it"),
        (json.dumps(content | {"format_version": 99}), "format_version 99; this deepen reads 1"),
        ("{", "remove the directory"),
    ):
        meta.write_text(damage)
        with pytest.raises(DataError, match=message):
            Corpus(corpus.directory)


def test_an_unfinished_corpus_is_replaced(tmp_path, source, tokenizer):
    corpus = prepare_corpus(source, tokenizer, cache=tmp_path / "cache")
    (corpus.directory / "corpus.json").unlink()
    assert stream(prepare_corpus(source, tokenizer, cache=tmp_path / "cache")) == stream(corpus)


def test_a_corpus_pickles_as_its_place(shared_corpus):
    corpus, tokens = shared_corpus
    pickled = pickle.dumps(corpus)
    assert len(pickled) < 1000
    assert stream(pickle.loads(pickled)) == tokens.tolist()


def test_progress_is_told_in_bytes(tmp_path, source, tokenizer, monkeypatch):
    monkeypatch.setattr("deepen.data.build._BATCH_BYTES", 2000)
    calls = []
    corpus = prepare_corpus(source, tokenizer, cache=tmp_path, progress=lambda *call: calls.append(call))
    reads = [done for stage, done, total in calls if stage == "read" and total is None]
    done = [done for stage, done, total in calls if stage == "tokenise" and total == corpus.bytes]
    assert len(reads) + len(done) == len(calls)
    assert len(reads) > 3
    assert len(done) > 3
    assert reads == sorted(reads)
    assert done == sorted(done)
    assert done[-1] == corpus.bytes


PREPARE = """
import sys
import tracemalloc
from pathlib import Path
from deepen.config import TextSet
from deepen.data.corpus import prepare_corpus
sys.path.insert(0, sys.argv[1])
from test_data_tokenizers import tiny_bpe
for text in (TextSet(path="texts.jsonl"), TextSet(hub="hub"), TextSet(hub="hub", stream=True)):
    prepare_corpus(text, tiny_bpe(), cache=Path("cache"), workers=2)
"""


def test_writes_only_the_cache(tmp_path):
    write_lines(tmp_path / "texts.jsonl", TEXTS)
    write_lines(tmp_path / "hub/train.jsonl", TEXTS)
    (tmp_path / "t").mkdir()
    result = subprocess.run(
        [sys.executable, "-c", PREPARE, str(Path(__file__).parent)],
        cwd=tmp_path,
        env={
            "HOME": str(tmp_path / "home"),
            "TMPDIR": str(tmp_path / "t"),  # short: sockets in it may have 107 characters
            "PATH": os.environ["PATH"],
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    files = [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()]
    assert [name for name in files if not name.startswith("cache/")] == ["texts.jsonl", "hub/train.jsonl"]
    assert len(corpora(tmp_path / "cache")) == 3
    assert not [path for path in (tmp_path / "cache/corpora").rglob("*") if "partial" in path.name]
    assert not list((tmp_path / "cache").rglob("texts.arrow"))
