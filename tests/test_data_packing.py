import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_data_corpus import write_lines
from test_data_tokenizers import tiny_bpe

from deepen.config import TextSet
from deepen.data.batches import Mixture
from deepen.data.bins import best_fit_bins
from deepen.data.corpus import prepare_corpus
from deepen.data.packing import open_windows

LENGTH = 48


def naive_best_fit(sizes: list[int], capacity: int) -> list[int]:
    """The textbook's loop, item by item."""
    room, placed = [], []
    for size in sizes:
        fits = [(left, -number) for number, left in enumerate(room) if left >= size]
        if fits:
            number = -min(fits, key=lambda fit: fit[0])[1]
        else:
            number = len(room)
            room.append(capacity)
        room[number] -= size
        placed.append(number)
    return placed


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=150), st.integers(30, 40))
def test_bins_are_those_of_best_fit_decreasing(sizes, capacity):
    sizes = sorted(sizes, reverse=True)
    bins, count = best_fit_bins(np.asarray(sizes), capacity)
    expected = naive_best_fit(sizes, capacity)

    def fills(placed):  # which of two equally tight bins is taken does not change how full bins get
        return sorted(np.bincount(placed, weights=sizes).tolist())

    assert fills(bins) == fills(expected)
    assert count == len(set(expected)) == bins.max() + 1


def test_a_million_documents_are_packed_in_seconds_and_arrays():
    generator = np.random.default_rng(0)
    sizes = np.sort(np.minimum(generator.lognormal(6, 1.2, 10**6).astype(np.int64) + 1, 4097))[::-1]
    bins, count = best_fit_bins(sizes, 4097)
    held = np.bincount(bins, weights=sizes)
    assert held.max() <= 4097
    assert len(held) == count
    assert count * 4097 < sizes.sum() * 1.001


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Documents of 1 to 300 ids, every one of which says which document it is of and where it stands."""
    folder = tmp_path_factory.mktemp("packing")
    generator = np.random.default_rng(5)
    texts = [
        " ".join(f"{number}:{place}" for place in range(length))
        for number, length in enumerate(generator.integers(1, 60, 150).tolist())
    ]
    texts += [f"{number}" for number in range(10)]
    path = write_lines(folder / "texts.jsonl", texts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("deepen.data.build._BATCH_BYTES", 2000)
        return prepare_corpus(TextSet(path=str(path)), tiny_bpe(), cache=folder / "cache")


def documents_of(corpus) -> list[list[int]]:
    ends = [0, *corpus.document_ends.tolist()]
    return [corpus.read(begin, end - begin).tolist() for begin, end in itertools.pairwise(ends)]


@pytest.mark.parametrize("masks", [True, False])
@pytest.mark.parametrize("length", [7, LENGTH, 500])
def test_best_fit_predicts_every_id_but_the_first_of_a_document_once(corpus, length, masks):
    windows = open_windows(corpus, length, "best_fit", document_masks=masks)
    predicted = Counter()
    for index in range(len(windows)):
        window = windows[index]
        predicted.update(
            zip(
                window.tokens[:-1][window.trained].tolist(),
                window.tokens[1:][window.trained].tolist(),
                strict=True,
            )
        )
    pairs = Counter()
    for document in documents_of(corpus):
        pairs.update(itertools.pairwise(document))
    extra = predicted - pairs
    assert not pairs - predicted
    counts = windows.counts()
    assert predicted.total() == counts.trained
    assert masks <= (not extra)
    assert {pair[0] for pair in extra} <= {documents_of(corpus)[0][-1]}  # a first id follows an end of text


def test_best_fit_keeps_documents_whole(corpus):
    windows = open_windows(corpus, LENGTH, "best_fit", document_masks=True)
    seen = Counter()
    for index in range(len(windows)):
        window = windows[index]
        bounds = [*windows.starts(index).tolist(), LENGTH + 1]
        seen.update(tuple(window.tokens[a:b].tolist()) for a, b in itertools.pairwise(bounds))
    documents = documents_of(corpus)
    whole = [document for document in documents if len(document) <= LENGTH + 1]
    assert not Counter(map(tuple, whole)) - seen
    assert windows.counts().cut == len(documents) - len(whole) > 10
    assert windows.counts().documents == len(documents)


@pytest.mark.parametrize("masks", [True, False])
@pytest.mark.parametrize("packing", ["stream", "best_fit"])
@pytest.mark.parametrize("length", [7, LENGTH, 100_000])
def test_counts_are_those_of_the_windows(corpus, packing, masks, length):
    windows = open_windows(corpus, length, packing, document_masks=masks)
    cut = [windows[index] for index in range(len(windows))]
    counts = windows.counts()
    trained = [length if window.trained is None else int(window.trained.sum()) for window in cut]
    assert (counts.windows, counts.places) == (len(cut), length * len(cut))
    assert counts.trained == sum(trained)
    if packing == "best_fit":
        sizes = [len(document) for document in documents_of(corpus)]
        shared = sum(max(0, -(-(size - 1) // length) - 1) for size in sizes)
        assert counts.padding == (length + 1) * len(cut) - sum(sizes) - shared
    else:
        assert counts.padding == 0
        ends = corpus.document_ends
        begins = np.concatenate([[0], ends[:-1]])
        torn = sum(
            not any(i * length <= b and e <= i * length + length + 1 for i in range(len(cut)))
            for b, e in zip(begins.tolist(), ends.tolist(), strict=True)
        )
        assert counts.cut == torn


def test_a_stream_with_masks_restarts_at_every_document(corpus):
    windows = open_windows(corpus, LENGTH, "stream", document_masks=True)
    plain = open_windows(corpus, LENGTH, "stream", document_masks=False)
    begins = {0, *corpus.document_ends[:-1].tolist()}
    for index in range(len(windows)):
        window = windows[index]
        assert np.array_equal(window.tokens, plain[index].tokens)
        assert plain[index].positions is plain[index].trained is None
        place = 0
        for offset in range(LENGTH):
            at = (index * LENGTH + offset) % corpus.tokens
            place = 0 if offset == 0 or at in begins else place + 1
            assert window.positions[offset] == place
            assert window.trained[offset] == ((at + 1) % corpus.tokens not in begins)


def test_batches_of_both_packings_are_pure_functions_of_the_step(corpus):
    pairs = [(corpus, 1.0)]
    for packing, masks in (("stream", True), ("best_fit", False), ("best_fit", True)):
        options = {"packing": packing, "document_masks": masks}
        mixture = Mixture(pairs, LENGTH, 3, **options)
        forward = [mixture.batch(step, 4) for step in range(30)]
        again = Mixture(pairs, LENGTH, 3, **options)
        for step in (29, 0, 11):
            batch = again.batch(step, 4)
            assert np.array_equal(batch.tokens, forward[step].tokens)
            assert np.array_equal(batch.trained, forward[step].trained)
            assert (batch.positions is not None) == masks
            assert np.array_equal(batch.trained_tokens, batch.trained.sum(axis=1))
        assert mixture.digest != Mixture(pairs, LENGTH, 3).digest
        epoch = mixture.batch(0, mixture.windows_per_epoch)
        assert epoch.trained.sum() == mixture.packing_counts()[0].trained


def test_epochs_are_counted_in_whole_steps(corpus):
    mixture = Mixture([(corpus, 1.0)], LENGTH, 3)
    windows = mixture.windows_per_epoch
    assert mixture.steps(1, windows) == 1
    assert mixture.steps(3, 4) == -(-3 * windows // 4)
    assert mixture.steps(0.1, 10**9) == 1
    assert Mixture([(corpus, 1.0)], LENGTH, 3).batch(0, 2).trained_tokens.tolist() == [LENGTH, LENGTH]
