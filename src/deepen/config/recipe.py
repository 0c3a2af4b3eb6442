"""What a recipe can say. The docstring under a field states its unit and scope."""

from typing import Annotated, Any, Final, Literal, Self

from pydantic import (
    BeforeValidator,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from deepen.config.section import Count, Section, as_tuple
from deepen.config.sft import SftSection
from deepen.config.texts import DataSection, TextSet
from deepen.config.training import TrainSection
from deepen.errors import RecipeError

# What tuning takes over from training where it says nothing itself.
_SHARED: Final = (
    *(
        "optimizer",
        "betas",
        "clip",
        "precision",
        "device",
        "quantise",
        "loss",
        "recompute",
        "parallel",
        "compile",
        "seed",
    ),
    *("log", "keep_checkpoints"),
)
_TRAINING: Final = ("data", "train")


Placement = Literal["interleaved", "suffix", "prefix", "importance"]
Zero = Literal["writes", "reads", "norms"]


class ExpandSection(Section):
    """Which new blocks are added, and where."""

    blocks: Count | None = None
    """Number of new blocks."""

    placement: Placement = "interleaved"
    """`interleaved` (the paper), `suffix` (all at the top), `prefix` (all at the bottom), or `importance`: on
    the base blocks that general ability needs least, as `deepen inspect` has measured."""

    importance: str | None = None
    """The record that `deepen inspect BASE --out FILE` wrote, for `importance`."""

    groups: Count | None = None
    """Number of groups for `interleaved`; default: one new block a group."""

    after: Annotated[tuple[int, ...], BeforeValidator(as_tuple)] | None = None
    """Explicit base blocks to stand on (-1: the bottom) instead of a placement."""

    init: Literal["copy", "average", "transport"] = "copy"
    """What a new block is before its residual writes are zeroed: a `copy` of the block it stands on (the
    paper), the `average` of that block and the one above it, or their average once the neurons and heads of
    the upper one were matched with those of the lower one by optimal `transport` (OpT-DeUS). See
    [where a new block begins](drift.md#where-a-new-block-begins)."""

    zero: Zero = "writes"
    """What of a new block is zero, so that it adds nothing: what it `writes` (o_proj and down_proj: the
    paper), what it `reads` to write it (v_proj and up_proj), or the `norms` before both (Shen et al. 2022;
    half of the block never learns then). The latter two are for families in which they are known to be exact.
    See [what of it is zero](drift.md#what-of-it-is-zero)."""

    @model_validator(mode="after")
    def _some(self) -> Self:
        if self.blocks is None and self.after is None:
            raise ValueError("give blocks or after")
        if (self.placement == "importance") != (self.importance is not None):
            raise ValueError(
                "placement importance needs a record, importance: FILE, and nothing else does; "
                "write one with deepen inspect BASE --out FILE"
            )
        if self.placement == "importance" and self.blocks is None:
            raise ValueError("placement importance chooses what new blocks stand on: give blocks, not after")
        return self


class SwitchSection(Section):
    """A switch by likelihood: the beginning of each window decides whether the new blocks take part in it.

    Nothing is fitted: they do where they make the beginning likelier than the base does.
    """

    prompt_tokens: Annotated[Count, Field(ge=2)] = 64
    """So many first tokens of a window decide; those behind them are scored."""


class EvaluateSection(Section):
    """Texts on which the base and the trained model are compared."""

    general: Annotated[tuple[TextSet, ...], BeforeValidator(as_tuple)] = ()
    """What must be kept."""

    domain: Annotated[tuple[TextSet, ...], BeforeValidator(as_tuple)] = ()
    """What must be learned."""

    max_tokens: Count = 200_000
    """Tokens read from each text, from its beginning."""

    shift: bool = False
    """Also measure on these texts, token by token, how far the model has moved from its base: rank shift and
    KL divergence. Costs as much as evaluating twice more. Only with method `blocks`."""

    effects: bool = False
    """Also measure on the first 20,000 tokens of each of these texts what each new block does: how much it
    writes, which predictions it changes, at which tokens. Only with method `blocks`."""

    switch: SwitchSection | None = None
    """Also measure on these texts what a [switch](switch.md) loses and keeps, how often it errs, and what it
    costs. Costs as much as evaluating twice more. Only with method `blocks`."""

    suites: Annotated[tuple[str, ...], BeforeValidator(as_tuple)] = ()
    """Benchmarks after training, base and model on the same items: `open-llm`, `code`, `math`, `law`,
    `safety`, or a YAML file of that form."""

    tasks: Annotated[tuple[str, ...], BeforeValidator(as_tuple)] = ()
    """Single tasks of lm-evaluation-harness with shots, `arc_challenge:25`, or YAML files describing one."""

    local: str | None = None
    """Directory of local copies of the tasks' datasets; default: the hub, or its cache."""

    limit: Count | None = None
    """Documents taken of each task; default: all."""

    allow_unprotected: str = ""
    """Model-written programs run in a sandbox only; where the kernel offers none, the sentence that the
    refusal shows, word for word, has them run all the same."""


class Recipe(Section):
    """A whole run: base → expand → train → tune → evaluate. Training or tuning may be left out."""

    base: str
    """Checkpoint to start from: a directory or a hub id."""

    output: str
    """Run directory."""

    expand: ExpandSection | None = None
    """New blocks; required by method `blocks`, not allowed with `full`."""

    pack: str | None = None
    """For tuning alone: a block pack of the base, a directory or a hub id, that is put on it first."""

    data: DataSection | None
    """Required by `train`. For tuning alone its held-out documents are evaluated."""

    train: TrainSection | None
    """Training on texts; may be left out of a recipe that tunes on conversations."""

    sft: SftSection | None = None
    """Tuning on conversations, after training where there is any: then a run of its own in `sft/` of the run
    directory, which begins with the pack that training left."""

    evaluate: EvaluateSection = Field(default=EvaluateSection(), validate_default=True)
    merge: bool = False
    """Also write `model/`, an ordinary checkpoint with the trained blocks in it."""

    def training(self) -> tuple[DataSection, TrainSection]:
        """Return the two sections of training on texts.

        Raises:
            RecipeError: there are none.
        """
        if self.data is None or self.train is None:
            raise RecipeError("train: the recipe has no such section, it only tunes on conversations (sft)")
        return self.data, self.train

    @model_validator(mode="before")
    @classmethod
    def _stages(cls, raw: Any) -> Any:
        """Let `sft` stand without training, or take over from it what it does not say itself."""
        if not isinstance(raw, dict):
            return raw
        sft, train = raw.get("sft"), raw.get("train")
        if sft is None:
            return {key: value for key, value in raw.items() if value is not None or key not in _TRAINING}
        if isinstance(sft, dict) and isinstance(train, dict):
            sft = {key: train[key] for key in _SHARED if key in train} | sft
        return {**dict.fromkeys(_TRAINING), **raw, "sft": sft}

    # On the field, not on the whole: so these are reported together with faults elsewhere in the recipe.
    @field_validator("train")
    @classmethod
    def _fits(cls, train: TrainSection | None, info: ValidationInfo) -> TrainSection | None:
        if train is None:
            return None
        expand, data = info.data.get("expand", ...), info.data.get("data", ...)
        faults = []
        if train.method == "blocks" and expand is None:
            faults.append("method blocks needs an expand section (for example expand: {blocks: 8})")
        if train.method != "blocks" and isinstance(expand, ExpandSection):
            faults.append(f"method {train.method} trains on the base itself; remove the expand section")
        faults += _row_faults(train)
        faults += _quantisation_faults(train, expand if isinstance(expand, ExpandSection) else None)
        faults += _drift_faults(train, data if isinstance(data, DataSection) else None)
        if train.match_parameters and train.method not in ("lora", "freeze"):
            faults.append(f"match_parameters has nothing to choose in method {train.method}")
        if train.match_parameters and train.lora.modules_to_save:
            faults.append("match_parameters counts adapters alone; remove lora.modules_to_save")
        if train.prefix_cache != "none" and train.method in ("full", "lora", "moe", "scale"):
            faults.append(f"prefix_cache has nothing to keep: method {train.method} trains in every block")
        if data is None:
            faults.append("needs a data section, the texts to train on")
        if isinstance(data, DataSection) and train.batch_tokens < data.sequence_length:
            faults.append(
                f"batch_tokens {train.batch_tokens} is less than one window of "
                f"data.sequence_length {data.sequence_length}"
            )
        if info.data.get("pack") is not None:
            faults.append("pack is for tuning alone (sft without train); remove one of the two")
        if faults:
            raise ValueError("; ".join(faults))
        return train

    @field_validator("sft")
    @classmethod
    def _tunable(cls, sft: SftSection | None, info: ValidationInfo) -> SftSection | None:
        if sft is None:
            return None
        train, expand, pack = (info.data.get(key) for key in ("train", "expand", "pack"))
        faults = []
        if train and train.method != "blocks":
            faults.append(
                f"follows method blocks only, not {train.method}: tune what that saves by a recipe of its own"
            )
        if expand and pack:
            faults.append("begins with the blocks of expand or of pack, not both")
        if not train and sft.trainable == "new" and not (expand or pack):
            faults.append("trainable new needs new blocks: give expand or pack")
        if not train and sft.trainable == "lora" and expand:
            faults.append("trainable lora is for blocks that are trained: give their pack instead of expand")
        if sft.quantise != "none" and sft.trainable == "all":
            faults.append(
                "quantise is for what leaves the base as it is (trainable new or lora), and all changes it; "
                "say quantise: none"
            )
        faults += _sharding_faults(sft)
        if faults:
            raise ValueError("; ".join(faults))
        return sft

    @field_validator("evaluate")
    @classmethod
    def _holds_the_base(cls, evaluate: EvaluateSection, info: ValidationInfo) -> EvaluateSection:
        train, sft = info.data.get("train"), info.data.get("sft")
        method = f"method {train.method}" if train and train.method != "blocks" else None
        if not train and sft and sft.trainable != "new":
            method = f"trainable {sft.trainable}"
        if evaluate.shift and method:
            kind = "trained" if train else "tuned"
            raise ValueError(f"shift needs the base inside the {kind} model, which {method} does not keep")
        if evaluate.effects and method:
            raise ValueError(f"effects is about new blocks that train, which {method} does not have")
        if evaluate.switch:
            _check_switch(evaluate, evaluate.switch, info.data.get("data"), method)
        if train and train.max_general_loss is not None and not evaluate.general:
            raise ValueError("general: missing; train.max_general_loss is about its texts")
        return evaluate

    @field_validator("merge")
    @classmethod
    def _mergeable(cls, merge: bool, info: ValidationInfo) -> bool:
        train, sft = info.data.get("train"), info.data.get("sft")
        adapted = train and train.quantise != "none" and train.method == "lora"
        if merge and (adapted or (sft and sft.quantise != "none" and sft.trainable == "lora")):
            raise ValueError(
                "an adapter is not added to quantised matrices; merge it into the unquantised base with peft"
            )
        return merge


def _check_switch(
    evaluate: EvaluateSection, switch: SwitchSection, data: DataSection | None, method: str | None
) -> None:
    if method:
        raise ValueError(f"switch is about new blocks that can be left out, which {method} does not have")
    if not (evaluate.general or evaluate.domain or (data and data.heldout)):
        raise ValueError("switch: no text to decide on; give general and domain")
    if data and switch.prompt_tokens > data.sequence_length:
        raise ValueError(
            f"switch.prompt_tokens: {switch.prompt_tokens} leaves nothing to score of a window of "
            f"data.sequence_length {data.sequence_length}"
        )


def _drift_faults(train: TrainSection, data: DataSection | None) -> list[str]:
    faults = []
    general = train.anchor is not None and train.anchor.source == "general"
    if data and general and not data.anchor:
        faults.append("anchor: source general needs texts; give them in data.anchor, or say source: self")
    if data and data.anchor and not general:
        faults.append("data.anchor is not read; say train.anchor: {source: general}, or remove it")
    if train.copies_base and train.parallel == "fsdp":
        faults.append(
            f"anchor: the copy of the base that method {train.method} needs cannot be cut over devices; "
            "choose parallel: ddp"
        )
    if train.unit_rates and not train.anchor:
        faults.append("unit_rates needs general text, which is the anchor's: give train.anchor")
    if train.unit_rates and train.parallel == "fsdp":
        faults.append("unit_rates: the units of what is cut over devices are not known; choose parallel: ddp")
    if train.teacher and train.parallel == "fsdp":
        faults.append("teacher: its model cannot be cut over devices; choose parallel: ddp")
    if train.teacher and train.loss == "liger":
        faults.append("teacher: loss liger knows no other model's predictions; choose loss: parts")
    if train.drift_penalty and train.method != "blocks":
        faults.append(f"drift_penalty is about new blocks, which method {train.method} does not add")
    if train.drift_penalty and train.prefix_cache != "none":
        faults.append("drift_penalty needs what enters the new blocks; set prefix_cache to none")
    return faults


def _row_faults(train: TrainSection) -> list[str]:
    faults = []
    if train.new_rows and train.method != "blocks":
        faults.append(f"new_rows is for method blocks, not {train.method}; method rows trains rows alone")
    if train.new_rows and train.prefix_cache != "none":
        faults.append("prefix_cache has nothing to keep: new_rows trains in the embeddings")
    if (train.new_rows or train.method == "rows") and train.parallel == "fsdp":
        what = "new_rows" if train.new_rows else "method rows"
        faults.append(f"{what}: tables cannot be cut over devices; choose parallel: ddp")
    return faults


def _quantisation_faults(train: TrainSection, expand: ExpandSection | None) -> list[str]:
    faults = []
    if train.quantise != "none":
        if expand and expand.init != "copy":
            faults.append(f"quantise: new blocks are copies then; expand.init {expand.init} needs none")
        if train.method not in ("blocks", "lora", "prompt"):
            faults.append(
                "quantise is for methods that leave the base as it is (blocks, lora, prompt), "
                f"not for {train.method}"
            )
    return faults + _sharding_faults(train)


def _sharding_faults(section: TrainSection | SftSection) -> list[str]:
    if section.parallel != "fsdp":
        return []
    faults = []
    if section.quantise != "none":
        faults.append("quantise: packed layers cannot be cut over devices; choose parallel: ddp")
    if section.optimizer == "adamw_8bit":
        faults.append("optimizer adamw_8bit: its state cannot be cut over devices; choose parallel: ddp")
    if section.lora.modules_to_save:
        faults.append("lora.modules_to_save: cannot be cut over devices; choose parallel: ddp")
    return faults
