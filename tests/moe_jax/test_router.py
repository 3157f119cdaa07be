"""`Routing` as data: positions, drops, dense views, losses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.block_config import RouterConfig
from moe_jax.router import capacity_of, describe

CONFIG = RouterConfig(num_experts=5, top_k=2)


def draw(tokens=7, seed=0):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(tokens, 5)).astype(np.float32)
    ids = np.argsort(-logits, axis=-1)[:, :2].astype(np.int32)
    weights = rng.random((tokens, 2)).astype(np.float32)
    return jnp.asarray(logits), jnp.asarray(ids), jnp.asarray(weights)


@pytest.mark.parametrize("capacity", [None, 1, 2, 7])
def test_positions_and_drops(capacity):
    logits, ids, weights = draw()
    ids = ids.at[3].set(-1)
    routing = describe(CONFIG, logits, ids, weights, capacity)
    used = [0] * 5
    for choice in range(2):  # first choices of all tokens come before second ones
        for token in range(7):
            expert = int(ids[token, choice])
            if expert < 0:
                assert not routing.keep[token, choice]
                continue
            assert int(routing.position[token, choice]) == used[expert]
            assert bool(routing.keep[token, choice]) == (capacity is None or used[expert] < capacity)
            used[expert] += 1
    assert routing.counts.tolist() == used


@pytest.mark.parametrize("capacity", [None, 2])
def test_dense_views(capacity):
    logits, ids, weights = draw()
    routing = describe(CONFIG, logits, ids, weights, capacity)
    slots = max(routing.counts.tolist()) if capacity is None else capacity
    want = np.zeros((7, 5, slots), np.float32)
    for token, choice in np.argwhere(np.asarray(routing.keep)):
        want[token, ids[token, choice], routing.position[token, choice]] = weights[token, choice]
    np.testing.assert_array_equal(routing.dense_combine_weights(), want)
    np.testing.assert_array_equal(routing.dense_dispatch_mask(), want > 0)


def test_losses_against_their_formulas():
    logits, ids, weights = draw(tokens=11)
    ids = ids.at[4].set(-1)  # padding takes no part
    routing = describe(CONFIG, logits, ids, weights)
    wide = np.delete(np.asarray(logits, np.float64), 4, axis=0)
    chances = np.exp(wide) / np.exp(wide).sum(-1, keepdims=True)
    share = np.bincount(np.delete(np.asarray(ids), 4, axis=0).reshape(-1), minlength=5) / 20
    assert float(routing.aux_loss) == pytest.approx(5 * (share * chances.mean(0)).sum(), rel=1e-6)
    assert float(routing.z_loss) == pytest.approx((np.log(np.exp(wide).sum(-1)) ** 2).mean(), rel=1e-6)


def test_no_tokens():
    routing = describe(CONFIG, jnp.zeros((0, 5)), jnp.zeros((0, 2), jnp.int32), jnp.zeros((0, 2)), capacity=3)
    assert routing.counts.tolist() == [0] * 5
    assert float(routing.aux_loss) == 0 and float(routing.z_loss) == 0


def test_capacity():
    assert capacity_of(10, 2, 4, 1.0) == 5
    assert capacity_of(3, 1, 64, 1.0) == 1
    assert capacity_of(4, 4, 4, 100.0) == 4  # an expert never takes a token twice
    with pytest.raises(ValueError, match="capacity_factor"):
        capacity_of(4, 1, 4, 0.0)


def test_routing_is_a_pytree():
    logits, ids, weights = draw()
    routing = jax.jit(lambda *a: describe(CONFIG, *a, capacity=2))(logits, ids, weights)
    assert routing.capacity == 2
    assert jax.tree.map(lambda leaf: leaf, routing).ids.shape == (7, 2)
