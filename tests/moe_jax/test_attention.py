"""Attention against plain NumPy in float64."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.attention import MASKED, Span, Varying, attend, visible
from moe_jax.block_config import AttentionConfig
from pallas_kernels.attention import xla

HEADS, KV_HEADS, HEAD, VALUE, WIDTH = 4, 2, 6, 5, 8


def config(**options):
    fields = dict(num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=HEAD, value_dim=VALUE, scale=0.3, rope=None)
    return AttentionConfig(**fields | options)


def draw(queries=7, keys=9, seed=0):
    rng = np.random.default_rng(seed)
    q = rng.normal(size=(2, queries, HEADS, HEAD)).astype(np.float32)
    entries = {
        "k": rng.normal(size=(2, KV_HEADS, keys, HEAD)).astype(np.float32),
        "v": rng.normal(size=(2, KV_HEADS, keys, VALUE)).astype(np.float32),
    }
    mask = rng.random((2, queries, keys)) < 0.6
    mask[..., 0] = True
    weights = {"o": rng.normal(size=(WIDTH, HEADS * VALUE)).astype(np.float32)}
    return q, entries, mask, weights, rng


def run(config, q, entries, mask, weights):
    entries, weights = ({k: jnp.asarray(v) for k, v in d.items()} for d in (entries, weights))
    batch, queries, keys = mask.shape
    bias = jnp.where(mask, 0.0, MASKED)[:, None]
    positions = (jnp.broadcast_to(jnp.arange(n), (batch, n)) for n in (queries, keys))
    span = Span(*positions, jnp.ones((batch, keys), bool), None, bias)
    config = dataclasses.replace(config, causal=False)
    return np.asarray(attend(config, weights, jnp.asarray(q), entries, span, Varying()))


def plain(q, entries, mask, weights, sinks=None):
    y = np.zeros((*q.shape[:2], WIDTH))
    for b, t, n in np.ndindex(*q.shape[:3]):
        k, v = (entries[name][b, n * KV_HEADS // HEADS].astype(np.float64) for name in "kv")
        powers = np.exp(0.3 * (k @ q[b, t, n].astype(np.float64))) * mask[b, t]
        total = powers.sum() + (0 if sinks is None else np.exp(float(sinks[n])))
        y[b, t] += weights["o"].reshape(WIDTH, HEADS, VALUE)[:, n].astype(np.float64) @ (powers / total @ v)
    return y


def test_grouped_heads():
    q, entries, mask, weights, _ = draw()
    np.testing.assert_allclose(run(config(), q, entries, mask, weights), plain(q, entries, mask, weights), atol=5e-6)


def test_sinks():
    q, entries, mask, weights, rng = draw()
    sinks = rng.normal(size=HEADS).astype(np.float32)
    got = run(config(sinks=True), q, entries, mask, weights | {"sinks": sinks})
    np.testing.assert_allclose(got, plain(q, entries, mask, weights, sinks), atol=5e-6)


@pytest.mark.parametrize("queries", [6, 7])  # of whole blocks, and not
def test_blocks_of_queries_equal_one_pass(queries, monkeypatch):
    q, entries, mask, weights, _ = draw(queries)
    whole = run(config(), q, entries, mask, weights)
    monkeypatch.setattr(xla, "BLOCK", 2 * HEADS * 9 * 3)
    np.testing.assert_allclose(run(config(), q, entries, mask, weights), whole, atol=1e-6)


@pytest.mark.parametrize("sinks", [False, True])
def test_a_query_without_keys_is_finite(sinks):
    q, entries, mask, weights, _ = draw()
    mask[0, 3] = False
    more = {"sinks": np.zeros(HEADS, np.float32)} if sinks else {}
    got = run(config(sinks=sinks), q, entries, mask, weights | more)
    assert np.isfinite(got).all()


@pytest.mark.parametrize(
    ("varying", "sees"),
    [
        (Varying(), lambda q, k: True),
        (Varying(window=3), lambda q, k: q - k < 3),
        (Varying(chunk=4), lambda q, k: q // 4 == k // 4),
        (Varying(window=jnp.asarray(2), chunk=jnp.asarray(5)), lambda q, k: q - k < 2 and q // 5 == k // 5),
    ],
)
def test_what_a_query_sees(varying, sees):
    queries, keys = np.array([[4, 5, 6], [0, 1, 2]]), np.array([[3, 0, 4, 5, 6, 9], [0, 0, 0, 1, 2, 3]])
    valid = np.array([[1, 1, 1, 1, 1, 0], [0, 0, 1, 1, 1, 1]], bool)
    got = visible(Span(jnp.asarray(queries), jnp.asarray(keys), jnp.asarray(valid)), varying, 6)
    for b, t, s in np.ndindex(2, 3, 6):
        want = valid[b, s] and keys[b, s] <= queries[b, t] and sees(queries[b, t], keys[b, s])
        assert bool(got[b, t, s]) == want
