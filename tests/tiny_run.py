"""A tiny real base with a tokenizer, two texts and a recipe, for the tests that train."""

import json
from pathlib import Path

import torch
import yaml
from conftest import write_tiny_llama
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import deepen

WORDS = ["block", "gate", "norm", "head", "token", "layer", "write", "stream", "base", "copy"]


def sentences(offset: int, documents: int, length: int = 40) -> list[str]:
    """Documents with a pattern to learn: each word is followed by one of two."""
    texts = []
    for document in range(documents):
        at, words = (document * 7 + offset) % len(WORDS), []
        for place in range(length):
            words.append(WORDS[at])
            at = (at + 1 + (place * document) % 2 + offset) % len(WORDS)
        texts.append(" ".join(words) + ".")
    return texts


def write_base(directory: Path, **options) -> Path:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=290,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sentences(0, 20) + sentences(3, 20), trainer)
    write_tiny_llama(directory, **{"blocks": 3, "tied": True, "vocab_size": 290, **options})
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>"
    )
    fast.save_pretrained(directory)
    return directory


def write_recipe(root: Path, **changes) -> Path:
    """Write texts and a recipe of 6 steps below `root`; `changes` are `section__key=value`."""
    general, domain = sentences(0, 40), sentences(3, 60)
    for name, texts in {"general": general, "train": domain[:40], "heldout": domain[40:]}.items():
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (root / f"{name}.jsonl").write_text(lines)
    recipe = {
        "base": str(root / "base"),
        "output": str(root / "run"),
        "expand": {"blocks": 2},
        "data": {
            "sequence_length": 32,
            "sources": [{"path": str(root / "train.jsonl")}],
            "cache": str(root / "cache"),
        },
        "train": {
            "tokens": 6 * 128,
            "batch_tokens": 128,
            "learning_rate": 1e-2,
            "evaluate_every": 3,
            "checkpoint_every": 2,
        },
        "evaluate": {
            "general": [{"path": str(root / "general.jsonl")}],
            "domain": [{"path": str(root / "heldout.jsonl")}],
        },
    }
    for key, value in changes.items():
        *sections, last = key.split("__")
        at = recipe
        for section in sections:
            at = at.setdefault(section, {})
        if value is None:
            del at[last]
        else:
            at[last] = value
    path = root / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def write_trained_pack(base, pack):
    """Write a pack of two new blocks on a base of three that are not the identity."""
    model = deepen.load(base)
    deepen.insert_blocks(model, deepen.plan_layout(3, blocks=2))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for parameter in deepen.model.new_parameters(model).values():
            parameter.add_(torch.randn_like(parameter) * 0.5)
    deepen.save_blocks(model, pack)
