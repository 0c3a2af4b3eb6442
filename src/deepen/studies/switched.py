"""What a study's rows are with a switch: a table beside its own, as it is of other tokens."""

from collections.abc import Sequence
from statistics import fmean

from deepen.config import TextSet
from deepen.pipeline.directory import RunDirectory
from deepen.records import Role, StudySwitch, SwitchErrors, SwitchEvaluation, SwitchTally, read_record
from deepen.studies.cells import Store
from deepen.studies.grid import Grid, Place, labels
from deepen.studies.table import Texts, finished_cells, needed, pooled_score


def switched_rows(grid: Grid, store: Store) -> list[StudySwitch]:
    """Return a row for each place whose cells measure a switch, of those finished, by domain.

    Raises:
        DataError: a record is missing or malformed.
        StudyError: two cells were not evaluated on the same items.
    """
    return [row for place in grid.places if (row := _row(grid, place, store))]


def _row(grid: Grid, place: Place, store: Store) -> StudySwitch | None:
    rate = grid.rate(place, store.finished)
    if rate is None:
        return None
    evaluate = grid.recipe(place, rate, grid.study.seeds[0]).evaluate
    held = {
        seed: folder
        for seed, (folder, record) in finished_cells(grid, place, rate, store).items()
        if not record.result.get("diverged")
    }
    if evaluate.switch is None or not held:
        return None
    found = {folder: _read(store, folder) for folder in held.values()}
    # A run has one pack, which is on in the first row; the last one is the switch.
    always: Texts = {folder: each.rows[0].texts for folder, each in found.items()}
    switched: Texts = {folder: each.rows[-1].texts for folder, each in found.items()}
    general, reported = evaluate.general, grid.study.domains[place.domain].reported
    return StudySwitch(
        row=f"{place.row.label} + switch",
        beside=place.row.label,
        domain=place.domain,
        prompt_tokens=evaluate.switch.prompt_tokens,
        seeds=list(held),
        cells=list(held.values()),
        always_general=pooled_score(always, "general", general),
        always_domain=needed(pooled_score(always, "domain", reported), place),
        general=pooled_score(switched, "general", general),
        domain_score=needed(pooled_score(switched, "domain", reported), place),
        general_errors=_errors(list(found.values()), "general", general) if general else None,
        domain_errors=_errors(list(found.values()), "domain", reported),
        cost=fmean(each.cost.flops / each.cost.prefill_flops for each in found.values()),
    )


def _read(store: Store, folder: str) -> SwitchEvaluation:
    return read_record(RunDirectory(store.study / folder).switch, SwitchEvaluation)


def _errors(found: Sequence[SwitchEvaluation], role: Role, texts: Sequence[TextSet]) -> SwitchErrors:
    names = labels(texts)
    tallies: list[SwitchTally] = []
    for each in found:
        roles = {text.task: text.role for text in each.rows[-1].texts}
        tallies += [tally for tally in each.tallies if roles[tally.text] == role and tally.text in names]
    return SwitchErrors(
        wrong=sum(tally.wrong for tally in tallies), decided=sum(tally.prompts for tally in tallies)
    )
