"""Learning rates of their own for the units of what trains: what general text needs moves less.

ADEPT (arXiv 2510.10071) gives each unit the rate 2 (1 − I) · lr, I in [0, 1] its importance to general text,
and measures it anew every few hundred steps. Here the importance of a unit to a text is the mean of
|gradient × weight| over its weights (Molchanov et al., arXiv 1906.10771), I the rank among all units of

    importance to general text / (importance to general text + importance to the domain)

and the rate upper − (upper − lower) · I. Ranks, as importances lie orders of magnitude apart; so the mean of
all rates is (lower + upper) / 2, whatever they are.

The rate is that of the optimiser's update, decay included, and not a factor on the gradient: AdamW divides
the mean gradient by its root mean square, so a factor on both would cancel.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import nn

from deepen.training.interface import Batch, RateSpread

# Beside the moments in the optimiser's state, so that it lies in checkpoints as they do.
RATE: Final = "unit_rate"

Parameters = Mapping[str, nn.Parameter]


@dataclass(frozen=True, kw_only=True)
class UnitRates:
    """How units get their rates.

    Attributes:
        general_at: the general windows of (step, windows), a pure function.
        windows: read of general text, and as many of the domain, when rates are measured.
        every: steps between two measurements. The first is after so many steps; until then all rates are 1:
            where residual writes are still zero, no gradient says anything of the rest.
        rows: whether each row of a matrix is a unit; else each tensor is. A vector is one unit always.
        lower: rate of the unit that general text needs most.
        upper: rate of the one it needs least.
    """

    general_at: Callable[[int, int], Batch]
    windows: int
    every: int
    rows: bool = False
    lower: float = 0.0
    upper: float = 2.0

    def due(self, step: int) -> bool:
        """Whether rates are measured before a step, of which `step` were done."""
        return step > 0 and step % self.every == 0


def measure_rates(
    rates: UnitRates,
    parameters: Parameters,
    optimizer: torch.optim.Optimizer,
    runs: Sequence[Callable[[], Any]],
) -> RateSpread | None:
    """Give each unit its rate, in the optimiser's state.

    Args:
        rates: how.
        parameters: what trains, replicated where there are several processes.
        optimizer: over exactly these.
        runs: two functions that leave in `grad` the gradients on general and on domain text.

    Returns:
        How far apart the rates are; None where no parameter was moved yet.
    """
    moved = {name: p for name, p in parameters.items() if optimizer.state.get(p)}
    if not moved:
        return None
    general, domain = (_importance(moved, optimizer, run, rates.rows) for run in runs)
    whole = (torch.cat(part).cpu() for part in (general, domain))  # not every device has fp64
    found = unit_rates(*whole, lower=rates.lower, upper=rates.upper)
    parts = torch.split(found, [len(part) for part in general])
    for parameter, part in zip(moved.values(), parts, strict=True):
        shape = (-1, *[1] * (parameter.ndim - 1)) if len(part) > 1 else ()
        optimizer.state[parameter][RATE] = part.to(parameter).reshape(shape)
    least, median, greatest = (each.item() for each in (found.min(), found.median(), found.max()))
    return RateSpread(least=least, median=median, greatest=greatest)


def unit_rates(general: torch.Tensor, domain: torch.Tensor, *, lower: float, upper: float) -> torch.Tensor:
    """Return the rate of each unit, [units] in fp64.

    Args:
        general: importance of each unit to general text, at least 0.
        domain: the same to the domain. Units that matter to neither lie in the middle.
        lower: rate of the unit that general text needs most.
        upper: rate of the one it needs least.
    """
    # Of texts of another kind or length all gradients are larger: only shares can be compared.
    kept, learned = (part.double() / part.double().sum().clamp_min(1e-300) for part in (general, domain))
    score = torch.where(kept + learned > 0, kept / (kept + learned), 0.5)
    _, place, counts = torch.unique(score, return_inverse=True, return_counts=True)
    # Equal scores share the mean of their ranks; a single unit lies in the middle.
    middle = counts.cumsum(0) - (counts.double() + 1) / 2
    rank = middle[place] / (len(score) - 1) if len(score) > 1 else torch.full_like(score, 0.5)
    return upper - (upper - lower) * rank


def _importance(
    parameters: Parameters, optimizer: torch.optim.Optimizer, run: Callable[[], Any], rows: bool
) -> list[torch.Tensor]:
    """Return the mean of |gradient × weight| of each unit of each parameter, [units] in fp32."""
    optimizer.zero_grad(set_to_none=True)
    run()
    found = []
    for parameter in parameters.values():
        units = len(parameter) if rows and parameter.ndim > 1 else 1
        grad = parameter.grad
        product = torch.zeros_like(parameter) if grad is None else parameter.detach() * grad
        found.append(product.float().abs().reshape(units, -1).mean(1))
    optimizer.zero_grad(set_to_none=True)
    return found


@contextmanager
def scaling_updates(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Let every step of an optimiser move each unit by its rate times what it would; by all of it without.

    At rate 1 a weight is what the step made it, to the bit. The weights that a step moves are held twice
    meanwhile.
    """
    if not any(RATE in held for held in optimizer.state.values()):
        yield
        return
    before: dict[nn.Parameter, torch.Tensor] = {}

    def keep(held: torch.optim.Optimizer, *_: Any) -> None:
        moving = (p for group in held.param_groups for p in group["params"] if RATE in held.state.get(p, {}))
        before.update({p: p.detach().clone() for p in moving})

    def scale(held: torch.optim.Optimizer, *_: Any) -> None:
        for parameter, old in before.items():
            parameter.data.copy_(torch.lerp(old, parameter.detach(), held.state[parameter][RATE]))
        before.clear()

    hooks = [optimizer.register_step_pre_hook(keep), optimizer.register_step_post_hook(scale)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
