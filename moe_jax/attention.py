"""Self attention over new tokens and a cache: grouped key/value heads, or DeepSeek's latent attention."""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from .block_config import AttentionConfig
from .linear import linear
from .norm import rms_norm
from .rope import rotate

#: Stands for minus infinity in masked scores: a row without any key gives finite nonsense, not NaN.
MASKED = -1e30
#: Scores of at most this many (query, key) pairs per head are held at once; longer prompts go in blocks of queries.
_PAIRS = 1 << 20

Weights = Mapping[str, jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Span:
    """Which tokens a layer runs on and what they may see.

    `positions [B, T]` of the queries; `key_positions` and `key_valid [B, S]`; `turn`: rotary cosine and sine
    `[B, T, half]` (None without rotary positions).
    """

    positions: Int[Array, "B T"]
    key_positions: Int[Array, "B S"]
    key_valid: Bool[Array, "B S"]
    turn: tuple[Float[Array, "B T half"], Float[Array, "B T half"]] | None


@dataclasses.dataclass(frozen=True)
class Varying:
    """A layer's settings that may differ from its neighbours: Python values, or traced scalars in a layer loop."""

    window: jax.Array | int | None = None
    chunk: jax.Array | int | None = None
    rotary: jax.Array | bool = True
    temperature: tuple[jax.Array | float, jax.Array | float] | None = None


def visible(span: Span, varying: Varying) -> Bool[Array, "B T S"]:
    """Which keys each query sees: real ones at its own or earlier positions, inside its window and chunk."""
    query, key = span.positions[:, :, None], span.key_positions[:, None, :]
    mask = span.key_valid[:, None, :] & (key <= query)
    if varying.window is not None:
        mask &= query - key < varying.window
    if varying.chunk is not None:
        mask &= query // varying.chunk == key // varying.chunk
    return mask


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
        return tuple(rms_norm(t, weights[n], epsilon, axis=(-2, -1)) for t, n in ((q, "q_norm"), (k, "k_norm")))
    if config.qk_norm == "l2":
        normed = rms_norm(q, None, epsilon), rms_norm(k, None, epsilon)
        if isinstance(varying.rotary, bool):
            return normed if varying.rotary else (q, k)
        return tuple(jnp.where(varying.rotary, n, t) for n, t in zip(normed, (q, k), strict=True))
    return q, k


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
    mask: Bool[Array, "B T S"],
) -> Float[Array, "B T D"]:
    """Attention of `q` over cache `entries` where `mask` allows, and the output projection."""
    run = _latent_mix if config.latent is not None else _mix
    mixed = _in_blocks(lambda q, mask: run(config, weights, q, entries, mask), q, mask)
    kernel = weights["o"].reshape(weights["o"].shape[0], -1)
    return linear(mixed.reshape(*mixed.shape[:2], -1), kernel, weights.get("o_bias"))


def _in_blocks(run, q, mask):
    """`run` on all queries at once, or block by block where their scores would not fit."""
    batch, total = q.shape[:2]
    size = max(1, _PAIRS // mask.shape[-1])
    if total <= size:
        return run(q, mask)
    blocks = -(-total // size)

    def cut(t):
        t = jnp.pad(t, [(0, 0), (0, blocks * size - total)] + [(0, 0)] * (t.ndim - 2))
        return jnp.moveaxis(t.reshape(batch, blocks, size, *t.shape[2:]), 1, 0)

    mixed = jnp.moveaxis(jax.lax.map(lambda pair: run(*pair), (cut(q), cut(mask))), 0, 1)
    return mixed.reshape(batch, blocks * size, *mixed.shape[3:])[:, :total]


def _probabilities(config, scores, mask, sinks):
    """Softmax over the last axis of `scores [B, K, group, T, S]` in float32, with the sinks' share left out."""
    scores = jnp.where(mask[:, None, None], scores * config.scale, MASKED)
    if sinks is None:
        return jax.nn.softmax(scores, axis=-1)
    sinks = sinks.astype(jnp.float32).reshape(config.num_kv_heads, -1)[None, :, :, None, None]
    top = jnp.maximum(scores.max(-1, keepdims=True), sinks)
    powers = jnp.exp(scores - top)
    return powers / (powers.sum(-1, keepdims=True) + jnp.exp(sinks - top))


def _mix(config, weights, q, entries, mask):
    k, v = entries["k"], entries["v"]
    batch, count, _, head = q.shape
    q = q.reshape(batch, count, config.num_kv_heads, -1, head)
    scores = jnp.einsum("btkgh,bksh->bkgts", q, k, preferred_element_type=jnp.float32)
    chances = _probabilities(config, scores, mask, weights.get("sinks"))
    mixed = jnp.einsum("bkgts,bksv->btkgv", chances.astype(v.dtype), v)
    return mixed.reshape(batch, count, config.num_heads, -1)


def _latent_mix(config, weights, q, entries, mask):
    """Latent attention in its absorbed form: queries meet the latents, the value projection comes last."""
    plain = config.latent.plain_dim
    latent, k_rotary = entries["latent"], entries["k_rotary"]
    k_up, v_up = weights["kv_up"][:, :plain], weights["kv_up"][:, plain:]
    absorbed = jnp.einsum("btnh,nhz->btnz", q[..., :plain], k_up)
    scores = jnp.einsum("btnz,bsz->bnts", absorbed, latent, preferred_element_type=jnp.float32)
    scores += jnp.einsum("btnr,bsr->bnts", q[..., plain:], k_rotary, preferred_element_type=jnp.float32)
    chances = _probabilities(config, scores[:, :, None], mask, None)[:, :, 0]
    mixed = jnp.einsum("bnts,bsz->btnz", chances.astype(latent.dtype), latent)
    return jnp.einsum("btnz,nvz->btnv", mixed, v_up)
