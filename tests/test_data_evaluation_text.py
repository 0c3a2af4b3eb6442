import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_data_tokenizers import real_tokenizer, tiny_bpe
from tokenizers.processors import TemplateProcessing
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from deepen.data.evaluation_text import EvaluationText, load_evaluation_text
from deepen.errors import DataError

MIXED = "naïve 😀👍🏽 天地玄黄 — the cat sat\r\n\t on  the mat. 👨‍👩‍👧‍👦 Ünïcödé ﬁ ½ \u0301e\n" * 5


def load(documents, tokenizer, length=8, max_tokens=10**9) -> EvaluationText:
    return load_evaluation_text(
        documents, tokenizer, task="text", role="general", sequence_length=length, max_tokens=max_tokens
    )


def check_cut(text: EvaluationText, documents: list[str], tokenizer, length: int) -> None:
    """Every token but a document's first is predicted once, from its own document; bytes add up."""
    for number, document in enumerate(documents):
        windows = [w for w, d in zip(text.windows, text.document, strict=True) if d == number]
        ids = tokenizer(document)["input_ids"]
        predicted = np.concatenate([window[1:] for window in windows]).tolist() if windows else []
        assert predicted == ids[1:]
        assert [int(window[0]) for window in windows] == ids[:-1:length]
        assert all(len(window) - 1 == length for window in windows[:-1])
        assert all(2 <= len(window) <= length + 1 for window in windows)
        sizes = [size for size, d in zip(text.bytes, text.document, strict=True) if d == number]
        assert all(size >= 0 for size in sizes)
        if windows:
            assert sum(sizes) == len(document.encode())
    assert len(text.windows) == len(text.document) == len(text.bytes)
    assert text.tokens == sum(max(0, len(tokenizer(document)["input_ids"]) - 1) for document in documents)


@pytest.mark.parametrize("length", [1, 2, 5, 8, 100_000])
def test_a_small_bpe_is_cut_exactly(length):
    documents = [MIXED, "a", "the cat", "😀", "plain"]
    tokenizer = tiny_bpe()
    check_cut(load(documents, tokenizer, length), documents, tokenizer, length)


@settings(max_examples=80, deadline=None)
@given(
    documents=st.lists(
        st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40), min_size=1, max_size=4
    ),
    length=st.integers(1, 9),
)
def test_any_text_is_cut_exactly(documents, length):
    tokenizer = tiny_bpe_shared()
    documents = [*documents, "two tokens at least"]
    check_cut(load(documents, tokenizer, length), documents, tokenizer, length)


_SHARED: list[PreTrainedTokenizerFast] = []


def tiny_bpe_shared() -> PreTrainedTokenizerFast:
    if not _SHARED:
        _SHARED.append(tiny_bpe())
    return _SHARED[0]


@pytest.mark.parametrize("name", ["stories260k", "llama2", "gpt2"])
@pytest.mark.parametrize("length", [1, 3, 64])
def test_real_tokenizers_are_cut_exactly(data_dir, name, length):
    tokenizer = real_tokenizer(name, data_dir)
    story = (data_dir / "text/tinystories.txt").read_text()[:3000]
    documents = [MIXED, story, "天", "😀😀", " leading", "trailing \n", "</s> <|endoftext|> in words"]
    check_cut(load(documents, tokenizer, length), documents, tokenizer, length)


def test_the_bytes_are_those_of_the_tokens_predicted():
    tokenizer = tiny_bpe_shared()
    document = "the cat sat on the mat, the dog did not"
    text = load([document], tokenizer, length=3)
    pieces = [tokenizer.decode(window[1:].tolist()) for window in text.windows]
    first = tokenizer.decode(text.windows[0][:1].tolist())
    assert [len(piece) for piece in [first + pieces[0], *pieces[1:]]] == text.bytes


@pytest.mark.parametrize("length", [1, 2, 3])
def test_special_tokens_of_the_frame_predict_no_text(length):
    tokenizer = tiny_bpe()
    frame = TemplateProcessing(single="<eos> $A <eos>", special_tokens=[("<eos>", tokenizer.eos_token_id)])
    tokenizer.backend_tokenizer.post_processor = frame
    documents = [MIXED, "the cat", "a"]
    text = load(documents, tokenizer, length)
    check_cut(text, documents, tokenizer, length)
    if length == 1:
        assert text.bytes[-2:] == [1, 0]  # "a", then the end of it


def test_a_slow_tokenizer_shares_the_bytes_out_evenly():
    tokenizer = ByT5Tokenizer()
    documents = [MIXED, "plain text"]
    text = load(documents, tokenizer, length=4)
    check_cut(text, documents, tokenizer, 4)
    whole = [size for size, window in zip(text.bytes, text.windows, strict=True) if len(window) == 5]
    assert max(whole) - min(whole) <= 1


@pytest.mark.parametrize("max_tokens", [1, 8, 9, 100, 333])
def test_reading_stops_with_the_window_that_reaches_the_limit(max_tokens):
    tokenizer = tiny_bpe_shared()
    documents = [MIXED, "the cat sat on the mat " * 50]
    whole = load(documents, tokenizer)
    part = load(documents, tokenizer, max_tokens=max_tokens)
    count = len(part.windows)
    assert part.tokens >= max_tokens > part.tokens - (len(part.windows[-1]) - 1)
    assert [window.tolist() for window in part.windows] == [
        window.tolist() for window in whole.windows[:count]
    ]
    assert part.bytes == whole.bytes[:count]
    assert part.document == whole.document[:count]


def test_documents_after_the_limit_are_not_asked_for():
    def documents():
        yield "the cat sat on the mat " * 10
        raise AssertionError("read too far")

    assert load(documents(), tiny_bpe_shared(), max_tokens=20).tokens == 24


def test_a_huge_document_is_read_no_further_than_needed(monkeypatch):
    tokenizer = tiny_bpe_shared()
    document = "".join(f"{number} the cat sat on 天地 the mat\n" for number in range(20_000))
    whole = load([document], tokenizer)
    read = []
    original = type(tokenizer).__call__
    monkeypatch.setattr(
        type(tokenizer),
        "__call__",
        lambda self, text, **kw: (read.append(len(text)), original(self, text, **kw))[1],
    )
    part = load([document], tokenizer, max_tokens=500)
    assert sum(read) < len(document) / 10
    assert [window.tolist() for window in part.windows] == [
        w.tolist() for w in whole.windows[: len(part.windows)]
    ]
    assert part.bytes == whole.bytes[: len(part.bytes)]


def test_a_document_of_few_tokens_a_character_is_still_read_to_the_limit():
    tokenizer = tiny_bpe()
    tokenizer.add_tokens(["wide" * 100])
    document = "wide" * 100 * 3000
    text = load([document], tokenizer, max_tokens=2000)
    assert text.tokens == 2000
    assert sum(text.bytes) == 400 * 2001


def test_the_digest_is_of_ids_and_cut():
    tokenizer = tiny_bpe_shared()
    base = load(["the cat sat", "on the mat"], tokenizer)
    assert base.digest == load(["the cat sat", "on the mat"], tokenizer).digest
    others = [
        load(["the cat sat", "on the dog"], tokenizer),
        load(["the cat sat", "on the mat"], tokenizer, length=1),
        load(["on the mat", "the cat sat"], tokenizer),
    ]
    assert len({base.digest, *(other.digest for other in others)}) == 4


@pytest.mark.parametrize("documents", [[], [""], ["a", "b"]])
def test_nothing_to_predict_is_refused(documents):
    with pytest.raises(DataError, match="text: nothing to evaluate"):
        load(documents, tiny_bpe_shared())


def test_a_book_is_one_document_of_many_windows(data_dir):
    tokenizer = real_tokenizer("stories260k", data_dir)
    book = (data_dir / "text/tinystories.txt").read_text()[:200_000]
    text = load([book], tokenizer, length=256, max_tokens=20_000)
    assert len(text.windows) == 79
    assert set(text.document) == {0}
    assert text.windows[0][0] == tokenizer.bos_token_id
    ids = tokenizer(book)["input_ids"]
    assert np.concatenate([window[1:] for window in text.windows]).tolist() == ids[1 : 79 * 256 + 1]


def test_records_are_documents(data_dir):
    lines = (data_dir / "math/gsm8k-test.jsonl").read_text().splitlines()
    rows = [json.loads(line)["question"] for line in lines[:40]]
    tokenizer = real_tokenizer("llama2", data_dir)
    check_cut(load(rows, tokenizer, 16), rows, tokenizer, 16)
