"""`deepen chat` as people and programs use it."""

import io
import json
import sys

import pytest
from talking import write_pack, write_places
from tiny_run import write_base

from deepen.cli import main
from deepen.dialogue.talk import Talk
from deepen.dialogue.terminal import printable

SHORT = ["--max-tokens", "6"]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    return write_places(tmp_path_factory.mktemp("command"))


@pytest.fixture
def chat(places, capsys, monkeypatch):
    """Run the command with lines on stdin; return the exit code and what it wrote."""

    def run(lines, *arguments, model="law"):
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        options = ["--template", str(places / "talk.jinja"), *SHORT, *map(str, arguments)]
        code = main(["chat", str(places / model), *options])
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


def answers(out):
    return [json.loads(line) for line in out.splitlines()]


def test_one_answer_a_line_of_json(chat):
    code, out, _ = chat(["block gate", "", "norm"], "--json", "--compare")
    assert code == 0
    found = answers(out)
    assert [each["question"] for each in found] == ["block gate", "norm"]
    for each in found:
        assert each["answers"].keys() == {"base", "model"}
        assert each["packs"] == ["law"]
        assert {one["tokens"] for one in each["answers"].values()} <= set(range(7))


def test_two_answers_have_names_and_one_has_none(chat):
    _, out, err = chat(["block gate"], "--compare")
    assert out.startswith("> block gate\nbase: ")
    assert "\nmodel (law): " in out
    assert "model: stopped after 6 tokens; --max-tokens allows more" in err
    _, alone, _ = chat(["block gate"])
    assert alone.strip() == out.partition("model (law): ")[2].strip()


def test_commands_switch_and_forget(chat, places):
    lines = ["block", "/off law", "/reset", "block", "/on law", "/reset", "block", "/packs"]
    code, out, err = chat(lines, "--json", "--compare", "--pack", places / "code")
    assert code == 0
    found = answers(out)
    assert [each["packs"] for each in found] == [["law", "code"], ["code"], ["law", "code"]]
    assert found[0]["answers"] == found[2]["answers"] != found[1]["answers"]
    assert err.splitlines()[-2:] == ["on   law", "on   code"]


def test_a_system_message_and_turns_reach_the_model(chat, monkeypatch):
    prompts = []
    ask = Talk.ask

    def watched(self, question):
        for each in ask(self, question):
            prompts.append(self.cast.model.tokenizer.decode(each[-1].prompt.ids))
            yield each

    monkeypatch.setattr(Talk, "ask", watched)
    chat(["block", "/system be long", "norm"], "--system", "be short")
    assert prompts[0].startswith("<|endoftext|>system: be short\nuser: block\nassistant:")
    assert prompts[-1].startswith("<|endoftext|>system: be long\nuser: block\nassistant:")
    assert prompts[-1].endswith("user: norm\nassistant:")


def test_turns_that_no_longer_fit_are_said(chat):
    code, out, err = chat(["layer write stream " * 5] * 5, "--json")
    assert code == 0
    assert answers(out)[-1]["turns_left_out"] > 0
    assert "of the oldest turns left out: the model sees 128 tokens" in err


@pytest.mark.parametrize(
    ("lines", "model", "arguments", "words"),
    [
        (["block"], "nowhere", [], "no such directory"),
        (["block"], "base", ["--compare"], "has no base to compare with; give --base, or --pack"),
        (["block"], "base", ["--web"], "has no base to compare with"),
        (["block"], "law", ["--template", "klingon"], "no chat template 'klingon'"),
        (["block"], "base", ["--pack", "OTHER"], "not to this model, with fingerprint"),
        (["block"], "law", ["--pack", "LAW"], "'law' is attached already"),
        (["block"], "law", ["--temperature", "-1"], "'--temperature'"),
        (["/off code"], "law", [], "no pack 'code' is on"),
        (["/on code"], "law", [], "no pack 'code'; there is law"),
        (["?" * 300], "law", [], "the model sees 128; ask a shorter one"),
    ],
)
def test_what_cannot_be_done_is_said_in_two_lines(
    chat, places, tmp_path, monkeypatch, lines, model, arguments, words
):
    if "OTHER" in arguments:
        write_pack(write_base(tmp_path / "b", seed=5), tmp_path / "other", seed=0, size=0.1)
    # Whether the page's library is there does not matter here.
    monkeypatch.setattr("deepen.cli.chat.find_spec", lambda name: object())
    named = {"OTHER": tmp_path / "other", "LAW": places / "law"}
    code, out, err = chat(lines, *[named.get(each, each) for each in arguments], model=model)
    assert code == 2
    assert out == ""
    assert words in err
    assert len(err.partition("error: ")[2].splitlines()) <= 2


def test_without_gradio_the_page_says_what_to_install(chat, monkeypatch):
    monkeypatch.setattr("deepen.cli.chat.find_spec", lambda name: None)
    code, _, err = chat([], "--web")
    assert code == 2
    assert "pip install 'deepen[web]'" in err


def test_a_model_does_not_command_the_terminal():
    assert printable("a\x1b[2Jb\x07\tc\nd\x9b5m é 中") == "a[2Jb\tc\nd5m é 中"


class Screen(io.StringIO):
    def isatty(self):
        return True


def test_on_a_terminal_ctrl_c_stops_the_answer_only_and_errors_are_said(places, monkeypatch, capsys):
    lines = iter(["block", "norm", "/off nothing", "/quit", "never"])
    ask, asked = Talk.ask, []

    def interrupted(self, question):
        asked.append(question)
        for count, each in enumerate(ask(self, question)):
            yield each
            if question == "block" and count == 2:
                raise KeyboardInterrupt

    monkeypatch.setattr(Talk, "ask", interrupted)
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    monkeypatch.setattr(sys, "stdin", Screen())
    monkeypatch.setattr(sys, "stdout", Screen())
    assert main(["chat", str(places / "law"), "--compare", *SHORT]) == 0
    assert asked == ["block", "norm"]
    assert sys.stdout.getvalue().count("model (law)") >= 2
    assert "error: no pack 'nothing' is on" in capsys.readouterr().err
    assert next(lines) == "never"


def test_on_a_terminal_one_answer_streams(places, monkeypatch, chat):
    _, whole, _ = chat(["block gate"])
    lines = iter(["block gate", "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    monkeypatch.setattr(sys, "stdin", Screen())
    monkeypatch.setattr(sys, "stdout", Screen())
    main(["chat", str(places / "law"), "--template", str(places / "talk.jinja"), *SHORT])
    assert sys.stdout.getvalue().strip() == whole.strip()
