"""Conversations to tune on."""

from typing import Literal

from deepen.config.section import Positive
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
