"""The transformer block: one function for every family; what differs is configuration."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

import pallas_kernels
from pallas_kernels import Activation, Experts
from pallas_kernels.dims import Array as AnyArray

from .attention import Span, Varying, attend, project, visible
from .block_config import BlockConfig
from .cache import read_entries, write_entries
from .linear import linear
from .norm import norm
from .router import choose
from .weights import Weights


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Choice:
    """What an MoE layer's router did: logits `[G, E]`, ids (-1: the token took no expert) and weights `[G, A]`.

    In a `Trace` all MoE layers are stacked in front.
    """

    logits: Float[Array, "*Lm G E"]
    ids: Int[Array, "*Lm G A"]
    weights: Float[Array, "*Lm G A"]


@dataclasses.dataclass(frozen=True)
class Place:
    """Which layer runs: its index among all layers, and among those with the same kind of MLP; both may be traced."""

    layer: Any
    of_kind: Any
    moe: bool
    varying: Varying


def take(group: dict[str, Array], index: Any) -> dict[str, Array]:
    """One layer's weights out of a group's stacks. Never for experts: their stack is addressed, not sliced."""
    return {name: jax.lax.dynamic_index_in_dim(stack, index, keepdims=False) for name, stack in group.items()}


def block(
    config: BlockConfig,
    weights: Weights,
    x: Float[Array, "B T D"],
    place: Place,
    span: Span,
    entries: dict[str, Array] | None,
    column: Any,
    routing: "RoutingRequest",
) -> tuple[Float[Array, "B T D"], dict[str, Array] | None, Choice | None]:
    """One layer: attention and MLP, each with its norm and residual.

    `entries`: the cache's stacks, written at `column` and read back; None attends to the new tokens alone.
    """
    pre = config.norm.place == "pre"
    attention_norm, mlp_norm = (take(weights[name], place.layer) for name in ("attention_norm", "mlp_norm"))
    with jax.named_scope("attention"):
        h = norm(config.norm, x, attention_norm) if pre else x
        h, entries = _attention(config, weights, h, place, span, entries, column)
        x = _add(config, x, h, attention_norm)
    with jax.named_scope("moe" if place.moe else "mlp"):
        h = norm(config.norm, x, mlp_norm) if pre else x
        choice = None
        if place.moe:
            h, choice = moe(config, weights, h, place.of_kind, routing)
        else:
            h = mlp(config.dense.activation, take(weights["dense"], place.of_kind), h)
        x = _add(config, x, h, mlp_norm)
    return x, entries, choice


def _add(config, x, h, norm_weights):
    """The residual sum; post-norm blocks norm what is added."""
    if config.norm.place == "post":
        h = norm(config.norm, h, norm_weights)
    return x + (h if config.residual_scale == 1.0 else h * config.residual_scale)


def _attention(config, weights, h, place, span, entries, column):
    own = take(weights["attention"], place.layer)
    q, new = project(config.attention, own, h, span, place.varying)
    if entries is not None:
        entries = write_entries(entries, new, place.layer, column)
    # The first tokens of an empty cache are all there is to see: no need to read them back.
    fresh = span.key_valid.shape[1] == h.shape[1]
    seen = new if entries is None or fresh else read_entries(entries, place.layer)
    return attend(config.attention, own, q, seen, visible(span, place.varying)), entries


def mlp(activation: Activation, weights: dict[str, Array], x: Float[Array, "*G D"]) -> Float[Array, "*G D"]:
    """A dense MLP with the expert's formula."""

    def product(x, name):
        return linear(x, weights[name], weights.get(f"{name}_bias"))

    gate = product(x, "gate") if activation.gated else None
    return product(activation(gate, product(x, "up")), "down")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RoutingRequest:
    """What the caller asks of the routers: which tokens take experts, which choices are forced.

    `real [B, T]`: false for padding, which takes no expert's time. `forced [Lm, B, T, A]`: expert ids by MoE layer,
    -1 where the router decides; None leaves all to the router.
    """

    real: Bool[AnyArray, "B T"]
    forced: Int[AnyArray, "Lm B T A"] | None = None
    implementation: str | None = dataclasses.field(default=None, metadata={"static": True})


def moe(
    config: BlockConfig, weights: Weights, x: Float[Array, "B T D"], index: Any, request: RoutingRequest
) -> tuple[Float[Array, "B T D"], Choice]:
    """Router, experts and shared experts of the MoE layer with `index` among the MoE layers."""
    group = weights["moe"]
    rows = x.reshape(-1, x.shape[-1])
    forced = None
    if request.forced is not None:
        forced = jax.lax.dynamic_index_in_dim(request.forced, index, keepdims=False).astype(jnp.int32)
        forced = forced.reshape(rows.shape[0], -1)
    with jax.named_scope("router"):
        own = take({name: group[name] for name in _ROUTER if name in group}, index)
        logits, ids, gates = choose(config.router, own, rows, forced)
        ids = jnp.where(request.real.reshape(-1, 1), ids, -1)
    stacks = {name: group[name] for name in group if name not in _ROUTER}
    experts = Experts(**stacks, activation=config.experts.activation, layout="out_in")
    y = run_experts(config.router.scale_input, rows, ids, gates, experts, index, request.implementation)
    if config.shared is not None:
        own = take(weights["shared"], index)
        beside = mlp(config.shared.activation, own, rows)
        if config.shared_gate:
            beside = beside * jax.nn.sigmoid(rows @ own["scale"])[:, None]
        y = y + beside
    return y.reshape(x.shape), Choice(logits, ids, gates)


_ROUTER = ("router", "router_bias", "selection_bias")


def run_experts(scale_input: bool, rows, ids, gates, experts, layer=None, implementation=None):
    """The routed MLP, or with the weights on the experts' inputs where the router says so."""
    if not scale_input:
        return pallas_kernels.routed_mlp(rows, ids, gates, experts, layer=layer, implementation=implementation)
    scaled = (rows[:, None] * gates[..., None].astype(rows.dtype)).reshape(-1, rows.shape[-1])
    ones = jnp.ones((ids.size, 1), gates.dtype)
    y = pallas_kernels.routed_mlp(scaled, ids.reshape(-1, 1), ones, experts, layer=layer, implementation=implementation)
    return y.reshape(*ids.shape, -1).sum(1)
