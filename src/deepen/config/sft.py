"""Conversations to tune on, and how."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from deepen.config.section import Count, Positive, Section, Share, as_tuple
from deepen.config.texts import Place

Format = Literal["alpaca", "sharegpt", "messages", "prompt_completion"]


class ConversationSet(Place):
    """Conversations to read: files of .json, .jsonl or .parquet, or a dataset of the hub."""

    format: Literal["auto"] | Format = "auto"
    """How a record is a conversation: `alpaca` (instruction, input, output), `sharegpt` (conversations of
    from and value), `messages` (role and content, as OpenAI's, with tools), `prompt_completion` (two keys).
    `auto`: seen from the first record of each file, and said."""

    weight: Positive = 1.0
    """How often a window of this set is seen for each time a window of a weight-1 set is."""


class SftSection(Section):
    """Tuning on conversations, with the loss on the assistant's tokens; the defaults are the paper's."""

    data: Annotated[tuple[ConversationSet, ...], BeforeValidator(as_tuple), Field(min_length=1)]
    """The conversations."""

    template: str | None = None
    """Chat template: `alpaca`, `chatml`, `gemma`, `llama2`, `llama3`, `mistral`, `phi3`, `zephyr` or a .jinja
    file; default: the tokenizer's own."""

    sequence_length: Count | None = None
    """Tokens in one window. Conversations are packed whole, none sees another, and longer ones are cut at
    their end. Default: 4,096, or the base's positions where those are fewer."""

    batch: Count = 128
    """Windows in one optimiser step."""

    trainable: Literal["all", "new"] = "all"
    """`all` parameters (the paper), or only the `new` blocks."""

    learning_rate: Positive = 2e-5
    """Peak learning rate, of a cosine."""

    warmup: Share = 0.03
    """Share of the steps over which the learning rate rises from 0."""

    epochs: Positive = 1.0
    """Passes through the conversations; rounded up to whole steps."""
