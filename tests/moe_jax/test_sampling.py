"""Samplers against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.sampling import make_sampler, sample, truncate

LOGITS = np.random.default_rng(0).normal(scale=2, size=(4, 50)).astype(np.float32)


def softmax(x):
    x = np.exp(x.astype(np.float64) - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def kept(**options):
    return np.isfinite(np.asarray(truncate(make_sampler(temperature=1.0, **options), jnp.asarray(LOGITS))))


@pytest.mark.parametrize("k", [1, 7, 50, 80])
def test_top_k(k):
    want = np.sort(LOGITS, axis=-1)[:, -min(k, 50), None] <= LOGITS
    np.testing.assert_array_equal(kept(top_k=k), want)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.95, 1.0])
def test_top_p(p):
    for row, keep in zip(LOGITS, kept(top_p=p), strict=True):
        order, chances = np.argsort(-row), softmax(row)
        count = int(np.searchsorted(np.cumsum(chances[order]), p)) + 1 if p < 1 else 50
        assert set(np.flatnonzero(keep)) == set(order[:count])


@pytest.mark.parametrize("p", [0.05, 0.5, 1.0])
def test_min_p(p):
    chances = softmax(LOGITS)
    np.testing.assert_array_equal(kept(min_p=p), chances >= p * chances.max(-1, keepdims=True) * (1 - 1e-6))


def test_filters_in_turn():
    """top-p counts only what top-k left."""
    for row, keep in zip(LOGITS, kept(top_k=5, top_p=0.6), strict=True):
        order = np.argsort(-row)[:5]
        count = int(np.searchsorted(np.cumsum(softmax(row[order])), 0.6)) + 1
        assert set(np.flatnonzero(keep)) == set(order[:count])


def test_frequencies_follow_probabilities():
    sampler = make_sampler(temperature=0.7, top_k=4)
    draws = jax.vmap(lambda key: sample(sampler, jnp.asarray(LOGITS[:1]), key))(
        jax.random.split(jax.random.key(0), 20000)
    )
    order = np.argsort(-LOGITS[0])[:4]
    want = softmax(LOGITS[0, order] / 0.7)
    got = np.bincount(np.asarray(draws)[:, 0], minlength=50) / 20000
    np.testing.assert_allclose(got[order], want, atol=4 * np.sqrt(0.25 / 20000))  # four standard deviations
    assert got.sum() == pytest.approx(got[order].sum())


def test_repetition_penalty():
    seen = np.zeros((4, 50), bool)
    seen[:, ::3] = True
    want = np.where(seen, np.where(LOGITS > 0, LOGITS / 1.7, LOGITS * 1.7), LOGITS).argmax(-1)
    got = sample(make_sampler(repetition_penalty=1.7), jnp.asarray(LOGITS), None, jnp.asarray(seen))
    np.testing.assert_array_equal(got, want)


def test_greedy_takes_the_first_of_equals():
    assert sample(make_sampler(), jnp.zeros((1, 5)), None).tolist() == [0]
