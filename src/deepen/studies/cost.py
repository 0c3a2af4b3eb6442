"""What a run will cost, before anything is spent."""

from dataclasses import dataclass
from unittest.mock import patch

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, masking_utils

from deepen.expansion.config_json import expand_config
from deepen.methods import build_method
from deepen.model.structure import blocks_of, family_of
from deepen.pipeline.plan import Outline
from deepen.studies.cells import Store
from deepen.studies.grid import Grid
from deepen.training.flops import count_flops
from deepen.training.parallel import Root


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Of one run.

    Attributes:
        trainable: parameters that train.
        tokens: trained on; None where epochs are asked for, which only tokenised texts count.
        flops_per_token: executed in training, without recomputation.
    """

    trainable: int
    tokens: int | None
    flops_per_token: float

    @property
    def flops(self) -> float | None:
        """Executed in training."""
        return None if self.tokens is None else self.tokens * self.flops_per_token


def estimate_cost(outline: Outline) -> Cost:
    """Count on a model without numbers: no weight is read, no memory taken."""
    base = outline.base
    settings = base.checkpoint.config
    if outline.layout:
        settings = expand_config(settings, base.family, outline.layout)
    # On the meta device transformers cannot look whether positions begin anew; here they do not.
    with torch.device("meta"), patch.object(masking_utils, "find_packed_sequence_indices", lambda _: None):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings))
        blocks = list(blocks_of(model, family_of(model)))
        if outline.layout and outline.train.method == "blocks":
            model.requires_grad_(False)
            for index in outline.layout.new_indices:
                blocks[index].requires_grad_(True)
        else:
            build_method(outline.train).prepare(model)
        cost = count_flops(Root(model), model, blocks, outline.length)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return Cost(trainable=trained, tokens=outline.known_tokens, flops_per_token=cost.total)


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A place of a study before it is computed.

    Attributes:
        name: of the cell.
        finished: nothing is left to do.
        waits_for: what decides it, in words; empty where it is known.
        cost: of its run.
    """

    name: str
    finished: bool
    waits_for: str
    cost: Cost


def plan_costs(grid: Grid, store: Store) -> list[Planned]:
    """Return every cell of a study with its cost, each once.

    Of the first seed's cell nothing is planned while its rate is being chosen: one of those runs is it.
    """
    costs = {place: estimate_cost(grid.outline(place)) for place in grid.places}
    first = f"-seed{grid.study.seeds[0]}"
    planned: dict[str, Planned] = {}
    for place, slot in grid.placed(store.finished):
        if slot.cell is None and slot.name.endswith(first):
            continue
        done = slot.cell is not None and store.finished(slot.cell) is not None
        key = slot.cell.key if slot.cell else slot.name
        found = Planned(name=slot.name, finished=done, waits_for=slot.waits_for, cost=costs[place])
        planned.setdefault(key, found)
    return list(planned.values())
