import os
import subprocess
import sys
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from test_data_corpus import write_lines
from test_data_tokenizers import tiny_bpe

from deepen.config import TextSet
from deepen.data.batches import Mixture
from deepen.data.corpus import Corpus, prepare_corpus
from deepen.data.permutation import permute

LENGTH = 16


@pytest.fixture(scope="module")
def corpora(tmp_path_factory) -> list[Corpus]:
    folder = tmp_path_factory.mktemp("corpora")
    tokenizer = tiny_bpe()
    made = []
    for name, count in (("a", 90), ("b", 30), ("c", 1)):
        path = write_lines(
            folder / f"{name}.jsonl", [f"{name} {i} the mat sat {i * i}" for i in range(count)]
        )
        made.append(prepare_corpus(TextSet(path=str(path)), tokenizer, cache=folder / "cache"))
    return made


@settings(max_examples=100, deadline=None)
@given(size=st.integers(1, 3000), key=st.text(max_size=8))
def test_permute_is_a_bijection(size, key):
    assert sorted(permute(np.arange(size), size, key).tolist()) == list(range(size))


@settings(max_examples=50, deadline=None)
@given(size=st.integers(1, 10**15), key=st.text(max_size=8), data=st.data())
def test_permute_of_any_size_is_injective_and_elementwise(size, key, data):
    positions = np.array(data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=50, unique=True)))
    image = permute(positions, size, key)
    assert len(set(image.tolist())) == len(positions)
    assert image.min() >= 0
    assert image.max() < size
    assert [permute(positions[i : i + 1], size, key)[0] for i in range(len(positions))] == image.tolist()


def test_permute_depends_on_the_key_and_looks_random():
    size = 4096
    orders = [permute(np.arange(size), size, f"0/{epoch}") for epoch in range(20)]
    fixed = [int((order == np.arange(size)).sum()) for order in orders]
    assert sum(fixed) < 50  # one an order is expected
    for first, second in pairwise(orders):
        assert abs(stats.spearmanr(first, second).statistic) < 0.08
        assert abs(stats.spearmanr(first, np.arange(size)).statistic) < 0.08
    steps = np.concatenate([np.diff(order) % size for order in orders])
    counts = np.histogram(steps, bins=64, range=(0, size))[0]
    assert stats.chisquare(counts).pvalue > 1e-4


def test_permute_takes_no_start_up_time():
    begin = time.process_time()
    permute(np.arange(64), 10**12, "key")
    assert time.process_time() - begin < 0.1


def drawn(mixture: Mixture, corpora: list[Corpus], first: int, count: int) -> Counter:
    """Which (source, window) the samples first … first + count are, recognised by their tokens."""
    known = {
        (number, corpus.window(index, LENGTH).tobytes()): index
        for number, corpus in enumerate(corpora)
        for index in range(corpus.windows(LENGTH))
    }
    assert len(known) == sum(corpus.windows(LENGTH) for corpus in corpora)
    seen: Counter = Counter()
    for sample in range(first, first + count):
        batch = mixture.batch(sample, 1)
        source = int(batch.sources[0])
        seen[source, known[source, batch.tokens[0].tobytes()]] += 1
    return seen


def test_an_epoch_of_weight_one_holds_every_window_once(corpora):
    mixture = Mixture([(corpus, 1.0) for corpus in corpora], LENGTH, seed=3)
    size = mixture.windows_per_epoch
    assert size == sum(corpus.windows(LENGTH) for corpus in corpora)
    for epoch in range(2):
        seen = drawn(mixture, corpora, epoch * size, size)
        assert set(seen.values()) == {1}
        assert len(seen) == size


@pytest.mark.parametrize(
    ("epochs", "windows"), [(1, 1), (1, 7), (0.5, 4), (3, 8), (2.25, 5), (0.1, 3), (1e-9, 4)]
)
def test_the_steps_of_some_epochs_are_the_fewest_that_hold_them(corpora, epochs, windows):
    mixture = Mixture([(corpora[0], 1.5), (corpora[1], 0.7)], LENGTH, seed=0)
    assert mixture.sizes == tuple(corpus.windows(LENGTH) for corpus in corpora[:2])
    steps = mixture.steps(epochs, windows)
    wanted = epochs * sum(mixture.counts)
    assert steps * windows >= wanted - 1e-6
    assert steps == 1 or (steps - 1) * windows < wanted


def test_weights_are_exact_over_an_epoch(corpora):
    weights = (0.5, 2.0, 0.01)
    mixture = Mixture(list(zip(corpora, weights, strict=True)), LENGTH, seed=0)
    windows = [corpus.windows(LENGTH) for corpus in corpora]
    expected = [round(0.5 * windows[0]), 2 * windows[1], 1]
    assert list(mixture.counts) == expected
    sources = mixture.batch(0, mixture.windows_per_epoch).sources
    assert np.bincount(sources, minlength=3).tolist() == expected
    seen = drawn(mixture, corpora, 0, mixture.windows_per_epoch)
    assert {seen[1, index] for index in range(windows[1])} == {2}


@pytest.mark.parametrize("weight", [0.5, 0.3, 1.5, 2.25])
def test_a_fractional_weight_covers_everything_evenly_over_epochs(corpora, weight):
    mixture = Mixture([(corpora[0], weight), (corpora[1], 1.0)], LENGTH, seed=1)
    windows, count = corpora[0].windows(LENGTH), mixture.counts[0]
    epochs = -(-windows // count) * 2
    seen = drawn(mixture, corpora, 0, epochs * mixture.windows_per_epoch)
    times = [seen[0, index] for index in range(windows)]
    assert sum(times) == epochs * count
    assert max(times) - min(times) <= 1


def test_a_batch_is_independent_of_the_batches_before_it(corpora):
    pairs = [(corpora[0], 1.5), (corpora[1], 0.7)]
    mixture = Mixture(pairs, LENGTH, seed=5)
    forward = [mixture.batch(step, 8) for step in range(60)]
    again = Mixture(pairs, LENGTH, seed=5)
    for step in (59, 0, 17, 17, 31):
        assert np.array_equal(again.batch(step, 8).tokens, forward[step].tokens)
        assert np.array_equal(again.batch(step, 8).sources, forward[step].sources)
    assert forward[0].tokens.shape == (8, LENGTH + 1)
    assert forward[0].tokens.dtype == np.int64
    assert forward[0].sources.shape == (8,)


def test_samples_do_not_depend_on_how_they_are_cut_into_steps(corpora):
    mixture = Mixture([(corpora[0], 1.0), (corpora[2], 3.0)], LENGTH, seed=5)
    size = 2 * mixture.windows_per_epoch  # the cuts cross an epoch
    whole = mixture.batch(0, size).tokens
    parts = np.concatenate([mixture.batch(step, 7).tokens for step in range(-(-size // 7))])
    assert np.array_equal(whole, parts[:size])


def test_seed_and_epoch_change_the_order(corpora):
    pairs = [(corpus, 1.0) for corpus in corpora]
    first, second = Mixture(pairs, LENGTH, seed=0), Mixture(pairs, LENGTH, seed=1)
    size = first.windows_per_epoch
    assert not np.array_equal(first.batch(0, size).tokens, second.batch(0, size).tokens)
    assert not np.array_equal(first.batch(0, size).tokens, first.batch(1, size).tokens)
    assert first.digest != second.digest
    assert first.digest == Mixture(pairs, LENGTH, seed=0).digest


def test_a_window_longer_than_the_corpus_wraps(corpora):
    corpus = corpora[2]
    batch = Mixture([(corpus, 1.0)], corpus.tokens * 2 + 1, seed=0).batch(4, 2)
    tokens = corpus.window(0, corpus.tokens)[:-1]
    assert np.array_equal(batch.tokens[0], np.resize(tokens, corpus.tokens * 2 + 2))


FRESH = """
import sys
from pathlib import Path
from deepen.data.batches import Mixture
from deepen.data.corpus import Corpus
corpora = [(Corpus(Path(name)), weight) for name, weight in zip(sys.argv[1:], (1.5, 0.7))]
sys.stdout.buffer.write(Mixture(corpora, 16, 9).batch(123, 8).tokens.tobytes())
"""


def test_another_process_draws_the_same_batch(corpora):
    pairs = [(corpora[0], 1.5), (corpora[1], 0.7)]
    arguments = [str(corpus.directory) for corpus, _ in pairs]
    environment = {"PATH": os.environ["PATH"], "PYTHONHASHSEED": "7"}
    output = subprocess.run(
        [sys.executable, "-c", FRESH, *arguments],
        capture_output=True,
        check=True,
        env=environment,
        cwd=Path("/"),
    )
    assert output.stdout == Mixture(pairs, LENGTH, 9).batch(123, 8).tokens.tobytes()
