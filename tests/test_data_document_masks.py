import itertools

import numpy as np
import pytest
import torch
import transformers
from test_data_corpus import write_lines
from test_data_tokenizers import tiny_bpe
from torch.nn import functional

from deepen.config import TextSet
from deepen.data.batches import Mixture
from deepen.data.corpus import prepare_corpus
from deepen.data.document_masks import check_document_masks, measure_leak
from deepen.errors import TrainingError

LENGTH = 40
VOCABULARY = 400
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
WIDE = {**SIZES, "intermediate_size": 48, "max_position_embeddings": 64}
GROUPED = {**WIDE, "num_key_value_heads": 2}
SLIDING = {"head_dim": 8, "sliding_window": 4}

KEPT_APART = {
    "llama": GROUPED,
    "qwen3": {**GROUPED, **SLIDING, "use_sliding_window": True, "max_window_layers": 1},
    "gemma2": {**GROUPED, **SLIDING},
    "gemma3_text": {**GROUPED, **SLIDING, "sliding_window_pattern": 2},
    "gpt2": {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64},
    "gpt_neox": {**WIDE, "rotary_pct": 0.25},
}
LEAKING = {
    "bloom": ({**SIZES}, "ALiBi"),
    "falcon": ({**SIZES, "alibi": False}, "not parted by position ids"),
    "qwen3_next": (
        {
            **GROUPED,
            "head_dim": 8,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "num_experts": 2,
            "num_experts_per_tok": 1,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
        },
        "linear layers",
    ),
}
ATTENTION = [
    (family, kind)
    for family in KEPT_APART
    for kind in ("sdpa", "eager")
    if (family, kind) != ("gemma2", "sdpa")  # transformers has none
]


def build(family: str, options: dict, attention: str | None = None):
    config = transformers.AutoConfig.for_model(
        family, **{"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, **options}
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.train()


@pytest.fixture(scope="module")
def batches(tmp_path_factory):
    """The windows of a corpus in both packings, and its documents."""
    folder = tmp_path_factory.mktemp("masks")
    generator = np.random.default_rng(1)
    texts = [" ".join(map(str, generator.integers(0, 99, size))) for size in generator.integers(1, 12, 40)]
    path = write_lines(folder / "texts.jsonl", texts)
    corpus = prepare_corpus(TextSet(path=str(path)), tiny_bpe(vocab_size=300), cache=folder / "cache")
    mixtures = {
        packing: Mixture([(corpus, 1.0)], LENGTH, 0, packing=packing, document_masks=True)
        for packing in ("stream", "best_fit")
    }
    return corpus, {
        packing: mixture.batch(0, mixture.windows_per_epoch) for packing, mixture in mixtures.items()
    }


@pytest.mark.parametrize("packing", ["stream", "best_fit"])
@pytest.mark.parametrize(("family", "attention"), ATTENTION)
def test_packed_documents_have_the_logits_they_have_alone(batches, family, attention, packing):
    model = build(family, KEPT_APART[family], attention).eval()
    batch = batches[1][packing]
    tokens, positions = torch.from_numpy(batch.tokens[:8]), torch.from_numpy(batch.positions[:8])
    assert (positions == 0).sum() > 2 * len(tokens)
    with torch.no_grad():
        packed = model(input_ids=tokens[:, :-1], position_ids=positions, use_cache=False).logits
        for row, places, logits in zip(tokens, positions, packed, strict=True):
            edges = [*torch.nonzero(places == 0).flatten().tolist(), LENGTH]
            for begin, end in itertools.pairwise(edges):
                alone = model(input_ids=row[None, begin:end], use_cache=False).logits[0]
                torch.testing.assert_close(logits[begin:end], alone, atol=2e-5, rtol=1e-4)


def test_the_loss_of_an_epoch_is_that_of_the_documents_one_by_one(batches):
    corpus, packed = batches
    model = build("llama", {**GROUPED, "max_position_embeddings": 512}).eval()
    batch = packed["best_fit"]
    ends = [0, *corpus.document_ends.tolist()]
    documents = [corpus.read(a, b - a) for a, b in itertools.pairwise(ends)]
    assert max(map(len, documents)) <= LENGTH + 1
    with torch.no_grad():
        logits = model(
            input_ids=torch.from_numpy(batch.tokens[:, :-1]),
            position_ids=torch.from_numpy(batch.positions),
            use_cache=False,
        ).logits
        labels = torch.from_numpy(np.where(batch.trained, batch.tokens[:, 1:], -100))
        found = functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").item()
        expected = 0.0
        for document in documents:
            ids = torch.from_numpy(document)[None]
            # transformers shifts the labels itself, and takes the mean
            expected += model(input_ids=ids, labels=ids, use_cache=False).loss.item() * (len(document) - 1)
    assert batch.trained.sum() == sum(len(document) - 1 for document in documents)
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("family", KEPT_APART)
def test_what_keeps_documents_apart_is_accepted_and_left_as_it_was(family):
    model = build(family, KEPT_APART[family])
    check_document_masks(model)
    assert model.training


@pytest.mark.parametrize("family", LEAKING)
def test_what_lets_documents_see_each_other_is_refused(family):
    options, reason = LEAKING[family]
    with pytest.raises(TrainingError, match=f"{family}.*{reason}"):
        check_document_masks(build(family, options))


def test_a_leak_shows(monkeypatch):
    model = build("llama", GROUPED)
    assert measure_leak(model)[0] < 1e-4
    forward = model.forward
    # With a cache transformers makes no mask of the positions: the trap this is about.
    monkeypatch.setattr(model, "forward", lambda **given: forward(**{**given, "use_cache": True}))
    assert measure_leak(model)[0] > 0.1


def test_a_model_without_positions_is_refused(monkeypatch):
    model = build("llama", GROUPED)
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda input_ids, use_cache: forward(input_ids))
    with pytest.raises(TrainingError, match="takes no positions"):
        check_document_masks(model)
