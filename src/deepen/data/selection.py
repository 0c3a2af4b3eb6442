"""Leaves out of corpora what overlaps an evaluation text, and what repeats an earlier document.

Both are found in the words that the model will read: the stored ids, decoded. So a corpus is checked without
its source, and corpora in the cache do not depend on what they are checked against.

A document overlaps if it shares one run of (by default) 13 words with an evaluation text, as in Brown et al.,
"Language Models are Few-Shot Learners", 2020, appendix C; the whole document is left out. The held-out
documents of the sources are evaluation texts too. Near-duplicates: see `deepen.data.duplicates`.

Memory: ten bytes a word of the evaluation texts (in every worker), some 100 MB of known words, a batch of
documents, and 90 bytes a document while duplicates are sought; signatures lie on disk, 480 bytes a document.

::

    CACHE/selections/KEY/
      report.json       what was found (`Findings`)
      dropped-i.npy     bool [documents] of corpus i
"""

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from deepen.checkpoint import atomic_directory
from deepen.data.build import HELDOUT, META, Progress
from deepen.data.corpus import Corpus
from deepen.data.findings import Checks, Findings, describe
from deepen.data.pieces import map_documents, write_documents
from deepen.data.scan import FORMAT_VERSION, Scan, open_signatures, scan_documents
from deepen.data.tokens import decode, digest_of, encode
from deepen.data.words import EvaluationRuns, collect_runs
from deepen.errors import DataError, OutputError

_REPORT = "report.json"


def select_documents(
    corpora: Sequence[tuple[str, Corpus]],
    evaluation: Sequence[tuple[str, Iterator[str]]],
    tokenizer: Any,
    checks: Checks,
    *,
    most_words: int,
    cache: Path,
    workers: int = 1,
    progress: Progress | None = None,
) -> tuple[list[Corpus], Findings]:
    """Check corpora, and return them without what the checks drop. Found once, it is remembered.

    Args:
        corpora: label and corpus of each source, in an order that decides which duplicate is the first.
        evaluation: name and documents of each text besides the sources' held-out documents.
        tokenizer: that of the corpora.
        checks: what to look for.
        most_words: read of each evaluation text.
        cache: the directory the corpora lie in.
        workers: processes that read the corpora.
        progress: told `check`, tokens done and in all.

    Raises:
        DataError: nothing is left of a source.
        OutputError: the cache cannot be written.
    """
    runs = None
    if checks.ngram is not None:
        split = [(label, corpus) for label, corpus in corpora if corpus.heldout_documents]
        held = [(f"{label}-heldout", corpus.heldout_texts()) for label, corpus in split]
        read = ((name, _as_read(tokenizer, documents)) for name, documents in (*evaluation, *held))
        runs = collect_runs(read, checks.ngram, most_words)
    place = cache / "selections" / _key(corpora, runs, checks)[:32]
    if not (place / _REPORT).is_file():
        try:
            _find(place, corpora, runs, tokenizer, checks, workers, progress)
        except OutputError:
            if not (place / _REPORT).is_file():  # else another process was first
                raise
    findings = Findings.from_json(json.loads((place / _REPORT).read_text()))
    kept = []
    for index, (label, corpus) in enumerate(corpora):
        dropped = np.load(place / f"dropped-{index}.npy")
        if dropped.all():
            raise DataError(
                f"{label}: every document overlaps an evaluation text or repeats an earlier one; "
                f"see {place / _REPORT}, or set action: report"
            )
        kept.append(without(corpus, dropped, findings.sources[index].dropped.bytes, cache))
    return kept, findings


def without(corpus: Corpus, dropped: npt.NDArray[np.bool_], dropped_bytes: int, cache: Path) -> Corpus:
    """Write a corpus without some of its documents, or open what an earlier call wrote.

    Args:
        corpus: stays as it is.
        dropped: bool [documents].
        dropped_bytes: UTF-8 bytes of those dropped.
        cache: where it is written.

    Raises:
        OutputError: the cache cannot be written.
    """
    if not dropped.any():
        return corpus
    key = digest_of([corpus.digest, "without", np.flatnonzero(dropped).tolist()])
    target = cache / "corpora" / key[:32]
    if not (target / META).is_file():
        try:
            _write_without(corpus, dropped, dropped_bytes, target, key)
        except OutputError:
            if not (target / META).is_file():  # else another process was first
                raise
    return Corpus(target)


def _write_without(
    corpus: Corpus, dropped: npt.NDArray[np.bool_], dropped_bytes: int, target: Path, key: str
) -> None:
    sizes = np.diff(corpus.document_ends, prepend=0)
    with atomic_directory(target, overwrite=target.exists()) as partial:
        write_documents(partial / "tokens-000.arrow", _kept(corpus, ~dropped))
        shutil.copyfile(corpus.directory / HELDOUT, partial / HELDOUT)
        meta = json.loads((corpus.directory / META).read_text())
        meta |= {
            "digest": key,
            "documents": int((~dropped).sum()),
            "tokens": int(sizes[~dropped].sum()),
            "bytes": corpus.bytes - dropped_bytes,
            "selected_from": corpus.digest,
        }
        (partial / META).write_text(json.dumps(meta, indent=1))


def _kept(corpus: Corpus, kept: npt.NDArray[np.bool_]) -> Iterator[Any]:
    at = 0
    for chunk in map_documents(corpus.directory):
        here = np.flatnonzero(kept[at : at + len(chunk)])
        at += len(chunk)
        if len(here):
            yield chunk.take(here)


def _as_read(tokenizer: Any, documents: Iterator[str]) -> Iterator[str]:
    """Give documents as the model reads them, which with some tokenizers is not as they are written."""
    for document in documents:
        yield decode(tokenizer, encode(tokenizer, [document]))[0]


def _key(corpora: Sequence[tuple[str, Corpus]], runs: EvaluationRuns | None, checks: Checks) -> str:
    sources = [[label, corpus.digest] for label, corpus in corpora]
    texts = None if runs is None else [runs.names, runs.documents, runs.words, runs.digest]
    return digest_of([FORMAT_VERSION, sources, texts, vars(checks)])


def _find(
    place: Path,
    corpora: Sequence[tuple[str, Corpus]],
    runs: EvaluationRuns | None,
    tokenizer: Any,
    checks: Checks,
    workers: int,
    progress: Progress | None,
) -> None:
    """Scan the corpora and write what was found."""
    report = progress or (lambda stage, done, total: None)
    total = sum(corpus.tokens for _, corpus in corpora)
    with atomic_directory(place, overwrite=place.exists()) as partial:
        folder = partial / "scan"
        folder.mkdir()
        edges = np.cumsum([0, *(corpus.documents for _, corpus in corpora)]).tolist()
        signatures = open_signatures(folder / "signatures.npy", edges[-1]) if checks.similarity else None
        scans: list[Scan] = []
        done = 0
        for index, (_, corpus) in enumerate(corpora):
            (folder / str(index)).mkdir()
            scans.append(
                scan_documents(
                    corpus,
                    tokenizer,
                    runs,
                    folder=folder / str(index),
                    signatures=None if signatures is None else signatures[edges[index] : edges[index + 1]],
                    workers=workers,
                    progress=lambda here, done=done: report("check", done + here, total),  # type: ignore[misc]
                )
            )
            done += corpus.tokens
            shutil.rmtree(folder / str(index))
        findings, dropped = describe(corpora, scans, runs, signatures, checks, tokenizer)
        shutil.rmtree(folder)
        for index, flags in enumerate(dropped):
            np.save(partial / f"dropped-{index}.npy", flags)
        (partial / _REPORT).write_text(json.dumps(findings.to_json(), indent=1, ensure_ascii=False) + "\n")
