"""The switch: rows decide, and what is decided for the base is the base to the bit."""

import copy
from dataclasses import dataclass, field

import pytest
import torch
from family_table import LINES
from test_model_insert import move, plain
from transformers import DynamicCache

import deepen
from deepen.errors import PackError, SwitchError
from deepen.expansion import plan_layout
from deepen.model.grouping import RowCaches
from deepen.model.state import state_of

PAD = 0
# Rows padded at the left, as for generation. Their first tokens decide: the base, `one`, the base, `two`.
IDS = torch.tensor(
    [[PAD, PAD, 4, 20, 31, 40], [5, 9, 22, 33, 41, 50], [PAD, 8, 21, 60, 61, 3], [PAD, PAD, PAD, 3, 70, 71]]
)
MASK = (IDS != PAD).long()
WHO = (None, "one", None, "two")
ROWS = {None: [0, 2], "one": [1], "two": [3]}


@dataclass
class FirstToken:
    """Decides by a prompt's first token: an even one is the base's, 3 `two`'s, another odd one `one`'s."""

    unit: str = "token"
    packs: None = None
    seen: list = field(default_factory=list)

    def advantages(self, model, prompts, packs):
        self.seen += [prompt.tolist() for prompt in prompts]
        who = [None if p[0] % 2 == 0 else "two" if p[0] == 3 else "one" for p in prompts]
        return torch.tensor([[float(pack == each) for pack in packs] for each in who])


@pytest.fixture(scope="module", params=["llama", "gemma3", "qwen3"])
def places(request, tmp_path_factory):
    """A base and two packs of it."""
    line, root = next(each for each in LINES if each.name == request.param), tmp_path_factory.mktemp("switch")
    base = line.write(root / "base")
    for pack, after in {"one": [line.depth - 1], "two": [0, line.depth - 1]}.items():
        model = plain(base)
        deepen.insert_blocks(model, plan_layout(line.depth, after=after))
        move(model)
        deepen.save_blocks(model, root / pack)
    return base, root / "one", root / "two"


@pytest.fixture
def model(places):
    base, one, two = places
    model = deepen.load(base, one, switch=deepen.Switch(decider=FirstToken()))
    return deepen.attach(model, two)


def alone(model, pack):
    """The model, from now on without its switch, with only `pack` on: a copy's sums may round otherwise."""
    deepen.set_switch(model, None)
    return deepen.activate(model, *([pack] if pack else []))


@torch.no_grad()
def test_each_row_is_answered_to_the_bit_as_decided(model):
    out = model(input_ids=IDS, attention_mask=MASK)
    assert tuple(decision.pack for decision in deepen.decisions(model)) == WHO
    for pack, rows in ROWS.items():
        wanted = alone(model, pack)(input_ids=IDS[rows], attention_mask=MASK[rows]).logits
        assert torch.equal(out.logits[rows], wanted)
    with deepen.bypass(model):
        base = model(input_ids=IDS[[0, 2]], attention_mask=MASK[[0, 2]])
        assert torch.equal(out.logits[[0, 2]], base.logits)
        whole = model(input_ids=IDS, attention_mask=MASK).logits
    assert not torch.allclose(out.logits[[1, 3]], whole[[1, 3]]), "the packs do something"


@torch.no_grad()
def test_a_batch_decided_for_the_base_is_the_base(model, places):
    base, rows = plain(places[0]), [0, 2]
    given = {"input_ids": IDS[rows], "attention_mask": MASK[rows]}
    assert torch.equal(model(**given, use_cache=False).logits, base(**given, use_cache=False).logits)
    options = {**given, "max_new_tokens": 8, "pad_token_id": PAD, "return_dict_in_generate": True}
    ours, theirs = (drawn(each, options) for each in (model, base))
    assert torch.equal(ours.sequences, theirs.sequences)
    assert all(torch.equal(a, b) for a, b in zip(ours.scores, theirs.scores, strict=True))


def drawn(model, options):
    torch.manual_seed(1)
    return model.generate(**options, output_scores=True, do_sample=True)


@torch.no_grad()
def test_a_cache_stays_with_what_was_decided(model):
    with pytest.raises(SwitchError, match="only with a KV cache that it began"):
        model(input_ids=IDS, past_key_values=DynamicCache(config=model.config))
    out = model(input_ids=IDS, attention_mask=MASK, use_cache=True)
    assert isinstance(out.past_key_values, RowCaches)
    assert out.past_key_values.get_seq_length() == IDS.shape[1]
    asked = len(model.__dict__["_deepen_switching"].switch.decider.seen)
    mask, step = torch.cat([MASK, torch.ones(4, 1, dtype=torch.long)], 1), torch.full((4, 1), 3)
    after = model(input_ids=step, attention_mask=mask, past_key_values=out.past_key_values)
    assert len(model.__dict__["_deepen_switching"].switch.decider.seen) == asked, "not decided again"
    for pack, rows in ROWS.items():
        other = alone(model, pack)
        cache = other(input_ids=IDS[rows], attention_mask=MASK[rows], use_cache=True).past_key_values
        wanted = other(input_ids=step[rows], attention_mask=mask[rows], past_key_values=cache)
        assert torch.equal(after.logits[rows], wanted.logits)


@pytest.mark.parametrize("more", [{}, {"num_beams": 2, "num_return_sequences": 2}], ids=["greedy", "beams"])
def test_generation_decides_once_a_prompt(model, more):
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": PAD, "eos_token_id": None, **more}
    out = model.generate(IDS, attention_mask=MASK, **options)
    assert tuple(decision.pack for decision in deepen.decisions(model)) == WHO
    assert [decision.tokens for decision in deepen.decisions(model)] == MASK.sum(1).tolist()
    assert len(model.__dict__["_deepen_switching"].switch.decider.seen) == 4
    several = more.get("num_return_sequences", 1)
    for pack, rows in ROWS.items():
        wanted = alone(model, pack).generate(IDS[rows], attention_mask=MASK[rows], **options)
        assert torch.equal(out.view(4, several, -1)[rows].flatten(0, 1), wanted)


def test_answers_that_end_early_are_padded(model):
    free = model.generate(
        IDS, attention_mask=MASK, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=PAD
    )
    # One row ends at what would be its third token; rows of other packs go on.
    end = int(free[1, IDS.shape[1] + 2])
    out = model.generate(
        IDS, attention_mask=MASK, max_new_tokens=6, do_sample=False, eos_token_id=end, pad_token_id=PAD
    )
    for row, (whole, ended) in enumerate(zip(free, out, strict=True)):
        new = whole[IDS.shape[1] :].tolist()
        length = IDS.shape[1] + (new.index(end) + 1 if end in new else 6)
        assert torch.equal(ended[:length], whole[:length]), row
        assert (ended[length:] == PAD).all()


def test_without_a_mask_padding_is_no_prompt(model):
    model.generate(IDS, max_new_tokens=1, pad_token_id=PAD, eos_token_id=2)
    assert tuple(decision.pack for decision in deepen.decisions(model)) == WHO


def test_the_loss_is_that_of_the_whole_batch(model):
    labels = IDS.masked_fill(MASK == 0, -100)
    out = model(input_ids=IDS, attention_mask=MASK, labels=labels)
    wanted = torch.nn.functional.cross_entropy(out.logits[:, :-1].transpose(1, 2), labels[:, 1:])
    torch.testing.assert_close(out.loss, wanted)
    summed = model(input_ids=IDS, attention_mask=MASK, labels=labels, num_items_in_batch=7).loss
    torch.testing.assert_close(summed, wanted * (labels[:, 1:] != -100).sum() / 7)


def test_only_the_first_tokens_are_read(places):
    decider = FirstToken()
    model = deepen.load(*places[:2], switch=deepen.Switch(decider=decider, prompt_tokens=2))
    model(input_ids=IDS, attention_mask=MASK)
    assert decider.seen == [[4, 20], [5, 9], [8, 21], [3, 70]]
    assert [decision.pack for decision in deepen.decisions(model)] == [None, "one", None, None]


def test_nothing_is_left_behind_by_an_exception(model):
    deepen.activate(model, "two", "one")
    before = list(model.base_model.layers)
    out = model(input_ids=IDS, attention_mask=MASK).logits

    def fail(*_):
        raise KeyboardInterrupt

    given = {"input_ids": IDS, "attention_mask": MASK}
    calls = (lambda: model(**given), lambda: model.generate(**given, max_new_tokens=2, pad_token_id=PAD))
    state = state_of(model)
    for block in (state.base[0], state.packs["one"].blocks[0], state.packs["two"].blocks[-1]):
        hook = block.register_forward_hook(fail)
        for call in calls:
            with pytest.raises(KeyboardInterrupt):
                call()
            assert list(model.base_model.layers) == before
            assert model.config.num_hidden_layers == len(before)
        hook.remove()
    assert torch.equal(model(input_ids=IDS, attention_mask=MASK).logits, out), "it decides again"
    assert list(model.base_model.layers) == before


def test_a_failing_decider_leaves_nothing_behind(model):
    decider = model.__dict__["_deepen_switching"].switch.decider
    decider.advantages = lambda model, prompts, packs: model.no_such_thing
    before = list(model.base_model.layers)
    with pytest.raises(AttributeError, match="no_such_thing"):
        model(input_ids=IDS)
    assert list(model.base_model.layers) == before
    del decider.advantages
    model(input_ids=IDS, attention_mask=MASK)
    assert tuple(decision.pack for decision in deepen.decisions(model)) == WHO


@torch.no_grad()
def test_a_copy_decides_for_itself_and_a_switch_comes_off(model):
    other = copy.deepcopy(model)
    other(input_ids=IDS[:1])
    assert len(deepen.decisions(other)) == 1
    assert deepen.decisions(model) == ()
    deepen.set_switch(other, None)
    assert type(other).forward is other.forward.__func__
    with pytest.raises(SwitchError, match="has no switch"):
        deepen.decisions(other)


def test_a_saved_pack_is_what_it_was(model, places, tmp_path):
    """What is on by hand is on again after a call, so the model is saved, trained and shown as ever."""
    deepen.activate(model, "one")
    model.generate(IDS, attention_mask=MASK, max_new_tokens=2, pad_token_id=PAD)
    deepen.save_blocks(model, tmp_path / "again")
    assert (tmp_path / "again/blocks.safetensors").read_bytes() == (
        places[1] / "blocks.safetensors"
    ).read_bytes()


REFUSED = [
    ({"inputs_embeds": torch.zeros(1, 2, 16)}, "give input_ids"),
    ({"input_ids": IDS, "return_dict": False}, "returns no tuples"),
    ({"input_ids": IDS, "attention_mask": MASK, "output_hidden_states": True}, "hidden_states of rows"),
    ({"input_ids": IDS, "attention_mask": MASK[None, None]}, "needs that of the input_ids"),
    ({"input_ids": IDS, "attention_mask": MASK, "pixel_values": torch.ones(4)}, "pixel_values"),
]


@pytest.mark.parametrize(("given", "words"), REFUSED, ids=[words for _, words in REFUSED])
def test_what_cannot_be_decided_is_refused(model, given, words):
    with pytest.raises(SwitchError, match=words):
        model(**given)


def test_generation_that_cannot_be_decided_is_refused(model):
    with pytest.raises(SwitchError, match="not from a KV cache"):
        model.generate(IDS, past_key_values=DynamicCache(config=model.config))
    with pytest.raises(SwitchError, match="return_dict_in_generate"):
        model.generate(IDS, attention_mask=MASK, return_dict_in_generate=True, pad_token_id=PAD)


def test_a_base_alone_has_nothing_to_switch(places):
    with pytest.raises(PackError, match="no record of new blocks"):
        deepen.load(places[0], switch="auto")
    with pytest.raises(SwitchError, match=r"switch\.json.*\n.*deepen blocks switch"):
        deepen.load(*places[:2], switch=places[2])
