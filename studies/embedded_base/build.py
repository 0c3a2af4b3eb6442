"""Make what the embedded base is pretrained from: texts, a tokenizer, and a Llama with random weights.

    python studies/embedded_base/build.py WORK      writes WORK/{general.jsonl, heldout.jsonl, random/}
    deepen run studies/embedded_base/recipe.yaml    pretrains it
    python studies/embedded_base/ship.py RUN        puts the result into the package

The text is English prose that an installation holds: docstrings and help topics of the standard library,
docstrings of the packages in constraints.txt. The held-out part is the standard library's alone.
"""

import json
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from deepen.demo.text import help_topics, is_heldout, module_name, modules_below, prose, standard_library

PACKAGES = (
    *("datasets", "fsspec", "huggingface_hub", "hypothesis", "jinja2", "matplotlib", "mpmath", "networkx"),
    *("numpy", "pandas", "pip", "pydantic", "pytest", "rich", "safetensors", "scipy", "sympy", "tokenizers"),
    *("torch", "transformers", "typer"),
)
LONGEST = 40_000  # characters of one module, so that no single interface fills the corpus
VOCABULARY = 2048


def main(work: Path) -> None:
    work.mkdir(parents=True, exist_ok=True)
    training, heldout = [], []
    for name, text in stdlib_documents():
        (heldout if is_heldout(name) else training).append(text[:LONGEST])
    training += [text[:LONGEST] for text in package_documents()]
    training = list(dict.fromkeys(training))
    write(work / "general.jsonl", training)
    write(work / "heldout.jsonl", heldout)
    tokenizer = train_tokenizer(training)
    tokenizer.save_pretrained(work / "random")
    random_llama(tokenizer).save_pretrained(work / "random")
    print(
        f"{sum(map(len, training)) / 1e6:.1f} MB to train on, {sum(map(len, heldout)) / 1e3:.0f} kB held out"
    )


def stdlib_documents() -> Iterator[tuple[str, str]]:
    root = Path(sysconfig.get_path("stdlib"))
    yield from help_topics()
    for path, text in prose(standard_library()):
        yield module_name(path, root), text


def package_documents() -> Iterator[str]:
    site = Path(sysconfig.get_path("purelib"))
    for package in PACKAGES:
        for _, text in prose(modules_below(site / package)):
            yield text


def write(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>", model_max_length=512
    )


def random_llama(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=344,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
