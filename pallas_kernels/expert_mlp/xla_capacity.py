"""The expert MLP through a fixed number of slots per expert."""

import jax
import jax.numpy as jnp

from .reference import combine, expert


def capacity_mlp(x, ids, weights, position, experts, capacity):
    """See `api.capacity_mlp`."""
    num, (tokens, choices) = experts.num_experts, ids.shape
    kept = (ids >= 0) & (ids < num) & (position >= 0) & (position < capacity)
    slot = jnp.where(kept, ids * capacity + position, num * capacity)
    token = jnp.broadcast_to(jnp.arange(tokens, dtype=jnp.int32)[:, None], (tokens, choices))
    token_of = jnp.full(num * capacity, tokens, jnp.int32).at[slot].set(token, mode="drop")
    rows = x.at[token_of].get(mode="fill", fill_value=0).reshape(num, capacity, -1)
    outputs = jax.vmap(expert)(rows, experts)
    return combine(outputs.reshape(num * capacity, -1), slot, weights, x.dtype)
