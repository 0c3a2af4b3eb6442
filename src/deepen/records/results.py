from pathlib import Path
from typing import Literal, Self, TypeVar, get_args

from pydantic import BaseModel, Field, ValidationError, model_validator

from deepen.errors import DataError
from deepen.records.provenance import Provenance
from deepen.records.record import Record
from deepen.records.stop import EarlyStop

Role = Literal["general", "domain"]
"""Of a text or task: it must be kept, or learned."""


class Metric(Record):
    """One figure of the trained model beside the base's on the same items.

    Attributes:
        task: name of the text or task.
        role: `general` (must be kept) or `domain` (must be learned); None where the task stands for neither.
        metric: `nats_per_token`, `bits_per_byte`, or the name of a task's score.
        value: of the model evaluated.
        stderr: standard error of `value` over items.
        n: number of items.
        base_value: of the base; None when no base was evaluated.
        delta: value − base_value, paired by item.
        ci_low: lower end of the 95% interval of `delta`.
        ci_high: upper end.
        higher_is_better: which sign of `delta` is a gain.
        p: two-sided p of `delta` being 0, of this metric alone.
        p_holm: the same, adjusted for the tasks reported together (Holm).
        margin: the loss that `verdict` is about, in the metric's own unit.
        verdict: `kept`: a loss above `margin` is ruled out at 95%; `lost`: it is shown; or neither.
        items_needed: items in all that would likely decide; None where it is decided or cannot be said.
    """

    task: str
    role: Role | None = None
    metric: str
    value: float
    stderr: float | None
    n: int
    base_value: float | None = None
    delta: float | None = None
    ci_low: float | None = None
    ci_high: float | None = None
    higher_is_better: bool = False
    p: float | None = None
    p_holm: float | None = None
    margin: float | None = None
    verdict: Literal["kept", "lost", "not enough items"] | None = None
    items_needed: int | None = None


class Items(Record):
    """Per-item results of one text, as columns of equal length.

    Attributes:
        unit: what one item is; intervals resample these, never tokens.
        tokens: predicted tokens.
        bytes: UTF-8 bytes of the text predicted.
        nll: summed negative log-likelihood in nats under the model.
        base_nll: the same under the base.
    """

    unit: Literal["document", "window"]
    tokens: list[int]
    bytes: list[int]
    nll: list[float]
    base_nll: list[float] | None = None

    @model_validator(mode="after")
    def _equal_lengths(self) -> Self:
        lengths = [len(self.tokens), len(self.bytes), len(self.nll)]
        lengths += [] if self.base_nll is None else [len(self.base_nll)]
        if len(set(lengths)) > 1:
            raise ValueError(f"columns of {', '.join(map(str, lengths))} items")
        return self


class TextResult(Record):
    """The items of one text and the digest of what was read."""

    task: str
    role: Role
    digest: str
    items: Items


class TokenShift(Record):
    """How far the model has moved from its base on one text, token by token.

    Attributes:
        task: name of the text.
        role: `general` or `domain`.
        n: number of items; intervals resample these.
        tokens: predicted tokens.
        unshifted: share of them where the model's most likely token is the base's too.
        marginal: share where it is the base's second or third.
        shifted: share where it is further down. The three add up to 1.
        kl: KL(base ‖ model) over the vocabulary, in nats per token.
        kl_low: lower end of its 95% interval; None with fewer than two items.
        kl_high: upper end.
    """

    task: str
    role: Role
    n: int
    tokens: int
    unshifted: float
    marginal: float
    shifted: float
    kl: float
    kl_low: float | None
    kl_high: float | None


class EvaluationRecord(Record):
    """`evaluation/heldout.json`: held-out loss on every text of a run.

    `evaluation/texts.json` is the same of texts that `deepen evaluate` was given.

    Attributes:
        model: name or path of the model.
        base: the same of the base; empty where none was scored.
        identity: digest of model and base in `texts.json`; with an equal one its texts are not scored again.
        metrics: in both units; p values are adjusted for all texts of the record.
        texts: the items behind them.
        shift: empty where the recipe does not ask for it.
        provenance: of this evaluation.
    """

    format_version: Literal[1] = 1
    model: str
    base: str
    identity: str | None = None
    metrics: list[Metric]
    texts: list[TextResult]
    shift: list[TokenShift] = Field(default_factory=list)
    provenance: Provenance


class Parameters(Record):
    """Numbers of parameters; `trainable` is null before a run whose adapters only the built model tells."""

    base: int
    new: int
    trainable: int | None


class IdentityResult(Record):
    """Was the expanded model the base before training?

    Attributes:
        identical: every check was equal to the bit.
        max_abs_difference: largest difference of any logit.
        checks: what was compared, e.g. `float32, cached`.
    """

    identical: bool
    max_abs_difference: float
    checks: list[str]


class AuditResult(Record):
    """Are the base's tensors after training the bytes of the base checkpoint?

    Attributes:
        unchanged: `after` equals `before`.
        tensors: number of base tensors hashed.
        before: digest over all bytes of the base's files.
        after: digest over all bytes of the base's tensors in the trained model.
    """

    unchanged: bool
    tensors: int
    before: str
    after: str


class QuantisedLoss(Record):
    """Loss of one text in nats per token, with the base as it was in training and in full precision.

    Attributes:
        task: name of the text.
        role: `general` (must be kept) or `domain` (must be learned).
        base: of the base in full precision.
        base_quantised: of the base as it was in training; minus `base`: what quantising cost.
        trained: of what was trained, on the base in full precision.
        trained_quantised: of what was trained, on the base as it was in training.
    """

    task: str
    role: Role
    base: float
    base_quantised: float
    trained: float
    trained_quantised: float


class QuantisationResult(Record):
    """How the frozen base was held in training, and what that cost.

    With one, `identity` compares with the quantised base, and `audit` hashes against the base's files only
    what was not quantised; the quantised layers are hashed here.

    Attributes:
        bits: of each weight of a quantised layer.
        layers: number of quantised layers.
        unchanged: `after` equals `before`.
        before: digest over all bytes of the quantised layers (codes, scales, biases) before training.
        after: the same after training.
        losses: of each evaluation text; empty where there was none, or as `unmeasured` says.
        unmeasured: why the base in full precision was not scored.
    """

    bits: Literal[4, 8]
    layers: int
    unchanged: bool
    before: str
    after: str
    losses: list[QuantisedLoss]
    unmeasured: str | None = None


class RunResult(Record):
    """`result.json`: written last; a run directory with it is finished.

    Attributes:
        stage: `train` on texts, or `sft` on conversations.
        method: what trained; of conversations, `trainable` in words of methods.
        template: chat template of the conversations.
    """

    format_version: Literal[1] = 1
    stage: Literal["train", "sft"] = "train"
    method: str
    base: str
    layout: str | None
    parameters: Parameters
    steps: int
    tokens: int
    seconds: float
    identity: IdentityResult | None
    audit: AuditResult | None
    quantisation: QuantisationResult | None = None
    template: str | None = None
    stopped: EarlyStop | None = None
    outputs: list[str]


_R = TypeVar("_R", bound=BaseModel)


def read_record(path: Path, kind: type[_R]) -> _R:
    """Read a record of the given kind.

    Raises:
        DataError: the file is missing, of another format version, or not such a record.
    """
    try:
        return kind.model_validate_json(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    except ValidationError as error:
        raise DataError(f"{path}: {_fault(error, kind)}") from None


def read_result(run: Path) -> RunResult:
    """Read the result of a finished run.

    Raises:
        DataError: there is no such directory, it holds no finished run, or the record is malformed.
    """
    path = run / "result.json"
    if not run.is_dir():
        found = "is not a directory" if run.exists() else "no such directory"
        raise DataError(f"{run}: {found}; give the directory of a finished run")
    if (run / "cells").is_dir():
        raise DataError(
            f"{run}: holds a study; its runs lie in {run / 'cells'}, and its own table and page are written "
            "when deepen study ends, or is stopped by Ctrl-C"
        )
    if not path.exists():
        raise DataError(
            f"{run}: holds no finished run (no result.json); finish it with deepen run … --resume"
        )
    return read_record(path, RunResult)


def _fault(error: ValidationError, kind: type[BaseModel]) -> str:
    first = error.errors()[0]
    where = ".".join(map(str, first["loc"])) or "record"
    if where == "format_version":
        reads = ", ".join(map(str, get_args(kind.model_fields["format_version"].annotation)))
        return (
            f"format_version is {first['input']!r}, this deepen reads {reads}; use the deepen that wrote it"
        )
    return f"not a {kind.__name__}: {where}: {first['msg']}"
