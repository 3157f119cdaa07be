"""The plain expert MLP: every expert on every token. For tests and for reading; nothing runs it by default."""

import jax
import jax.numpy as jnp

from ..experts import Experts
from ..quantized import dense


def expert(x: jax.Array, weights: Experts) -> jax.Array:
    """One expert (`weights` without expert axis) on rows `x [rows, D]`; products accumulate in float32."""

    def times(kernel, x):
        # The transpose is written out: XLA on a CPU then fuses it with the slice that took the kernel from its stack.
        kernel = kernel.T if weights.layout == "out_in" else kernel
        return jnp.matmul(x, kernel, preferred_element_type=jnp.promote_types(x.dtype, jnp.float32))

    def linear(x, kernel, bias):
        y = times(dense(kernel, x.dtype), x)
        return y if bias is None else y + bias

    up = linear(x, weights.up, weights.up_bias)
    gate = None if weights.gate is None else linear(x, weights.gate, weights.gate_bias)
    # XLA on a CPU would compute it again for every output of the next product, if that is of one row.
    hidden = jax.lax.optimization_barrier(weights.activation(gate, up).astype(x.dtype))
    return linear(hidden, weights.down, weights.down_bias).astype(x.dtype)


def combine(rows: jax.Array, slot: jax.Array, weights: jax.Array, dtype) -> jax.Array:
    """`sum over a of weights[g, a] * rows[slot[g, a]]` in float32, in the order of `a`; no row for a sentinel slot."""
    taken = rows.at[slot].get(mode="fill", fill_value=0)
    weights = jnp.where(slot < rows.shape[0], weights, 0)
    wide = jnp.promote_types(dtype, jnp.float32)
    exact = jax.lax.Precision.HIGHEST  # accelerators would round the operands otherwise
    return jnp.einsum("gad,ga->gd", taken.astype(wide), weights.astype(wide), precision=exact).astype(dtype)


def routed_mlp(x, ids, weights, experts, plan, layer):
    """See `api.routed_mlp`."""
    del plan
    first = 0 if layer is None else layer * experts.num_experts
    layer = jax.tree.map(lambda w: jax.lax.dynamic_slice_in_dim(w, first, experts.num_experts), experts.flat())
    outputs = jax.vmap(expert, in_axes=(None, 0))(x, layer)
    tokens, num = x.shape[0], experts.num_experts
    slot = jnp.where((ids >= 0) & (ids < num), ids * tokens + jnp.arange(tokens)[:, None], num * tokens)
    return combine(outputs.reshape(num * tokens, -1), slot, weights, x.dtype)
