"""Cells of a study of knowledge: training once a seed, and tunings that begin with it or with the base."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

from deepen.config import KnowledgeRecipe, Recipe, build_recipe
from deepen.errors import RecipeError
from deepen.pipeline.plan import Outline, plan_run, tuning_recipe
from deepen.pipeline.texts import corpus_cache
from deepen.records import RunFacts
from deepen.studies.cells import Cell, Store
from deepen.studies.engine import Finished, Slot
from deepen.studies.grid import check_free, merged
from deepen.studies.knowledge.answers import answers_cell
from deepen.studies.runs import BLOCKS, run_cell, text_digests

BASE_TUNED: Final = "base + SFT"
EXPANDED: Final = "expanded"
EXPANDED_TUNED: Final = "expanded + SFT"
_NEEDED: Final = ("expand", "data", "train", "sft")
# Keys of `run` that the study decides.
_DECIDED: Final = (
    *(("output",), ("pack",), ("train", "seed")),
    *(("sft", "seed"), ("sft", "trainable")),
)
_WAYS: Final = ("all", "new")
# Keys of `sft` that decide what is tuned on and which answers are scored: the same for all rows.
_SAME: Final = ("data", "template", "sequence_length", "heldout", "seed")


@dataclass(frozen=True, kw_only=True)
class Part:
    """A place of the study.

    Attributes:
        row: of the table that it belongs to.
        seed: of its training, or of its tuning and the training before that.
        slot: its cell, if that is known.
        outline: of its run; None where nothing trains.
    """

    row: str
    seed: int
    slot: Slot
    outline: Outline | None


class KnowledgeCells:
    """All cells of a study, and which of them are known by now."""

    def __init__(self, study: KnowledgeRecipe, store: Store) -> None:
        """Check every cell before any is computed.

        Raises:
            RecipeError: faults of a cell's recipe.
            DeepenError: the base or a text cannot be used.
        """
        _check(study)
        self.study, self.store = study, store
        self.tunings: dict[str, Mapping[str, Any]] = {EXPANDED_TUNED: {}}
        self.tunings |= {f"{EXPANDED} + {label}": settings for label, settings in study.also.items()}
        self._texts = cache(self._read_texts)
        self._training = cache(self._training_cell)
        first = study.seeds[0]
        self.trains = plan_run(self._trains(first))
        self.tunes_base = plan_run(self._tunes_base(first))
        self.tunes = {row: plan_run(self._tunes_expanded(row, first)) for row in self.tunings}

    @property
    def rows(self) -> list[str]:
        """Return the rows of the table beside the base's; the others are compared with the first."""
        return [BASE_TUNED, EXPANDED, *self.tunings]

    def plan(self, finished: Finished) -> list[Slot]:
        """Return every place: first what begins with the base, then what begins with trained blocks."""
        return [part.slot for part in self.parts(finished)]

    def parts(self, finished: Finished) -> list[Part]:
        """Return `plan`, each with the row and the seed it belongs to."""
        seeds = self.study.seeds
        begun = [part for seed in seeds for part in self._from_base(seed)]
        return begun + [part for seed in seeds for part in self._from_blocks(seed, finished)]

    def _from_base(self, seed: int) -> Iterator[Part]:
        trained, tuned = self._training(seed), self._base_cell(seed)
        yield Part(row=EXPANDED, seed=seed, slot=Slot(name=trained.name, cell=trained), outline=self.trains)
        yield Part(row=BASE_TUNED, seed=seed, slot=Slot(name=tuned.name, cell=tuned), outline=self.tunes_base)

    def _from_blocks(self, seed: int, finished: Finished) -> Iterator[Part]:
        trained = finished(self._training(seed))
        facts = RunFacts.model_validate(trained.result) if trained else None
        why = "the new blocks"
        if facts and facts.pack is None:
            why = "the new blocks, whose training diverged"
        if self._holds_answers:
            name = f"answers-seed{seed}"
            cell = self._answers_cell(name, seed, facts.pack) if facts and facts.pack else None
            slot = Slot(name=name, cell=cell, waits_for="" if cell else why)
            yield Part(row=EXPANDED, seed=seed, slot=slot, outline=None)
        for row in self.tunings:
            name = f"{row.replace(' + ', '-').lower()}-seed{seed}"
            cell = self._tuning_cell(name, row, seed, facts.pack) if facts and facts.pack else None
            slot = Slot(name=name, cell=cell, waits_for="" if cell else why)
            yield Part(row=row, seed=seed, slot=slot, outline=self.tunes[row])

    @property
    def _holds_answers(self) -> bool:
        sft = self.tunes_base.recipe.sft
        return bool(sft and sft.heldout)

    def _both(self, seed: int, settings: Mapping[str, Any] | None = None) -> Recipe:
        """Return the recipe of both stages."""
        seeds = {"train": {"seed": seed}, "sft": {"seed": seed}}
        raw = merged(merged(self.study.run, {"output": "cell", **seeds}), {"sft": settings or {}})
        return build_recipe(raw, "run")

    def _trains(self, seed: int) -> Recipe:
        return self._both(seed).model_copy(update={"sft": None})

    def _tunes_base(self, seed: int) -> Recipe:
        return tuning_recipe(self._both(seed)).model_copy(update={"pack": None})

    def _tunes_expanded(self, row: str, seed: int) -> Recipe:
        """Return the recipe of a tuning as if the new blocks were untrained, which `plan_run` can look at."""
        both = self._both(seed, self.tunings[row])
        return tuning_recipe(both).model_copy(update={"pack": None, "expand": both.expand})

    def _tunes_blocks(self, row: str, seed: int) -> Recipe:
        """Return the recipe of a tuning on the trained blocks, which are there."""
        pack = self.store.directory(self._training(seed)) / BLOCKS
        both = self._both(seed, self.tunings[row])
        return tuning_recipe(both).model_copy(update={"pack": str(pack)})

    def _training_cell(self, seed: int) -> Cell:
        recipe = self._trains(seed)
        return run_cell(
            f"trained-seed{seed}",
            recipe,
            self.trains,
            self._texts(EXPANDED),
            keep_models=self.study.keep_models,
            keep_blocks=True,
        )

    def _base_cell(self, seed: int) -> Cell:
        recipe, texts = self._tunes_base(seed), self._texts(BASE_TUNED)
        name, keep = f"base-sft-seed{seed}", self.study.keep_models
        return run_cell(name, recipe, self.tunes_base, texts, keep_models=keep)

    def _tuning_cell(self, name: str, row: str, seed: int, pack: str) -> Cell:
        return run_cell(
            name,
            self._tunes_blocks(row, seed),
            self.tunes[row],
            self._texts(row),
            keep_models=self.study.keep_models,
            begins_with={"cell": self._training(seed).key, "pack": pack},
        )

    def _answers_cell(self, name: str, seed: int, pack: str) -> Cell:
        tuning = self._tuning_cell(name, EXPANDED_TUNED, seed, pack)
        return answers_cell(name, self._tunes_blocks(EXPANDED_TUNED, seed), tuning)

    def _read_texts(self, row: str) -> dict[str, Any]:
        outlines = {EXPANDED: self.trains, BASE_TUNED: self.tunes_base, **self.tunes}
        recipe = outlines[row].recipe
        return text_digests(recipe, corpus_cache(recipe))


def _check(study: KnowledgeRecipe) -> None:
    check_free(study.run, _DECIDED)
    for key in _NEEDED:
        if study.run.get(key) is None:
            raise RecipeError(f"run.{key}: missing; a study of knowledge trains new blocks and tunes")
    for label, settings in study.also.items():
        if same := [key for key in _SAME if key in settings]:
            raise RecipeError(f"also.{label}.{same[0]}: is the same for all rows; remove it there")
        if (way := settings.get("trainable", "all")) not in _WAYS:
            raise RecipeError(f"also.{label}.trainable: {way!r} is neither of {', '.join(_WAYS)}")
        if label == "SFT":
            raise RecipeError("also.SFT: is what the row of run.sft is called; choose another name")
