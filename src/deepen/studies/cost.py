"""What a run will cost, before anything is spent."""

from dataclasses import dataclass

from deepen.pipeline.cost import job_of_run
from deepen.pipeline.plan import Outline
from deepen.planner.estimate import count_training
from deepen.studies.cells import Store
from deepen.studies.grid import Grid


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
    trainable, flops = count_training(job_of_run(outline))
    return Cost(trainable=trainable, tokens=outline.known_tokens, flops_per_token=flops)


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
