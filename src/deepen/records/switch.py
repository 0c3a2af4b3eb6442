"""A fitted switch, and what a switch costs and brings on held-out texts."""

from typing import Literal

from pydantic import Field

from deepen.records.provenance import Provenance
from deepen.records.record import Record
from deepen.records.results import Metric, TextResult


class SwitchPack(Record):
    """A pack that a switch decides on.

    Attributes:
        name: what it is attached as.
        path: its directory, from that of the switch, or its hub id.
        digest: SHA-256 of its `blocks.safetensors`.
    """

    name: str
    path: str
    digest: str


class SwitchTally(Record):
    """What a switch decided on texts of one kind.

    Attributes:
        text: `general`, the name of a pack, or that of a text.
        prompts: number of prompts.
        answered: `base` or name of a pack -> prompts it was decided for.
        wrong: prompts that were decided otherwise than they should.
    """

    text: str
    prompts: int
    answered: dict[str, int]
    wrong: int


class SwitchRecord(Record):
    """`switch.json`: a fitted switch.

    Attributes:
        kind: `likelihood`, or `classifier`, whose weights are in `switch.safetensors`.
        base: the base, as it was named.
        fingerprint: fast, of the base.
        packs: those that compete.
        prompt_tokens: how many of a prompt's first tokens are read.
        threshold: what a pack's advantage must exceed.
        unit: of advantage and threshold.
        false_positives: share of general prompts that the threshold was calibrated for; None: it was not.
        fitted: text -> prompts that weights were fitted on.
        calibrated: general prompts that the threshold was calibrated on.
        held_out: decisions on prompts that neither was done on.
        provenance: versions, hardware, digests of the texts.
    """

    format_version: Literal[1] = 1
    kind: Literal["likelihood", "classifier"]
    base: str
    fingerprint: str
    packs: list[SwitchPack]
    prompt_tokens: int
    threshold: float
    unit: str
    false_positives: float | None
    fitted: dict[str, int]
    calibrated: int
    held_out: list[SwitchTally]
    provenance: Provenance


class SwitchRow(Record):
    """Losses of the model that is always one thing, or switched, on the tokens after each prompt.

    Attributes:
        answers: `switch`, or the name of the pack that is always on.
        metrics: nats per token of each text beside the base's.
        texts: the items behind them, without bytes.
    """

    answers: str
    metrics: list[Metric]
    texts: list[TextResult] = Field(default_factory=list)


class SwitchCost(Record):
    """What deciding adds to a prompt, counted and not timed.

    Attributes:
        tokens: mean over prompts, of what is passed forward to decide: each token once a pass.
        flops: the same in FLOPs forward.
        prefill_flops: of one prompt's own prefill by the base, of as many tokens as are read.
    """

    tokens: float
    flops: float
    prefill_flops: float


class SwitchEvaluation(Record):
    """`switch.json` beside `texts.json`: a switch on held-out texts.

    Attributes:
        model: as in an evaluation record.
        base: as there.
        switch: `auto`, or the directory it was read from.
        kind: of its decider.
        threshold: what an advantage must exceed.
        unit: of advantage and threshold.
        prompt_tokens: of each window, read for the decision and not scored.
        unscored: windows that were left out, by text: they have nothing after their prompt.
        tallies: decisions of each text; wrong is a pack on general text, and the base on domain text.
        rows: each pack always on, and last the switch.
        cost: of a decision.
        provenance: of this evaluation.
    """

    format_version: Literal[1] = 1
    model: str
    base: str
    switch: str
    kind: str
    threshold: float
    unit: str
    prompt_tokens: int
    unscored: dict[str, int]
    tallies: list[SwitchTally]
    rows: list[SwitchRow]
    cost: SwitchCost
    provenance: Provenance
