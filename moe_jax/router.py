"""The router of the transformer families: the gate, its capacity, and its choices as a `Routing`."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

import pallas_kernels
from pallas_kernels.dims import Array as AnyArray
from pallas_kernels.linear import linear

from .axes import add_up, gathered, own_part
from .block_config import RouterConfig
from .gating import gate, top1_gating, top2_gating, topk_gating
from .routing import Routing, losses, rank_within

__all__ = ["Routing", "capacity_of", "choose", "describe", "top1_gating", "top2_gating", "topk_gating"]


class Chosen(NamedTuple):
    """What a gate chose for a device's tokens: `ids` (-1: no expert is to run) and `weights [G, A]`.

    `everyone`: both for the tokens of all devices that it looked at, where it had to look at others'.
    """

    ids: Int[Array, "G A"]
    weights: Float[Array, "G A"]
    everyone: tuple[Array, Array] | None = None


def choose(
    config: RouterConfig,
    weights: Mapping[str, Array],
    rows: Float[Array, "G D"],
    forced: Int[Array, "G A"] | None = None,
    real: Bool[Array, " G"] | None = None,
    axes: tuple[str, ...] = (),
) -> tuple[Float[Array, "G E"], Chosen]:
    """The gate: float32 logits `[G, E]` and what it chose.

    `weights`: `router [E, D]`, and where the config has them `router_bias` and `selection_bias` `[E]`. The product
    accumulates in float32 whatever the dtype of `rows`. `real`: false for padding, which takes no expert. `axes`: mesh
    axes along whose devices the tokens are spread, which matters for gates with a capacity.
    """
    biases = [weights["router_bias"]] if config.logit_bias else None
    (logits,) = linear(rows, [weights["router"]], biases=biases, dtype=jnp.float32)
    return logits, choose_by(config, logits, weights.get("selection_bias"), forced, real, axes)


def choose_by(
    config: RouterConfig,
    logits: Float[Array, "G E"],
    selection_bias: Float[Array, " E"] | None = None,
    forced: Int[Array, "G A"] | None = None,
    real: Bool[Array, " G"] | None = None,
    axes: tuple[str, ...] = (),
) -> Chosen:
    """The gate behind its logits, see `choose`."""
    if config.rule is not None:
        real, forced = (None if a is None else gathered(a, axes, 0) for a in (real, forced))
        routing = gate(gathered(logits, axes, 0), config.rule, real, forced=forced)
        ids = jnp.where(routing.keep, routing.ids, -1)
        everyone = (ids, routing.weights) if axes else None
        return Chosen(own_part(ids, axes, 0), own_part(routing.weights, axes, 0), everyone)
    ids, gates, _ = pallas_kernels.route(
        logits,
        config.top_k,
        config.score,
        config.renormalize,
        selection_bias,
        config.groups,
        config.top_groups,
        config.scale,
        config.jitter,
        forced,
    )
    return Chosen(ids if real is None else jnp.where(real[:, None], ids, -1), gates)


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

    First choices of all tokens take their slots before second ones. An id outside `[0, E)` marks a token that takes
    no expert and no part in the losses.
    """
    real = (ids >= 0) & (ids < config.num_experts)
    position, counts = _positions(ids, real, config.num_experts)
    keep = real if capacity is None else real & (position < capacity)
    share = counts / jnp.maximum(counts.sum(), 1)
    aux_loss, z_loss = losses(_scores(config, logits), logits, share, real.any(-1))
    ids, weights, keep = (jnp.asarray(a) for a in (ids, weights, keep))
    return Routing(ids, weights, keep, position, counts, aux_loss, z_loss, capacity)


def limited(chosen: Chosen, num_experts: int, factor: float, axes: tuple[str, ...] = ()) -> Chosen:
    """`chosen` without choices beyond a capacity, that of the tokens of all devices along mesh `axes`.

    Places are taken as in `describe`. Weights stay as they are: what is dropped adds nothing (arXiv:2101.03961).
    """
    ids, weights = (gathered(a, axes, 0) for a in (chosen.ids, chosen.weights))
    real = ids >= 0
    position, _ = _positions(ids, real, num_experts)
    tokens, choices = ids.shape
    ids = jnp.where(real & (position < capacity_of(tokens, choices, num_experts, factor)), ids, -1)
    return Chosen(own_part(ids, axes, 0), chosen.weights, (ids, weights) if axes else None)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Balance:
    """How a layer's tokens, those of all devices, were spread: `aux_loss` and `z_loss` as in `Routing`, and choices
    before dropping, `counts [E]`."""

    aux_loss: Float[Array, ""]
    z_loss: Float[Array, ""]
    counts: Int[Array, " E"]


def balance_of(
    config: RouterConfig,
    logits: Float[Array, "G E"],
    axes: tuple[str, ...] = (),
    bias: Float[Array, " E"] | None = None,
    real: Bool[Array, "..."] | None = None,
) -> Balance:
    """The `Balance` of a gate on logits `[G, E]`, those of a device's tokens along mesh `axes`.

    `bias`: the selection bias. `real`, of G elements: false for padding, which has no part in anything.
    """
    real = jnp.ones(len(logits), bool) if real is None else jnp.ravel(real)
    if config.rule is not None:
        routing = gate(gathered(logits, axes, 0), config.rule, gathered(real, axes, 0))
        return Balance(routing.aux_loss, routing.z_loss, routing.counts)
    num_experts = logits.shape[1]
    ids = choose_by(config, jax.lax.stop_gradient(logits), bias, real=real).ids
    # compared, not scattered: 16384 tokens that meet in 64 places took a GPU 1.2 ms
    counts = (ids[:, :, None] == jnp.arange(num_experts)).sum((0, 1), dtype=jnp.int32)
    counts = add_up(counts, axes)
    share = counts / jnp.maximum(counts.sum(), 1)
    return Balance(*losses(_scores(config, logits), logits, share, real, axes), counts)


def _scores(config: RouterConfig, logits: Float[AnyArray, "G E"]) -> Float[Array, "G E"]:
    """What the load balancing loss takes for a token's probabilities: its scores, divided by their sum."""
    scores = jax.nn.sigmoid(logits) if config.score == "sigmoid" else jax.nn.softmax(logits, axis=-1)
    return scores / scores.sum(-1, keepdims=True)


def _positions(ids: Any, real: Any, num_experts: int) -> tuple[Int[Array, "G A"], Int[Array, " E"]]:
    """Each choice's place in its expert, first choices of all tokens before second ones, and choices by expert."""
    position, counts = rank_within(jnp.where(real, ids, num_experts).T.reshape(-1), num_experts)
    return position.reshape(ids.shape[::-1]).T, counts
