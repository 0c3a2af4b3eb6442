from deepen.records.record import Record


class FindingsRecord(Record):
    """`findings.json`: what the checks of a run's texts found.

    Attributes:
        line: all of it in one line; None in a file of an older deepen.
    """

    line: str | None = None
