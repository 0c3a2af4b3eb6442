"""Conversations as token ids, and which of them the assistant said.

Which text is the assistant's is asked of the chat template itself, by rendering what it sees before a turn
and after it::

    before = messages up to the turn, with the generation prompt      what the model is given at inference
    after  = messages up to and including the turn
    whole  = all messages

`before` begins `after`, and `after` begins `whole`; the turn is what `after` has more than `before`: the
answer and the tokens that end it. So a template needs no `{% generation %}` marks. One that writes earlier
turns anew when later ones follow (thoughts left out, say) breaks this, and is refused: what the model would
be trained on is not what it would see. Some close every conversation with the end-of-text token (Phi-3): it
belongs to the last turn.

The whole text is tokenised once, as at inference; a token that holds a character of a turn is trained.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from deepen.checkpoint import write_file
from deepen.data.conversations import Conversation, Message
from deepen.errors import DataError, in_a_line

_TEMPLATES: Final = Path(__file__).parent / "templates"
_SUFFIX: Final = ".jinja"


@dataclass(frozen=True)
class ChatTemplate:
    """How messages become one text.

    Attributes:
        name: how messages call it.
        source: Jinja, or of a tokenizer with several for different uses, each by name.
    """

    name: str
    source: str | dict[str, str]


@dataclass(frozen=True)
class Laid:
    """A conversation as one text.

    Attributes:
        where: file and line, or record.
        text: all of it, up to the end of the assistant's last turn.
        spans: begin and end in `text` of each of the assistant's turns that is learned.
    """

    where: str
    text: str
    spans: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Encoded:
    """A conversation as the model sees it.

    Attributes:
        ids: int64 [tokens].
        trained: bool [tokens], whether the assistant said it.
        torn: turns of which the first token also holds the end of what stands before.
    """

    ids: npt.NDArray[np.int64]
    trained: npt.NDArray[np.bool_]
    torn: int


def template_names() -> tuple[str, ...]:
    """Return the names of the templates that come with deepen."""
    return tuple(sorted(path.stem for path in _TEMPLATES.glob(f"*{_SUFFIX}")))


def choose_template(tokenizer: Any, name: str | None = None) -> ChatTemplate:
    """Return the tokenizer's own template, or one by its name or by a path that ends in .jinja.

    Raises:
        DataError: there is none.
    """
    if name is None:
        own = tokenizer.chat_template
        if not own:
            raise DataError(
                "the tokenizer has no chat template; choose one with template: "
                f"{', '.join(template_names())}, or a .jinja file"
            )
        return ChatTemplate("the tokenizer's own", own)
    if name not in template_names() and not name.endswith(_SUFFIX):
        raise DataError(
            f"no chat template {name!r}; there are {', '.join(template_names())}, or a .jinja file"
        )
    path = Path(name) if name.endswith(_SUFFIX) else _TEMPLATES / f"{name}{_SUFFIX}"
    try:
        return ChatTemplate(name, path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"chat template {path}: cannot be read: {error}") from None


def write_template(template: ChatTemplate, directory: Path) -> None:
    """Put a template beside a model, where tokenizers look for it before they look at their own."""
    source = template.source if isinstance(template.source, str) else template.source["default"]
    write_file(directory / "chat_template.jinja", source)


def lay_out(conversation: Conversation, template: ChatTemplate, tokenizer: Any) -> Laid | None:
    """Render a conversation and find the assistant's turns in it.

    Left out are what the assistant says before anyone asks, and what follows its last turn: nothing is
    learned from it.

    Returns:
        None where nothing of the assistant's is to be learned.

    Raises:
        DataError: the template refuses or leaves out something, or its turns cannot be told apart exactly.
    """
    messages = _answered(conversation.messages)
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    learned = [i for i in turns if "weight" not in messages[i]]
    if not learned:
        return None
    writer = _Writer(tokenizer, template, conversation.tools, conversation.where)
    whole = writer.render(messages)
    _check_all_said(messages, whole, writer)
    spans = tuple(_span(messages, i, whole, writer) for i in learned)
    return Laid(conversation.where, whole, spans)


def prompt_text(messages: Sequence[Message], template: ChatTemplate, tokenizer: Any) -> str:
    """Write messages as text up to where the assistant's next words stand.

    Raises:
        DataError: the template refuses them.
    """
    return _Writer(tokenizer, template, (), "the conversation").render(messages, prompt=True)


def turn_end(template: ChatTemplate, tokenizer: Any) -> int | None:
    """Return the token that a template ends the assistant's turn with; None where it is an ordinary one."""
    said = "deepen"
    writer = _Writer(tokenizer, template, (), "a conversation")
    talk = [{"role": "user", "content": "?"}, {"role": "assistant", "content": said}]
    rest = writer.render(talk).rpartition(said)[2]
    special = {*tokenizer.get_added_vocab().values(), *tokenizer.all_special_ids}
    ids: list[int] = tokenizer(rest, add_special_tokens=False)["input_ids"]
    return next((token for token in ids if token in special), None)


def encode_conversations(laid: Sequence[Laid], template: ChatTemplate, tokenizer: Any) -> list[Encoded]:
    """Tokenise conversations; BOS is where the template puts it, and nowhere else.

    Raises:
        DataError: the tokenizer does not say which text a token is of, or a turn has no token that ends it.
    """
    if not tokenizer.is_fast:
        raise DataError(
            f"tokenizer {type(tokenizer).__name__}: does not say which text each token is of; "
            "conversations need a fast one (tokenizer.json)"
        )
    tokens = tokenizer(
        [one.text for one in laid],
        add_special_tokens=False,
        truncation=False,
        padding=False,
        return_offsets_mapping=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    ends = np.asarray(sorted({*tokenizer.get_added_vocab().values(), *tokenizer.all_special_ids}))
    pairs = zip(laid, tokens["input_ids"], tokens["offset_mapping"], strict=True)
    return [_marked(one, ids, offsets, ends, template.name) for one, ids, offsets in pairs]


class _Writer:
    """A template filled in for one conversation."""

    def __init__(
        self, tokenizer: Any, template: ChatTemplate, tools: tuple[Message, ...], where: str
    ) -> None:
        self._tokenizer, self._source, self.tools = tokenizer, template.source, list(tools) or None
        self.name, self.where = template.name, where
        self.eos = str(tokenizer.eos_token or "")

    def render(self, messages: Sequence[Message], *, prompt: bool = False, tools: bool = True) -> str:
        """Write messages as text, with `prompt` up to where the assistant's next words stand."""
        shown = self.tools if tools else None
        source = self._source
        if isinstance(source, dict):
            source = source["tool_use" if shown and "tool_use" in source else "default"]
        try:
            text = self._tokenizer.apply_chat_template(
                list(messages),
                tools=shown,
                chat_template=source,
                tokenize=False,
                add_generation_prompt=prompt,
            )
        except Exception as error:  # a template raises what it likes: its own word, or any error of Python
            said = in_a_line(error)
            raise DataError(f"{self.where}: chat template {self.name} refuses it: {said}") from None
        return str(text)

    def fault(self, what: str, hint: str = "choose another with template:") -> DataError:
        return DataError(f"{self.where}: chat template {self.name} {what}\n{hint}")


def _answered(messages: Sequence[Message]) -> list[Message]:
    """Leave out what the assistant and tools say before the first user, and what follows the last answer."""
    asked = next((i for i, m in enumerate(messages) if m["role"] == "user"), len(messages))
    said = [m for i, m in enumerate(messages) if i >= asked or m["role"] == "system"]
    last = max((i for i, m in enumerate(said) if m["role"] == "assistant"), default=-1)
    return said[: last + 1]


def _span(messages: list[Message], turn: int, whole: str, writer: _Writer) -> tuple[int, int]:
    before = writer.render(messages[:turn], prompt=True)
    after = writer.render(messages[: turn + 1])
    if not whole.startswith(after) and writer.eos:
        after = after.removesuffix(writer.eos)
    if not after.startswith(before) or not whole.startswith(after):
        raise writer.fault(
            f"writes turns anew when others follow (messages[{turn}]): which tokens are the assistant's "
            "cannot be told exactly",
            "choose another with template:, or make each answer a conversation of its own",
        )
    if len(after) == len(before):
        raise writer.fault(f"leaves out what the assistant says (messages[{turn}])")
    return len(before), len(after)


def _check_all_said(messages: Sequence[Message], whole: str, writer: _Writer) -> None:
    """Refuse a template that passes over tools, or over what someone says to the assistant."""
    if writer.tools and writer.render(messages, tools=False) == whole:
        raise writer.fault("does not show tools to the model")
    for number, message in enumerate(messages):
        if message["role"] == "assistant":
            continue
        parts = (message.get("instruction", ""), message.get("input", ""))
        # Alpaca's own template sets the parts of a user's message apart.
        texts = parts if parts[1] and message["content"] not in whole else (message["content"],)
        if not all(_said(text.strip(), whole) for text in texts):
            raise writer.fault(f"leaves out what the {message['role']} says (messages[{number}])")


def _said(text: str, whole: str) -> bool:
    return (
        text in whole
        or json.dumps(text, ensure_ascii=False)[1:-1] in whole
        or json.dumps(text)[1:-1] in whole
    )


def _marked(
    laid: Laid,
    ids: list[int],
    offsets: list[tuple[int, int]],
    ends: npt.NDArray[np.int64],
    template: str,
) -> Encoded:
    numbers = np.asarray(ids, dtype=np.int64)
    begin, end = np.asarray(offsets, dtype=np.int64).reshape(-1, 2).T
    trained, torn = np.zeros(len(ids), dtype=np.bool_), 0
    for first, last in laid.spans:
        # Byte-level tokenizers trim white space off: what is nothing but that has an empty place at its end.
        inside = np.where(begin < end, (end > first) & (begin < last), (begin > first) & (begin <= last))
        torn += int(((begin < first) & (end > first)).any())
        _check_end(laid, numbers[inside], begin[inside], end[inside], ends, template)
        trained |= inside
    return Encoded(numbers, trained, torn)


def _check_end(
    laid: Laid,
    ids: npt.NDArray[np.int64],
    begin: npt.NDArray[np.int64],
    end: npt.NDArray[np.int64],
    ends: npt.NDArray[np.int64],
    template: str,
) -> None:
    """Refuse a turn whose last token but for white space is an ordinary one: no one would learn to stop."""
    for number, first, last in zip(ids[::-1].tolist(), begin[::-1].tolist(), end[::-1].tolist(), strict=True):
        if number in ends:
            return
        if laid.text[first:last].strip():
            break
    raise DataError(
        f"{laid.where}: chat template {template} ends the assistant's turn with no special token of this "
        "tokenizer, so that a model would not learn to stop\n"
        "choose one that ends it with the tokenizer's end-of-text token (alpaca, llama2, mistral, zephyr)"
    )
