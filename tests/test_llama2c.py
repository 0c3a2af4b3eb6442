"""A llama2.c file becomes the Llama it was: weights, logits, tokens; anything else is refused."""

import io
import json
import os
import random
import struct
import subprocess
import sys
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
from conftest import write_tiny_llama
from safetensors.numpy import load_file
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from deepen.cli import main
from deepen.errors import CheckpointError, OutputError
from deepen.interchange import import_llama2c

MAGIC = 0x616B3432
SIZES = {"dim": 8, "hidden": 12, "layers": 2, "heads": 2, "kv_heads": 1, "vocab": 300, "seq_len": 16}
BYTES = [b"<0x%02X>" % byte for byte in range(256)]
RESERVED = [b"<unk>", b"\n<s>\n", b"\n</s>\n", *BYTES]


def to_meta(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Hugging Face's rows (j and j + half rotate together) in Meta's order (2j and 2j + 1)."""
    rows, columns = weight.shape
    return weight.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)


def write_bin(model, path: Path, version: int) -> None:
    """What llama2.c's export.py writes: `legacy_export` and `version1_export`."""
    config, weights = model.config, model.state_dict()
    untied = not config.tie_word_embeddings

    def layers(name, heads=None):
        found = [weights[f"model.layers.{i}.{name}.weight"] for i in range(config.num_hidden_layers)]
        return [to_meta(weight, heads) for weight in found] if heads else found

    norms = layers("input_layernorm"), layers("post_attention_layernorm")
    attention = [
        *layers("self_attn.q_proj", config.num_attention_heads),
        *layers("self_attn.k_proj", config.num_key_value_heads),
        *layers("self_attn.v_proj"),
        *layers("self_attn.o_proj"),
    ]
    forward = [*layers("mlp.gate_proj"), *layers("mlp.down_proj"), *layers("mlp.up_proj")]
    embedding, final = weights["model.embed_tokens.weight"], weights["model.norm.weight"]
    classifier = [weights["lm_head.weight"]] if untied else []
    sizes = [config.hidden_size, config.intermediate_size, config.num_hidden_layers]
    sizes += [config.num_attention_heads, config.num_key_value_heads]
    sizes += [-config.vocab_size if untied and version == 0 else config.vocab_size]
    sizes += [config.max_position_embeddings]
    if version == 1:
        head = struct.pack("<Ii7iB", MAGIC, 1, *sizes, not untied).ljust(256, b"\0")
        order = [*norms[0], *norms[1], final, embedding, *attention, *forward, *classifier]
    else:
        head = struct.pack("<7i", *sizes)
        width = config.hidden_size // config.num_attention_heads
        angles = torch.outer(
            torch.arange(config.max_position_embeddings), 10000.0 ** -(torch.arange(0, width, 2) / width)
        )
        tables = [angles.cos(), angles.sin()]
        order = [embedding, *norms[0], *attention, *norms[1], *forward, final, *tables, *classifier]
    path.write_bytes(head + b"".join(tensor.contiguous().numpy().tobytes() for tensor in order))


def toy(version: int, *, shared: bool = True, fill: bytes | None = None, **changes: int) -> bytes:
    """A file of `SIZES`; `changes` lie about them."""
    dim, hidden, layers, heads, kv_heads, vocab, seq_len = SIZES.values()
    narrow = dim // heads * kv_heads
    count = vocab * dim * (1 if shared else 2) + dim
    count += layers * (2 * dim + 2 * dim * dim + 2 * narrow * dim + 3 * hidden * dim)
    count += seq_len * (dim // heads) if version == 0 else 0  # the rotary tables, left zero
    stated = {**SIZES, **changes}
    if version == 0:
        head = struct.pack("<7i", *({**stated, "vocab": stated["vocab"] * (1 if shared else -1)}).values())
    else:
        head = struct.pack("<Ii7iB", MAGIC, version, *stated.values(), shared).ljust(256, b"\0")
    return head + (fill or bytes(4)) * count


def token_bin(tokens: list[tuple[float, bytes]], longest: int | None = None) -> bytes:
    longest = max(len(text) for _, text in tokens) if longest is None else longest
    packed = (struct.pack("<fi", score, len(text)) + text for score, text in tokens)
    return struct.pack("<i", longest) + b"".join(packed)


def vocabulary(*pieces: bytes) -> list[tuple[float, bytes]]:
    """`SIZES["vocab"]` tokens: the reserved ones, `pieces`, letters to fill it up; scores fall."""
    letters = [chr(0x100 + i).encode() for i in range(SIZES["vocab"] - len(RESERVED) - len(pieces))]
    scored = [(-float(i), piece) for i, piece in enumerate([*pieces, *letters])]
    return [(0.0, text) for text in RESERVED] + scored


def encode_as_run_c(tokens: list[tuple[float, bytes]], text: str) -> list[int]:
    """`encode` of llama2.c's run.c: characters or their bytes, then the best pair until none is left."""
    ids = {piece: index for index, (_, piece) in enumerate(tokens)}
    found = [ids[b" "]] if text else []
    for character in text:
        data = character.encode()
        found += [ids[data]] if data in ids else [byte + 3 for byte in data]
    while True:
        unions = [ids.get(tokens[a][1] + tokens[b][1]) for a, b in pairwise(found)]
        places = [i for i, union in enumerate(unions) if union is not None]
        if not places:
            return found
        best = max(places, key=lambda i: (tokens[unions[i]][0], -i))
        found[best : best + 2] = [unions[best]]


def read_bin(path: Path) -> list[tuple[float, bytes]]:
    data, offset, tokens = path.read_bytes(), 4, []
    while offset < len(data):
        score, length = struct.unpack_from("<fi", data, offset)
        tokens.append((score, data[offset + 8 : offset + 8 + length]))
        offset += 8 + length
    return tokens


def real_lines(data_dir: Path, each: int) -> list[str]:
    """Lines of every kind of text there is, none of which spells out a special token."""
    paths = [path for path in sorted((data_dir / "text").rglob("*")) if path.is_file()]
    lines = [
        "",
        " ",
        "   ",
        "a  b",
        " a ",
        "\t\n x",
        "naïve 日本語 🙂",
        "x" * 50,
        " " * 37,
        "é\u0301",
        "\ufeff",
    ]
    for path in paths:
        with path.open(encoding="utf-8") as file:
            lines += [line[:400] for line in islice(file, each)]
    return [line for line in lines if "<s>" not in line and "</s>" not in line and "<unk>" not in line]


def disagreeing(directory: Path, lines: list[str], expected) -> list[str]:
    ours = Tokenizer.from_file(str(directory / "tokenizer.json"))
    return [line for line in lines if ours.encode(line, add_special_tokens=False).ids != expected(line)]


@pytest.fixture
def stories(data_dir, tmp_path):
    source = data_dir / "models" / "stories260k-llama2c"
    out = tmp_path / "stories"
    files = [str(source / "stories260K.bin"), str(out), "--tokenizer", str(source / "tok512.bin")]
    assert main(["import", "llama2c", *files]) == 0
    return out


def test_stories260k_is_the_published_hugging_face_model(stories, data_dir):
    published = data_dir / "models" / "stories260k"
    ours, theirs = (load_file(place / "model.safetensors") for place in (stories, published))
    assert ours.keys() == theirs.keys()
    assert not [name for name in ours if ours[name].tobytes() != theirs[name].tobytes()]
    assert json.loads((stories / "config.json").read_text()) == json.loads(
        (published / "config.json").read_text()
    )
    assert sorted(path.name for path in stories.iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def test_tokenizer_bin_agrees_with_hugging_face_and_with_run_c(stories, data_dir):
    published = Tokenizer.from_file(str(data_dir / "models" / "stories260k" / "tokenizer.json"))
    lines = real_lines(data_dir, 200)
    assert len(lines) > 4000
    assert not disagreeing(stories, lines, lambda line: published.encode(line, add_special_tokens=False).ids)
    tokens = read_bin(data_dir / "models" / "stories260k-llama2c" / "tok512.bin")
    # llama2.c has no token for U+2581, which stands for a space in both others.
    short = [line[:120] for line in lines[:11] + lines[11::15] if "▁" not in line]
    assert not disagreeing(stories, short, lambda line: encode_as_run_c(tokens, line))


def test_transformers_loads_the_tokenizer(stories, data_dir):
    ours = AutoTokenizer.from_pretrained(stories)
    theirs = AutoTokenizer.from_pretrained(data_dir / "models" / "stories260k")
    for line in real_lines(data_dir, 5):
        ids = ours(line).input_ids
        assert ids == theirs(line).input_ids
        assert ids[0] == ours.bos_token_id == 1
        assert ours.decode(ids) == theirs.decode(ids)
        assert ours.decode(ids, skip_special_tokens=True) == line
    assert (ours.eos_token_id, ours.model_max_length) == (2, 512)


def test_stories260k_is_expanded_and_verified(stories, tmp_path, capsys):
    assert main(["expand", str(stories), str(tmp_path / "expanded"), "--after", "1,4"]) == 0
    capsys.readouterr()
    assert main(["verify", str(stories), str(tmp_path / "expanded"), "--logits", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["identical"] is True


@pytest.mark.parametrize("version", [0, 1])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (2, 1), (1, 1)])
def test_logits_are_those_of_the_model_that_was_exported(tmp_path, version, tied, heads, kv_heads):
    options = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "rms_norm_eps": 1e-5}
    base = write_tiny_llama(tmp_path / "base", blocks=3, tied=tied, **options)
    model = AutoModelForCausalLM.from_pretrained(base)
    write_bin(model, tmp_path / "model.bin", version)
    result = import_llama2c(tmp_path / "model.bin", tmp_path / "out")
    imported = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.randint(0, 96, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(imported(ids).logits, model(ids).logits)
    weights = load_file(tmp_path / "out" / "model.safetensors")
    theirs = load_file(base / "model.safetensors")
    assert {name: weight.tobytes() for name, weight in weights.items()} == {
        name: weight.tobytes() for name, weight in theirs.items()
    }
    assert imported.dtype == torch.float32
    assert (result.version, result.tokenizer) == (version, ())
    assert result.parameters == sum(weight.size for weight in weights.values())
    config = AutoConfig.from_pretrained(tmp_path / "out")
    assert config.rope_parameters["rope_theta"] == 10000.0
    assert (config.bos_token_id, config.eos_token_id) == (1, 2)
    assert (config.max_position_embeddings, config.tie_word_embeddings) == (64, tied)


def test_a_sentencepiece_model_is_kept_and_written_exactly(data_dir, tmp_path):
    source = data_dir / "tokenizers" / "llama2" / "tokenizer.model"
    file = tmp_path / "model.bin"
    small = {"num_attention_heads": 1, "num_key_value_heads": 1, "hidden_size": 2, "intermediate_size": 2}
    write_bin(
        AutoModelForCausalLM.from_pretrained(
            write_tiny_llama(tmp_path / "base", blocks=1, vocab_size=32000, **small)
        ),
        file,
        1,
    )
    result = import_llama2c(file, tmp_path / "out", source)
    assert result.warnings == ()
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == source.read_bytes()
    piece = sentencepiece.SentencePieceProcessor(model_file=str(source))
    lines = real_lines(data_dir, 200)
    assert not disagreeing(tmp_path / "out", lines, piece.encode)
    loaded = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert [loaded(line).input_ids for line in lines[:200]] == [[1, *piece.encode(x)] for x in lines[:200]]


def train(lines: list[str], **options) -> bytes:
    model = io.BytesIO()
    settings = {"model_type": "bpe", "byte_fallback": True, "character_coverage": 1.0, "minloglevel": 3}
    settings |= {"normalization_rule_name": "identity", "vocab_size": 300, "hard_vocab_limit": False}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, num_threads=1, **{**settings, **options}
    )
    return model.getvalue()


def import_with_model(tmp_path: Path, model: bytes):
    vocab = sentencepiece.SentencePieceProcessor(model_proto=model).vocab_size()
    base = write_tiny_llama(tmp_path / "base", blocks=1, vocab_size=vocab)
    write_bin(AutoModelForCausalLM.from_pretrained(base), tmp_path / "model.bin", 1)
    (tmp_path / "tokenizer.model").write_bytes(model)
    return import_llama2c(tmp_path / "model.bin", tmp_path / "out", tmp_path / "tokenizer.model")


@pytest.mark.parametrize("remove", [True, False])
def test_a_sentencepiece_model_of_few_letters_is_written_exactly(tmp_path, remove):
    """Few letters make many ways to cut the same text; so does `remove_extra_whitespaces`."""
    draw = random.Random(0)
    lines = ["".join(draw.choice("aabc ") for _ in range(40)) for _ in range(300)]
    model = train(lines, remove_extra_whitespaces=remove)
    assert import_with_model(tmp_path, model).warnings == ()
    piece = sentencepiece.SentencePieceProcessor(model_proto=model)
    texts = ["".join(draw.choice("aabc  é\n") for _ in range(draw.randint(0, 60))) for _ in range(2000)]
    assert not disagreeing(tmp_path / "out", texts, piece.encode)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"normalization_rule_name": "nmt_nfkc"}, "it normalises text"),
        ({"add_dummy_prefix": False}, "it does not put a space first"),
        ({"user_defined_symbols": ["ab"]}, "tokens of its user's"),
        ({"byte_fallback": False}, "token 3 is"),
        ({"model_type": "unigram"}, "it is not a BPE model"),
    ],
)
def test_a_sentencepiece_model_that_cannot_be_exact_is_kept_alone(tmp_path, options, reason):
    draw = random.Random(0)
    lines = ["".join(draw.choice("aabcdefgh ") for _ in range(40)) for _ in range(300)]
    result = import_with_model(tmp_path, train(lines, **options))
    assert len(result.warnings) == 1
    assert reason in result.warnings[0]
    assert result.tokenizer == ("tokenizer.model", "tokenizer_config.json")
    assert not (tmp_path / "out" / "tokenizer.json").exists()
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("abc").input_ids[0] == 1


def test_random_vocabularies_agree_with_run_c(tmp_path):
    draw = random.Random(0)
    for _ in range(20):
        pieces = {"".join(draw.choice(" ab") for _ in range(draw.randint(2, 6))) for _ in range(30)} | {
            *" ab"
        }
        tokens = vocabulary(*(piece.encode() for piece in draw.sample(sorted(pieces), len(pieces))))
        (tmp_path / "model.bin").write_bytes(toy(1))
        (tmp_path / "tok.bin").write_bytes(token_bin(tokens))
        import_llama2c(tmp_path / "model.bin", tmp_path / "out", tmp_path / "tok.bin", overwrite=True)
        texts = ["".join(draw.choice(" abé") for _ in range(draw.randint(0, 30))) for _ in range(50)]
        assert not disagreeing(tmp_path / "out", texts, lambda text, t=tokens: encode_as_run_c(t, text))


def test_runs_of_one_character_may_share_a_score(tmp_path):
    """Llama 2's runs of spaces do."""
    tokens = vocabulary(b"  ", b"   ", b"    ", b" ", b"a", b" a")
    tokens = [(-1e9 if text.strip(b" ") == b"" and len(text) > 1 else s, text) for s, text in tokens]
    (tmp_path / "model.bin").write_bytes(toy(1))
    (tmp_path / "tok.bin").write_bytes(token_bin(tokens))
    import_llama2c(tmp_path / "model.bin", tmp_path / "out", tmp_path / "tok.bin")
    texts = [" " * i + "a" + " " * j for i in range(13) for j in range(13)]
    assert not disagreeing(tmp_path / "out", texts, lambda text: encode_as_run_c(tokens, text))


def test_json_is_one_object(tmp_path, capsys):
    (tmp_path / "model.bin").write_bytes(toy(0, shared=False))
    assert main(["import", "llama2c", str(tmp_path / "model.bin"), str(tmp_path / "out"), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["version"], said["directory"], said["tokenizer"]) == (0, str(tmp_path / "out"), [])
    assert said["bytes_written"] == (tmp_path / "out" / "model.safetensors").stat().st_size
    assert main(["import", "llama2c", str(tmp_path / "model.bin"), str(tmp_path / "two")]) == 0
    assert "no tokenizer" in capsys.readouterr().out


def test_an_unusual_number_keeps_its_bits(tmp_path):
    odd = struct.pack("<I", 0x7FA00001)  # a signalling NaN with a payload
    (tmp_path / "model.bin").write_bytes(toy(1, fill=odd))
    import_llama2c(tmp_path / "model.bin", tmp_path / "out")
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert all((weight.view(np.uint32) == 0x7FA00001).all() for weight in weights.values())


def replace(data: bytes, offset: int, value: bytes) -> bytes:
    return data[:offset] + value + data[offset + len(value) :]


MODELS = {
    "empty": (b"", "0 bytes"),
    "a few bytes": (b"ak42", "4 bytes"),
    "v0 header alone": (toy(0)[:28], "truncated"),
    "v1 header cut": (toy(1)[:100], "100 bytes"),
    "v1 header alone": (toy(1)[:256], "truncated"),
    "v0 one byte short": (toy(0)[:-1], "truncated"),
    "v1 one byte short": (toy(1)[:-1], "truncated"),
    "v0 trailing bytes": (toy(0) + b"\0", "1 bytes follow"),
    "v1 trailing bytes": (toy(1) + bytes(400), "400 bytes follow"),
    "v0 untied, classifier missing": (toy(0, shared=False)[:-9600], "truncated"),
    "v1 untied, said to be shared": (replace(toy(1, shared=False), 36, b"\1"), "9600 bytes follow"),
    "v1 shared, said to be untied": (replace(toy(1), 36, b"\0"), "truncated"),
    "v1 flag 2": (replace(toy(1), 36, b"\2"), "shared-classifier byte is 2"),
    "v2": (toy(2), "version 2 holds int8"),
    "v3": (toy(3), "version 3"),
    "version -1": (toy(-1), "version -1"),
    "version 0 with magic": (replace(toy(1), 4, bytes(4)), "version 0"),
    "big-endian": (b"ak42" + toy(1)[4:], "big-endian"),
    "wrong magic": (replace(toy(1), 0, b"xxxx"), "magic 'ak42'"),
    "GGUF": (b"GGUF" + struct.pack("<IQQ", 3, 2, 5) + bytes(100), "magic 'ak42'"),
    "zip (a torch file)": (b"PK\x03\x04" + bytes(200), "magic 'ak42'"),
    "safetensors": (struct.pack("<Q", 40) + b'{"a":{"dtype":"F32","shape":[0]}}' * 3, "magic 'ak42'"),
    "text": (b"<!DOCTYPE html><html><head><title>Not found", "magic 'ak42'"),
    **{
        f"v{version} {name} {value}": (toy(version, **{name: value}), stated)
        for version in (0, 1)
        for name, stated in [
            ("dim", "dim"),
            ("hidden", "hidden_dim"),
            ("layers", "n_layers"),
            ("heads", "heads"),
            ("kv_heads", "n_kv_heads"),
            ("vocab", "vocab_size"),
            ("seq_len", "seq_len"),
        ]
        for value in (0, -1, 2**31 - 1, -(2**31))
    },
    "heads do not divide": (toy(1, heads=3), "3 heads do not divide"),
    "odd heads": (toy(1, heads=8), "width 1"),
    "kv heads do not divide": (toy(1, dim=12, heads=6, kv_heads=4), "n_kv_heads 4"),
    "more kv heads than heads": (toy(1, kv_heads=4), "n_kv_heads 4"),
    "vocabulary of 2": (toy(1, vocab=2), "vocab_size 2"),
    "other rotary base": (toy(0, fill=struct.pack("<f", 0.5)), "base 10000"),
    "rotary NaN": (toy(0, fill=struct.pack("<f", float("nan"))), "base 10000"),
}
GOOD = vocabulary(b" ", b"a", b"b", b"ab", b" a")
TOKENIZERS = {
    "empty": (b"", "neither"),
    "text": (b"hello, this is text", "neither"),
    "json": (b'{"version": "1.0"}', "neither"),
    "length alone": (struct.pack("<i", 7), "0 is missing"),
    "cut in a token's numbers": (token_bin(GOOD)[:-8], "token 299: the file ends"),
    "cut in a token's text": (token_bin(GOOD)[:-1], "token 299: the file ends"),
    "trailing bytes": (token_bin(GOOD) + b"\0", "token 300: the file ends"),
    "one token too few": (token_bin(GOOD[:-1]), "299 tokens"),
    "one token too many": (token_bin([*GOOD, (-99.0, "é".encode())]), "301 tokens"),
    "length beyond the longest": (token_bin(GOOD, longest=5), "longest token has 5"),
    "length 0": (token_bin([*GOOD[:-1], (-9.0, b"")]), "states 0 bytes"),
    "negative length": (
        replace(token_bin(GOOD), 8, struct.pack("<i", -5)),
        "token 0: states -5 bytes",
    ),
    "not UTF-8": (token_bin([*GOOD[:-1], (-9.0, b"\xff\xfe")]), "not UTF-8"),
    "repeated": (token_bin([*GOOD[:-1], (-9.0, b"ab")]), "repeats 'ab'"),
    "NaN score": (token_bin([*GOOD[:-1], (float("nan"), b"zz")]), "score nan"),
    "infinite score": (token_bin([*GOOD[:-1], (float("inf"), b"zz")]), "score inf"),
    "old bytes": (token_bin([*GOOD[:3], *[(0.0, b"\1")] * 256, *GOOD[259:]]), "token 3 is"),
    "a token of 2000 characters": (token_bin([*GOOD[:-1], (-9.0, b"z" * 2000)]), "2000 characters"),
    "too long": (bytes((16 << 20) + 1), "too long for a tokenizer"),
    "tied": (token_bin([*GOOD[:-1], (-3.0, b"ba")]), "'ab' and 'ba' have equal scores"),
    "damaged protobuf": (b"\n\xff\xff\xff\xff", "SentencePiece model"),
    "empty protobuf message": (b"\n\x01\x0a", "SentencePiece model"),
}


def assert_refused(arguments: list[str], file: Path, said: str, directory: Path, capsys) -> None:
    before = sorted(directory.rglob("*"))
    assert main(["import", "llama2c", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) <= 2
    assert str(file) in err
    assert said in err
    assert sorted(directory.rglob("*")) == before


@pytest.mark.parametrize("case", MODELS)
def test_malformed_model(case, tmp_path, capsys):
    content, said = MODELS[case]
    file = tmp_path / "model.bin"
    file.write_bytes(content)
    assert_refused([str(file), str(tmp_path / "new" / "out")], file, said, tmp_path, capsys)


@pytest.mark.parametrize("case", TOKENIZERS)
def test_malformed_tokenizer(case, tmp_path, capsys):
    content, said = TOKENIZERS[case]
    model, file = tmp_path / "model.bin", tmp_path / "tok.bin"
    model.write_bytes(toy(1))
    file.write_bytes(content)
    arguments = [str(model), str(tmp_path / "out"), "--tokenizer", str(file)]
    assert_refused(arguments, file, said, tmp_path, capsys)


def test_the_tables_start_from_files_that_are_imported(tmp_path):
    (tmp_path / "tok.bin").write_bytes(token_bin(GOOD))
    for version, shared in ((0, True), (0, False), (1, True), (1, False)):
        (tmp_path / "model.bin").write_bytes(toy(version, shared=shared))
        import_llama2c(tmp_path / "model.bin", tmp_path / f"out{version}{shared}", tmp_path / "tok.bin")


@pytest.mark.parametrize("which", ["model", "tokenizer"])
@pytest.mark.parametrize("kind", ["absent", "directory", "pipe", "below a file"])
def test_no_file(which, kind, tmp_path, capsys):
    good, file = tmp_path / "good.bin", tmp_path / "odd"
    good.write_bytes(toy(1))
    if kind == "directory":
        file.mkdir()
    elif kind == "pipe":
        os.mkfifo(file)
    elif kind == "below a file":
        file = good / "x"
    model = file if which == "model" else good
    arguments = [str(model), str(tmp_path / "out"), *(["--tokenizer", str(file)] * (which == "tokenizer"))]
    assert_refused(arguments, file, "", tmp_path, capsys)


def test_output_that_exists_is_kept_unless_told(tmp_path, capsys):
    file, out = tmp_path / "model.bin", tmp_path / "out"
    file.write_bytes(toy(1))
    out.mkdir()
    (out / "precious").write_text("mine")
    assert_refused([str(file), str(out)], out, "exists already", tmp_path, capsys)
    assert main(["import", "llama2c", str(file), str(out), "--overwrite"]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "model.safetensors"]


def test_output_that_holds_the_model_is_refused(tmp_path):
    (tmp_path / "model.bin").write_bytes(toy(1))
    with pytest.raises(OutputError, match="holds the input"):
        import_llama2c(tmp_path / "model.bin", tmp_path, overwrite=True)
    assert (tmp_path / "model.bin").exists()


def test_a_file_that_shrinks_leaves_nothing(tmp_path):
    file = tmp_path / "model.bin"
    file.write_bytes(toy(1))

    def shrink(done: int, total: int) -> None:
        os.truncate(file, 300)

    with pytest.raises(CheckpointError, match="shrunk"):
        import_llama2c(file, tmp_path / "out", progress=shrink)
    assert list(tmp_path.iterdir()) == [file]


def test_progress_ends_at_all_bytes(tmp_path):
    (tmp_path / "model.bin").write_bytes(toy(0))
    seen: list[tuple[int, int]] = []
    import_llama2c(tmp_path / "model.bin", tmp_path / "out", progress=lambda *step: seen.append(step))
    assert seen[-1][0] == seen[-1][1]
    assert seen == sorted(seen)


def test_random_headers_are_refused_or_imported(tmp_path, capsys):
    draw, file = random.Random(0), tmp_path / "model.bin"
    for _ in range(300):
        data = bytearray(toy(draw.choice([0, 1])))
        for _ in range(draw.randint(1, 6)):
            data[draw.randrange(60)] = draw.choice([0, 1, 2, 0x7F, 0x80, 0xFF, draw.randrange(256)])
        file.write_bytes(data)
        out = tmp_path / "out"
        code = main(["import", "llama2c", str(file), str(out), "--overwrite"])
        assert code in (0, 2)
        assert len(capsys.readouterr().err.splitlines()) <= 2


def test_memory_stays_small(tmp_path):
    """A file of 400 MB, a hole on the disk, passes through less than 64 MB."""
    sizes = (2048, 5504, 2, 16, 16, 20000, 128)
    weights = 20000 * 2048 + 2048 + 2 * (2 * 2048 + 4 * 2048 * 2048 + 3 * 2048 * 5504)
    with (tmp_path / "model.bin").open("wb") as file:
        file.write(struct.pack("<Ii7iB", MAGIC, 1, *sizes, 1))
        file.truncate(256 + 4 * weights)
    script = (
        "import resource, sys; from deepen.interchange import import_llama2c\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = peak(); import_llama2c(*sys.argv[1:]); print(peak() - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "model.bin", tmp_path / "out"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert 4 * weights > 400e6
    assert int(done.stdout) < 64_000
