import itertools
import json
from collections import Counter

import numpy as np
import pytest
import torch
from chat_templates import chat_tokenizer
from conftest import write_tiny_llama
from transformers import AutoModelForCausalLM, AutoTokenizer

from deepen.config import ConversationSet
from deepen.data.chat import choose_template
from deepen.data.conversation_build import mix_conversations, prepare_conversations
from deepen.data.packing import open_windows
from deepen.errors import DataError
from deepen.training.interface import Hooks, Settings
from deepen.training.loop import train
from deepen.training.loss import IGNORED, summed_loss

LENGTH = 40
WORDS = ["cat", "mat", "dog", "the", "sat", "x", "on"]


def records(count: int) -> list[dict]:
    """Conversations of one to three turns and many lengths."""
    pick = np.random.default_rng(3)
    return [
        {
            "messages": [
                {"role": role, "content": " ".join(pick.choice(WORDS, pick.integers(1, 6)).tolist())}
                for _ in range(pick.integers(1, 4))
                for role in ("user", "assistant")
            ]
        }
        for _ in range(count)
    ]


@pytest.fixture(scope="module")
def tokenizer():
    return chat_tokenizer()


def prepare(path, found, tokenizer, length=LENGTH, template="chatml"):
    path.write_text("".join(json.dumps(record) + "\n" for record in found))
    asked = ConversationSet(path=str(path))
    chosen = choose_template(tokenizer, template)
    return prepare_conversations(asked, tokenizer, chosen, length, cache=path.parent / "cache")


def alone(tokenizer, record) -> tuple[list[int], list[int]]:
    """A conversation's ids and labels, put together word by word from what ChatML is."""
    ids, labels = [], []
    for message in record["messages"]:
        head = tokenizer.encode(f"<|im_start|>{message['role']}\n")
        body = tokenizer.encode(f"{message['content']}<|im_end|>\n")
        ids += head + body
        labels += [IGNORED] * len(head) + (body if message["role"] == "assistant" else [IGNORED] * len(body))
    return ids, labels


def test_the_loss_of_packed_conversations_is_that_of_each_alone(tmp_path, tokenizer):
    found = records(30)
    corpus = prepare(tmp_path / "a.jsonl", found, tokenizer, 200)
    mixture = mix_conversations([(corpus, 1.0)], 200, seed=1)
    batch = mixture.batch(0, mixture.windows_per_epoch)
    assert len(batch.tokens) < 30
    model = AutoModelForCausalLM.from_pretrained(write_tiny_llama(tmp_path / "m", vocab_size=len(tokenizer)))
    tokens, trained = torch.from_numpy(batch.tokens), torch.from_numpy(batch.trained)
    packed = summed_loss(
        model.eval(),
        tokens[:, :-1],
        tokens[:, 1:].masked_fill(~trained, IGNORED),
        torch.from_numpy(batch.positions),
    )
    expected, targets = 0.0, 0
    for record in found:
        ids, labels = alone(tokenizer, record)
        count = sum(label != IGNORED for label in labels)
        loss = model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels])).loss
        expected, targets = expected + loss.item() * count, targets + count
    assert int(batch.trained.sum()) == targets == mixture.packing_counts()[0].trained
    assert packed.item() == pytest.approx(expected, rel=1e-4)


def test_conversations_are_cut_at_the_end_and_counted(tmp_path, tokenizer):
    found = [*records(60), {"messages": [{"role": "user", "content": "alone"}]}]
    corpus = prepare(tmp_path / "a.jsonl", found, tokenizer)
    whole = [alone(tokenizer, record) for record in found[:-1]]
    kept = [
        (ids[: LENGTH + 1], labels[: LENGTH + 1])
        for ids, labels in whole
        if any(label != IGNORED for label in labels[: LENGTH + 1])
    ]
    ends = [0, *corpus.document_ends.tolist()]
    for (begin, end), (ids, labels) in zip(itertools.pairwise(ends), kept, strict=True):
        assert corpus.read(begin, end - begin).tolist() == ids
        assert corpus.learned(begin, end - begin).tolist() == [label != IGNORED for label in labels]
    counts, lengths = corpus.counts, sorted(len(ids) for ids, _ in whole)
    assert (counts.read, counts.kept, counts.unanswered) == (61, len(kept), 1)
    assert counts.cut == sum(size > LENGTH + 1 for size in lengths) > 5
    assert counts.lost == len(whole) - len(kept)
    assert counts.tokens == sum(len(ids) for ids, _ in kept) == sum(lengths) - counts.cut_tokens
    assert counts.trained == sum(label != IGNORED for _, labels in kept for label in labels)
    assert (counts.longest, counts.median) == (lengths[-1], lengths[29])
    assert f"{counts.cut} cut at the end of the window ({counts.cut_tokens:,} tokens lost)" in counts.line()
    assert "1 without an answer left out" in counts.line()


def test_a_conversation_whose_answer_is_behind_the_cut_is_left_out(tmp_path, tokenizer):
    late = {"prompt": "the cat " * 60, "completion": "sat"}
    corpus = prepare(tmp_path / "a.jsonl", [late, {"prompt": "x", "completion": "on"}], tokenizer)
    assert (corpus.counts.kept, corpus.counts.lost, corpus.counts.cut) == (1, 1, 1)
    assert "1 left out, the answer behind the cut" in corpus.counts.line()
    with pytest.raises(DataError, match="b: nothing to learn in its 1 conversations"):
        prepare(tmp_path / "b.jsonl", [late], tokenizer)


def test_packs_keep_conversations_whole_and_apart(tmp_path, tokenizer):
    corpus = prepare(tmp_path / "a.jsonl", records(40), tokenizer, 100)
    mixture = mix_conversations([(corpus, 1.0)], 100, seed=0)
    seen = Counter()
    for index in range(mixture.sizes[0]):
        window, starts = mixture.window(0, index), mixture.starts(0, index)
        end = 101 - mixture.padding(0, index)
        bounds = [*[start for start in starts.tolist() if start < end], end]
        for begin, stop in itertools.pairwise(bounds):
            seen[tuple(window.tokens[begin:stop].tolist())] += 1
            places = range(min(stop, 100) - begin)
            assert window.positions[begin : min(stop, 100)].tolist() == list(places)
        assert not window.trained[end - 1 :].any()
    assert seen == Counter(tuple(alone(tokenizer, record)[0]) for record in records(40))


def test_equal_conversations_have_equal_digests(tmp_path, tokenizer):
    first = prepare(tmp_path / "a.jsonl", records(5), tokenizer)
    (tmp_path / "elsewhere").mkdir()
    assert prepare(tmp_path / "elsewhere/a.jsonl", records(5), tokenizer).digest == first.digest
    others = [
        prepare(tmp_path / "c.jsonl", records(6), tokenizer),
        prepare(tmp_path / "d.jsonl", records(5), tokenizer, template="zephyr"),
    ]
    learned_less = records(5)
    learned_less[0]["messages"].insert(0, {"role": "user", "content": "x"})
    learned_less[0]["messages"][2]["weight"] = 0
    others.append(prepare(tmp_path / "e.jsonl", learned_less, tokenizer))
    assert len({first.digest, *(one.digest for one in others)}) == 4


def test_conversations_are_not_torn(tmp_path, tokenizer):
    corpus = prepare(tmp_path / "a.jsonl", records(5), tokenizer)
    for packing, masks in (("stream", True), ("best_fit", False)):
        with pytest.raises(ValueError, match="need best_fit and document masks"):
            open_windows(corpus, LENGTH, packing, document_masks=masks)


def test_the_loop_learns_answers_only(tmp_path, tokenizer):
    found = [{"prompt": f"the {word}", "completion": word} for word in WORDS]
    corpus = prepare(tmp_path / "a.jsonl", found, tokenizer, 64)
    mixture = mix_conversations([(corpus, 1.0)], 64, seed=1)
    model = AutoModelForCausalLM.from_pretrained(write_tiny_llama(tmp_path / "m", vocab_size=len(tokenizer)))
    losses = []
    settings = Settings(
        steps=30,
        windows=mixture.windows_per_epoch,
        micro_batch=1,
        learning_rate=1e-2,
        schedule="cosine",
        warmup=0.1,
        final_learning_rate=0.1,
        clip=1.0,
        autocast=None,
        evaluate_every=30,
        checkpoint_every=30,
    )
    hooks = Hooks(
        log=lambda report: losses.append(report.loss),
        evaluate=lambda step: None,
        save=lambda step: None,
        stop=lambda: False,
    )
    parameters = dict(model.named_parameters())
    train(model, parameters, torch.optim.AdamW(parameters.values()), mixture.batch, settings, hooks)
    assert losses[-1] < 0.5 < 2 < losses[0]


def test_learned_tokens_of_real_instructions_are_their_answers(data_dir, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(data_dir / "models/stories260k")
    asked = ConversationSet(path=str(data_dir / "instructions/alpaca.json"))
    corpus = prepare_conversations(
        asked, tokenizer, choose_template(tokenizer, "alpaca"), 4096, cache=tmp_path
    )
    raw = json.loads((data_dir / "instructions/alpaca.json").read_text())
    assert (corpus.counts.read, corpus.counts.cut) == (len(raw), 0)
    ends = [0, *corpus.document_ends.tolist()]
    for record, (begin, end) in list(zip(raw, itertools.pairwise(ends), strict=True))[:200]:
        ids, learned = corpus.read(begin, end - begin), corpus.learned(begin, end - begin)
        assert ids[learned][-1] == tokenizer.eos_token_id
        assert tokenizer.decode(ids[learned][:-1]).strip() == record["output"].strip()
        assert ids[0] == tokenizer.bos_token_id != ids[1]


def test_a_set_is_tokenised_once(tmp_path, tokenizer, monkeypatch):
    first = prepare(tmp_path / "a.jsonl", records(5), tokenizer)
    assert first.forms == ("a.jsonl: messages (messages: a list of role and content)",)
    monkeypatch.setattr("deepen.data.conversation_build.lay_out", None)
    again = prepare(tmp_path / "a.jsonl", records(5), tokenizer)
    assert (again.directory, again.counts, again.forms) == (first.directory, first.counts, first.forms)
    with pytest.raises(TypeError):
        prepare(tmp_path / "a.jsonl", records(6), tokenizer)
    assert [path.name for path in (tmp_path / "cache/conversations").iterdir()] == [first.directory.name]


@pytest.mark.parametrize("damage", ["ids.bin", "conversations.json"])
def test_a_damaged_cache_is_not_trained_on(tmp_path, tokenizer, damage):
    corpus = prepare(tmp_path / "a.jsonl", records(5), tokenizer)
    (corpus.directory / damage).write_text("{}")
    with pytest.raises(DataError, match=f"{damage}: "):
        prepare(tmp_path / "a.jsonl", records(5), tokenizer)


def test_a_set_of_the_hub_is_read(tmp_path, tokenizer):
    (tmp_path / "set").mkdir()
    (tmp_path / "set/train.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records(5)))
    asked = ConversationSet(hub=str(tmp_path / "set"))
    template = choose_template(tokenizer, "chatml")
    corpus = prepare_conversations(asked, tokenizer, template, 200, cache=tmp_path / "cache")
    same = prepare(tmp_path / "a.jsonl", records(5), tokenizer, 200)
    assert corpus.document_ends.tolist() == same.document_ends.tolist()
    assert corpus.read(0, corpus.tokens).tolist() == same.read(0, same.tokens).tolist()
    assert np.array_equal(corpus.learned(0, corpus.tokens), same.learned(0, same.tokens))
