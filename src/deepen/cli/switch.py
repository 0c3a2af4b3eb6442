"""`deepen blocks switch`: fit a switch, and show what it decides."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from deepen.cli.output import print_json

if TYPE_CHECKING:
    from deepen.pipeline.switch import PackTexts
    from deepen.records import SwitchRecord


def switch(
    base: Annotated[str, typer.Argument(help="The base: a directory or a hub id.")],
    *,
    pack: Annotated[
        list[str], typer.Option(help="NAME=PACK:TEXTS, a pack and a text of its kind; may be repeated.")
    ],
    general: Annotated[list[str], typer.Option(help="Text that is the base's (.txt, .jsonl …).")],
    out: Annotated[Path, typer.Option(help="The switch to create, a directory.")],
    by: Annotated[Literal["classifier", "likelihood"], typer.Option(help="What decides.")] = "classifier",
    false_positives: Annotated[
        float | None,
        typer.Option(
            min=0, max=1, help="Share of general prompts that packs may win, at most; default: threshold 0."
        ),
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens that decide, a prompt's first.")] = 64,
    max_prompts: Annotated[
        int, typer.Option(min=5, help="Prompts of general text and of each pack's.")
    ] = 1000,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda …")] = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Fit a switch: what decides for each prompt which pack takes part, if any.

    Of five documents one is held out, on which the errors shown are counted. A pack that is named twice has
    two texts.
    """
    packs = _packs(pack)
    from deepen.cli.display import display

    with display() as reporter:
        from deepen.config import TextSet
        from deepen.pipeline.evaluate import choose_device
        from deepen.pipeline.switch import SwitchRequest, fit_switch

        request = SwitchRequest(
            base=base,
            packs=packs,
            general=tuple(TextSet(path=path) for path in general),
            out=out,
            by=by,
            false_positives=false_positives,
            prompt_tokens=prompt_tokens,
            max_prompts=max_prompts,
            device=choose_device(device),
            overwrite=overwrite,
        )
        record = fit_switch(request, reporter)
    if as_json:
        print_json(record.model_dump(mode="json"))
    else:
        _report(record, base, out)


def _packs(given: list[str]) -> "tuple[PackTexts, ...]":
    """Read each NAME=PACK:TEXTS."""
    from deepen.config import TextSet
    from deepen.pipeline.switch import PackTexts

    found: dict[str, PackTexts] = {}
    for each in given:
        name, named, rest = each.partition("=")
        place, parted, text = rest.rpartition(":")
        before = found.get(name)
        if not (name and named and place and parted and text) or (before and before.pack != place):
            raise typer.BadParameter(
                f"{each!r}; write for example law=packs/law:law.jsonl", param_hint="'--pack'"
            )
        texts = (*(before.texts if before else ()), TextSet(path=text))
        found[name] = PackTexts(name=name, pack=place, texts=texts)
    return tuple(found.values())


def _report(record: "SwitchRecord", base: str, out: Path) -> None:
    for tally in record.held_out:
        answered = ", ".join(f"{name} {count}" for name, count in tally.answered.items())
        share = tally.wrong / tally.prompts
        print(
            f"{tally.text}: {tally.prompts} held-out prompts: {answered}; {tally.wrong} wrong ({share:.1%})"
        )
    print(f"{out}: {record.kind}, threshold {record.threshold:g} {record.unit}")
    print(f"use it:  deepen.load({base!r}, switch={str(out)!r})")
    print(f"         deepen chat {base} --switch {out}")
