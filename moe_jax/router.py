"""Routing as a value: what the router decided, with its capacity, drops and losses as data."""

import dataclasses
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

import pallas_kernels
from pallas_kernels.dims import Array as AnyArray

from .block_config import RouterConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Routing:
    """What a router decided for `G` tokens.

    `ids`, `weights [G, A]`: chosen experts (-1: a padded token, which takes none) and their weights. `keep [G, A]`:
    false for choices dropped by capacity (and for padded tokens); a weight of 0 does not mean dropped. `position
    [G, A]`: the choice's slot in its expert, first choices of all tokens before second ones. `counts [E]`: choices
    per expert before dropping. `aux_loss`: load balancing, 1 when balanced (Switch, arXiv:2101.03961, eq. 4 over all
    choices). `z_loss`: mean squared log-partition of the logits (ST-MoE, arXiv:2202.08906, eq. 5). `capacity`: slots
    per expert, None without dropping.
    """

    ids: Int[Array, "G A"]
    weights: Float[Array, "G A"]
    keep: Bool[Array, "G A"]
    position: Int[Array, "G A"]
    counts: Int[Array, " E"]
    aux_loss: Float[Array, ""]
    z_loss: Float[Array, ""]
    capacity: int | None = dataclasses.field(default=None, metadata={"static": True})

    def _slots(self) -> tuple[Array, int]:
        capacity = int(self.counts.max()) if self.capacity is None else self.capacity
        slots = self.counts.shape[0] * capacity
        return jnp.where(self.keep, self.ids * capacity + self.position, slots), capacity

    def dense_combine_weights(self) -> Float[Array, "G E C"]:
        """The kept weights as GShard's dense tensor; without capacity `C = max(counts)`, outside `jit` only."""
        slot, capacity = self._slots()
        dense = jnp.zeros((self.ids.shape[0], self.counts.shape[0] * capacity), self.weights.dtype)
        rows = jnp.arange(self.ids.shape[0])[:, None]
        dense = dense.at[rows, slot].set(self.weights, mode="drop")
        return dense.reshape(self.ids.shape[0], -1, capacity)

    def dense_dispatch_mask(self) -> Bool[Array, "G E C"]:
        """Which token sits in which slot; as `dense_combine_weights`."""
        slot, capacity = self._slots()
        dense = jnp.zeros((self.ids.shape[0], self.counts.shape[0] * capacity), bool)
        dense = dense.at[jnp.arange(self.ids.shape[0])[:, None], slot].set(True, mode="drop")
        return dense.reshape(self.ids.shape[0], -1, capacity)


def choose(
    config: RouterConfig,
    weights: Mapping[str, Array],
    rows: Float[Array, "G D"],
    forced: Int[Array, "G A"] | None = None,
) -> tuple[Float[Array, "G E"], Int[Array, "G A"], Float[Array, "G A"]]:
    """The gate: float32 logits `[G, E]`, chosen ids and their weights `[G, A]`.

    `weights`: `router [E, D]`, and where the config has them `router_bias` and `selection_bias` `[E]`. The product
    accumulates in float32 whatever the dtype of `rows`.
    """
    logits = jnp.matmul(rows, weights["router"].T, preferred_element_type=jnp.float32)
    if config.logit_bias:
        logits = logits + weights["router_bias"].astype(jnp.float32)
    ids, gates, _ = pallas_kernels.route(
        logits,
        config.top_k,
        config.score,
        config.renormalize,
        weights.get("selection_bias"),
        config.groups,
        config.top_groups,
        config.scale,
        config.jitter,
        forced,
    )
    return logits, ids, gates


def capacity_of(tokens: int, choices: int, num_experts: int, factor: float) -> int:
    """Slots per expert: `ceil(tokens * choices / experts * factor)`, at least one and at most one per token.

    >>> capacity_of(tokens=64, choices=2, num_experts=8, factor=1.25)
    20
    """
    if not factor > 0:
        raise ValueError(f"capacity_factor: {factor} is not positive")
    return max(1, min(tokens, math.ceil(tokens * choices / num_experts * factor)))


def describe(
    config: RouterConfig,
    logits: Float[AnyArray, "G E"],
    ids: Int[AnyArray, "G A"],
    weights: Float[AnyArray, "G A"],
    capacity: int | None = None,
) -> Routing:
    """The `Routing` of choices: positions, counts, drops beyond `capacity` and auxiliary losses.

    An id outside `[0, E)` marks a token that takes no expert and no part in the losses.
    """
    num, (tokens, choices) = config.num_experts, ids.shape
    real = (ids >= 0) & (ids < num)
    ranked = jnp.where(real, ids, num).T.reshape(-1)  # first choices of all tokens, then second ones
    order = jnp.argsort(ranked, stable=True)
    edges = jnp.searchsorted(ranked[order], jnp.arange(num + 1))
    inside = jnp.arange(ranked.size) - edges[ranked[order]]
    position = jnp.zeros(ranked.size, jnp.int32).at[order].set(inside.astype(jnp.int32))
    position = position.reshape(choices, tokens).T
    counts = (edges[1:] - edges[:-1]).astype(jnp.int32)
    keep = real if capacity is None else real & (position < capacity)
    taking = real.any(-1)
    aux_loss, z_loss = _losses(config, logits, counts, taking)
    ids, weights, keep = (jnp.asarray(a) for a in (ids, weights, keep))
    return Routing(ids, weights, keep, position, counts, aux_loss, z_loss, capacity)


def _losses(config, logits, counts, taking):
    tokens = jnp.maximum(taking.sum(), 1)
    scores = jax.nn.sigmoid(logits) if config.score == "sigmoid" else jax.nn.softmax(logits, axis=-1)
    scores = scores / scores.sum(-1, keepdims=True)
    mean = jnp.where(taking[:, None], scores, 0).sum(0) / tokens
    share = counts / jnp.maximum(counts.sum(), 1)
    partition = jax.nn.logsumexp(logits, axis=-1)
    return config.num_experts * (share * mean).sum(), jnp.where(taking, partition**2, 0).sum() / tokens
