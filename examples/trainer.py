"""Train new blocks with transformers' Trainer, on a plain text file.

    python examples/trainer.py BASE TEXT OUTPUT

BASE is a directory or hub id of a causal LM with its tokenizer. The block pack is then in OUTPUT/blocks, and
`deepen.load(BASE, "OUTPUT/blocks")` is the trained model.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import deepen


def windows(tokenizer, text: Path, length: int) -> list[dict[str, list[int]]]:
    """Cut the text into windows of equal length; every token is learned."""
    ids = tokenizer(text.read_text()).input_ids
    starts = range(0, len(ids) - length + 1, length)
    return [{"input_ids": ids[at : at + length], "labels": ids[at : at + length]} for at in starts]


def main() -> None:
    """Expand, freeze, train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("base")
    parser.add_argument("text", type=Path)
    parser.add_argument("output")
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--length", type=int, default=512, help="tokens of a window")
    parser.add_argument("--steps", type=int, default=100)
    args = parser.parse_args()

    model = AutoModelForCausalLM.from_pretrained(args.base)
    tokenizer = AutoTokenizer.from_pretrained(args.base)

    depth = model.config.get_text_config().num_hidden_layers
    deepen.insert_blocks(model, deepen.plan_layout(depth, blocks=args.blocks))
    for parameter in deepen.freeze_base(model).values():
        parameter.data = parameter.data.float()  # a step smaller than one of bf16 is not lost

    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=args.output,
            max_steps=args.steps,
            learning_rate=2e-4,
            per_device_train_batch_size=8,
            bf16=model.dtype == torch.bfloat16,
            activation_checkpointing=True,
            save_steps=50,
            use_cpu=not torch.accelerator.is_available(),
        ),
        train_dataset=windows(tokenizer, args.text, args.length),
        callbacks=[deepen.SaveBlocks()],
    )
    trainer.train()


if __name__ == "__main__":
    main()
