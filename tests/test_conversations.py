import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from deepen.config import ConversationSet
from deepen.data.conversation_files import read_conversations
from deepen.errors import DataError

ASK, SAY = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
CALL = {"name": "f", "arguments": {"x": 1}}
TOOL = {"type": "function", "function": {"name": "f"}}

# Record, the form it is told to have and by what, and its messages.
RECORDS = {
    "alpaca": (
        {"instruction": "a", "output": "b", "answer": "4.0"},
        "alpaca (keys instruction, output)",
        [ASK | {"instruction": "a", "input": ""}, SAY],
    ),
    "alpaca with input": (
        {"instruction": "a", "input": "i", "output": "b", "system": "s", "history": [["q", "r"]]},
        "alpaca (keys instruction, input, output)",
        [
            {"role": "system", "content": "s"},
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": "r"},
            {"role": "user", "content": "a\ni", "instruction": "a", "input": "i"},
            SAY,
        ],
    ),
    "sharegpt": (
        {
            "conversations": [
                {"from": "system", "value": "s", "weight": None},
                {"from": "human", "value": "a", "weight": 0},
                {"from": "gpt", "value": "b", "weight": 1},
                {"from": "observation", "value": "t"},
            ]
        },
        "sharegpt (conversations: a list of from and value)",
        [{"role": "system", "content": "s"}, ASK | {"weight": 0}, SAY, {"role": "tool", "content": "t"}],
    ),
    "messages": (
        {
            "messages": [
                {"role": "developer", "content": "s"},
                {"role": "user", "content": [{"type": "text", "text": "a"}]},
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [{"function": {"name": "f", "arguments": '{"x": 1}'}}],
                },
                {"role": "tool", "content": "t", "name": "f"},
                SAY | {"weight": 0, "tool_calls": None},
            ],
            "tools": json.dumps([TOOL]),
        },
        "messages (messages: a list of role and content)",
        [
            {"role": "system", "content": "s"},
            ASK,
            {"role": "assistant", "content": "", "tool_calls": [{"function": CALL}]},
            {"role": "tool", "content": "t", "name": "f"},
            SAY | {"weight": 0},
        ],
    ),
    "role and content under another name": (
        {"conversations": [ASK, SAY]},
        "messages (conversations: a list of role and content)",
        [ASK, SAY],
    ),
    "prompt": ({"prompt": "a", "completion": "b"}, "prompt_completion (keys prompt, completion)", [ASK, SAY]),
    "prompt of messages": (
        {"prompt": [ASK], "completion": [SAY]},
        "prompt_completion (keys prompt, completion)",
        [ASK, SAY],
    ),
    "MetaMath": (
        {"type": "t", "query": "a", "original_question": "o", "response": "b"},
        "prompt_completion (keys query, response)",
        [ASK, SAY],
    ),
    "TRACE": ({"prompt": "a", "answer": "b"}, "prompt_completion (keys prompt, answer)", [ASK, SAY]),
}


def read(path, **asked):
    notes = []
    found = list(read_conversations(ConversationSet(path=str(path), **asked), notes.append))
    return found, notes


@pytest.mark.parametrize("name", RECORDS)
def test_forms_are_detected_and_said(tmp_path, name):
    record, told, messages = RECORDS[name]
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(record) + "\n\n" + json.dumps(record))
    found, notes = read(path)
    assert notes == [f"a.jsonl: {told}"]
    assert [one.where for one in found] == [f"{path}: line 1", f"{path}: line 3"]
    assert [list(one.messages) for one in found] == [messages] * 2
    assert found[0].tools == ((TOOL,) if name == "messages" else ())
    asked, _ = read(path, format=told.split(" ", 1)[0])
    assert asked == found


# A column of Parquet cannot hold text and a list of parts.
@pytest.mark.parametrize("name", sorted(RECORDS.keys() - {"messages"}))
def test_files_of_every_kind_give_the_same(tmp_path, name):
    record, _, messages = RECORDS[name]
    (tmp_path / "a.json").write_text(json.dumps([record]))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(json.dumps(record).encode()))
    pq.write_table(pa.Table.from_pylist([record]), tmp_path / "c.parquet")
    found, notes = read(tmp_path)
    assert len(notes) == 3
    assert [list(one.messages) for one in found] == [messages] * 3


FAULTS = {
    "no form": ('{"text": "a"}', "auto", r"line 1: is of no known form .* its keys are text"),
    "two forms": (
        '{"messages": [{"role": "user", "content": "a"}], "instruction": "a", "output": "b"}',
        "auto",
        r"line 1: has the keys of messages .* and alpaca .*; say which with format:",
    ),
    "no object": ("[1]", "auto", "line 1: is a list, not an object"),
    "a field is missing": ('{"instruction": "a"}', "alpaca", "line 1: no field 'output'; found instruction"),
    "a field is no text": ('{"prompt": 3, "answer": "b"}', "auto", "line 1: field 'prompt' is a number"),
    "one of a pair": ('{"prompt": "a"}', "prompt_completion", "line 1: has not both of prompt/"),
    "a role": (
        '{"messages": [{"role": "user", "content": "a"}, {"role": "asistant", "content": "b"}]}',
        "auto",
        r"line 1: messages\[1\]: role is 'asistant', not one of",
    ),
    "a speaker": (
        '{"conversations": [{"from": "who", "value": "a"}]}',
        "auto",
        r"line 1: conversations\[0\]: from is 'who', not one of",
    ),
    "a turn": ('{"conversations": [{"from": "human"}]}', "auto", r"conversations\[0\]: no field 'value'"),
    "turns": ('{"messages": "a"}', "messages", "line 1: field 'messages' is text, not a list"),
    "weight": (
        '{"messages": [{"role": "user", "content": "a", "weight": 0.5}]}',
        "auto",
        r"messages\[0\]: weight is 0.5; it can be 0",
    ),
    "an image": (
        '{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}',
        "auto",
        r"messages\[0\]: content\[0\] holds no text",
    ),
    "arguments": (
        '{"messages": [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{"}]}]}',
        "auto",
        r"messages\[0\]\.tool_calls\[0\]: arguments: is a text that is not JSON",
    ),
    "tools": (
        '{"messages": [], "tools": {"a": 1}}',
        "auto",
        "line 1: field 'tools' is an object, not a list",
    ),
    "half a character": (r'{"prompt": "\ud800", "answer": "b"}', "auto", "field 'prompt' is not Unicode"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_name_the_line_and_the_key(tmp_path, name):
    record, form, said = FAULTS[name]
    path = tmp_path / "a.jsonl"
    path.write_text(record)
    with pytest.raises(DataError, match=f"a.jsonl: {said}" if said.startswith("line") else said):
        read(path, format=form)


def test_text_files_hold_no_conversations(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(DataError, match=r"a\.txt: conversations are read from"):
        read(tmp_path / "a.txt")


@pytest.mark.parametrize("name", ["alpaca", "codealpaca", "math-cot"])
def test_real_instructions_are_seen_as_alpaca(data_dir, name):
    found, notes = read(data_dir / f"instructions/{name}.json")
    assert "alpaca (keys instruction, input, output)" in notes[0]
    raw = json.loads((data_dir / f"instructions/{name}.json").read_text())
    assert [one.messages[-1]["content"] for one in found] == [record["output"] for record in raw]
