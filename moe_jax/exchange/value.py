"""`Work`: what an exchange is given, and what its forms have in common."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ..axes import own_part

#: Runs the device's own experts: of rows `[G, D]`, their ids among these experts `[G, A]` (-1: none) and weights
#: `[G, A]` it makes `[G, D]`; with about how many ids there will be.
Run = Callable[[jax.Array, jax.Array, jax.Array, int], jax.Array]


@dataclasses.dataclass(frozen=True)
class Work:
    """One device's tokens and its experts, inside `shard_map`.

    `rows [G, D]`, `ids [G, A]` of any device's experts (-1: none), `weights [G, A]`; `run` the device's own experts,
    `each` of them per device, consecutive ids on each of the devices along mesh `axes`. `spread`: the tokens are other
    ones on every device along `axes`; else all have the same. `everyone`: ids and weights of all these devices' tokens,
    if they are known here already.
    """

    rows: Float[Array, "G D"]
    ids: Int[Array, "G A"]
    weights: Float[Array, "G A"]
    run: Run
    each: int
    axes: tuple[str, ...]
    spread: bool
    everyone: tuple[Int[Array, "RG A"], Float[Array, "RG A"]] | None = None

    @property
    def ranks(self) -> int:
        """How many devices hold experts."""
        return jax.lax.axis_size(self.axes)

    def own(self, rows: jax.Array, ids: jax.Array, weights: jax.Array, expected: int | None = None) -> jax.Array:
        """The device's experts' part of the output for any tokens `[G, D]`.

        `expected`: about how many of their ids are the device's; None: a rank's even part of all.
        """
        first = jax.lax.axis_index(self.axes) * self.each
        mine = (ids >= first) & (ids < first + self.each)
        expected = -(-ids.size // self.ranks) if expected is None else expected
        return self.run(rows, jnp.where(mine, ids - first, -1), weights, expected)


def spread_out(work: Work) -> tuple[Work, Callable[[jax.Array], jax.Array]]:
    """The work with other tokens on every device, and what brings the output `[G, D]` to those that had them."""
    if work.spread:
        return work, lambda y: y
    tokens, ranks = len(work.rows), work.ranks
    short = -tokens % ranks
    filled = lambda x, value: jnp.pad(x, ((0, short), (0, 0)), constant_values=value)
    parts = (filled(x, value) for x, value in ((work.rows, 0), (work.ids, -1), (work.weights, 0)))
    rows, ids, weights = (own_part(x, work.axes, 0) for x in parts)
    part = dataclasses.replace(work, rows=rows, ids=ids, weights=weights, spread=True)
    return part, lambda y: jax.lax.all_gather(y, work.axes, axis=0, tiled=True)[:tokens]


def packed(ids: Int[Array, "*G A"], weights: Float[Array, "*G A"]) -> Float[Array, "*G AA"]:
    """Ids and weights in one array, so that they move together: float32, which holds ids below 2^24 exactly and lets
    derivatives of the weights come back."""
    return jnp.concatenate([ids.astype(jnp.float32), weights.astype(jnp.float32)], -1)


def unpacked(both: Float[Array, "*G AA"]) -> tuple[Int[Array, "*G A"], Float[Array, "*G A"]]:
    """The inverse of `packed`."""
    ids, weights = jnp.split(both, 2, axis=-1)
    return ids.astype(jnp.int32), weights
