from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deepen.cli.apps import new_app
from deepen.cli.output import print_json

if TYPE_CHECKING:
    from deepen.records import ImportanceRecord

app = new_app()

_BAR = 24  # columns of the longest bar


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(help="The base: a directory or a hub id.")],
    text: Annotated[list[str], typer.Option(help="Text whose loss must be kept (.txt, .jsonl …).")],
    domain_text: Annotated[list[str] | None, typer.Option(help="Text whose loss must fall.")] = None,
    blocks: Annotated[
        int | None, typer.Option(min=1, help="Also say where this many new blocks would stand.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens read of each text.")] = 20_000,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda …")] = "auto",
    out: Annotated[
        Path | None, typer.Option(help="Keep the record here, for expand.placement: importance.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure how much each block matters: skip it, and see what that costs general and domain text."""
    from deepen.cli.display import display
    from deepen.config import TextSet

    with display() as reporter:
        from deepen.checkpoint import write_file
        from deepen.pipeline.evaluate import choose_device
        from deepen.pipeline.importance import ImportanceRequest, measure_importance

        request = ImportanceRequest(
            model=model,
            texts=tuple(TextSet(path=path) for path in text),
            domain_texts=tuple(TextSet(path=path) for path in domain_text or []),
            max_tokens=max_tokens,
            device=choose_device(device),
        )
        record = measure_importance(request, reporter)
        if out is not None:
            write_file(out, record.model_dump_json(indent=1) + "\n")
    _report(record, blocks, as_json)


def _report(record: "ImportanceRecord", blocks: int | None, as_json: bool) -> None:
    from deepen.expansion import least_important, plan_layout

    after = least_important(record.scores, blocks) if blocks else None
    if as_json:
        print_json({**record.model_dump(mode="json"), "after": after})
        return
    for line in _table(record):
        print(line)
    if after is not None:
        print(f"\n{plan_layout(len(record.blocks), after=after).draw()}")
        print(f"expand: {{after: {after}}}")


def _table(record: "ImportanceRecord") -> list[str]:
    """Lines of equal columns, bottom block first, with a bar for what skipping it costs general text."""
    most = max([each.general for each in record.blocks] + [1e-12])
    lines = [f"{'block':>5}  {'general':>8}  {'domain':>8}  {'cosine':>7}  {'gradient':>8}"]
    for each in record.blocks:
        domain = "" if each.domain is None else f"{each.domain:+.4f}"
        bar = "█" * round(_BAR * max(each.general, 0.0) / most)
        lines.append(
            f"{each.block:>5}  {each.general:>+8.4f}  {domain:>8}  {each.cosine:>7.4f}  {each.gradient:>8.4f}"
            f"  {bar}".rstrip()
        )
    whole = f"the whole model: {record.general:.4f}"
    whole += "" if record.domain is None else f" general, {record.domain:.4f} domain"
    return [*lines, f"{whole} nats per token; beside each block what skipping it adds"]
