"""Tune new blocks on preferences with TRL's DPOTrainer; the reference is the base, which is in them already.

    python examples/dpo.py BASE PREFERENCES OUTPUT

BASE is a directory or hub id of a causal LM with its tokenizer, PREFERENCES a file of JSON lines with
`prompt`, `chosen` and `rejected`. The block pack is then in OUTPUT/blocks, and
`deepen.load(BASE, "OUTPUT/blocks")` is the tuned model. No second model is loaded: what the reference says
is computed once, before training, with the new blocks bypassed.
"""

import argparse
import json
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

import deepen


class BypassDPOTrainer(DPOTrainer):
    """A trainer whose reference is the model without its new blocks."""

    def compute_ref_log_probs(self, model, inputs):
        """Ask the base, not the model as it is."""
        with deepen.bypass(self.accelerator.unwrap_model(model)):
            return super().compute_ref_log_probs(model, inputs)


def main() -> None:
    """Expand, freeze, tune."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("base")
    parser.add_argument("preferences", type=Path)
    parser.add_argument("output")
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--length", type=int, default=1024, help="longest example, in tokens")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rate", type=float, default=2e-5)
    args = parser.parse_args()

    rows = [json.loads(line) for line in args.preferences.read_text().splitlines()]
    model = AutoModelForCausalLM.from_pretrained(args.base)

    depth = model.config.get_text_config().num_hidden_layers
    deepen.insert_blocks(model, deepen.plan_layout(depth, blocks=args.blocks))
    for parameter in deepen.freeze_base(model).values():
        parameter.data = parameter.data.float()  # a step smaller than one of bf16 is not lost

    trainer = BypassDPOTrainer(
        model=model,
        args=DPOConfig(
            output_dir=args.output,
            max_steps=args.steps,
            max_length=args.length,
            learning_rate=args.rate,
            precompute_ref_log_probs=True,  # without it, TRL loads a second model
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
