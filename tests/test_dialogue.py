"""Talking with a model and its base; transformers' own `generate` on models from disk is the oracle."""

from itertools import pairwise

import pytest
import torch
from talking import TEMPLATE, write_places
from transformers import AutoModelForCausalLM, AutoTokenizer

import deepen
from deepen.data.chat import ChatTemplate, choose_template, turn_end
from deepen.dialogue.cast import load_cast
from deepen.dialogue.network import Network
from deepen.dialogue.next_tokens import compare_next_tokens
from deepen.dialogue.prompt import Turn, build_prompt
from deepen.dialogue.talk import Talk
from deepen.dialogue.writing import Sampling
from deepen.errors import ChatError

QUESTIONS = ["block gate", "norm head token"]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    return write_places(tmp_path_factory.mktemp("dialogue"))


@pytest.fixture(scope="module")
def cast(places):
    packs = [str(places / name) for name in ("law", "code")]
    return load_cast(str(places / "base"), packs=packs, template=str(places / "talk.jinja"), compare=True)


@pytest.fixture(scope="module")
def base(places):
    return AutoModelForCausalLM.from_pretrained(places / "base").eval()


@pytest.fixture(scope="module")
def law(places):
    return deepen.load(places / "base", places / "law")


def talk_of(cast, *packs, **sampling):
    talk = Talk(cast, compare=True, sampling=Sampling(**{"max_tokens": 12, **sampling}))
    talk.switch(packs)
    return talk


def finished(talk, question):
    for _ in talk.ask(question):
        pass
    return talk.answers


def generated(model, answer, **options):
    """What `generate` says to the same prompt, without the token that ends it."""
    ends = sorted(answer.voice.network.ends)
    given = torch.tensor([answer.prompt.ids])
    rows = model.generate(
        given, max_new_tokens=answer.prompt.room, eos_token_id=ends, pad_token_id=0, **options
    )
    ids = rows[0, given.shape[1] :].tolist()
    return tuple(ids[:-1] if ids[-1] in ends else ids)


def test_base_and_model_say_what_those_from_disk_say_over_several_turns(cast, base, law):
    talk = talk_of(cast, "law")
    for question in QUESTIONS:
        of_base, of_model = finished(talk, question)
        assert of_base.ids == generated(base, of_base, do_sample=False)
        assert of_model.ids == generated(law, of_model, do_sample=False)
        assert of_base.ids != of_model.ids
    first, second = (talk.turns[0].answers[name] for name in ("base", "model"))
    read = cast.model.tokenizer.decode
    assert read(of_base.prompt.ids).endswith(f"assistant: {first}\nuser: {QUESTIONS[1]}\nassistant:")
    assert f"assistant: {second}\n" in read(of_model.prompt.ids)


@pytest.mark.parametrize("options", [{"temperature": 0.8, "top_p": 0.9}, {"temperature": 1.5, "top_p": 1.0}])
def test_draws_are_those_of_generate_with_the_seed(cast, base, law, options):
    answers = finished(talk_of(cast, "law", seed=7, **options), QUESTIONS[0])
    for model, answer in zip((base, law), answers, strict=True):
        torch.manual_seed(7)
        assert answer.ids == generated(model, answer, do_sample=True, top_k=0, **options)


def test_the_repetition_penalty_of_the_generation_config_holds(cast, base, monkeypatch):
    plain, _ = finished(talk_of(cast), QUESTIONS[0])
    monkeypatch.setattr(cast.model.model.generation_config, "repetition_penalty", 1.8)
    of_base, _ = finished(talk_of(cast), QUESTIONS[0])
    assert of_base.ids == generated(base, of_base, do_sample=False, repetition_penalty=1.8) != plain.ids


def test_text_only_grows_and_ends_as_the_whole_answer_reads(cast):
    talk = talk_of(cast, "law", temperature=1.0, max_tokens=30)
    texts = [answers[1].text for answers in talk.ask(QUESTIONS[0])]
    assert len(texts) > 10
    assert all(later.startswith(sooner) for sooner, later in pairwise(texts))
    answer = talk.answers[1]
    assert texts[-1] == cast.model.tokenizer.decode(answer.ids, skip_special_tokens=True)


def test_with_all_packs_off_the_columns_are_equal_and_on_again_they_are_not(cast):
    talk = talk_of(cast, "law")
    both = {}
    for packs in (("law",), (), ("code",), ("law", "code"), ("law",)):
        talk.reset()
        talk.switch(packs)
        of_base, of_model = finished(talk, QUESTIONS[0])
        both.setdefault(packs, of_model.ids)
        assert (of_base.ids == of_model.ids) == (packs == ())
        assert both[packs] == of_model.ids
    assert len(set(both.values())) == 4


def test_answers_of_two_conversations_do_not_mix(cast):
    alone = finished(talk_of(cast, "law"), QUESTIONS[0]), finished(talk_of(cast, "code"), QUESTIONS[1])
    one, other = talk_of(cast, "law"), talk_of(cast, "code")
    for _ in zip(one.ask(QUESTIONS[0]), other.ask(QUESTIONS[1]), strict=False):
        pass
    for talk, whole in zip((one, other), alone, strict=True):
        said = talk.answers[1].ids
        assert said
        assert said == whole[1].ids[: len(said)]


def test_seeds_repeat_and_differ_between_turns(cast):
    def said(seed):
        talk = talk_of(cast, "law", temperature=1.0, seed=seed)
        return [finished(talk, QUESTIONS[0])[1].ids for _ in range(2)]

    assert said(3) == said(3) != said(4)
    assert len(set(said(3))) == 2


def test_a_long_conversation_loses_its_oldest_turns(cast, monkeypatch):
    turns = [Turn(f"token {at}", {"model": "layer write " * 3}) for at in range(9)]
    prompt = build_prompt(cast.model, "model", turns, "base", "short", 20)
    assert prompt.cut > 0
    assert len(prompt.ids) + 20 <= 128
    monkeypatch.setattr(Network, "context", None)
    kept, more = (
        build_prompt(cast.model, "model", turns[begin:], "base", "short", 20)
        for begin in (prompt.cut, prompt.cut - 1)
    )
    assert kept.ids == prompt.ids
    assert len(more.ids) + 20 > 128
    text = cast.model.tokenizer.decode(prompt.ids)
    assert text.startswith("<|endoftext|>system: short\n")
    assert f"token {prompt.cut}\n" in text
    assert f"token {prompt.cut - 1}\n" not in text


def test_an_answer_has_the_room_that_is_left_or_none(cast):
    text = "?" * 90
    prompt = build_prompt(cast.model, "model", (), text, "", 100)
    assert prompt.room == 128 - len(prompt.ids) < 100
    with pytest.raises(ChatError, match=r"the question takes .* tokens, the model sees 128"):
        build_prompt(cast.model, "model", (), text * 2, "", 1)


def test_a_stopped_answer_is_remembered_as_far_as_it_came(cast):
    talk = talk_of(cast, "law")
    growing = talk.ask(QUESTIONS[0])
    texts = [next(growing)[1].text for _ in range(12)]
    assert texts[-1]
    growing.close()
    assert [turn.answers["model"] for turn in talk.turns] == texts[-1:]
    for number, _ in enumerate(talk.ask(QUESTIONS[0])):
        if number == 2:
            talk.stop()
    assert [len(answer.ids) for answer in talk.answers] == [3, 0]
    assert talk.answers[0].ended == ""


def test_a_base_without_template_continues_each_text_alone(places):
    cast = load_cast(str(places / "law"), compare=True)
    assert "no chat template" in cast.notes[0]
    assert cast.packs == ("law",)
    talk = talk_of(cast, "law")
    for question in QUESTIONS:
        for answer in finished(talk, question):
            assert answer.prompt.ids == tuple(cast.model.tokenizer(question)["input_ids"])


def test_a_base_of_its_own_answers_beside_a_tuned_one(places, base, law, tmp_path):
    law.save_pretrained(tmp_path / "tuned")
    AutoTokenizer.from_pretrained(places / "base").save_pretrained(tmp_path / "tuned")
    template = str(places / "talk.jinja")
    cast = load_cast(str(tmp_path / "tuned"), base=str(places / "base"), template=template, compare=True)
    of_base, of_model = finished(Talk(cast, compare=True, sampling=Sampling(max_tokens=8)), QUESTIONS[0])
    assert of_base.ids == generated(base, of_base, do_sample=False)
    assert of_model.ids == generated(law, of_model, do_sample=False)
    assert compare_next_tokens(of_base.voice, of_model.voice, of_base.prompt.ids, of_base.ids)[0].divergence


def test_next_tokens_are_those_of_the_two_models(cast, base, law, monkeypatch):
    monkeypatch.setattr("deepen.dialogue.next_tokens._CHUNK", 10)
    of_base, of_model = finished(talk_of(cast, "law", max_tokens=70), "?")
    given, said = of_model.prompt.ids, of_model.ids
    found = compare_next_tokens(of_base.voice, of_model.voice, given, said, count=3)
    logits = []
    for model in (base, law):
        with torch.no_grad():
            logits.append(model(torch.tensor([given + said])).logits[0, len(given) - 1 :].double())
    ours, theirs = torch.log_softmax(logits[1], -1), torch.log_softmax(logits[0], -1)
    expected = torch.nn.functional.kl_div(theirs, ours, log_target=True, reduction="none").sum(-1)
    assert len(found) == len(said) + 1 > 20  # more than two chunks
    assert [place.divergence for place in found] == pytest.approx(expected.tolist(), abs=1e-4)
    for probabilities, shown in ((theirs, "base"), (ours, "model")):
        values, tokens = probabilities.exp().topk(3, dim=-1)
        guesses = [getattr(place, shown) for place in found]
        assert [[guess.token for guess in row] for row in guesses] == tokens.tolist()
        assert guesses[5][1].probability == pytest.approx(values[5, 1].item(), abs=1e-5)
    assert [place.text for place in found[:-1]] == [cast.model.tokenizer.decode([token]) for token in said]
    # What the model says greedily is what it expects first.
    assert [place.model[0].token for place in found[:-1]] == list(said)
    assert any(place.differs for place in found)


def test_next_tokens_with_no_pack_on_do_not_differ(cast):
    of_base, of_model = finished(talk_of(cast), QUESTIONS[0])
    found = compare_next_tokens(of_base.voice, of_model.voice, of_base.prompt.ids, of_base.ids)
    assert not any(place.differs or place.divergence for place in found)


def test_an_answer_ends_where_the_template_ends_turns(places):
    tokenizer = AutoTokenizer.from_pretrained(places / "base")
    assert turn_end(ChatTemplate("plain", TEMPLATE), tokenizer) is None
    tokenizer.add_tokens(["<|im_end|>"], special_tokens=True)
    found = turn_end(choose_template(tokenizer, "chatml"), tokenizer)
    assert found == tokenizer.convert_tokens_to_ids("<|im_end|>")
