"""A tiny real chat model and its base bypassed; transformers' own pipeline of steps is the oracle."""

import pytest
import torch
from tiny_run import write_base
from transformers import AutoModelForCausalLM, AutoTokenizer

import deepen
from deepen.errors import EvaluationError
from deepen.evaluation.chat.live import LiveChat
from deepen.evaluation.chat.messages import assistant, user

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
TALKS = [
    [user("block gate")],
    [user("norm"), assistant("head token"), user("layer write stream base copy")],
    [user("token")],
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("chat")
    return write_base(root / "base", max_position_embeddings=128)


@pytest.fixture(scope="module")
def tokenizer(place):
    tokenizer = AutoTokenizer.from_pretrained(place)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture(scope="module")
def model(place):
    """The base with new blocks that do something."""
    model = deepen.load(place)
    deepen.insert_blocks(model, deepen.plan_layout(3, blocks=2))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in deepen.model.new_parameters(model).values():
            parameter.add_(torch.randn_like(parameter) * 0.5)
    return model


def greedy(model, tokenizer, talk, tokens):
    """One token after the other, without a cache."""
    text = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    begin = len(ids)
    for _ in range(tokens):
        with torch.no_grad():
            best = model(torch.tensor([ids])).logits[0, -1].argmax().item()
        if best in (tokenizer.eos_token_id, model.generation_config.eos_token_id):
            break
        ids.append(best)
    return tokenizer.decode(ids[begin:], skip_special_tokens=True)


def test_replies_are_greedy_and_the_base_answers_as_from_disk(place, model, tokenizer):
    ours = LiveChat(lambda: model, tokenizer, "digest", max_new_tokens=6, batch_size=2).reply(TALKS)
    theirs = LiveChat(lambda: model, tokenizer, "digest", bypassed=True, max_new_tokens=6, batch_size=2)
    base = AutoModelForCausalLM.from_pretrained(place).eval()
    assert ours == [greedy(model, tokenizer, talk, 6) for talk in TALKS]
    assert theirs.reply(TALKS) == [greedy(base, tokenizer, talk, 6) for talk in TALKS]
    assert ours != theirs.reply(TALKS)


def test_a_sampling_generation_config_changes_nothing(model, tokenizer, monkeypatch, recwarn):
    before = LiveChat(lambda: model, tokenizer, "digest", max_new_tokens=6).reply(TALKS)
    monkeypatch.setattr(model.generation_config, "do_sample", True)
    monkeypatch.setattr(model.generation_config, "temperature", 5.0)
    assert LiveChat(lambda: model, tokenizer, "digest", max_new_tokens=6).reply(TALKS) == before
    assert not recwarn.list


def test_a_reply_ends_with_a_stop_sequence(model, tokenizer):
    live = LiveChat(lambda: model, tokenizer, "digest", max_new_tokens=12)
    (whole,) = live.reply(TALKS[:1])
    stop = whole[3:5]
    assert live.reply(TALKS[:1], [stop]) == [whole[: whole.index(stop) + 2]]


def test_a_long_conversation_has_less_room_or_none_and_the_others_keep_theirs(model, tokenizer):
    live = LiveChat(lambda: model, tokenizer, "digest", max_new_tokens=8)
    nearly, long = ([user("?" * length)] for length in (108, 300))
    text = tokenizer.apply_chat_template(nearly, tokenize=False, add_generation_prompt=True)
    room = 128 - len(tokenizer(text, add_special_tokens=False)["input_ids"])
    assert 0 < room < 8
    expected = [greedy(model, tokenizer, nearly, room), greedy(model, tokenizer, TALKS[0], 8), None]
    assert live.reply([nearly, TALKS[0], long]) == expected


def test_a_batch_that_does_not_fit_is_halved(model, tokenizer, monkeypatch):
    sizes, generate = [], LiveChat._generate

    def limited(self, prompts, *others):
        sizes.append(len(prompts))
        if len(prompts) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return generate(self, prompts, *others)

    talks, most = [[user(f"block {at}")] for at in range(9)], 2
    expected = LiveChat(lambda: model, tokenizer, "digest", max_new_tokens=4, batch_size=1).reply(talks)
    monkeypatch.setattr(LiveChat, "_generate", limited)
    live = LiveChat(lambda: model, tokenizer, "digest", max_new_tokens=4, batch_size=8)
    assert live.reply(talks) == expected
    assert sizes == [8, 4, 2, 2, 4, 2, 2, 1]
    most = 0
    with pytest.raises(EvaluationError, match="one conversation alone"):
        live.reply(talks)


def test_identities_tell_what_replies_depend_on(model, tokenizer):
    found = {
        LiveChat(lambda: model, tokenizer, *identity, **options).identity
        for identity, options in [
            (["one"], {}),
            (["two"], {}),
            (["one"], {"bypassed": True}),
            (["one"], {"max_new_tokens": 5}),
        ]
    }
    assert len(found) == 4
    one, same = (LiveChat(lambda: model, tokenizer, "one", batch_size=size).identity for size in (1, 2))
    assert one == same


def test_without_a_chat_template_it_is_said(place, model):
    with pytest.raises(EvaluationError, match="has no chat template"):
        LiveChat(lambda: model, AutoTokenizer.from_pretrained(place), "digest")


def test_a_template_that_refuses_is_said(model, place):
    tokenizer = AutoTokenizer.from_pretrained(place)
    tokenizer.chat_template = "{{ raise_exception('only odd turns') }}"
    with pytest.raises(EvaluationError, match=r"chat template fails .*only odd turns"):
        LiveChat(lambda: model, tokenizer, "digest").reply(TALKS)
