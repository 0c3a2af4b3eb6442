"""A conversation in the terminal, or through pipes."""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, nullcontext, suppress
from typing import Final

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from deepen.dialogue.network import Voice
from deepen.dialogue.talk import Answer, Talk
from deepen.errors import ChatError, DeepenError
from deepen.model import Decision

HELP: Final = """\
/packs          what is attached, and what is on
/on NAME        switch a pack on
/off NAME       switch a pack off
/system TEXT    set the system message; without a text, none
/reset          forget what was said
/quit           leave; so does Ctrl-D. Ctrl-C stops an answer"""


class Terminal:
    """Reads questions and commands, writes answers.

    On a terminal answers stream, two in columns; through a pipe each answer is written whole, two with their
    names before them. Control characters that a model wrote are left out.
    """

    def __init__(self, talk: Talk, *, as_json: bool = False) -> None:
        """Wrap a conversation.

        Args:
            talk: the conversation.
            as_json: write one JSON object a line for each question, and nothing else on stdout.
        """
        self._talk, self._as_json = talk, as_json
        self._out = Console(highlight=False, markup=False, emoji=False)
        self._said = Console(stderr=True, highlight=False, markup=False, emoji=False, style="dim")
        self._typed = sys.stdin.isatty()
        self._live = self._out.is_terminal and not as_json

    def run(self) -> None:
        """Talk until the questions end.

        Raises:
            DeepenError: a question or command cannot be served and nobody is there to try another.
        """
        for line in _typed_lines() if self._typed else _piped_lines():
            try:
                if not self._serve(line):
                    return
            except DeepenError as error:
                if not self._typed:
                    raise
                self._said.print(f"error: {error}", soft_wrap=True)

    def _serve(self, line: str) -> bool:
        """Do what a line asks; False to leave."""
        if not line.startswith("/"):
            self._answer(line)
            return True
        name, _, rest = line[1:].partition(" ")
        if name == "quit":
            return False
        if name not in self._commands:
            raise ChatError(f"no command /{name}; there are\n{HELP}")
        self._commands[name](rest.strip())
        return True

    @property
    def _commands(self) -> dict[str, Callable[[str], None]]:
        talk = self._talk
        return {
            "help": lambda _: self._say(HELP),
            "packs": lambda _: self._say(describe_packs(talk)),
            "on": lambda name: self._switch([*talk.packs, name]),
            "off": lambda name: self._switch(_without(talk.packs, name)),
            "system": self._system,
            "reset": lambda _: talk.reset(),
        }

    def _say(self, text: str) -> None:
        self._said.print(text, soft_wrap=True)

    def _switch(self, packs: Sequence[str]) -> None:
        self._talk.switch(packs)
        self._say(describe_packs(self._talk))

    def _system(self, text: str) -> None:
        self._talk.system = text

    def _answer(self, question: str) -> None:
        # Ctrl-C stops an answer where someone may go on, and the program where nobody is there.
        stopping = suppress(KeyboardInterrupt) if self._typed else nullcontext()
        with stopping, closing(self._talk.ask(question)) as growing:
            self._show(growing)
        answers = self._talk.answers
        if cut := max(answer.prompt.cut for answer in answers):
            self._say(f"({cut} of the oldest turns left out: the model sees {_context(answers)} tokens)")
        if self._as_json:
            said = _plain(question, answers, self._talk.packs, self._talk.decision)
            self._out.file.write(json.dumps(said) + "\n")
            self._out.file.flush()
        elif not self._live:
            self._write_whole(question, answers)
        if self._talk.decision and not self._as_json:
            self._say(f"({describe_decision(self._talk)})")
        for answer in answers:
            if answer.ended == "length":
                room = answer.prompt.room
                self._say(f"({answer.voice.name}: stopped after {room} tokens; --max-tokens allows more)")

    def _show(self, growing: Iterator[tuple[Answer, ...]]) -> None:
        """Show answers while they grow."""
        if not self._live:
            for _ in growing:
                pass
        elif self._talk.compare:
            self._show_columns(growing)
        else:
            self._show_line(growing)

    def _show_line(self, growing: Iterator[tuple[Answer, ...]]) -> None:
        shown = ""
        try:
            for (answer,) in growing:
                text = printable(answer.text)
                if text.startswith(shown):
                    self._out.print(text[len(shown) :], end="", soft_wrap=True)
                    shown = text
        finally:
            self._out.print("\n")

    def _show_columns(self, growing: Iterator[tuple[Answer, ...]]) -> None:
        # What is higher than the terminal is cut while it grows and printed whole at the end.
        answers: tuple[Answer, ...] = ()
        try:
            with Live(console=self._out, transient=True, refresh_per_second=12) as live:
                for answers in growing:
                    live.update(_columns(answers))
        finally:
            if answers:
                self._out.print(_columns(answers))

    def _write_whole(self, question: str, answers: Sequence[Answer]) -> None:
        if self._talk.compare:
            self._out.print(f"> {question}", soft_wrap=True)
        for answer in answers:
            name = f"{describe_voice(answer.voice)}: " if self._talk.compare else ""
            self._out.print(name + printable(answer.text).strip(), soft_wrap=True)
        self._out.print()


def describe_voice(voice: Voice) -> str:
    """Name who answers, with the packs that are on: `model (law + code)`."""
    if voice.name == "base" or not voice.network.packs:
        return voice.name
    return f"{voice.name} ({' + '.join(voice.packs) or 'no pack on'})"


def describe_decision(talk: Talk) -> str:
    """Say who answered the last question, and by how much: `law answered; law +0.412 nats/token`."""
    if talk.decision is None or talk.cast.switch is None:
        return ""
    unit, decision = talk.cast.switch.decider.unit, talk.decision
    weighed = ", ".join(f"{name} {value:+.3f}" for name, value in decision.advantages.items())
    return f"{decision.pack or 'the base'} answered; {weighed} {unit}"


def describe_packs(talk: Talk) -> str:
    """Say what is attached and what is on."""
    held = talk.cast.model.packs
    if not held:
        return "no packs to switch"
    return "\n".join(f"{'on ' if name in talk.packs else 'off'}  {name}" for name in held)


def printable(text: str) -> str:
    """Leave out control characters: a model must not move the cursor or recolour the terminal."""
    return "".join(each for each in text if each.isprintable() or each in "\n\t")


def _columns(answers: Sequence[Answer]) -> Table:
    table = Table.grid(expand=True, padding=(0, 2))
    for _ in answers:
        table.add_column(ratio=1)
    table.add_row(*(Text(describe_voice(answer.voice), style="bold") for answer in answers))
    table.add_row(*(Text(printable(answer.text).strip()) for answer in answers))
    table.add_row()
    return table


def _plain(
    question: str, answers: Sequence[Answer], packs: Sequence[str], decision: Decision | None
) -> dict[str, object]:
    said = {
        each.voice.name: {"text": each.text, "tokens": len(each.ids), "ended": each.ended} for each in answers
    }
    cut = max(each.prompt.cut for each in answers)
    plain = {"question": question, "answers": said, "packs": list(packs), "turns_left_out": cut}
    if decision is not None:
        plain["decided"] = {"pack": decision.pack, "advantages": dict(decision.advantages)}
    return plain


def _without(packs: Sequence[str], name: str) -> list[str]:
    if name not in packs:
        raise ChatError(f"no pack {name!r} is on; /packs shows what is")
    return [each for each in packs if each != name]


def _context(answers: Sequence[Answer]) -> str:
    return f"{max(answers, key=lambda each: each.prompt.cut).voice.network.context:,}"


def _typed_lines() -> Iterator[str]:
    """Yield the lines of whoever sits there, until Ctrl-D."""
    with suppress(ImportError):  # arrow keys and earlier lines, where Python has them
        import readline  # noqa: F401
    while True:
        try:
            line = input("› ").strip()
        except KeyboardInterrupt:
            print("\n(/quit or Ctrl-D leaves)", file=sys.stderr)
            continue
        except EOFError:
            print()
            return
        if line:
            yield line


def _piped_lines() -> Iterator[str]:
    yield from filter(None, map(str.strip, sys.stdin))
