"""Tokens go round the ranks with what has been added up for them; no rank ever holds more than one rank's tokens.

The same bytes as with replicated tokens, in `ranks` steps between neighbours, each of which can overlap with the
experts of the one before.
"""

import jax
import jax.numpy as jnp

from .value import Work, packed, spread_out, unpacked


def exchange(work: Work) -> jax.Array:
    """The output `[G, D]` of a rank's tokens."""
    work, back = spread_out(work)
    ranks = work.ranks
    onward = [(rank, (rank + 1) % ranks) for rank in range(ranks)]
    send = lambda x: jax.lax.ppermute(x, work.axes, onward)

    def hop(turn, carry):
        rows, both, total = carry
        total = total + work.own(rows, *unpacked(both))
        return send(rows), send(both), send(total)

    start = work.rows, packed(work.ids, work.weights), jnp.zeros_like(work.rows)
    return back(jax.lax.fori_loop(0, ranks, hop, start)[2])
