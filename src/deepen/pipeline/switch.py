"""A switch fitted on texts, and a switch measured on texts."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from deepen.blocks import resolve_pack
from deepen.blocks.hub import is_hub_id
from deepen.checkpoint import resolve_base
from deepen.checkpoint.atomic import check_free
from deepen.config import TextSet
from deepen.errors import SwitchError
from deepen.evaluation.record import number_items
from deepen.evaluation.switching import conformal_threshold
from deepen.model import (
    Classifier,
    Decider,
    Likelihood,
    Switch,
    attach,
    expansion_of,
    fit_classifier,
    load,
    pack_digest,
    pooled_states,
    write_switch,
)
from deepen.pipeline.losses import load_text_sets, longest_window
from deepen.pipeline.reporter import Reporter, Silent
from deepen.pipeline.subject import pack_directory
from deepen.records import Role, SwitchPack, SwitchRecord, SwitchTally, capture_provenance

GENERAL: Final = "general"
MAX_PROMPTS: Final = 1000

# Of five documents one is held out, and one may calibrate the threshold; by lot, as texts may have an order.
_PARTS: Final = 5
_SEED: Final = 0
_HELD_OUT: Final = 4
_CALIBRATING: Final = 3


@dataclass(frozen=True, kw_only=True)
class PackTexts:
    """A pack that competes, and texts of its kind.

    Attributes:
        name: what the switch calls it.
        pack: a directory, a hub id, or a run that made one.
        texts: what it should answer.
    """

    name: str
    pack: str
    texts: tuple[TextSet, ...]


@dataclass(frozen=True, kw_only=True)
class SwitchRequest:
    """What a switch is to decide, and by what.

    Attributes:
        base: directory or hub id.
        packs: those that compete.
        general: texts that are the base's.
        out: where the switch is written.
        by: the decider.
        false_positives: largest share of general prompts that a pack may win; None: the threshold is 0.
        prompt_tokens: how many of a prompt's first tokens are read.
        max_prompts: most prompts of general text, and of each pack's.
        device: where to run.
        overwrite: replace `out`.
    """

    base: str
    packs: tuple[PackTexts, ...]
    general: tuple[TextSet, ...]
    out: Path
    by: Literal["likelihood", "classifier"] = "classifier"
    false_positives: float | None = None
    prompt_tokens: int = 64
    max_prompts: int = MAX_PROMPTS
    device: torch.device
    overwrite: bool = False


@dataclass(frozen=True, kw_only=True)
class _Kind:
    """Prompts of one kind.

    Attributes:
        name: `general`, or the pack's.
        prompts: token ids, each [length].
        part: of each, by its document, from 0 to 4.
        digests: of its texts, by name.
    """

    name: str
    prompts: list[Tensor]
    part: NDArray[np.int64]
    digests: dict[str, str]

    def of(self, *parts: int) -> list[Tensor]:
        return [self.prompts[index] for index in np.flatnonzero(np.isin(self.part, parts))]


def fit_switch(request: SwitchRequest, reporter: Reporter | None = None) -> SwitchRecord:
    """Fit a switch on texts, measure its errors on others, and write it.

    Of five documents, drawn by lot, one is held out for the errors; another one calibrates the threshold
    where that is asked (with likelihood, which has nothing to fit, all four do), and the rest fit the
    weights. Where a text has fewer than 30 documents, windows stand for them.

    Raises:
        DeepenError: base, packs or texts cannot be read, a kind has too few prompts, or the output exists.
    """
    reporter = reporter or Silent()
    _check(request)
    reporter.stage("reading texts")
    kinds = _read_kinds(request)
    reporter.stage("loading the model")
    model = load(request.base, device=request.device)
    for each in request.packs:
        attach(model, pack_directory(each.pack), each.name)
    reporter.stage("fitting the switch")
    switch, fitted, calibrated = _fit(model, kinds, request)
    reporter.stage("held-out errors")
    record = SwitchRecord(
        kind=request.by,
        base=request.base,
        fingerprint=switch.fingerprint,
        packs=[_recorded_pack(each, request.out) for each in request.packs],
        prompt_tokens=switch.prompt_tokens,
        threshold=switch.threshold,
        unit=switch.decider.unit,
        false_positives=request.false_positives,
        fitted=fitted,
        calibrated=calibrated,
        held_out=[_tally(model, switch, kind) for kind in kinds],
        provenance=capture_provenance(
            seed=_SEED, data={k: v for kind in kinds for k, v in kind.digests.items()}
        ),
    )
    write_switch(request.out, switch, record, overwrite=request.overwrite)
    return record


def _check(request: SwitchRequest) -> None:
    check_free(request.out, overwrite=request.overwrite)
    names = [each.name for each in request.packs]
    if not names:
        raise SwitchError("blocks switch: no pack is given: say --pack NAME=PACK:TEXTS")
    if twice := [name for name in names if names.count(name) > 1 or name in (GENERAL, "base")]:
        raise SwitchError(f"blocks switch: a pack cannot be called {twice[0]!r} here; choose another name")
    if not request.general:
        raise SwitchError("blocks switch: no general text is given: say --general")
    rate = request.false_positives
    if rate is not None and not 0 < rate < 1:
        raise SwitchError(f"blocks switch: false positives of {rate:g}; give a share between 0 and 1")


def _read_kinds(request: SwitchRequest) -> list[_Kind]:
    where = resolve_base(request.base)
    kinds = [_read_kind(request, where, GENERAL, request.general)]
    return kinds + [_read_kind(request, where, each.name, each.texts) for each in request.packs]


def _read_kind(request: SwitchRequest, where: Path, name: str, sets: Sequence[TextSet]) -> _Kind:
    role: Role = "general" if name == GENERAL else "domain"
    length = longest_window(where)
    texts = load_text_sets(where, [(role, text) for text in sets], request.max_prompts * length)
    prompts, parts = [], []
    for text in texts:
        _, items = number_items(text)
        drawn = np.random.default_rng(_SEED).permutation(len(text.windows))
        windows = text.windows[: max(request.max_prompts // len(texts), 1)]
        prompts += [torch.from_numpy(window[: request.prompt_tokens]) for window in windows]
        parts.append(drawn[items[: len(windows)]] % _PARTS)
    part = np.concatenate(parts)
    if len(set(part.tolist())) < _PARTS:
        raise SwitchError(f"{name}: {len(prompts)} prompts are too few to fit and to test; give more text")
    digests = {f"{name}: {text.task}": text.digest for text in texts}
    return _Kind(name=name, prompts=prompts, part=part, digests=digests)


def _fit(
    model: PreTrainedModel, kinds: Sequence[_Kind], request: SwitchRequest
) -> tuple[Switch, dict[str, int], int]:
    """Return the switch, the prompts that fitted it by kind, and the number of those that calibrated it."""
    rate, fitted = request.false_positives, dict[str, int]()
    decider: Decider = Likelihood()
    parts: tuple[int, ...] = tuple(range(_HELD_OUT))
    if request.by == "classifier":
        parts, learned = (_CALIBRATING,), tuple(range(_HELD_OUT if rate is None else _CALIBRATING))
        decider = _fit_classifier(model, kinds, learned)
        fitted = {kind.name: len(kind.of(*learned)) for kind in kinds}
    fingerprint = expansion_of(model).base_fingerprint.fast
    switch = Switch(decider=decider, prompt_tokens=request.prompt_tokens, fingerprint=fingerprint)
    if rate is None:
        return switch, fitted, 0
    decisions = switch.decide(model, kinds[0].of(*parts))
    best = np.array([max(decision.advantages.values()) for decision in decisions])
    return replace(switch, threshold=conformal_threshold(best, rate)), fitted, len(best)


def _fit_classifier(model: PreTrainedModel, kinds: Sequence[_Kind], parts: tuple[int, ...]) -> Classifier:
    prompts = [kind.of(*parts) for kind in kinds]
    labels = torch.cat([torch.full((len(each),), label) for label, each in enumerate(prompts)])
    states = pooled_states(model, [prompt for each in prompts for prompt in each])
    return fit_classifier(states, labels, [kind.name for kind in kinds[1:]])


def _tally(model: PreTrainedModel, switch: Switch, kind: _Kind) -> SwitchTally:
    decisions = switch.decide(model, kind.of(_HELD_OUT))
    right = "base" if kind.name == GENERAL else kind.name
    answered = count_answers([decision.pack for decision in decisions], switch.candidates(model))
    total = len(decisions)
    return SwitchTally(text=kind.name, prompts=total, answered=answered, wrong=total - answered[right])


def count_answers(decided: Sequence[str | None], packs: Sequence[str]) -> dict[str, int]:
    """Return `base` or pack -> prompts that were decided for it."""
    return {"base": decided.count(None), **{pack: decided.count(pack) for pack in packs}}


def _recorded_pack(pack: PackTexts, out: Path) -> SwitchPack:
    found = pack_directory(pack.pack)
    # From the switch's place, so that both can be moved together.
    path = found if is_hub_id(found) else os.path.relpath(resolve_pack(found), out.resolve())
    return SwitchPack(name=pack.name, path=path, digest=pack_digest(found))
