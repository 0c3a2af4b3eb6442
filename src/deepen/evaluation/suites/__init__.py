"""Benchmarks through lm-evaluation-harness: suites as data, base and model on the same requests.

The harness (`pip install 'deepen[eval]'`) builds the requests, scores them and computes each item's metrics;
what is here names tasks, points them at local files, keeps every item, and pairs the model with its base.
`spec` needs neither the harness nor torch, the rest does.
"""

from deepen.evaluation.suites.spec import (
    TaskSpec,
    check_harness,
    parse_task,
    read_suite,
    suite_names,
    task_specs,
)

__all__ = ["TaskSpec", "check_harness", "parse_task", "read_suite", "suite_names", "task_specs"]
