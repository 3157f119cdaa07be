"""Gradients of `xla_tiles` against automatic differentiation of a dense expert MLP."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from expert_oracle import error, make_experts, make_tokens

from pallas_kernels import routed_mlp

FIELDS = ("gate", "up", "down", "gate_bias", "up_bias", "down_bias")
ACTIVATE = {"swiglu": lambda gate, up: jax.nn.silu(gate) * up, "gelu_tanh": lambda _, up: jax.nn.gelu(up)}

# tokens, layers, activation, layout, biases
CASES = {
    "a stack of layers": (13, (3,), "swiglu", "out_in", True),
    "in place, without gate and biases": (7, (), "gelu_tanh", "in_out", False),
}


def problem(name, dtype):
    """Operands with duplicates in a row, choices outside, an expert without rows, and a cotangent."""
    tokens, layers, activation, layout, biases = CASES[name]
    x, ids, weights = make_tokens(tokens, 24, 5, 2, dtype)
    experts = make_experts(5, 24, 40, layers=layers, activation=activation, dtype=dtype, layout=layout, biases=biases)
    ids = np.where(np.asarray(ids) == 3, 1, ids)
    ids[0], ids[1, 1], ids[2, 0] = 2, -1, 5
    cotangent = np.random.default_rng(8).standard_normal(x.shape).astype(dtype)
    return x, weights, experts, cotangent, ids, np.array(1, np.int32) if layers else None


def dense(x, weights, arrays, ids, layer, activation, layout, narrow, kept):
    """Every choice with its own gathered kernels; `narrow` as in `expert_oracle.oracle`.

    `kept`: whether each choice's row of x, of gate and of up is rounded too, and therewith its gradient.
    """
    num = arrays["up"].shape[-3]
    valid = (ids >= 0) & (ids < num)
    of_choice = {n: (a if layer is None else a[layer])[jnp.where(valid, ids, 0)] for n, a in arrays.items()}

    def rounded(value):
        if narrow is None:
            return value
        kind = ml_dtypes.finfo(narrow)  # XLA may leave out a conversion there and back, but not this
        return jax.lax.reduce_precision(value, exponent_bits=kind.nexp, mantissa_bits=kind.nmant)

    def product(rows, kernel, bias):
        if kernel not in of_choice:
            return None
        letters = "gai,gaoi->gao" if layout == "out_in" else "gai,gaio->gao"
        y = jnp.einsum(letters, rows, of_choice[kernel]) + of_choice.get(bias, 0)
        return rounded(y) if kept and kernel != "down" else y

    rows = jnp.broadcast_to(x[:, None], (*ids.shape, x.shape[1]))
    rows = rounded(rows) if kept else rows
    gate, up = product(rows, "gate", "gate_bias"), product(rows, "up", "up_bias")
    out = product(rounded(ACTIVATE[activation](gate, up)), "down", "down_bias")
    return rounded((jnp.where(valid, weights, 0)[..., None] * rounded(out)).sum(1))


@functools.partial(jax.jit, static_argnames=("activation", "layout", "narrow", "kept"))
def _dense_gradients(x, weights, arrays, cotangent, ids, layer, activation, layout, narrow, kept):
    loss = lambda *operands: (dense(*operands, ids, layer, activation, layout, narrow, kept) * cotangent).sum()
    return jax.grad(loss, (0, 1, 2))(x, weights, arrays)


@jax.jit
def _gradients(x, weights, experts, cotangent, ids, layer):
    def loss(x, weights, experts):
        y = routed_mlp(x, ids, weights, experts, layer=layer)
        return (y * cotangent).astype(jnp.promote_types(y.dtype, jnp.float32)).sum()

    return jax.grad(loss, (0, 1, 2))(x, weights, experts)


def arrays_of(experts):
    return {n: getattr(experts, n) for n in FIELDS if getattr(experts, n) is not None}


def gradients(*operands):
    """The package's gradients by name."""
    x, weights, experts = _gradients(*operands)
    return {n: np.asarray(a) for n, a in {"x": x, "weights": weights, **arrays_of(experts)}.items()}


def dense_gradients(wide, x, weights, experts, cotangent, ids, layer, narrow=None, kept=False):
    """The oracle's, in `wide`."""
    operands = jax.tree.map(lambda a: jnp.asarray(a, wide), (x, weights, arrays_of(experts), cotangent))
    x, weights, arrays = _dense_gradients(*operands, ids, layer, experts.activation.name, experts.layout, narrow, kept)
    return {n: np.asarray(a) for n, a in {"x": x, "weights": weights, **arrays}.items()}


@pytest.mark.parametrize("name", CASES)
def test_in_float64(name):
    with jax.enable_x64(True):
        operands = problem(name, np.float64)
        got, want = gradients(*operands), dense_gradients(jnp.float64, *operands)
    assert set(got) == set(want)
    for field in want:
        assert got[field].dtype == (np.float32 if field == "weights" else np.float64)
        # Sums of a few dozen terms: 2e-16 measured. The routing weights are float32, and so is their gradient.
        bound = 1e-7 if field == "weights" else 2e-15
        assert np.abs(got[field] - want[field]).max() <= bound * np.abs(want[field]).max(), field


def test_in_bfloat16_the_error_is_that_of_float32_accumulation():
    """At most 1.2 times that of a dense float32 backward pass that rounds what the forward pass rounds."""
    operands = problem("in place, without gate and biases", ml_dtypes.bfloat16)
    got = gradients(*operands)
    plain = dense_gradients(jnp.float32, *operands, narrow=ml_dtypes.bfloat16)
    with jax.enable_x64(True):
        want = dense_gradients(jnp.float64, *operands)
    for field in want:
        dtype = np.float32 if field == "weights" else ml_dtypes.bfloat16
        assert got[field].dtype == dtype
        assert error(got[field], want[field]) <= 1.2 * error(plain[field].astype(dtype), want[field]), field


def test_what_is_outside_has_no_gradient_and_poisons_none():
    with jax.enable_x64(True):  # only to run what `test_in_float64` has compiled
        x, weights, experts, cotangent, ids, layer = problem("a stack of layers", np.float64)
        ids[5] = -1
        clean = gradients(x, weights, experts, cotangent, ids, layer)
        x, weights = np.array(x), np.array(weights)
        x[5], weights[(ids < 0) | (ids >= 5)] = np.nan, np.nan
        got = gradients(x, weights, experts, cotangent, ids, layer)
    for field in clean:
        np.testing.assert_array_equal(got[field], clean[field])
    assert (got["x"][5] == 0).all() and (got["weights"][5] == 0).all()
    for field in FIELDS:
        assert (got[field][[0, 2]] == 0).all() and (got[field][1, 3] == 0).all()  # other layers, the idle expert
        assert (got[field][1, 2] != 0).any()
