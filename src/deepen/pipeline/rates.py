"""Where the units of what trains get their learning rates from."""

from deepen.data.batches import Mixture
from deepen.pipeline.plan import RunPlan
from deepen.training.rates import UnitRates


def open_rates(plan: RunPlan, general: Mixture | None) -> UnitRates | None:
    """Return how units get their rates in a run; None where all have one.

    Args:
        plan: the run.
        general: the windows of its anchor.
    """
    section = plan.train.unit_rates
    if section is None or general is None:
        return None
    return UnitRates(
        general_at=general.batch,
        windows=section.windows,
        every=section.every,
        rows=section.units == "row",
        lower=section.lower,
        upper=section.upper,
    )
