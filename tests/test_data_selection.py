import json
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_data_corpus import expected_stream, stream, write_lines
from test_data_tokenizers import tiny_bpe

from deepen.config import TextSet
from deepen.data.corpus import prepare_corpus
from deepen.data.duplicates import find_duplicates, signature
from deepen.data.findings import Checks
from deepen.data.selection import select_documents
from deepen.data.words import WordNumbers, collect_runs, runs, split_words
from deepen.errors import DataError

OVERLAP = Checks(ngram=13, overlap="drop", similarity=None, duplicates="report")
REPEATS = Checks(ngram=None, overlap="report", similarity=0.8, duplicates="drop")
BOTH = Checks(ngram=13, overlap="drop", similarity=0.8, duplicates="drop")


def words(seed: int, count: int) -> list[str]:
    return [f"w{number}" for number in np.random.default_rng(seed).integers(0, 50_000, count)]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_bpe()


def corpus_of(folder: Path, texts: list[str], tokenizer, name: str = "texts", **options):
    path = write_lines(folder / f"{name}.jsonl", texts)
    return prepare_corpus(TextSet(path=str(path)), tokenizer, cache=folder / "cache", **options)


def select(folder, corpora, evaluation, tokenizer, checks, **options):
    options = {"most_words": 10**6, "cache": folder / "cache", **options}
    texts = [(name, iter(documents)) for name, documents in evaluation.items()]
    return select_documents(corpora, texts, tokenizer, checks, **options)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from("abc"), max_size=40), st.integers(1, 15))
def test_runs_are_equal_where_words_are(letters, length):
    found = runs(WordNumbers()(letters), length).tolist()
    real = [tuple(letters[i : i + length]) for i in range(len(letters) - length + 1)]
    assert len(found) == len(real)
    assert len(set(zip(found, real, strict=True))) == len(set(found)) == len(set(real))


def test_words():
    assert split_words("The CAT's sat—on x_1, 天地玄!\nÉté") == [
        *("the", "cat", "s", "sat", "on", "x_1", "天", "地", "玄", "été"),
    ]


def textbook_overlap(document: str, evaluation: list[str], n: int) -> bool:
    """Brown et al.: does a document share an n-gram with a text? By sets of tuples."""

    def grams(text):
        found = re.findall(r"\w+", text.lower())
        return {tuple(found[i : i + n]) for i in range(len(found) - n + 1)}

    return bool(grams(document) & set().union(*map(grams, evaluation)))


def test_documents_that_share_a_run_are_dropped(tmp_path, tokenizer):
    exam = [" ".join(words(seed, 60)) for seed in range(5)]
    clean = [" ".join(words(100 + seed, 80)) for seed in range(30)]
    twelve, thirteen = exam[1].split()[20:32], exam[1].split()[20:33]
    texts = [
        *clean[:10],
        " ".join([*words(200, 40), *twelve, *words(201, 40)]),
        " ".join([*words(202, 40), *thirteen, *words(203, 40)]),
        *clean[10:20],
        exam[3].upper().replace(" ", ",\n "),
        *clean[20:],
    ]
    expected = [textbook_overlap(text, exam, 13) for text in texts]
    assert sum(expected) == 2
    corpus = corpus_of(tmp_path, texts, tokenizer)
    (kept,), findings = select(tmp_path, [("texts", corpus)], {"exam": exam}, tokenizer, OVERLAP)
    left = [text for text, drop in zip(texts, expected, strict=True) if not drop]
    assert stream(kept) == expected_stream(tokenizer, left)
    assert kept.documents == len(left)
    assert kept.digest != corpus.digest
    source = findings.sources[0]
    assert (source.all.documents, source.overlapping.documents, source.dropped.documents) == (33, 2, 2)
    assert source.dropped.tokens == corpus.tokens - kept.tokens
    assert source.dropped.bytes == corpus.bytes - kept.bytes == len("".join(set(texts) - set(left)).encode())
    assert source.by_text == {"exam": 2}
    assert [example.document for example in findings.overlaps] == [11, 22]
    assert findings.overlaps[0].words == " ".join(thirteen)
    assert findings.overlaps[1].share > 0.7
    assert "2 share 13 words with an evaluation text (dropped)" in findings.line()


def test_report_only_keeps_everything(tmp_path, tokenizer):
    exam = [" ".join(words(0, 60))]
    corpus = corpus_of(tmp_path, [*exam, " ".join(words(1, 60))], tokenizer)
    checks = Checks(ngram=13, overlap="report", similarity=0.8, duplicates="report")
    (kept,), findings = select(tmp_path, [("texts", corpus)], {"exam": exam}, tokenizer, checks)
    assert kept.directory == corpus.directory
    assert findings.sources[0].overlapping.documents == 1
    assert findings.sources[0].dropped.documents == 0


def test_short_evaluation_documents_are_looked_for_whole(tmp_path, tokenizer):
    nine, seven = " ".join(words(0, 9)), " ".join(words(1, 7))
    texts = [" ".join([*words(2, 30), text, *words(3, 30)]) for text in (nine, seven)]
    corpus = corpus_of(tmp_path, texts, tokenizer)
    exam = {"exam": [nine, seven]}
    (kept,), findings = select(tmp_path, [("texts", corpus)], exam, tokenizer, OVERLAP)
    assert stream(kept) == expected_stream(tokenizer, texts[1:])
    assert findings.overlaps[0].words == nine
    assert findings.evaluation[0].unchecked == 1


def test_heldout_documents_are_evaluation_texts(tmp_path, tokenizer):
    base = [" ".join(words(seed, 60)) for seed in range(60)]
    texts = [text for document in base for text in (document, document + " indeed")]
    corpus = corpus_of(tmp_path, texts, tokenizer, heldout=0.2)
    held = set(corpus.heldout_texts())
    (kept,), findings = select(tmp_path, [("texts", corpus)], {}, tokenizer, OVERLAP)
    left = [text for text in texts if text not in held and not textbook_overlap(text, list(held), 13)]
    assert 0 < len(left) < corpus.documents
    assert stream(kept) == expected_stream(tokenizer, left)
    assert set(kept.heldout_texts()) == held
    assert [text.name for text in findings.evaluation] == ["texts-heldout"]


def test_only_what_is_evaluated_is_looked_for():
    exam = [" ".join(words(seed, 50)) for seed in range(4)]
    found = collect_runs([("exam", iter(exam))], 13, 80)
    assert (found.documents, found.words) == ([2], [100])


def jaccard(one: str, other: str) -> float:
    sets = [
        {tuple(found[i : i + 5]) for i in range(len(found) - 4)} for found in (one.split(), other.split())
    ]
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def edited(text: str, seed: int, changes: int) -> str:
    generator, found = np.random.default_rng(seed), text.split()
    for place in generator.choice(len(found), changes, replace=False):
        found[place] = f"new{generator.integers(10**6)}"
    return " ".join(found)


def test_signatures_estimate_jaccard():
    text = " ".join(words(0, 400))
    for changes in (2, 10, 40, 100):
        other = edited(text, changes, changes)
        one, two = (signature(WordNumbers()(each.split())) for each in (text, other))
        assert abs((one == two).mean() - jaccard(text, other)) < 4 * 0.046


def test_near_duplicates_are_dropped_but_for_the_first(tmp_path, tokenizer):
    texts, copies = [], []
    for seed in range(40):
        text = " ".join(words(seed, 300))
        texts.append(text)
        if seed % 4 == 0:
            copies.append(edited(text, seed, 3))
    different = [edited(texts[seed], seed, 60) for seed in (1, 2, 3)]
    assert all(jaccard(texts[seed * 4], copy) > 0.87 for seed, copy in enumerate(copies))
    assert all(jaccard(texts[seed + 1], other) < 0.5 for seed, other in enumerate(different))
    first = corpus_of(tmp_path, [*texts, *different], tokenizer, "first")
    second = corpus_of(tmp_path, [*copies, texts[5], "an unrelated text"], tokenizer, "second")
    kept, findings = select(tmp_path, [("first", first), ("second", second)], {}, tokenizer, REPEATS)
    assert kept[0].directory == first.directory
    assert stream(kept[1]) == expected_stream(tokenizer, ["an unrelated text"])
    assert [source.duplicates.documents for source in findings.sources] == [0, 11]
    example = findings.repeats[-1]
    assert (example.of_source, example.of_document, example.similarity) == ("first", 5, 1.0)
    assert texts[5].startswith(example.beginning[:20])


def test_clusters_are_those_of_all_pairs():
    generator = np.random.default_rng(3)
    signatures = generator.integers(0, 2**32, (300, 120), dtype=np.uint32)
    for document in range(100, 300):
        of = int(generator.integers(0, 100))
        share = generator.choice([0.3, 0.95])
        copied = generator.random(120) < share
        signatures[document, copied] = signatures[of, copied]
    alike = (signatures[:, None] == signatures[None]).mean(axis=2) >= 0.8
    expected = list(range(300))
    for one in range(300):  # by brute force, to the end
        for other in np.flatnonzero(alike[one]).tolist():
            low, high = sorted((expected[one], expected[other]))
            expected = [low if each == high else each for each in expected]
    assert find_duplicates(signatures, 0.8).tolist() == expected
    assert len(set(expected)) < 300


def test_what_was_found_is_remembered_and_follows_the_texts(tmp_path, tokenizer, monkeypatch):
    exam = [" ".join(words(0, 60))]
    corpus = corpus_of(tmp_path, [*exam, " ".join(words(1, 60)), " ".join(words(2, 60))], tokenizer)
    pair = [("texts", corpus)]
    (first,), findings = select(tmp_path, pair, {"exam": exam}, tokenizer, BOTH)
    monkeypatch.setattr("deepen.data.selection.scan_documents", None)  # looking again would fail
    (again,), same = select(tmp_path, pair, {"exam": exam}, tokenizer, BOTH)
    assert (again.digest, same) == (first.digest, findings)
    monkeypatch.undo()
    (other,), _ = select(tmp_path, pair, {"exam": [" ".join(words(1, 60))]}, tokenizer, BOTH)
    assert other.digest not in (first.digest, corpus.digest)
    report = next((tmp_path / "cache/selections").glob("*/report.json"))
    assert json.loads(report.read_text())["ngram"] == 13
    assert not list((tmp_path / "cache/selections").glob("*/scan*"))


def test_workers_find_the_same(tmp_path, tokenizer):
    exam = [" ".join(words(0, 60))]
    texts = [" ".join(words(seed % 90, 60)) for seed in range(150)]
    found = []
    for workers in (1, 2):
        corpus = corpus_of(tmp_path / str(workers), texts, tokenizer)
        options = {"workers": workers}
        found.append(
            select(tmp_path / str(workers), [("t", corpus)], {"e": exam}, tokenizer, BOTH, **options)
        )
    assert found[0][1] == found[1][1]
    assert found[0][0][0].digest == found[1][0][0].digest
    assert found[0][1].sources[0].duplicates.documents == 60


def test_a_source_of_nothing_but_overlap_is_refused(tmp_path, tokenizer):
    exam = [" ".join(words(0, 60))]
    corpus = corpus_of(tmp_path, exam, tokenizer)
    with pytest.raises(DataError, match=r"texts: every document overlaps.*report\.json"):
        select(tmp_path, [("texts", corpus)], {"exam": exam}, tokenizer, OVERLAP)
