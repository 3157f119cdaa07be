"""The weighted sum of each token's expert outputs, written so that a compiler fuses it and keeps its order."""

import jax
import jax.numpy as jnp


def combine(rows, slot, weights, dtype):
    """`sum over a of weights[g, a] * rows[slot[g, a]]` in float32, term by term; a sentinel slot adds nothing.

    Written out, so that a token's sum is the same whatever the batch.
    """
    with jax.named_scope("combine"):
        total = 0.0
        for a in range(slot.shape[1]):
            at, weight = slot[:, a], weights[:, a, None].astype(jnp.float32)
            row = rows.at[at].get(mode="clip").astype(jnp.float32)
            total += jnp.where((at < rows.shape[0])[:, None], row * weight, 0)
        return total.astype(dtype)
