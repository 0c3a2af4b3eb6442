import io
import json
import math
import re
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from html.parser import HTMLParser
from http.client import HTTPConnection
from itertools import pairwise
from threading import Thread

import pytest
import yaml
from rich.console import Console
from run_directory import PROVENANCE, RECIPE, items, text, write_run

from deepen.errors import DataError, OutputError, RecipeError
from deepen.evaluation import compare_runs
from deepen.records import (
    AuditResult,
    Cell,
    Column,
    Comparison,
    Difference,
    EvaluationRecord,
    IdentityResult,
    Metric,
    Row,
    RunResult,
    TaskRecord,
    TokenShift,
    read_record,
)
from deepen.report import (
    WatchServer,
    describe_differences,
    finding,
    print_table,
    read_run,
    render_table,
    write_card,
    write_comparison_page,
    write_report,
)
from deepen.report.layout import draw_tower
from deepen.report.wording import change, count, duration, loss, verdict

VOID = {"meta", "link", "br", "img", "input", "hr", "use", "path", "rect"}
EVIL = '<script>alert("x")</script>'


@dataclass
class Page(HTMLParser):
    """The little that the tests ask of a page; fails on tags that do not nest."""

    tags: list = field(default_factory=list)
    open: list = field(default_factory=list)
    words: list = field(default_factory=list)
    rows: list = field(default_factory=list)

    def __post_init__(self):
        super().__init__()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if {"style", "script"} & set(self.open):
            return
        self.words.append(data)
        if "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += data

    @property
    def text(self):
        return " ".join("".join(self.words).split())

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def parse(path):
    page = Page()
    page.feed(path.read_text())
    page.close()
    assert page.open == []
    return page


def two_texts(general=0.02, domain=-3.3):
    return [
        text("tinystories", "general", items(1.52, general, spread=0.03)),
        text("gsm8k-test", "domain", items(5.7, domain, n=80, seed=1)),
    ]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "sample", two_texts())


@pytest.fixture(scope="module")
def page(run):
    return parse(write_report(run))


@pytest.fixture(scope="module")
def comparison(run, tmp_path_factory):
    other = write_run(tmp_path_factory.mktemp("other") / "full", two_texts(0.4, -3.5), method="full")
    return compare_runs([run, other], ["new blocks", "full"])


def assert_self_contained(path):
    raw = path.read_text()
    assert re.findall(r"https?://[^\"<\s]*", raw) == ["https://arxiv.org/abs/2401.02415"]
    assert raw.count("<script>") == raw.count("<script") == 1  # the tables' own, written into the page
    assert not re.search(r"<link|<img|<iframe|@import|url\((?!#)|src=|\bon\w+=", raw)
    page = parse(path)
    assert {link["href"] for link in page.all("a")} == {"https://arxiv.org/abs/2401.02415"}


def test_the_page_needs_nothing_else(run, page):
    assert_self_contained(run / "report.html")


def test_ids_are_unique_and_references_resolve(run, page):
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    raw = (run / "report.html").read_text()
    wanted = set(re.findall(r"(?:url\(|href=\")#([^)\"]+)", raw))
    wanted |= {name for each in page.all("svg") for name in each["aria-labelledby"].split()}
    assert wanted <= set(ids)


def test_every_drawing_has_title_and_description_and_takes_the_pages_colours(run, page):
    drawings = page.all("svg")
    assert len(drawings) == 5 + 4  # the layout and four charts, two small figures for each of two blocks
    assert all(each["role"] == "img" and each["viewbox"] for each in drawings)
    assert len(page.all("desc")) == 9
    raw = (run / "report.html").read_text()
    inside = "".join(re.findall(r"<svg.*?</svg>", raw, flags=re.DOTALL))
    assert not re.search(r"#0[0-9a-c]0[0-9a-c]0[0-9a-c]\b|DejaVu|<metadata|<style|<!--", inside)
    assert "currentColor" in inside
    assert "var(--general)" in inside


def test_tables_are_for_all_readers(page):
    assert len(page.all("table")) == len(page.all("caption")) == 7
    assert all(each.get("scope") in ("col", "row", "rowgroup") for each in page.all("th"))
    assert page.all("html") == [{"lang": "en"}]
    assert any(each.get("name") == "viewport" for each in page.all("meta"))


def test_every_number_of_the_record_is_in_the_table_and_no_other(run, page):
    record = read_record(run / "evaluation" / "heldout.json", EvaluationRecord)
    names = ("base_value", "value", "delta", "ci_low", "ci_high")
    expected = {getattr(metric, name) for metric in record.metrics for name in names}
    assert {float(each["value"]) for each in page.all("data")} == expected
    for metric in record.metrics:
        row = next(
            row
            for row in page.rows
            if row[0].startswith(metric.task) and loss(metric.value) == row[2].strip()
        )
        assert row[1].strip() == loss(metric.base_value)
        shown = f"{change(metric.delta)} {change(metric.ci_low)} to {change(metric.ci_high)}"
        assert " ".join(row[3].split()) == shown


def test_perplexities_and_verdicts_are_the_records(run, page):
    record = read_record(run / "evaluation" / "heldout.json", EvaluationRecord)
    for metric in record.metrics:
        if metric.metric == "nats_per_token":
            row = next(row for row in page.rows if row[0] == metric.task and len(row) == 6)
            assert row[1:3] == [f"{math.exp(nats):.4g}" for nats in (metric.base_value, metric.value)]
            assert row[3].startswith(f"{math.exp(metric.delta):.3g} (")
            assert row[5].startswith(finding(metric))
            if metric.items_needed:
                assert f"{metric.items_needed:,} items" in row[5]


def test_shifts_are_shown_where_they_were_measured(tmp_path, page):
    assert "Token by token" not in page.text
    run = write_run(tmp_path / "run", two_texts())
    path = run / "evaluation" / "heldout.json"
    record = read_record(path, EvaluationRecord)
    found = TokenShift(
        task="tinystories", role="general", n=60, tokens=9000, unshifted=0.926, marginal=0.067, shifted=0.007,
        kl=0.0312, kl_low=0.02, kl_high=0.04,
    )  # fmt: skip
    path.write_text(record.model_copy(update={"shift": [found]}).model_dump_json())
    row = parse(write_report(run)).rows
    assert ["tinystories9 k tokens", "92.6%", "6.7%", "0.7%", "0.031 (0.020 to 0.040)"] in [
        [cell.replace("\xa0", " ") for cell in each] for each in row
    ]


def test_tasks_are_shown_on_the_page_and_the_card(tmp_path):
    run = write_run(tmp_path / "run", two_texts())
    assert "Benchmarks" not in parse(write_report(run)).text
    found = Metric(
        task="arc_easy:5", role="general", metric="acc_norm", value=0.31, stderr=0.02, n=570, base_value=0.33,
        delta=-0.02, ci_low=-0.035, ci_high=0.005, higher_is_better=True, p=0.1, p_holm=0.2, margin=0.01,
        verdict="not enough items", items_needed=41_000,
    )  # fmt: skip
    figure = Metric(task="arc_easy:5", metric="f1", value=0.5, stderr=None, n=570, base_value=0.4, delta=0.1)
    record = TaskRecord(
        task="arc_easy:5", identity="i", asked="a", model="m", base="b", limit=None, metrics=[found, figure],
        scores=[], results={}, items="items/arc_easy-5.jsonl", seconds=1.0, provenance=PROVENANCE,
    )  # fmt: skip
    (run / "evaluation" / "task-arc_easy-5.json").write_text(record.model_dump_json())
    rows = [[" ".join(cell.split()) for cell in row] for row in parse(write_report(run)).rows]
    assert [
        "arc_easy:5570 items, general", "acc_norm ↑", "0.330", "0.310", "−0.020 −0.035 to +0.005", "0.2",
        "not enough items: 41,000 items would likely tell",
    ] in rows  # fmt: skip
    (row,) = [row for row in rows if "f1 ↓" in row]
    assert row[4:] == ["+0.100no interval", "–", "–"]
    card = write_card(run, tmp_path).read_text()
    shown = "| 570 | 0.330 | 0.310 | −0.020 | −0.035 to +0.005 | not enough items: 41,000 items would likely"
    assert shown in card


def test_records_without_verdicts_are_read(tmp_path):
    run = write_run(tmp_path / "run", two_texts())
    path = run / "evaluation" / "heldout.json"
    record = json.loads(path.read_text())
    for metric in record["metrics"]:
        for name in ("p", "p_holm", "margin", "verdict", "items_needed", "higher_is_better"):
            del metric[name]
    del record["shift"]
    path.write_text(json.dumps(record))
    assert "How sure that is" not in parse(write_report(run)).text


def test_the_page_says_what_was_done_and_proved(page):
    said = page.text
    assert "2 new blocks were added to the 5 blocks of stories260k" in said
    assert "1.1 M tokens of gsm8k (60%) and licences (40%)" in said
    assert "Learned" in said or "learned" in said
    assert "The base, to the bit, before training" in said
    assert "No byte of the base moved" in said
    assert PROVENANCE.command in said
    assert PROVENANCE.git in said
    assert "260 k" in said
    assert "learning_rate: 0.001" in said


def test_the_page_does_not_flatter(tmp_path):
    failed = {
        "identity": IdentityResult(identical=False, max_abs_difference=0.25, checks=["float32"]),
        "audit": AuditResult(unchanged=False, tensors=47, before="aaa", after="bbb"),
    }
    said = parse(write_report(write_run(tmp_path / "bad", two_texts(0.3, 0.2), **failed))).text
    assert "got worse" in said
    assert "forgot" in said
    assert "Not the base before training" in said
    assert "Largest difference of any logit: 0.25" in said
    assert "The base was changed by training" in said
    assert "aaa" in said
    assert "bbb" in said


def test_a_full_run_without_evaluation(tmp_path):
    recipe = RECIPE.replace("expand: {blocks: 2}\n", "").replace("train: {", "train: {method: full, ")
    run = write_run(
        tmp_path / "full", two_texts(), recipe=recipe, evaluated=False,
        method="full", layout=None, identity=None, audit=None,
    )  # fmt: skip
    page = parse(write_report(run))
    assert "All parameters of stories260k were trained" in page.text
    assert "No held-out text was named" in page.text
    assert "Proofs" not in page.text
    write_card(run, run)


def test_names_are_escaped_everywhere(tmp_path):
    recipe = RECIPE.replace("examples", EVIL)
    evil = f"{EVIL}$x_$|`*"
    provenance = PROVENANCE.model_copy(
        update={"command": evil, "data": {evil: evil}, "hardware": {evil: evil}}
    )
    given = [text(evil, "general", items(1.5, 0.1)), text(evil + "2", "domain", items(3.0, -1.0, seed=1))]
    given.append(text("[bold]漢字[/bold]", "domain", items(3.0, -1.0, seed=2)))
    run = write_run(tmp_path / "runs", given, recipe=recipe, provenance=provenance, base=evil)
    report = write_report(run)
    assert_self_contained(report)
    assert evil in parse(report).text
    target = write_comparison_page(compare_runs([run, run], [evil, "[red]b"]), tmp_path / "comparison.html")
    assert_self_contained(target)
    assert evil in parse(target).text
    card = write_card(run, run).read_text()
    assert "<script" not in card.partition("---\n")[2].partition("---\n")[2]
    rows = [line for line in card.splitlines() if line.startswith("|") and "bold" in line]
    assert rows
    # A pipe in a name does not make another cell.
    assert all(len(re.findall(r"(?<!\\)\|", line)) == 10 for line in rows)


def test_the_page_is_reproducible(run):
    assert write_report(run).read_text() == write_report(run).read_text()


def test_a_run_without_its_records_is_named(tmp_path):
    run = write_run(tmp_path / "run", two_texts())
    (run / "recipe.yaml").write_text("base: x\n")
    with pytest.raises(RecipeError, match=r"recipe\.yaml"):
        write_report(run)
    (run / "result.json").unlink()
    with pytest.raises(DataError, match=r"holds no finished run \(no result\.json\)"):
        read_run(run)
    assert not (run / "report.html").exists()


def test_a_page_that_cannot_be_written_leaves_nothing(run, comparison, tmp_path):
    with pytest.raises(OutputError, match="cannot be written"):
        write_comparison_page(comparison, tmp_path / "absent" / "page.html")
    (tmp_path / "page.html").mkdir()
    with pytest.raises(OutputError, match="cannot be written"):
        write_comparison_page(comparison, tmp_path / "page.html")
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


def test_a_page_gets_the_mode_of_other_files(run, tmp_path):
    (tmp_path / "other").touch()
    assert write_report(run).stat().st_mode == (tmp_path / "other").stat().st_mode


def test_what_each_block_did_is_shown(run, page):
    rows = {row[0]: [cell.strip() for cell in row[1:]] for row in page.rows if len(row) == 5}
    assert rows.keys() == {"Block", "2", "6"}
    last = read_run(run).training[-4:]  # what one point of the small figure stands for
    for block in (2, 6):
        shown = f"{sum(p.blocks[block].gradient_norm for p in last) / 4:.2g}"
        assert rows[str(block)][0] == shown
    lines = re.findall(r'class="spark"[^\n]*<path d="M([^"]*)"', (run / "report.html").read_text())
    ups = [[float(point.split()[1]) for point in line.split("L")] for line in lines]
    assert len(ups) == 4
    # Gradient norms fall by e, and those of the second block are three times as high, on one scale.
    assert all(line == sorted(line) for line in ups)
    assert ups[2][0] == 1.0
    assert ups[0][-1] == pytest.approx(25.0, abs=0.1)
    assert "43%" in page.text
    assert "12.5 G" not in page.text
    assert "12.5 B" in page.text


def test_findings_are_told_on_the_page_and_the_card(tmp_path):
    line = "of 1,000 training documents 7 share 13 words with an evaluation text (dropped)"
    run = write_run(tmp_path / "run", two_texts(), findings=line)
    assert line in parse(write_report(run)).text
    assert line in write_card(run, run).read_text()


def unfinished(directory, **changes):
    run = write_run(directory, two_texts(), evaluated=False, **changes)
    (run / "result.json").unlink()
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:150]) + lines[150][:20])
    return run


def get(server, path="/", host=None):
    connection = HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    connection.request("GET", path, headers={"Host": host} if host else {})
    response = connection.getresponse()
    return response.status, response.read().decode()


@pytest.fixture
def served(tmp_path):
    run = unfinished(tmp_path / "run")
    with WatchServer(run, 0) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield run, server
        server.shutdown()
        thread.join()


def test_the_page_is_served_while_the_run_goes_on(served):
    run, server = served
    status, raw = get(server)
    page = Page()
    page.feed(raw)
    assert (status, page.open) == (200, [])
    assert {"http-equiv": "refresh", "content": "5"} in page.all("meta")
    (bar,) = page.all("progress")
    assert float(bar["max"]) == 1.1e6
    step = int(bar["value"]) // 4096
    assert f"Step {step}:" in page.text
    assert "left" in page.text
    assert 'class="verdicts"' not in raw
    assert {"training-title", "domain-title", "general-title", "speed-title"} <= {
        attributes.get("id") for _, attributes in page.tags
    }
    # Anew for every request: a further step, then the end.
    with (run / "metrics.jsonl").open("a") as log:
        log.write('\n{"step": 200, "tokens": 819200, "loss": 2.5}\n')
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(line for line in lines if line.endswith("}\n")))
    assert "Step 200:" in get(server)[1]
    other = write_run(run.parent / "other", two_texts())
    for name in ("result.json", "evaluation/heldout.json"):
        (other / name).rename(run / name)
    status, raw = get(server)
    assert status == 200
    assert 'class="verdicts"' in raw
    assert "http-equiv" not in raw
    assert write_report(run).read_text() == raw


def test_nothing_else_is_served_and_to_no_one_else(served):
    run, server = served
    assert get(server, "/recipe.yaml")[0] == 404
    assert get(server, host="evil.example:80")[0] == 403
    assert get(server, host="localhost:1234")[0] == 200
    (run / "environment.json").unlink()
    status, raw = get(server)
    assert status == 503
    assert "environment.json" in raw
    assert "refresh" in raw
    with pytest.raises(OutputError, match="another with --port"):
        WatchServer(run, server.server_port)
    with pytest.raises(DataError, match="no such directory"):
        WatchServer(run / "absent", 0)


def test_the_watched_page_ends_on_request(tmp_path):
    run = unfinished(tmp_path / "run")
    process = subprocess.Popen(
        [sys.executable, "-m", "deepen", "report", str(run), "--watch", "--port", "0"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    url = process.stdout.readline().strip()
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/", url)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 0
    assert "Traceback" not in said


# The card


def front_matter(card):
    _, front, _ = card.split("---\n", 2)
    return yaml.safe_load(front)


@pytest.mark.parametrize(
    ("files", "loads", "not_loads", "library"),
    [
        (["blocks.safetensors"], "deepen.load", "from_pretrained", "deepen"),
        (["config.json"], "AutoModelForCausalLM.from_pretrained", "deepen.load", "transformers"),
        (["blocks/blocks.safetensors", "model/config.json"], "deepen.load", None, "transformers"),
    ],
)
def test_the_card_says_how_to_load_what_is_there(run, tmp_path, files, loads, not_loads, library):
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    path = write_card(run, tmp_path)
    assert path == tmp_path / "README.md"
    card = path.read_text()
    assert loads in card
    assert not_loads is None or not_loads not in card
    assert front_matter(card)["library_name"] == library


def test_the_card_names_its_base_only_where_the_hub_has_it(tmp_path, monkeypatch):
    run = write_run(tmp_path / "run", two_texts(), base="meta-llama/Llama-2-7b-hf")
    front = front_matter(write_card(run, tmp_path).read_text())
    assert (front["base_model"], front["base_model_relation"]) == ("meta-llama/Llama-2-7b-hf", "adapter")
    assert {"deepen", "block-expansion", "llama-pro"} <= set(front["tags"])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "meta-llama" / "Llama-2-7b-hf").mkdir(parents=True)
    assert "base_model" not in front_matter(write_card(run, tmp_path).read_text())
    local = write_run(tmp_path / "local", two_texts(), base="/home/someone/models/tiny")
    card = write_card(local, tmp_path).read_text()
    assert "base_model" not in front_matter(card)
    assert "/home/someone" not in card


def test_the_cards_table_is_the_records(run, tmp_path):
    card = write_card(run, tmp_path).read_text()
    for metric in read_record(run / "evaluation" / "heldout.json", EvaluationRecord).metrics:
        cells = [loss(metric.base_value), loss(metric.value), change(metric.delta)]
        cells.append(f"{change(metric.ci_low)} to {change(metric.ci_high)}")
        assert f"| {' | '.join(cells)} |" in card


# The comparison


def test_the_comparison_page(comparison, tmp_path):
    path = write_comparison_page(comparison, tmp_path / "comparison.html")
    assert_self_contained(path)
    page = parse(path)
    cells = [cell for row in comparison.rows for cell in row.cells]
    differences = [each for cell in cells for each in (cell.from_base, cell.from_first) if each]
    expected = {cell.value for cell in cells}
    expected |= {end for each in differences for end in (each.delta, each.ci_low, each.ci_high)}
    assert {float(each["value"]) for each in page.all("data")} == expected
    assert len(page.all("svg")) == 1
    assert [row[0] for row in page.rows if len(row) == 4][:4] == ["Run", "base", "new blocks", "full"]


def test_one_role_alone_has_no_plane(tmp_path):
    run = write_run(tmp_path / "run", two_texts()[:1])
    path = write_comparison_page(compare_runs([run]), tmp_path / "page.html")
    assert parse(path).all("svg") == []


def printed(table, width=140):
    console = Console(width=width, file=io.StringIO())
    console.print(table)
    return console.file.getvalue()


def test_the_terminal_table(comparison):
    shown = printed(render_table(comparison))
    for row in comparison.rows:
        line = next(
            line for line in shown.splitlines() if row.label in line and loss(row.cells[0].value) in line
        )
        for cell in row.cells:
            assert loss(cell.value) in line
            assert cell.from_base is None or change(cell.from_base.delta) in line


def test_where_a_row_a_run_does_not_fit_there_is_one_a_text_and_run(comparison):
    def shown(width):
        console = Console(width=width, file=io.StringIO())
        print_table(comparison, console)
        return console.file.getvalue()

    assert shown(300).split() == printed(render_table(comparison), 300).split()
    narrow = shown(80)
    assert max(map(len, narrow.splitlines())) <= 80
    lines = iter(narrow.splitlines())
    for place, column in enumerate(comparison.columns):
        for row in comparison.rows:
            cell = row.cells[place]
            line = next(line for line in lines if row.label in line and loss(cell.value) in line)
            if cell.from_base:
                assert change(cell.from_base.delta) in line
                assert change(cell.from_base.ci_high) in line
            else:
                assert column.name in line


def test_labels_are_not_markup_in_the_terminal(run):
    assert "[red]x[/red]" in printed(render_table(compare_runs([run], ["[red]x[/red]"])))


def test_runs_are_told_apart_in_words_only_where_their_interval_does():
    def cell(delta, low, high):
        return Cell(value=2.0, from_first=Difference(delta=delta, ci_low=low, ci_high=high))

    def row(label, *cells):
        return Row(label=label, cells=list(cells))

    names = (("prose", "general"), ("code", "domain"))
    columns = [Column(name=name, role=role, pooled=True, n=9, tokens=9) for name, role in names]
    plain = Cell(value=2.0)
    rows = [
        row("base", plain, plain),
        row("full", plain, plain),
        row("blocks", cell(-0.2, -0.25, -0.15), cell(0.01, -0.01, 0.03)),
        row("few", cell(0.1, None, None), cell(0.05, 0.04, 0.06)),
    ]
    said = describe_differences(Comparison(metric="nats_per_token", base="b", columns=columns, rows=rows))
    assert said == [
        "blocks against full: general loss 0.200 lower (−0.250 to −0.150); "
        "domain loss not distinguishable (−0.010 to +0.030)",
        "few against full: general loss not distinguishable (too few items for an interval); "
        "domain loss 0.050 higher (+0.040 to +0.060)",
    ]


def test_one_difference_among_many_is_not_enough_and_what_is_left_out_is_said():
    columns = [Column(name="prose", role="general", pooled=True, n=9, tokens=9)]
    found = Difference(delta=-0.2, ci_low=-0.3, ci_high=-0.1, p=0.02, p_holm=0.08)
    rows = [Row(label=label, cells=[Cell(value=2.0)]) for label in ("base", "full")]
    rows.append(Row(label="blocks", cells=[Cell(value=2.0, from_base=found, from_first=found)]))
    given = Comparison(
        metric="nats_per_token", base="b", columns=columns, rows=rows, left_out=["code: not evaluated in x"]
    )
    assert describe_differences(given) == [
        "blocks against full: general loss not distinguishable, counting all comparisons "
        "(−0.300 to −0.100; p 0.08)",
        "left out: code: not evaluated in x",
    ]
    assert "p 0.08" in printed(render_table(given))
    sure = found.model_copy(update={"p_holm": 0.0004})
    rows[2] = Row(label="blocks", cells=[Cell(value=2.0, from_base=sure, from_first=sure)])
    said = describe_differences(given.model_copy(update={"rows": rows}))
    assert said[0] == "blocks against full: general loss 0.200 lower (−0.300 to −0.100)"
    assert "p < 0.001" in printed(render_table(given.model_copy(update={"rows": rows})))


# Words


@pytest.mark.parametrize(
    ("role", "low", "high", "finding", "kind"),
    [
        ("domain", -0.4, -0.2, "learned", "good"),
        ("domain", 0.2, 0.4, "got worse", "bad"),
        ("domain", -0.1, 0.7, "not distinguishable", "open"),
        ("general", 0.2, 0.4, "forgot", "bad"),
        ("general", -0.4, -0.2, "improved", "good"),
        ("general", -0.4, 0.03, "not distinguishable", "open"),
        ("general", None, None, "too few items", "open"),
    ],
)
def test_a_finding_needs_an_interval_without_zero(role, low, high, finding, kind):
    delta = 0.1 if low is None else (low + high) / 2
    metric = Metric(
        task="t", role=role, metric="nats_per_token", value=2 + delta, stderr=0.1, n=40,
        base_value=2.0, delta=delta, ci_low=low, ci_high=high,
    )  # fmt: skip
    found = verdict(metric)
    assert (found.finding, found.kind) == (finding, kind)
    assert f"from 2.000 to {loss(2 + delta)}" in found.sentence
    if finding == "not distinguishable" and role == "general":
        assert "less than 0.030" in found.sentence


def test_without_a_base_nothing_is_found():
    metric = Metric(task="t", role="general", metric="nats_per_token", value=2.0, stderr=0.1, n=40)
    assert verdict(metric).finding == "not compared"


@pytest.mark.parametrize(
    ("number", "said"), [(0, "0"), (812, "812"), (4096, "4.1 k"), (1_101_824, "1.1 M"), (66.7e9, "66.7 B"),
                         (999_999, "1 M"), (6_738_415_616, "6.74 B")],
)  # fmt: skip
def test_counts(number, said):
    assert count(number).replace("\xa0", " ") == said


@pytest.mark.parametrize(
    ("seconds", "said"), [(0.25, "0.25 s"), (42, "42 s"), (59.7, "1 min"), (200.4, "3 min 20 s"),
                          (9.97, "10 s"), (18_720, "5 h 12 min"), (183_600, "2 d 3 h")],
)  # fmt: skip
def test_durations(seconds, said):
    assert duration(seconds).replace("\xa0", " ") == said


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (-3.2971, "−3.297"),
        (0.0214, "+0.021"),
        (0.0, "+0.000"),
        (0.000123, "+0.0001"),
        (-0.0000123, "−0.00001"),
    ],
)
def test_changes_never_hide_in_rounding(value, said):
    assert change(value) == said


@pytest.mark.parametrize(
    ("line", "base", "new"),
    [("■■ □2 ■■■ □6", 5, (2, 6)), ("□0 □1 ■", 1, (0, 1)), ("■■", 2, ()), (" ".join(["■"] * 80), 80, ())],
)
def test_the_tower_is_the_layout(line, base, new):
    tower = draw_tower(line)
    assert (tower.base, tower.new) == (base, new)
    assert tuple(index for index, box in enumerate(tower.boxes) if box.new) == new
    heights = [box.y for box in tower.boxes]
    assert heights == sorted(heights, reverse=True)
    assert heights[-1] >= 0


def test_neighbouring_new_blocks_share_a_label_and_labels_do_not_overlap():
    tower = draw_tower("■ " * 20 + "□20 □21 □22 ■ □24 ■ □26")
    assert [label.text for label in tower.labels] == ["20–22", "24", "26"]
    heights = [label.y for label in tower.labels]
    assert all(lower - upper >= 13.9 for lower, upper in pairwise(heights))


@pytest.mark.parametrize("line", ["", "blocks 3, 5", "■■ □5", "<script>"])
def test_what_is_no_layout_is_not_drawn(line):
    assert draw_tower(line) is None


def test_read_run_orders_domain_first(run):
    report = read_run(run)
    assert [metric.role for metric in report.metrics("nats_per_token")] == ["domain", "general"]
    assert report.result == read_record(run / "result.json", RunResult)
    assert len(report.training) == 269
    assert report.evaluations[0].step == 0


@pytest.mark.parametrize(
    ("role", "verdict", "ends", "higher_is_better", "word"),
    [
        ("domain", "kept", (-2.6, -1.9), False, "learned"),
        ("domain", "kept", (0.1, 0.2), True, "learned"),
        ("domain", "kept", (-0.1, 0.005), False, "kept"),
        ("general", "kept", (-2.6, -1.9), False, "kept"),
        ("domain", "lost", (0.1, 0.2), False, "lost"),
    ],
)
def test_a_domain_that_gained_is_called_learned(role, verdict, ends, higher_is_better, word):
    low, high = ends
    metric = Metric(
        task="text",
        role=role,
        metric="score",
        value=1.0,
        stderr=0.1,
        n=100,
        ci_low=low,
        ci_high=high,
        higher_is_better=higher_is_better,
        verdict=verdict,
    )
    assert finding(metric) == word
