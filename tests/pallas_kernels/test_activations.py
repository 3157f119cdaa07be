"""Activations against their formulas in float64."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from expert_oracle import activate

from pallas_kernels import ACTIVATIONS, Activation

GATED = {"swiglu", "geglu", "geglu_tanh", "reglu", "swiglu_clamped"}


def operands(activation, dtype):
    """`gate` and `up` of 400 values in [-12, 12]: both sides of the clamp and of every bend."""
    rng = np.random.default_rng(2)
    gate, up = rng.uniform(-12, 12, (2, 400)).astype(dtype)
    gate[:3], up[:3] = 0, 0
    return (jnp.asarray(gate) if activation.gated else None), jnp.asarray(up)


def wide(value):
    return None if value is None else np.asarray(value).astype(np.float64)


def test_the_names_are_these():
    assert set(ACTIVATIONS) == {"silu", "gelu", "gelu_tanh", "relu"} | GATED
    assert {name for name in ACTIVATIONS if Activation(name).gated} == GATED


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_values_and_dtype(name):
    activation = Activation(name)
    # Relative to the operands' product, since gelu's tails cancel to far below its argument. Measured: 0.9 and 0.6;
    # a bit of room in float32, whose exp and tanh are a platform's own.
    for dtype, ulps in ((np.float32, 1.5), (ml_dtypes.bfloat16, 1)):
        gate, up = operands(activation, dtype)
        got = activation(gate, up)
        assert got.dtype == dtype and got.shape == up.shape
        want = activate(activation, wide(gate), wide(up))
        scale = np.abs(wide(up)) * (1 if gate is None else np.abs(wide(gate))) + np.abs(want)
        assert (np.abs(wide(got) - want) <= ulps * float(ml_dtypes.finfo(dtype).eps) * scale).all()


@pytest.mark.parametrize("alpha, limit", [(1.702, 7.0), (1.0, 2.5)])
def test_the_clamp_reads_alpha_and_limit(alpha, limit):
    activation = Activation("swiglu_clamped", alpha=alpha, limit=limit)
    gate = jnp.array([100.0, 1.0, -100.0, 1.0, 1.0])
    up = jnp.array([0.0, 0.0, 3.0, 100.0, -100.0])
    sigmoid = lambda v: 1 / (1 + np.exp(-alpha * v))
    want = [limit * sigmoid(limit), sigmoid(1), 0, sigmoid(1) * (limit + 1), sigmoid(1) * (1 - limit)]
    np.testing.assert_allclose(activation(gate, up), want, rtol=5e-7, atol=1e-37)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_far_from_zero_nothing_overflows_on_the_way(name):
    activation = Activation(name)
    up = jnp.array([1.0, 1.0], jnp.float32) if activation.gated else jnp.array([-1e30, 1e30], jnp.float32)
    gate = jnp.array([-1e30, 1e30], jnp.float32) if activation.gated else None
    want = [0, np.float32(1e30)] if name != "swiglu_clamped" else [0, 14]
    np.testing.assert_allclose(activation(gate, up), want, rtol=1e-5)


def test_it_is_a_static_argument():
    assert Activation("relu") == Activation("relu") != Activation("silu")
    assert (
        len({Activation("swiglu_clamped"), Activation("swiglu_clamped"), Activation("swiglu_clamped", limit=3.0)}) == 2
    )
    relu = jax.jit(lambda activation, up: activation(None, up), static_argnums=0)
    assert relu(Activation("relu"), jnp.array([-1.0, 2.0])).tolist() == [0, 2]


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="activation: 'swish' is not one of silu, gelu, .*swiglu_clamped"):
        Activation("swish")
