"""Conversations out of records: which form a record has, and the messages it holds."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, get_args

from deepen.config import Format
from deepen.data.rows import encodable, json_type, listed
from deepen.errors import DataError

Message = dict[str, Any]
Record = Mapping[str, Any]

_TURNS: Final = ("messages", "conversations", "conversation")
_PROMPTS: Final = ("prompt", "query", "question")
_COMPLETIONS: Final = ("completion", "response", "answer", "output")
_SPEAKERS: Final = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}
_ROLES: Final = ("system", "developer", "user", "assistant", "tool", "function")


@dataclass(frozen=True)
class Conversation:
    """What people, tools and the model say in turn, as chat templates take it.

    Attributes:
        where: file and line, or record, for messages about it.
        messages: each with `role` and `content`; of an assistant's, `weight` 0 leaves it untrained.
        tools: JSON schemas of what the model may call.
    """

    where: str
    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class Detected:
    """A form, and what in a record told it."""

    format: Format
    why: str


def detect(record: Any, where: str) -> Detected:
    """Tell from a record's keys which form it has.

    Raises:
        DataError: it has none, or more than one.
    """
    record = _object(record, where)
    found = [one for one in (_turns(record), _alpaca_keys(record), _pair(record)) if one]
    if len(found) == 1:
        return found[0]
    if found:
        forms = " and ".join(f"{one.format} ({one.why})" for one in found)
        raise DataError(f"{where}: has the keys of {forms}; say which with format:")
    forms = ", ".join(get_args(Format))
    raise DataError(f"{where}: is of no known form ({forms}); its keys are {listed(record)}")


def convert(record: Any, form: Format, where: str) -> Conversation:
    """Read a record as a conversation.

    Raises:
        DataError: it is not of that form; names the key.
    """
    return _CONVERTERS[form](_object(record, where), where)


def _turns(record: Record) -> Detected | None:
    for key in _TURNS:
        value = record.get(key)
        if isinstance(value, list):
            first = value[0] if value else {}
            if isinstance(first, dict) and ("from" in first or (not value and key != "messages")):
                return Detected("sharegpt", f"{key}: a list of from and value")
            if isinstance(first, dict) and ("role" in first or not value):
                return Detected("messages", f"{key}: a list of role and content")
    return None


def _alpaca_keys(record: Record) -> Detected | None:
    if "instruction" in record and "output" in record:
        third = ", input" if "input" in record else ""
        return Detected("alpaca", f"keys instruction{third}, output")
    return None


def _pair(record: Record) -> Detected | None:
    prompt, completion = _pair_keys(record)
    if prompt is None or completion is None:
        return None
    return Detected("prompt_completion", f"keys {prompt}, {completion}")


def _pair_keys(record: Record) -> tuple[str | None, str | None]:
    prompt = next((key for key in _PROMPTS if key in record), None)
    return prompt, next((key for key in _COMPLETIONS if key in record), None)


def _from_alpaca(record: Record, where: str) -> Conversation:
    instruction, answer = _text(record, "instruction", where), _text(record, "output", where)
    more = _text(record, "input", where) if record.get("input") else ""
    messages = _system(record, where)
    for number, pair in enumerate(record.get("history") or ()):
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(side, str) for side in pair):
            raise DataError(f"{where}: history[{number}] is not a pair of texts")
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    # Apart as well as joined: Alpaca's own template sets the input under a heading of its own.
    user = {"role": "user", "content": f"{instruction}\n{more}" if more else instruction}
    user |= {"instruction": instruction, "input": more}
    return Conversation(where, (*messages, user, {"role": "assistant", "content": answer}))


def _from_sharegpt(record: Record, where: str) -> Conversation:
    messages = _system(record, where)
    for place, turn in _list_of_turns(record, where):
        speaker = _text(turn, "from", place)
        if speaker.lower() not in _SPEAKERS:
            raise DataError(f"{place}: from is {speaker!r}, not one of {', '.join(_SPEAKERS)}")
        message = {"role": _SPEAKERS[speaker.lower()], "content": _text(turn, "value", place)}
        messages.append(message | _weight(turn, place))
    return Conversation(where, tuple(messages), _tools(record, where))


def _from_messages(record: Record, where: str) -> Conversation:
    messages = _system(record, where)
    messages += [_message(turn, place) for place, turn in _list_of_turns(record, where)]
    return Conversation(where, tuple(messages), _tools(record, where))


def _from_pair(record: Record, where: str) -> Conversation:
    prompt, completion = _pair_keys(record)
    if prompt is None or completion is None:
        sides = f"{'/'.join(_PROMPTS)} and {'/'.join(_COMPLETIONS)}"
        raise DataError(f"{where}: has not both of {sides}; found {listed(record)}")
    messages = _system(record, where)
    for key, role in ((prompt, "user"), (completion, "assistant")):
        if isinstance(record[key], list):
            messages += [_message(turn, place) for place, turn in _turns_of(record[key], key, where)]
        else:
            messages.append({"role": role, "content": _text(record, key, where)})
    return Conversation(where, tuple(messages), _tools(record, where))


_CONVERTERS: Final[dict[Format, Callable[[Record, str], Conversation]]] = {
    "alpaca": _from_alpaca,
    "sharegpt": _from_sharegpt,
    "messages": _from_messages,
    "prompt_completion": _from_pair,
}


def _list_of_turns(record: Record, where: str) -> Iterator[tuple[str, Record]]:
    key = next((key for key in _TURNS if record.get(key) is not None), None)
    if key is None:
        raise DataError(f"{where}: none of the fields {', '.join(_TURNS)}; found {listed(record)}")
    return _turns_of(record[key], key, where)


def _turns_of(turns: Any, key: str, where: str) -> Iterator[tuple[str, Record]]:
    if not isinstance(turns, list):
        raise DataError(f"{where}: field {key!r} is {json_type(turns)}, not a list")
    for number, turn in enumerate(turns):
        place = f"{where}: {key}[{number}]"
        yield place, _object(turn, place)


def _message(turn: Record, where: str) -> Message:
    role = _text(turn, "role", where)
    if role not in _ROLES:
        raise DataError(f"{where}: role is {role!r}, not one of {', '.join(_ROLES)}")
    calls = turn.get("tool_calls")
    message = {key: value for key, value in turn.items() if value is not None and key != "weight"}
    message["content"] = _content(turn, where, required=not calls)
    message["role"] = {"developer": "system", "function": "tool"}.get(role, role)
    if calls:
        message["tool_calls"] = [_call(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(calls)]
    return message | _weight(turn, where)


def _content(turn: Record, where: str, *, required: bool) -> str:
    """Read a message's text; OpenAI also writes it as a list of parts."""
    content = turn.get("content")
    if content is None and not required:
        return ""
    if not isinstance(content, list):
        return _text(turn, "content", where)
    for number, part in enumerate(content):
        if not isinstance(part, dict) or not isinstance(part.get("text"), str):
            raise DataError(f"{where}: content[{number}] holds no text; only text can be learned")
    return "".join(encodable(part["text"], "text", where) for part in content)


def _call(call: Any, where: str) -> Message:
    """Read a tool call; its arguments, which OpenAI writes as JSON in a string, become an object."""
    call = dict(_object(call, where))
    function = dict(_object(call.get("function", call), where))
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        function["arguments"] = _json(arguments, f"{where}: arguments")
    return {**call, "function": function} if "function" in call else function


def _tools(record: Record, where: str) -> tuple[dict[str, Any], ...]:
    tools = record.get("tools")
    if isinstance(tools, str):
        tools = _json(tools, f"{where}: tools") if tools.strip() else None
    if not tools:
        return ()
    if not isinstance(tools, list):
        raise DataError(f"{where}: field 'tools' is {json_type(tools)}, not a list")
    return tuple(dict(_object(tool, f"{where}: tools[{number}]")) for number, tool in enumerate(tools))


def _system(record: Record, where: str) -> list[Message]:
    key = next((key for key in ("system", "system_prompt") if record.get(key)), None)
    return [{"role": "system", "content": _text(record, key, where)}] if key else []


def _weight(turn: Record, where: str) -> Message:
    weight = turn.get("weight")
    if weight not in (None, 0, 1):
        raise DataError(f"{where}: weight is {weight!r}; it can be 0 (not learned) or 1")
    return {"weight": 0} if weight == 0 and weight is not None else {}


def _text(record: Record, key: str, where: str) -> str:
    if key not in record:
        raise DataError(f"{where}: no field {key!r}; found {listed(record)}")
    if not isinstance(record[key], str):
        raise DataError(f"{where}: field {key!r} is {json_type(record[key])}, not text")
    return encodable(record[key], key, where)


def _object(value: Any, where: str) -> Record:
    if not isinstance(value, dict):
        raise DataError(f"{where}: is {json_type(value)}, not an object with keys")
    return value


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: is a text that is not JSON: {error}") from None
