"""`Plan`: where the routed rows go, aligned to tiles of `tile_rows` rows."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from .dims import Array as AnyArray


@jax.tree_util.register_dataclass
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
    tile_rows: int = dataclasses.field(metadata={"static": True})
    in_place: bool = dataclasses.field(metadata={"static": True})

    @property
    def max_tiles(self) -> int:
        """Static bound of the number of tiles."""
        return self.tile_expert.shape[0]


def tile_bound(rows: int, num_experts: int, tile_rows: int) -> int:
    """Most tiles that `rows` routed rows can need: `max(1, min(ceil(R/bm) + min(E, R), R))`.

    >>> tile_bound(rows=16, num_experts=4, tile_rows=8)
    6
    """
    return max(1, min(-(-rows // tile_rows) + min(num_experts, rows), rows))


def make_plan(ids: Int[AnyArray, "G A"], num_experts: int, tile_rows: int) -> Plan:
    """Lay the choices `ids` out in tiles of `tile_rows` rows, each tile for one expert.

    Args: `ids` int `[G, A]`, an id outside `[0, num_experts)` takes no row; within an expert rows keep the order of
    `ids` read row by row. If `tile_rows >= G` the plan is in place, one tile per active expert.

    Raises `ValueError` for a shape that is not `[G, A]`, `num_experts < 1` or `tile_rows < 1`.

    >>> plan = make_plan(jnp.array([[0, 2], [2, 1], [2, 9]]), num_experts=3, tile_rows=2)
    >>> plan.tile_expert[:plan.num_tiles].tolist(), plan.row_choice.reshape(-1, 2)[:4].tolist()
    ([0, 1, 2, 2], [[0, 6], [3, 6], [1, 2], [4, 6]])
    """
    if ids.ndim != 2 or not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(f"ids: expected integers of shape [G, A], got {ids.dtype} {ids.shape}")
    if num_experts < 1 or tile_rows < 1:
        raise ValueError(f"num_experts and tile_rows must be at least 1, got {num_experts} and {tile_rows}")
    num_tokens, choices = ids.shape
    rows = num_tokens * choices
    tiles = tile_bound(rows, num_experts, tile_rows)
    in_place = tile_rows >= num_tokens
    flat = jnp.asarray(ids, jnp.int32).reshape(-1)
    flat = jnp.where((flat >= 0) & (flat < num_experts), flat, num_experts)

    # One stable sort of R small integers: its cost does not depend on the number of experts.
    order = jnp.argsort(flat, stable=True).astype(jnp.int32)
    grouped = flat[order]
    edges = jnp.searchsorted(grouped, jnp.arange(num_experts + 1, dtype=jnp.int32)).astype(jnp.int32)
    counts = edges[1:] - edges[:-1]
    tiles_of = (counts > 0).astype(jnp.int32) if in_place else -(-counts // tile_rows)
    last_tile = jnp.cumsum(tiles_of, dtype=jnp.int32)
    first_tile = last_tile - tiles_of

    expert = jnp.minimum(grouped, num_experts - 1)
    inside = order // choices if in_place else jnp.arange(rows, dtype=jnp.int32) - edges[expert]
    nowhere = tiles * tile_rows
    slot = jnp.where(grouped < num_experts, first_tile[expert] * tile_rows + inside, nowhere)
    tile_expert = jnp.searchsorted(last_tile, jnp.arange(tiles, dtype=jnp.int32), side="right")
    return Plan(
        row_choice=jnp.full(nowhere, rows, jnp.int32).at[slot].set(order, mode="drop"),
        slot=jnp.zeros(rows, jnp.int32).at[order].set(slot).reshape(num_tokens, choices),
        tile_expert=jnp.minimum(tile_expert, num_experts - 1).astype(jnp.int32),
        num_tiles=last_tile[-1],
        tile_rows=tile_rows,
        in_place=in_place,
    )
