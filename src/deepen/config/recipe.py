"""What a recipe can say. The docstring under a field states its unit and scope."""

import math
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)


def _whole(value: Any) -> Any:
    """Accept 4e6 where a whole number is meant."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _real(value: Any) -> Any:
    """Accept 1 where 1.0 is meant; a bool is not a number."""
    if not isinstance(value, int) or isinstance(value, bool):
        return value
    # What no float can hold is refused as infinity is.
    return float(value) if abs(value) < 10**300 else math.inf


def _sequence(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


Count = Annotated[int, BeforeValidator(_whole), Field(ge=1)]
Index = Annotated[int, BeforeValidator(_whole), Field(ge=0)]
Real = Annotated[float, BeforeValidator(_real)]
Positive = Annotated[float, BeforeValidator(_real), Field(gt=0)]
Share = Annotated[float, BeforeValidator(_real), Field(ge=0, lt=1)]


class Section(BaseModel):
    """A part of a recipe: frozen, strict in its types, closed to unknown keys."""

    model_config = ConfigDict(
        frozen=True, strict=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )


class TextSet(Section):
    """A text to read: files on disk or a dataset of the hub."""

    name: str | None = Field(default=None, pattern=r"^[A-Za-z0-9._-]+$")
    """How results call it; default: the name of its file or dataset."""

    path: str | None = None
    """File, directory or glob of .txt, .md, .jsonl, .json or .parquet (also .gz where the format allows)."""

    hub: str | None = None
    """Dataset id on the Hugging Face hub, instead of `path`."""

    subset: str | None = None
    """Configuration of the hub dataset."""

    split: str = "train"
    """Split of the hub dataset."""

    revision: str | None = None
    """Commit, tag or branch of the hub dataset; default: the newest commit."""

    stream: bool = False
    """Read the hub dataset as it arrives, with no copy of it on disk but the corpus."""

    field: str | None = None
    """Key that holds the text in a record; default `text`."""

    template: str | None = None
    """Instead of `field`: text built from several keys, as `{question}\\n{answer}`."""

    separator: str | None = None
    """Cuts a plain-text file into documents; default: one file is one document."""

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        if (self.path is None) == (self.hub is None):
            raise ValueError("give either path or hub")
        if self.field is not None and self.template is not None:
            raise ValueError("give either field or template")
        if self.hub is None and (self.stream or self.revision is not None):
            raise ValueError("stream and revision are for hub datasets")
        return self

    @property
    def label(self) -> str:
        """The name results use."""
        if self.name:
            return self.name
        last = (self.path or self.hub or "").rstrip("/").rsplit("/", 1)[-1]
        stem = last.split(".", 1)[0].replace("*", "").strip("-_")
        return stem or "text"


class Source(TextSet):
    """A text to train on."""

    weight: Positive = 1.0
    """How often a token of this source is seen for each time a token of a weight-1 source is."""


class ExpandSection(Section):
    """Which new blocks are added, and where."""

    blocks: Count | None = None
    """Number of new blocks."""

    placement: Literal["interleaved", "suffix", "prefix"] = "interleaved"
    """`interleaved` (the paper), `suffix` (all at the top) or `prefix` (all at the bottom)."""

    groups: Count | None = None
    """Number of groups for `interleaved`; default: one new block a group."""

    after: Annotated[tuple[int, ...], BeforeValidator(_sequence)] | None = None
    """Explicit base blocks to stand on (-1: the bottom) instead of a placement."""

    @model_validator(mode="after")
    def _some(self) -> Self:
        if self.blocks is None and self.after is None:
            raise ValueError("give blocks or after")
        return self


class DecontaminateSection(Section):
    """Training documents that share a run of words with an evaluation text."""

    ngram: Annotated[Count, Field(ge=8)] = 13
    """Words in a run. Case and punctuation do not count."""

    action: Literal["drop", "report"] = "drop"
    """`drop` leaves such documents out of training; `report` only counts them."""


class DeduplicateSection(Section):
    """Training documents that are nearly the same as one before them, in any source."""

    similarity: Annotated[Positive, Field(ge=0.6, le=1)] = 0.8
    """Least share of equal five-word runs (Jaccard, estimated by MinHash) that makes a duplicate."""

    action: Literal["drop", "report"] = "drop"
    """`drop` keeps the first of them; `report` only counts them."""


class DataSection(Section):
    """What is trained on and how it is cut."""

    sequence_length: Annotated[Count, Field(ge=2)]
    """Tokens in one training window."""

    sources: Annotated[tuple[Source, ...], BeforeValidator(_sequence), Field(min_length=1)]
    """The mixture."""

    packing: Literal["stream", "best_fit"] = "stream"
    """`stream`: documents end to end, cut every window. `best_fit`: documents whole wherever one fits."""

    document_masks: bool = False
    """No token attends to, or is predicted from, another document; positions restart with each."""

    decontaminate: DecontaminateSection | None = None
    """Check the sources against the evaluation texts and the held-out documents; null: no check."""

    deduplicate: DeduplicateSection | None = None
    """Check the sources for near-duplicates; null: no check."""

    heldout: Share = 0.0
    """Share of every source's documents kept out of training; they are evaluated as domain text."""

    cache: str | None = None
    """Directory of tokenised corpora; default `$DEEPEN_CACHE` or `~/.cache/deepen`."""

    workers: Count = 1
    """Processes that tokenise. With 1 a fast tokenizer uses threads of its own, which is often faster."""


class LoraSection(Section):
    """Settings of method `lora`."""

    rank: Count = 16
    """r, the rank of the two factors."""

    alpha: Count | None = None
    """Scale of the adapter, divided by r (`rslora`: by its root); default: 2 r."""

    dropout: Share = 0.0
    """Dropout before the adapter."""

    variant: Literal["lora", "rslora", "dora"] = "lora"
    """`lora`, rank-stabilised (`rslora`), or with magnitudes apart from directions (`dora`)."""


class FreezeSection(Section):
    """Settings of method `freeze`."""

    blocks: Count = 1
    """Number of base blocks that train."""

    placement: Literal["interleaved", "suffix", "prefix"] = "interleaved"
    """Which: those that new blocks so placed would copy."""


class PromptSection(Section):
    """Settings of method `prompt`."""

    length: Count = 10
    """Learned prompt positions in each block."""

    blocks: Count | None = None
    """Number of blocks that have them, from the top; default: all."""


class TrainSection(Section):
    """How the trainable parameters are trained."""

    method: Literal["blocks", "full", "lora", "freeze", "moe", "scale", "prompt"] = "blocks"
    """What trains: the new blocks; or, without expansion, every parameter (`full`), low-rank adapters
    (`lora`), some of the base's blocks (`freeze`), a second expert in each feed-forward (`moe`, the paper's
    control), norms, biases and scales (`scale`, LLaMA-Adapter V2), or attention prompts (`prompt`,
    LLaMA-Adapter)."""

    lora: LoraSection = LoraSection()
    """For method `lora`."""

    freeze: FreezeSection = FreezeSection()
    """For method `freeze`."""

    prompt: PromptSection = PromptSection()
    """For method `prompt`."""

    quantise: Literal["none", "8bit", "4bit"] = "none"
    """How the frozen base is held: `8bit` (LLM.int8) or `4bit` (NF4) packs the linear layers of its blocks by
    bitsandbytes; head, embeddings and what trains are not quantised. For `blocks`, `lora` and `prompt`."""

    match_parameters: Count | None = None
    """Trainable parameters to come as near to as possible: decides `lora.rank` or `freeze.blocks`."""

    tokens: Count | None = None
    """Token budget; rounded up to whole steps."""

    epochs: Positive | None = None
    """Instead of `tokens`: passes through the mixture, 0.5 or 3 for instance; rounded up to whole steps. One
    epoch is round(weight × windows) windows of each source, at least one."""

    batch_tokens: Count
    """Tokens in one optimiser step; rounded to whole windows."""

    micro_batch: Count | None = None
    """Windows in one forward pass; default: as many as hold 16,384 tokens. Does not change the result."""

    optimizer: Literal["adamw", "adamw_8bit"] = "adamw"
    """`adamw_8bit` holds AdamW's two moments in 8 bits, by bitsandbytes, but for tensors of less than 4,096
    elements."""

    learning_rate: Positive
    """Peak learning rate."""

    schedule: Literal["cosine", "constant"] = "cosine"
    """Shape after the warm-up."""

    warmup: Share = 0.06
    """Share of the steps over which the learning rate rises from 0."""

    final_learning_rate: Annotated[Real, Field(ge=0, le=1)] = 0.1
    """Where the cosine ends, as a share of the peak."""

    weight_decay: Annotated[Real, Field(ge=0)] = 0.1
    """AdamW decay of matrices; norms and biases have none."""

    betas: Annotated[tuple[Share, Share], BeforeValidator(_sequence)] = (0.9, 0.95)
    """AdamW momenta."""

    clip: Positive | None = 1.0
    """Largest gradient norm over all trainable parameters; null: none."""

    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Compute precision; what trains is fp32 always. `auto`: bf16 on a GPU, fp32 on a CPU."""

    device: str = "auto"
    """`auto`, `cpu`, `cuda`, `cuda:1`, `mps`."""

    recompute: Literal["none", "auto", "full"] = "auto"
    """Activation checkpointing: blocks that compute their forward pass again in the backward pass to save
    memory. `auto`: as few as the memory asks for, frozen ones first. Does not change the result."""

    prefix_cache: Literal["none", "disk"] = "none"
    """`disk`: the blocks below the first that trains run once for each window; what they make of it is kept
    beside the tokenised corpora, for later epochs and later runs. For new blocks near the top, small corpora
    and several epochs. Takes width × 2 (bf16) or 4 bytes a token. Does not change the result."""

    parallel: Literal["auto", "ddp", "fsdp"] = "auto"
    """Under torchrun: `ddp`, the whole model on every device; `fsdp`, every tensor cut over the devices.
    `auto`: `ddp` where weights, gradients and optimiser take at most 60% of a device. Does not change the
    result."""

    compile: bool = False
    """Compile the blocks; slow first step, faster afterwards."""

    seed: Index = 0
    """Seed of the order of the data and of every random draw."""

    evaluate_every: Count | None = None
    """Steps between evaluations of held-out loss; default: a tenth of the run."""

    checkpoint_every: Count | None = None
    """Steps between checkpoints; default: a tenth of the run."""

    log: Annotated[tuple[Literal["tensorboard", "trackio", "wandb"], ...], BeforeValidator(_sequence)] = ()
    """Where metrics are shown besides `metrics.jsonl`; each needs its package installed."""

    keep_checkpoints: Count = 2
    """Checkpoints kept; older ones are removed."""

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.tokens is None) == (self.epochs is None):
            raise ValueError("give either tokens or epochs")
        return self


class EvaluateSection(Section):
    """Texts on which the base and the trained model are compared."""

    general: Annotated[tuple[TextSet, ...], BeforeValidator(_sequence)] = ()
    """What must be kept."""

    domain: Annotated[tuple[TextSet, ...], BeforeValidator(_sequence)] = ()
    """What must be learned."""

    max_tokens: Count = 200_000
    """Tokens read from each text, from its beginning."""

    shift: bool = False
    """Also measure on these texts, token by token, how far the model has moved from its base: rank shift and
    KL divergence. Costs as much as evaluating twice more. Only with method `blocks`."""

    suites: Annotated[tuple[str, ...], BeforeValidator(_sequence)] = ()
    """Benchmarks after training, base and model on the same items: `open-llm`, `code`, `math`, `law`,
    `safety`, or a YAML file of that form."""

    tasks: Annotated[tuple[str, ...], BeforeValidator(_sequence)] = ()
    """Single tasks of lm-evaluation-harness with shots, `arc_challenge:25`, or YAML files describing one."""

    local: str | None = None
    """Directory of local copies of the tasks' datasets; default: the hub, or its cache."""

    limit: Count | None = None
    """Documents taken of each task; default: all."""


class Recipe(Section):
    """A whole run: base → expand → train → evaluate."""

    base: str
    """Checkpoint to start from: a directory or a hub id."""

    output: str
    """Run directory."""

    expand: ExpandSection | None = None
    """New blocks; required by method `blocks`, not allowed with `full`."""

    data: DataSection
    train: TrainSection
    evaluate: EvaluateSection = EvaluateSection()
    merge: bool = False
    """Also write `model/`, an ordinary checkpoint with the trained blocks in it."""

    @field_validator("evaluate")
    @classmethod
    def _holds_the_base(cls, evaluate: EvaluateSection, info: ValidationInfo) -> EvaluateSection:
        train = info.data.get("train")
        if evaluate.shift and train and train.method != "blocks":
            raise ValueError(
                f"shift needs the base inside the trained model, which method {train.method} does not keep"
            )
        return evaluate

    # On the field, not on the whole: so these are reported together with faults elsewhere in the recipe.
    @field_validator("train")
    @classmethod
    def _fits(cls, train: TrainSection, info: ValidationInfo) -> TrainSection:
        expand, data = info.data.get("expand", ...), info.data.get("data")
        faults = []
        if train.method == "blocks" and expand is None:
            faults.append("method blocks needs an expand section (for example expand: {blocks: 8})")
        if train.method != "blocks" and isinstance(expand, ExpandSection):
            faults.append(f"method {train.method} trains on the base itself; remove the expand section")
        faults += _quantisation_faults(train)
        if train.match_parameters and train.method not in ("lora", "freeze"):
            faults.append(f"match_parameters has nothing to choose in method {train.method}")
        if train.prefix_cache != "none" and train.method in ("full", "lora", "moe", "scale"):
            faults.append(f"prefix_cache has nothing to keep: method {train.method} trains in every block")
        if data and train.batch_tokens < data.sequence_length:
            faults.append(
                f"batch_tokens {train.batch_tokens} is less than one window of "
                f"data.sequence_length {data.sequence_length}"
            )
        if faults:
            raise ValueError("; ".join(faults))
        return train

    @field_validator("merge")
    @classmethod
    def _mergeable(cls, merge: bool, info: ValidationInfo) -> bool:
        train = info.data.get("train")
        if merge and train and train.quantise != "none" and train.method == "lora":
            raise ValueError(
                "an adapter is not added to quantised matrices; merge it into the unquantised base with peft"
            )
        return merge


def _quantisation_faults(train: TrainSection) -> list[str]:
    faults = []
    if train.quantise != "none":
        if train.method not in ("blocks", "lora", "prompt"):
            faults.append(
                "quantise is for methods that leave the base as it is (blocks, lora, prompt), "
                f"not for {train.method}"
            )
        if train.parallel == "fsdp":
            faults.append("quantise: packed layers cannot be cut over devices; choose parallel: ddp")
    if train.optimizer == "adamw_8bit" and train.parallel == "fsdp":
        faults.append("optimizer adamw_8bit: its state cannot be cut over devices; choose parallel: ddp")
    return faults
