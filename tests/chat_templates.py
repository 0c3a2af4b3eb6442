"""Chat templates as models publish them, each with the marked version that says which text is generated."""

from importlib.resources import files

from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedTokenizerFast

TEXTS = ["the cat sat on the mat, the dog did not", "naïve café — 天地 😀", "x = {'a': 1}\n\treturn x\n\n\n"]
SPECIAL = [
    *("<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|start_header_id|>"),
    *("<|end_header_id|>", "<start_of_turn>", "<end_of_turn>", "<|end|>", "<|user|>", "<|assistant|>"),
    *("<|system|>", "<tool_call>", "</tool_call>"),
]


def chat_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE made on the spot that has every template's special tokens."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(TEXTS * 3, vocab_size=380, special_tokens=SPECIAL, show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, bos_token="<s>", eos_token="</s>")
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL[3:]})
    return tokenizer


def published(name: str) -> str:
    """A template that TRL holds as its model publishes it."""
    return (files("trl") / "chat_templates" / f"{name}.jinja").read_text()


def marked(name: str) -> str:
    """TRL's own version of a published template, for `assistant_only_loss`."""
    return published(f"{name}_training")


def marking(source: str, *turns: str) -> str:
    """Set generation marks around what a template writes for a turn of the assistant."""
    for turn in turns:
        assert source.count("{{- " + turn + " }}") == 1, turn
        source = source.replace(
            "{{- " + turn + " }}", "{%- generation %}{{- " + turn + " }}{%- endgeneration %}"
        )
    return source


def split_turn(source: str, line: str, head: str, body: str) -> str:
    """Cut the line that writes any turn into its head and a body, marked where the assistant speaks."""
    assert source.count("{{- " + line + " }}") == 1, line
    marked_body = "{%- generation %}{{- " + body + " }}{%- endgeneration %}"
    parts = (
        "{%- if message['role'] == 'assistant' %}{{- " + head + " }}" + marked_body
        + "{%- else %}{{- " + line + " }}{%- endif %}"
    )  # fmt: skip
    return source.replace("{{- " + line + " }}", parts)
