"""Results of studies: one small record a cell, and the table made of them."""

from typing import Any, Literal

from pydantic import Field

from deepen.records.comparison import Difference
from deepen.records.provenance import Provenance
from deepen.records.record import Record
from deepen.records.results import Metric, Role


class CellRecord(Record):
    """`cell.json`: written last; a cell with it is finished.

    Attributes:
        name: readable; of the cell's directory, with `key`.
        key: digest of `inputs`.
        inputs: everything that decides the result.
        result: what was found, in the form its study gives it.
        code: commit of deepen's own source; None where it is an installed release.
        provenance: of the process that computed it, or ended computing it.
    """

    format_version: Literal[1] = 1
    name: str
    key: str
    inputs: dict[str, Any]
    result: dict[str, Any]
    code: str | None
    provenance: Provenance


class RunFacts(Record):
    """The result of a cell that is one run.

    Attributes:
        method: how the base was adapted.
        layout: of the expanded model in one line; None without new blocks.
        trainable: parameters that trained.
        tokens: trained on.
        steps: of the optimiser.
        seconds: of training.
        flops: executed in training, by the closed form of `deepen.training.flops`; None where not logged.
        metrics: held-out losses in nats per token, with their differences from the base.
        pack: digest of the new blocks it saved; None without any.
        diverged: why training ended early; None as a rule. Then everything else is empty.
    """

    method: str = ""
    layout: str | None = None
    trainable: int = 0
    tokens: int = 0
    steps: int = 0
    seconds: float = 0.0
    flops: float | None = None
    metrics: list[Metric] = Field(default_factory=list)
    pack: str | None = None
    diverged: str | None = None


class RateChoice(Record):
    """How the learning rate of a row in a domain was chosen.

    Attributes:
        row: label of the row.
        domain: label of the domain.
        seed: of the runs that chose.
        texts: names of the held-out texts that chose; none of them is reported.
        losses: peak learning rate -> nats per token on them; None where training diverged.
        chosen: the rate with the lowest loss.
        at_edge: it is the lowest or highest rate tried, so the best may lie beyond.
        cells: directories of the runs, in the order of `losses`, relative to the study's.
    """

    row: str
    domain: str
    seed: int
    texts: list[str]
    losses: dict[str, float | None]
    chosen: float
    at_edge: bool
    cells: list[str]


class StudyScore(Record):
    """Held-out loss of a row in nats per token: all texts of a role as one, the mean over seeds.

    Attributes:
        role: `general` (must be kept) or `domain` (must be learned).
        texts: names of the texts.
        n: items, documents as a rule.
        tokens: predicted tokens.
        value: mean over seeds.
        base_value: of the base.
        delta: value − base_value.
        ci_low: lower end of the 95% interval of `delta` over items, paired, of the mean over seeds.
        ci_high: upper end.
        seed_deltas: `delta` of each seed, in the order of the row's seeds: the spread over seeds.
    """

    role: Role
    texts: list[str]
    n: int
    tokens: int
    value: float
    base_value: float
    delta: float
    ci_low: float | None
    ci_high: float | None
    seed_deltas: list[float]


class StudyRow(Record):
    """One row in one domain: what its finished cells say together.

    Attributes:
        row: label.
        domain: label.
        facts: what makes the row: `blocks` and `placement` of new blocks, for instance.
        method: how the base was adapted.
        layout: in one line; None without new blocks.
        learning_rate: peak, as chosen.
        seeds: of the finished cells.
        missing: seeds without a finished cell.
        diverged: seeds whose training diverged; they are in no mean.
        cells: directories of the finished cells relative to the study's, in the order of `seeds`.
        trainable: parameters that trained.
        tokens: trained on, a cell.
        flops: executed in training, a cell.
        seconds: of training, the median cell.
        general: what was kept; None without general texts.
        domain_score: what was learned.
        curve: (tokens, training loss): the mean over seeds, smoothed.
    """

    row: str
    domain: str
    facts: dict[str, str | int] = Field(default_factory=dict)
    method: str
    layout: str | None
    learning_rate: float
    seeds: list[int]
    missing: list[int] = Field(default_factory=list)
    diverged: list[int] = Field(default_factory=list)
    cells: list[str]
    trainable: int
    tokens: int
    flops: float | None
    seconds: float
    general: StudyScore | None
    domain_score: StudyScore
    curve: list[tuple[float, float]] = Field(default_factory=list)


class StudyPair(Record):
    """Two rows of a domain on the same items, means over the same seeds: `row` less `other`, nats per token.

    Attributes:
        domain: label.
        row: label of the one.
        other: label of the other.
        seeds: that both have.
        learned: difference of domain loss.
        kept: difference of general loss; None without general texts.
    """

    domain: str
    row: str
    other: str
    seeds: list[int]
    learned: Difference
    kept: Difference | None

    def better(self) -> str | None:
        """Return the row that learned more and forgot less, both intervals clear of zero; None: neither."""
        gaps = (self.learned, self.kept)
        if all(gap and gap.ci_high is not None and gap.ci_high < 0 for gap in gaps):
            return self.row
        if all(gap and gap.ci_low is not None and gap.ci_low > 0 for gap in gaps):
            return self.other
        return None


class SwitchErrors(Record):
    """Wrong decisions of a switch: of general text for the new blocks, of domain text for the base.

    Attributes:
        wrong: over all seeds.
        decided: windows decided about, over all seeds.
    """

    wrong: int
    decided: int


class StudySwitch(Record):
    """What a row's cells are with a switch, on the tokens behind the first ones of each window.

    Scores are as in a `StudyRow`, but of other tokens: they stand beside each other, not beside the rows'.

    Attributes:
        row: label, that of `beside` and `+ switch`.
        beside: label of the row whose cells they are.
        domain: label.
        prompt_tokens: first tokens of a window, which decide about it and are not scored.
        seeds: of the finished cells.
        cells: their directories, relative to the study's.
        always_general: with the new blocks always on; None without general texts.
        always_domain: the same of what was learned.
        general: with the switch; None without general texts.
        domain_score: the same of what was learned.
        general_errors: None without general texts.
        domain_errors: of the texts reported.
        cost: FLOPs of a decision over those of the base's own prefill of what is read.
    """

    row: str
    beside: str
    domain: str
    prompt_tokens: int
    seeds: list[int]
    cells: list[str]
    always_general: StudyScore | None
    always_domain: StudyScore
    general: StudyScore | None
    domain_score: StudyScore
    general_errors: SwitchErrors | None
    domain_errors: SwitchErrors
    cost: float


class StudyRecord(Record):
    """`study.json`: the table of a study, of the cells finished so far.

    Attributes:
        kind: `baselines` or `ablation`.
        name: of the study's recipe.
        base: name or path of the base.
        recipe: of the study, as YAML.
        cells: number of cells of the whole study.
        finished: how many of them are.
        waiting: cells not finished, each with the reason.
        matched: parameters that rows of method `lora` and `freeze` were to come near to; None: not asked for.
        rows: row by row within each domain; only rows with a finished cell.
        pairs: every two rows of a domain beside each other.
        switched: rows whose cells measured a switch, with it; in the order of `rows`.
        choices: of learning rates; none where there was one rate only.
        provenance: of the first cell; None without one.
        codes: commits of deepen that computed them.
    """

    format_version: Literal[1] = 1
    kind: Literal["baselines", "ablation"]
    name: str
    base: str
    recipe: str
    cells: int
    finished: int
    waiting: list[str] = Field(default_factory=list)
    matched: int | None = None
    rows: list[StudyRow]
    pairs: list[StudyPair] = Field(default_factory=list)
    switched: list[StudySwitch] = Field(default_factory=list)
    choices: list[RateChoice]
    provenance: Provenance | None
    codes: list[str]


class AnyStudy(Record):
    """What the `study.json` of every study tells.

    Attributes:
        kind: of study, which decides its record.
    """

    kind: str
