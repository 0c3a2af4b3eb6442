import json
import re
import resource
import subprocess
import sys
from importlib.metadata import version

import pytest

from deepen.cli import COMMANDS, main, output
from deepen.cli.expand import parse_size
from deepen.errors import DeepenError
from deepen.expansion import read_expansion

# A change here is a change of the public command line: say so in the changelog.
OPTIONS = {
    "expand": "--after --blocks --dry-run --groups --init --json --overwrite --placement --shard-size --zero",
    "verify": "--base-only --full --json --logits",
    "blocks merge": "--json --overwrite --shard-size",
    "blocks extract": "--json --overwrite --pack",
    "blocks inspect": "--base --json",
    "blocks attach": "--json",
    "blocks unmerge": "--json --overwrite",
    "blocks stack": "--json --overwrite --shard-size",
    "blocks adopt": "--base --json --name --new --overwrite",
    "blocks push": "--json --private",
}


@pytest.mark.parametrize("command", OPTIONS)
def test_options(command, capsys):
    assert main([*command.split(), "--help"]) == 0
    found = set(re.findall(r"(?<!\w)--[a-z-]+", capsys.readouterr().out)) - {"--help"}
    assert sorted(found) == OPTIONS[command].split()


def test_help_lists_every_command(capsys):
    assert main(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(re.search(rf"^  {command} +\w", said, re.M) for command in COMMANDS)
    assert main([]) == 0
    assert capsys.readouterr().out == said


def test_the_list_of_commands_is_not_cut_short(capsys):
    assert main(["--help"]) == 0
    assert "..." not in capsys.readouterr().out.split("Commands:")[1]


def test_version(capsys):
    assert main(["--version"]) == 0
    said = capsys.readouterr().out
    assert re.fullmatch(rf"deepen {re.escape(version('deepen'))}( \(checkout at \S+\))?\n", said)


def test_help_imports_nothing_heavy():
    code = "import sys; from deepen.cli import main; main(['--help']); print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {
        "torch",
        "transformers",
        "numpy",
        "pydantic",
        "rich",
        "yaml",
        "huggingface_hub",
        "deepen.expansion",
    }
    assert heavy & set(done.stderr.split()) == set()


def test_help_answers_at_once():
    times = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "deepen", "--help"], stdout=subprocess.DEVNULL, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
    assert min(times) < 0.3  # seconds of a processor, the best of five: other tests run beside this one


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["frobnicate"], "No such command 'frobnicate'"),
        (["blocks"], "Missing command"),
        (["expand"], "Missing argument"),
        (["expand", "a", "b", "--blocks", "x"], "'--blocks'"),
        (["expand", "a", "b", "--colour"], "--colour"),
        (["expand", "a", "b", "--after", "1,x"], "not a list of block numbers"),
        (["expand", "a", "b", "--blocks", "1", "--shard-size", "5 quarts"], "not a size"),
        (["expand", "a", "b", "--after", ""], "'--after'"),
        (["verify", ".", "/no/such"], "cannot be read: No such file"),
        (["blocks", "inspect", "/no/such"], "/no/such: no such directory; give an expanded checkpoint or a"),
        (["blocks", "inspect", __file__], "is not a directory"),
        (["compare", "/no/such"], "/no/such: no such directory; give the directory of a finished run"),
        (["compare", "."], "holds no finished run (no result.json); finish it with deepen run"),
        (["report", "/no/such"], "/no/such: no such directory"),
        (["run", "/no/such.yaml"], "cannot be read (No such file or directory); give a recipe"),
        (["expand", "/no/such", "b", "--blocks", "1"], "no such directory"),
    ],
)
def test_wrong_usage_is_two_lines(arguments, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert words in said.err
    assert len(said.err.splitlines()) <= 2


def test_errors_and_bugs(monkeypatch, capsys):
    def raises(error):
        def run(*arguments, **options):
            raise error

        monkeypatch.setattr("deepen.expansion.read_expansion", run)
        monkeypatch.setattr("deepen.blocks.inspect_blocks", run)
        return main(["blocks", "inspect", "x"])

    assert raises(DeepenError("what, where")) == 2
    assert capsys.readouterr().err == "error: what, where\n"
    assert raises(KeyboardInterrupt()) == 130
    with pytest.raises(ZeroDivisionError):
        raises(ZeroDivisionError())


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("1.5 MB", 1_500_000), ("2GiB", 2 << 30), ("700", 700), ("10kb", 10_000)],
)
def test_sizes(text, size):
    assert parse_size(text) == size


def test_json_of_expand(tiny_llama, tmp_path, capsys):
    base, out = tiny_llama(), tmp_path / "out"
    capsys.readouterr()
    arguments = ["expand", str(base), str(out), "--after", "1,3", "--json"]
    assert main([*arguments, "--dry-run"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert not out.exists()
    assert main(arguments) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    said = json.loads(captured.out)
    assert (
        said["new_blocks"]
        == [b.model_dump() for b in read_expansion(out).new_blocks]
        == planned["new_blocks"]
    )
    assert said["parameters"] == planned["parameters"] > said["base_parameters"]
    assert said["bytes_written"] == planned["bytes_written"] == (out / "model.safetensors").stat().st_size
    assert said["seconds"] > 0


def test_dry_run_in_words(tiny_llama, tmp_path, capsys):
    base = tiny_llama()
    assert main(["expand", str(base), str(tmp_path / "out"), "--blocks", "2", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "■■ □2 ■■ □5" in said
    assert "4 blocks + 2 new = 6" in said
    assert "block 5 is new, after base block 3, a copy of base block 3" in said
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    assert main(["expand", str(base), str(tmp_path / "out"), "--blocks", "2", "--dry-run"]) == 2


def test_progress_is_silent_without_a_terminal(capsys):
    with output.progress_bar("x") as progress:
        assert progress is None
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("count", "text"), [(999, "999 B"), (13_476_000_000, "13.5 GB"), (2_500, "2.5 kB"), (3e12, "3.00 TB")]
)
def test_human_bytes(count, text):
    assert output.human_bytes(count) == text
