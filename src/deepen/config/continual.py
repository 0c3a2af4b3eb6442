"""A sequence of tasks to learn one after another, and the methods that learn it."""

from collections import Counter
from collections.abc import Iterable
from typing import Annotated, Any, Final, Literal, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator

from deepen.config.recipe import ExpandSection
from deepen.config.section import Count, Index, Positive, Real, Section, Share, as_tuple
from deepen.config.sft import Format
from deepen.config.texts import TextSet
from deepen.config.training import LoraSection

AnswerMetric = Literal["accuracy", "choice", "rouge_l", "edit_similarity", "sari"]
Scoring = Literal["standard", "trace"]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]

# TRACE's order, the score that stands in its tables for each task, and the epochs its scripts pass.
TRACE: Final[tuple[tuple[str, AnswerMetric, float], ...]] = (
    ("C-STANCE", "accuracy", 5.0),
    ("FOMC", "accuracy", 3.0),
    ("MeetingBank", "rouge_l", 7.0),
    ("Py150", "edit_similarity", 5.0),
    ("ScienceQA", "choice", 3.0),
    ("NumGLUE-cm", "accuracy", 5.0),
    ("NumGLUE-ds", "accuracy", 5.0),
    ("20Minuten", "sari", 7.0),
)


class SequenceTask(Section):
    """One task: prompts and answers to learn, others to be tested on, and a score."""

    name: Name
    """How results call it."""

    train: str
    """File to learn, .json, .jsonl or .parquet."""

    test: str
    """File to be tested on, read in its order."""

    metric: AnswerMetric
    """`accuracy` (the whole answer), `choice` (its first character), `rouge_l`, `edit_similarity`, `sari`."""

    format: Literal["auto"] | Format = "auto"
    """How a record is a prompt and its answer; see `sft.data.format`."""

    epochs: Positive | None = None
    """Passes through its training records; default: the study's."""


class SequenceMethod(Section):
    """One way to learn the sequence."""

    name: Name
    """How results call it."""

    method: Literal["full", "lora", "blocks"]
    """What trains: every parameter, one adapter through all tasks, or new blocks."""

    learning_rate: Positive
    """Peak learning rate, of each task anew."""

    replay: Share = 0.0
    """Share of each earlier task's windows that is seen again in each epoch of a later one."""

    expand: ExpandSection | None = None
    """New blocks of method `blocks`."""

    each_task: bool = False
    """New blocks for every task, those of earlier tasks being base from then on; otherwise the same new
    blocks learn all tasks."""

    lora: LoraSection = LoraSection()
    """Settings of method `lora`."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if (self.method == "blocks") != (self.expand is not None):
            raise ValueError("an expand section belongs to method blocks, and only to it")
        if self.each_task and self.method != "blocks":
            raise ValueError(f"each_task is of new blocks, which method {self.method} does not add")
        return self


class JudgeSection(Section):
    """Who judges answers."""

    url: str
    """An OpenAI-compatible endpoint, as `https://host/v1`; its key is read from OPENAI_API_KEY."""

    model: str
    """Its name there."""


class DeltasSection(Section):
    """TRACE's three deltas: of each method's last model, beside the base."""

    general: Annotated[tuple[str, ...], BeforeValidator(as_tuple)] = ()
    """General ability: tasks of the harness or YAML files, with shots: `mmlu:5`."""

    local: str | None = None
    """Directory of local copies of their datasets."""

    limit: Count | None = None
    """Documents of each of them; default: all."""

    instructions: str | None = None
    """Instruction following: questions that the judge compares the answers to, one JSON a line."""

    safety: str | None = None
    """Safety: the same of other questions."""

    judge: JudgeSection | None = None
    """Who judges the answers to `instructions` and `safety`."""

    max_new_tokens: Count = 1024
    """Most tokens of an answer to them."""

    @model_validator(mode="after")
    def _judged(self) -> Self:
        if bool(self.instructions or self.safety) != (self.judge is not None):
            raise ValueError("questions (instructions, safety) and a judge belong together; give both")
        return self

    def __bool__(self) -> bool:
        """Whether any of them is asked for."""
        return bool(self.general or self.judge)


class ContinualRecipe(Section):
    """A study of continual learning: every method learns the sequence of tasks, once a seed."""

    base: str
    """Checkpoint to start from: a directory or a hub id."""

    output: str
    """Directory of the study."""

    trace: str | None = None
    """TRACE's folder, as LLM-CL-Benchmark_500: its eight tasks in their order, with the epochs of its scripts
    unless `epochs` is given."""

    tasks: Annotated[tuple[SequenceTask, ...], BeforeValidator(as_tuple)] = ()
    """Instead of `trace`: any tasks, in the order in which they are learned."""

    methods: Annotated[tuple[SequenceMethod, ...], BeforeValidator(as_tuple), Field(min_length=1)]
    """How they are learned; each method begins with the base."""

    seeds: Annotated[tuple[Index, ...], BeforeValidator(as_tuple), Field(min_length=1)] = (0,)
    """Seeds of the order of the data and of every random draw."""

    template: str | None = None
    """Chat template, as `sft.template`; `plain` is TRACE's: prompt and answer with nothing round them but a
    line's end between them."""

    sequence_length: Annotated[Count, Field(ge=32)]
    """Tokens in one training window. Records are packed into it whole, and prompts cut in their middle so
    that an answer fits behind them."""

    answer_tokens: Count | None = None
    """Most tokens of an answer; a task whose training answers are shorter needs no more than the longest.
    Default: a quarter of the window."""

    train_items: Count | None = None
    """Records learned of each task, from the file's beginning; default: all."""

    test_items: Count | None = None
    """Records each task is tested on, from the file's beginning; default: all."""

    scoring: Scoring = "standard"
    """`standard`: the reference libraries' scores; `trace`: those of TRACE's own code."""

    epochs: Positive | None = None
    """Passes through the training records of a task; default: 1, or TRACE's."""

    batch: Count = 128
    """Windows in one optimiser step."""

    micro_batch: Count | None = None
    """Windows in one forward pass; default: as many as hold 16,384 tokens. Does not change the result."""

    schedule: Literal["cosine", "constant"] = "constant"
    """Shape of the learning rate of a task after its warm-up."""

    warmup: Share = 0.0
    """Share of a task's steps over which the learning rate rises from 0."""

    weight_decay: Annotated[Real, Field(ge=0)] = 0.0
    """AdamW decay of matrices; norms and biases have none."""

    betas: Annotated[tuple[Share, Share], BeforeValidator(as_tuple)] = (0.9, 0.95)
    """AdamW momenta."""

    clip: Positive | None = 1.0
    """Largest gradient norm over all trainable parameters; null: none."""

    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Compute precision; what trains is fp32 always. `auto`: bf16 on a GPU, fp32 on a CPU."""

    device: str = "auto"
    """`auto`, `cpu`, `cuda`, `cuda:1`, `mps`."""

    answer_batch: Count = 8
    """Prompts answered at a time; fewer where they do not fit the memory."""

    general: Annotated[tuple[TextSet, ...], BeforeValidator(as_tuple)] = ()
    """Texts of general ability, on which held-out loss is measured after every task."""

    general_tokens: Count = 200_000
    """Tokens read from each of them, from its beginning."""

    deltas: DeltasSection = DeltasSection()
    """TRACE's deltas of general ability, instruction following and safety; default: not measured."""

    keep: Literal["all", "last"] = "all"
    """Whether the models of all tasks stay on disk, or only the newest one of each cell."""

    @field_validator("methods", "tasks")
    @classmethod
    def _named_apart(cls, value: tuple[Any, ...]) -> tuple[Any, ...]:
        if twice := _twice(one.name for one in value):
            raise ValueError(f"two are called {', '.join(twice)}")
        return value

    @field_validator("general")
    @classmethod
    def _labelled_apart(cls, value: tuple[TextSet, ...]) -> tuple[TextSet, ...]:
        if twice := _twice(text.label for text in value):
            raise ValueError(f"two texts are called {', '.join(twice)}; give one of them another name")
        return value

    @model_validator(mode="after")
    def _one_sequence(self) -> Self:
        if (self.trace is None) == (not self.tasks):
            raise ValueError("give either trace or tasks")
        if self.most_answer_tokens > self.sequence_length // 2:
            raise ValueError(
                f"answer_tokens {self.answer_tokens} leaves less than half of a window of "
                f"sequence_length {self.sequence_length} to prompts"
            )
        return self

    @property
    def most_answer_tokens(self) -> int:
        """Most tokens of an answer."""
        return self.answer_tokens or self.sequence_length // 4

    @property
    def sequence(self) -> tuple[SequenceTask, ...]:
        """The tasks in order, each with its epochs."""
        if self.trace is None:
            return tuple(
                task.model_copy(update={"epochs": task.epochs or self.epochs or 1.0}) for task in self.tasks
            )
        return tuple(
            SequenceTask(
                name=name,
                train=f"{self.trace}/{name}/train.json",
                test=f"{self.trace}/{name}/test.json",
                metric=metric,
                format="prompt_completion",
                epochs=self.epochs or epochs,
            )
            for name, metric, epochs in TRACE
        )


def _twice(names: Iterable[str]) -> list[str]:
    return sorted(name for name, count in Counter(names).items() if count > 1)
