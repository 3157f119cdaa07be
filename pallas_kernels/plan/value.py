"""`Plan`: where the routed rows go, aligned to tiles of `tile_rows` rows."""

import dataclasses

import jax
from jaxtyping import Array, Int


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True)
class Plan:
    """A list of tiles, each `tile_rows` rows of one expert; only the first `num_tiles` hold work.

    `row_choice[tiles * tile_rows]`: the choice `g * A + a` that a row serves, the sentinel `G * A` for padding; it
    gives the token, the weight and the way back. `slot[G, A]`: the row of each choice, the sentinel
    `tiles * tile_rows` for a choice that takes no row (an id outside `[0, E)`: padded token, dropped choice, another
    rank's expert). `tile_expert[tiles]`: the expert of each tile (past `num_tiles`: `E - 1`, never to be run).
    `num_tiles`: scalar on the device. `in_place`: row `g` of every tile is token `g`, so that kernels read `x`
    without a gather (decode).
    """

    row_choice: Int[Array, " rows"]
    slot: Int[Array, "G A"]
    tile_expert: Int[Array, " tiles"]
    num_tiles: Int[Array, ""]
    tile_rows: int
    in_place: bool

    @property
    def max_tiles(self) -> int:
        """Static bound of the number of tiles."""
        return self.tile_expert.shape[0]

    def tree_flatten(self):
        return tuple(getattr(self, name) for name in _ARRAYS), (self.tile_rows, self.in_place)

    @classmethod
    def tree_unflatten(cls, static, children):
        self = object.__new__(cls)  # no checks of types: transformations put placeholders in the leaves
        for name, value in zip((*_ARRAYS, "tile_rows", "in_place"), (*children, *static), strict=True):
            object.__setattr__(self, name, value)
        return self


_ARRAYS = ("row_choice", "slot", "tile_expert", "num_tiles")


def tile_bound(rows: int, num_experts: int, tile_rows: int) -> int:
    """Most tiles that `rows` routed rows can need: `max(1, min(ceil(R/bm) + min(E, R), R))`.

    >>> tile_bound(rows=16, num_experts=4, tile_rows=8)
    6
    """
    return max(1, min(-(-rows // tile_rows) + min(num_experts, rows), rows))
