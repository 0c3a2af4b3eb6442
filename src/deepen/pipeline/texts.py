import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from deepen.config import Recipe, Source, TextSet
from deepen.data.batches import Mixture
from deepen.data.corpus import Corpus, prepare_corpus, prepare_piece
from deepen.data.documents import read_documents
from deepen.data.evaluation_text import EvaluationText, load_evaluation_text
from deepen.data.files import passed_over
from deepen.data.findings import Checks, Findings
from deepen.data.pieces import Piece
from deepen.data.selection import select_documents
from deepen.errors import CheckpointError, RecipeError, in_a_line
from deepen.pipeline.plan import heldout_name
from deepen.pipeline.reporter import Reporter


@dataclass(frozen=True, kw_only=True)
class Texts:
    """The texts a run trains on.

    Attributes:
        corpora: one a source, without what the recipe's checks drop.
        mixture: where batches come from.
        findings: of the checks, if the recipe asks for any.
    """

    corpora: list[Corpus]
    mixture: Mixture
    findings: Findings | None


def corpus_cache(recipe: Recipe) -> Path:
    """Return the directory of tokenised corpora."""
    named = (section.cache for section in (recipe.data, recipe.sft) if section)
    return Path(next(filter(None, named), None) or default_cache())


def default_cache() -> Path:
    """Return where corpora and texts of the hub are kept unless a recipe says otherwise."""
    return Path(os.environ.get("DEEPEN_CACHE") or Path.home() / ".cache" / "deepen")


def load_tokenizer(directory: Path) -> Any:
    """Load a checkpoint's tokenizer; no code of it is run.

    Raises:
        CheckpointError: it has none that transformers can read.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # transformers raises whatever the tokenizer's own files lead it to
        reason = in_a_line(error)
        raise CheckpointError(f"{directory}: has no tokenizer that can be read ({reason})") from None


def prepare_texts(recipe: Recipe, tokenizer: Any, cache: Path, reporter: Reporter) -> Texts:
    """Tokenise the sources, or find them in the cache; check them as the recipe asks; mix them.

    Raises:
        DataError: a text is missing, malformed, or nothing of it is left to train on.
        RecipeError: a check is asked for that has nothing to check against.
        OutputError: the cache cannot be written.
    """
    data, train = recipe.training()
    corpora, findings = _prepare(recipe, data.sources, data.heldout, tokenizer, cache, reporter)
    weighted = [(corpus, source.weight) for corpus, source in zip(corpora, data.sources, strict=True)]
    mixture = Mixture(
        weighted,
        data.sequence_length,
        train.seed,
        packing=data.packing,
        document_masks=data.document_masks,
    )
    return Texts(corpora=corpora, mixture=mixture, findings=findings)


def prepare_general(recipe: Recipe, tokenizer: Any, cache: Path, reporter: Reporter) -> list[Corpus]:
    """Tokenise and check the texts of `data.anchor`; nothing is held out. Errors as `prepare_texts`."""
    data, _ = recipe.training()
    return _prepare(recipe, data.anchor, 0.0, tokenizer, cache, reporter)[0]


def _prepare(
    recipe: Recipe,
    sources: Sequence[Source],
    heldout: float,
    tokenizer: Any,
    cache: Path,
    reporter: Reporter,
) -> tuple[list[Corpus], Findings | None]:
    data, _ = recipe.training()
    corpora = tokenise_sources(sources, heldout, data.workers, tokenizer, cache, reporter)
    findings = None
    if data.decontaminate or data.deduplicate:
        corpora, findings = _check(recipe, sources, corpora, tokenizer, cache, reporter)
        reporter.note(findings.line())
    return corpora, findings


def tokenise_sources(
    sources: Sequence[Source],
    heldout: float,
    workers: int,
    tokenizer: Any,
    cache: Path,
    reporter: Reporter,
) -> list[Corpus]:
    """Tokenise sources, or find them in the cache; errors as `prepare_texts`."""
    corpora = []
    for source in sources:
        reporter.stage(f"tokenising {source.label}")
        if left := passed_over(source):
            reporter.note(left)
        corpora.append(
            prepare_corpus(
                source,
                tokenizer,
                cache=cache,
                heldout=heldout,
                workers=workers,
                progress=lambda stage, done, total: reporter.progress(done, total, stage),
            )
        )
    return corpora


def prepare_pieces(
    recipe: Recipe, tokenizer: Any, cache: Path, piece: Piece, reporter: Reporter
) -> list[Corpus | None]:
    """Tokenise one piece of each source; return the corpora whose pieces are all there by now."""
    data, _ = recipe.training()
    corpora = []
    for source in data.sources:
        reporter.stage(f"tokenising piece {piece.number}/{piece.count} of {source.label}")
        corpora.append(
            prepare_piece(
                source,
                tokenizer,
                piece,
                cache=cache,
                heldout=data.heldout,
                workers=data.workers,
                progress=lambda stage, done, total: reporter.progress(done, total, stage),
            )
        )
    return corpora


def _check(
    recipe: Recipe,
    sources: Sequence[Source],
    corpora: list[Corpus],
    tokenizer: Any,
    cache: Path,
    reporter: Reporter,
) -> tuple[list[Corpus], Findings]:
    data, _ = recipe.training()
    overlap, repeats = data.decontaminate, data.deduplicate
    texts = (*recipe.evaluate.general, *recipe.evaluate.domain)
    if overlap and not texts and not data.heldout:
        raise RecipeError(
            "data.decontaminate: there is nothing to check against; "
            "give texts under evaluate, or a share of data.heldout"
        )
    reporter.stage("checking the sources")
    return select_documents(
        [(source.label, corpus) for source, corpus in zip(sources, corpora, strict=True)],
        [(text.label, read_documents(text, cache=cache / "hub")) for text in texts],
        tokenizer,
        Checks(
            ngram=overlap.ngram if overlap else None,
            overlap=overlap.action if overlap else "report",
            similarity=repeats.similarity if repeats else None,
            duplicates=repeats.action if repeats else "report",
        ),
        most_words=recipe.evaluate.max_tokens,
        cache=cache,
        workers=data.workers,
        progress=lambda stage, done, total: reporter.progress(done, total, stage),
    )


def load_evaluation(
    recipe: Recipe, tokenizer: Any, cache: Path, corpora: list[Corpus], length: int
) -> list[EvaluationText]:
    """Read every text the recipe evaluates, the sources' held-out documents among them.

    Args:
        recipe: names them.
        tokenizer: of the base.
        cache: where copies of hub datasets lie.
        corpora: of the sources.
        length: most tokens one window predicts.

    Raises:
        DataError: a text is missing or has nothing to predict.
    """

    def load(name: str, role: Literal["general", "domain"], documents: Iterator[str]) -> EvaluationText:
        return load_evaluation_text(
            documents,
            tokenizer,
            task=name,
            role=role,
            sequence_length=length,
            max_tokens=recipe.evaluate.max_tokens,
        )

    def read(text: TextSet) -> Iterator[str]:
        return read_documents(text, cache=cache / "hub")

    general = [load(text.label, "general", read(text)) for text in recipe.evaluate.general]
    domain = [load(text.label, "domain", read(text)) for text in recipe.evaluate.domain]
    if recipe.data and recipe.data.heldout:
        pairs = zip(recipe.data.sources, corpora, strict=True)
        domain += [load(heldout_name(source), "domain", corpus.heldout_texts()) for source, corpus in pairs]
    return general + domain
