from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from deepen.config import Recipe, TextSet
from deepen.data.batches import Mixture
from deepen.data.corpus import Corpus, prepare_corpus
from deepen.data.documents import read_documents
from deepen.data.evaluation_text import EvaluationText, load_evaluation_text
from deepen.errors import CheckpointError
from deepen.pipeline.plan import RunPlan, heldout_name
from deepen.pipeline.reporter import Reporter


def load_tokenizer(directory: Path) -> Any:
    """Load a checkpoint's tokenizer; no code of it is run.

    Raises:
        CheckpointError: it has none that transformers can read.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # transformers raises whatever the tokenizer's own files lead it to
        reason = " ".join(str(error).split())[:160]
        raise CheckpointError(f"{directory}: has no tokenizer that can be read ({reason})") from None


def prepare_mixture(
    plan: RunPlan, tokenizer: Any, cache: Path, reporter: Reporter
) -> tuple[Mixture, list[Corpus]]:
    """Tokenise the sources, or find them in the cache, and mix them."""
    data = plan.recipe.data
    corpora = []
    for source in data.sources:
        reporter.stage(f"tokenising {source.label}")
        corpora.append(
            prepare_corpus(
                source,
                tokenizer,
                cache=cache,
                heldout=data.heldout,
                workers=data.workers,
                progress=lambda stage, done, total: reporter.progress(done, total, stage),
            )
        )
    weighted = [(corpus, source.weight) for corpus, source in zip(corpora, data.sources, strict=True)]
    return Mixture(weighted, data.sequence_length, plan.recipe.train.seed), corpora


def load_evaluation(
    recipe: Recipe, tokenizer: Any, cache: Path, corpora: list[Corpus]
) -> list[EvaluationText]:
    """Read every text the recipe evaluates, the sources' held-out documents among them.

    Raises:
        DataError: a text is missing or has nothing to predict.
    """

    def load(name: str, role: Literal["general", "domain"], documents: Iterator[str]) -> EvaluationText:
        return load_evaluation_text(
            documents,
            tokenizer,
            task=name,
            role=role,
            sequence_length=recipe.data.sequence_length,
            max_tokens=recipe.evaluate.max_tokens,
        )

    def read(text: TextSet) -> Iterator[str]:
        return read_documents(text, cache=cache / "hub")

    general = [load(text.label, "general", read(text)) for text in recipe.evaluate.general]
    domain = [load(text.label, "domain", read(text)) for text in recipe.evaluate.domain]
    if recipe.data.heldout:
        pairs = zip(recipe.data.sources, corpora, strict=True)
        domain += [load(heldout_name(source), "domain", corpus.heldout_texts()) for source, corpus in pairs]
    return general + domain
