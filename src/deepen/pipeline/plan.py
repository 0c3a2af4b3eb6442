"""Everything that can be decided, or be wrong, before a run costs anything."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from deepen.checkpoint import fast_fingerprint, resolve_base
from deepen.config import EvaluateSection, Recipe, TextSet
from deepen.data.files import find_files
from deepen.errors import DeepenError, RecipeError
from deepen.evaluation.suites import task_specs
from deepen.expansion import Base, Layout, count_parameters, open_base, plan_layout
from deepen.families import Family
from deepen.records import Parameters

if TYPE_CHECKING:
    from deepen.data.batches import Mixture

_MICRO_TOKENS = 16_384


@dataclass(frozen=True, kw_only=True)
class Outline:
    """A recipe resolved against the world, but for what only its tokenised texts tell.

    Attributes:
        recipe: what was asked.
        base: the base as it lies on disk, and its family.
        fingerprint: the base's, fast.
        layout: where new blocks go; None for methods that add none.
        parameters: counted from the base's headers; tied tensors once.
        windows: windows in one optimiser step.
        micro_batch: windows in one forward pass.
        known_steps: optimiser steps of the run; None: so many as make up `train.epochs`.
    """

    recipe: Recipe
    base: Base
    fingerprint: str
    layout: Layout | None
    parameters: Parameters
    windows: int
    micro_batch: int
    known_steps: int | None

    @property
    def known_tokens(self) -> int | None:
        """Tokens the run will train on, where the steps are known."""
        return self.known_steps and self._in_tokens(self.known_steps)

    @property
    def bytes_needed(self) -> int:
        """Least disk space of the run: the checkpoints kept and the one being written.

        Each holds what trains and AdamW's two moments, in fp32. There is one even where steps are not known.
        """
        train, steps = self.recipe.train, self.known_steps or 1
        written = math.ceil(steps / (train.checkpoint_every or _tenth(steps)))
        return min(train.keep_checkpoints + 1, written) * 12 * (self.parameters.trainable or 0)

    def _in_tokens(self, steps: int) -> int:
        return steps * self.windows * self.recipe.data.sequence_length


@dataclass(frozen=True, kw_only=True)
class RunPlan(Outline):
    """All the numbers of a run.

    Attributes:
        steps: optimiser steps of the run.
        evaluate_every: steps between evaluations.
        checkpoint_every: steps between checkpoints.
    """

    steps: int
    evaluate_every: int
    checkpoint_every: int

    @property
    def tokens(self) -> int:
        """Tokens the run will train on: those asked for, rounded up to whole steps."""
        return self._in_tokens(self.steps)


_T = TypeVar("_T")


def plan_run(recipe: Recipe) -> Outline:
    """Resolve a recipe: open the base, place the blocks, find the texts, count. Writes nothing.

    Raises:
        CheckpointError: the base cannot be used.
        RecipeError: faults of the recipe against this base and these files, all of them.
    """
    base = open_base(resolve_base(recipe.base))
    faults: list[str] = []
    layout = _layout(recipe, base.depth, faults)
    _check_length(recipe, base, faults)
    if recipe.train.prefix_cache != "none" and layout and 0 in layout.new_indices:
        faults.append("train.prefix_cache: has nothing to keep: a new block stands at the bottom")
    if recipe.sft is not None:
        faults.append("sft: cannot be trained on yet, only looked at with `deepen data preview`; remove it")
    for place, text in _texts(recipe):
        if text.path is not None:
            _collect(faults, place, lambda text=text: find_files(text))  # type: ignore[misc]
    _check_names(recipe, faults)
    _check_tasks(recipe.evaluate, faults)
    if faults:
        raise RecipeError("\n".join(faults))
    windows = windows_per_step(recipe)
    tokens = recipe.train.tokens
    micro = recipe.train.micro_batch or default_micro_batch(recipe.data.sequence_length)
    return Outline(
        recipe=recipe,
        base=base,
        fingerprint=fast_fingerprint(base.checkpoint),
        layout=layout,
        parameters=_count(recipe, base, layout),
        windows=windows,
        micro_batch=min(micro, windows),
        known_steps=math.ceil(tokens / (windows * recipe.data.sequence_length)) if tokens else None,
    )


def count_steps(outline: Outline, mixture: "Mixture") -> RunPlan:
    """Complete an outline by what the tokenised texts tell: how many steps make up the epochs asked for."""
    train, steps = outline.recipe.train, outline.known_steps
    if steps is None:
        assert train.epochs is not None  # the recipe has either
        steps = mixture.steps(train.epochs, outline.windows)
    return RunPlan(
        **vars(outline),
        steps=steps,
        evaluate_every=train.evaluate_every or _tenth(steps),
        checkpoint_every=train.checkpoint_every or _tenth(steps),
    )


def windows_per_step(recipe: Recipe) -> int:
    """Return how many windows come nearest to `train.batch_tokens`."""
    return max(1, round(recipe.train.batch_tokens / recipe.data.sequence_length))


def default_micro_batch(length: int) -> int:
    """Return how many windows of so many tokens pass forward at once unless a recipe says otherwise."""
    return max(1, _MICRO_TOKENS // length)


def _tenth(steps: int) -> int:
    return max(1, steps // 10)


def _layout(recipe: Recipe, depth: int, faults: list[str]) -> Layout | None:
    if (expand := recipe.expand) is None:
        return None
    return _collect(
        faults,
        "expand",
        lambda: plan_layout(
            depth, blocks=expand.blocks, placement=expand.placement, groups=expand.groups, after=expand.after
        ),
    )


def _check_length(recipe: Recipe, base: Base, faults: list[str]) -> None:
    longest = base.checkpoint.config.get("max_position_embeddings")
    if isinstance(longest, int) and recipe.data.sequence_length > longest:
        faults.append(
            f"data.sequence_length: {recipe.data.sequence_length} is more than the base's {longest} positions"
        )


def _texts(recipe: Recipe) -> list[tuple[str, TextSet]]:
    return [
        *((f"data.sources.{i}", source) for i, source in enumerate(recipe.data.sources)),
        *((f"evaluate.general.{i}", text) for i, text in enumerate(recipe.evaluate.general)),
        *((f"evaluate.domain.{i}", text) for i, text in enumerate(recipe.evaluate.domain)),
    ]


def _check_names(recipe: Recipe, faults: list[str]) -> None:
    evaluated = [text.label for text in (*recipe.evaluate.general, *recipe.evaluate.domain)]
    if recipe.data.heldout:
        evaluated += [heldout_name(source) for source in recipe.data.sources]
    trained = [source.label for source in recipe.data.sources]
    for where, names in (("evaluate", evaluated), ("data.sources", trained)):
        for name in sorted({name for name in names if names.count(name) > 1}):
            faults.append(f"{where}: two texts are called {name}; give one of them another name")


def _check_tasks(section: EvaluateSection, faults: list[str]) -> None:
    _collect(faults, "evaluate", lambda: task_specs(section.suites, section.tasks))
    if section.local is not None and not Path(section.local).is_dir():
        faults.append(f"evaluate.local: {section.local}: no such directory of local datasets")


def heldout_name(source: TextSet) -> str:
    """Name of the held-out documents of a training source in results."""
    return f"{source.label}-heldout"


def _collect(faults: list[str], place: str, work: Callable[[], _T]) -> _T | None:
    try:
        return work()
    except DeepenError as error:
        faults.append(f"{place}: {error}")
        return None


def _is_buffer(name: str, family: Family) -> bool:
    place = family.split(name)
    return place is not None and family.is_buffer(place[1])


def _count(recipe: Recipe, base: Base, layout: Layout | None) -> Parameters:
    """Count from the headers; a tied head that the files repeat counts once."""
    checkpoint, family, train = base.checkpoint, base.family, recipe.train
    tied = family.tied if family.is_tied(checkpoint.config) else {}
    parameters = (tensor for name, tensor in checkpoint.tensors.items() if name not in tied)
    tensors = [tensor for tensor in parameters if not _is_buffer(tensor.name, family)]
    total = count_parameters(tensors)
    if layout is None:
        return Parameters(base=total, new=0, trainable=total if train.method == "full" else None)
    copied = [block.copy_of for block in layout.new_blocks]
    places = ((family.split(tensor.name), tensor) for tensor in tensors)
    new = sum(count_parameters([tensor]) * copied.count(place[0]) for place, tensor in places if place)
    return Parameters(base=total, new=new, trainable=new)
