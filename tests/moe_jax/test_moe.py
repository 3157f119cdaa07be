"""The MoE layer by itself: values, gradients, capacity, masks, and life inside Flax models."""

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import moe_jax
from moe_jax.moe import MoE


def dense(layer, x, ids, gates):
    """The layer in float64, token by token."""
    weights = {k: np.asarray(v[...], np.float64) for k, v in layer.experts.items()}
    y = np.zeros((x.shape[0], x.shape[1]))
    for g, row in enumerate(np.asarray(x, np.float64)):
        for e, w in zip(np.asarray(ids[g]), np.asarray(gates[g], np.float64), strict=True):
            if e >= 0:
                gate, up = weights["gate"][e] @ row, weights["up"][e] @ row
                y[g] += w * (weights["down"][e] @ (gate / (1 + np.exp(-gate)) * up))
    return y


@nnx.jit
def run(layer, x, mask=None):
    """The layer as one compiled program; called as it is it compiles dozens of small ones."""
    return layer(x, mask)


@pytest.fixture(scope="module")
def layer():
    return MoE(12, 20, num_experts=5, top_k=2, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def x():
    return jax.random.normal(jax.random.key(1), (2, 7, 12))


def test_values(layer, x):
    y, routing = run(layer, x)
    logits = np.asarray(x, np.float64).reshape(14, 12) @ np.asarray(layer.router["router"][...], np.float64).T
    chances = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    ids = np.argsort(-chances, axis=-1)[:, :2]
    gates = np.take_along_axis(chances, ids, axis=-1)
    gates /= gates.sum(-1, keepdims=True)
    np.testing.assert_array_equal(routing.ids, ids)
    np.testing.assert_allclose(routing.weights, gates, rtol=2e-6)
    np.testing.assert_allclose(y.reshape(14, 12), dense(layer, x.reshape(14, 12), ids, gates), atol=2e-6)


def test_mask(layer, x):
    mask = jnp.arange(7) < jnp.array([[7], [4]])
    y, routing = run(layer, x, mask)
    full, _ = run(layer, x)
    np.testing.assert_array_equal(y[mask], full[mask])
    assert not np.asarray(y[~mask]).any()
    assert int(routing.counts.sum()) == 2 * 11


def test_capacity_drops_what_routing_says(x):
    layer = MoE(12, 20, num_experts=5, top_k=2, capacity_factor=0.5, rngs=nnx.Rngs(0))
    y, routing = run(layer, x)
    assert routing.capacity == 3 and not routing.keep.all()
    assert (np.bincount(np.asarray(routing.ids)[np.asarray(routing.keep)], minlength=5) <= 3).all()
    kept = np.where(np.asarray(routing.keep), np.asarray(routing.ids), -1)
    np.testing.assert_allclose(y.reshape(14, 12), dense(layer, x.reshape(14, 12), kept, routing.weights), atol=2e-6)


def test_wide_capacity_equals_dropless(layer, x):
    roomy = MoE(12, 20, num_experts=5, top_k=2, capacity_factor=5.0, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(run(roomy, x)[0], run(layer, x)[0], atol=1e-6)


@pytest.mark.parametrize("capacity_factor", [None, 1.0])
def test_gradients_against_finite_differences(capacity_factor):
    with jax.enable_x64(True):
        layer = MoE(4, 6, num_experts=3, top_k=2, capacity_factor=capacity_factor, dtype=jnp.float64, rngs=nnx.Rngs(3))
        x = jax.random.normal(jax.random.key(4), (5, 4), jnp.float64)
        graph, state = nnx.split(layer)

        def loss(state, x):
            y, routing = nnx.merge(graph, state)(x)
            return (jnp.sin(y)).sum() + 0.1 * routing.aux_loss + 0.01 * routing.z_loss

        with_slopes = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
        grads, d_x = with_slopes(state, x)[1]
        rng = np.random.default_rng(0)
        step = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape)), (state, x))
        # float32 inside (router, accumulation) bounds the agreement of the difference quotient
        eps = 1e-3
        ahead, behind = (
            with_slopes(*jax.tree.map(lambda a, b, s=sign: a + s * eps * b, (state, x), step))[0] for sign in (1, -1)
        )
        slope = sum(jnp.vdot(a, b) for a, b in zip(jax.tree.leaves((grads, d_x)), jax.tree.leaves(step), strict=True))
        assert float(slope) == pytest.approx(float((ahead - behind) / (2 * eps)), rel=2e-3)


def test_learns(x):
    """A few steps of Adam inside a Flax model, losses included."""
    layer = MoE(12, 20, num_experts=5, top_k=2, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(layer, optax.adam(1e-2), wrt=nnx.Param)
    target = jnp.roll(x, 1, axis=-1)

    @nnx.jit
    def step(layer, optimizer):
        def loss(layer):
            y, routing = layer(x)
            return jnp.mean((y - target) ** 2) + 0.01 * routing.aux_loss

        value, grads = nnx.value_and_grad(loss)(layer)
        optimizer.update(layer, grads)
        return value

    losses = [float(step(layer, optimizer)) for _ in range(30)]
    assert losses[-1] < 0.5 * losses[0]


def test_in_linen(x):
    """Through flax's bridge the layer is a Linen module."""

    class Block(linen.Module):
        @linen.compact
        def __call__(self, x):
            moe = nnx.bridge.to_linen(moe_jax.MoE, 12, 20, num_experts=5, top_k=2, name="moe")
            y, _ = moe(linen.LayerNorm()(x))
            return x + y

    variables = jax.jit(Block().init)(jax.random.key(0), x)
    y = jax.jit(Block().apply)(variables, x)
    assert y.shape == x.shape and not np.allclose(y, x)
    grads = jax.jit(jax.grad(lambda v: Block().apply(v, x).sum()))(variables)
    assert any(np.asarray(leaf).any() for leaf in jax.tree.leaves(grads))


@pytest.mark.parametrize("gate", [{"score": "sigmoid", "selection_bias": True}, {"scale_input": True}, {"groups": 1}])
def test_gate_options_and_shared(gate, x):
    layer = MoE(12, 20, num_experts=6, top_k=3, shared_hidden=8, bias=True, rngs=nnx.Rngs(0), **gate)
    y, routing = run(layer, x)
    assert y.shape == x.shape and routing.ids.shape == (14, 3)


def test_bad_values(layer):
    with pytest.raises(ValueError, match="top_k: 9 experts per token out of num_experts 4"):
        MoE(8, 8, num_experts=4, top_k=9, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="num_experts"):
        MoE(8, 8, num_experts=0, top_k=1, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="capacity_factor"):
        MoE(8, 8, num_experts=4, top_k=1, capacity_factor=-1.0, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"expected \[\.\.\., 12\]"):
        layer(jnp.ones((3, 11)))
    with pytest.raises(ValueError, match="mask"):
        layer(jnp.ones((3, 12)), jnp.ones(4, bool))


@pytest.mark.parametrize("shared", [0, 8])
def test_narrow_tokens_are_promoted(shared):
    layer = MoE(16, 32, num_experts=4, top_k=2, shared_hidden=shared, rngs=nnx.Rngs(0))
    assert run(layer, jnp.ones((3, 16), jnp.bfloat16))[0].dtype == jnp.float32
    narrow = MoE(16, 32, num_experts=4, top_k=2, shared_hidden=shared, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    assert run(narrow, jnp.ones((3, 16), jnp.bfloat16))[0].dtype == jnp.bfloat16


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(score="tanh"), "score: 'tanh' is not one of softmax, sigmoid, sparsemixer"),
        (dict(score="sparsemixer", top_k=3), "top_k: 3; sparsemixer chooses 2 experts"),
        (dict(capacity_factor=1.0, scale_input=True), "capacity_factor: not supported with scale_input"),
        (dict(implementation="cuda"), "'cuda' is no implementation"),
    ],
)
def test_what_does_not_fit_is_refused_when_built(options, message):
    with pytest.raises(ValueError, match=message):
        MoE(16, 32, num_experts=4, **{"top_k": 2, **options}, rngs=nnx.Rngs(0))
