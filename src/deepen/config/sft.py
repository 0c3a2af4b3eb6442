"""Conversations to tune on, and how."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from deepen.config.section import Count, Positive, Real, Share, as_tuple
from deepen.config.texts import Place
from deepen.config.training import LoopSection, LoraSection, Method, TrainSection

Format = Literal["alpaca", "sharegpt", "messages", "prompt_completion"]


class ConversationSet(Place):
    """Conversations to read: files of .json, .jsonl or .parquet, or a dataset of the hub."""

    format: Literal["auto"] | Format = "auto"
    """How a record is a conversation: `alpaca` (instruction, input, output), `sharegpt` (conversations of
    from and value), `messages` (role and content, as OpenAI's, with tools), `prompt_completion` (two keys).
    `auto`: seen from the first record of each file, and said."""

    weight: Positive = 1.0
    """How often a window of this set is seen for each time a window of a weight-1 set is."""


class SftSection(LoopSection):
    """Tuning on conversations, with the loss on the assistant's tokens; the defaults are the paper's.

    After `train`, what concerns the machine and the optimiser is as there unless it is said here.
    """

    data: Annotated[tuple[ConversationSet, ...], BeforeValidator(as_tuple), Field(min_length=1)]
    """The conversations."""

    template: str | None = None
    """Chat template: `alpaca`, `chatml`, `gemma`, `llama2`, `llama3`, `mistral`, `phi3`, `plain`, `zephyr`
    or a .jinja file; default: the tokenizer's own."""

    sequence_length: Count | None = None
    """Tokens in one window. Conversations are packed whole, none sees another, and longer ones are cut at
    their end. Default: 4,096, or the base's positions where those are fewer."""

    heldout: Share = 0.0
    """Share of every set's conversations kept out of tuning; the loss of their answers is evaluated."""

    cache: str | None = None
    """Directory of tokenised conversations; default: `data.cache`."""

    batch: Count = 128
    """Windows in one optimiser step."""

    trainable: Literal["all", "new", "lora"] = "all"
    """`all` parameters (the paper), only the `new` blocks, or low-rank adapters (`lora`) on all of them."""

    lora: LoraSection = LoraSection()
    """For trainable `lora`."""

    learning_rate: Positive = 2e-5
    """Peak learning rate."""

    warmup: Share = 0.03
    """Share of the steps over which the learning rate rises from 0."""

    final_learning_rate: Annotated[Real, Field(ge=0, le=1)] = 0.0
    """Where the cosine ends, as a share of the peak."""

    weight_decay: Annotated[Real, Field(ge=0)] = 0.0
    """AdamW decay of matrices; norms and biases have none."""

    epochs: Positive = 1.0
    """Passes through the conversations; rounded up to whole steps."""

    def as_training(self, length: int) -> TrainSection:
        """Return the same as a section of training, by the method that does what `trainable` says.

        Args:
            length: tokens in a window.
        """
        methods: dict[str, Method] = {"all": "full", "new": "blocks", "lora": "lora"}
        return TrainSection(
            **self.model_dump(include=set(LoopSection.model_fields)),
            method=methods[self.trainable],
            lora=self.lora,
            epochs=self.epochs,
            batch_tokens=self.batch * length,
            learning_rate=self.learning_rate,
            warmup=self.warmup,
        )
