"""A switch beside its base and its packs on held-out texts: losses, errors, cost."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from deepen.blocks import BLOCKS_NAME
from deepen.checkpoint import write_file
from deepen.config import Recipe
from deepen.data.evaluation_text import EvaluationText
from deepen.errors import SwitchError
from deepen.evaluation.heldout import evaluate_texts
from deepen.evaluation.record import text_metrics, text_results
from deepen.evaluation.switching import after_prompt
from deepen.evaluation.windows import evaluating
from deepen.model import Decision, Likelihood, Switch, load, playing, set_switch, switch_of
from deepen.model.structure import blocks_of, family_of
from deepen.pipeline.reporter import Reporter
from deepen.pipeline.subject import Subject, pack_directory
from deepen.pipeline.switch import count_answers
from deepen.pipeline.trainee import Trainee
from deepen.records import (
    SwitchCost,
    SwitchEvaluation,
    SwitchRow,
    SwitchTally,
    TextResult,
    capture_provenance,
)
from deepen.training.flops import count_flops
from deepen.training.parallel import Root

Nats = Mapping[str, NDArray[np.float64]]


def load_switched(target: str, subject: Subject, switch: str, device: torch.device) -> PreTrainedModel:
    """Load what is evaluated with its switch.

    Args:
        target: a pack or run, an expanded checkpoint, or a base, whose packs the switch brings.
        subject: what it is.
        switch: `auto`, or the directory of a switch.
        device: where it goes.

    Raises:
        DeepenError: there is nothing to switch, or the switch was made for others.
    """
    if switch != "auto":
        pack = pack_directory(target)
        held = pack if (Path(pack) / BLOCKS_NAME).is_file() else None
        return load(subject.model.tokenizer, held, switch=switch, device=device)
    model = subject.model.load(device)
    if not isinstance(model, PreTrainedModel):
        raise SwitchError(f"{target}: an adapter has no packs to switch")
    return set_switch(model, "auto")


def switched_texts(recipe: Recipe, texts: Sequence[EvaluationText]) -> list[EvaluationText]:
    """Return those texts of a run on which it measures a switch: all but conversations, if asked to.

    Raises:
        SwitchError: one has nothing behind its prompts.
    """
    if recipe.evaluate.switch is None:
        return []
    found = [text for text in texts if text.counted is None]
    behind_prompts(found, recipe.evaluate.switch.prompt_tokens)
    return found


def record_switch(
    recipe: Recipe,
    trainee: Trainee,
    texts: Sequence[EvaluationText],
    name: str,
    record: Path,
    reporter: Reporter,
) -> None:
    """Measure the switch that a recipe asks for on what its run has trained, and write the record.

    Args:
        recipe: of the run.
        trainee: whole, in this process.
        texts: from `switched_texts`; without any nothing is measured.
        name: of the model, for the record.
        record: where it is written.
        reporter: is told how far it is.
    """
    section = recipe.evaluate.switch
    if section is None or not texts:
        return
    found = measure_switch(
        trainee.model,
        texts,
        reporter,
        names=(name, recipe.base, "auto"),
        switch=Switch(prompt_tokens=section.prompt_tokens),
        autocast=trainee.autocast,
    )
    write_file(record, found.model_dump_json(indent=1) + "\n")


def measure_switch(
    model: PreTrainedModel,
    texts: Sequence[EvaluationText],
    reporter: Reporter,
    *,
    names: tuple[str, str, str],
    switch: Switch | None = None,
    autocast: torch.dtype | None = None,
) -> SwitchEvaluation:
    """Score the base, each pack always on, and the switch, on the same tokens.

    The first `prompt_tokens` of each window decide who answers the window. Scored are the tokens behind them,
    for all rows alike; a window that has none is left out for all. A row of the switch has, of each window,
    the loss of who was chosen.

    Args:
        model: has the packs attached.
        texts: in windows.
        reporter: is told how far it is.
        names: of model, base and switch.
        switch: what decides; None: the model's own switch.
        autocast: dtype of the compute, or None for the parameters' own.

    Raises:
        SwitchError: a text has no window longer than a prompt, or the model has no switch and none is given.
    """
    switch = switch or switch_of(model)
    if switch is None:
        raise SwitchError(f"{names[0]}: has no switch to measure")
    scored = behind_prompts(texts, switch.prompt_tokens)
    reporter.stage("deciding")
    packs = switch.candidates(model)
    with evaluating(model), torch.autocast(model.device.type, autocast, enabled=autocast is not None):
        decided = {text.task: _decide(model, switch, text) for text in scored}
    losses: dict[str | None, Nats] = {}
    for pack in (None, *packs):
        reporter.stage(f"held-out loss of {pack or 'the base'}")
        with playing(model, () if pack is None else (pack,)):
            losses[pack] = evaluate_texts(model, scored, autocast=autocast, progress=reporter.progress)
    cost = _cost(model, switch, packs, [each for many in decided.values() for each in many])
    chosen = {task: _chosen(task, many, losses) for task, many in decided.items()}
    rows = [(pack, losses[pack]) for pack in packs] + [("switch", chosen)]
    return SwitchEvaluation(
        model=names[0],
        base=names[1],
        switch=names[2],
        kind=type(switch.decider).__name__.lower(),
        threshold=switch.threshold,
        unit=switch.decider.unit,
        prompt_tokens=switch.prompt_tokens,
        unscored={
            text.task: len(text.windows) - len(left.windows) for text, left in zip(texts, scored, strict=True)
        },
        tallies=[_tally(text, decided[text.task], packs) for text in scored],
        rows=[_row(name, text_results(scored, nats, losses[None])) for name, nats in rows],
        cost=cost,
        provenance=capture_provenance(data={text.task: text.digest for text in texts}),
    )


def behind_prompts(texts: Sequence[EvaluationText], prompt_tokens: int) -> list[EvaluationText]:
    """Return the texts of which only what lies behind the first tokens of each window is scored.

    Raises:
        SwitchError: a text has no window longer than that.
    """
    left = [after_prompt(text, prompt_tokens) for text in texts]
    if short := [text.task for text in left if not text.tokens]:
        raise SwitchError(
            f"{short[0]}: no window is longer than the {prompt_tokens} tokens that decide; "
            "nothing is left to score"
        )
    return left


def _decide(model: PreTrainedModel, switch: Switch, text: EvaluationText) -> tuple[Decision, ...]:
    return switch.decide(model, [torch.from_numpy(window) for window in text.windows])


def _chosen(
    task: str, decisions: Sequence[Decision], losses: Mapping[str | None, Nats]
) -> NDArray[np.float64]:
    return np.array([losses[each.pack][task][number] for number, each in enumerate(decisions)])


def _row(answers: str, results: list[TextResult]) -> SwitchRow:
    return SwitchRow(answers=answers, metrics=text_metrics(results), texts=results)


def _tally(text: EvaluationText, decisions: Sequence[Decision], packs: Sequence[str]) -> SwitchTally:
    answered, total = count_answers([each.pack for each in decisions], packs), len(decisions)
    wrong = total - answered["base"] if text.role == "general" else answered["base"]
    return SwitchTally(text=text.task, prompts=total, answered=answered, wrong=wrong)


def _cost(
    model: PreTrainedModel, switch: Switch, packs: Sequence[str], decisions: Sequence[Decision]
) -> SwitchCost:
    """Count the passes that a decision takes: with likelihood one with the base and one with each pack."""
    read = float(np.mean([decision.tokens for decision in decisions]))
    by_likelihood = isinstance(switch.decider, Likelihood)
    base, *others = (
        _forward_flops(model, pack, round(read), by_likelihood)
        for pack in (None, *(packs if by_likelihood else ()))
    )
    return SwitchCost(
        tokens=read * (1 + len(others)),
        flops=read * (base + sum(others)),
        prefill_flops=read * _forward_flops(model, None, round(read), True),
    )


def _forward_flops(model: PreTrainedModel, pack: str | None, length: int, head: bool) -> float:
    """Return the FLOPs of a token's forward pass, with the head or without: a classifier does not run it."""
    with playing(model, () if pack is None else (pack,)):
        cost = count_flops(Root(model), model, list(blocks_of(model, family_of(model))), length)
    return cost.forward if head else cost.forward - cost.outside
