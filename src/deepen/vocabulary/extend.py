"""Extending the vocabulary of a checkpoint on disk: learn, plan, write, prove."""

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from deepen.checkpoint import CONFIG, atomic_directory, check_free, fast_fingerprint
from deepen.errors import CheckpointError, DataError, in_a_line
from deepen.expansion import (
    Base,
    Progress,
    Tables,
    carried_files,
    carry,
    check_space,
    find_tables,
    open_base,
    write_weights,
)
from deepen.records import capture_provenance
from deepen.vocabulary.corpus import Text
from deepen.vocabulary.files import Extension, extended_files
from deepen.vocabulary.learn import learn_pieces
from deepen.vocabulary.measure import measure_text
from deepen.vocabulary.record import VOCABULARY_NAME, MeasuredText, PieceRecord, VocabularyRecord
from deepen.vocabulary.rows import Head, new_rows, plan_rows
from deepen.vocabulary.words import BYTES, count_words

logger = logging.getLogger("deepen")

_ROWS: Final = ".new-rows-{}"


@dataclass(frozen=True, kw_only=True)
class ExtendResult:
    """What was written.

    Attributes:
        directory: the extended checkpoint.
        vocabulary: the content of its `vocabulary.json`.
        bytes_written: size of its weight files.
        seconds: how long it took.
    """

    directory: Path
    vocabulary: VocabularyRecord
    bytes_written: int
    seconds: float


def extend_vocabulary(
    base: str | Path,
    out: str | Path,
    texts: Sequence[Text],
    *,
    pieces: int,
    head: Head = "parts",
    overwrite: bool = False,
    name: str | None = None,
    progress: Progress | None = None,
) -> ExtendResult:
    """Learn new pieces from texts and write the base with them as an ordinary checkpoint.

    Every old row of every table, every other tensor and every id stays as it is. A text in which no new piece
    occurs has the tokens it had; in others, runs of the base's tokens are joined. Both are checked on all of
    `texts` before the checkpoint appears.

    Args:
        base: the base's directory; it is only read.
        out: the directory to create, whole or not at all.
        texts: to learn from and to measure on.
        pieces: number of new pieces.
        head: how rows of a head of its own begin, see `deepen.vocabulary.rows`.
        overwrite: replace `out`.
        name: what `vocabulary.json` calls the base; default: `base` as given.
        progress: called with (bytes done, bytes in all) while the weights are written.

    Raises:
        CheckpointError: the base is malformed, expanded already, or its tokenizer is of another kind.
        DataError: a text is missing, or nothing can be learned.
        OutputError: `out` exists, overlaps the base, or does not fit the disk.
        CheckFailed: the tokens of a text changed more than they should.
    """
    start, out = time.perf_counter(), Path(out)
    check_free(out, overwrite=overwrite)
    opened = _open(base)
    tables, tokenizer = find_tables(opened), _tokenizer(opened.checkpoint.directory)
    extension = _learn(tokenizer, tables.rows, texts, pieces, opened.checkpoint.directory)
    files = extended_files(opened.checkpoint.directory, extension)
    source = opened.checkpoint.directory
    carried = [each for each in carried_files(source) if each not in files]
    check_space(out, sum(shard.path.stat().st_size for shard in opened.checkpoint.shards))
    with atomic_directory(out, overwrite=overwrite, inside=(source,)) as partial:
        carry(source, partial, carried)
        for file, content in files.items():
            (partial / file).write_bytes(content)
        (partial / CONFIG).write_text(_config(opened, len(extension.names)), "utf-8")
        measured = _measure(texts, tokenizer, _tokenizer(partial), extension)
        written = _write_weights(opened, tables, extension, head, partial, progress)
        record = _record(opened, tables, extension, measured, head, name or str(base))
        (partial / VOCABULARY_NAME).write_text(record.to_json(), "utf-8")
    seconds = time.perf_counter() - start
    return ExtendResult(directory=out, vocabulary=record, bytes_written=written, seconds=seconds)


def _open(directory: str | Path) -> Base:
    base = open_base(directory)
    if base.previous is not None:
        raise CheckpointError(
            f"{directory}: is expanded already, and its expansion.json names the base by its tensors; "
            "extend the vocabulary of the base, then expand"
        )
    return base


def _tokenizer(directory: Path) -> Any:
    """Load the tokenizer as transformers uses it, without truncation and padding; no code of it is run."""
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # transformers raises whatever the tokenizer's own files lead it to
        reason = in_a_line(error)
        raise CheckpointError(f"{directory}: has no tokenizer that can be read ({reason})") from None
    if not loaded.is_fast:
        raise CheckpointError(f"{directory}: its tokenizer is {type(loaded).__name__}, which has no merges")
    tokenizer = loaded.backend_tokenizer
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _in_characters(tokenizer: Any, directory: Path) -> bool:
    """Tell SentencePiece's BPE, which falls back to bytes, from a byte-level one."""
    state = json.loads(tokenizer.to_str())
    kind, model = state["model"]["type"], state["model"]
    if kind == "BPE" and not (model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")):
        if model.get("byte_fallback"):
            return True
        if '"ByteLevel"' in json.dumps([state["pre_tokenizer"], state["decoder"]]):
            return False
    raise CheckpointError(
        f"{directory}: its tokenizer is {kind} without bytes to fall back to; "
        "byte-level BPE and SentencePiece BPE with byte fallback can be extended exactly"
    )


def _learn(tokenizer: Any, rows: int, texts: Sequence[Text], pieces: int, directory: Path) -> Extension:
    old = tokenizer.get_vocab(with_added_tokens=True)
    if (last := max(old.values())) >= rows:
        raise CheckpointError(f"{directory}: the tokenizer has the id {last}, the model {rows} rows")
    in_characters = _in_characters(tokenizer, directory)
    documents = (document for text in texts if text.learned for document in text.documents())
    words = count_words(tokenizer, documents, in_characters=in_characters)
    learned = learn_pieces(words, pieces, old, in_characters=in_characters)
    if not learned.pieces:
        raise DataError("nothing can be learned from these texts: no two neighbouring tokens occur twice")
    if len(learned.pieces) < pieces:
        logger.warning("warning: the texts give only %d pieces, not %d", len(learned.pieces), pieces)
    closed = {token.content for token in tokenizer.get_added_tokens_decoder().values()} | BYTES.keys()
    return Extension(
        old=old, closed=frozenset(closed), rows=rows, learned=learned, in_characters=in_characters
    )


def _measure(texts: Sequence[Text], old: Any, new: Any, extension: Extension) -> list[MeasuredText]:
    added = extension.new
    found = new.get_vocab(with_added_tokens=True)
    if moved := [token for token, number in {**extension.old, **added}.items() if found.get(token) != number]:
        raise CheckpointError(f"the extended tokenizer gives {moved[0]!r} another id; nothing was written")
    return [measure_text(text, old, new, added) for text in texts]


def _write_weights(
    base: Base, tables: Tables, extension: Extension, head: Head, partial: Path, progress: Progress | None
) -> int:
    """Write the weights into `partial`; the new rows lie beside them meanwhile."""
    pieces = extension.learned.pieces
    replaced = [[extension.old[token] for token in piece.replaces] for piece in pieces]
    added = {}
    for number, table in enumerate((*tables.inputs, *tables.outputs)):
        of = None if head == "average" and table in tables.outputs else replaced
        added[table] = partial / _ROWS.format(number)
        with added[table].open("wb") as file:
            file.writelines(new_rows(base.checkpoint.tensors[table], of, len(pieces)))
    plan = plan_rows(base.checkpoint, added, len(pieces))
    write_weights(plan, partial, progress)
    for path in added.values():
        path.unlink()
    return plan.bytes_written


def _config(base: Base, rows: int) -> str:
    config, family = dict(base.checkpoint.config), base.family
    if family.section:
        config[family.section] = {**family.text_config(config), "vocab_size": rows}
    if not family.section or "vocab_size" in config:
        config["vocab_size"] = rows
    return json.dumps(config, indent=2, ensure_ascii=False) + "\n"


def _record(
    base: Base,
    tables: Tables,
    extension: Extension,
    texts: list[MeasuredText],
    head: Head,
    name: str,
) -> VocabularyRecord:
    pieces = [
        PieceRecord(
            id=extension.new[piece.text],
            text=piece.text,
            replaces=[extension.old[token] for token in piece.replaces],
            saves=piece.saves,
        )
        for piece in extension.learned.pieces
    ]
    return VocabularyRecord(
        base=name,
        base_fingerprint=fast_fingerprint(base.checkpoint),
        base_rows=tables.rows,
        head=head if tables.outputs else None,
        pieces=pieces,
        texts=texts,
        provenance=capture_provenance(data={text.path: text.digest for text in texts}),
    )
