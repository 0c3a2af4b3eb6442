"""One pass of the harness over one task's requests, and every item it gives."""

import hashlib
import json
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

import numpy as np
import torch
from lm_eval import evaluator
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

from deepen.errors import DeepenError, EvaluationError, in_a_line
from deepen.evaluation.suites.bridge import LiveModel
from deepen.evaluation.suites.library import LoadedTask, quiet_harness
from deepen.records import ScoredItem, ScoredTask

Scorer = Callable[[Sequence[Mapping[str, Any]], Sequence[Sequence[str]]], Sequence[Mapping[str, float]]]
"""Judges generated texts: (documents, texts generated for each) -> metric -> value, for each document."""

PER_TOKEN: Final = "acc_per_token"


def build_requests(loaded: LoadedTask, limit: int | None) -> str:
    """Build a task's requests, once for all models; return the digest of all that is asked.

    Args:
        loaded: the task; its requests are kept in it.
        limit: documents taken from the beginning of each leaf; None: all.

    Raises:
        EvaluationError: a document does not fit the task's description.
    """
    digest = hashlib.sha256()
    for name, task in sorted(loaded.tasks.items()):
        _seed()
        task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
        try:
            with quiet_harness():
                task.build_all_requests(limit=limit)
        except Exception as error:  # whatever the task's own code and its documents lead to
            raise EvaluationError(
                f"{loaded.spec.label}: its requests cannot be built: {in_a_line(error, 300)}"
            ) from None
        # The harness builds them for each model anew; here all are asked the very same.
        task.build_all_requests = lambda **_: None
        for request in task.instances:
            asked = [name, request.request_type, request.doc_id, request.repeats, request.args, request.doc]
            digest.update(_json(asked).encode())
        digest.update(_json(sorted(task.aggregation())).encode())
    return digest.hexdigest()


def score_task(
    loaded: LoadedTask, model: LiveModel, limit: int | None, scorers: Mapping[str, Scorer]
) -> ScoredTask:
    """Ask a model all of a task's requests.

    Args:
        loaded: the task, its requests built.
        model: the model to ask.
        limit: as they were built with.
        scorers: by the name a spec gives.

    Raises:
        EvaluationError: the task or its scorer fails.
    """
    spec = loaded.spec
    if spec.scorer is not None and spec.scorer not in scorers:
        raise EvaluationError(f"{spec.label}: nothing here can score generated texts as {spec.scorer}")
    for task in loaded.tasks.values():
        for request in task.instances:
            request.resps, request.filtered_resps = [], {}
    _seed()
    model.lengths.clear()
    model.cut = 0
    try:
        with quiet_harness():
            found = evaluator.evaluate(
                lm=model, task_dict=dict(loaded.content), limit=limit, bootstrap_iters=0, log_samples=True
            )
    except EvaluationError as error:
        raise EvaluationError(f"{spec.label}: {error}") from None
    except (
        AssertionError,
        ArithmeticError,
        LookupError,
        TypeError,
        ValueError,
        OSError,
        RuntimeError,
    ) as error:
        raise EvaluationError(f"{spec.label}: cannot be scored: {in_a_line(error, 300)}") from None
    items = [
        _item(name, sample, spec.metrics, model) for name, held in found["samples"].items() for sample in held
    ]
    if spec.scorer is not None:
        try:
            items = _judge(items, found["samples"], scorers[spec.scorer])
        except (DeepenError, LookupError, TypeError, ValueError) as error:
            raise EvaluationError(
                f"{spec.label}: its texts cannot be scored: {in_a_line(error, 300)}"
            ) from None
    return ScoredTask(results=_results(found["results"]), items=items, cut=model.cut)


def _seed() -> None:
    """Seed as the harness's command line does."""
    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)
    torch.manual_seed(DEFAULT_OTHER_SEED)


def _item(name: str, sample: Mapping[str, Any], wanted: Sequence[str], model: LiveModel) -> ScoredItem:
    values = {metric: _plain(sample[metric]) for metric in sample["metrics"]}
    if PER_TOKEN in wanted:
        values[PER_TOKEN] = _per_token(sample, model.lengths)
    return ScoredItem(
        task=name,
        doc_id=sample["doc_id"],
        filter=sample["filter"],
        target=_plain(sample["target"]),
        request=_plain(sample["arguments"]),
        answer=_plain(sample["filtered_resps"]),
        values=values,
    )


def _per_token(sample: Mapping[str, Any], lengths: Mapping[tuple[str, str], int]) -> float:
    """Whether the choice likeliest per token is right; of several right ones any counts."""
    pairs = zip(sample["arguments"], sample["filtered_resps"], strict=True)
    scores = [likelihood / lengths[tuple(asked)] for asked, (likelihood, _) in pairs]
    target = sample["target"]
    return float(scores.index(max(scores)) in (target if isinstance(target, list) else [target]))


def _judge(
    items: Sequence[ScoredItem], samples: Mapping[str, Sequence[Mapping[str, Any]]], scorer: Scorer
) -> list[ScoredItem]:
    held = [sample for each in samples.values() for sample in each]
    texts = [[text for request in sample["resps"] for text in request] for sample in held]
    values = scorer([sample["doc"] for sample in held], texts)
    return [
        item.model_copy(update={"values": dict(value), "answer": text})
        for item, value, text in zip(items, values, texts, strict=True)
    ]


def _results(found: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """The harness's own figures: task or group -> `metric,filter` -> value."""
    return {
        name: {key: float(value) for key, value in figures.items() if _is_figure(key, value)}
        for name, figures in found.items()
    }


def _is_figure(key: str, value: Any) -> bool:
    return "," in key and "_stderr," not in key and isinstance(value, int | float | np.number)


def _plain(value: Any) -> Any:
    """Return what JSON can hold and read back as it was."""
    return json.loads(_json(value))


def _json(value: Any) -> str:
    return json.dumps(value, default=_simple, ensure_ascii=False)


def _simple(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Iterable):
        return list(value)
    return str(value)
