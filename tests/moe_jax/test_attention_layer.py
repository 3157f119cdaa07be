"""A whole attention layer, projections to output, against float64 NumPy that expands heads and latents."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.attention import Span, Varying, attend, project
from moe_jax.block_config import AttentionConfig, LatentConfig, RopeConfig
from moe_jax.rope import rotation
from moe_jax.weights import _attention as shapes_of

WIDTH, BATCH, TOKENS = 16, 2, 7
#: Positions as left padding gives them: row 1 has two padded columns.
POSITIONS = np.array([[0, 1, 2, 3, 4, 5, 6], [0, 0, 0, 1, 2, 3, 4]])
VALID = np.array([[1] * 7, [0, 0, 1, 1, 1, 1, 1]], bool)
ROPE = RopeConfig(frequencies=(1.0, 0.3, 0.1), factor=1.25)
GROUPED = AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=6, value_dim=6, scale=0.4, rope=ROPE)
LATENT = AttentionConfig(
    num_heads=3,
    num_kv_heads=3,
    head_dim=10,
    value_dim=5,
    scale=0.3,
    rope=dataclasses.replace(ROPE, frequencies=(1.0, 0.2), interleaved=True),
    latent=LatentConfig(query_rank=8, rank=7, plain_dim=6, rotary_dim=4),
)


def rms(x, scale, axis=-1):
    x = x / np.sqrt((x**2).mean(axis, keepdims=True) + 1e-6)
    return x if scale is None else x * scale


def turn(x, rope):
    """Rotate `x [B, T, heads, H]` pair by pair as complex numbers."""
    y, half = x.copy(), len(rope.frequencies)
    for i, frequency in enumerate(rope.frequencies):
        a, b = (2 * i, 2 * i + 1) if rope.interleaved else (i, i + half)
        pair = (x[..., a] + 1j * x[..., b]) * (rope.factor * np.exp(1j * POSITIONS * frequency))[..., None]
        y[..., a], y[..., b] = pair.real, pair.imag
    return y


def normed(config, w, q, k, rotary):
    if config.qk_norm == "head":
        return rms(q, w["q_norm"]), rms(k, w["k_norm"])
    if config.qk_norm == "full":
        return rms(q, w["q_norm"], (-2, -1)), rms(k, w["k_norm"], (-2, -1))
    return (rms(q, None), rms(k, None)) if config.qk_norm == "l2" and rotary else (q, k)


def grouped(config, w, x, varying):
    """Queries, keys and values, one per query head."""
    q, k, v = (np.einsum("btd,nhd->btnh", x, w[n]) + w.get(f"{n}_bias", 0) for n in "qkv")
    if not config.norm_after_rope:
        q, k = normed(config, w, q, k, varying.rotary)
    if config.clip:
        q, k, v = (np.clip(t, -config.clip, config.clip) for t in (q, k, v))
    if varying.rotary:
        q, k = turn(q, config.rope), turn(k, config.rope)
    if config.norm_after_rope:
        q, k = normed(config, w, q, k, varying.rotary)
    if varying.temperature:
        scale, floor = varying.temperature
        q = q * (1 + scale * np.log(1 + np.floor((POSITIONS + 1) / floor)))[..., None, None]
    share = config.num_heads // config.num_kv_heads
    return q, np.repeat(k, share, 2), np.repeat(v, share, 2)


def expanded(config, w, x):
    """Latent attention as the paper writes it: every head's keys and values out of the latents."""
    latent = config.latent
    if latent.query_rank:
        down = rms(x @ w["q_down"].T + w.get("q_down_bias", 0), w["q_latent_norm"])
        q = np.einsum("btr,nhr->btnh", down, w["q_up"])
    else:
        q = np.einsum("btd,nhd->btnh", x, w["q"])
    down = x @ w["kv_down"].T + w.get("kv_down_bias", 0)
    up = np.einsum("btz,nhz->btnh", rms(down[..., : latent.rank], w["kv_latent_norm"]), w["kv_up"])
    k_rotary = np.repeat(turn(down[..., None, latent.rank :], config.rope), config.num_heads, 2)
    q = np.concatenate([q[..., : latent.plain_dim], turn(q[..., latent.plain_dim :], config.rope)], -1)
    return q, np.concatenate([up[..., : latent.plain_dim], k_rotary], -1), up[..., latent.plain_dim :]


def oracle(config, weights, x, varying):
    w = {name: array.astype(np.float64) for name, array in weights.items()}
    q, k, v = expanded(config, w, x) if config.latent else grouped(config, w, x, varying)
    y = np.zeros(x.shape)
    for b, t, n in np.ndindex(BATCH, TOKENS, config.num_heads):
        query, keys = POSITIONS[b, t], POSITIONS[b]
        sees = VALID[b] & (keys <= query)
        if varying.window:
            sees &= query - keys < varying.window
        if varying.chunk:
            sees &= query // varying.chunk == keys // varying.chunk
        powers = np.exp(config.scale * (k[b, :, n] @ q[b, t, n])) * sees
        total = powers.sum() + (np.exp(w["sinks"][n]) if config.sinks else 0)
        y[b, t] += w["o"].reshape(len(w["o"]), config.num_heads, -1)[:, n] @ (powers / (total or 1) @ v[b, :, n])
    return y + w.get("o_bias", 0)


@functools.partial(jax.jit, static_argnums=(0, 3))
def layer(config, weights, x, varying):
    positions, valid = jnp.asarray(POSITIONS), jnp.asarray(VALID)
    span = Span(positions, positions, valid, rotation(config.rope, positions, TOKENS))
    q, entries = project(config, weights, x, span, varying)
    return attend(config, weights, q, entries, span, varying)


VARIANTS = {
    "plain": ({}, {}),
    "biases": ({"qkv_bias": True, "out_bias": True}, {}),
    "interleaved": ({"rope": dataclasses.replace(ROPE, interleaved=True)}, {}),
    "partial rotation": ({"rope": dataclasses.replace(ROPE, frequencies=(1.0, 0.1))}, {}),
    "norm per head": ({"qk_norm": "head"}, {}),
    "norm per head, after": ({"qk_norm": "head", "norm_after_rope": True}, {}),
    "norm over all, clipped": ({"qk_norm": "full", "clip": 0.5}, {}),
    "l2 norm": ({"qk_norm": "l2", "norm_after_rope": True}, {"chunk": 3}),
    "no rotation": ({"qk_norm": "l2", "norm_after_rope": True}, {"rotary": False, "temperature": (0.7, 2.0)}),
    "sinks and window": ({"sinks": True, "qkv_bias": True}, {"window": 3}),
    "one head of keys": ({"num_kv_heads": 1, "value_dim": 5}, {}),
}


def check(config, varying, tolerance):
    rng = np.random.default_rng(7)
    weights = {n: rng.normal(size=s).astype(np.float32) / s[-1] ** 0.5 for n, s in shapes_of(config, WIDTH).items()}
    x = rng.normal(size=(BATCH, TOKENS, WIDTH)).astype(np.float32)
    got = np.asarray(layer(config, weights, x, varying))
    assert np.isfinite(got).all()
    np.testing.assert_allclose(got[VALID], oracle(config, weights, x, varying)[VALID], atol=tolerance, rtol=0)


@pytest.mark.parametrize("name", VARIANTS)
def test_grouped_attention(name):
    options, varying = VARIANTS[name]
    check(dataclasses.replace(GROUPED, **options), Varying(**varying), 2e-6)


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("query_rank", [8, None])
def test_absorbed_latent_attention_equals_the_expanded_form(query_rank, biases):
    latent = dataclasses.replace(LATENT.latent, query_rank=query_rank)
    config = dataclasses.replace(LATENT, latent=latent, qkv_bias=biases, out_bias=biases)
    check(config, Varying(), 2e-6)


def test_traced_settings_equal_plain_ones():
    """In a layer loop window, chunk and rotation are looked up: the same numbers come out."""
    config = dataclasses.replace(GROUPED, qk_norm="l2", norm_after_rope=True)
    rng = np.random.default_rng(1)
    weights = {n: jnp.asarray(rng.normal(size=s) / 4, jnp.float32) for n, s in shapes_of(config, WIDTH).items()}
    x = jnp.asarray(rng.normal(size=(BATCH, TOKENS, WIDTH)), jnp.float32)

    @jax.jit
    def looked_up(window, chunk, rotary, scale, floor):
        return layer.__wrapped__(config, weights, x, Varying(window, chunk, rotary, (scale, floor)))

    for rotary in (True, False):
        plain = layer(config, weights, x, Varying(4, 3, rotary, (0.7, 2.0)))
        np.testing.assert_allclose(looked_up(4, 3, rotary, 0.7, 2.0), plain, atol=2e-6, rtol=0)
