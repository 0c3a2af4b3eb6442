"""`deepen blocks prune`, `damp`, `average`, `worth`, `effects`: what is done with blocks after training."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from deepen.cli.output import human_count, print_json, table_console

if TYPE_CHECKING:
    from rich.console import Console

    from deepen.records.record import Record

R = TypeVar("R", bound="Record")

Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace OUT.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Pack = Annotated[str, typer.Argument(help="The block pack: a directory or a hub id.")]
Out = Annotated[Path, typer.Argument(help="The block pack to create.")]


def prune(
    pack: Pack,
    out: Out,
    without: Annotated[str, typer.Option(help="The new blocks to drop, e.g. 4,9 (by their indices).")],
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Drop some new blocks of a pack; the others are numbered anew."""
    from deepen.blocks import prune_pack
    from deepen.cli.expand import parse_after

    result = prune_pack(pack, out, without=parse_after(without, "'--without'"), overwrite=overwrite)
    if as_json:
        print_json({**vars(result)})
        return
    moved = ", ".join(f"{old} is {new}" for old, new in result.kept.items() if old != new)
    print(result.layout.draw())
    print(
        f"{out}: without {', '.join(map(str, result.removed))}; {human_count(result.parameters)} parameters"
        + (f"; block {moved} now" if moved else "")
    )


def damp(
    pack: Pack,
    out: Out,
    alpha: Annotated[
        str, typer.Option(help="0 is the base, 1 the pack as it is: 0.7, or by block 4=0.5,9=1.")
    ],
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Scale what new blocks add: a pack between base and model."""
    from deepen.blocks import damp_pack

    result = damp_pack(pack, out, alpha=_alpha(alpha), overwrite=overwrite)
    if as_json:
        print_json({**vars(result)})
        return
    factors = ", ".join(f"block {index} times {factor:g}" for index, factor in result.alphas.items())
    print(f"{out}: {factors}; {human_count(result.scaled)} parameters scaled")


def average(
    out: Out,
    packs: Annotated[
        list[str], typer.Argument(help="The packs: of one base, with blocks in the same places.")
    ],
    weights: Annotated[
        str | None, typer.Option(help="One of each pack, e.g. 0.7,0.3; divided by their sum. Default: equal.")
    ] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Average the tensors of several packs: one pack, as small as each.

    What it can do has to be measured, beside the packs alone and stacked.
    """
    from deepen.blocks import average_packs

    given = [_number(part, "--weights") for part in weights.split(",")] if weights is not None else None
    result = average_packs(packs, out, weights=given, overwrite=overwrite)
    if as_json:
        print_json({**vars(result)})
        return
    print(result.layout.draw())
    shares = " + ".join(f"{share:.3g} × {name}" for name, share in result.shares.items())
    print(f"{out}: {shares}; {human_count(result.parameters)} parameters")


def worth(
    base: Annotated[str, typer.Argument(help="The base, or alone an expanded checkpoint (or its hub id).")],
    pack: Annotated[str | None, typer.Argument(help="The block pack: a directory or a hub id.")] = None,
    *,
    text: Annotated[list[str], typer.Option(help="Text whose loss must be kept (.txt, .jsonl …).")],
    domain_text: Annotated[list[str], typer.Option(help="Text whose loss was to fall.")],
    alphas: Annotated[
        str, typer.Option(help="Points of the path from base (0) to model (1).")
    ] = "0,0.25,0.5,0.75,1,1.25",
    max_general_loss: Annotated[
        float | None,
        typer.Option(min=0, help="Choose the α that learns most within this rise of the general loss."),
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens read of each text.")] = 20_000,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda …")] = "auto",
    out: Annotated[Path | None, typer.Option(help="Keep the record here, as JSON.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page with the figure here.")] = None,
    as_json: Json = False,
) -> None:
    """Measure what each new block is worth, and how far to go.

    The path from base to model scales what the new blocks write by α, as `deepen blocks damp` does. Without
    --max-general-loss the α is chosen whose general and domain loss have the least sum.
    """
    from deepen.cli.display import display

    points = tuple(_number(part, "--alphas") for part in alphas.split(","))
    with display() as reporter:
        from deepen.config import TextSet
        from deepen.pipeline.evaluate import choose_device
        from deepen.pipeline.worth import WorthRequest, measure_worth
        from deepen.report import print_worth, write_worth_page

        request = WorthRequest(
            base=base,
            pack=pack,
            texts=tuple(TextSet(path=path) for path in text),
            domain_texts=tuple(TextSet(path=path) for path in domain_text),
            alphas=points,
            max_general_loss=max_general_loss,
            max_tokens=max_tokens,
            device=choose_device(device),
        )
        record = measure_worth(request, reporter)
        _keep(record, out, html, write_worth_page)
    _show(record, as_json, print_worth)


def effects(
    target: Annotated[str, typer.Argument(help="A run, a block pack or an expanded checkpoint.")],
    *,
    base: Annotated[str | None, typer.Option(help="Where its base is, if not where it says.")] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(help="Text to be kept (.txt, .jsonl …). A run has its recipe's, if none is given."),
    ] = None,
    domain_text: Annotated[list[str] | None, typer.Option(help="Text that was to be learned.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens read of each text.")] = 20_000,
    tokens: Annotated[int, typer.Option(min=0, help="Tokens named of each block and text.")] = 8,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda …")] = "auto",
    out: Annotated[Path | None, typer.Option(help="Keep the record here, as JSON.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page with the figure here.")] = None,
    as_json: Json = False,
) -> None:
    """Show what each new block writes, and which predictions it changes.

    The residual stream is read below and above each block by the model's own final norm and head. A run
    keeps the record in evaluation/effects.json and shows it in its report.
    """
    from deepen.cli.display import display

    with display() as reporter:
        from deepen.config import TextSet
        from deepen.pipeline.effects import EffectsRequest, explain_blocks
        from deepen.pipeline.evaluate import choose_device
        from deepen.report import print_effects, write_effects_page

        request = EffectsRequest(
            target=target,
            base=base,
            texts=tuple(TextSet(path=path) for path in text or ()),
            domain_texts=tuple(TextSet(path=path) for path in domain_text or ()),
            max_tokens=max_tokens,
            named=tokens,
            device=choose_device(device),
        )
        record = explain_blocks(request, reporter)
        _keep(record, out, html, write_effects_page)
    _show(record, as_json, print_effects)


def _keep(record: R, out: Path | None, html: Path | None, write_page: Callable[[R, Path], Path]) -> None:
    """Write a record, and its page, where they are asked for."""
    from deepen.checkpoint import write_file

    if out is not None:
        write_file(out, record.model_dump_json(indent=1) + "\n")
    if html is not None:
        write_page(record, html)


def _show(record: R, as_json: bool, print_tables: "Callable[[R, Console], None]") -> None:
    if as_json:
        print_json(record.model_dump(mode="json"))
    else:
        print_tables(record, table_console())


def _alpha(text: str) -> float | dict[int, float]:
    """Read `0.7`, or `4=0.5,9=1`."""
    if "=" not in text:
        return _number(text, "--alpha")
    found: dict[int, float] = {}
    for part in text.split(","):
        index, _, factor = part.partition("=")
        if not index.strip().isdecimal() or int(index) in found:
            raise typer.BadParameter(
                f"{text!r} does not name each block once; write for example 4=0.5,9=1", param_hint="'--alpha'"
            )
        found[int(index)] = _number(factor, "--alpha")
    return found


def _number(text: str, option: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a number", param_hint=f"'{option}'") from None
