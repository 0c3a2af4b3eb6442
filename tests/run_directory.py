"""Run directories made by hand from records, for the tests of what reads them."""

import json
import math

import numpy as np

from deepen.config import dump_recipe, parse_recipe
from deepen.evaluation.record import item_metric
from deepen.records import (
    AuditResult,
    EvaluationRecord,
    IdentityResult,
    Items,
    Parameters,
    Provenance,
    RunResult,
    TextResult,
)

RECIPE = """
base: models/stories260k
output: runs/sample
expand: {blocks: 2}
data:
  sequence_length: 128
  sources:
    - {name: gsm8k, path: data/gsm8k.jsonl, template: "{question}\\n{answer}", weight: 1.5}
    - {name: licences, path: data/licences.jsonl}
train: {tokens: 1.1e6, batch_tokens: 4096, learning_rate: 1e-3}
evaluate:
  general: [{path: data/tinystories.txt}]
  domain: [{name: gsm8k-test, path: data/gsm8k-test.jsonl}]
"""
LAYOUT = "■■ □2 ■■■ □6"
PROVENANCE = Provenance(
    command="deepen run examples/sample.yaml --set train.seed=3",
    started="2026-03-01T10:20:30+00:00",
    python="3.11.9",
    packages={"deepen": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"},
    git="0123456789abcdef0123456789abcdef01234567 with changes",
    hardware={"processor": "Some CPU", "cores": "2", "memory_gib": "15.6", "accelerators": "none"},
    seed=3,
    data={"gsm8k": "a" * 64, "tinystories": "b" * 64},
)


def items(base_loss, delta, *, n=60, spread=0.1, seed=0):
    """Documents whose loss under the base is `base_loss` nats per token and `delta` more under the model."""
    generator = np.random.default_rng(seed)
    tokens = np.ceil(generator.lognormal(5, 0.5, n))
    base = tokens * generator.normal(base_loss, 0.3, n)
    changes = np.random.default_rng([seed, int(1000 * abs(delta))]).normal(delta, spread, n)
    return Items(
        unit="document",
        tokens=tokens.astype(int).tolist(),
        bytes=(tokens * 4).astype(int).tolist(),
        nll=(base + tokens * changes).tolist(),
        base_nll=base.tolist(),
    )


def text(task, role, given):
    return TextResult(task=task, role=role, digest=f"digest-of-{task}", items=given)


def evaluation(texts, model="runs/sample/blocks", base="models/stories260k"):
    metrics = [
        item_metric(each.items, each.task, each.role, metric)
        for each in texts
        for metric in ("nats_per_token", "bits_per_byte")
    ]
    return EvaluationRecord(model=model, base=base, metrics=metrics, texts=texts, provenance=PROVENANCE)


def result(**changes):
    given = {
        "method": "blocks",
        "base": "models/stories260k",
        "layout": LAYOUT,
        "parameters": Parameters(base=260032, new=91264, trainable=91264),
        "steps": 269,
        "tokens": 1_101_824,
        "seconds": 200.4,
        "identity": IdentityResult(
            identical=True, max_abs_difference=0.0, checks=["float32, uncached", "float32, cached"]
        ),
        "audit": AuditResult(unchanged=True, tensors=47, before="c0ffee" * 10, after="c0ffee" * 10),
        "outputs": ["blocks", "model"],
    }
    return RunResult(**(given | changes))


def metric_lines(texts, steps=269, every=27):
    """A log in which losses fall from the base's value to the trained one."""
    noise = np.random.default_rng(0)
    for step in range(steps + 1):
        done = 1 - math.exp(-5 * step / steps)
        tokens = step * 4096
        if step:
            yield {
                "step": step, "tokens": tokens, "loss": 5.7 - 3.3 * done + noise.normal(0, 0.08),
                "learning_rate": 1e-3, "gradient_norm": 0.8, "tokens_per_second": 5500.0,
                "seconds": step * 0.745,
                "source_tokens": {"gsm8k": tokens * 3 // 5, "licences": tokens * 2 // 5},
                "flops_per_second": 1.25e10, "utilisation": 0.43,
                "blocks": {
                    block: {"gradient_norm": block * math.exp(-done), "update": 1e-3 * (1.1 - done)}
                    for block in (2, 6)
                },
            }  # fmt: skip
        if step % every == 0 or step == steps:
            losses = {}
            for each in texts:
                total = sum(each.items.tokens)
                base, last = sum(each.items.base_nll or each.items.nll) / total, sum(each.items.nll) / total
                losses[each.task] = base + (last - base) * done
            yield {"step": step, "tokens": tokens, "evaluation": losses}


def write_run(
    directory, texts, *, recipe=RECIPE, provenance=PROVENANCE, evaluated=True, findings=None, **changes
):
    """Write a finished run directory; `changes` are of its result."""
    (directory / "evaluation").mkdir(parents=True)
    (directory / "recipe.yaml").write_text(dump_recipe(parse_recipe(recipe)))
    (directory / "environment.json").write_text(provenance.model_dump_json())
    (directory / "result.json").write_text(result(**changes).model_dump_json())
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metric_lines(texts)))
    if findings:
        (directory / "findings.json").write_text(json.dumps({"line": findings, "ngram": 13}))
    if evaluated:
        (directory / "evaluation" / "heldout.json").write_text(evaluation(texts).model_dump_json())
    return directory
