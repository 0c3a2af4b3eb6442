"""Everything that can be decided, or be wrong, before a run costs anything."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, TypeVar

from deepen.blocks import Pack, check_pack, open_pack
from deepen.checkpoint import fast_fingerprint, resolve_base
from deepen.config import EvaluateSection, Place, Recipe, SftSection, TrainSection
from deepen.data.files import find_files
from deepen.errors import CheckpointError, DeepenError, RecipeError
from deepen.evaluation.suites import task_specs
from deepen.expansion import Base, Layout, count_parameters, expanded_tensors, find_tables, open_base
from deepen.families import Family
from deepen.pipeline.placement import place_blocks
from deepen.records import Parameters

if TYPE_CHECKING:
    from deepen.data.batches import Mixture

_MICRO_TOKENS: Final = 16_384
# arXiv 2401.02415, section 4.1.
_PAPER_LENGTH: Final = 4096


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What a run trains on and how: texts, or conversations.

    Attributes:
        name: the section of the recipe that says so.
        train: how; of conversations, the same in words of training on texts.
        length: tokens in a window.
        labels: names of the sources.
        document_masks: whether no document sees another.
    """

    name: Literal["train", "sft"]
    train: TrainSection
    length: int
    labels: tuple[str, ...]
    document_masks: bool


@dataclass(frozen=True, kw_only=True)
class Outline(Stage):
    """A recipe resolved against the world, but for what only its tokenised texts tell.

    Attributes:
        recipe: what was asked.
        base: the base as it lies on disk, and its family.
        fingerprint: the base's, fast.
        layout: where new blocks go, or are those of the pack; None for methods that add none.
        pack: what is put on the base first.
        parameters: counted from the base's headers; tied tensors once.
        windows: windows in one optimiser step.
        micro_batch: windows in one forward pass.
        known_steps: optimiser steps of the run; None: so many as make up `train.epochs`.
    """

    recipe: Recipe
    base: Base
    fingerprint: str
    layout: Layout | None
    pack: Path | None
    parameters: Parameters
    windows: int
    micro_batch: int
    known_steps: int | None

    @property
    def anchor_windows(self) -> int:
        """Windows of the anchor in one step; 0 without one."""
        anchor = self.train.anchor
        return anchor.windows(self.windows) if anchor else 0

    @property
    def known_tokens(self) -> int | None:
        """Tokens the run will train on, where the steps are known."""
        return self.known_steps and self._in_tokens(self.known_steps)

    @property
    def bytes_needed(self) -> int:
        """Least disk space of the run: the checkpoints kept and the one being written.

        Each holds what trains and AdamW's two moments, in fp32. There is one even where steps are not known,
        and two more, one held and one being written, for `train.max_general_loss`. Those of tuning
        afterwards stand beside them.
        """
        train, steps, trainable = self.train, self.known_steps or 1, self.parameters.trainable or 0
        written = math.ceil(steps / (train.checkpoint_every or _tenth(steps)))
        count = min(train.keep_checkpoints + 1, written) + (2 if train.max_general_loss else 0)
        tuned = 0
        if self.name == "train" and self.recipe.sft:
            everything = self.parameters.base + self.parameters.new
            tuned = {"all": everything, "new": self.parameters.new, "lora": 0}[self.recipe.sft.trainable]
        return 12 * (count * trainable + tuned)

    def _in_tokens(self, steps: int) -> int:
        return steps * self.windows * self.length


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
    fingerprint = fast_fingerprint(base.checkpoint)
    pack = _open_pack(recipe, base, faults)
    layout = pack.expansion.layout if pack else _layout(recipe, base, fingerprint, faults)
    _check_length(recipe, base, faults)
    if recipe.train and recipe.train.prefix_cache != "none" and layout and 0 in layout.new_indices:
        faults.append("train.prefix_cache: has nothing to keep: a new block stands at the bottom")
    if recipe.train and recipe.train.new_rows:
        _collect(faults, "train.new_rows", lambda: count_new_rows(base))
    for place, text in _texts(recipe):
        if text.path is not None:
            _collect(faults, place, lambda text=text: find_files(text))  # type: ignore[misc]
    _check_names(recipe, faults)
    _check_teacher(recipe, base, faults)
    _check_tasks(recipe.evaluate, faults)
    if faults:
        raise RecipeError("\n".join(faults))
    stage = _stage(recipe, base)
    train, windows = stage.train, windows_per_step(stage.train, stage.length)
    micro = train.micro_batch or default_micro_batch(stage.length)
    return Outline(
        **vars(stage),
        recipe=recipe,
        base=base,
        fingerprint=fingerprint,
        layout=layout,
        pack=pack.directory if pack else None,
        parameters=_count(train, base, layout),
        windows=windows,
        micro_batch=min(micro, windows),
        known_steps=math.ceil(train.tokens / (windows * stage.length)) if train.tokens else None,
    )


def _stage(recipe: Recipe, base: Base) -> Stage:
    """Say what comes first: training, or tuning where there is none."""
    if recipe.train is None:
        assert recipe.sft is not None  # the recipe has either
        length = window_length(recipe.sft, base.checkpoint.config)
        return Stage(
            name="sft",
            train=recipe.sft.as_training(length),
            length=length,
            labels=tuple(one.label for one in recipe.sft.data),
            document_masks=True,
        )
    data, train = recipe.training()
    return Stage(
        name="train",
        train=train,
        length=data.sequence_length,
        labels=tuple(source.label for source in data.sources),
        document_masks=data.document_masks,
    )


def window_length(section: SftSection, config: Mapping[str, Any]) -> int:
    """Return the tokens of a window of conversations: as asked, or the paper's as far as the base goes.

    Args:
        section: what was asked.
        config: the base's config.json.

    Raises:
        RecipeError: the base has fewer positions than that.
    """
    positions = config.get("max_position_embeddings")
    most = positions if isinstance(positions, int) else None
    asked = section.sequence_length
    if asked is None:
        return min(_PAPER_LENGTH, most or _PAPER_LENGTH)
    if most is not None and asked > most:
        raise RecipeError(f"sft.sequence_length: {asked} is more than the base's {most} positions")
    return asked


def tuning_recipe(recipe: Recipe) -> Recipe:
    """Return what tunes after training, as a recipe of its own: in `sft/`, on the pack that training left."""
    assert recipe.sft is not None
    keeps = recipe.sft.trainable == "new"
    measured = {} if keeps else {"shift": False, "effects": False, "switch": None}
    evaluate = recipe.evaluate.model_copy(update=measured)
    changes = {
        "output": str(Path(recipe.output) / "sft"),
        "expand": None,
        "pack": str(Path(recipe.output) / "blocks"),
        "train": None,
        "evaluate": evaluate,
    }
    return recipe.model_copy(update=changes)


def count_steps(outline: Outline, mixture: "Mixture") -> RunPlan:
    """Complete an outline by what the tokenised texts tell: how many steps make up the epochs asked for."""
    train, steps = outline.train, outline.known_steps
    if steps is None:
        assert train.epochs is not None  # the recipe has either
        steps = mixture.steps(train.epochs, outline.windows)
    return RunPlan(
        **vars(outline),
        steps=steps,
        evaluate_every=train.evaluate_every or _tenth(steps),
        checkpoint_every=train.checkpoint_every or _tenth(steps),
    )


def windows_per_step(train: TrainSection, length: int) -> int:
    """Return how many windows of so many tokens come nearest to `train.batch_tokens`."""
    return max(1, round(train.batch_tokens / length))


def default_micro_batch(length: int) -> int:
    """Return how many windows of so many tokens pass forward at once unless a recipe says otherwise."""
    return max(1, _MICRO_TOKENS // length)


def _tenth(steps: int) -> int:
    return math.ceil(steps / 10)


def _layout(recipe: Recipe, base: Base, fingerprint: str, faults: list[str]) -> Layout | None:
    if (expand := recipe.expand) is None:
        return None

    def placed() -> Layout:
        layout = place_blocks(expand, base.depth, fingerprint)
        expanded_tensors(base, layout)  # neighbours that cannot be made one are refused here
        return layout

    return _collect(faults, "expand", placed)


def _open_pack(recipe: Recipe, base: Base, faults: list[str]) -> Pack | None:
    if recipe.pack is None:
        return None

    def opened(name: str = recipe.pack) -> Pack:
        held = open_pack(name)
        check_pack(held, base)
        return held

    return _collect(faults, "pack", opened)


def _check_length(recipe: Recipe, base: Base, faults: list[str]) -> None:
    longest = base.checkpoint.config.get("max_position_embeddings")
    if recipe.data and isinstance(longest, int) and recipe.data.sequence_length > longest:
        faults.append(
            f"data.sequence_length: {recipe.data.sequence_length} is more than the base's {longest} positions"
        )
    if recipe.sft is not None:
        try:
            window_length(recipe.sft, base.checkpoint.config)
        except RecipeError as error:
            faults.append(str(error))


def _texts(recipe: Recipe) -> list[tuple[str, Place]]:
    data = recipe.data
    return [
        *((f"data.sources.{i}", source) for i, source in enumerate(data.sources if data else ())),
        *((f"data.anchor.{i}", source) for i, source in enumerate(data.anchor if data else ())),
        *((f"sft.data.{i}", one) for i, one in enumerate(recipe.sft.data if recipe.sft else ())),
        *((f"evaluate.general.{i}", text) for i, text in enumerate(recipe.evaluate.general)),
        *((f"evaluate.domain.{i}", text) for i, text in enumerate(recipe.evaluate.domain)),
    ]


def _check_names(recipe: Recipe, faults: list[str]) -> None:
    evaluated = [text.label for text in (*recipe.evaluate.general, *recipe.evaluate.domain)]
    trained: dict[str, list[str]] = {}
    for where, section, sources in (
        ("data.sources", recipe.data, recipe.data.sources if recipe.data else ()),
        ("sft.data", recipe.sft, recipe.sft.data if recipe.sft else ()),
    ):
        trained[where] = [source.label for source in sources]
        if section and section.heldout:
            evaluated += [heldout_name(source) for source in sources]
    for where, names in (("evaluate", evaluated), *trained.items()):
        kind = "sets" if where == "sft.data" else "texts"
        for name in sorted({name for name in names if names.count(name) > 1}):
            faults.append(f"{where}: two {kind} are called {name}; give one of them another name")


def _check_teacher(recipe: Recipe, base: Base, faults: list[str]) -> None:
    if recipe.train and (section := recipe.train.teacher):
        from deepen.pipeline.teacher import check_teacher

        where = base.checkpoint.directory
        _collect(faults, "train.teacher", lambda: check_teacher(section, recipe.base, where))


def _check_tasks(section: EvaluateSection, faults: list[str]) -> None:
    _collect(faults, "evaluate", lambda: task_specs(section.suites, section.tasks))
    if section.local is not None and not Path(section.local).is_dir():
        faults.append(f"evaluate.local: {section.local}: no such directory of local datasets")


def heldout_name(source: Place) -> str:
    """Name of the held-out documents of a training source in results."""
    return f"{source.label}-heldout"


def _collect(faults: list[str], place: str, work: Callable[[], _T]) -> _T | None:
    try:
        return work()
    except DeepenError as error:
        faults.append(f"{place}: {error}")
        return None


def count_new_rows(base: Base) -> int:
    """Return the parameters of the rows of a base's new tokens.

    Raises:
        CheckpointError: its vocabulary was not extended.
    """
    from deepen.vocabulary import VOCABULARY_NAME, read_vocabulary  # which brings torch

    if (record := read_vocabulary(base.checkpoint.directory)) is None:
        raise CheckpointError(
            f"{base.checkpoint.directory} has no {VOCABULARY_NAME}, so no row is new; "
            "deepen vocabulary extend writes one"
        )
    tables = find_tables(base)
    own = [base.checkpoint.tensors[name] for name in (tables.inputs[0], *tables.outputs)]
    return count_parameters(own) // tables.rows * (tables.rows - record.base_rows)


def _is_buffer(name: str, family: Family) -> bool:
    place = family.split(name)
    return place is not None and family.is_buffer(place[1])


def _count(train: TrainSection, base: Base, layout: Layout | None) -> Parameters:
    """Count from the headers; a tied head that the files repeat counts once."""
    checkpoint, family = base.checkpoint, base.family
    tied = family.tied if family.is_tied(checkpoint.config) else {}
    parameters = (tensor for name, tensor in checkpoint.tensors.items() if name not in tied)
    tensors = [tensor for tensor in parameters if not _is_buffer(tensor.name, family)]
    total = count_parameters(tensors)
    copied = [block.copy_of for block in layout.new_blocks] if layout else []
    places = ((family.split(tensor.name), tensor) for tensor in tensors)
    new = sum(count_parameters([tensor]) * copied.count(place[0]) for place, tensor in places if place)
    rows = count_new_rows(base) if train.new_rows else 0
    known = {"full": total + new, "blocks": new + rows}
    return Parameters(base=total, new=new, trainable=known.get(train.method))
