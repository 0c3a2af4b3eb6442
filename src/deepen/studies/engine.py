"""Computes what is missing of a study, cell by cell, beside other processes that do the same."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from deepen.errors import DeepenError, Interrupted, RecipeError
from deepen.pipeline.reporter import Reporter
from deepen.records import CellRecord
from deepen.studies.cells import Cell, Store
from deepen.studies.code import traceable_code

Finished = Callable[[Cell], CellRecord | None]
"""Looks up the record of a finished cell."""


@dataclass(frozen=True, kw_only=True)
class Slot:
    """One place of a study: the cell that fills it, or what it waits for.

    Attributes:
        name: readable.
        cell: None as long as other cells decide what it is, such as those that choose a learning rate.
        waits_for: what must be finished first, in words; empty with a cell.
    """

    name: str
    cell: Cell | None
    waits_for: str = ""

    @property
    def missing(self) -> str:
        """The slot by name and why it has no result yet, where it has none."""
        return f"{self.name}: {f'waits for {self.waits_for}' if self.waits_for else 'not computed yet'}"


Plan = Callable[[Finished], Sequence[Slot]]
"""A study: all of its places, always as many and in one order, as far as finished cells decide them."""


@dataclass(frozen=True)
class Share:
    """The i-th of n equal shares of the places, from 1: for schedulers."""

    number: int = 1
    of: int = 1

    @classmethod
    def parse(cls, text: str) -> "Share":
        """Read `i/n`.

        Raises:
            RecipeError: it is not of that form, or i is not one of 1 to n.
        """
        number, slash, of = text.partition("/")
        if not (slash and number.isdecimal() and of.isdecimal() and 1 <= int(number) <= int(of)):
            raise RecipeError(f"--cell {text}: not of the form i/n with i from 1 to n, as 3/8")
        return cls(int(number), int(of))

    def takes(self, place: int) -> bool:
        """Whether a place, counted from 0, belongs to this share."""
        return place % self.of == self.number - 1


@dataclass
class Outcome:
    """What one call did.

    Attributes:
        computed: names of the cells it computed.
        busy: names of those that another process was computing.
    """

    computed: list[str] = field(default_factory=list)
    busy: list[str] = field(default_factory=list)


def run_cells(store: Store, plan: Plan, share: Share, reporter: Reporter) -> Outcome:
    """Compute every cell of a share that is not finished, also those that only become known meanwhile.

    Raises:
        StudyError: the code that would compute could not be traced.
        DeepenError: a cell cannot be computed; names it. Those finished stay.
    """
    outcome, code = Outcome(), None
    for place, count, cell in _missing(store, plan, share):
        code = code or traceable_code()
        with store.hold(cell) as ours:
            if not ours:
                outcome.busy.append(cell.name)
            elif store.finished(cell) is None:  # another process may have done it a moment ago
                _compute(store, cell, code, _Narrow(reporter, f"{place + 1}/{count} {cell.name}"))
                outcome.computed.append(cell.name)
    return outcome


def _missing(store: Store, plan: Plan, share: Share) -> Iterator[tuple[int, int, Cell]]:
    """Yield (place, number of places, cell) of what is not finished, planning anew after each round."""
    seen: set[str] = set()
    while True:
        slots = plan(store.finished)
        found = [
            (place, slot.cell)
            for place, slot in enumerate(slots)
            if slot.cell and share.takes(place) and slot.cell.key not in seen
        ]
        if not found:
            return
        for place, cell in found:
            if cell.key not in seen and store.finished(cell) is None:
                yield place, len(slots), cell
            seen.add(cell.key)


def _compute(store: Store, cell: Cell, code: str | None, reporter: "_Narrow") -> None:
    directory = store.directory(cell)
    directory.parent.mkdir(parents=True, exist_ok=True)
    reporter.begin()
    try:
        computed = cell.compute(directory, reporter)
    except Interrupted:
        raise Interrupted(f"stopped in {cell.name}, after saving; call again to go on") from None
    except DeepenError as error:
        raise type(error)(f"{directory}: {error}") from None
    store.finish(cell, computed, code)


class _Narrow:
    """A cell is one stage of a study: of what it reports only the progress is shown."""

    def __init__(self, reporter: Reporter, title: str) -> None:
        self._reporter, self._title = reporter, title

    def begin(self) -> None:
        self._reporter.stage(self._title)

    def stage(self, title: str) -> None:
        """Pass over a stage of the cell."""

    def progress(self, done: int, total: int | None, detail: str = "") -> None:
        self._reporter.progress(done, total, detail)

    def note(self, text: str) -> None:
        """Pass over what the cell says; its own records hold it."""
