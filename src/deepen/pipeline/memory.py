"""Making a training step fit: which blocks are computed again, and compiled."""

from contextlib import nullcontext

import torch

from deepen.model.structure import blocks_of, family_of
from deepen.pipeline.plan import RunPlan
from deepen.pipeline.reporter import Reporter
from deepen.pipeline.trainee import Trainee
from deepen.training.parallel import local, plain_root, release
from deepen.training.recompute import choose_blocks, free_memory, measure_blocks, recompute
from deepen.training.world import World

# What AdamW in fp32 adds for each parameter that trains: its gradient and two moments.
_OPTIMIZER_BYTES = 12


def fit_memory(plan: RunPlan, trainee: Trainee, world: World, reporter: Reporter) -> None:
    """Choose the blocks that are computed again in the backward pass; compile blocks where asked.

    A micro-batch of the run's size is run forward, one block's activations in memory at a time, and what is
    left of the memory after gradients and optimiser decides (`train.recompute: auto`).
    """
    model, mode = trainee.model, plan.train.recompute
    blocks = list(blocks_of(model, family_of(model)))
    if mode != "none":
        shape = (plan.micro_batch, plan.length)
        tokens = torch.zeros(shape, dtype=torch.long, device=model.device)
        computing = torch.autocast(model.device.type, dtype=trainee.autocast) if trainee.autocast else None

        def forward() -> None:
            with computing or nullcontext():
                plain_root(trainee.root)(lambda model: model.base_model(input_ids=tokens, use_cache=False))

        model.train()
        with torch.random.fork_rng():
            memory = measure_blocks(blocks, forward)
        release(trainee.root)
        # Processes on one machine's CPU share its memory; all choose as the one with least does.
        free = free_memory(model.device) // (world.local_size if model.device.type == "cpu" else 1)
        held = sum(local(parameter).numel() for parameter in trainee.parameters.values())
        budget = world.least(free - _OPTIMIZER_BYTES * held)
        chosen = choose_blocks(memory, mode, budget)
        recompute([blocks[index] for index in chosen])
        if chosen:
            reporter.note(f"computed again in the backward pass: blocks {', '.join(map(str, chosen))}")
    if plan.train.compile:
        for block in blocks:
            block.compile()
