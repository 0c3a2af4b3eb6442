from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deepen.cli.apps import new_app
from deepen.cli.output import human_bytes, print_json, progress_bar
from deepen.errors import CheckFailed

if TYPE_CHECKING:
    from deepen.expansion import Verification

app = new_app()


@app.command()
def verify(
    base: Annotated[str, typer.Argument(help="The base: a directory or a hub id.")],
    expanded: Annotated[Path, typer.Argument(help="The expanded checkpoint.")],
    logits: Annotated[
        bool, typer.Option("--logits", help="Run both models and compare logits bit by bit.")
    ] = False,
    base_only: Annotated[
        bool, typer.Option("--base-only", help="Compare base tensors only: for trained new blocks.")
    ] = False,
    full: Annotated[
        bool,
        typer.Option("--full", help="Also compute the base's full fingerprint and hold the record to it."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Prove that an expanded checkpoint is its base (exit code 3 if not)."""
    from deepen.checkpoint import resolve_base
    from deepen.expansion import verify_bytes

    if logits and base_only:
        raise typer.BadParameter("--logits compares whole models; with --base-only they may differ")
    directory = resolve_base(base)
    with progress_bar("verifying") as progress:
        answer = verify_bytes(directory, expanded, base_only=base_only, full=full, progress=progress)
    # A model with a tensor missing or of another shape has no logits to compare.
    compared = (
        _compare_logits(directory, expanded) if logits and answer.max_abs_difference is not None else None
    )
    identical = answer.identical and (compared is None or compared.identical)
    if as_json:
        print_json({**vars(answer), **_joined(answer, compared), "identical": identical})
    elif identical:
        _print_proof(answer, compared)
    if not identical:
        raise CheckFailed(
            f"{expanded}: not identical to {base}: {answer.first_difference or _first(compared)}"
        )


def _compare_logits(base: Path, expanded: Path) -> Any:
    from deepen.cli.display import quiet_transformers
    from deepen.model.identity import compare_logits

    quiet_transformers()
    return compare_logits(base, expanded)


def _joined(answer: "Verification", compared: Any) -> dict[str, Any]:
    """The keys that logits, where they were compared, add or decide."""
    if compared is None:
        return {}
    return {
        "max_abs_difference": max(answer.max_abs_difference or 0.0, compared.max_abs_difference),
        "logits": compared,
    }


def _first(compared: Any) -> str:
    return f"logits differ by up to {compared.max_abs_difference:.6g}"


def _print_proof(answer: "Verification", compared: Any) -> None:
    what = "base tensors" if answer.base_only else "tensors, config and record"
    print(f"identical: {answer.tensors} {what}, {human_bytes(answer.bytes)} compared byte by byte")
    if compared is not None:
        print(f"identical: logits, bit by bit, in {len(compared.checks)} checks")
    if answer.full_fingerprint:
        print(f"base fingerprint (full): {answer.full_fingerprint}")
