"""What trains, and how."""

from typing import Annotated, Any, Literal, Self

from pydantic import (
    BeforeValidator,
    Field,
    model_validator,
)

from deepen.config.drift import AnchorSection, UnitRatesSection, with_preset
from deepen.config.section import Count, Index, Positive, Real, Section, Share, as_tuple
from deepen.config.teacher import Teacher

Method = Literal["blocks", "full", "lora", "freeze", "moe", "scale", "prompt", "rows"]


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

    modules_to_save: Annotated[tuple[str, ...], BeforeValidator(as_tuple)] = ()
    """Modules that train whole beside the adapter and are saved with it, by the ends of their names. For an
    extended vocabulary `[embed_tokens, lm_head]`, as Chinese-LLaMA-Alpaca does; their old rows move too."""


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


class LoopSection(Section):
    """How the loop trains, whatever it trains and on whatever."""

    micro_batch: Count | None = None
    """Windows in one forward pass; default: as many as hold 16,384 tokens. Does not change the result."""

    optimizer: Literal["adamw", "adamw_8bit"] = "adamw"
    """`adamw_8bit` holds AdamW's two moments in 8 bits, by bitsandbytes, but for tensors of less than 4,096
    elements."""

    schedule: Literal["cosine", "constant"] = "cosine"
    """Shape after the warm-up."""

    final_learning_rate: Annotated[Real, Field(ge=0, le=1)] = 0.1
    """Where the cosine ends, as a share of the peak."""

    weight_decay: Annotated[Real, Field(ge=0)] = 0.1
    """AdamW decay of matrices; norms and biases have none."""

    betas: Annotated[tuple[Share, Share], BeforeValidator(as_tuple)] = (0.9, 0.95)
    """AdamW momenta."""

    clip: Positive | None = 1.0
    """Largest gradient norm over all trainable parameters; null: none."""

    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Compute precision; what trains is fp32 always. `auto`: bf16 on a GPU, fp32 on a CPU."""

    device: str = "auto"
    """`auto`, `cpu`, `cuda`, `cuda:1`, `mps`."""

    quantise: Literal["none", "8bit", "4bit"] = "none"
    """How the frozen base is held: `8bit` (LLM.int8) or `4bit` (NF4) packs the linear layers of its blocks by
    bitsandbytes; head, embeddings and what trains are not quantised. For methods `blocks`, `lora` and
    `prompt`, and for tuning `new` blocks or `lora`."""

    loss: Literal["parts", "liger"] = "parts"
    """Cross-entropy without the logits of a whole batch in memory: in `parts`, by PyTorch alone; or by the
    fused kernel of liger-kernel, on a GPU, which is tried beside the other before training and refused where
    it gives anything else."""

    recompute: Literal["none", "auto", "full"] = "auto"
    """Activation checkpointing: blocks that compute their forward pass again in the backward pass to save
    memory. `auto`: as few as the memory asks for, frozen ones first. Does not change the result."""

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

    log: Annotated[tuple[Literal["tensorboard", "trackio", "wandb"], ...], BeforeValidator(as_tuple)] = ()
    """Where metrics are shown besides `metrics.jsonl`; each needs its package installed."""

    keep_checkpoints: Count = 2
    """Checkpoints kept; older ones are removed."""


class TrainSection(LoopSection):
    """How the trainable parameters are trained."""

    preset: Literal["paper", "balanced", "keep"] | None = None
    """Defaults for keys that the recipe does not give: `paper`, LLaMA Pro's; `balanced`, an anchor; `keep`,
    a stronger one. See [what holds the model to its base](drift.md)."""

    method: Method = "blocks"
    """What trains: the new blocks; or, without expansion, every parameter (`full`), low-rank adapters
    (`lora`), some of the base's blocks (`freeze`), a second expert in each feed-forward (`moe`, the paper's
    control), norms, biases and scales (`scale`, LLaMA-Adapter V2), attention prompts (`prompt`,
    LLaMA-Adapter), or the new rows of an extended vocabulary (`rows`, Chinese-LLaMA's first stage)."""

    new_rows: bool = False
    """For method `blocks` on a base with an extended vocabulary: the rows of its new tokens, in embeddings
    and head, train beside the new blocks. Old rows keep their bytes; the block pack holds the new ones."""

    lora: LoraSection = LoraSection()
    """For method `lora`."""

    freeze: FreezeSection = FreezeSection()
    """For method `freeze`."""

    prompt: PromptSection = PromptSection()
    """For method `prompt`."""

    match_parameters: Count | None = None
    """Trainable parameters to come as near to as possible: decides `lora.rank` or `freeze.blocks`."""

    tokens: Count | None = None
    """Token budget; rounded up to whole steps."""

    epochs: Positive | None = None
    """Instead of `tokens`: passes through the mixture, 0.5 or 3 for instance; rounded up to whole steps. One
    epoch is round(weight × windows) windows of each source, at least one."""

    batch_tokens: Count
    """Tokens in one optimiser step; rounded to whole windows."""

    learning_rate: Positive
    """Peak learning rate."""

    warmup: Share = 0.06
    """Share of the steps over which the learning rate rises from 0."""

    prefix_cache: Literal["none", "disk"] = "none"
    """`disk`: the blocks below the first that trains run once for each window; what they make of it is kept
    beside the tokenised corpora, for later epochs and later runs. For new blocks near the top, small corpora
    and several epochs. Takes width × 2 (bf16) or 4 bytes a token. Does not change the result."""

    anchor: AnchorSection | None = None
    """Hold the model to its base on further windows beside each step's; null: nothing does."""

    teacher: Teacher | None = None
    """Learn the predictions of another model instead of the text's own words, an expanded model into the
    base's size for instance; null: the words. See [distilling](distill.md)."""

    drift_penalty: Positive | None = None
    """Weight of what the new blocks add to the residual stream, ‖block(x) − x‖² / ‖x‖², its mean over new
    blocks and tokens; null: none. Only with method `blocks`."""

    unit_rates: UnitRatesSection | None = None
    """Let what general text needs move less: tensors or rows with learning rates of their own, measured again
    and again; null: one rate for all."""

    max_general_loss: Positive | None = None
    """Training ends at an evaluation where a general text's loss exceeds the base's by more than this, in
    nats per token; the weights of the last evaluation before it are the result. null: it does not."""

    @property
    def copies_base(self) -> bool:
        """Whether the anchor needs a copy of the base: the method does not leave it inside the model."""
        return self.anchor is not None and self.method not in ("blocks", "lora")

    def measured_share(self, windows: int) -> float:
        """Return the windows that `unit_rates` reads beside each of a step of so many, in the mean."""
        rates = self.unit_rates
        return 2 * rates.windows / (rates.every * windows) if rates else 0.0

    @property
    def held_beside(self) -> bool:
        """Whether a further whole model lies beside the one that trains: the base's copy, or a teacher."""
        return self.copies_base or self.teacher is not None

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, given: Any) -> Any:
        return with_preset(given)

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.tokens is None) == (self.epochs is None):
            raise ValueError("give either tokens or epochs")
        return self
