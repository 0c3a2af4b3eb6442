"""What the checks of a run's texts found, as a report."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

from deepen.data.corpus import Corpus
from deepen.data.duplicates import Signatures, find_duplicates, similarity_of
from deepen.data.scan import Scan
from deepen.data.tokens import decode
from deepen.data.words import EvaluationRuns

Action = Literal["drop", "report"]

_MOST_EXAMPLES: Final = 20
_SHOWN_TOKENS: Final = 40


@dataclass(frozen=True, kw_only=True)
class Checks:
    """What is looked for.

    Attributes:
        ngram: words in a run shared with an evaluation text; None: not looked for.
        overlap: what becomes of documents that share one.
        similarity: of near-duplicates; None: not looked for.
        duplicates: what becomes of them.
    """

    ngram: int | None
    overlap: Action
    similarity: float | None
    duplicates: Action


@dataclass(frozen=True, kw_only=True)
class Amount:
    """So many documents, their tokens and their bytes of text."""

    documents: int
    tokens: int
    bytes: int


@dataclass(frozen=True, kw_only=True)
class SourceFindings:
    """What was found in one source.

    Attributes:
        name: its label.
        all: its training documents.
        overlapping: those that share a run of words with an evaluation text.
        by_text: evaluation text -> documents that share a run with it (the first found counts).
        duplicates: those that nearly repeat an earlier document, of this source or one before it.
        dropped: those left out of training.
    """

    name: str
    all: Amount
    overlapping: Amount
    by_text: dict[str, int]
    duplicates: Amount
    dropped: Amount


@dataclass(frozen=True, kw_only=True)
class TextFindings:
    """One evaluation text as it was looked for: its documents, words, and documents too short to look for."""

    name: str
    documents: int
    words: int
    unchecked: int


@dataclass(frozen=True, kw_only=True)
class OverlapExample:
    """A training document (numbered in its source) that shares words with an evaluation text.

    `share` is the share of the document's words at which a shared run begins.
    """

    source: str
    document: int
    text: str
    words: str
    share: float


@dataclass(frozen=True, kw_only=True)
class DuplicateExample:
    """A training document, the earlier one that it repeats, and how similar their words are."""

    source: str
    document: int
    of_source: str
    of_document: int
    similarity: float
    beginning: str


@dataclass(frozen=True, kw_only=True)
class Findings:
    """The whole report.

    Attributes:
        ngram: words in a shared run; None: not looked for.
        overlap_action: `drop` or `report`.
        similarity: of duplicates; None: not looked for.
        duplicates_action: `drop` or `report`.
        evaluation: the texts looked for, the sources' held-out documents among them.
        sources: what was found in each.
        overlaps: examples.
        repeats: examples.
    """

    ngram: int | None
    overlap_action: str
    similarity: float | None
    duplicates_action: str
    evaluation: list[TextFindings]
    sources: list[SourceFindings]
    overlaps: list[OverlapExample]
    repeats: list[DuplicateExample]

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Findings":
        """Read what `to_json` gave."""
        amounts = ("all", "overlapping", "duplicates", "dropped")
        sources = [
            SourceFindings(**source | {name: Amount(**source[name]) for name in amounts})
            for source in content["sources"]
        ]
        return cls(
            **content
            | {
                "evaluation": [TextFindings(**text) for text in content["evaluation"]],
                "sources": sources,
                "overlaps": [OverlapExample(**example) for example in content["overlaps"]],
                "repeats": [DuplicateExample(**example) for example in content["repeats"]],
            }
        )

    def line(self) -> str:
        """Say it in one line."""
        total, said = sum(source.all.documents for source in self.sources), []
        if self.ngram is not None:
            found = sum(source.overlapping.documents for source in self.sources)
            said.append(
                f"{found:,} share {self.ngram} words with an evaluation text ({_done(self.overlap_action)})"
            )
        if self.similarity is not None:
            found = sum(source.duplicates.documents for source in self.sources)
            said.append(
                f"{found:,} repeat an earlier one by {self.similarity:.0%} ({_done(self.duplicates_action)})"
            )
        return f"of {total:,} training documents {' and '.join(said)}"


def describe(
    corpora: Sequence[tuple[str, Corpus]],
    scans: Sequence[Scan],
    runs: EvaluationRuns | None,
    signatures: Signatures | None,
    checks: Checks,
    tokenizer: Any,
) -> tuple[Findings, list[npt.NDArray[np.bool_]]]:
    """Decide what is dropped; return the report and the documents dropped of each corpus."""
    overlaps = [scan.shared > 0 for scan in scans]
    sizes = [np.diff(corpus.document_ends, prepend=0) for _, corpus in corpora]
    edges = np.cumsum([0, *(len(scan.words) for scan in scans)])
    first = np.arange(edges[-1])
    if signatures is not None and checks.similarity is not None:
        first = find_duplicates(signatures, checks.similarity)
    repeats = np.split(first != np.arange(len(first)), edges[1:-1])
    names = runs.names if runs else []
    sources, dropped = [], []
    for (label, _), scan, size, overlap, repeat in zip(corpora, scans, sizes, overlaps, repeats, strict=True):
        flags = np.zeros(len(scan.words), dtype=np.bool_)
        for found, action in ((overlap, checks.overlap), (repeat, checks.duplicates)):
            flags |= found & (action == "drop")
        dropped.append(flags)
        counted = np.bincount(scan.text[overlap], minlength=len(names))
        sources.append(
            SourceFindings(
                name=label,
                all=_amount(np.ones_like(flags), size, scan),
                overlapping=_amount(overlap, size, scan),
                by_text={name: int(n) for name, n in zip(names, counted, strict=False) if n},
                duplicates=_amount(repeat, size, scan),
                dropped=_amount(flags, size, scan),
            )
        )
    findings = Findings(
        ngram=checks.ngram,
        overlap_action=checks.overlap,
        similarity=checks.similarity,
        duplicates_action=checks.duplicates,
        evaluation=_texts(runs) if runs else [],
        sources=sources,
        overlaps=_overlap_examples(corpora, scans, names),
        repeats=[] if signatures is None else _repeats(corpora, signatures, first, edges, tokenizer),
    )
    return findings, dropped


def _done(action: str) -> str:
    return "dropped" if action == "drop" else "kept"


def _amount(flags: npt.NDArray[np.bool_], sizes: npt.NDArray[np.int64], scan: Scan) -> Amount:
    return Amount(
        documents=int(flags.sum()), tokens=int(sizes[flags].sum()), bytes=int(scan.bytes[flags].sum())
    )


def _texts(runs: EvaluationRuns) -> list[TextFindings]:
    columns = zip(runs.names, runs.documents, runs.words, runs.unchecked, strict=True)
    return [
        TextFindings(name=name, documents=documents, words=words, unchecked=unchecked)
        for name, documents, words, unchecked in columns
    ]


def _overlap_examples(
    corpora: Sequence[tuple[str, Corpus]], scans: Sequence[Scan], names: Sequence[str]
) -> list[OverlapExample]:
    examples = []
    for (label, _), scan in zip(corpora, scans, strict=True):
        for document in list(scan.example)[: max(1, _MOST_EXAMPLES // len(corpora))]:
            examples.append(
                OverlapExample(
                    source=label,
                    document=document,
                    text=names[scan.text[document]],
                    words=scan.example[document],
                    share=round(float(scan.shared[document] / max(1, scan.words[document])), 4),
                )
            )
    return examples


def _repeats(
    corpora: Sequence[tuple[str, Corpus]],
    signatures: Signatures,
    first: npt.NDArray[np.int64],
    edges: npt.NDArray[np.int64],
    tokenizer: Any,
) -> list[DuplicateExample]:
    def place(number: int) -> tuple[int, int]:
        source = int(np.searchsorted(edges, number, side="right")) - 1
        return source, number - int(edges[source])

    examples = []
    for number in np.flatnonzero(first != np.arange(len(first)))[:_MOST_EXAMPLES].tolist():
        (source, document), (of_source, of_document) = place(number), place(int(first[number]))
        examples.append(
            DuplicateExample(
                source=corpora[source][0],
                document=document,
                of_source=corpora[of_source][0],
                of_document=of_document,
                similarity=round(similarity_of(signatures, number, int(first[number])), 3),
                beginning=_beginning(corpora[source][1], document, tokenizer),
            )
        )
    return examples


def _beginning(corpus: Corpus, document: int, tokenizer: Any) -> str:
    begin = int(corpus.document_ends[document - 1]) if document else 0
    size = int(corpus.document_ends[document]) - begin
    ids = corpus.read(begin, min(size, _SHOWN_TOKENS)).tolist()
    return decode(tokenizer, [ids])[0]
