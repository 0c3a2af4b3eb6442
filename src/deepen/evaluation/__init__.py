"""What was learned and what was kept: held-out loss, and paired differences with their intervals.

`deepen.evaluation.heldout` scores a model and needs torch; the rest works on records.
"""

from deepen.evaluation.comparison import compare_runs
from deepen.evaluation.paired import PairedItems, compare_items
from deepen.evaluation.record import build_record, nats_per_token
from deepen.evaluation.statistics import Interval, paired_difference, standard_error

__all__ = [
    "Interval",
    "PairedItems",
    "build_record",
    "compare_items",
    "compare_runs",
    "nats_per_token",
    "paired_difference",
    "standard_error",
]
