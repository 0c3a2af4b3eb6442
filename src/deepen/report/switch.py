"""What a switch loses and keeps on the texts it was measured on, as lines of a table."""

from dataclasses import dataclass

from deepen.records import Metric, SwitchEvaluation


@dataclass(frozen=True, kw_only=True)
class SwitchLine:
    """One text, answered in one way.

    Attributes:
        answers: what answers, in words.
        metric: nats per token behind the prompts, beside the base's.
        decided: for whom the switch decided how often; empty but for the switch.
        wrong: how many decisions were wrong, of how many; empty but for the switch.
    """

    answers: str
    metric: Metric
    decided: str = ""
    wrong: str = ""


def describe_switch(record: SwitchEvaluation) -> list[SwitchLine]:
    """Return the lines of each text, domain texts first: each pack always on, then the switch."""
    tallies = {tally.text: tally for tally in record.tallies}
    lines = []
    for row in record.rows:
        for metric in row.metrics:
            tally = tallies[metric.task]
            if row.answers != "switch":
                lines.append(SwitchLine(answers=f"{row.answers} always", metric=metric))
                continue
            decided = ", ".join(f"{name} {count:,}" for name, count in tally.answered.items())
            wrong = f"{tally.wrong:,} of {tally.prompts:,}"
            lines.append(SwitchLine(answers="switch", metric=metric, decided=decided, wrong=wrong))
    order = list(tallies)
    return sorted(lines, key=lambda each: (each.metric.role == "general", order.index(each.metric.task)))
