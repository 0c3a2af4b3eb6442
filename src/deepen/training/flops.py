"""What a training step computes for each token, in closed form, and the share of the device that it uses.

A weight matrix of n elements costs 2 n FLOPs for each token that passes it: once forward; once for the
gradient of its input, where anything before it trains; once for its own gradient, where it trains; once more
forward, where its block is computed again in the backward pass, unless nothing is stored behind it. So a
block below the first that trains costs 1 u, with u = 2 n over its matrices, a frozen one above it 2 u, one
that trains 3 u, a frozen head 2 h. Causal attention over S tokens costs a = S × heads × (width of a key +
width of a value) forward, half the square of all pairs, and 2.5 a for its gradient, in which a fused kernel
computes the scores again.

Not counted: norms, activations, embeddings, convolutions and recurrences of linear attention, the
dequantisation of quantised weights, what adapters compute once a pass, and the optimiser. Document masks make
attention cheaper than this.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from time import perf_counter
from typing import Any, Final

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from deepen.training.parallel import plain_root, release

# Lengths of the passes that show what a token passes: what does not grow with the length is no token's.
_SHORT: Final = 8
_LONG: Final = 24
# Sides of the matrices whose product shows what a device attains, and how many are tried.
_SIDE: Final = {"cpu": 768, "accelerator": 8192}
_PRODUCTS: Final = 8


@dataclass(frozen=True, kw_only=True)
class BlockCost:
    """FLOPs of one block for each token, once each.

    Attributes:
        forward: products with its matrices.
        attention: causal attention, forward.
        again: computing it again in the backward pass.
    """

    forward: float
    attention: float
    again: float


@dataclass(frozen=True, kw_only=True)
class TokenCost:
    """FLOPs of a step for each of its tokens.

    Attributes:
        below: forward passes through the blocks below the first that trains.
        rest: all others.
        blocks: what single passes through each block cost.
        outside: products between and behind the blocks, forward.
    """

    below: float
    rest: float
    blocks: tuple[BlockCost, ...] = ()
    outside: float = 0.0

    @property
    def total(self) -> float:
        """All of them."""
        return self.below + self.rest

    @property
    def forward(self) -> float:
        """Those of one forward pass through everything."""
        return sum(block.forward + block.attention for block in self.blocks) + self.outside


@dataclass(frozen=True, kw_only=True)
class Gauge:
    """Turns speed into executed FLOPs and utilisation.

    Attributes:
        cost: of a step.
        attained: FLOPs a second that all devices of the run together attain in a product of square matrices
            (`attained`); None where it was not measured.
    """

    cost: TokenCost
    attained: float | None

    def read(self, tokens_per_second: float, passed_by: float = 0.0) -> dict[str, float]:
        """Return `flops_per_second`, and `utilisation` as a share where it is known.

        Args:
            tokens_per_second: the speed.
            passed_by: share of the tokens that were not run through what lies below (`train.prefix_cache`).
        """
        speed = (self.cost.total - passed_by * self.cost.below) * tokens_per_second
        figures = {"flops_per_second": float(f"{speed:.4g}")}
        return figures | ({"utilisation": round(speed / self.attained, 4)} if self.attained else {})


@dataclass(frozen=True)
class _Product:
    """A product with a weight matrix: FLOPs forward and of its gradients."""

    forward: float
    gradients: float


class _Probe:
    """What a pass through a model computes.

    Attributes:
        products: of each block, in order.
        outside: those between and after the blocks.
        differentiated: whether the gradient passes a block.
        again: FLOPs of computing a block again: it ends with the last tensor that is stored for a gradient.
    """

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        self.products: list[list[_Product]] = [[] for _ in blocks]
        self.outside: list[_Product] = []
        self.differentiated = [False] * len(blocks)
        self.again = [0.0] * len(blocks)
        self._here, self._block, self._done = self.outside, -1, 0.0

    def watch(self, model: nn.Module, blocks: Sequence[nn.Module]) -> Iterator[RemovableHandle]:
        """Hook a model whose blocks these are."""
        for index, block in enumerate(blocks):
            yield block.register_forward_pre_hook(self._entering(index), prepend=True)
            yield block.register_forward_hook(self._leave)
        for module in model.modules():
            if any(parameter.ndim > 1 for parameter in module.parameters(recurse=False)):
                yield module.register_forward_pre_hook(self._multiply, with_kwargs=True)
                yield module.register_forward_hook(self._finish)

    def store(self, tensor: torch.Tensor) -> torch.Tensor:
        """Note that autograd stores a tensor."""
        if self._block >= 0:
            self.again[self._block] = self._done
        return tensor

    def _entering(self, index: int) -> Callable[..., None]:
        def enter(*_: Any) -> None:
            self._here, self._block, self._done = self.products[index], index, 0.0

        return enter

    def _leave(self, _: nn.Module, __: Any, states: Any) -> None:
        first = states if isinstance(states, torch.Tensor) else states[0]
        self.differentiated[self._block] = first.requires_grad
        self._here, self._block = self.outside, -1

    def _multiply(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tensors = [each for each in (*args, *kwargs.values()) if isinstance(each, torch.Tensor)]
        if not tensors:
            return
        rows = tensors[0].numel() // tensors[0].shape[-1]
        chosen = next((t.shape[-1] for t in tensors[1:] if not t.is_floating_point()), 1)
        self._here += _products(module, rows, tensors[0].requires_grad, chosen)
        if {name for name, _ in module.named_parameters(recurse=False)} - {"weight", "bias"}:
            self._finish()  # more than a product: what it stores comes after it

    def _finish(self, *_: Any) -> None:
        self._done = sum(product.forward for product in self._here)


def _products(module: nn.Module, rows: int, differentiated: bool, chosen: int) -> Iterator[_Product]:
    """Yield what a module's own matrices cost.

    Args:
        module: any.
        rows: tokens it is given.
        differentiated: whether its input needs a gradient.
        chosen: experts that each token passes, where it holds experts.
    """
    for elements, parameter in _matrices(module, chosen):
        forward = 2.0 * elements * rows
        yield _Product(forward, forward * (differentiated + parameter.requires_grad))


def _matrices(module: nn.Module, chosen: int) -> list[tuple[int, torch.Tensor]]:
    """Return the matrices that a module multiplies with, and how many elements of each a token meets."""
    if isinstance(module, nn.Linear):  # a quantised weight has another shape
        return [(module.in_features * module.out_features, module.weight)]
    if isinstance(module, nn.Embedding | _ConvNd):
        return []
    own, count = list(module.parameters(recurse=False)), getattr(module, "num_experts", None)
    if experts := [p for p in own if p.ndim == 3 and len(p) == count]:
        return [(p.numel() // len(p) * chosen, p) for p in experts]
    return [(p.numel(), p) for p in own if p.ndim == 2]


def count_flops(
    root: nn.Module, model: PreTrainedModel, blocks: Sequence[nn.Module], length: int
) -> TokenCost:
    """Count what a step computes for each token, of a model as it will train. Two short forward passes.

    Args:
        root: where passes begin; all processes call this at once.
        model: the model, with what trains, and what is computed again, set.
        blocks: its blocks, bottom to top.
        length: tokens of a window.
    """
    short, long = (_probe(root, model, blocks, tokens) for tokens in (_SHORT, _LONG))
    below = rest = 0.0
    costs = []
    for index, block in enumerate(blocks):
        attention = attention_flops(model, index, length)
        linear = _per_token(_cost(short.products[index]), _cost(long.products[index]))
        forward = _per_token(_forward(short.products[index]), _forward(long.products[index]))
        again = _per_token(short.again[index], long.again[index]) + attention
        costs.append(BlockCost(forward=forward, attention=attention, again=again))
        if not long.differentiated[index]:
            below += linear + attention
            continue
        rest += linear + 3.5 * attention
        if getattr(block, "gradient_checkpointing", False):
            rest += again
    head = _head(model, long.differentiated[-1])
    rest += _per_token(_cost(short.outside), _cost(long.outside)) + _cost(head)
    outside = _per_token(_forward(short.outside), _forward(long.outside)) + _forward(head)
    return TokenCost(below=below, rest=rest, blocks=tuple(costs), outside=outside)


def _per_token(few: float, many: float) -> float:
    return (many - few) / (_LONG - _SHORT)


def attention_flops(model: PreTrainedModel, index: int, length: int) -> float:
    """Return the FLOPs for each token of a block's causal attention forward; 0 for another kind."""
    config: Any = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    kind = kinds[index] if kinds else "sliding_attention" if window else "full_attention"
    heads = getattr(config, "num_attention_heads", None)
    if heads is None or "attention" not in kind or kind == "linear_attention":
        return 0.0
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    key = getattr(config, "qk_head_dim", None) or width
    value = getattr(config, "v_head_dim", None) or width
    reach = min(length, window) if window and kind == "sliding_attention" else length
    keys = reach - reach**2 / (2 * length)  # seen by a token, on average
    return float(2 * keys * heads * (key + value))


def _probe(root: nn.Module, model: PreTrainedModel, blocks: Sequence[nn.Module], tokens: int) -> _Probe:
    probe = _Probe(blocks)
    ids = torch.zeros(1, tokens, dtype=torch.long, device=model.device)
    was_training = model.training
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng())
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(_storing(blocks))
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(probe.store, lambda tensor: tensor))
        for handle in probe.watch(model, blocks):
            stack.callback(handle.remove)
        model.train()
        plain_root(root)(lambda model: model.base_model(input_ids=ids, use_cache=False))
    model.train(was_training)
    release(root)
    return probe


@contextmanager
def _storing(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Have no block computed again for a while: what it stores could not be seen."""
    chosen = [block for block in blocks if getattr(block, "gradient_checkpointing", False)]
    _set_again(chosen, False)
    try:
        yield
    finally:
        _set_again(chosen, True)


def _set_again(blocks: Sequence[nn.Module], again: bool) -> None:
    for block in blocks:
        setattr(block, "gradient_checkpointing", again)  # noqa: B010 - nn.Module declares no such attribute


def _cost(products: Iterable[_Product]) -> float:
    return sum(product.forward + product.gradients for product in products)


def _forward(products: Iterable[_Product]) -> float:
    return sum(product.forward for product in products)


def _head(model: PreTrainedModel, differentiated: bool) -> list[_Product]:
    """Return the products for each token of what lies behind the base model."""
    inside = {id(module) for module in model.base_model.modules()}
    outer = [module for module in model.modules() if id(module) not in inside]
    return [product for module in outer for product in _products(module, 1, differentiated, 1)]


@cache
def attained(device: torch.device, dtype: torch.dtype) -> float:
    """Return the FLOPs a second of the fastest of some square matrix products on a device."""
    size = _SIDE["cpu" if device.type == "cpu" else "accelerator"]
    own = torch.Generator(device)  # the run's random numbers stay what they are
    a, b = (torch.randn(size, size, device=device, generator=own).to(dtype) for _ in range(2))
    return 2.0 * size**3 / min(_seconds(a, b) for _ in range(_PRODUCTS))


def calibration_flops(device: torch.device) -> float:
    """Return what `attained` computes to find its answer."""
    return 2.0 * _PRODUCTS * _SIDE["cpu" if device.type == "cpu" else "accelerator"] ** 3


def _seconds(a: torch.Tensor, b: torch.Tensor) -> float:
    def wait() -> None:
        if a.device.type != "cpu":
            torch.accelerator.synchronize(a.device)

    wait()
    begin = perf_counter()
    a @ b
    wait()
    return perf_counter() - begin
