"""The page of a study, and its table for the terminal."""

from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from deepen.records import (
    AnyStudy,
    ContinualRecord,
    KnowledgeRecord,
    RateChoice,
    StudyRecord,
    StudyScore,
    read_record,
)
from deepen.report.continual import write_continual_report
from deepen.report.knowledge import print_knowledge, write_knowledge_report
from deepen.report.study_figures import count_charts, curves_chart, plane
from deepen.report.study_switch import shown_score, switched_lines, switched_table, switched_tables
from deepen.report.templates import render
from deepen.report.wording import change, interval
from deepen.report.write import write_page

_TITLES = {
    "baselines": "Methods side by side",
    "ablation": "How many new blocks, and where",
}


def write_study_report(study: Path) -> Path:
    """Write `report.html` into a study's directory from its `study.json`; return its path.

    Raises:
        DataError: the record is missing or malformed.
        OutputError: the page cannot be written.
    """
    file = study / "study.json"
    if read_record(file, AnyStudy).kind == "continual":
        return write_continual_report(study, read_record(file, ContinualRecord))
    record = read_study(study)
    if isinstance(record, KnowledgeRecord):
        return write_knowledge_report(study, record)
    return write_page(study / "report.html", render_study(record))


def read_study(study: Path) -> StudyRecord | KnowledgeRecord:
    """Read the `study.json` of a study of runs.

    Raises:
        DataError: the record is missing or malformed.
    """
    file = study / "study.json"
    if read_record(file, AnyStudy).kind == "knowledge":
        return read_record(file, KnowledgeRecord)
    return read_record(file, StudyRecord)


def render_study(record: StudyRecord) -> str:
    """Return the page of a study as HTML; it links the records of its cells, relative to itself."""
    domains = list(dict.fromkeys(row.domain for row in record.rows))
    return render(
        "study.html.j2",
        study=record,
        title=_TITLES[record.kind],
        domains={domain: [row for row in record.rows if row.domain == domain] for domain in domains},
        planes={domain: plane(record, domain) for domain in domains if record.kind == "baselines"},
        curves={domain: curves_chart(record, domain) for domain in domains},
        counts={domain: count_charts(record, domain) for domain in domains},
        rates=_rates(record),
        places={
            (choice.domain, choice.row): dict(zip(choice.losses, choice.cells, strict=True))
            for choice in record.choices
        },
        edges=[choice for choice in record.choices if choice.at_edge],
        spread=seed_spread,
        switched={domain: switched_tables(record, domain) for domain in domains},
        switched_lines=switched_lines,
        findings=describe_study(record),
        beaten=beaten(record),
    )


def _rates(record: StudyRecord) -> list[tuple[str, list[str], list[RateChoice]]]:
    """Choices by domain, with all rates tried there in ascending order."""
    found = []
    for domain in dict.fromkeys(choice.domain for choice in record.choices):
        choices = [choice for choice in record.choices if choice.domain == domain]
        tried = sorted({rate for choice in choices for rate in choice.losses}, key=float)
        found.append((domain, tried, choices))
    return found


def describe_study(record: StudyRecord) -> list[str]:
    """Say of each domain which row learned most and which forgot least, by how much from the base."""
    said = []
    for domain in dict.fromkeys(row.domain for row in record.rows):
        rows = [row for row in record.rows if row.domain == domain]
        best = min(rows, key=lambda row: row.domain_score.value)
        line = f"{domain}: {best.row} learned most ({_moved(best.domain_score)})"
        kept = [(row.general.delta, row, row.general) for row in rows if row.general]
        if kept:
            _, least, score = min(kept, key=lambda each: each[0])
            line += f"; {least.row} forgot least ({_moved(score)})"
        said.append(line)
    return said


def beaten(record: StudyRecord) -> dict[tuple[str, str], list[str]]:
    """Return (domain, row) -> the rows that learned more and forgot less, both beyond their intervals."""
    found: dict[tuple[str, str], list[str]] = {}
    for pair in record.pairs:
        if better := pair.better():
            found.setdefault((pair.domain, pair.other if better == pair.row else pair.row), []).append(better)
    return found


def _moved(score: StudyScore) -> str:
    return f"{change(score.delta)}, {interval(score.ci_low, score.ci_high)}"


def seed_spread(score: StudyScore) -> str:
    """Write the range over seeds; nothing for a single one."""
    deltas = score.seed_deltas
    return f"seeds {change(min(deltas))} to {change(max(deltas))}" if len(deltas) > 1 else "one seed"


def print_study(record: StudyRecord | KnowledgeRecord, console: Console) -> None:
    """Print the table, a row a place; then what was found and what is missing."""
    if isinstance(record, KnowledgeRecord):
        print_knowledge(record, console)
        return
    console.print(study_table(record))
    if record.switched:
        console.print(switched_table(record))
    for line in describe_study(record):
        console.print(line, highlight=False, soft_wrap=True)
    for choice in record.choices:
        if choice.at_edge:
            said = f"{choice.domain} {choice.row}: the best rate, {choice.chosen:g}, is at the grid's edge"
            console.print(said, highlight=False, soft_wrap=True)


def study_table(record: StudyRecord) -> Table:
    """Return the table for the terminal; the page has the rest."""
    table = Table(caption="nats per token; Δ from the base, paired, mean over seeds, 95% interval over items")
    for heading in ("domain", "row"):
        table.add_column(heading, overflow="fold")
    for heading in ("domain Δ", "general Δ", "seeds"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in record.rows:
        scores = (shown_score(row.domain_score), shown_score(row.general))
        table.add_row(*map(Text, (row.domain, row.row, *scores, str(len(row.seeds)))))
    return table
