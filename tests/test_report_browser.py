"""The pages in a real browser: what they say on the console, what they draw, and that their tables sort."""

import pytest
from run_directory import items, text, write_run

from deepen.evaluation import compare_runs
from deepen.report import write_comparison_page, write_report

LOSSES = {"brook": 0.4, "ash": -0.02, "cedar": 12.0, "dale": -3.0}


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    directory = tmp_path_factory.mktemp("pages")
    kept = [
        text(name, "general", items(1.5 + place, delta, seed=place))
        for place, (name, delta) in enumerate(LOSSES.items())
    ]
    learned = text("gsm8k", "domain", items(5.7, -3.3, n=80))
    run = write_run(directory / "run", [*kept, learned])
    changed = text("brook", "general", items(1.5, 0.9))
    other = write_run(directory / "full", [changed, *kept[1:], learned], method="full")
    runs = [run, other, run]
    compared = compare_runs(runs, ["new blocks", "full", "again"])
    return {
        "run": write_report(run),
        "comparison": write_comparison_page(compared, directory / "comparison.html"),
    }


@pytest.fixture(params=["run", "comparison"])
def tab(request, browser, pages):
    """A page, loaded; it must say nothing on the console and ask nothing of anyone."""
    faults = []
    opened = browser.new_page()
    opened.on("console", lambda message: faults.append(message.text))
    opened.on("pageerror", lambda error: faults.append(str(error)))
    address = pages[request.param].as_uri()
    opened.on("request", lambda asked: None if asked.url == address else faults.append(asked.url))
    opened.goto(address)
    yield opened
    opened.close()
    assert faults == []


def test_every_figure_is_drawn(tab):
    figures = tab.locator("svg")
    assert figures.count()
    for figure in figures.all():
        box = figure.bounding_box()
        assert min(box["width"], box["height"]) > 10
        assert figure.locator("path, rect").count()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("medium", ["screen", "print"])
def test_it_fits_a_phone_and_its_words_can_be_read(tab, scheme, medium):
    tab.set_viewport_size({"width": 375, "height": 700})
    tab.emulate_media(color_scheme=scheme, media=medium)
    assert tab.evaluate("document.documentElement.scrollWidth") <= 375
    ink, paper = tab.evaluate(
        "(({color, backgroundColor}) => [color, backgroundColor])(getComputedStyle(document.body))"
    )
    assert contrast(ink, paper) > 7  # WCAG 2.2, 1.4.6


def test_a_heading_sorts_the_rows_of_each_group_by_number_and_back(tab):
    for table in tab.locator("table:has(thead button)").all():
        for column in range(table.locator("thead th").count()):
            for ascending in (True, False):
                table.locator("thead button").nth(column).click()
                for group in table.locator("tbody").all():
                    check_order(group, column, ascending)
            sorted_by = table.locator("thead th[aria-sort]")
            assert sorted_by.count() == 1
            assert sorted_by.get_attribute("aria-sort") == "descending"


def test_the_differences_of_a_run_are_in_order(browser, pages):
    tab = browser.new_page()
    tab.goto(pages["run"].as_uri())
    table = tab.locator("table").filter(has_text="nats per token, lower").first
    before = tab.locator("table").first.inner_text()
    table.get_by_role("button", name="Δ and 95% interval").focus()
    tab.keyboard.press("Enter")
    names = [row.locator("th").inner_text().split()[0] for row in table.locator("tr:has(td)").all()]
    general = [name for name in names if name in LOSSES]
    assert general == sorted(LOSSES, key=LOSSES.get)
    assert names.index("gsm8k") in (0, len(LOSSES))  # it stays in its group
    assert before != tab.locator("table").first.inner_text()
    tab.close()


def check_order(group, column, ascending):
    rows = group.locator("tr:not(:has(th[scope=rowgroup]))").all()
    found = [row.locator("th, td").nth(column) for row in rows]
    held = [cell.locator("data") for cell in found]
    if rows and all(data.count() for data in held):
        values = [float(data.first.get_attribute("value")) for data in held]
        assert values == sorted(values, reverse=not ascending)


def contrast(*colours):
    """WCAG 2.2's ratio of two colours that a browser gave."""
    lights = []
    for colour in colours:
        parts = [int(part) / 255 for part in colour[4:-1].split(",")[:3]]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        lights.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])
    low, high = sorted(lights)
    return (high + 0.05) / (low + 0.05)
