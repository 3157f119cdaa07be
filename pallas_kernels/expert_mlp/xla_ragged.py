"""The expert MLP over `jax.lax.ragged_dot`: what XLA itself has for grouped products."""

import jax
import jax.numpy as jnp

from ..plan import make_plan
from ..quantized import dense
from .reference import combine


def routed_mlp(x, ids, weights, experts, plan, layer):
    """See `api.routed_mlp`. Rows sorted by expert, three ragged products."""
    del plan  # ragged_dot wants rows packed without padding: a plan of one-row tiles
    num, choices = experts.num_experts, ids.shape[1]
    packed = make_plan(ids.reshape(-1, 1), num, tile_rows=1)
    rows = packed.row_choice
    taken = x.at[rows // choices].get(mode="fill", fill_value=0)
    flat = ids.reshape(-1)
    first = 0 if layer is None else layer * num
    layer = jax.tree.map(lambda w: jax.lax.dynamic_slice_in_dim(w, first, num), experts.flat())
    counts = jnp.zeros(num, jnp.int32).at[jnp.where(flat < 0, num, flat)].add(1, mode="drop")
    of_row = jnp.where(rows < flat.shape[0], flat.at[rows].get(mode="clip"), 0)

    def product(lhs, kernel, bias):
        kernel = dense(kernel, lhs.dtype)
        kernel = jnp.swapaxes(kernel, 1, 2) if experts.layout == "out_in" else kernel
        y = jax.lax.ragged_dot(lhs, kernel, counts, preferred_element_type=jnp.promote_types(x.dtype, jnp.float32))
        return y if bias is None else y + bias[of_row]

    up = product(taken, layer.up, layer.up_bias)
    gate = None if layer.gate is None else product(taken, layer.gate, layer.gate_bias)
    hidden = layer.activation(gate, up).astype(x.dtype)
    out = product(hidden, layer.down, layer.down_bias).astype(x.dtype)
    return combine(out, packed.slot.reshape(ids.shape), weights, x.dtype)
