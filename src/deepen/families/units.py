"""The interchangeable parts of a block: neurons of its feed-forward, whole heads of its attention.

Putting neurons in another order, in every tensor that has one of theirs in each row or column, leaves what a
block computes as it is; so does putting groups of heads that share keys and values in another order, and the
heads inside a group. Inside a head the order is fixed by rotary positions.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final, Literal

from deepen.families.names import generic, spell_out

Kind = Literal["neurons", "heads", "groups"]


@dataclass(frozen=True)
class Place:
    """Where the units of a tensor lie.

    Attributes:
        kind: what they are; `groups` are heads of keys and values, each shared by a run of `heads`.
        axis: the axis along which each has as many places as any other.
    """

    kind: Kind
    axis: int


_NAMES: Final[tuple[tuple[Kind, int, str], ...]] = (
    ("neurons", 0, "mlp.{gate_proj,up_proj,c_fc,fc1}.{weight,bias}"),
    ("neurons", 0, "fc1.{weight,bias}"),
    ("neurons", 1, "mlp.{down_proj,c_proj,fc2}.weight"),
    ("neurons", 1, "fc2.weight"),
    ("heads", 0, "self_attn.q_proj.{weight,bias}"),
    ("groups", 0, "self_attn.{k,v}_proj.{weight,bias}"),
    ("heads", 1, "self_attn.{o_proj,out_proj,dense}.weight"),
)
# Norms of queries and keys have gains for one head, which all share, or for each.
_NORMS: Final[Mapping[str, Kind]] = {"self_attn.q_norm.weight": "heads", "self_attn.k_norm.weight": "groups"}
_PLACES: Final = {name: Place(kind, axis) for kind, axis, names in _NAMES for name in spell_out([names])}


def unit_places(shapes: Mapping[str, tuple[int, ...]], heads: int) -> dict[str, Place]:
    """Return where the units of a block's tensors lie; tensors without any are left out.

    Args:
        shapes: of the block's tensors, by name inside the block.
        heads: number of its heads.
    """
    found = {name: place for name in shapes if (place := _PLACES.get(name))}
    queries = shapes.get("self_attn.q_proj.weight", (0,))[0]
    keys = shapes.get("self_attn.k_proj.weight", (0,))[0]
    for name, kind in _NORMS.items():
        whole = (queries if kind == "heads" else keys,)
        if name in shapes and (len(shapes[name]) > 1 or (heads > 1 and shapes[name] == whole)):
            found[name] = Place(kind, 0)
    return found


def without_place(shapes: Mapping[str, tuple[int, ...]], places: Iterable[str]) -> str | None:
    """Return the first tensor that may have units of which nothing is known; None where all is known.

    A vector has none: it lies along the residual stream, or is shared by all heads.
    """
    known = set(places)
    odd = (name for name, shape in shapes.items() if len(shape) > 1 or generic(name) != name)
    return next((name for name in odd if name not in known), None)
