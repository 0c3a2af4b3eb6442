import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoTokenizer, ByT5Tokenizer, LlamaTokenizer, PreTrainedTokenizerFast

from deepen.data.tokens import close, encode, end_of_text, token_dtype, tokenizer_digest
from deepen.errors import DataError

TRAINING = [
    "the cat sat on the mat, the dog did not",
    "naïve café — 天地玄黄 😀👍🏽 déjà vu",
    "x = {'a': 1}\n\treturn x",
]


def tiny_bpe(vocab_size: int = 320, eos: str | None = "<eos>") -> PreTrainedTokenizerFast:
    """A byte-level BPE made on the spot."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        TRAINING * 3, vocab_size=vocab_size, special_tokens=["<eos>"], show_progress=False
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token=eos)


def real_tokenizer(name: str, data: Path):
    if name == "stories260k":
        return AutoTokenizer.from_pretrained(data / "models/stories260k")
    if name == "llama2":
        return LlamaTokenizer.from_pretrained(data / "tokenizers/llama2")
    return PreTrainedTokenizerFast(
        tokenizer_file=str(data / "tokenizers/gpt2_tokenizer.json"), eos_token="<|endoftext|>"
    )


def test_digest_does_not_depend_on_where_the_tokenizer_lies_or_what_it_did(tmp_path):
    tokenizer = tiny_bpe()
    before = tokenizer_digest(tokenizer)
    tokenizer(["a b c d"], truncation=True, max_length=2)
    tokenizer.save_pretrained(tmp_path / "copy")
    assert tokenizer_digest(tokenizer) == before
    assert tokenizer_digest(AutoTokenizer.from_pretrained(tmp_path / "copy")) == before


def test_digest_sees_vocabulary_and_frame():
    digests = [tokenizer_digest(tiny_bpe()), tokenizer_digest(tiny_bpe(vocab_size=300))]
    added = tiny_bpe()
    added.add_tokens(["cat sat"])
    other_end = tiny_bpe(eos=None)
    other_end.eos_token = "a"
    digests += [tokenizer_digest(added), tokenizer_digest(other_end), tokenizer_digest(ByT5Tokenizer())]
    assert len(set(digests)) == 5


def test_digest_of_a_slow_tokenizer_is_stable():
    assert tokenizer_digest(ByT5Tokenizer()) == tokenizer_digest(ByT5Tokenizer())
    assert tokenizer_digest(ByT5Tokenizer()) != tokenizer_digest(ByT5Tokenizer(extra_ids=7))


def test_digest_sees_an_added_bos(data_dir):
    tokenizer = real_tokenizer("llama2", data_dir)
    framed = LlamaTokenizer.from_pretrained(data_dir / "tokenizers/llama2", add_bos_token=True)
    assert encode(tokenizer, ["a"]) != encode(framed, ["a"])
    assert tokenizer_digest(tokenizer) != tokenizer_digest(framed)


@pytest.mark.parametrize(
    ("ids", "closed"),
    [([5, 6], [5, 6, 9]), ([5, 9], [5, 9]), ([5, 9, 9], [5, 9]), ([9, 5], [9, 5, 9]), ([], [9])],
)
def test_close_ends_with_eos_exactly_once(ids, closed):
    assert close(ids, 9) == closed


def test_a_tokenizer_without_end_of_text_is_refused():
    with pytest.raises(DataError, match="no end-of-text token"):
        end_of_text(tiny_bpe(eos=None))


def test_token_dtype_is_the_smallest_that_holds_every_id():
    tokenizer = tiny_bpe()
    assert token_dtype(tokenizer) == np.uint16
    tokenizer.add_tokens([f"<extra{number}>" for number in range(70_000)])
    assert token_dtype(tokenizer) == np.uint32


def test_digest_is_a_function_of_the_pipeline_text():
    """Guard: where a call no longer sets truncation in the pipeline, leaving it out is dead code."""
    tokenizer = tiny_bpe()
    tokenizer(["a b c d"], truncation=True, max_length=2)
    assert json.loads(tokenizer.backend_tokenizer.to_str())["truncation"] is not None
