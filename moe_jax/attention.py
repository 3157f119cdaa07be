"""Self attention over new tokens and a cache: grouped key/value heads, or DeepSeek's latent attention."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.attention import prefill_attention, xla
from pallas_kernels.attention.xla import MASKED, grouped_mix, grouped_scores, heads_first, tokens_first
from pallas_kernels.dims import Array as AnyArray
from pallas_kernels.quantized import dense

from .axes import own_part
from .block_config import AttentionConfig
from .linear import linear
from .norm import rms_norm
from .rope import rotate

#: Arrays, kernels among them perhaps in int8.
Weights = Mapping[str, Any]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Span:
    """Which tokens a layer runs on and what they may see.

    `positions [B, T]` of the queries; `key_positions` and `key_valid [B, S]`, None where every key's position is its
    column, as in the cache; `turn`: rotary cosine and sine `[B, T, half]` (None without rotary positions). `bias`:
    added to the scores of all heads, or of each. `start`, without `key_positions`: the column of the first new token
    where it is the same in all rows; 0 as a Python integer says that there is nothing else to see. `lengths [B]`, with
    it: tokens in each row, these included; those that are not real come last.
    """

    positions: Int[Array, "B T"]
    key_positions: Int[Array, "B S"] | None = None
    key_valid: Bool[Array, "B S"] | None = None
    turn: tuple[Float[Array, "B T half"], Float[Array, "B T half"]] | None = None
    bias: Float[Array, "B _ _ S"] | None = None
    start: Int[Array, ""] | int | None = None
    lengths: Int[Array, " B"] | None = None

    @property
    def fresh(self) -> bool:
        """Whether the new tokens are all that there is to see."""
        if self.key_positions is None:
            return isinstance(self.start, int) and self.start == 0
        return self.key_positions.shape == self.positions.shape

    def keys(self, count: int) -> Int[Array, "_ S"]:
        """Positions of `count` keys."""
        return jnp.arange(count, dtype=jnp.int32)[None] if self.key_positions is None else self.key_positions


@dataclasses.dataclass(frozen=True)
class Varying:
    """A layer's settings that may differ from its neighbours: Python values, or traced scalars in a layer loop."""

    window: jax.Array | int | None = None
    chunk: jax.Array | int | None = None
    rotary: jax.Array | bool = True
    temperature: tuple[jax.Array | float, jax.Array | float] | None = None
    score_divisor: jax.Array | float = 1.0


def visible(span: Span, varying: Varying, count: int, causal: bool = True) -> Bool[Array, "B T S"]:
    """Which of `count` keys each query sees: real ones, not later if `causal`, inside its window and chunk."""
    mask = xla.visible(span.positions, span.keys(count), varying.window, varying.chunk, causal)
    return mask if span.key_valid is None else mask & span.key_valid[:, None, :]


def project(config: AttentionConfig, weights: Weights, x: Float[Array, "B T D"], span: Span, varying: Varying):
    """Queries `[B, T, N, H]` and the new cache entries of `x`, normed and rotated."""
    if config.latent is not None:
        return _project_latent(config, weights, x, span)
    q, k, v = (linear(x, weights[name], weights.get(f"{name}_bias")) for name in "qkv")
    if not config.norm_after_rope:
        q, k = _qk_norm(config, weights, q, k, varying)
    if config.clip is not None:
        q, k, v = (jnp.clip(t, -config.clip, config.clip) for t in (q, k, v))
    q, k = (_rotate(config, t, span, varying) for t in (q, k))
    if config.norm_after_rope:
        q, k = _qk_norm(config, weights, q, k, varying)
    if varying.temperature is not None:
        scale, floor = varying.temperature
        heat = 1 + scale * jnp.log1p(jnp.floor((span.positions + 1.0) / floor))
        q = (q * heat[..., None, None]).astype(q.dtype)
    return q, {"k": jnp.swapaxes(k, 1, 2), "v": jnp.swapaxes(v, 1, 2)}


def _rotate(config, x, span, varying):
    if span.turn is None:
        return x
    turned = rotate(x, span.turn, config.rope.interleaved)
    if isinstance(varying.rotary, bool):
        return turned if varying.rotary else x
    return jnp.where(varying.rotary, turned, x)


def _qk_norm(config, weights, q, k, varying):
    epsilon = config.norm_epsilon
    if config.qk_norm == "head":
        return rms_norm(q, weights["q_norm"], epsilon), rms_norm(k, weights["k_norm"], epsilon)
    if config.qk_norm == "full":
        return tuple(
            rms_norm(t, weights[name], epsilon, (-2, -1), over)
            for t, name, over in zip((q, k), ("q_norm", "k_norm"), _over(config), strict=True)
        )
    if config.qk_norm == "l2":
        normed = rms_norm(q, None, epsilon), rms_norm(k, None, epsilon)
        if isinstance(varying.rotary, bool):
            return normed if varying.rotary else (q, k)
        return tuple(jnp.where(varying.rotary, n, t) for n, t in zip(normed, (q, k), strict=True))
    return q, k


def _over(config: AttentionConfig) -> tuple[Any, Any]:
    """Over what norms of all heads together go, for queries and keys, see `rms_norm`."""
    if not config.axes:
        return None, None
    # keys stand once for every group of a device's query heads
    keys = config.all_heads // (config.num_heads // config.num_kv_heads)
    return (config.axes, config.all_heads * config.head_dim), (config.axes, keys * config.head_dim)


def _project_latent(config, weights, x, span):
    latent = config.latent
    if latent.query_rank is None:
        q = linear(x, weights["q"])
    else:
        down = linear(x, weights["q_down"], weights.get("q_down_bias"))
        q = linear(rms_norm(down, weights["q_latent_norm"], latent.norm_epsilon), weights["q_up"])
    q_plain, q_rotary = q[..., : latent.plain_dim], q[..., latent.plain_dim :]
    down = linear(x, weights["kv_down"], weights.get("kv_down_bias"))
    compressed = rms_norm(down[..., : latent.rank], weights["kv_latent_norm"], latent.norm_epsilon)
    interleaved = config.rope.interleaved
    k_rotary = rotate(down[..., None, latent.rank :], span.turn, interleaved)[:, :, 0]
    q = jnp.concatenate([q_plain, rotate(q_rotary, span.turn, interleaved)], -1)
    return q, {"latent": compressed, "k_rotary": k_rotary}


def attend(
    config: AttentionConfig,
    weights: Weights,
    q: Float[Array, "B T N H"],
    entries: Mapping[str, Array],
    span: Span,
    varying: Varying,
) -> Float[Array, "B T D"]:
    """Attention of `q` over cache `entries`, and the output projection: the part of a device's heads."""
    if span.start is not None and config.causal and config.latent is None and not config.alibi:
        mixed = prefill_attention(
            *(q, entries["k"], entries["v"], span.lengths, span.start),
            scale=config.scale / varying.score_divisor,
            window=varying.window,
            chunk=varying.chunk,
            sinks=weights["sinks"] if config.sinks else None,
        )
    else:
        mixed = _in_blocks(config, weights, q, entries, span, varying)
    return linear(mixed.reshape(*mixed.shape[:2], -1), weights["o"], weights.get("o_bias"))


def _in_blocks(config, weights, q, entries, span, varying):
    """All queries at once, or block by block where their scores would not fit."""
    mix = _latent_mix if config.latent is not None else _mix
    each = span.bias is not None and span.bias.shape[2] > 1

    def run(q, positions, bias):
        bias = jnp.swapaxes(bias, 1, 2) if each else span.bias
        part = dataclasses.replace(span, positions=positions, bias=bias)
        return mix(config, weights, q, entries, part, varying)

    keys = next(iter(entries.values())).shape[-2]
    size = xla.block_size(q.shape[0] * config.num_heads * keys)
    return xla.in_blocks(run, size, q, span.positions, jnp.swapaxes(span.bias, 1, 2) if each else None)


def slopes(num_heads: int) -> np.ndarray:
    """ALiBi's slope of each head (arXiv:2108.12409): powers of `2^(-8/n)`; between them, those of twice as many heads.

    >>> slopes(4).tolist(), slopes(3).tolist()
    ([0.25, 0.0625, 0.015625, 0.00390625], [0.0625, 0.00390625, 0.25])
    """
    whole = 1 << (num_heads.bit_length() - 1)
    steps = [(i + 1) / whole for i in range(whole)] + [(i + 0.5) / whole for i in range(num_heads - whole)]
    return np.asarray([2.0 ** (-8 * step) for step in steps], np.float32)


def _own_slopes(config: AttentionConfig) -> Float[AnyArray, " N"]:
    """The slopes of a device's heads."""
    if not config.axes:
        return slopes(config.num_heads)
    every = slopes(config.all_heads)
    short = config.num_heads * jax.lax.axis_size(config.axes) - config.all_heads
    return own_part(jnp.asarray(np.pad(every, (0, short))), config.axes, 0)


def probabilities(
    config: AttentionConfig,
    weights: Weights,
    scores: Float[Array, "B N T S"],
    span: Span,
    varying: Varying,
) -> Float[Array, "B N T S"]:
    """Softmax of raw float32 `scores`: scaled, with biases, over what each query sees, less the sinks' share."""
    scores = scores * (config.scale / varying.score_divisor)
    if config.alibi:
        distance = (span.keys(scores.shape[-1])[:, None, :] - span.positions[:, :, None]).astype(jnp.float32)
        scores = scores + _own_slopes(config)[:, None, None] * distance[:, None]
    if span.bias is not None:
        scores = scores + span.bias
    seen = visible(span, varying, scores.shape[-1], config.causal)
    scores = jnp.where(seen[:, None], scores, MASKED)
    return xla.softmax(scores, weights["sinks"] if config.sinks else None)


def _mix(config, weights, q, entries, span, varying):
    chances = probabilities(config, weights, grouped_scores(q, entries["k"]), span, varying)
    return grouped_mix(chances, entries["v"])


def _latent_mix(config, weights, q, entries, span, varying):
    """Latent attention in its absorbed form: queries meet the latents, the value projection comes last."""
    plain = config.latent.plain_dim
    latent, k_rotary = entries["latent"], entries["k_rotary"]
    kv_up = dense(weights["kv_up"], q.dtype)
    k_up, v_up = kv_up[:, :plain], kv_up[:, plain:]
    absorbed = jnp.einsum("bnth,nhz->bntz", heads_first(q[..., :plain]), k_up)
    scores = _by_row("bmz,bsz->bms", absorbed, latent, jnp.float32)
    scores += _by_row("bmr,bsr->bms", heads_first(q[..., plain:]), k_rotary, jnp.float32)
    chances = probabilities(config, weights, scores, span, varying)
    mixed = _by_row("bms,bsz->bmz", chances.astype(latent.dtype), latent)
    return tokens_first(jnp.einsum("bntz,nvz->bntv", mixed, v_up))


def _by_row(equation, x, shared, dtype=None):
    """A product of `x [B, N, T, _]` with what all heads of a row share."""
    y = jnp.einsum(equation, x.reshape(x.shape[0], -1, x.shape[3]), shared, preferred_element_type=dtype)
    return y.reshape(*x.shape[:3], -1)
