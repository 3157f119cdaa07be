"""All tokens on every rank, each of which runs its own experts on them; the parts are added up.

What is on the wire in and out is `(ranks - 1)` times a rank's tokens, whatever their routing, in two steps: nothing is
faster for few tokens.
"""

import jax

from ..axes import gathered
from .value import Work, packed, unpacked


def exchange(work: Work) -> jax.Array:
    """The output `[G, D]` of a rank's tokens."""
    if not work.spread:
        return jax.lax.psum(work.own(work.rows, work.ids, work.weights), work.axes)
    rows = gathered(work.rows, work.axes, 0)
    everyone = work.everyone or unpacked(gathered(packed(work.ids, work.weights), work.axes, 0))
    y = work.own(rows, *everyone)
    return jax.lax.psum_scatter(y, work.axes, scatter_dimension=0, tiled=True)
