"""The cells of a study of continual learning: the base, and each method with each seed."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Final

import torch

from deepen.checkpoint import fast_fingerprint, resolve_base
from deepen.config import ContinualRecipe, SequenceMethod
from deepen.data.chat import ChatTemplate, choose_template
from deepen.data.conversation_build import prepare_conversations
from deepen.data.conversation_corpus import ConversationCorpus
from deepen.data.sources import open_source
from deepen.data.tokens import tokenizer_digest
from deepen.errors import OutputError, RecipeError
from deepen.expansion import open_base
from deepen.pipeline.evaluate import choose_device
from deepen.pipeline.reporter import Reporter
from deepen.pipeline.subject import find_subject
from deepen.pipeline.texts import default_cache, load_tokenizer
from deepen.records import LearnedTask, capture_provenance, read_record
from deepen.studies.cells import Cell, Computed
from deepen.studies.continual.answering import answer_tasks, general_losses
from deepen.studies.continual.models import open_learner, saved_model
from deepen.studies.continual.tasks import Task, read_tasks, write_questions
from deepen.studies.continual.training import LEARNED, TRAINED, learn_task, mix_task

# Raised when a change of deepen changes what equal inputs give.
_VERSION: Final = 1
# What does not decide a result, or does so by rounding at most; methods, seeds and tasks come in apart.
_HOW: Final = frozenset(
    {"base", "output", "trace", "tasks", "methods", "seeds", "template", "general", "micro_batch", "device"}
    | {"keep", "answer_batch", "train_items", "test_items", "deltas"}
)
ANSWERS: Final = "answers"
GENERAL: Final = "general.json"


@dataclass(frozen=True)
class TaskSequence:
    """All that the cells of a study share.

    Attributes:
        recipe: of the study.
    """

    recipe: ContinualRecipe

    @cached_property
    def base(self) -> Path:
        """Directory of the base.

        Raises:
            CheckpointError: there is none.
            RecipeError: it has fewer positions than a window.
        """
        base = open_base(resolve_base(self.recipe.base))
        most = base.checkpoint.config.get("max_position_embeddings")
        if isinstance(most, int) and self.recipe.sequence_length > most:
            asked = self.recipe.sequence_length
            raise RecipeError(f"sequence_length: {asked} is more than the base's {most} positions")
        return base.checkpoint.directory

    @cached_property
    def tokenizer(self) -> Any:
        """The base's."""
        return load_tokenizer(self.base)

    @cached_property
    def template(self) -> ChatTemplate:
        """How prompts and answers become one text."""
        return choose_template(self.tokenizer, self.recipe.template)

    @cached_property
    def tasks(self) -> list[Task]:
        """The tasks in order, as they fit the model."""
        return read_tasks(self.recipe, self.tokenizer, self.template)

    @cached_property
    def cache(self) -> Path:
        """Where tokenised tasks and digests of texts lie.

        Raises:
            OutputError: it cannot be written.
        """
        cache = default_cache()
        try:
            cache.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"{cache}: cannot be written ({error.strerror})") from None
        return cache

    @cached_property
    def device(self) -> torch.device:
        """Where models train and answer."""
        return choose_device(self.recipe.device)

    def cells(self) -> dict[tuple[str, int | None], Cell]:
        """Return (method, seed) -> cell; the base first, which has no seed.

        Raises:
            DeepenError: the base or a task cannot be used.
        """
        shared = self._inputs
        name = "base"
        cells = {(name, None): Cell(name=name, inputs={**shared, "method": name}, compute=self._answer)}
        learned = [task.learned_digest for task in self.tasks]
        return cells | {
            (method.name, seed): Cell(
                name=f"{method.name}-{seed}",
                inputs={**shared, "method": _deciding(method), "seed": seed, "learned": learned},
                compute=partial(self._learn, method, seed),
            )
            for method in self.recipe.methods
            for seed in self.recipe.seeds
        }

    @cached_property
    def _inputs(self) -> dict[str, Any]:
        # What stands at its default is left out, so that a key survives new keys of the recipe.
        asked = self.recipe.model_dump(mode="json", exclude_defaults=True)
        return {
            "kind": "continual",
            "version": _VERSION,
            "base": fast_fingerprint(open_base(self.base).checkpoint),
            "tokenizer": tokenizer_digest(self.tokenizer),
            "template": self.template.source,
            "tested": {task.name: task.tested_digest for task in self.tasks},
            "general": [open_source(text, self.cache).contents for text in self.recipe.general],
            "recipe": {key: value for key, value in asked.items() if key not in _HOW},
        }

    def _answer(self, directory: Path, reporter: Reporter) -> Computed:
        """Test the base on every task."""
        self._test(str(self.base), None, list(range(len(self.tasks))), directory, reporter)
        return self._computed({})

    def _learn(self, asked: SequenceMethod, seed: int, directory: Path, reporter: Reporter) -> Computed:
        """Learn the tasks one after another; after each, answer it, all before it and the one after it."""
        corpora = self._corpora(directory, reporter)
        learned, before = [], None
        for number, task in enumerate(self.tasks):
            here = directory / f"{number + 1}-{task.name}"
            learned.append(self._learn_one(number, asked, seed, corpora, here, before, reporter))
            tested = list(range(min(number + 2, len(self.tasks))))
            self._test(str(saved_model(here / TRAINED)), str(self.base), tested, here, reporter)
            if before is not None and self.recipe.keep == "last":
                _discard(before)
            before = here / TRAINED
        return self._computed({"learned": [one.model_dump(mode="json") for one in learned]})

    def _learn_one(
        self,
        number: int,
        asked: SequenceMethod,
        seed: int,
        corpora: list[ConversationCorpus],
        here: Path,
        before: Path | None,
        reporter: Reporter,
    ) -> LearnedTask:
        held = here / TRAINED / LEARNED
        if held.exists():
            return read_record(held, LearnedTask)
        here.mkdir(parents=True, exist_ok=True)
        recipe, task = self.recipe, self.tasks[number]
        mixture = mix_task(corpora[: number + 1], asked, recipe.sequence_length, seed)
        learner = open_learner(recipe, asked, self.base, before, seed + number, self.device)
        reporter.stage(f"learning {task.name}")
        return learn_task(learner, mixture, task.epochs, recipe, asked, here, seed + number, reporter)

    def _test(self, model: str, base: str | None, tested: list[int], here: Path, reporter: Reporter) -> None:
        """Answer the tests and score general text; what lies there already is kept."""
        subject, recipe = find_subject(model, base), self.recipe
        tasks = [self.tasks[number] for number in tested]
        answer_tasks(
            subject, tasks, recipe, self.tokenizer, self.template, here / ANSWERS, self.device, reporter
        )
        general_losses(subject, recipe, here / GENERAL, self.device, reporter)

    def _corpora(self, directory: Path, reporter: Reporter) -> list[ConversationCorpus]:
        reporter.stage("reading the tasks")
        return [
            prepare_conversations(
                write_questions(task, directory / "questions" / f"{task.name}.jsonl"),
                self.tokenizer,
                self.template,
                self.recipe.sequence_length,
                cache=self.cache,
            )
            for task in self.tasks
        ]

    def _computed(self, result: Mapping[str, Any]) -> Computed:
        return Computed(result=result, provenance=capture_provenance())


def _deciding(method: SequenceMethod) -> dict[str, Any]:
    """A method's settings without its name, which decides nothing."""
    return method.model_dump(mode="json", exclude={"name"}, exclude_defaults=True)


def _discard(trained: Path) -> None:
    """Remove a task's model; what was learned of it stays on record."""
    for path in trained.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
