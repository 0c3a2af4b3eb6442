"""A classifier of prompts by what the base makes of them: softmax regression on pooled hidden states."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from deepen.errors import SwitchError
from deepen.model.decision import pad_prompts, playing, prompt_batches

# Tokens of one pass, and weight of the squared norm: with standardised inputs a mild prior that the
# classes of a separable problem, which most pairs of corpora are, keep finite log odds.
_BATCH_TOKENS: Final = 16384
_PENALTY: Final = 1e-3


@dataclass(frozen=True, kw_only=True)
class Classifier:
    """Weighs a pack by the log odds of its texts against general text; one prefill with the base.

    The odds are those of equally many prompts of each kind.

    Attributes:
        packs: the classes after the first, which is general text.
        weight: [1 + packs, width], fp32; the standardisation of the inputs is in it.
        bias: [1 + packs].
    """

    packs: tuple[str, ...]
    weight: Tensor
    bias: Tensor

    @property
    def unit(self) -> str:
        """Natural logarithm of the odds."""
        return "log odds"

    def advantages(self, model: PreTrainedModel, prompts: Sequence[Tensor], packs: Sequence[str]) -> Tensor:
        """Return log odds [prompts, packs].

        Raises:
            SwitchError: a pack is no class of it, or the model has states of another width.
        """
        if unknown := [pack for pack in packs if pack not in self.packs]:
            raise SwitchError(
                f"the switch knows no texts of {unknown[0]!r}; it was fitted for {', '.join(self.packs)}"
            )
        states = pooled_states(model, prompts)
        if states.shape[1] != self.weight.shape[1]:
            raise SwitchError(
                f"the switch was fitted on states of {self.weight.shape[1]} values, "
                f"this model's have {states.shape[1]}"
            )
        scores = functional.linear(states, self.weight, self.bias)
        columns = [1 + self.packs.index(pack) for pack in packs]
        return scores[:, columns] - scores[:, :1]


@torch.no_grad()
def pooled_states(model: PreTrainedModel, prompts: Sequence[Tensor]) -> Tensor:
    """Return the mean over a prompt's tokens of the base's last hidden state: [prompts, width], fp32, CPU.

    Args:
        model: an expanded model; its packs are off meanwhile.
        prompts: token ids, each [length], none empty.
    """
    found: dict[int, Tensor] = {}
    with playing(model, ()):
        for batch in prompt_batches(prompts, range(len(prompts)), _BATCH_TOKENS):
            ids = pad_prompts([prompts[index] for index in batch], model.device)
            states = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
            for row, index in enumerate(batch):
                found[index] = states[row, : len(prompts[index])].float().mean(0).cpu()
    return torch.stack([found[index] for index in range(len(prompts))])


def fit_classifier(states: Tensor, labels: Tensor, packs: Sequence[str]) -> Classifier:
    """Fit softmax regression by L-BFGS, every class of the same weight; the same inputs give the same fit.

    Args:
        states: of `pooled_states`, [prompts, width].
        labels: 0 for general text, 1 + n for texts of `packs[n]`: [prompts].
        packs: their names.

    Raises:
        SwitchError: a class has no prompt.
    """
    counts = torch.bincount(labels, minlength=1 + len(packs))
    if not counts.all():
        missing = ["general text", *packs][int(counts.argmin())]
        raise SwitchError(f"{missing}: no prompt to fit the switch on; give more texts")
    mean, spread = states.mean(0), states.std(0).nan_to_num(1.0).clamp_min(1e-6)
    inputs, balance = (states - mean) / spread, counts.sum() / (len(counts) * counts)
    layer = nn.Linear(states.shape[1], len(counts))
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = functional.cross_entropy(layer(inputs), labels, weight=balance.float())
        loss = loss + _PENALTY * layer.weight.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    with torch.enable_grad():
        optimizer.step(closure)  # type: ignore[no-untyped-call]
    weight = layer.weight.detach() / spread
    return Classifier(packs=tuple(packs), weight=weight, bias=layer.bias.detach() - weight @ mean)
