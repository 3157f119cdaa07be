"""The transformer block: one function for every family; what differs is configuration."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

import pallas_kernels
from pallas_kernels import Activation, Experts
from pallas_kernels.dims import Array as AnyArray

from . import exchange
from .attention import Span, Varying, attend, project
from .axes import add_up, own_part
from .block_config import BlockConfig
from .cache import read_entries, write_entries
from .linear import linear
from .norm import norm
from .placement import slots_of
from .router import Chosen, choose, limited
from .weights import Weights


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Choice:
    """What an MoE layer's router did: logits `[G, E]`, ids (-1: the token took no expert) and weights `[G, A]`.

    `overflow`: tokens of all devices that took an exchange's second pass. In a `Trace` all MoE layers are stacked in
    front.
    """

    logits: Float[Array, "*Lm G E"]
    ids: Int[Array, "*Lm G A"]
    weights: Float[Array, "*Lm G A"]
    overflow: Int[Array, "*Lm"]


@dataclasses.dataclass(frozen=True)
class Place:
    """Which layer runs: its index among all layers, and among those with the same kind of MLP; both may be traced.

    `first`: in a pyramid, where the layer's `num_experts` experts begin in the flat stack, which may be traced.
    """

    layer: Any
    of_kind: Any
    moe: bool
    varying: Varying
    first: Any = None
    num_experts: int | None = None


def take(group: Weights, index: Any) -> Weights:
    """One layer's weights out of a group's stacks. Never for experts: their stack is addressed, not sliced."""
    return jax.tree.map(lambda stack: jax.lax.dynamic_index_in_dim(stack, index, keepdims=False), group)


def block(
    config: BlockConfig,
    weights: Weights,
    x: Float[Array, "B T D"],
    place: Place,
    span: Span,
    entries: dict[str, Any] | None,
    column: Any,
    routing: "RoutingRequest",
) -> tuple[Float[Array, "B T D"], dict[str, Any] | None, Choice | None]:
    """One layer: attention and MLP, each with its norm and residual.

    `entries`: the cache's stacks, written at `column` (see `write_entries`) and read back; None attends to the new
    tokens alone.
    """
    with jax.named_scope("attention"):
        h = sublayer_input(config, weights, x, place, "attention")
        h, entries = self_attention(config, weights, h, place, span, entries, column)
        x = add(config, weights, x, h, place, "attention")
    with jax.named_scope("moe" if place.moe else "mlp"):
        h = sublayer_input(config, weights, x, place, "mlp")
        choice = None
        if place.moe:
            h, choice = moe(config, weights, h, place, routing)
        else:
            h = mlp(config.dense.activation, take(weights["dense"], place.of_kind), h)
            h = add_up(h, config.axes.hidden)
        x = add(config, weights, x, h, place, "mlp")
    return x, entries, choice


def sublayer_input(config: BlockConfig, weights: Weights, x: Array, place: Place, name: str) -> Array:
    """What the sublayer `name` ("attention" or "mlp") reads of the stream `x [B, T, D]`."""
    normed = config.norm.place == "pre" or (config.norm.place, name) == ("last", "mlp")
    return norm(config.norm, x, take(weights[f"{name}_norm"], place.layer)) if normed else x


def add(config: BlockConfig, weights: Weights, x: Array, h: Array, place: Place, name: str) -> Array:
    """The stream after the sublayer `name` gave `h`: their sum, with the norms that follow a sublayer."""
    if config.norm.place == "post":
        h = norm(config.norm, h, take(weights[f"{name}_norm"], place.layer))
    if name == "attention" and not config.skip_attention:
        return h
    x = x + (h if config.residual_scale == 1.0 else h * config.residual_scale)
    if (config.norm.place, name) == ("last", "mlp"):
        x = norm(config.norm, x, take(weights["attention_norm"], place.layer))
    return x


def self_attention(config, weights, h, place, span, entries, column):
    """Attention of a layer on its normed input, see `block`; the output and the cache's stacks."""
    own = take(weights["attention"], place.layer)
    q, new = project(config.attention, own, h, span, place.varying)
    if entries is not None:
        entries = write_entries(entries, new, place.layer, column)
    # The first tokens of an empty cache are all there is to see: no need to read them back.
    seen = new if entries is None or span.fresh else read_entries(entries, place.layer, column, len(h))
    return add_up(attend(config.attention, own, q, seen, span, place.varying), config.attention.axes), entries


def mlp(activation: Activation, weights: Weights, x: Float[Array, "*G D"]) -> Float[Array, "*G D"]:
    """A dense MLP with the expert's formula: the part of a device's hidden units."""

    def product(x, name):
        return linear(x, weights[name], weights.get(f"{name}_bias"))

    gate = product(x, "gate") if activation.gated else None
    return product(activation(gate, product(x, "up")), "down")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RoutingRequest:
    """What the caller asks of the routers: which tokens take experts, which choices are forced.

    `real [B, T]`: false for padding, which takes no expert's time; None: there is none. `forced [Lm, B, T, A]`: expert
    ids by MoE layer, -1 where the router decides; None leaves all to the router. `capacity_factor`: an expert takes no
    more than its capacity (`router.limited`), None: all that choose it.
    """

    real: Bool[AnyArray, "B T"] | None
    forced: Int[AnyArray, "Lm B T A"] | None = None
    implementation: str | None = dataclasses.field(default=None, metadata={"static": True})
    capacity_factor: float | None = dataclasses.field(default=None, metadata={"static": True})


def moe(
    config: BlockConfig, weights: Weights, x: Float[Array, "B T D"], place: Place, request: RoutingRequest
) -> tuple[Float[Array, "B T D"], Choice]:
    """Router, experts and shared experts of an MoE layer."""
    group, index = weights["moe"], place.of_kind
    rows = x.reshape(-1, x.shape[-1])
    forced = None
    if request.forced is not None:
        forced = jax.lax.dynamic_index_in_dim(request.forced, index, keepdims=False).astype(jnp.int32)
        forced = forced.reshape(rows.shape[0], -1)
    with jax.named_scope("router"):
        if place.first is None:
            own = take({name: group[name] for name in ROUTER[:3] if name in group}, index)
        else:
            own = {"router": jax.lax.dynamic_slice_in_dim(group["router"], place.first, place.num_experts)}
        real = None if request.real is None else jnp.ravel(request.real)
        logits, chosen = choose(config.router, own, rows, forced, real, config.axes.batch)
        if request.capacity_factor is not None:
            chosen = limited(chosen, logits.shape[1], request.capacity_factor, config.axes.batch)
    stacks = {name: group[name] for name in group if name not in ROUTER}
    experts = Experts(**stacks, activation=config.experts.activation, layout="out_in")
    y, overflow = routed(config, rows, placed(group, chosen, index), experts, place, request.implementation)
    if config.shared is not None:
        own = take(weights["shared"], place.of_kind)
        y = combine(config, own, rows, y, mlp(config.shared.activation, own, rows))
    return add_up(y, config.axes.hidden).reshape(x.shape), Choice(logits, chosen.ids, chosen.weights, overflow)


def placed(group: Weights, chosen: Chosen, layer: Any) -> Chosen:
    """Ids say where experts of a layer lie: their own places, unless a placement says otherwise."""
    if "slots" not in group:
        return chosen
    slots = lambda ids: jnp.asarray(slots_of(ids, group["slots"][layer], group["copies"][layer]))
    everyone = None if chosen.everyone is None else (slots(chosen.everyone[0]), chosen.everyone[1])
    return Chosen(slots(chosen.ids), chosen.weights, everyone)


def routed(config: BlockConfig, rows, chosen: Chosen, experts: Experts, place: Place, implementation, residual=None):
    """Experts on `rows [G, D]`, wherever they are, plus `residual`; and how many tokens took a second pass.

    `experts`: the stacks of a device. Each of several devices along `config.axes.hidden` gives its part of the output.
    """
    ranks = 1 if not config.axes.experts else jax.lax.axis_size(config.axes.experts)
    scale, layer, first = config.router.scale_input, place.of_kind, 0
    if place.first is not None:  # the flat stack holds other layers' experts before and behind these
        layer, first = None, place.first // ranks

    def run(rows, ids, gates, expected=None, residual=None):
        ids = jnp.where(ids >= 0, ids + first, -1) if place.first is not None else ids
        given = dict(layer=layer, implementation=implementation, residual=residual, expected=expected)
        return run_experts(scale, rows, ids, gates, experts, **given)

    if ranks == 1:
        return run(rows, chosen.ids, chosen.weights, residual=residual), jnp.zeros((), jnp.int32)
    each = experts.num_experts if place.first is None else place.num_experts // ranks
    batch, ranks_of = config.axes.batch, config.axes.experts
    spread, everyone = set(ranks_of) <= set(batch), None
    if chosen.everyone is not None and batch[-len(ranks_of) :] == ranks_of:
        ids, weights = (own_part(x, batch[: -len(ranks_of)], 0) for x in chosen.everyone)
        everyone = ids, weights
    work = exchange.Work(rows, chosen.ids, chosen.weights, run, each, ranks_of, spread, everyone)
    y, overflow = exchange.exchange(config.exchange, work)
    return y if residual is None else residual + y, overflow


def combine(config: BlockConfig, weights: Weights, rows: Array, routed: Array, shared: Array) -> Array:
    """Outputs of the experts and of the shared MLP, `[G, D]` each, put together; `weights`: the `shared` group's."""
    if config.shared_gate:
        shared = shared * jax.nn.sigmoid(rows @ weights["scale"])[:, None]
    if config.mix is None:
        return routed + shared
    first, second = (routed, shared) if config.mix == "experts_first" else (shared, routed)
    return mix(weights, rows, first, second)


def mix(weights: Weights, rows: Array, first: Array, second: Array) -> Array:
    """Two MLPs' outputs `[G, D]` weighed by a softmax over the coefficients `mix [2, D]` and `mix_bias` of `rows`."""
    logits = jnp.matmul(rows, weights["mix"].T, preferred_element_type=jnp.float32)
    if "mix_bias" in weights:
        logits = logits + weights["mix_bias"].astype(jnp.float32)
    shares = jax.nn.softmax(logits, axis=-1).astype(rows.dtype)
    return shares[:, :1] * first + shares[:, 1:] * second


#: What of the MoE layers' weights is not the experts'.
ROUTER = ("router", "router_bias", "selection_bias", "slots", "copies")


def run_experts(scale_input: bool, rows, ids, gates, experts, residual=None, **given):
    """The routed MLP plus `residual`, or with the weights on the experts' inputs where the router says so."""
    if not scale_input:
        return pallas_kernels.routed_mlp(rows, ids, gates, experts, residual=residual, **given)
    scaled = (rows[:, None] * gates[..., None].astype(rows.dtype)).reshape(-1, rows.shape[-1])
    ones = jnp.ones((ids.size, 1), gates.dtype)
    y = pallas_kernels.routed_mlp(scaled, ids.reshape(-1, 1), ones, experts, **given)
    y = y.reshape(*ids.shape, -1).sum(1)
    return y if residual is None else residual + y
