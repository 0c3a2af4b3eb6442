"""Texts to read and what is made of them."""

from typing import Annotated, Literal, Self

from pydantic import (
    BeforeValidator,
    Field,
    model_validator,
)

from deepen.config.section import Count, Positive, Section, Share, as_tuple


class Place(Section):
    """Where records lie: files on disk or a dataset of the hub."""

    name: str | None = Field(default=None, pattern=r"^[A-Za-z0-9._-]+$")
    """How results call it; default: the name of its file or dataset."""

    path: str | None = None
    """File, directory or glob of .txt, .md, .jsonl, .json or .parquet (also .gz where the format allows)."""

    hub: str | None = None
    """Dataset id on the Hugging Face hub, instead of `path`."""

    subset: str | None = None
    """Configuration of the hub dataset."""

    split: str = "train"
    """Split of the hub dataset."""

    revision: str | None = None
    """Commit, tag or branch of the hub dataset; default: the newest commit."""

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        if (self.path is None) == (self.hub is None):
            raise ValueError("give either path or hub")
        if self.hub is None and self.revision is not None:
            raise ValueError("revision is for hub datasets")
        return self

    @property
    def label(self) -> str:
        """The name results use."""
        if self.name:
            return self.name
        last = (self.path or self.hub or "").rstrip("/").rsplit("/", 1)[-1]
        stem = last.split(".", 1)[0].replace("*", "").strip("-_")
        return stem or "text"


class TextSet(Place):
    """A text to read: files on disk or a dataset of the hub."""

    stream: bool = False
    """Read the hub dataset as it arrives, with no copy of it on disk but the corpus."""

    field: str | None = None
    """Key that holds the text in a record; default `text`."""

    template: str | None = None
    """Instead of `field`: text built from several keys, as `{question}\\n{answer}`."""

    separator: str | None = None
    """Cuts a plain-text file into documents; default: one file is one document."""

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if self.field is not None and self.template is not None:
            raise ValueError("give either field or template")
        if self.hub is None and self.stream:
            raise ValueError("stream is for hub datasets")
        return self


class Source(TextSet):
    """A text to train on."""

    weight: Positive = 1.0
    """How often a token of this source is seen for each time a token of a weight-1 source is."""


class DecontaminateSection(Section):
    """Training documents that share a run of words with an evaluation text."""

    ngram: Annotated[Count, Field(ge=8)] = 13
    """Words in a run. Case and punctuation do not count."""

    action: Literal["drop", "report"] = "drop"
    """`drop` leaves such documents out of training; `report` only counts them."""


class DeduplicateSection(Section):
    """Training documents that are nearly the same as one before them, in any source."""

    similarity: Annotated[Positive, Field(ge=0.6, le=1)] = 0.8
    """Least share of equal five-word runs (Jaccard, estimated by MinHash) that makes a duplicate."""

    action: Literal["drop", "report"] = "drop"
    """`drop` keeps the first of them; `report` only counts them."""


class DataSection(Section):
    """What is trained on and how it is cut."""

    sequence_length: Annotated[Count, Field(ge=2)]
    """Tokens in one training window."""

    sources: Annotated[tuple[Source, ...], BeforeValidator(as_tuple), Field(min_length=1)]
    """The mixture."""

    anchor: Annotated[tuple[Source, ...], BeforeValidator(as_tuple)] = ()
    """General texts for `train.anchor` with source `general`; none of their tokens is learned."""

    packing: Literal["stream", "best_fit"] = "stream"
    """`stream`: documents end to end, cut every window. `best_fit`: documents whole wherever one fits."""

    document_masks: bool = False
    """No token attends to, or is predicted from, another document; positions restart with each."""

    decontaminate: DecontaminateSection | None = None
    """Check the sources against the evaluation texts and the held-out documents; null: no check."""

    deduplicate: DeduplicateSection | None = None
    """Check the sources for near-duplicates; null: no check."""

    heldout: Share = 0.0
    """Share of every source's documents kept out of training; they are evaluated as domain text."""

    cache: str | None = None
    """Directory of tokenised corpora; default `$DEEPEN_CACHE` or `~/.cache/deepen`."""

    workers: Count = 1
    """Processes that tokenise. With 1 a fast tokenizer uses threads of its own, which is often faster."""
