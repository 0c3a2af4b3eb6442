"""What the task files of this package do to documents; they name these functions after `!function`."""

from collections.abc import Mapping, Sequence
from typing import Any


def keep(document: Mapping[str, Any], results: Sequence[Any]) -> dict[str, float]:
    """Leave the judgement of a generated text to a scorer, which sees it later."""
    return {"generated": 0.0}


def mbpp_examples(documents: Any) -> Any:
    """Return the three worked examples of MBPP's paper (arXiv 2108.07732): tasks 2, 3 and 4."""
    return documents.filter(lambda document: document["task_id"] in (2, 3, 4))


def labelled(documents: Any) -> Any:
    """Return the sentences that have a label."""
    return documents.filter(lambda document: bool(document["labels"]))


def first_label(document: Mapping[str, Any]) -> int:
    """Return the label a worked example shows."""
    return int(document["labels"][0])


def any_label(document: Mapping[str, Any], results: Sequence[tuple[float, bool]]) -> dict[str, float]:
    """Return whether the likeliest choice is among the labels."""
    likelihoods = [likelihood for likelihood, _ in results]
    return {"acc": float(likelihoods.index(max(likelihoods)) in document["labels"])}
