"""The expert MLP as a loop over the tiles of the plan: work follows the active experts, not all of them."""

import jax
import jax.numpy as jnp

from ..plan import make_plan
from .reference import combine, expert


def routed_mlp(x, ids, weights, experts, plan, first):
    """See `api.routed_mlp`."""
    if plan is None:
        plan = make_plan(ids, experts.num_experts, tile_rows(ids.size, experts.num_experts))
    token = plan.row_choice // ids.shape[1]
    rows = _run_tiles(x, experts.flat(), token, plan.tile_expert + first, plan.num_tiles)
    return combine(rows, plan.slot, weights, x.dtype)


def tile_rows(rows: int, num_experts: int) -> int:
    """Rows per tile for `rows` routed rows (measured on a CPU: docs/decisions.md).

    Few rows per expert: one row a tile, whose products read the weights in place. Then tiles that hold nearly every
    expert's rows at once, since each further tile copies the expert's weights again; at most 128, which fill the
    cache.
    """
    mean = rows / num_experts
    if mean <= 2:
        return 1
    if mean <= 6:
        return 8
    return min(128, -(-int(1.25 * mean) // 16) * 16)


def _take(experts, index):
    return jax.tree.map(lambda w: jax.lax.dynamic_index_in_dim(w, index, keepdims=False), experts)


@jax.custom_vjp
def _run_tiles(x, experts, token, tile_expert, num_tiles):
    """Rows `[tiles * tile_rows, D]`: each tile's expert on its tokens; zero past `num_tiles`."""
    tiles = tile_expert.shape[0]
    size = token.shape[0] // tiles

    def body(t, rows):
        tokens = jax.lax.dynamic_slice_in_dim(token, t * size, size)
        taken = x.at[tokens].get(mode="fill", fill_value=0)
        out = expert(taken, _take(experts, tile_expert[t]))
        return jax.lax.dynamic_update_slice_in_dim(rows, out, t * size, axis=0)

    return jax.lax.fori_loop(0, num_tiles, body, jnp.zeros((token.shape[0], x.shape[1]), x.dtype))


def _forward(x, experts, token, tile_expert, num_tiles):
    return _run_tiles(x, experts, token, tile_expert, num_tiles), (x, experts, token, tile_expert, num_tiles)


def _backward(saved, d_rows):
    """The same loop backwards, recomputing each tile; weight gradients accumulate in place in float32."""
    x, experts, token, tile_expert, num_tiles = saved
    size = token.shape[0] // tile_expert.shape[0]

    def body(t, carry):
        d_x, d_experts = carry
        tokens = jax.lax.dynamic_slice_in_dim(token, t * size, size)
        taken = x.at[tokens].get(mode="fill", fill_value=0)
        _, pull = jax.vjp(expert, taken, _take(experts, tile_expert[t]))
        d_taken, d_expert = pull(jax.lax.dynamic_slice_in_dim(d_rows, t * size, size))
        d_x = d_x.at[tokens].add(d_taken.astype(d_x.dtype), mode="drop")
        add = lambda total, part: total.at[tile_expert[t]].add(part.astype(total.dtype))
        return d_x, jax.tree.map(add, d_experts, d_expert)

    def wide(w):
        return jnp.zeros(w.shape, jnp.promote_types(w.dtype, jnp.float32))

    d_x, d_experts = jax.lax.fori_loop(0, num_tiles, body, (wide(x), jax.tree.map(wide, experts)))
    d_experts = jax.tree.map(lambda d, w: d.astype(w.dtype), d_experts, experts)
    return d_x.astype(x.dtype), d_experts, None, None, None


_run_tiles.defvjp(_forward, _backward)
