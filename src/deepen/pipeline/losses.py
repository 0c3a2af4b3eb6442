"""Held-out losses of a model and its base on texts that no recipe names, each scored once."""

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from transformers import AutoConfig

from deepen.checkpoint import write_file
from deepen.config import EvaluateSection, TextSet
from deepen.data.documents import read_documents
from deepen.data.evaluation_text import EvaluationText, load_evaluation_text
from deepen.errors import DataError
from deepen.evaluation.heldout import evaluate_texts
from deepen.evaluation.record import text_metrics, text_results
from deepen.model import bypass
from deepen.pipeline.reporter import Reporter
from deepen.pipeline.subject import Subject, subject_digest
from deepen.pipeline.texts import default_cache, load_tokenizer
from deepen.records import EvaluationRecord, Metric, Role, TextResult, capture_provenance, read_record

_LONGEST_WINDOW = 2048
_MOST_TOKENS = EvaluateSection().max_tokens


def score_subject(
    subject: Subject,
    texts: Sequence[tuple[Role, TextSet]],
    record: Path,
    device: torch.device,
    reporter: Reporter,
    max_tokens: int = _MOST_TOKENS,
) -> list[Metric]:
    """Return the metrics of the texts, scoring those that the record does not hold of this model and base.

    The record then holds them beside the others it held. At most `max_tokens` of each text are read.

    Raises:
        DeepenError: a text cannot be read, two have one name, or the model cannot be loaded.
    """
    if not texts:
        return []
    wanted = load_text_sets(subject.model.tokenizer, texts, max_tokens)
    identity = subject_digest(subject)
    held = _held(record, identity)
    missing = [text for text in wanted if not _is_held(text, held)]
    if not missing:
        reporter.stage("held-out loss")
        reporter.note("finished before; not scored again")
        metrics = text_metrics(list(held.values()))
    else:
        held |= {result.task: result for result in _score(subject, missing, device, reporter)}
        metrics = text_metrics(list(held.values()))
        content = EvaluationRecord(
            model=subject.model.name,
            base=subject.base or "",
            identity=identity,
            metrics=metrics,
            texts=list(held.values()),
            provenance=capture_provenance(data={result.task: result.digest for result in held.values()}),
        )
        write_file(record, content.model_dump_json(indent=1) + "\n")
    return [metric for text in wanted for metric in metrics if metric.task == text.task]


def _held(record: Path, identity: str) -> dict[str, TextResult]:
    """The results of a record by name; none where it is of another model or base, or cannot be read."""
    if not record.exists():
        return {}
    try:
        found = read_record(record, EvaluationRecord)
    except DataError:
        return {}
    return {text.task: text for text in found.texts} if found.identity == identity else {}


def _is_held(text: EvaluationText, held: dict[str, TextResult]) -> bool:
    found = held.get(text.task)
    return found is not None and (found.role, found.digest) == (text.role, text.digest)


def _score(
    subject: Subject, texts: Sequence[EvaluationText], device: torch.device, reporter: Reporter
) -> list[TextResult]:
    reporter.stage("loading the model")
    model = subject.model.load(device)
    reporter.stage("held-out loss")
    nll = evaluate_texts(model, texts, progress=reporter.progress)
    if subject.base is None:
        return text_results(texts, nll, None)
    reporter.stage("held-out loss of the base")
    if subject.apart is not None:
        del model  # one of the two in memory at a time
        model = subject.apart.load(device)
    with nullcontext() if subject.apart else bypass(model):
        return text_results(texts, nll, evaluate_texts(model, texts, progress=reporter.progress))


def load_text_sets(
    directory: Path, texts: Sequence[tuple[Role, TextSet]], max_tokens: int
) -> list[EvaluationText]:
    """Read texts that no recipe names, in windows as long as the model has positions, up to 2,048 tokens.

    Args:
        directory: of the checkpoint whose tokenizer cuts them.
        texts: each with what it stands for.
        max_tokens: tokens read of each.

    Raises:
        DataError: one cannot be read, or two have one name.
        CheckpointError: there is no tokenizer.
    """
    names = [text.label for _, text in texts]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise DataError(f"evaluate: more than one text is called {', '.join(twice)}; rename a file")
    tokenizer, length = load_tokenizer(directory), longest_window(directory)
    return [
        load_evaluation_text(
            read_documents(text, cache=default_cache() / "hub"),
            tokenizer,
            task=text.label,
            role=role,
            sequence_length=length,
            max_tokens=max_tokens,
        )
        for role, text in texts
    ]


def longest_window(directory: Path) -> int:
    """Return the tokens of a window of such a text: as many as the model has positions, up to 2,048."""
    config = AutoConfig.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
    longest = getattr(config.get_text_config(), "max_position_embeddings", None) or _LONGEST_WINDOW
    return min(int(longest), _LONGEST_WINDOW)
