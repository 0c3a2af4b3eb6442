import gzip
import json
import os
import time

import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from deepen.config import TextSet
from deepen.data.documents import find_files, read_documents
from deepen.data.files import passed_over
from deepen.errors import DataError


@pytest.fixture
def tree(tmp_path):
    for name in (
        "b.txt",
        "a.md",
        "deep/er/c.jsonl",
        "deep/d.parquet",
        "deep/e.txt.gz",
        ".hidden/f.txt",
        "g.png",
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    return tmp_path


def read(path, **options) -> list[str]:
    return list(read_documents(TextSet(path=str(path), **options)))


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("b.txt", ["b.txt"]),
        (".", ["a.md", "b.txt", "deep/d.parquet", "deep/e.txt.gz", "deep/er/c.jsonl"]),
        ("*", ["a.md", "b.txt"]),
        ("*.txt", ["b.txt"]),
        ("**/*.txt*", ["b.txt", "deep/e.txt.gz"]),
        ("deep/**", ["deep/d.parquet", "deep/e.txt.gz", "deep/er/c.jsonl"]),
        ("deep/**/c.*", ["deep/er/c.jsonl"]),
        (".hidden", [".hidden/f.txt"]),
    ],
)
def test_files_directories_and_globs_are_found_in_order(tree, pattern, expected):
    found = find_files(TextSet(path=os.path.join(tree, pattern)))
    assert [os.path.relpath(path, tree) for path in found] == expected


def test_a_name_with_glob_characters_is_a_name_first(tmp_path):
    (tmp_path / "draft [1].txt").write_text("one")
    assert read(tmp_path / "draft [1].txt") == ["one"]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("nothing.txt", "nothing.txt: no file matches"),
        ("no/**/*.txt", "no file matches"),
        ("g.png", r"found only \.png; supported are \.txt"),
        ("*.png", r"found only \.png"),
    ],
)
def test_nothing_to_read_is_refused(tree, pattern, message):
    with pytest.raises(DataError, match=message):
        find_files(TextSet(path=os.path.join(tree, pattern)))


def test_files_of_other_kinds_beside_texts_are_named(tmp_path):
    for name in ("a.txt", "b.pdf", "deep/c.PDF", "d.docx", ".hidden.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    assert "3 of other kinds not read (.PDF, .docx, .pdf)" in str(passed_over(TextSet(path=str(tmp_path))))
    assert "1 of other kinds not read (.pdf)" in str(passed_over(TextSet(path=str(tmp_path / "[ab].*"))))
    assert passed_over(TextSet(path=str(tmp_path / "a.txt"))) is None
    assert passed_over(TextSet(hub="some/texts")) is None


def test_an_empty_directory_and_packed_parquet_are_refused(tmp_path):
    with pytest.raises(DataError, match="no file matches"):
        find_files(TextSet(path=str(tmp_path)))
    (tmp_path / "a.parquet.gz").write_bytes(b"")
    with pytest.raises(DataError, match=r"found only \.parquet\.gz"):
        find_files(TextSet(path=str(tmp_path)))


def test_a_plain_file_is_one_document_character_for_character(tmp_path):
    text = "\r\n  line\ttwo\r\n\u2028天 😀\n\n"
    (tmp_path / "a.txt").write_bytes(text.encode())
    assert read(tmp_path / "a.txt") == [text]


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_text("text", encoding="utf-8-sig")
    (tmp_path / "b.jsonl").write_text('{"text": "more"}\n', encoding="utf-8-sig")
    (tmp_path / "c.json").write_text('[{"text": "most"}]', encoding="utf-8-sig")
    assert read(tmp_path) == ["text", "more", "most"]


@pytest.mark.parametrize("separator", ["\n\n", "<|end|>", "天", "\n---\n"])
@pytest.mark.parametrize("block", [1, 2, 3, 7, 1 << 20])
def test_pieces_are_those_of_str_split(tmp_path, monkeypatch, separator, block):
    monkeypatch.setattr("deepen.data.documents._BLOCK", block)
    text = separator.join(["one\n", "", " \n", "zwei 天地 😀", "\n-- three"]) + separator
    (tmp_path / "a.txt").write_text(text)
    expected = [piece for piece in text.split(separator) if piece.strip()]
    assert read(tmp_path / "a.txt", separator=separator) == expected


def test_json_lines_json_parquet_and_gzip_agree(tmp_path):
    rows = [{"text": text, "n": number} for number, text in enumerate(["one", "zwei\n天", "😀", "", "  "])]
    lines = "\n\n".join(json.dumps(row) for row in rows)
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "c.json").write_text(json.dumps(rows, indent=2))
    (tmp_path / "d.json").write_text(lines)
    (tmp_path / "e.json.gz").write_bytes(gzip.compress(json.dumps(rows).encode()))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "f.parquet", row_group_size=2)
    for path in sorted(tmp_path.iterdir()):
        assert read(path) == ["one", "zwei\n天", "😀"], path
    assert read(tmp_path, field="text") == ["one", "zwei\n天", "😀"] * 6


def test_a_single_object_is_one_record(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"text": "alone", "more": [1]}, indent=1))
    (tmp_path / "b.json").write_text('{"text": "line"}')
    (tmp_path / "c.json").write_text(" \n")
    assert read(tmp_path) == ["alone", "line"]


def test_a_template_joins_keys(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"question": "1+{1}?", "the answer": 2, "x.y": "z"}\n')
    text = read(tmp_path / "a.jsonl", template="Q: {question}\nA: {the answer} {{{x.y}}}")
    assert text == ["Q: 1+{1}?\nA: 2 {z}"]


@pytest.mark.parametrize("template", ["no keys", "{}", "{a", "{a!r}", "{a:>8}", "}{a}"])
def test_a_bad_template_is_refused(tmp_path, template):
    (tmp_path / "a.jsonl").write_text('{"a": "b"}\n')
    with pytest.raises(DataError, match="template"):
        read(tmp_path / "a.jsonl", template=template)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.jsonl",
            b'{"text": "x"}\n{"body": "y", "id": 3}\n',
            r"a\.jsonl: line 2: no field 'text'; found body, id",
        ),
        ("a.json", b'[{"text": "x"}, {}]', r"a\.json: record 2: no field 'text'; found no keys"),
        (
            "a.jsonl",
            b'{"text": "x"}\n{"text": \n',
            r"a\.jsonl: line 2: not JSON: Expecting value at column 9$",
        ),
        (
            "a.json",
            b'[\n{"text": "x"},\n{"text" 1}]',
            r"a\.json: not JSON: Expecting ':' .* at line 3 column 9$",
        ),
        ("a.jsonl", b"[1, 2]\n", r"line 1: is a list, not an object"),
        ("a.jsonl", b'{"text": null}\n', r"line 1: field 'text' is null, not text"),
        ("a.jsonl", b'{"text": ["x"]}\n', r"line 1: field 'text' is a list, not text"),
        ("a.jsonl", b'{"text": 5}\n', r"line 1: field 'text' is a number, not text"),
        ("a.jsonl", b'{"text": "\\ud83d!"}\n', r"line 1: field 'text' is not Unicode: unpaired surrogate"),
        ("a.jsonl", b'{"text": "ok"}\n{"text": "\xff"}\n', r"a\.jsonl: not UTF-8: byte 25 is 0xff"),
        ("a.json", b"[" * 100_000, r"a\.json: JSON that cannot be read|not JSON"),
        ("a.json", b'{"text": "x"', r"a\.json: not JSON"),
        ("a.json", b'{"data": [{"text": "x"}]}', r"record 1: no field 'text'; found data"),
        ("a.txt", b"caf\xe9 au lait", r"a\.txt: not UTF-8: byte 3 is 0xe9; convert"),
        ("a.txt.gz", b"not gzip", r"a\.txt\.gz: cannot be read"),
        ("a.txt.gz", gzip.compress(b"text" * 1000, mtime=0)[:-9], r"a\.txt\.gz: cannot be read"),
        ("a.parquet", b"PAR1 nothing of the kind PAR1", r"a\.parquet: cannot be read as Parquet"),
        ("a.parquet", b"", r"a\.parquet: cannot be read as Parquet"),
    ],
)
def test_malformed_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read(tmp_path)


def test_bad_bytes_are_counted_from_the_start_of_the_file(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one--two--th\xe9ree")
    with pytest.raises(DataError, match="byte 12 is 0xe9"):
        read(tmp_path / "a.txt", separator="--")


def test_an_empty_separator_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(DataError, match="separator is empty"):
        read(tmp_path / "a.txt", separator="")


def test_a_parquet_column_that_is_missing_or_no_text_is_named(tmp_path):
    pq.write_table(pa.table({"body": ["x"], "n": [None]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet: no field 'text'; found body, n"):
        read(tmp_path)
    with pytest.raises(DataError, match=r"a\.parquet: record 1: field 'n' is null"):
        read(tmp_path, field="n")


def test_an_unreadable_file_is_named(tmp_path):
    (tmp_path / "a.txt").symlink_to(tmp_path / "a.txt")
    (tmp_path / "b.txt").write_text("x")
    with pytest.raises(DataError, match=r"a\.txt: cannot be read"):
        read(tmp_path)


def test_files_are_opened_one_at_a_time(tmp_path):
    for number in range(3):
        (tmp_path / f"{number}.txt").write_text(f"document {number}")
    documents = read_documents(TextSet(path=str(tmp_path)))
    assert next(iter(documents)) == "document 0"
    (tmp_path / "1.txt").write_text("changed")
    (tmp_path / "2.txt").unlink()
    assert next(documents) == "changed"
    with pytest.raises(DataError, match=r"2\.txt: cannot be read"):
        next(documents)


def test_a_hub_dataset_is_read(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set/train.jsonl").write_text('{"text": "one"}\n{"text": " "}\n{"text": "two"}\n')
    (tmp_path / "set/test.jsonl").write_text('{"text": "three"}\n')
    hub = str(tmp_path / "set")
    assert list(read_documents(TextSet(hub=hub), cache=tmp_path / "cache")) == ["one", "two"]
    assert list(read_documents(TextSet(hub=hub, split="test"), cache=tmp_path / "cache")) == ["three"]
    with pytest.raises(DataError, match="no field 'body'; found text"):
        list(read_documents(TextSet(hub=hub, field="body"), cache=tmp_path / "cache"))
    with pytest.raises(DataError, match="split nonsense: cannot be loaded"):
        list(read_documents(TextSet(hub=hub, split="nonsense"), cache=tmp_path / "cache"))
    with pytest.raises(DataError, match=r"set \(other\), split train: cannot be loaded"):
        list(read_documents(TextSet(hub=hub, subset="other"), cache=tmp_path / "cache"))


def test_a_hub_that_does_not_answer_is_asked_once(tmp_path, monkeypatch):
    asked = []

    def fails(self, name, **options):
        asked.append(name)
        raise OSError("Name or service not known")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", fails)
    start = time.monotonic()
    with pytest.raises(DataError, match="the hub cannot be reached and no copy is cached"):
        list(read_documents(TextSet(hub="org/name"), cache=tmp_path))
    assert asked == ["org/name"]
    assert time.monotonic() - start < 10
    assert not huggingface_hub.constants.HF_HUB_OFFLINE


def test_an_unreachable_hub_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"org/name, split train: .* cannot be reached .* give its directory"):
        list(read_documents(TextSet(hub="org/name"), cache=tmp_path))


def test_progress_bars_of_datasets_are_put_back(tmp_path):
    import datasets

    (tmp_path / "train.jsonl").write_text('{"text": "one"}\n')
    datasets.enable_progress_bars()
    try:
        list(read_documents(TextSet(hub=str(tmp_path)), cache=tmp_path / "cache"))
        assert not datasets.are_progress_bars_disabled()
    finally:
        datasets.disable_progress_bars()
