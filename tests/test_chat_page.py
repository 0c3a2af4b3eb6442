"""The page of `deepen chat --web`, served by the command and used through a real browser without a window."""

import re
import signal
import subprocess
import sys
from functools import partial
from urllib.request import urlopen

import pytest
from talking import write_pack

from deepen.demo.demo import BASE
from deepen.dialogue.next_tokens import Guess, Place
from deepen.dialogue.page_parts import first_difference, guess_tables, marked_tokens, summary

TEXT = "Return the number of"


def place(text, base, model, divergence):
    guesses = [tuple(Guess(ord(each), each, 0.5) for each in side) for side in (base, model)]
    return Place(text=text, divergence=divergence, base=guesses[0], model=guesses[1])


PLACES = [place("<b>", "ab", "ab", 0.1), place(" c", "ab", "ba", 9.0), place("", "a ", "a\n", 0.0)]


def test_tokens_are_marked_where_the_first_choice_differs():
    assert marked_tokens(PLACES) == [("<b>", None), (" c", 1.0)]
    assert first_difference(PLACES) == 1
    assert first_difference(PLACES[:1]) == 0
    assert summary(PLACES).startswith("At 1 of 2 tokens")
    assert "4.550 nats a token" in summary(PLACES)
    assert summary([]).startswith("Ask something")


def test_a_token_cannot_be_markup():
    shown = guess_tables(PLACES, 1)
    assert "<b>" not in shown
    assert "&lt;b&gt;" in shown
    assert "·" in guess_tables(PLACES, 2)
    assert "↵" in guess_tables(PLACES, 2)


@pytest.fixture(scope="module")
def address(tmp_path_factory, browser):
    pytest.importorskip("gradio", reason="the page needs gradio: pip install 'deepen[web]'")
    pack = write_pack(BASE, tmp_path_factory.mktemp("page") / "poem", seed=0, size=0.05)
    command = [sys.executable, "-m", "deepen", "chat", str(BASE), "--pack", str(pack)]
    options = ["--web", "--port", "0", "--max-tokens", "24"]
    with subprocess.Popen(
        [*command, *options],
        stdout=subprocess.PIPE,
        text=True,
        # A shell starts what it runs in the background deaf to Ctrl-C, and children inherit that.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    ) as server:
        try:
            yield re.match(r"http://127\.0\.0\.1:\d+/?", server.stdout.readline())[0]
        finally:
            server.send_signal(signal.SIGINT)
        assert server.wait(20) == 0


@pytest.fixture
def tab(browser, address):
    """The page, loaded; what it said on the console, and what it asked of others, must be nothing."""
    faults = []
    tab = browser.new_page(viewport={"width": 1280, "height": 900})
    tab.on("console", lambda message: message.type == "error" and faults.append(message.text))
    tab.on("pageerror", lambda error: faults.append(str(error)))
    elsewhere = re.compile(rf"(?!{re.escape(address)}|data:|blob:)")
    tab.on("request", lambda request: elsewhere.match(request.url) and faults.append(request.url))
    tab.goto(address)
    tab.wait_for_selector("#question textarea")
    yield tab
    tab.close()
    assert not faults


def ask(tab, text, words):
    tab.fill("#question textarea", text)
    tab.press("#question textarea", "Enter")
    tab.locator("#summary", has_text=words).wait_for()


def answer(tab, column):
    return tab.locator(f"#{column} .bot.message").last.inner_text()


@pytest.mark.timeout(120)
def test_two_answers_and_with_the_pack_off_they_are_equal(tab):
    ask(tab, TEXT, "tokens the two would go on differently")
    first = answer(tab, "base"), answer(tab, "model")
    assert len({*first, ""}) == 3
    tab.locator("#guesses", has_text="the base expects").wait_for()
    assert tab.locator("#guesses .guess").count() == 10
    before = tab.locator("#guesses").inner_text()
    tab.locator("#tokens .token").last.press("Enter")
    tab.wait_for_function("old => document.querySelector('#guesses').innerText != old", arg=before)
    tab.locator("#packs input[type=checkbox]").click()
    tab.locator("#summary", has_text="no difference").wait_for()
    assert (answer(tab, "base"), answer(tab, "model")) == (first[0], first[0])
    tab.locator("#packs input[type=checkbox]").click()
    tab.locator("#summary", has_text="differently").wait_for()
    assert (answer(tab, "base"), answer(tab, "model")) == first
    tab.locator("#new").click()
    tab.locator("#summary", has_text="Ask something").wait_for()
    assert tab.locator(".bot.message").count() == 0


def test_the_browser_is_told_to_load_nothing_from_elsewhere(address):
    with urlopen(address) as page:
        assert "default-src 'self'" in page.headers["content-security-policy"]
        assert "fonts.googleapis" not in page.read().decode()
