"""What a new block is made from, where that is not the copy of one block: two neighbours of one kind."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from threading import Lock
from typing import Any, Final

from deepen.checkpoint import Tensor
from deepen.errors import LayoutError
from deepen.expansion.config_json import reordered_config
from deepen.expansion.layout import NewBlock
from deepen.expansion.sources import Mean
from deepen.families import Family, Kind, generic, unit_places, without_place

_AVERAGED: Final = frozenset({"F64", "F32", "F16", "BF16"})
Shapes = Mapping[str, tuple[int, ...]]
Readers = Mapping[str, Callable[[], Any]]


def mean_sources(
    family: Family, config: Mapping[str, Any], depth: int, block: NewBlock, tensors: Mapping[str, Tensor]
) -> dict[str, Mean]:
    """Return what the tensors of a new block are means of, by name inside the block; empty for a copy.

    Tensors that are filled, or that the model computes itself, are left out.

    Args:
        family: in the dialect of the files.
        config: the base's.
        depth: its number of blocks.
        block: a new block.
        tensors: the base's, by name.

    Raises:
        LayoutError: its two neighbours differ in kind, or hold what cannot be averaged or aligned.
    """
    if block.init == "copy":
        return {}
    below, above = (_block(family, tensors, number) for number in (block.copy_of, block.copy_of + 1))
    check_alike(block, *({n: (t.dtype, t.shape) for n, t in held.items()} for held in (below, above)))
    if not same_kind(partial(reordered_config, config, family, depth), depth, block.copy_of):
        raise differing(block, "the config makes them of different kinds")
    filled = family.fills(block.zero)
    averaged = [name for name in below if generic(name) not in filled and not family.is_buffer(name)]
    for name in averaged:
        if below[name].dtype not in _AVERAGED:
            raise differing(block, f"{below[name].name!r} is {below[name].dtype}, of which there is no mean")
    orders: dict[str, Any] = {}
    if block.init == "transport":
        orders = _orders(block, family.text_config(config), below, above, family)
    return {name: Mean(below[name], above[name], orders.get(name)) for name in averaged}


def _block(family: Family, tensors: Mapping[str, Tensor], number: int) -> dict[str, Tensor]:
    placed = ((family.split(name), tensor) for name, tensor in tensors.items())
    return {place[1]: tensor for place, tensor in placed if place and place[0] == number}


def check_alike(block: NewBlock, below: Mapping[str, Any], above: Mapping[str, Any]) -> None:
    """Check that two blocks hold the same tensors.

    Args:
        block: the new block that is to be made from them.
        below: what is known of each tensor of the one: type and shape.
        above: the same of the other.

    Raises:
        LayoutError: they do not.
    """
    if odd := sorted(below.keys() ^ above.keys()):
        raise differing(block, f"only one of them has {odd[0]!r}")
    for name, what in below.items():
        if what != above[name]:
            raise differing(block, f"{name!r} is {_said(what)} in the one, {_said(above[name])} in the other")


def _said(what: Sequence[Any]) -> str:
    return f"{what[0]} {list(what[1])}"


def same_kind(reordered: Any, depth: int, block: int) -> bool:
    """Return whether a config says the same of a block and of the one above it.

    Args:
        reordered: gives the config of a model whose block j is block `origins[j]` of this one.
        depth: number of blocks.
        block: the lower one.
    """
    order = list(range(depth))
    swapped = [*order[:block], block + 1, block, *order[block + 2 :]]
    try:
        return bool(reordered(order) == reordered(swapped))
    except LayoutError:  # no words for the one above the other
        return False


def differing(block: NewBlock, why: str) -> LayoutError:
    """Return what is wrong with two neighbours."""
    return LayoutError(
        f"init {block.init}: base blocks {block.copy_of} and {block.copy_of + 1} cannot be made one: {why};\n"
        f"choose init copy, or other blocks to stand on than {block.copy_of} (after)"
    )


class Alignment:
    """How the units of one block are put in the order of another's; worked out when first asked."""

    def __init__(
        self, block: NewBlock, shapes: Shapes, config: Mapping[str, Any], below: Readers, above: Readers
    ) -> None:
        """Take both blocks' tensors.

        Args:
            block: the new block that is to be made from them.
            shapes: of their tensors, by name inside the block.
            config: of the text model.
            below: tensor name -> reads it in fp32, of the block whose order is kept.
            above: the same of the other.

        Raises:
            LayoutError: not all is known of their units.
        """
        self._heads = _count(block, config, "num_attention_heads", None)
        self.places = unit_places(shapes, self._heads)
        self._groups = _count(block, config, "num_key_value_heads", self._heads)
        self._shapes, self._below, self._above = shapes, below, above
        self._units: Mapping[Kind, Any] | None = None
        self._lock = Lock()
        sizes = {"heads": self._heads, "groups": self._groups, "neurons": 1}
        uneven = (n for n, place in self.places.items() if shapes[n][place.axis] % sizes[place.kind])
        odd = without_place(shapes, self.places) or next(uneven, None)
        if odd or self._heads % self._groups:
            raise LayoutError(
                f"init {block.init}: deepen does not know the heads or neurons in {odd or 'the queries'!r} "
                f"of base block {block.copy_of}; choose init average or copy"
            )

    def order(self, name: str) -> tuple[int, Any]:
        """Return the axis of a tensor along which its units lie, and the order of the places of that axis."""
        from deepen.expansion.fusion import align, spread

        with self._lock:  # several files are written at once
            if self._units is None:
                counts = {"heads": self._heads, "groups": self._groups}
                self._units = align(self.places, self._below, self._above, **counts)
        place = self.places[name]
        units = self._units[place.kind]
        return place.axis, spread(units, self._shapes[name][place.axis] // len(units))


def _count(block: NewBlock, config: Mapping[str, Any], key: str, default: int | None) -> int:
    count = config.get(key) or default
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise LayoutError(f"init {block.init}: the config does not say {key}; choose init average or copy")
    return count


def _orders(
    block: NewBlock,
    config: Mapping[str, Any],
    below: Mapping[str, Tensor],
    above: Mapping[str, Tensor],
    family: Family,
) -> dict[str, Any]:
    """Return by tensor what finds the order of its units."""
    shapes = {name: tuple(tensor.shape) for name, tensor in below.items() if not family.is_buffer(name)}
    read = [{name: partial(_read, tensor) for name, tensor in held.items()} for held in (below, above)]
    alignment = Alignment(block, shapes, config, *read)
    return {name: partial(alignment.order, name) for name in alignment.places}


def _read(tensor: Tensor) -> Any:
    from deepen.expansion.fusion import whole

    return whole(tensor)
