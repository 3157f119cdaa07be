"""Each token goes to the ranks that hold one of its experts, once to each, and no padding with it.

`jax.lax.ragged_all_to_all`, which XLA has on GPUs and TPUs, not on CPUs. The buffer for what comes in is as large as
all ranks' tokens together, the most that routing can ask for.
"""

import jax
import jax.numpy as jnp

from .all_to_all import _first, _places
from .value import Work, packed, spread_out, unpacked


def exchange(work: Work) -> jax.Array:
    """The output `[G, D]` of a rank's tokens."""
    work, back = spread_out(work)
    tokens, ranks = len(work.rows), work.ranks
    place, sent = _places(work)
    begins = jnp.cumsum(sent) - sent
    rank = jnp.where(work.ids >= 0, work.ids // work.each, ranks)
    slot = jnp.where(work.ids >= 0, begins.at[rank].get(mode="clip") + place, ranks * tokens)
    most = min(ranks, work.ids.shape[1]) * tokens
    token = jnp.full(most, tokens, jnp.int32).at[slot].set(jnp.arange(tokens)[:, None], mode="drop")

    counts = jax.lax.all_gather(sent, work.axes)  # [from, to]
    me = jax.lax.axis_index(work.axes)
    came, before = counts[:, me], jnp.cumsum(counts, axis=0) - counts
    # where my rows begin at each rank, and where those that come back from it began here
    there, here = before[me], jnp.cumsum(counts, axis=1) - counts
    out_sizes = begins, sent, there, came

    def forth(x):
        into = jnp.zeros((ranks * tokens, x.shape[1]), x.dtype)
        return jax.lax.ragged_all_to_all(x, into, *out_sizes, axis_name=work.axes)

    take = lambda x, value: x.at[token].get(mode="fill", fill_value=value)
    rows, both = forth(take(work.rows, 0)), forth(packed(take(work.ids, -1), take(work.weights, 0)))
    ids, weights = unpacked(both)
    arrived = jnp.arange(ranks * tokens) < came.sum()
    y = work.own(rows, jnp.where(arrived[:, None], ids, -1), weights)
    starts = jnp.cumsum(came) - came
    into = jnp.zeros((most, y.shape[1]), y.dtype)
    out = jax.lax.ragged_all_to_all(y, into, starts, came, here[:, me], sent, axis_name=work.axes)
    first = jnp.where(_first(work), slot, most)
    parts = out.at[first].get(mode="fill", fill_value=0)
    return back(parts.astype(jnp.float32).sum(1).astype(out.dtype))
