"""Each token goes to the ranks that hold one of its experts, once to each, in buffers of a fixed size.

A rank has room for `room` tokens of every other one. Tokens beyond that are counted and take a second pass, round the
ring of ranks, which runs only if some rank has any: nothing is dropped.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from . import ring
from .value import Work, packed, spread_out, unpacked


def room(tokens: int, choices: int, ranks: int) -> int:
    """Tokens that a rank sends to one other at most: those to be expected of uniform routing, three standard deviations
    and 10 % more, in eights.

    >>> room(tokens=1024, choices=8, ranks=64), room(tokens=4, choices=2, ranks=8)
    (168, 4)
    """
    mean = tokens * (1 - (1 - 1 / ranks) ** choices)
    return min(tokens, 8 * math.ceil((1.1 * mean + 3 * math.sqrt(mean)) / 8))


def exchange(work: Work, size: int | None = None) -> tuple[jax.Array, jax.Array]:
    """The output `[G, D]` of a rank's tokens, and how many (token, rank) pairs of all ranks took the second pass.

    `size`: room for tokens from each rank to each other; None: `room`.
    """
    work, back = spread_out(work)
    tokens, choices = work.ids.shape
    size = room(tokens, choices, work.ranks) if size is None else size
    place, count = _places(work)
    fits = place < size
    nowhere = work.ranks * size
    slot = jnp.where(fits, jnp.where(work.ids >= 0, work.ids // work.each, work.ranks) * size + place, nowhere)
    token = jnp.full(nowhere, tokens, jnp.int32).at[slot].set(jnp.arange(tokens)[:, None], mode="drop")

    def across(x):
        return jax.lax.all_to_all(x.reshape(work.ranks, size, -1), work.axes, 0, 0).reshape(nowhere, -1)

    take = lambda x, value: x.at[token].get(mode="fill", fill_value=value)
    rows, both = across(take(work.rows, 0)), across(packed(take(work.ids, -1), take(work.weights, 0)))
    out = across(work.own(rows, *unpacked(both), expected=work.ids.size))
    # a token's rows come back once for each rank: at its first choice there
    first = jnp.where(fits & _first(work), slot, nowhere)
    parts = out.at[first].get(mode="fill", fill_value=0)
    y = parts.astype(jnp.float32).sum(1).astype(out.dtype)
    if size >= tokens:
        return back(y), jnp.zeros((), jnp.int32)
    beyond = jax.lax.psum(jnp.maximum(count - size, 0).sum(), work.axes)
    # what is known of everyone's choices is of all of them, not of those that are left
    left = dataclasses.replace(work, ids=jnp.where(fits, -1, work.ids), everyone=None)
    rest = jax.lax.cond(beyond > 0, lambda: ring.exchange(left), lambda: jnp.zeros_like(y))
    return back(y + rest), beyond


def _places(work: Work) -> tuple[jax.Array, jax.Array]:
    """Each choice's place among the tokens for its rank `[G, A]`, and how many tokens each rank gets `[ranks]`."""
    rank = jnp.where(work.ids >= 0, work.ids // work.each, work.ranks)
    goes = (rank[:, :, None] == jnp.arange(work.ranks)).any(1).astype(jnp.int32)
    order = jnp.cumsum(goes, axis=0) - goes
    return jnp.take_along_axis(order, jnp.minimum(rank, work.ranks - 1), axis=1), goes.sum(0)


def _first(work: Work) -> jax.Array:
    """Which choices `[G, A]` are their token's first for their rank; those of no expert are not."""
    rank = work.ids // work.each
    same = rank[:, :, None] == rank[:, None, :]
    earlier = jnp.tril(jnp.ones(same.shape[1:], bool), -1)
    return (work.ids >= 0) & ~(same & earlier & (work.ids >= 0)[:, None, :]).any(2)
