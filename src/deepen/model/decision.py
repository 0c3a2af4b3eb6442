"""Deciding from a prompt which block pack takes part, if any: what is weighed, and when a pack wins."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final, Protocol

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from deepen.errors import SwitchError
from deepen.model.state import state_of, switch

PROMPT_TOKENS: Final = 64
_ATTRIBUTE: Final = "_deepen_switching"

# Elements of the logits of one pass: 512 MB in fp32.
_MOST_LOGITS: Final = 2**27


@dataclass(frozen=True, kw_only=True)
class Decision:
    """Who answers a prompt.

    Attributes:
        pack: the block pack that takes part; None: none does, the base answers.
        advantages: pack -> by how much the prompt speaks for it and against the base, in the decider's unit.
        tokens: of the prompt that were read.
    """

    pack: str | None
    advantages: Mapping[str, float]
    tokens: int


class Decider(Protocol):
    """What weighs packs against the base.

    Attributes:
        unit: of an advantage.
        packs: those it can weigh; None: any.
    """

    @property
    def unit(self) -> str: ...  # noqa: D102

    @property
    def packs(self) -> tuple[str, ...] | None: ...  # noqa: D102

    def advantages(self, model: PreTrainedModel, prompts: Sequence[Tensor], packs: Sequence[str]) -> Tensor:
        """Return the advantage of each pack over the base: [prompts, packs], NaN where none can be told.

        Args:
            model: has the packs attached; its switch rests.
            prompts: token ids, each [length], on the model's device.
            packs: those to weigh.
        """


@dataclass(frozen=True)
class Likelihood:
    """Weighs a pack by the prompt's mean log-likelihood per token with it, less that with the base alone.

    A prefill with the base and one with each pack. Of a prompt of one token nothing can be told.
    """

    @property
    def unit(self) -> str:
        """Nats per token."""
        return "nats/token"

    @property
    def packs(self) -> None:
        """Any pack can be weighed."""

    def advantages(self, model: PreTrainedModel, prompts: Sequence[Tensor], packs: Sequence[str]) -> Tensor:
        """Return nats per token [prompts, packs]."""
        with playing(model, ()):
            base = mean_log_likelihood(model, prompts)
        columns = []
        for pack in packs:
            with playing(model, (pack,)):
                columns.append(mean_log_likelihood(model, prompts) - base)
        return torch.stack(columns, dim=1)


@dataclass(frozen=True, kw_only=True)
class Switch:
    """Decides for each prompt whether a block pack takes part, and which.

    The pack of the largest advantage wins if that is above the threshold; otherwise the base answers.

    Attributes:
        decider: weighs the packs.
        threshold: in the decider's unit.
        prompt_tokens: what is read of a prompt: so many of its first tokens.
        fingerprint: fast, of the base it was made for; empty: it serves any.
    """

    decider: Decider = field(default_factory=Likelihood)
    threshold: float = 0.0
    prompt_tokens: int = PROMPT_TOKENS
    fingerprint: str = ""

    def __post_init__(self) -> None:
        """Refuse a switch that could read nothing."""
        if self.prompt_tokens < 1:
            raise SwitchError(f"prompt_tokens is {self.prompt_tokens}; a switch reads at least one token")

    def decide(
        self, model: PreTrainedModel, prompts: Sequence[Tensor], packs: Sequence[str] | None = None
    ) -> tuple[Decision, ...]:
        """Return who answers each prompt.

        Args:
            model: has the packs attached.
            prompts: token ids, each [length]; those after the first `prompt_tokens` are not read.
            packs: those that compete; None: all attached that the decider can weigh.

        Raises:
            SwitchError: a pack is not attached, or the decider cannot weigh it.
        """
        chosen = self.candidates(model) if packs is None else tuple(packs)
        read = [prompt[: self.prompt_tokens] for prompt in prompts]
        weighed = torch.full((len(read), len(chosen)), torch.nan)
        able = [index for index, prompt in enumerate(read) if len(prompt)]
        if able and chosen:
            with resting(model):
                found = self.decider.advantages(model, [read[index] for index in able], chosen)
            weighed[able] = found.float().cpu()
        return tuple(
            self._choose(dict(zip(chosen, row, strict=True)), len(prompt))
            for row, prompt in zip(weighed.tolist(), read, strict=True)
        )

    def candidates(self, model: PreTrainedModel) -> tuple[str, ...]:
        """Return the attached packs that compete.

        Raises:
            SwitchError: a pack that the decider was made for is not attached, or another base is beneath.
        """
        state = state_of(model)
        packs = tuple(state.packs) if self.decider.packs is None else self.decider.packs
        held = ", ".join(map(repr, state.packs))
        if missing := [pack for pack in packs if pack not in state.packs]:
            raise SwitchError(f"the switch decides on {missing[0]!r}, which is not attached; there is {held}")
        beneath = next(iter(state.packs.values())).expansion.base_fingerprint.fast
        if self.fingerprint not in ("", beneath):
            raise SwitchError(
                f"the switch was made for a base with fingerprint {self.fingerprint[:16]}…,\n"
                f"this model's base has {beneath[:16]}…"
            )
        return packs

    def _choose(self, advantages: dict[str, float], tokens: int) -> Decision:
        # A NaN is above nothing, so what cannot be told is the base's.
        above = {pack: value for pack, value in advantages.items() if value > self.threshold}
        pack = max(above, key=above.__getitem__) if above else None
        return Decision(pack=pack, advantages=advantages, tokens=tokens)


@dataclass
class Switching:
    """What a model notes of its switch.

    Attributes:
        switch: decides.
        decisions: what it decided last.
        resting: whether it decides nothing for the time being.
    """

    switch: Switch
    decisions: tuple[Decision, ...] = ()
    resting: bool = False


def find_switching(model: PreTrainedModel) -> Switching | None:
    """Return what a model notes of its switch; None where it has none."""
    found = vars(model).get(_ATTRIBUTE)
    return found if isinstance(found, Switching) else None


def note_switching(model: PreTrainedModel, switching: Switching | None) -> None:
    """Note on a model what its switch is."""
    vars(model)[_ATTRIBUTE] = switching


@contextmanager
def resting(model: PreTrainedModel) -> Iterator[None]:
    """Let a model's switch, if it has one, decide nothing: what is on computes."""
    found = find_switching(model)
    if found is None or found.resting:
        yield
        return
    found.resting = True
    try:
        yield
    finally:
        found.resting = False


@contextmanager
def playing(model: PreTrainedModel, packs: Iterable[str]) -> Iterator[None]:
    """Run a model with these of its packs on, whatever its switch; on exit those are on that were before."""
    state, wanted = state_of(model), tuple(packs)
    before = state.active
    try:
        if before != wanted:
            switch(model, state, wanted)
        with resting(model):
            yield
    finally:
        if state.active != before:
            switch(model, state, before)


@torch.no_grad()
def mean_log_likelihood(model: PreTrainedModel, prompts: Sequence[Tensor]) -> Tensor:
    """Return the mean log-likelihood per token of each prompt after its first, in nats: [prompts], float64.

    NaN for a prompt of one token.
    """
    found = torch.full((len(prompts),), torch.nan, dtype=torch.float64)
    able = [index for index, prompt in enumerate(prompts) if len(prompt) > 1]
    vocabulary = model.get_input_embeddings().weight.shape[0]
    for batch in prompt_batches(prompts, able, _MOST_LOGITS // vocabulary):
        ids = pad_prompts([prompts[index] for index in batch], model.device)
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        nats = functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        for row, index in enumerate(batch):
            found[index] = -nats[row, : len(prompts[index]) - 1].double().mean()
    return found


def prompt_batches(prompts: Sequence[Tensor], chosen: Sequence[int], most: int) -> Iterator[list[int]]:
    """Yield indices of prompts of like length: at most `most` tokens, padding included, or one prompt."""
    order = sorted(chosen, key=lambda index: -len(prompts[index]))
    start = 0
    while start < len(order):
        rows = max(most // len(prompts[order[start]]), 1)
        yield order[start : start + rows]
        start += rows


def pad_prompts(prompts: Sequence[Tensor], device: torch.device) -> Tensor:
    """Return prompts padded at the end, which causal attention never sees: [prompts, longest]."""
    return torch.nn.utils.rnn.pad_sequence([each.to(device) for each in prompts], batch_first=True)
