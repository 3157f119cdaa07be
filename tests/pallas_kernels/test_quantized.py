"""`QuantizedArray`: rounding, layouts, indexing, and the expert MLP over int8 kernels."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from compiled_program import materialised
from expert_oracle import make_experts, make_tokens, oracle

from pallas_kernels import Experts, QuantizedArray, capacity_mlp, prepare, routed_mlp
from pallas_kernels.expert_mlp import reference
from pallas_kernels.quantized import dense, is_quantized, quantize, quantize_runs, rows_of


def draw(*shape, dtype=np.float32, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def plain(w, group_size):
    """Symmetric int8 of `w [out, in]`, block by block."""
    values, scales = np.zeros(w.shape, np.int8), []
    for begin in range(0, w.shape[1], group_size):
        block = w[:, begin : begin + group_size].astype(np.float32)
        scale = np.abs(block).max(1) / np.float32(127)
        ratio = block / np.where(scale == 0, 1, scale)[:, None]
        values[:, begin : begin + group_size] = np.clip(np.rint(ratio), -127, 127)
        scales.append(scale)
    return values, np.stack(scales, 1)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("group_size", [None, 1, 7, 8, 24, 100])
def test_blocks(group_size, dtype):
    w = draw(5, 24, dtype=dtype)
    w[3] = 0
    size = min(group_size or 24, 24)
    values, scales = plain(w, size)
    got = quantize(w, group_size)
    assert got.values.dtype == np.int8 and got.scales.dtype == np.float32 and got.dtype == dtype
    np.testing.assert_allclose(got.scales, scales, rtol=1e-6)
    np.testing.assert_array_equal(got.values, values)
    want = np.asarray(got.values, np.float32) * np.repeat(np.asarray(got.scales), size, 1)[:, :24]
    np.testing.assert_array_equal(got.dequantize(np.float32), want)
    assert got.dequantize().dtype == dtype
    bound = np.repeat(np.asarray(got.scales), size, 1)[:, :24] * 0.5001
    assert (np.abs(want - w.astype(np.float32)) <= bound).all()
    assert (want[3] == 0).all()


def test_ties_go_to_even():
    w = jnp.array([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5]])
    assert quantize(w).values.tolist() == [[127, 0, 2, 2, 0, -2]]


def test_runs_are_those_of_the_flattened_matrix():
    w = draw(2, 6, 8)
    w[1, :3] = 0
    got = quantize_runs(w, 4, lead=1)
    assert got.shape == w.shape and got.scales.shape == (2, 4) and got.runs
    runs = w.reshape(2, 4, 12)
    scale = np.float32(256) / (2 * np.abs(runs).max(-1) + np.float32(1e-5))
    np.testing.assert_array_equal(
        got.values, np.clip(np.rint(runs * scale[..., None]), -128, 127).astype(np.int8).reshape(w.shape)
    )
    np.testing.assert_allclose(got.dequantize(), np.asarray(got.values) * np.repeat(1 / scale, 12, 1).reshape(w.shape))
    np.testing.assert_array_equal(got[1].dequantize(), got.dequantize()[1])


@pytest.mark.parametrize("array", [quantize(draw(4, 6, 10), 4), quantize_runs(draw(4, 6, 10), 3, lead=1)])
def test_indexing_and_mapping_over_leaves(array):
    wide = np.asarray(array.dequantize())
    ids = jnp.array([[3, 0], [1, 1]])
    for index in (2, slice(1, 3), ids, -1, ..., (2, ...)):
        np.testing.assert_array_equal(array[index].dequantize(), wide[np.asarray(index) if index is ids else index])
    one = jax.jit(lambda a, i: jax.tree.map(lambda w: jax.lax.dynamic_index_in_dim(w, i, keepdims=False), a))(array, 3)
    np.testing.assert_array_equal(one.dequantize(), wide[3])
    split = jax.tree.map(lambda w: w.reshape(2, 2, *w.shape[1:]), array)
    np.testing.assert_array_equal(split.dequantize(), wide.reshape(2, 2, 6, 10))
    with pytest.raises(IndexError, match=r"\(4, 6, 10\) has"):
        array[1, 2, 3]


def test_rows_too_where_scales_have_them():
    array = quantize(draw(4, 6, 10), 4)
    wide = np.asarray(array.dequantize())
    np.testing.assert_array_equal(array[:, 2:].dequantize(), wide[:, 2:])
    np.testing.assert_array_equal(array[1, 2].dequantize(), wide[1, 2])
    np.testing.assert_array_equal(rows_of(array, jnp.int32(2), jnp.int32(3), 3).dequantize(), wide[2, 3:])
    runs = quantize_runs(draw(4, 6, 10), 3, lead=1)
    np.testing.assert_array_equal(rows_of(runs, jnp.int32(2), 0, 6).dequantize(), runs[2].dequantize())
    with pytest.raises(IndexError):
        runs[:, 2:]


def test_dense_leaves_arrays_alone():
    w = jnp.ones((2, 3))
    assert dense(w, jnp.bfloat16) is w
    assert dense(quantize(w), jnp.bfloat16).dtype == jnp.bfloat16


# -- the expert MLP


def quantized(experts, make):
    kernels = {n: make(getattr(experts, n)) for n in ("gate", "up", "down") if getattr(experts, n) is not None}
    return dataclasses.replace(experts, **kernels)


def widened(experts):
    return jax.tree.map(dense, experts, is_leaf=is_quantized)


MAKE = {
    "channel": quantize,
    "blocks": lambda w: quantize(w, 16),
    "a shorter last block": lambda w: quantize(w, 9),
    "runs": lambda w: quantize_runs(w, 4, lead=w.ndim - 2),
}


@pytest.mark.parametrize("implementation", ["xla_tiles", "xla_ragged"])
@pytest.mark.parametrize("make", MAKE)
@pytest.mark.parametrize("tokens", [1, pytest.param(7, marks=pytest.mark.slow), 40])
def test_against_float64(make, tokens, implementation):
    """The same bounds as for the float32 kernels that the int8 ones stand for."""
    experts = make_experts(5, 24, 40, layers=(2,), layout="out_in", biases=True)
    experts = quantized(experts, MAKE[make])
    x, ids, weights = make_tokens(tokens, 24, 5, 2)
    ids = ids.at[0, 0].set(-1)
    got = routed_mlp(x, ids, weights, experts, layer=1, implementation=implementation)
    np.testing.assert_allclose(got, oracle(x, ids, weights, widened(experts), layer=1), atol=5e-6)


@pytest.mark.parametrize("make", MAKE)
def test_through_slots_and_plainly(make):
    experts = quantized(make_experts(4, 24, 40, layout="out_in", activation="gelu"), MAKE[make])
    x, ids, weights = make_tokens(6, 24, 4, 1)
    position = jnp.asarray([[int((ids[:g, 0] == ids[g, 0]).sum())] for g in range(6)])
    want = oracle(x, ids, weights, widened(experts))
    np.testing.assert_allclose(capacity_mlp(x, ids, weights, position, experts, capacity=6), want, atol=5e-6)
    np.testing.assert_allclose(reference.routed_mlp(x, ids, weights, experts, None, 0), want, atol=5e-6)


@pytest.mark.parametrize("make", ["blocks", "runs"])
def test_gradients_reach_what_is_float(make):
    """Tokens, routing weights and biases get the gradients of the widened kernels."""
    x, ids, weights = make_tokens(13, 24, 5, 2)
    experts = quantized(make_experts(5, 24, 40, layers=(2,), layout="out_in", biases=True), MAKE[make])
    wide, cotangent = widened(experts), draw(13, 24, seed=4)

    @jax.jit
    def gradients(x, weights, biases, experts):
        def loss(x, weights, biases):
            y = routed_mlp(x, ids, weights, dataclasses.replace(experts, **biases), layer=1)
            return (y * cotangent).sum()

        return jax.grad(loss, (0, 1, 2))(x, weights, biases)

    biases = {n: getattr(experts, n) for n in ("gate_bias", "up_bias", "down_bias")}
    got, want = (gradients(x, weights, biases, e) for e in (experts, wide))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())
        assert (b != 0).any()


def test_nothing_flows_to_int8_kernels():
    x, ids, weights = make_tokens(3, 24, 5, 2)
    experts = quantized(make_experts(5, 24, 40, layout="out_in"), quantize)
    loss = lambda experts: routed_mlp(x, ids, weights, experts).sum()
    got = jax.grad(loss, allow_int=True)(experts)
    assert got.up.values.dtype == jax.dtypes.float0 and (got.up.scales == 0).all()


L, E, D, F, A = 3, 8, 64, 96, 2


@pytest.mark.parametrize(("group_size", "tokens", "limit"), [(None, 1, D * F), (32, 1, D * F), (32, 13, E * D * F)])
def test_no_stack_is_widened(group_size, tokens, limit):
    """One token reads int8 in place; tiles of rows may widen their expert, never the layer's."""

    def layers(x, ids, weights, experts):
        return jax.lax.fori_loop(0, L, lambda i, x: x + routed_mlp(x, ids, weights, experts, layer=i), x)

    experts = quantized(make_experts(E, D, F, layers=(L,), layout="out_in"), lambda w: quantize(w, group_size))
    x, ids, weights = make_tokens(tokens, D, E, A)
    text = jax.jit(layers).lower(x, ids, weights, experts).compile().as_text()
    assert materialised(text, limit) == []
    assert "s8[" in text


def test_experts_check_the_shapes_that_arrays_stand_for():
    up, down = quantize(draw(4, 16, 8)), quantize(draw(4, 8, 16))
    experts = Experts(up=up, down=down, activation="relu", layout="out_in")
    assert experts.num_experts == 4 and experts.width == 8 and not experts.stacked and experts.quantized
    assert prepare(experts, "xla_ragged") is experts
    with pytest.raises(ValueError, match=r"down: shape \(4, 16, 8\), expected \(4, 8, 16\)"):
        Experts(up=up, down=up, activation="relu", layout="out_in")
    with pytest.raises(ValueError, match="contraction last"):
        Experts(up=up, down=down, activation="relu")
    flat = Experts(up=quantize(draw(2, 4, 16, 8)), down=draw(2, 4, 8, 16), activation="relu", layout="out_in").flat()
    assert flat.up.shape == (8, 16, 8) and isinstance(flat.up, QuantizedArray)


@pytest.mark.parametrize("group_size", [0, -3, True])
def test_group_sizes_that_are_none(group_size):
    with pytest.raises(ValueError, match="group_size"):
        quantize(draw(2, 4), group_size)
