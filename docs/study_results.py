"""The committed studies' tables and figures on the pages that speak of them; used by docs/generate.py."""

from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path

from deepen.records import (
    Cell,
    ContinualRecord,
    KnowledgeRecord,
    Provenance,
    SequenceCell,
    StudyRecord,
    StudyRow,
    StudyScore,
    StudySwitch,
    read_record,
)
from deepen.report.study import beaten
from deepen.report.study_figures import count_charts, plane
from deepen.report.study_switch import switched_lines, switched_tables
from deepen.report.svg import Chart
from deepen.report.wording import change, count, loss

BEGIN, END = "<!-- {name}, by docs/generate.py -->\n", "<!-- end of {name} -->\n"
_PAGES = {
    "baselines-small": "studies.md",
    "ablation-small": "studies.md",
    "ablation-zero": "studies.md",
    "knowledge-small": "studies.md",
    "continual-small": "continual.md",
    "forgetting": "forgetting.md",
    "forgetting-books-4m": "forgetting.md",
    "forgetting-embedded": "forgetting.md",
    "forgetting-stories260k": "forgetting.md",
    "forgetting-parts": "forgetting.md",
}
_FORGETTING = ("forgetting-books-4m", "forgetting-embedded", "forgetting-stories260k")
_DRAWN = ("baselines-small", "ablation-small", "ablation-zero", "forgetting-parts", *_FORGETTING)
_PRESETS = ("balanced", "keep")
_NONE = "–"
_SCORED = "{}: Δ and 95% interval; seeds"


def filled_pages(docs: Path, records: Path) -> dict[str, str]:
    """Return page -> content with the committed records' results between their markers."""
    pages = {page: (docs / page).read_text() for page in set(_PAGES.values())}
    for name, page in _PAGES.items():
        begin, end = BEGIN.format(name=name), END.format(name=name)
        before, _, rest = pages[page].partition(begin)
        _, _, after = rest.partition(end)
        pages[page] = f"{before}{begin}\n{_result(records, name)}\n{end}{after}"
    return pages


def figures(records: Path) -> dict[str, str]:
    """Return file -> drawing, of what the pages show."""
    drawn: dict[str, str] = {}
    for name in _DRAWN:
        record = read_record(records / f"{name}.json", StudyRecord)
        for domain in _domains(record):
            drawn |= {file: _alone(chart) for file, chart in _drawings(record, name, domain)}
    return drawn


def _result(records: Path, name: str) -> str:
    path = records / f"{name}.json"
    if name == "forgetting":
        return _goals({each: read_record(records / f"{each}.json", StudyRecord) for each in _FORGETTING})
    if name == "continual-small":
        return _continual(read_record(path, ContinualRecord))
    if name == "knowledge-small":
        return _knowledge(read_record(path, KnowledgeRecord))
    record = read_record(path, StudyRecord)
    return "".join(_domain(record, name, domain) for domain in _domains(record)) + _origin(
        record.provenance, name, record.codes
    )


def _domains(record: StudyRecord) -> list[str]:
    return list(dict.fromkeys(row.domain for row in record.rows))


def _domain(record: StudyRecord, name: str, domain: str) -> str:
    rows = [row for row in record.rows if row.domain == domain]
    first = rows[0]
    head = ["", "trained", "peak rate", _SCORED.format("domain"), _SCORED.format("general")]
    lines = [["base", "", "", loss(first.domain_score.base_value), _base_of(first.general)]]
    lines += [[*_cost(row), _score(row.domain_score), _score(row.general)] for row in rows]
    if record.pairs:
        worse = beaten(record)
        head.append("beaten on both by")
        by = ["", *(", ".join(worse.get((domain, row.row), [])) or _NONE for row in rows)]
        lines = [[*line, names] for line, names in zip(lines, by, strict=True)]
    table = _table(head, lines)
    texts = ", ".join(first.domain_score.texts)
    drawings = _drawings(record, name, domain)
    shown = "".join(f"![{chart.title}](images/{file})\n" for file, chart in drawings)
    seeds = max(len(row.seeds) for row in rows)
    switched = "".join(_switched(each) for each in switched_tables(record, domain))
    title = f"**{domain}** ({texts}, {first.domain_score.n} documents; {seeds} seeds)"
    return f"{title}\n\n{table}{switched}{shown}\n"


def _switched(rows: Sequence[StudySwitch]) -> str:
    first, sides = rows[0], ("domain", "general")
    said = f"With a switch, behind the first {first.prompt_tokens} tokens of each window, which decide:"
    head = ["", *map(_SCORED.format, sides), *(f"{side}: wrong" for side in sides)]
    base = ["base", loss(first.domain_score.base_value), _base_of(first.general), "", "", ""]
    lines = [
        [
            *(line.label, _score(line.domain), _score(line.general), line.domain_wrong, line.general_wrong),
            "" if line.cost is None else f"{line.cost:.2f} prefills",
        ]
        for line in switched_lines(rows)
    ]
    return f"{said}\n\n{_table([*head, 'a decision'], [base, *lines])}"


def _goals(records: Mapping[str, StudyRecord]) -> str:
    """What the presets were to reach, beside what they reached."""
    head = ["", "general rise, of `paper`'s", "domain loss, of `paper`'s", "of `full`'s", "beaten on both by"]
    lines = []
    for name, record in records.items():
        for domain in _domains(record):
            rows = {row.row: row for row in record.rows if row.domain == domain}
            worse = beaten(record)
            for preset in _PRESETS if {"full", "paper", *_PRESETS} <= rows.keys() else ():
                risen, learned, full = _beside(rows, preset)
                beaten_by = ", ".join(worse.get((domain, preset), [])) or _NONE
                base = name.removeprefix("forgetting-")
                lines.append([f"`{preset}`, {base}, {domain}", risen, learned, full, beaten_by])
    return _table(head, lines)


def _beside(rows: Mapping[str, StudyRow], preset: str) -> tuple[str, str, str]:
    risen = {label: row.general.delta for label, row in rows.items() if row.general}
    learned = {label: row.domain_score.value for label, row in rows.items()}
    of = [learned[preset] / learned[label] - 1 for label in ("paper", "full")]
    paper, full = (f"{ratio:+.1%}".replace("-", "−") for ratio in of)
    return f"{risen[preset] / risen['paper']:.0%}", paper, full


def _drawings(record: StudyRecord, name: str, domain: str) -> list[tuple[str, Chart]]:
    charts = [plane(record, domain)] if record.kind == "baselines" else count_charts(record, domain)
    found = [chart for chart in charts if chart]
    return [(f"{name}-{domain}-{number}.svg", chart) for number, chart in enumerate(found)]


def _cost(row: StudyRow) -> list[str]:
    return [row.row, count(row.trainable), f"{row.learning_rate:g}"]


def _base_of(score: StudyScore | None) -> str:
    return loss(score.base_value) if score else _NONE


def _score(score: StudyScore | None) -> str:
    if score is None:
        return _NONE
    spread = f"; {change(min(score.seed_deltas))} to {change(max(score.seed_deltas))}"
    return f"{_difference(score.delta, score.ci_low, score.ci_high)}{spread}"


def _difference(delta: float | None, low: float | None, high: float | None) -> str:
    if delta is None:
        return _NONE
    if low is None or high is None:
        return change(delta)
    return f"{change(delta)} ({change(low)} to {change(high)})"


def _knowledge(record: KnowledgeRecord) -> str:
    comparison = record.comparison
    if comparison is None:
        return "Not computed yet.\n"
    head = ["", *(f"{column.name}, {column.role}" for column in comparison.columns)]
    rows = [[row.label, *map(_beside_base, row.cells)] for row in comparison.rows]
    return _table(head, rows) + _origin(record.provenance, "knowledge-small", record.codes)


def _beside_base(cell: Cell) -> str:
    change_ = cell.from_base
    if change_ is None:
        return loss(cell.value)
    return f"{loss(cell.value)} ({change(change_.ci_low)} to {change(change_.ci_high)})"


def _continual(record: ContinualRecord) -> str:
    names = [task.name for task in record.tasks]
    scores = _table(
        ["", *names],
        [
            ["base", *(f"{score:.3f}" for score in record.base_scores)],
            *([cell.method, *(_number(score) for score in cell.R[-1])] for cell in record.cells),
        ],
    )
    sums = _table(
        ["", "OP", "BWT", "forward transfer", "general text, Δ"],
        [[cell.method, *_summary(cell)] for cell in record.cells],
    )
    codes: list[str] = []
    return (
        f"Scores after the last task:\n\n{scores}{sums}{_origin(record.provenance, 'continual-small', codes)}"
    )


def _summary(cell: SequenceCell) -> list[str]:
    kept = [_difference(m.delta, m.ci_low, m.ci_high) for m in cell.general if m.metric == "nats_per_token"]
    return [
        f"{cell.op:.3f} ({cell.op_low:.3f} to {cell.op_high:.3f})",
        _difference(cell.bwt, cell.bwt_low, cell.bwt_high),
        _NONE if cell.forward_transfer is None else change(cell.forward_transfer),
        ", ".join(kept) or _NONE,
    ]


def _number(score: float | None) -> str:
    return _NONE if score is None else f"{score:.3f}"


def _origin(provenance: Provenance | None, name: str, codes: Sequence[str]) -> str:
    where = ""
    if provenance:
        hardware = provenance.hardware
        where = f"{hardware['processor']}, {hardware['cores']} cores; torch {provenance.packages['torch']}; "
    commits = f"deepen at {', '.join(code[:7] for code in codes)}; " if codes else ""
    return (
        f"<sub>{where}{commits}`recipes/studies/{name}.yaml`, record: `studies/records/{name}.json`</sub>\n"
    )


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines) + "\n"


def _alone(chart: Chart) -> str:
    """Return a page's drawing as a file of its own, with the page's colours in it, light and dark."""
    style = files("deepen.report").joinpath("templates", "style.css").read_text()
    light, _, rest = style.partition("@media (prefers-color-scheme: dark)")
    dark = rest.partition("@media print")[0]
    colours = f"{light}@media (prefers-color-scheme: dark){dark}".replace(":root", "svg")
    head, _, body = str(chart.svg).partition(">")
    ink = "svg { color: var(--ink); font-family: system-ui, sans-serif; }"
    return f'{head} xmlns="http://www.w3.org/2000/svg"><style>{colours}{ink}</style>{body}'
