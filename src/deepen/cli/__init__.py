"""The command line: one thin module a command, imported when the command is used or listed.

A command module holds a typer `app` (`deepen.cli.apps.new_app`) and imports what is heavy inside its
functions, so that `deepen --help` answers at once. A new command is a module and a line in `COMMANDS`.
"""

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Annotated, Any, Final

import typer
from typer.core import TyperGroup

from deepen.errors import DeepenError

# Command -> module, in the order of the help.
COMMANDS: Final = {
    "plan": "deepen.cli.plan",
    "expand": "deepen.cli.expand",
    "verify": "deepen.cli.verify",
    "blocks": "deepen.cli.blocks",
    "import": "deepen.cli.import_model",
    "vocabulary": "deepen.cli.vocabulary",
    "data": "deepen.cli.data",
    "run": "deepen.cli.run",
    "inspect": "deepen.cli.inspect_model",
    "evaluate": "deepen.cli.evaluate",
    "compare": "deepen.cli.compare",
    "study": "deepen.cli.study",
    "chat": "deepen.cli.chat",
    "report": "deepen.cli.report",
    "export": "deepen.cli.export",
    "demo": "deepen.cli.demo",
    "doctor": "deepen.cli.doctor",
}


class _LazyGroup(TyperGroup):
    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in COMMANDS:
            return None
        command = typer.main.get_command(import_module(COMMANDS[cmd_name]).app)
        command.name = cmd_name
        # Its first paragraph whole in the list of commands, not cut short.
        command.short_help = (command.help or "").partition("\n\n")[0]
        return command


_root = typer.Typer(
    cls=_LazyGroup,
    add_completion=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(asked: bool) -> None:
    if asked:
        from deepen.cli.version import describe_version

        print(f"deepen {describe_version()}")
        raise typer.Exit()


@_root.callback()
def _deepen(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Add new transformer blocks to a pretrained model, teach them a domain, prove what was kept."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 done, 2 the user's input, 3 a check that failed.

    A bug of ours keeps its traceback (and Python's exit code 1).

    Args:
        arguments: what follows `deepen`; default: the process's.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    command = typer.main.get_command(_root)
    try:
        code = command.main(arguments or ["--help"], prog_name="deepen", standalone_mode=False)
    except DeepenError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except typer.TyperException as error:
        context = getattr(error, "ctx", None)
        said = " ".join(error.format_message().split())
        print(f"error: {said}\nsee: {context.command_path if context else 'deepen'} --help", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except BrokenPipeError:
        # The reader of our output has gone; keep Python from complaining again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return code if isinstance(code, int) else 0
