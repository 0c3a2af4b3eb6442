"""Train new blocks on instructions with TRL's SFTTrainer.

    python examples/sft_trainer.py BASE INSTRUCTIONS OUTPUT

BASE is a directory or hub id of a causal LM with its tokenizer, INSTRUCTIONS a file of JSON lines with
`prompt` and `completion`; completions are learned. The block pack is then in OUTPUT/blocks, and
`deepen.load(BASE, "OUTPUT/blocks")` is the trained model.
"""

import argparse
import json
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import deepen


def main() -> None:
    """Expand, freeze, tune."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("base")
    parser.add_argument("instructions", type=Path)
    parser.add_argument("output")
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--length", type=int, default=1024, help="longest example, in tokens")
    parser.add_argument("--steps", type=int, default=100)
    args = parser.parse_args()

    rows = [json.loads(line) for line in args.instructions.read_text().splitlines()]
    model = AutoModelForCausalLM.from_pretrained(args.base)

    depth = model.config.get_text_config().num_hidden_layers
    deepen.insert_blocks(model, deepen.plan_layout(depth, blocks=args.blocks))
    for parameter in deepen.freeze_base(model).values():
        parameter.data = parameter.data.float()  # a step smaller than one of bf16 is not lost

    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=args.output,
            max_steps=args.steps,
            max_length=args.length,
            learning_rate=2e-4,
            bf16=model.dtype == torch.bfloat16,  # its own default is True
            activation_checkpointing=True,
            save_steps=50,
            use_cpu=not torch.accelerator.is_available(),
        ),
        processing_class=AutoTokenizer.from_pretrained(args.base),
        train_dataset=Dataset.from_list(rows),
        callbacks=[deepen.SaveBlocks()],
    )
    trainer.train()


if __name__ == "__main__":
    main()
