"""Cells that are runs: a recipe, and what its result depends on."""

import hashlib
import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

from deepen.blocks import BLOCKS_NAME
from deepen.config import Recipe, TextSet, load_recipe
from deepen.data.conversation_build import conversation_contents
from deepen.data.sources import open_source
from deepen.errors import Diverged, OutputError
from deepen.expansion import NewBlock
from deepen.pipeline.directory import RunDirectory, deciding
from deepen.pipeline.plan import Outline
from deepen.pipeline.reporter import Reporter
from deepen.records import (
    CellRecord,
    EvaluationRecord,
    Provenance,
    RunFacts,
    RunResult,
    read_metrics,
    read_record,
)
from deepen.studies.cells import RECORD, Cell, Computed

# Raised when a change of deepen changes what equal inputs give; a default of the recipe, for one.
_VERSION: Final = 1
BLOCKS: Final = "blocks"
_WEIGHTS: Final = ("checkpoints", "model", "adapter")
_PLACES: Final = (
    ("data", "sources"),
    ("data", "anchor"),
    ("sft", "data"),
    ("evaluate", "general"),
    ("evaluate", "domain"),
)


def run_cell(
    name: str,
    recipe: Recipe,
    outline: Outline,
    texts: Mapping[str, Any],
    *,
    keep_models: bool,
    keep_blocks: bool = False,
    begins_with: Mapping[str, str] | None = None,
) -> Cell:
    """Return the cell that a recipe is; its `output` does not count.

    Args:
        name: readable.
        recipe: of the run.
        outline: of a run from the same base to the same layout.
        texts: digests of everything it reads, from `text_digests`.
        keep_models: whether what trained stays when the cell is finished.
        keep_blocks: whether a block pack does in any case: other cells begin with it.
        begins_with: identifies the pack of another cell that the run begins with.
    """
    inputs: dict[str, Any] = {
        "kind": "run",
        "version": _VERSION,
        "base": outline.fingerprint,
        "layout": outline.layout and [_begun(block) for block in outline.layout.new_blocks],
        "texts": dict(texts),
        "recipe": _settings(recipe),
    }
    if begins_with:
        inputs["begins_with"] = dict(begins_with)
    discarded = () if keep_models else _WEIGHTS if keep_blocks else (*_WEIGHTS, BLOCKS)
    of_base = {key: inputs[key] for key in ("base", "texts")}
    return Cell(
        name=name,
        inputs=inputs,
        compute=partial(_compute, recipe, outline.train.method, discarded, of_base),
    )


def _begun(block: NewBlock) -> list[int | str]:
    """What decides where a new block begins; how it is made, where not as by default."""
    made = (block.init, block.zero)
    return [block.after, block.copy_of, *(made if made != ("copy", "writes") else ())]


def _settings(recipe: Recipe) -> dict[str, Any]:
    """Return what of a recipe decides a result beside what is digested."""
    settings = deciding(recipe, defaults=False)
    for key in ("base", "expand", "pack"):  # one new block is on top, interleaved or not: the layout decides
        settings.pop(key, None)
    if recipe.data and not _reads_sources(recipe):
        settings["data"] = {"sequence_length": recipe.data.sequence_length}
    for section, key in _PLACES:
        held = settings.get(section) or {}
        if held.get(key):
            held[key] = [_without_place(text) for text in held[key]]
    return settings


def _reads_sources(recipe: Recipe) -> bool:
    """Whether the training texts count: tuning alone only evaluates their held-out documents."""
    return recipe.data is not None and bool(recipe.train or recipe.data.heldout)


def text_digests(recipe: Recipe, cache: Path) -> dict[str, Any]:
    """Return what identifies the contents of all that a recipe reads, and of its own task files.

    Raises:
        DataError: a text is missing.
        OutputError: the cache, which remembers digests, cannot be written.
    """
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{cache}: cannot be written ({error.strerror})") from None

    def contents(texts: tuple[TextSet, ...]) -> list[list[list[str]]]:
        return [open_source(text, cache).contents for text in texts]

    evaluate = recipe.evaluate
    found: dict[str, Any] = {
        "sources": contents(recipe.data.sources if recipe.data and _reads_sources(recipe) else ()),
        "general": contents(evaluate.general),
        "domain": contents(evaluate.domain),
    }
    if recipe.data and recipe.data.anchor:
        found["anchor"] = contents(recipe.data.anchor)
    if recipe.sft:
        sets = [conversation_contents(one, cache) for one in recipe.sft.data]
        found["conversations"] = [[[Path(name).suffix, digest] for name, digest in one] for one in sets]
    template = (recipe.sft and recipe.sft.template) or ""
    named = [Path(name) for name in (*evaluate.suites, *evaluate.tasks, template) if Path(name).is_file()]
    return found | ({"tasks": [path.read_text("utf-8") for path in named]} if named else {})


def _without_place(text: Mapping[str, Any]) -> dict[str, Any]:
    """A text's settings without where it lies: its contents decide, which are digested."""
    return {key: value for key, value in text.items() if key not in ("path", "hub", "revision", "stream")}


def _compute(
    recipe: Recipe,
    method: str,
    discarded: Sequence[str],
    of_base: Mapping[str, Any],
    directory: Path,
    reporter: Reporter,
) -> Computed:
    from deepen.pipeline.run import run_recipe

    run, asked = RunDirectory(directory), recipe.model_copy(update={"output": str(directory)})
    try:
        beside = _with_the_same_base(directory.parent, of_base)
        moved = _moved(run, asked)
        result = run_recipe(asked, resume=True, overwrite=moved, reporter=reporter, beside=beside)
        facts = _facts(run, result)
    except Diverged as error:
        # A result too: this recipe, run again, does the same.
        facts = RunFacts(method=method, diverged=str(error))
    # Records stay.
    for name in discarded:
        shutil.rmtree(run.root / name, ignore_errors=True)
    return Computed(result=facts.model_dump(mode="json"), provenance=read_record(run.environment, Provenance))


def _with_the_same_base(cells: Path, of_base: Mapping[str, Any]) -> Path | None:
    """Return a finished cell of the same base and texts: what the base scores need not be found again."""
    for path in sorted(cells.glob(f"*/{RECORD}")):
        inputs = read_record(path, CellRecord).inputs
        if {key: inputs.get(key) for key in of_base} == of_base:
            return path.parent
    return None


def _moved(run: RunDirectory, recipe: Recipe) -> bool:
    """Whether a run was begun when its texts lay elsewhere: equal, for its key is, but not known to be so."""
    return run.recipe.exists() and deciding(load_recipe(run.recipe)) != deciding(recipe)


def _facts(run: RunDirectory, result: RunResult) -> RunFacts:
    heldout = read_record(run.evaluation / "heldout.json", EvaluationRecord)
    training, _ = read_metrics(run.metrics)
    speeds = [(p.flops_per_second, p.tokens_per_second) for p in training]
    costs = [flops / tokens for flops, tokens in speeds if flops and tokens]
    return RunFacts(
        method=result.method,
        layout=result.layout,
        trainable=result.parameters.trainable or 0,
        tokens=result.tokens,
        steps=result.steps,
        seconds=result.seconds,
        flops=float(f"{costs[-1] * result.tokens:.4g}") if costs else None,
        pack=_pack_digest(run.root / BLOCKS),
        metrics=[metric for metric in heldout.metrics if metric.metric == "nats_per_token"],
    )


def _pack_digest(pack: Path) -> str | None:
    """Digest of the tensors of a pack; None where there is none."""
    if not (pack / BLOCKS_NAME).exists():
        return None
    with (pack / BLOCKS_NAME).open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()[:32]
