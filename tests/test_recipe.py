from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from deepen.config import dump_recipe, load_recipe, parse_recipe
from deepen.errors import RecipeError

ROOT = Path(__file__).parents[1]

# The example recipe of the design, without what comes later (sft, suites).
EXAMPLE = """
base: meta-llama/Llama-2-7b-hf        # a hub id or a directory
output: runs/llama-pro-code
expand: {blocks: 8, placement: interleaved}
data:
  sequence_length: 4096
  sources:
    - {name: code, path: data/python/*.jsonl, field: text, weight: 1.5}
    - {name: math, path: data/math/*.parquet, field: text, weight: 1.0}
train: {method: blocks, tokens: 2e9, batch_tokens: 4e6, learning_rate: 2e-4, schedule: cosine, warmup: 0.06, weight_decay: 0.1, clip: 1.0}
evaluate:
  general: [{path: data/general.txt}]
  domain:  [{path: data/heldout.jsonl, field: text}]
"""  # noqa: E501


def faults(text, *overrides):
    """The lines of the one error that reading a recipe gives."""
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, overrides, "r.yaml")
    return str(caught.value).split("\n")


def changed(old, new):
    assert EXAMPLE.count(old) == 1, old
    return EXAMPLE.replace(old, new)


def test_the_designs_example():
    recipe = parse_recipe(EXAMPLE)
    assert recipe.base == "meta-llama/Llama-2-7b-hf"
    assert (recipe.expand.blocks, recipe.expand.placement) == (8, "interleaved")
    assert [source.weight for source in recipe.data.sources] == [1.5, 1.0]
    assert recipe.train.tokens == 2_000_000_000
    assert type(recipe.train.tokens) is int
    assert recipe.train.batch_tokens == 4_000_000
    assert recipe.train.learning_rate == 0.0002
    assert [text.label for text in recipe.evaluate.general] == ["general"]
    assert recipe.merge is False


@pytest.mark.parametrize(
    "text",
    [
        EXAMPLE,
        changed("clip: 1.0", "clip: null, betas: [0.9, 0.99], learning_rate: 1e-7").replace(
            "learning_rate: 2e-4, ", ""
        ),
        changed("{blocks: 8, placement: interleaved}", "{after: [-1, 0, 3, 3]}"),
        # Strings that YAML 1.1 and this reader take for different things.
        changed("name: code", "name: '2e9'"),
        changed("name: code", "name: '1.5'"),
        changed("name: code", "name: 'null'"),
        changed("name: code", "name: 'on'"),
        changed("path: data/general.txt", 'path: data/général.txt, separator: "\\n\\n"'),
        changed("output: runs/llama-pro-code", "output: '.5e1'"),
    ],
)
def test_what_is_dumped_is_read_back(text):
    recipe = parse_recipe(text)
    again = parse_recipe(dump_recipe(recipe))
    assert again == recipe
    assert dump_recipe(again) == dump_recipe(recipe)


def test_a_dump_is_complete_and_plain():
    # Any reader of YAML sees every key, defaults included.
    plain = yaml.safe_load(dump_recipe(parse_recipe(EXAMPLE)))
    assert plain["train"]["tokens"] == 2_000_000_000
    assert plain["train"]["seed"] == 0
    assert plain["evaluate"]["max_tokens"] == 200_000


@pytest.mark.parametrize(
    "path",
    [*ROOT.glob("examples/*.yaml"), *ROOT.glob("studies/**/*recipe*.yaml")],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_every_shipped_recipe_loads(path):
    recipe = load_recipe(path)
    assert parse_recipe(dump_recipe(recipe)) == recipe


@pytest.mark.parametrize(
    ("written", "value"),
    [("2e9", 2e9), ("2.5E+3", 2500), ("1_000_000", 1e6), ("4096.0", 4096), ("+8e3", 8000), ("0x2000", 8192)],
)
def test_ways_to_write_a_count(written, value):
    assert parse_recipe(changed("tokens: 2e9", f"tokens: {written}")).train.tokens == value


@pytest.mark.parametrize(("written", "value"), [("2e-4", 2e-4), ("1", 1.0), (".5", 0.5), ("5.", 5.0)])
def test_ways_to_write_a_number(written, value):
    recipe = parse_recipe(changed("learning_rate: 2e-4", f"learning_rate: {written}"))
    assert recipe.train.learning_rate == value
    assert type(recipe.train.learning_rate) is float


@pytest.mark.parametrize("word", [".", "..", "1.2.3", "e5", ".e5", "1e", "4e6x", "-.", "._"])
def test_what_only_resembles_a_number_is_a_string(word):
    assert parse_recipe(changed("base: meta-llama/Llama-2-7b-hf", f"base: {word}")).base == word


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("output:", "outptu: x\noutput:", "outptu: unknown key; did you mean output?"),
        ("blocks: 8", "blocks: 8, placment: suffix", "expand.placment: unknown key; did you mean placement?"),
        (
            "tokens: 2e9",
            "tokens: 2e9, learning_rat: 1",
            "train.learning_rat: unknown key; did you mean l",
        ),
        ("sequence_length: 4096", "sequence_length: 4096\n  source: 1", "data.source: unknown key; did you"),
        ("name: math", "nmae: math", "data.sources.1.nmae: unknown key; did you mean name?"),
        (
            "path: data/general.txt",
            "path: x, feild: y",
            "evaluate.general.0.feild: unknown key; did you",
        ),
        (
            "path: data/heldout.jsonl",
            "path: x, weight: 2",
            "evaluate.domain.0.weight: unknown key (known: n",
        ),
        ("evaluate:", "evaluate:\n  xyz: 1", "evaluate.xyz: unknown key (known: general, domain, max_tok"),
        ("clip: 1.0", "clip: [1.0]", "train.clip: "),
        ("tokens: 2e9", "tokens: 2.5", "train.tokens: "),
        ("tokens: 2e9", "tokens: '2e9'", "train.tokens: "),
        ("tokens: 2e9", "tokens: 0", "train.tokens: "),
        ("tokens: 2e9", "tokens: -2e9", "train.tokens: "),
        ("tokens: 2e9", "tokens: true", "train.tokens: "),
        ("tokens: 2e9", "tokens: .inf", "train.tokens: "),
        ("tokens: 2e9", "tokens: 1e999", "train.tokens: "),
        ("tokens: 2e9", "tokens:", "train: give either tokens or epochs"),
        ("tokens: 2e9", "tokens: 2e9, epochs: 3", "train: give either tokens or epochs"),
        ("tokens: 2e9", "epochs: 0", "train.epochs: "),
        ("tokens: 2e9", "epochs: -1", "train.epochs: "),
        ("tokens: 2e9", "epochs: .inf", "train.epochs: "),
        ("learning_rate: 2e-4", "learning_rate: .nan", "train.learning_rate: "),
        ("learning_rate: 2e-4", "learning_rate: nan", "train.learning_rate: "),
        ("learning_rate: 2e-4", "learning_rate: true", "train.learning_rate: "),
        ("learning_rate: 2e-4", "learning_rate: 1e999", "train.learning_rate: "),
        ("learning_rate: 2e-4", f"learning_rate: 1{'0' * 400}", "train.learning_rate: "),
        ("learning_rate: 2e-4", "learning_rate: 0", "train.learning_rate: "),
        ("clip: 1.0", "clip: 1.0, compile: 1", "train.compile: "),
        ("clip: 1.0", "clip: 1.0, compile: 'yes'", "train.compile: "),
        ("clip: 1.0", "clip: 1.0, betas: [0.9]", "train.betas"),
        ("clip: 1.0", "clip: 1.0, betas: [0.9, 1.0]", "train.betas.1: "),
        ("clip: 1.0", "clip: 1.0, betas: [-0.1, 0.9]", "train.betas.0: "),
        ("warmup: 0.06", "warmup: 1", "train.warmup: "),
        (
            "method: blocks",
            "method: lore",
            "train.method: input should be 'blocks', 'full', 'lora', 'freeze', 'moe', 'scale', 'prompt' or",
        ),
        ("blocks: 8", "blocks: 0", "expand.blocks: "),
        ("blocks: 8", "groups: 1", "expand: give blocks or after"),
        ("name: math, path", "path: x, hub", "data.sources.1: give either path or hub"),
        ("name: math, path: data/math/*.parquet, ", "", "data.sources.1: give either path or hub"),
        ("name: math", "name: a/b", "data.sources.1.name: "),
        ("name: math", "template: '{x}'", "data.sources.1: give either field or template"),
        ("sequence_length: 4096", "sequence_length: 1", "data.sequence_length: "),
        ("batch_tokens: 4e6", "batch_tokens: 4095", "train: batch_tokens 4095 is less than one window"),
        ("[{path: data/general.txt}]", "data/general.txt", "evaluate.general: "),
        ("[{path: data/general.txt}]", "[data/general.txt]", "evaluate.general.0: "),
        ("base: meta-llama/Llama-2-7b-hf", "base: [a]", "base: "),
        ("base: meta-llama/Llama-2-7b-hf", "base: 2024-01-01", "base: "),
        ("base: meta-llama/Llama-2-7b-hf", "", "base: missing"),
        ("output:", "1: x\noutput:", "1: "),
    ],
)
def test_one_fault_is_one_line(old, new, expected):
    lines = faults(changed(old, new))
    assert len(lines) == 1, lines
    assert lines[0].startswith("r.yaml: ")
    assert expected in lines[0]
    assert len(lines[0]) < 260


def test_what_a_user_reads_speaks_of_yaml():
    # Lists and sections, not tuples and classes.
    for old, new in [
        ("[{path: data/general.txt}]", "data/general.txt"),
        ("[{path: data/general.txt}]", "[data/general.txt]"),
        ("{blocks: 8, placement: interleaved}", "8"),
    ]:
        (line,) = faults(changed(old, new))
        assert "tuple" not in line
        assert "instance of" not in line


def test_a_number_that_is_none_is_answered_with_one_that_is():
    (line,) = faults(changed("tokens: 2e9", "tokens: 10k"))
    assert line == "r.yaml: train.tokens: input should be a whole number, such as 4096 or 2e9, found '10k'"


def test_all_faults_together():
    text = changed("tokens: 2e9", "tokens: -1, clp: 1").replace("name: math", "nmae: math")
    lines = faults(text.replace("output: runs/llama-pro-code", ""), "merge=maybe")
    assert len(lines) == 5
    for place in ("output: missing", "train.tokens", "train.clp", "data.sources.1.nmae", "merge"):
        assert sum(f"r.yaml: {place}" in line for line in lines) == 1


def test_missing_sections():
    assert faults("base: x\noutput: y") == ["r.yaml: data: missing", "r.yaml: train: missing"]


def test_a_method_and_its_expand_section():
    (line,) = faults(changed("expand: {blocks: 8, placement: interleaved}", ""))
    assert "method blocks needs an expand section" in line
    (line,) = faults(changed("method: blocks", "method: full"))
    assert "method full trains on the base itself" in line


def test_contradictions_are_told_with_the_other_faults():
    text = changed("method: blocks", "method: full").replace("batch_tokens: 4e6", "batch_tokens: 1")
    lines = faults(text.replace("general:", "generla:"))
    assert len(lines) == 2
    assert any("method full trains on the base itself" in line for line in lines)
    assert any("less than one window" in line for line in lines)
    assert any("evaluate.generla" in line for line in lines)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("base: a\nbase: b", "'base' stands twice"),
        ("train: {tokens: 1, tokens: 2}", "'tokens' stands twice"),
        ("base: [", "not valid YAML"),
        ("base: \t- x", "not valid YAML: line 1: "),
        (
            "data:\n\tsources: []",
            "line 2: found character '\\t' that cannot start any token; indent with spaces",
        ),
        ("data: {path: *.txt}", "; text that begins with * stands in quotes"),
        ("a: " + "[" * 600, "not valid YAML"),
        ("base: 2024-13-45", "not valid YAML"),
        ("base: !!int x", "not valid YAML"),
        ("base: !!bool x", "not valid YAML"),
        ("base: !!timestamp x", "not valid YAML"),
        ("base: !!map [x]", "not valid YAML"),
        ("base: !!python/object/apply:os.getcwd []", "not valid YAML"),
        ("? [a]\n: b", "not valid YAML"),
        ("base: " + "1" * 5000, "not valid YAML"),
        ("base: a\0b", "not valid YAML"),
        ("a: 1\n---\nb: 2", "not valid YAML"),
        ("", "holds nothing"),
        ("just words", "not keys such as base"),
        ("- a", "not keys such as base"),
    ],
)
def test_what_is_not_a_recipe(text, words):
    (line,) = faults(text)
    assert line.startswith("r.yaml: ")
    assert words in line


def test_a_bomb_of_aliases_does_not_explode():
    text = "base: &a [x, x, x, x, x, x, x, x, x]\n"
    text += "".join(f"{c}: &{c} [{', '.join([f'*{p}'] * 9)}]\n" for p, c in zip("abcdefghij", "bcdefghijk"))  # noqa: B905
    assert all(len(line) < 200 for line in faults(text))


def test_unreadable_files(tmp_path):
    with pytest.raises(RecipeError, match=r"absent\.yaml: cannot be read"):
        load_recipe(tmp_path / "absent.yaml")
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe(tmp_path)
    (tmp_path / "latin.yaml").write_bytes("base: é".encode("latin-1"))
    with pytest.raises(RecipeError, match=r"latin\.yaml: not UTF-8: byte 6 is 0xe9"):
        load_recipe(tmp_path / "latin.yaml")


def test_files_are_utf8_in_any_locale(tmp_path, monkeypatch):
    import locale

    monkeypatch.setattr(locale, "getencoding", lambda: "latin-1", raising=False)
    monkeypatch.setattr(locale, "getpreferredencoding", lambda *_: "latin-1")
    (tmp_path / "r.yaml").write_bytes(changed("output: runs/llama-pro-code", "output: é").encode())
    assert load_recipe(tmp_path / "r.yaml").output == "é"


@pytest.mark.parametrize(
    ("setting", "read"),
    [
        ("train.tokens=1e6", lambda r: r.train.tokens == 1_000_000),
        ("base=./here", lambda r: r.base == "./here"),
        ("train.clip=null", lambda r: r.train.clip is None),
        ("data.sources.0.weight=3", lambda r: [s.weight for s in r.data.sources] == [3.0, 1.0]),
        ("data.sources.1={path: x}", lambda r: r.data.sources[1].path == "x"),
        ("data.sources=[{path: x}]", lambda r: len(r.data.sources) == 1),
        ("expand={after: [1, 2]}", lambda r: r.expand.after == (1, 2)),
        ("evaluate=null", None),
        ("evaluate.max_tokens=5", lambda r: r.evaluate.max_tokens == 5 and r.evaluate.general),
        ("merge=true", lambda r: r.merge is True),
        (" train.seed = 7", lambda r: r.train.seed == 7),
        ("output=a=b", lambda r: r.output == "a=b"),
    ],
)
def test_settings_win(setting, read):
    if read is None:
        assert "evaluate" in faults(EXAMPLE, setting)[0]
    else:
        assert read(parse_recipe(EXAMPLE, [setting]))


def test_settings_make_sections():
    text = changed("expand: {blocks: 8, placement: interleaved}", "expand: null")
    assert parse_recipe(text, ["expand.blocks=4"]).expand.blocks == 4
    recipe = parse_recipe(text, ["train.method=full"])
    assert recipe.expand is None
    assert parse_recipe(EXAMPLE, ["expand=null", "train.method=full"]) == recipe
    text = text.replace("expand: null", "")
    assert parse_recipe(text, ["expand.blocks=4", "expand.blocks=5"]).expand.blocks == 5


def test_a_setting_changes_one_of_two_aliases():
    text = changed("[{path: data/general.txt}]", "&texts [{path: data/general.txt}]")
    text = text.replace("[{path: data/heldout.jsonl, field: text}]", "*texts")
    recipe = parse_recipe(text, ["evaluate.general.0.name=kept"])
    assert recipe.evaluate.general[0].name == "kept"
    assert recipe.evaluate.domain[0].name is None


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("train.tokens", "not of the form section.key=value"),
        ("=3", "not of the form"),
        ("train..tokens=3", "not of the form"),
        (".=3", "not of the form"),
        ("base.x=1", "base is a value, not a section"),
        ("base.x.y=1", "base is a value, not a section"),
        ("data.sources.2.weight=1", "2 is not a position in a list of 2"),
        ("data.sources.-1.weight=1", "-1 is not a position"),
        ("data.sources.x=1", "x is not a position"),
        ("train.tokens=[", "not valid YAML"),
        ("train.tokns=3", "train.tokns: unknown key; did you mean tokens?"),
        ("trian.tokens=3", "trian: unknown key; did you mean train?"),
    ],
)
def test_faulty_settings(setting, words):
    (line,) = faults(EXAMPLE, setting)
    assert words in line


def test_faulty_settings_are_told_with_the_other_faults():
    lines = faults(changed("clip: 1.0", "clp: 1.0"), "base", "data.sources.9.weight=1")
    assert len(lines) == 3
    assert lines[0].startswith("--set base:")
    assert lines[1].startswith("--set data.sources.9.weight=1:")
    assert "train.clp: unknown key; did you mean clip?" in lines[2]


def test_frozen():
    recipe = parse_recipe(EXAMPLE)
    with pytest.raises(ValidationError, match="frozen"):
        recipe.base = "other"
    with pytest.raises(ValidationError, match="frozen"):
        recipe.train.tokens = 3
    assert hash(recipe) == hash(parse_recipe(EXAMPLE))


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("{path: data/gsm8k.test.jsonl}", "gsm8k"),
        ("{path: data/python/*.jsonl}", "text"),
        ("{path: data/books/}", "books"),
        ("{hub: org/some-set}", "some-set"),
        ("{hub: org/some-set, name: mine}", "mine"),
    ],
)
def test_what_results_call_a_text(text, label):
    recipe = parse_recipe(changed("{path: data/general.txt}", text))
    assert recipe.evaluate.general[0].label == label
