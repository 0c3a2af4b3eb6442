import typer


def new_app(help: str | None = None) -> typer.Typer:
    """Return an app for one command module.

    Help is plain text: drawing it with rich would double the time of `deepen --help`.
    """
    return typer.Typer(
        help=help,
        add_completion=False,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
