"""What the rows of a study are with a switch: a table for the page, the terminal and the docs."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from rich.table import Table
from rich.text import Text

from deepen.records import StudyRecord, StudyScore, StudySwitch, SwitchErrors
from deepen.report.wording import change, interval, number


@dataclass(frozen=True, kw_only=True)
class SwitchedLine:
    """A row of the table.

    Attributes:
        label: of the row.
        domain: what was learned.
        general: what was kept; None without general texts.
        domain_wrong: wrong decisions of how many; empty where nothing decides.
        general_wrong: the same on general text.
        cost: of a decision, in prefills of what is read; None where nothing decides.
        row: the record behind it.
    """

    label: str
    domain: StudyScore
    general: StudyScore | None
    domain_wrong: str = ""
    general_wrong: str = ""
    cost: float | None = None
    row: StudySwitch


def switched_tables(record: StudyRecord, domain: str) -> list[list[StudySwitch]]:
    """Return the rows with a switch of a domain, those together that are of the same tokens."""
    rows = [row for row in record.switched if row.domain == domain]
    rows.sort(key=lambda row: row.prompt_tokens)
    return [list(group) for _, group in groupby(rows, key=lambda row: row.prompt_tokens)]


def switched_lines(rows: Sequence[StudySwitch]) -> list[SwitchedLine]:
    """Return the lines of a table but for the base's: of each row without the switch and with it."""
    lines = []
    for row in rows:
        lines.append(
            SwitchedLine(label=row.beside, domain=row.always_domain, general=row.always_general, row=row)
        )
        lines.append(
            SwitchedLine(
                label=row.row,
                domain=row.domain_score,
                general=row.general,
                domain_wrong=_share(row.domain_errors),
                general_wrong=_share(row.general_errors),
                cost=row.cost,
                row=row,
            )
        )
    return lines


def _share(errors: SwitchErrors | None) -> str:
    return "" if errors is None else f"{errors.wrong:,} of {errors.decided:,}"


def switched_table(record: StudyRecord) -> Table:
    """Return the table for the terminal."""
    table = Table(caption="behind the first tokens of each window, which decide; Δ as above")
    for heading in ("domain", "row"):
        table.add_column(heading, overflow="fold")
    for heading in ("domain Δ", "general Δ", "wrong", "cost"):
        table.add_column(heading, justify="right", no_wrap=True)
    for domain in dict.fromkeys(row.domain for row in record.switched):
        for rows in switched_tables(record, domain):
            for line in switched_lines(rows):
                table.add_row(*map(Text, _cells(domain, line)))
    return table


def _cells(domain: str, line: SwitchedLine) -> tuple[str, ...]:
    tokens = number(line.row.prompt_tokens, "token")
    wrong = "\n".join(each for each in (line.domain_wrong, line.general_wrong) if each)
    cost = "" if line.cost is None else f"{line.cost:.2f} ×"
    return f"{domain}\n{tokens}", line.label, shown_score(line.domain), shown_score(line.general), wrong, cost


def shown_score(score: StudyScore | None) -> str:
    """Write a difference from the base and, on a line of its own, its interval."""
    return "–" if score is None else f"{change(score.delta)}\n{interval(score.ci_low, score.ci_high)}"
