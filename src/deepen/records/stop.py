"""What ended a run before its time."""

from deepen.records.record import Record


class EarlyStop(Record):
    """Training ended because a general text was lost beyond what `train.max_general_loss` allows.

    Attributes:
        step: steps done when that was seen.
        kept: steps after which the weights that are the result were taken; 0: the base's own.
        text: the text that was lost most.
        rise: its loss over the base's after `step`, in nats per token.
        bound: what was allowed.
    """

    step: int
    kept: int
    text: str
    rise: float
    bound: float
