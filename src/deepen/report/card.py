"""The model card: what a hub shows of a model."""

import re
from pathlib import Path
from typing import Any

import yaml

from deepen.report.layout import draw_tower
from deepen.report.page import METRICS, units
from deepen.report.read import RunReport, read_run
from deepen.report.retention import describe_tasks, divergence, finding, margin_of, token_shifts
from deepen.report.templates import render
from deepen.report.wording import verdict
from deepen.report.write import write_page

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def write_card(run_dir: Path, target: Path) -> Path:
    """Write the model card of a run as `README.md` in `target`; return its path.

    Args:
        run_dir: a finished run.
        target: the directory that is published: the run itself, its block pack or its merged checkpoint.
            The card says how to load what it finds there.

    Raises:
        DataError: a record is missing or malformed.
        RecipeError: `recipe.yaml` is missing or malformed.
        OutputError: the card cannot be written.
    """
    report = read_run(run_dir)
    packs = (target / "blocks.safetensors").exists() or (target / "blocks").is_dir()
    adapter = report.result.method == "lora" and (target / "adapter").is_dir()
    card = render_card(report, pack=packs, model=_has_model(target), adapter=adapter)
    return write_page(target / "README.md", card)


def render_card(report: RunReport, *, pack: bool, model: bool, adapter: bool = False) -> str:
    """Return the card as Markdown.

    Args:
        report: the run.
        pack: a block pack is published.
        model: an ordinary checkpoint is published.
        adapter: a low-rank adapter is, beside the pack it stands on, if it does.
    """
    front = yaml.safe_dump(_front_matter(report, model), sort_keys=False, allow_unicode=True)
    return render(
        "card.md.j2",
        front=front,
        report=report,
        tower=draw_tower(report.result.layout) if report.result.layout else None,
        verdicts=[verdict(metric) for metric in report.metrics("nats_per_token")],
        metrics=METRICS,
        tasks=describe_tasks(report),
        finding=finding,
        margin=margin_of(report),
        shifts=token_shifts(report),
        divergence=divergence,
        units=units(report),
        base=_hub_id(report) or report.base_name,
        pack=pack,
        model=model,
        adapter=adapter,
    )


def _has_model(target: Path) -> bool:
    return (target / "config.json").exists() or (target / "model").is_dir()


def _hub_id(report: RunReport) -> str | None:
    """The base's id on the hub; None for a directory, which would be a broken link there."""
    base = report.result.base
    return base if _HUB_ID.fullmatch(base) and not Path(base).exists() else None


def _front_matter(report: RunReport, model: bool) -> dict[str, Any]:
    front: dict[str, Any] = {}
    if base := _hub_id(report):
        front |= {"base_model": base, "base_model_relation": "finetune" if model else "adapter"}
    tags = ["deepen", *(["block-expansion", "llama-pro"] if report.result.layout else [])]
    datasets = [source.hub for source in report.trained_on if source.hub]
    front |= {
        "library_name": "transformers" if model else "deepen",
        "pipeline_tag": "text-generation",
        "tags": tags,
    }
    return front | ({"datasets": datasets} if datasets else {})
