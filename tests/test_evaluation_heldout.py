import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from deepen.data.evaluation_text import EvaluationText
from deepen.errors import DataError, EvaluationError, TrainingError
from deepen.evaluation import heldout
from deepen.evaluation.heldout import evaluate_texts, score_windows

VOCABULARY = 96


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
        attention_dropout=0.5,
    )
    return LlamaForCausalLM(config).eval()


def random_windows(lengths, seed=0):
    generator = np.random.default_rng(seed)
    return [generator.integers(VOCABULARY, size=length, dtype=np.int64) for length in lengths]


def transformers_loss(model, window):
    ids = torch.from_numpy(window)[None]
    with torch.no_grad():
        return model(input_ids=ids, labels=ids).loss.double().item() * (len(window) - 1)


def text(task, windows, role="domain", document=None, size=None):
    return EvaluationText(
        task=task,
        role=role,
        windows=windows,
        document=document or list(range(len(windows))),
        bytes=size or [3 * (len(window) - 1) for window in windows],
        digest=f"digest of {task}",
    )


LENGTHS = [2, 33, 33, 7, 64, 33, 12, 2, 50]


@pytest.mark.parametrize("batch_tokens", [1, 70, 16384])
def test_equals_the_loss_of_transformers(model, batch_tokens):
    windows = random_windows(LENGTHS)
    expected = [transformers_loss(model, window) for window in windows]
    found = score_windows(model, windows, batch_tokens=batch_tokens)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_a_batch_that_does_not_fit_is_halved_and_those_after_it(model, monkeypatch):
    windows, score, tried = random_windows(LENGTHS), heldout._score, []

    def scarce(most):
        def attempt(model, windows, counted, device):
            tried.append(len(windows))
            if len(windows) > most:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return score(model, windows, counted, device)

        monkeypatch.setattr(heldout, "_score", attempt)

    expected, told = score_windows(model, windows), []
    scarce(2)
    found = score_windows(model, windows, batch_tokens=256, progress=lambda *at: told.append(at))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert max(tried[-3:]) <= 2 < tried[0]
    assert told[-1] == (len(LENGTHS), len(LENGTHS))
    assert [done for done, _ in told] == sorted({done for done, _ in told})
    scarce(0)
    with pytest.raises(EvaluationError, match="64 tokens alone do not fit the memory"):
        score_windows(model, windows)


def test_does_not_depend_on_the_batch(model):
    windows = random_windows(LENGTHS)
    alone = np.concatenate([score_windows(model, [window]) for window in windows])
    np.testing.assert_allclose(score_windows(model, windows), alone, rtol=1e-5)
    order = np.random.default_rng(1).permutation(len(windows))
    np.testing.assert_allclose(score_windows(model, [windows[i] for i in order]), alone[order], rtol=1e-5)


def test_widening_in_parts_changes_nothing(model, monkeypatch):
    windows = random_windows(LENGTHS)
    whole = score_windows(model, windows)
    monkeypatch.setattr(heldout, "_WIDENED_LOGITS", 5 * VOCABULARY)
    np.testing.assert_array_equal(score_windows(model, windows), whole)


def test_never_widens_all_logits_at_once(model, monkeypatch):
    monkeypatch.setattr(heldout, "_WIDENED_LOGITS", 8 * VOCABULARY)
    seen = []
    original = heldout.functional.cross_entropy

    def record(logits, *args, **kwargs):
        seen.append((logits.dtype, logits.numel()))
        return original(logits, *args, **kwargs)

    monkeypatch.setattr(heldout.functional, "cross_entropy", record)
    score_windows(model, random_windows([33, 33]), autocast=torch.bfloat16)
    assert {dtype for dtype, _ in seen} == {torch.float32}
    assert max(size for _, size in seen) <= 8 * VOCABULARY
    assert sum(size for _, size in seen) == 2 * 32 * VOCABULARY


def test_autocast_is_close_and_not_the_same(model):
    windows = random_windows([33] * 4)
    exact, rough = score_windows(model, windows), score_windows(model, windows, autocast=torch.bfloat16)
    np.testing.assert_allclose(rough, exact, rtol=0.02)
    assert (rough != exact).any()


@pytest.mark.parametrize("fails", [False, True])
def test_the_mode_of_every_module_is_restored(model, fails):
    model.train()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    windows = random_windows([9])
    try:
        with_dropout_off = transformers_loss(model.eval(), windows[0])
        model.train()
        model.model.layers[0].eval()
        if fails:
            with pytest.raises(ZeroDivisionError):
                score_windows(model, windows, progress=lambda done, total: 1 / 0)
        else:
            assert score_windows(model, windows)[0] == pytest.approx(with_dropout_off, rel=1e-5)
        assert [module.training for module in model.modules()] == before
    finally:
        model.eval()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_cache_is_not_used(model, monkeypatch):
    calls = []
    original = model.forward
    monkeypatch.setattr(model, "forward", lambda **given: calls.append(given) or original(**given))
    score_windows(model, random_windows([9, 9]))
    assert calls
    assert all(given["use_cache"] is False for given in calls)


def test_a_window_of_one_token_predicts_nothing(model):
    one, nine = random_windows([1, 9])
    np.testing.assert_array_equal(score_windows(model, [one, nine]) > 0, [False, True])
    assert score_windows(model, []).shape == (0,)


def test_progress_counts_to_the_end(model):
    seen = []
    score_windows(model, random_windows([9] * 10), batch_tokens=27, progress=lambda *both: seen.append(both))
    assert seen == [(3, 10), (6, 10), (9, 10), (10, 10)]


def test_an_unknown_token_is_the_users_error(model):
    windows = [*random_windows([9]), np.array([1, VOCABULARY])]
    with pytest.raises(DataError, match=f"token id {VOCABULARY} but the model has {VOCABULARY} embeddings"):
        score_windows(model, windows)


def test_a_diverged_model_is_the_users_error(model):
    broken = LlamaForCausalLM(model.config).eval()
    torch.nn.init.constant_(broken.model.norm.weight, float("nan"))
    with pytest.raises(TrainingError, match="not a number in 2 of 2 windows"):
        score_windows(broken, random_windows([9, 9]))


def test_texts_are_scored_by_name(model):
    texts = [text("new", random_windows([20, 9])), text("old", random_windows([9, 5, 6], seed=1), "general")]
    scores = evaluate_texts(model, texts)
    assert {task: len(nll) for task, nll in scores.items()} == {"new": 2, "old": 3}
    for each in texts:
        expected = [transformers_loss(model, window) for window in each.windows]
        np.testing.assert_allclose(scores[each.task], expected, rtol=1e-5)
    assert evaluate_texts(model, []) == {}


def test_two_texts_of_one_name_are_refused(model):
    with pytest.raises(DataError, match="more than one text is called same"):
        evaluate_texts(model, [text("same", random_windows([5])), text("same", random_windows([6]))])
