"""The vocabulary stage; its oracles are sentencepiece itself and transformers' tokenizers and models."""

import json
import math
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
import sentencepiece
import torch
from conftest import write_tiny_llama
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer

from deepen.checkpoint import Checkpoint
from deepen.cli import main
from deepen.errors import CheckpointError, DataError, TrainingError
from deepen.expansion import expand_checkpoint, verify_bytes
from deepen.methods import Rows
from deepen.model import base_fingerprint, load
from deepen.training.loss import summed_loss
from deepen.vocabulary import Text, extend_vocabulary
from deepen.vocabulary.corpus import Digest
from deepen.vocabulary.learn import learn_pieces
from deepen.vocabulary.measure import is_joined
from deepen.vocabulary.words import BYTES, Words, count_words

ENGLISH = [
    "Once upon a time there was a little girl who lived in a village near the forest.",
    "She wanted a red cap, and her grandmother gave her one for her birthday.",
    "Whenever she went out, the little girl wore it; everyone called her Red Riding Hood.",
    "The wolf ran as fast as he could through the forest, and the girl took the longest way.",
    "He lifted the latch, went straight to the bed and said: good morning, dear grandmother!",
]
FOREIGN = [
    "Die Großmutter wohnte draußen im Wald, eine halbe Stunde vom Dorf.",
    "Die Großmutter wohnte allein; draußen stand der Wolf und wünschte guten Tag.",
    "从前有个可爱的小姑娘，谁见了都喜欢，但最喜欢她的是她的奶奶。",
    "小姑娘说：奶奶，你的耳朵好大呀！奶奶说：小姑娘，为了更好地听你说话呀！",
]
PIECES, ROWS = 30, 416


class Case(NamedTuple):
    """A base and what was made of it."""

    base: Path
    out: Path
    old: object
    new: object
    record: dict


def write_sentencepiece(directory: Path) -> None:
    """A SentencePiece model as Llama's, the tokenizer.json that transformers makes of it, and a pad token."""
    text = directory / "english.txt"
    text.write_text("\n".join(ENGLISH * 20))
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(directory / "tokenizer"),
        model_type="bpe",
        vocab_size=400,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    text.unlink()
    (directory / "tokenizer.vocab").unlink()
    (directory / "tokenizer.json").unlink()
    config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "legacy": False}
    config |= {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert tokenizer.add_special_tokens({"pad_token": "<pad>"}) == 1
    tokenizer.backend_tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({**config, "pad_token": "<pad>"}))


def write_byte_level(directory: Path) -> None:
    """A byte-level BPE as GPT-2's, its end of text above the vocabulary, in three files."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        ENGLISH * 3, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer.model.save(str(directory))
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


def write_qwen(directory: Path) -> None:
    """The same for a class of transformers that builds its tokenizer anew from vocabulary and merges."""
    write_byte_level(directory)
    config = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|endoftext|>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


WRITERS = {"sentencepiece": write_sentencepiece, "byte_level": write_byte_level, "qwen": write_qwen}


def write_base(directory: Path, kind: str, **options) -> Path:
    write_tiny_llama(directory, vocab_size=ROWS, **{"blocks": 2, **options})
    WRITERS[kind](directory)
    return directory


def write_foreign(directory: Path) -> Path:
    directory.mkdir()
    for number, text in enumerate(FOREIGN):
        (directory / f"{number}.txt").write_text(text)
    return directory


@pytest.fixture(scope="module", params=WRITERS)
def case(request, tmp_path_factory) -> Case:
    folder = tmp_path_factory.mktemp(request.param)
    base = write_base(folder / "base", request.param)
    texts = [Text(path=str(write_foreign(folder / "foreign")))]
    out = folder / "out"
    extend_vocabulary(base, out, texts, pieces=PIECES, name="base")
    old, new = (AutoTokenizer.from_pretrained(where) for where in (base, out))
    return Case(base, out, old, new, json.loads((out / "vocabulary.json").read_text()))


def pieces_of(case: Case) -> set[str]:
    return {piece["text"] for piece in case.record["pieces"]}


def test_new_ids_follow_every_row_and_no_token_moves(case):
    old, new = case.old.get_vocab(), case.new.get_vocab()
    assert old.items() <= new.items()
    assert [piece["id"] for piece in case.record["pieces"]] == list(range(ROWS, ROWS + PIECES))
    assert {piece["id"]: piece["text"] for piece in case.record["pieces"]}.items() <= {
        number: token for token, number in new.items()
    }.items()
    assert len(case.new) == json.loads((case.out / "config.json").read_text())["vocab_size"] == ROWS + PIECES
    assert case.new.all_special_ids == case.old.all_special_ids
    assert case.new.add_tokens(["<added later>"]) == 1
    assert case.new.convert_tokens_to_ids("<added later>") == ROWS + PIECES


def test_a_text_without_a_new_piece_has_the_tokens_it_had(case):
    special = case.old.eos_token
    for text in [*ENGLISH, "  two  spaces\n\ttabs 1234 ", f"the end{special}again", "été ☂ 👍🏽", ""]:
        tokens = case.old(text)["input_ids"]
        assert not pieces_of(case) & set(case.new.convert_ids_to_tokens(case.new(text)["input_ids"]))
        assert case.new(text)["input_ids"] == tokens
        assert case.new.decode(tokens) == case.old.decode(tokens)


def test_the_text_it_was_learned_from_takes_fewer_tokens_and_comes_back(case):
    (text,) = case.record["texts"]
    counts = [[len(t(each, add_special_tokens=False)["input_ids"]) for each in FOREIGN] for t in case[2:4]]
    assert [text["tokens_before"], text["tokens_after"]] == [sum(counts[0]), sum(counts[1])]
    assert text["tokens_after"] < 0.8 * text["tokens_before"]
    assert text["characters"] == sum(map(len, FOREIGN))
    for each in FOREIGN:
        assert case.new.decode(case.new(each)["input_ids"], skip_special_tokens=True).strip() == each


def test_what_the_pieces_save_adds_up(case):
    (text,) = case.record["texts"]
    saved = sum(piece["saves"] for piece in case.record["pieces"])
    assert saved == text["tokens_before"] - text["tokens_after"]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_text_only_has_tokens_joined(case, data):
    words = sorted(pieces_of(case)) + " ".join(ENGLISH + FOREIGN).split()
    strange = st.text(st.characters(exclude_categories=["Cs"]), max_size=5)
    parts = st.lists(st.sampled_from(words).map(lambda w: w.replace("▁", " ").replace("Ġ", " ")) | strange)
    text = "".join(data.draw(parts))
    old, new = (t.backend_tokenizer.encode(text, add_special_tokens=False) for t in case[2:4])
    assert is_joined(old.tokens, new.tokens, pieces_of(case))
    assert case.new.decode(new.ids) == case.old.decode(old.ids)
    if (case.out / "tokenizer.model").exists():
        oracle = sentencepiece.SentencePieceProcessor(model_file=str(case.out / "tokenizer.model"))
        was = sentencepiece.SentencePieceProcessor(model_file=str(case.base / "tokenizer.model"))
        if was.encode(text) == old.ids:  # the two read some control characters apart, with or without us
            assert oracle.encode(text) == new.ids


def test_other_files_of_the_tokenizer_say_the_same(case):
    files = {path.name for path in case.out.iterdir()}
    assert files == {path.name for path in case.base.iterdir()} | {"vocabulary.json"}
    if "vocab.json" in files:
        model = models.BPE.from_file(str(case.out / "vocab.json"), str(case.out / "merges.txt"))
        other = Tokenizer(model)
        other.pre_tokenizer, other.normalizer = (
            case.new.backend_tokenizer.pre_tokenizer,
            normalizers.NFC(),
        )
        for text in FOREIGN:
            assert other.encode(text).ids == case.new(text)["input_ids"]
    else:
        shutil.copytree(case.out, alone := case.out.parent / "alone")
        (alone / "tokenizer.json").unlink()
        converted = AutoTokenizer.from_pretrained(alone)
        for text in [*FOREIGN, *ENGLISH]:
            assert converted(text)["input_ids"] == case.new(text)["input_ids"]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("dtype", "sharded"), [("float32", False), ("bfloat16", True), ("float16", False)])
def test_old_rows_keep_their_bytes_and_new_ones_are_means(tmp_path, tied, dtype, sharded):
    base = write_base(tmp_path / "base", "byte_level", tied=tied, dtype=dtype, sharded=sharded)
    foreign = write_foreign(tmp_path / "foreign")
    extend_vocabulary(base, tmp_path / "out", [Text(path=str(foreign))], pieces=8)
    old, new = (
        {name: tensor for file in where.glob("*.safetensors") for name, tensor in load_file(file).items()}
        for where in (base, tmp_path / "out")
    )
    record = json.loads((tmp_path / "out" / "vocabulary.json").read_text())
    tables = {"model.embed_tokens.weight"} | (set() if tied else {"lm_head.weight"})
    assert old.keys() == new.keys() >= tables
    for name, tensor in old.items():
        assert new[name].dtype == tensor.dtype
        assert torch.equal(new[name][: len(tensor)], tensor)
        if name in tables:
            expected = [tensor[piece["replaces"]].double().mean(0) for piece in record["pieces"]]
            assert torch.equal(new[name][len(tensor) :], torch.stack(expected).to(tensor.dtype))
        else:
            assert new[name].shape == tensor.shape
    loaded, found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(found.values())
    assert loaded.get_input_embeddings().weight.shape[0] == ROWS + 8


@pytest.mark.parametrize("head", ["parts", "average"])
def test_old_logits_stay_and_the_loss_rises_by_what_new_rows_take(case, tmp_path, head):
    texts = [Text(path=str(case.base.parent / "foreign"))]
    extend_vocabulary(case.base, tmp_path / "out", texts, pieces=PIECES, head=head)
    ids = case.old(ENGLISH[0], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        before, after = (
            AutoModelForCausalLM.from_pretrained(where)(ids).logits[0].double()
            for where in (case.base, tmp_path / "out")
        )
    torch.testing.assert_close(after[:, :ROWS], before, rtol=0, atol=1e-5)
    rise = after.logsumexp(-1) - before.logsumexp(-1)
    if head == "average":
        assert 0 < rise.max() <= math.log1p(PIECES / ROWS)
        mean = before.mean(-1)
        torch.testing.assert_close(after[:, ROWS], mean, rtol=0, atol=1e-4)
    else:
        rows = case.record["pieces"][0]["replaces"]
        torch.testing.assert_close(after[:, ROWS], before[:, rows].mean(-1), rtol=0, atol=1e-4)


def test_it_can_be_expanded(case, tmp_path):
    expand_checkpoint(case.out, tmp_path / "expanded", blocks=1)
    assert verify_bytes(case.out, tmp_path / "expanded").identical
    assert (tmp_path / "expanded" / "vocabulary.json").read_bytes() == (
        case.out / "vocabulary.json"
    ).read_bytes()


def test_on_bytes_alone_it_learns_what_the_trainer_learns():
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    plain = Tokenizer(
        models.BPE(vocab={sign: number for number, sign in enumerate(sorted(alphabet))}, merges=[])
    )
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words = count_words(plain, ENGLISH, in_characters=False)
    learned = learn_pieces(words, 60, plain.get_vocab(), in_characters=False)
    oracle = Tokenizer(models.BPE())
    oracle.pre_tokenizer = plain.pre_tokenizer
    trainer = trainers.BpeTrainer(vocab_size=256 + 60, initial_alphabet=alphabet, show_progress=False)
    oracle.train_from_iterator(ENGLISH, trainer)
    tokens = sum(len(plain.encode(text).ids) for text in ENGLISH) - sum(
        piece.saves for piece in learned.pieces
    )
    assert tokens == pytest.approx(sum(len(oracle.encode(text).ids) for text in ENGLISH), rel=0.03)
    first = [[left, right] for left, right in learned.merges[:5]]
    assert first == json.loads(oracle.to_str())["model"]["merges"][:5]


def test_a_lacking_character_is_worth_its_bytes():
    words = Words()
    for word, count in ((("a", "b"), 5), (("字",), 3), (("é",), 4), (("c", "d"), 2)):
        for _ in range(count):
            words.add(word)
    learned = learn_pieces(words, 3, {*"abcd", *BYTES}, in_characters=True)
    assert {piece.text: piece.saves for piece in learned.pieces} == {"字": 6, "é": 4, "ab": 5}
    assert learned.pieces[0].replaces == ("<0xE5>", "<0xAD>", "<0x97>")


def test_what_would_complete_an_old_piece_is_refused():
    words = Words()
    for _ in range(9):
        words.add(("scha", "f"))
    old = {"scha", "f", "t", "schaft", *BYTES}
    assert not learn_pieces(words, 3, old, in_characters=True).pieces
    assert [p.text for p in learn_pieces(words, 3, old, in_characters=False).pieces] == ["schaf"]


@pytest.mark.parametrize(
    ("old", "new", "joined"),
    [
        (["a", "b", "c"], ["ab", "c"], True),
        (["a", "b", "c"], ["a", "b", "c"], True),
        (["<0xC3>", "<0xA9>", "c"], ["é", "c"], True),
        (["a", "bc"], ["ab", "c"], False),
        (["a", "b", "c"], ["a", "bc"], False),  # joined, but to a piece that is not new
        (["a", "b", "c"], ["ab"], False),
        (["a", "b"], ["a", "b", "c"], False),
        (["a", "b"], ["ab", "ab"], False),
    ],
)
def test_the_check_can_fail(old, new, joined):
    assert is_joined(old, new, {"ab", "é"}) is joined


FORMS = {
    "text.jsonl": '{"text": "one\\ntwo"}\n',
    "alpaca.json": '[{"instruction": "one", "input": "", "output": "two"}]',
    "pairs.json": '[{"prompt": "one", "answer": "two"}]',
    "plain.txt": "one\ntwo",
}


@pytest.mark.parametrize("name", FORMS)
def test_corpora_come_in_many_forms(tmp_path, name):
    (tmp_path / name).write_text(FORMS[name])
    (tmp_path / "ignored.bin").write_text("x")
    assert list(Text(path=str(tmp_path)).documents()) == ["one\ntwo"]


def test_a_record_without_text_says_so(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"words": "one"}\n')
    with pytest.raises(DataError, match="no field 'text'; found words"):
        list(Text(path=str(tmp_path)).documents())
    assert list(Text(path=str(tmp_path), field="words").documents()) == ["one"]


def test_a_digest_keeps_documents_apart():
    digests = []
    for documents in (["ab", "c"], ["a", "bc"]):
        digest = Digest()
        assert list(digest.through(iter(documents))) == documents
        digests.append(digest.hex())
    assert len(set(digests)) == 2


def unigram(base: Path) -> None:
    state = Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0))
    (base / "tokenizer.json").write_text(state.to_str())


def too_many_tokens(base: Path) -> None:
    state = json.loads((base / "tokenizer.json").read_text())
    state["model"]["vocab"]["<far>"] = ROWS
    (base / "tokenizer.json").write_text(json.dumps(state))


def moved_token(base: Path) -> None:
    vocabulary = json.loads((base / "vocab.json").read_text())
    vocabulary["e"], vocabulary["t"] = vocabulary["t"], vocabulary["e"]
    (base / "vocab.json").write_text(json.dumps(vocabulary))


def another_format(base: Path) -> None:
    (base / "qwen.tiktoken").write_text("")


def other_rows(base: Path) -> None:
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "vocab_size": ROWS + 1}))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (unigram, "its tokenizer is Unigram"),
        (too_many_tokens, f"has the id {ROWS}, the model {ROWS} rows"),
        (moved_token, "vocab.json: token 'e' has the id"),
        (another_format, "qwen.tiktoken: holds the vocabulary too"),
        (other_rows, "is F32"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_base_that_cannot_be_extended_is_refused(tmp_path, spoil, said):
    base = write_base(tmp_path / "base", "byte_level")
    spoil(base)
    with pytest.raises(CheckpointError, match=said):
        extend_vocabulary(base, tmp_path / "out", [Text(path=str(write_foreign(tmp_path / "f")))], pieces=4)
    assert not (tmp_path / "out").exists()


def test_an_expanded_base_is_refused(case, tmp_path):
    expand_checkpoint(case.base, tmp_path / "expanded", blocks=1)
    with pytest.raises(CheckpointError, match="expanded already"):
        extend_vocabulary(tmp_path / "expanded", tmp_path / "out", [], pieces=4)


def test_a_text_that_teaches_nothing_is_refused(case, tmp_path):
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(DataError, match="nothing can be learned"):
        extend_vocabulary(case.base, tmp_path / "out", [Text(path=str(tmp_path / "a.txt"))], pieces=4)


def test_the_command_says_what_is_saved(case, tmp_path, capsys):
    (tmp_path / "english.txt").write_text("\n".join(ENGLISH))
    arguments = ["vocabulary", "extend", str(case.base), str(tmp_path / "out"), "--pieces", str(PIECES)]
    arguments += ["--text", str(case.base.parent / "foreign"), "--measure", str(tmp_path / "english.txt")]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert f"{ROWS} rows + {PIECES} new" in said
    assert "(+0.0%), 0 of 1 documents changed" in said
    assert main([*arguments, "--overwrite", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert [text["learned"] for text in facts["vocabulary"]["texts"]] == [True, False]
    assert main(arguments) == 2
    assert "exists already" in capsys.readouterr().err


def test_chinese_in_llama_2(data_dir, tmp_path):
    """Tokens per character fall by 40% on text that was not learned from; SentencePiece itself agrees."""
    base = write_tiny_llama(tmp_path / "base", blocks=1, vocab_size=32000, hidden_size=8, intermediate_size=8)
    (base / "tokenizer.json").unlink()
    shutil.copy(data_dir / "tokenizers" / "llama2" / "tokenizer.model", base)
    config = {"tokenizer_class": "LlamaTokenizer", "legacy": False, "bos_token": "<s>", "eos_token": "</s>"}
    (base / "tokenizer_config.json").write_text(json.dumps({**config, "unk_token": "<unk>"}))
    trace = data_dir / "trace" / "LLM-CL-Benchmark_500" / "C-STANCE"
    english = tmp_path / "english.txt"
    english.write_text((data_dir / "text" / "wikitext2-valid.txt").read_text()[:100_000])
    texts = [Text(path=str(trace / "train.json"))]
    texts += [Text(path=str(path), learned=False) for path in (trace / "test.json", english)]
    result = extend_vocabulary(base, tmp_path / "out", texts, pieces=1000)
    _, heldout, general = result.vocabulary.texts
    assert heldout.saved >= 0.4
    assert 0 <= general.saved < 0.01
    oracle = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "out" / "tokenizer.model"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    for document in texts[0].documents():
        assert oracle.encode(document) == tokenizer(document, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_only_new_rows_train_and_old_ones_keep_their_bytes(tmp_path, tied, dtype):
    base = write_base(tmp_path / "base", "byte_level", tied=tied, dtype=dtype)
    text = Text(path=str(write_foreign(tmp_path / "foreign")))
    extended = tmp_path / "extended"
    extend_vocabulary(base, extended, [text], pieces=PIECES)
    model, method, opened = load(extended), Rows(), Checkpoint.open(extended)
    tokenizer = AutoTokenizer.from_pretrained(extended)
    ids = tokenizer(FOREIGN[0] + ENGLISH[0], return_tensors="pt")["input_ids"][:, :64]
    assert (ids >= ROWS).any()
    before, digest = model(ids).logits, base_fingerprint(model, "full")
    trained = method.prepare(model)
    torch.testing.assert_close(model(ids).logits, before)
    assert len(trained) == (1 if tied else 2)
    assert {id(p) for p in trained.values()} == {id(p) for p in model.parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=0.1, weight_decay=0.5)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = summed_loss(model, ids[:, :-1], ids[:, 1:])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    held = {name: tensor.dtype for name, tensor in opened.tensors.items()}
    assert base_fingerprint(model, "full", held) == digest
    for name, saved_dtype in method.saved_dtypes(model, opened).items():
        assert saved_dtype == getattr(torch, dtype)
        trained[name].data = trained[name].data.to(saved_dtype).float()
    saved = method.save(model, tmp_path / "run", opened)
    old, new = load_file(base / "model.safetensors"), load_file(saved / "model.safetensors")
    first = load_file(extended / "model.safetensors")
    for name, tensor in old.items():
        assert torch.equal(new[name][: len(tensor)], tensor)
        if len(new[name]) > len(tensor):
            assert not torch.isclose(new[name][ROWS:], first[name][ROWS:]).all(1).any()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
        torch.testing.assert_close(load(saved)(ids).logits, model(ids).logits, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("tied", [False, True])
def test_gradients_of_new_rows_are_those_of_the_whole_table(tmp_path, tied):
    base = write_base(tmp_path / "base", "byte_level", tied=tied)
    extend_vocabulary(base, tmp_path / "out", [Text(path=str(write_foreign(tmp_path / "f")))], pieces=PIECES)
    model, whole = load(tmp_path / "out"), load(tmp_path / "out").requires_grad_(True)
    trained = Rows().prepare(model)
    ids = torch.arange(ROWS - 20, ROWS + 20)[None]
    summed_loss(model, ids[:, :-1], ids[:, 1:]).backward()
    oracle = torch.nn.functional.cross_entropy(whole(ids[:, :-1]).logits[0], ids[0, 1:], reduction="sum")
    oracle.backward()
    for name, parameter in trained.items():
        table = whole.get_parameter(name.replace(".new.", "."))
        torch.testing.assert_close(parameter.grad, table.grad[ROWS:], rtol=1e-4, atol=1e-5)


def test_rows_needs_an_extended_vocabulary(tiny_llama):
    with pytest.raises(TrainingError, match=r"no vocabulary\.json"):
        Rows().prepare(load(tiny_llama()))


@pytest.mark.parametrize("case", ["byte_level"], indirect=True)
def test_a_run_trains_new_rows(case, tmp_path):
    foreign = case.base.parent / "foreign"
    recipe = {
        "base": str(case.out),
        "output": str(tmp_path / "run"),
        "data": {
            "sequence_length": 32,
            "sources": [{"path": str(foreign)}],
            "cache": str(tmp_path / "cache"),
        },
        "train": {"method": "rows", "tokens": 1024, "batch_tokens": 128, "learning_rate": 0.05},
        "evaluate": {"domain": [{"path": str(foreign)}]},
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    assert main(["run", str(tmp_path / "recipe.yaml"), "--json"]) == 0
    assert json.loads((tmp_path / "run" / "result.json").read_text())["audit"]["unchanged"]
    old, new = (load_file(where / "model.safetensors") for where in (case.base, tmp_path / "run" / "model"))
    for name, tensor in old.items():
        assert torch.equal(new[name][: len(tensor)], tensor)
    assert (tmp_path / "run" / "model" / "tokenizer.json").read_bytes() == (
        case.out / "tokenizer.json"
    ).read_bytes()
