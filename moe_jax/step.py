"""The block for one new token per row: the same maths as `block`, in the few operations that kernels serve whole.

    norm + q, k, v -> decode_attention -> o + residual -> norm + router -> route -> experts + residual

Latent attention has the products that take queries into its latents and mixes out of them around its kernel.
At one token a GPU's time is reading weights and starting kernels. What is not plain enough takes `block`'s own way.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import Experts
from pallas_kernels.attention.decode import QKNorm, Rotary, Seen, decode_attention
from pallas_kernels.attention.latent import decode_latent_attention
from pallas_kernels.attention.latent_products import absorb, latent_values
from pallas_kernels.linear import LayerNorm, RMSNorm, linear

from .attention import Span, Varying
from .axes import add_up
from .block import ROUTER, Choice, Place, RoutingRequest, placed, routed
from .block_config import AttentionConfig, BlockConfig, MLPConfig, NormConfig
from .router import choose_by
from .weights import Weights


def step(
    config: BlockConfig,
    weights: Weights,
    x: Float[Array, "B 1 D"],
    place: Place,
    span: Span,
    entries: dict[str, Any],
    column: Any,
    routing: RoutingRequest,
) -> tuple[Float[Array, "B 1 D"], dict[str, Any], Choice | None]:
    """`block` on one new token per row, where `plain_enough`."""
    rows = x[:, 0]
    with jax.named_scope("attention"):
        attend = _attention if config.attention.latent is None else _latent_attention
        rows, entries = attend(config, weights, rows, place, span, entries, column)
    with jax.named_scope("moe" if place.moe else "mlp"):
        rows, choice = _mlp(config, weights, rows, place, routing)
    return rows[:, None], entries, choice


def plain_enough(config: BlockConfig, x: Any, place: Any, span: Span, entries: Any) -> bool:
    """Whether a layer on `x [B, T, D]` is what `step` computes."""
    attention, varying = config.attention, place.varying
    return (
        x.shape[1] == 1
        and entries is not None
        and not span.fresh
        and span.bias is None
        and span.key_positions is None
        and config.norm.place == "pre"
        and config.skip_attention
        and config.residual_scale == 1.0
        and config.mix is None
        and place.first is None
        and _plain_attention(attention, varying)
        and isinstance(varying.rotary, bool)
        and varying.temperature is None
        and isinstance(varying.score_divisor, (int, float))
    )


def _plain_attention(config: AttentionConfig, varying: Varying) -> bool:
    odd = config.alibi or config.norm_after_rope or config.clip is not None
    if config.latent is not None:
        odd = odd or config.sinks or (varying.window, varying.chunk) != (None, None)
    spread = config.axes and config.qk_norm == "full"  # over heads of other devices
    return config.causal and not odd and not spread and config.qk_norm in (None, "head", "full")


def _attention(
    config: BlockConfig, weights: Weights, rows: jax.Array, place: Any, span: Span, entries: Any, column: Any
):
    """The stream `[B, D]` after attention and its residual, and the cache's stacks; `column [B]` of each new token."""
    own, a = weights["attention"], config.attention
    batch = rows.shape[0]
    norm = _norm(config.norm, weights["attention_norm"], place.layer)
    kernels = [_matrices(own[name]) for name in "qkv"]
    biases = [_flat(own.get(f"{name}_bias")) for name in "qkv"]
    q, k, v = linear(rows, kernels, layer=place.layer, norm=norm, biases=biases)
    heads = lambda x, width: x.reshape(batch, -1, width)
    mixed, entries = decode_attention(
        heads(q, a.head_dim),
        heads(k, a.head_dim),
        heads(v, a.value_dim),
        entries,
        jnp.broadcast_to(column, (batch,)),
        layer=place.layer,
        scale=a.scale / place.varying.score_divisor,
        norm=QKNorm(own["q_norm"], own["k_norm"], a.norm_epsilon) if a.qk_norm else None,
        rotary=_rotary(a, span, place.varying),
        seen=Seen(window=place.varying.window, chunk=place.varying.chunk, sinks=own.get("sinks")),
    )
    return _project_out(a, own, mixed, place.layer, rows), entries


def _latent_attention(
    config: BlockConfig, weights: Weights, rows: jax.Array, place: Any, span: Span, entries: Any, column: Any
):
    """`_attention` in DeepSeek's absorbed form, see `attention._latent_mix`."""
    own, a, layer = weights["attention"], config.attention, place.layer
    batch, latent = rows.shape[0], a.latent
    norm = _norm(config.norm, weights["attention_norm"], layer)
    names = "q" if latent.query_rank is None else "q_down", "kv_down"
    biases = [own.get(f"{name}_bias") for name in names]
    q, new = linear(rows, [_matrices(own[name]) for name in names], layer=layer, norm=norm, biases=biases)
    if latent.query_rank is not None:
        norm = RMSNorm(own["q_latent_norm"], latent.norm_epsilon, layer)
        (q,) = linear(q, [_matrices(own["q_up"])], layer=layer, norm=norm)
    q = q.reshape(batch, a.num_heads, -1)
    mixed, entries = decode_latent_attention(
        absorb(q, own["kv_up"], latent.plain_dim, layer=layer),
        q,
        new,
        entries,
        jnp.broadcast_to(column, (batch,)),
        layer=layer,
        scale=a.scale / place.varying.score_divisor,
        norm=RMSNorm(own["kv_latent_norm"], latent.norm_epsilon, layer),
        rotary=_rotary(a, span, Varying()),  # always
    )
    values = latent_values(mixed, own["kv_up"], latent.plain_dim, layer=layer)
    return _project_out(a, own, values, layer, rows), entries


def _project_out(
    config: AttentionConfig, weights: Weights, mixed: jax.Array, layer: Any, residual: jax.Array
) -> jax.Array:
    """The output projection of heads `[B, N, Hv]`, with its bias and residual."""
    given = dict(layer=layer, biases=[weights.get("o_bias")])
    run = lambda residual: linear(mixed.reshape(len(mixed), -1), [weights["o"]], residual=residual, **given)
    return _added_up(config.axes, run, residual)


def _added_up(axes: tuple[str, ...], run: Any, residual: jax.Array | None) -> jax.Array:
    """The product that `run` gives for a residual; added up over devices first, if each has a part of it."""
    if not axes:
        return run(residual)[0]
    (part,) = run(None)
    y = add_up(part, axes)
    return y if residual is None else residual + y


def _rotary(config: AttentionConfig, span: Span, varying: Varying) -> Rotary | None:
    if span.turn is None or not varying.rotary:
        return None
    cos, sin = (t[:, 0] for t in span.turn)
    return Rotary(cos, sin, config.rope.interleaved)


def _mlp(config: BlockConfig, weights: Weights, rows: jax.Array, place: Any, request: RoutingRequest):
    """The stream `[B, D]` after the MLP and its residual, and the router's choice (None: a dense layer)."""
    norm = _norm(config.norm, weights["mlp_norm"], place.layer)
    if not place.moe:
        part = lambda residual: [_dense(config.dense, weights["dense"], rows, place.of_kind, norm, residual)]
        return _added_up(config.axes.hidden, part, rows), None
    group, layer = weights["moe"], place.of_kind
    with jax.named_scope("router"):
        biases = [group.get("router_bias")]
        given = dict(layer=layer, norm=norm, biases=biases, dtype=jnp.float32, normed=True)
        logits, h = linear(rows, [group["router"]], **given)
        forced = None if request.forced is None else request.forced[layer].astype(jnp.int32).reshape(len(rows), -1)
        bias = None if "selection_bias" not in group else group["selection_bias"][layer]
        real = None if request.real is None else jnp.ravel(request.real)
        chosen = choose_by(config.router, logits, bias, forced, real, config.axes.batch)
    stacks = {name: group[name] for name in group if name not in ROUTER}
    experts = Experts(**stacks, activation=config.experts.activation, layout="out_in")
    hidden = config.axes.hidden
    residual = None if hidden else rows
    y, overflow = routed(config, h, placed(group, chosen, layer), experts, place, request.implementation, residual)
    if config.shared is not None:
        y = _shared(config, weights["shared"], h, y, layer)
    return rows + add_up(y, hidden) if hidden else y, Choice(logits, chosen.ids, chosen.weights, overflow)


def _shared(config: BlockConfig, weights: Weights, h: jax.Array, y: jax.Array, layer: Any) -> jax.Array:
    """`y` and the output of the shared experts on the normed rows `h`, a device's part of it."""
    if not config.shared_gate:
        return _dense(config.shared, weights, h, layer, None, y)
    scale = jax.nn.sigmoid(h @ weights["scale"][layer])[:, None]
    return y + _dense(config.shared, weights, h, layer, None, None) * scale


def _dense(config: MLPConfig, weights: Weights, rows: jax.Array, layer: Any, norm: Any, residual: Any):
    """A dense MLP on rows `[B, D]`, its norm before it and `residual` added to it."""
    names = ("gate", "up") if config.activation.gated else ("up",)
    biases = [weights.get(f"{name}_bias") for name in names]
    *gate, up = linear(rows, [weights[name] for name in names], layer=layer, norm=norm, biases=biases)
    hidden = config.activation(gate[0] if gate else None, up)
    given = dict(layer=layer, biases=[weights.get("down_bias")], residual=residual)
    return linear(hidden, [weights["down"]], **given)[0]


def _norm(config: NormConfig, weights: Weights, layer: Any) -> RMSNorm | LayerNorm:
    """The norm of a sublayer's input, its stacks with it."""
    if config.kind == "layer":
        return LayerNorm(weights["scale"], weights["bias"], config.epsilon, layer)
    return RMSNorm(weights["scale"], config.epsilon, layer)


def _matrices(kernel: Any) -> Any:
    """A stack of kernels `[L, *out, in]` as matrices `[L, N, K]`; nothing moves."""
    return jax.tree.map(lambda w: w.reshape(w.shape[0], -1, w.shape[-1]), kernel)


def _flat(bias: Any) -> Any:
    return None if bias is None else bias.reshape(bias.shape[0], -1)
