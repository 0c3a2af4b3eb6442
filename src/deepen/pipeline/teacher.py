"""The model whose predictions a run learns."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedModel

from deepen.config import TeacherSection
from deepen.data.document_masks import check_document_masks
from deepen.data.tokens import tokenizer_digest
from deepen.errors import TrainingError
from deepen.pipeline.plan import RunPlan
from deepen.pipeline.reporter import Reporter
from deepen.pipeline.subject import Subject, find_subject
from deepen.pipeline.texts import load_tokenizer
from deepen.pipeline.trainee import Trainee


@dataclass(frozen=True)
class HeldTeacher:
    """A teacher in memory, frozen, and the digest of its tensors."""

    model: PreTrainedModel
    digest: str


def check_teacher(section: TeacherSection, base: str, directory: Path) -> Subject:
    """Look at a teacher without loading it.

    Args:
        section: names it.
        base: the run's base, as it was named: what a block pack is put on.
        directory: where that lies.

    Raises:
        TrainingError: it is an adapter, or predicts another vocabulary than the base.
        DeepenError: there is no such model.
    """
    subject = find_subject(section.model, base)
    if (Path(subject.model.name) / "adapter_config.json").is_file():
        raise TrainingError(f"{section.model}: is an adapter; merge it into its base, and name the result")
    theirs = subject.model.tokenizer
    words, others = _words(directory), _words(theirs)
    if words != others:
        raise TrainingError(
            f"{section.model}: predicts {others:,} words, {base} {words:,}; only a teacher of the base's own "
            "vocabulary can be learned from"
        )
    if theirs.resolve() != directory.resolve():
        ours, held = load_tokenizer(directory), load_tokenizer(theirs)
        if tokenizer_digest(ours) != tokenizer_digest(held):
            raise TrainingError(
                f"{section.model}: its tokenizer is not that of {base}: the same number would be another word"
            )
    return subject


def open_teacher(plan: RunPlan, trainee: Trainee, reporter: Reporter) -> HeldTeacher | None:
    """Load the teacher of a run beside its model; None where it has none.

    Raises:
        DeepenError: as `check_teacher`, it cannot be loaded, or its windows are too short.
    """
    section = plan.train.teacher
    if section is None:
        return None
    reporter.stage("loading the teacher")
    subject = check_teacher(section, plan.recipe.base, plan.base.checkpoint.directory)
    model: Any = subject.model.load(trainee.model.device)
    model = (model if trainee.autocast else model.float()).requires_grad_(False)
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if isinstance(longest, int) and longest < plan.length:
        raise TrainingError(
            f"{section.model}: has {longest} positions, and data.sequence_length is {plan.length}"
        )
    if plan.document_masks:
        check_document_masks(model)
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    reporter.note(f"the teacher is held beside the model: {subject.model.name}, {size / 1e6:,.1f} MB")
    return HeldTeacher(model, subject.model.digest)


def _words(directory: Path) -> int:
    config = AutoConfig.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
    return int(config.get_text_config().vocab_size)
