from contextlib import contextmanager, nullcontext

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

from deepen import bypass, insert_blocks
from deepen.errors import DataError, EvaluationError
from deepen.evaluation import shift
from deepen.evaluation.heldout import score_windows
from deepen.evaluation.shift import measure_shift
from deepen.expansion import plan_layout

VOCABULARY = 96
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
}  # fmt: skip


def expanded(kind=LlamaForCausalLM, config=LlamaConfig, **given):
    """A model whose new blocks have learned something; bypassed, it is its base."""
    torch.manual_seed(0)
    model = kind(config(**SIZES, initializer_range=0.3, **given)).eval()
    insert_blocks(model, plan_layout(2, blocks=1))
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(0, 0.3)
    return model


@pytest.fixture(scope="module")
def model():
    return expanded()


def random_windows(lengths, seed=0):
    generator = np.random.default_rng(seed)
    return [generator.integers(VOCABULARY, size=length, dtype=np.int64) for length in lengths]


def by_full_logits(model, window):
    """Ranks and divergences of one window, from the logits transformers gives, sorted and summed in fp64."""
    ids = torch.from_numpy(window)[None, :-1]
    with torch.no_grad():
        after = model(input_ids=ids, use_cache=False).logits[0].double()
        with bypass(model):
            before = model(input_ids=ids, use_cache=False).logits[0].double()
    order = before.argsort(-1, descending=True)
    ranks = 1 + (order == after.argmax(-1)[:, None]).int().argmax(-1)
    kl = functional.kl_div(after.log_softmax(-1), before.log_softmax(-1), log_target=True, reduction="sum")
    kinds = [(ranks == 1).sum(), ((ranks == 2) | (ranks == 3)).sum(), (ranks > 3).sum()]
    return [int(kind) for kind in kinds], float(kl)


LENGTHS = [2, 33, 33, 7, 64, 1, 33, 12, 2, 50]


@pytest.mark.parametrize("batch_tokens", [1, 70, 16384])
@pytest.mark.parametrize("most", [3 * VOCABULARY, 2**24])
def test_equals_full_logits(model, monkeypatch, batch_tokens, most):
    monkeypatch.setattr(shift, "_WIDENED_LOGITS", most)
    windows = random_windows(LENGTHS)
    found = measure_shift(model, windows, bypass, batch_tokens=batch_tokens)
    for index, window in enumerate(windows):
        kinds, kl = by_full_logits(model, window) if len(window) > 1 else ([0, 0, 0], 0)
        assert [found.unshifted[index], found.marginal[index], found.shifted[index]] == kinds
        assert found.kl[index] == pytest.approx(kl, rel=1e-4)
    assert min(found.unshifted.sum(), found.marginal.sum(), found.shifted.sum()) > 0


def test_what_a_family_does_to_its_logits_counts():
    capped = expanded(Gemma2ForCausalLM, Gemma2Config, final_logit_softcapping=2.0, pad_token_id=0)
    window = random_windows([40])[0]
    found = measure_shift(capped, [window], bypass)
    assert found.kl[0] == pytest.approx(by_full_logits(capped, window)[1], rel=1e-4)


def test_a_model_is_not_shifted_from_itself(model):
    found = measure_shift(model, random_windows(LENGTHS), lambda _: nullcontext())
    np.testing.assert_array_equal(found.unshifted, [length - 1 for length in LENGTHS])
    assert not found.marginal.any()
    assert not found.shifted.any()
    assert not found.kl.any()


def test_the_divergence_bounds_the_loss_that_the_base_would_have_on_its_own_text(model):
    # E_base[nll under model − nll under base] is the divergence: positive at every position.
    found = measure_shift(model, random_windows(LENGTHS), bypass)
    assert (found.kl[[length > 1 for length in LENGTHS]] > 0).all()


def test_the_model_is_left_as_it_was(model):
    model.train()
    before, blocks = score_windows(model, random_windows([20])), len(model.model.layers)
    measure_shift(model, random_windows([20]), bypass)
    assert model.training
    assert len(model.model.layers) == blocks
    np.testing.assert_array_equal(score_windows(model, random_windows([20])), before)
    model.eval()


def test_never_holds_the_logits_of_a_batch(model, monkeypatch):
    seen = []
    original = shift._compare
    monkeypatch.setattr(
        shift, "_compare", lambda *both: seen.extend(each.numel() for each in both) or original(*both)
    )
    monkeypatch.setattr(shift, "_WIDENED_LOGITS", 16 * VOCABULARY)
    measure_shift(model, random_windows([33, 33]), bypass)
    assert max(seen) <= 8 * VOCABULARY
    assert sum(seen) == 2 * 2 * 32 * VOCABULARY


def test_the_base_runs_first_and_progress_counts_to_the_end(model):
    seen, entered = [], []

    @contextmanager
    def base(given):
        entered.append(given)
        with bypass(given):
            yield

    progress = lambda *both: seen.append(both)  # noqa: E731
    measure_shift(model, random_windows([9] * 10), base, batch_tokens=27, progress=progress)
    assert seen == [(3, 10), (6, 10), (9, 10), (10, 10)]
    assert entered == [model] * 4


def test_an_unknown_token_is_the_users_error(model):
    with pytest.raises(DataError, match=f"token id {VOCABULARY}"):
        measure_shift(model, [np.array([1, VOCABULARY])], bypass)


def test_a_batch_that_does_not_fit_is_halved_and_those_after_it(model):
    windows, sizes = random_windows([9] * 7 + [5]), []
    whole = measure_shift(model, windows, bypass)

    def scarce(most):
        def call(work):
            found = work(model)
            sizes.append(len(found[0]))
            if len(found[0]) > most:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return found

        return call

    found = measure_shift(model, windows, bypass, call=scarce(2))
    assert sizes == [8, 4, 2, 2, 2, 2]
    np.testing.assert_array_equal(found.unshifted, whole.unshifted)
    np.testing.assert_allclose(found.kl, whole.kl, rtol=1e-5)
    with pytest.raises(EvaluationError, match="rank shift: 9 tokens alone do not fit the memory"):
        measure_shift(model, windows, bypass, call=scarce(0))
