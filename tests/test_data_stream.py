"""Datasets of the hub read as they arrive; the hub is a stand-in, `datasets` is real."""

from types import SimpleNamespace

import datasets
import pytest
from test_data_corpus import TEXTS, corpora, expected_stream, stream, write_lines
from test_data_tokenizers import tiny_bpe

from deepen.config import TextSet, parse_recipe
from deepen.data.corpus import prepare_corpus, prepare_piece
from deepen.data.documents import read_documents
from deepen.data.pieces import Piece
from deepen.errors import DataError, RecipeError


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_bpe()


class Hub:
    """A dataset of four files at a commit, whose connection may break."""

    def __init__(self) -> None:
        self.commit, self.breaks_at, self.opened, self.read = "c0ffee", None, [], 0

    def builder(self, name, subset=None, *, revision=None, cache_dir=None):
        self.opened.append((name, subset, revision))
        commit = revision or self.commit
        files = [f"hf://datasets/{name}@{commit}/train-{number}.jsonl" for number in range(4)]

        def rows(numbers):
            for number in numbers:
                for text in TEXTS[number * 50 : number * 50 + 50]:
                    if self.read == self.breaks_at:
                        raise ConnectionError("the line is dead")
                    self.read += 1
                    yield {"text": text, "number": number}

        def streaming(split):
            if split not in ("train",):
                raise ValueError(f"Bad split: {split}. Available splits: ['train']")
            return datasets.IterableDataset.from_generator(rows, gen_kwargs={"numbers": list(range(4))})

        return SimpleNamespace(
            config=SimpleNamespace(data_files={"train": files}), as_streaming_dataset=streaming
        )


@pytest.fixture
def hub(monkeypatch):
    hub = Hub()
    monkeypatch.setattr(datasets, "load_dataset_builder", hub.builder)
    return hub


def source(**options) -> TextSet:
    return TextSet(**{"hub": "owner/texts", "stream": True, **options})


def test_a_stream_becomes_the_corpus_and_is_read_once(tmp_path, hub, tokenizer):
    corpus = prepare_corpus(source(), tokenizer, cache=tmp_path)
    assert stream(corpus) == expected_stream(tokenizer, TEXTS)
    assert hub.read == len(TEXTS)
    assert prepare_corpus(source(), tokenizer, cache=tmp_path).digest == corpus.digest
    assert hub.read == len(TEXTS)


def test_another_commit_is_another_corpus(tmp_path, hub, tokenizer):
    first = prepare_corpus(source(), tokenizer, cache=tmp_path)
    assert prepare_corpus(source(revision="c0ffee"), tokenizer, cache=tmp_path).digest == first.digest
    hub.commit = "decade"
    assert prepare_corpus(source(), tokenizer, cache=tmp_path).digest != first.digest
    assert hub.opened[1] == ("owner/texts", None, "c0ffee")


def test_a_broken_stream_leaves_nothing_and_starts_again(tmp_path, hub, tokenizer):
    hub.breaks_at = 120
    with pytest.raises(
        DataError, match=r"owner/texts file 3: the stream broke at record 21: the line is dead"
    ):
        prepare_corpus(source(), tokenizer, cache=tmp_path)
    assert not (tmp_path / "corpora").exists()
    hub.breaks_at = None
    assert stream(prepare_corpus(source(), tokenizer, cache=tmp_path)) == expected_stream(tokenizer, TEXTS)


def test_pieces_already_there_are_not_streamed_again(tmp_path, hub, tokenizer):
    prepare_piece(source(), tokenizer, Piece(1, 4), cache=tmp_path)
    prepare_piece(source(), tokenizer, Piece(2, 4), cache=tmp_path)
    assert hub.read == 100
    hub.breaks_at = 120
    with pytest.raises(DataError):
        prepare_piece(source(), tokenizer, Piece(3, 4), cache=tmp_path)
    hub.breaks_at = None
    prepare_piece(source(), tokenizer, Piece(1, 4), cache=tmp_path)
    assert hub.read == 120
    prepare_piece(source(), tokenizer, Piece(3, 4), cache=tmp_path)
    joined = prepare_piece(source(), tokenizer, Piece(4, 4), cache=tmp_path)
    assert hub.read == 220
    assert stream(joined) == expected_stream(tokenizer, TEXTS)
    assert len(corpora(tmp_path)) == 1


def test_an_evaluation_text_is_read_no_further_than_asked(hub):
    documents = read_documents(source())
    assert [next(documents) for _ in range(3)] == TEXTS[:3]
    assert hub.read <= 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"field": "body"}, r"record 1: no field 'body'; found text, number"),
        ({"split": "dev"}, "Bad split: dev"),
    ],
)
def test_what_the_dataset_lacks_is_named(tmp_path, hub, tokenizer, options, message):
    with pytest.raises(DataError, match=message):
        prepare_corpus(source(**options), tokenizer, cache=tmp_path)
    assert not (tmp_path / "corpora").exists()


def test_a_local_dataset_is_streamed_and_known_by_its_bytes(tmp_path, tokenizer):
    for number in range(4):
        write_lines(tmp_path / f"set/train-{number}.jsonl", TEXTS[number * 50 : number * 50 + 50])
    text = source(hub=str(tmp_path / "set"))
    first = prepare_corpus(text, tokenizer, cache=tmp_path / "cache")
    assert stream(first) == expected_stream(tokenizer, TEXTS)
    write_lines(tmp_path / "set/train-1.jsonl", ["changed"])
    assert prepare_corpus(text, tokenizer, cache=tmp_path / "cache").digest != first.digest


def test_stream_is_for_the_hub():
    recipe = """
base: base
output: run
data: {sequence_length: 8, sources: [{path: a.txt, stream: true}]}
train: {method: full, tokens: 8, batch_tokens: 8, learning_rate: 1}
"""
    with pytest.raises(RecipeError, match=r"data\.sources\.0: stream is for hub datasets"):
        parse_recipe(recipe)
