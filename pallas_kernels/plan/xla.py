"""The plan in plain XLA: one stable sort of small integers, whose cost does not depend on the number of experts."""

import jax.numpy as jnp

from .value import Plan, tile_bound


def make_plan(ids, num_experts, tile_rows):
    """See `api.make_plan`."""
    num_tokens, choices = ids.shape
    rows = num_tokens * choices
    tiles = tile_bound(rows, num_experts, tile_rows)
    in_place = tile_rows >= num_tokens
    flat = ids.reshape(-1)
    flat = jnp.where((flat >= 0) & (flat < num_experts), flat, num_experts)

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
