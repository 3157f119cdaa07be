"""`MXFP4Array`: every code under every scale, its life as a pytree, and the expert MLP over 4-bit kernels."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from compiled_program import materialised
from expert_oracle import make_experts, make_tokens, oracle

from pallas_kernels import Experts, MXFP4Array, capacity_mlp, prepare, routed_mlp
from pallas_kernels.expert_mlp import reference
from pallas_kernels.quantized import dense, is_quantized, rows_of

VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def draw(*shape, seed=0, dtype=np.float32):
    """Random words for a kernel of that shape; factors near 1/16."""
    rng = np.random.default_rng(seed)
    *lead, width = shape
    blocks = rng.integers(0, 2**32, (*lead, width // 8), np.uint32)
    scales = rng.integers(121, 126, (*lead, width // 32), np.uint8)
    return MXFP4Array(jnp.asarray(blocks), jnp.asarray(scales), np.dtype(dtype))


def plain(array):
    """Float64 by the formula."""
    words, scales = np.asarray(array.blocks), np.asarray(array.scales, np.float64)
    values = VALUES[np.stack([words >> 4 * i & 15 for i in range(8)], -1).reshape(*words.shape[:-1], -1)]
    return values * np.exp2(np.repeat(scales, 32, -1) - 127)


def every_code_under_every_scale():
    low, high = np.meshgrid(np.arange(16), np.arange(16)[::-1])
    codes = (low | high << 4).astype(np.uint8).reshape(1, -1)  # 256 bytes hold each pair of codes
    scales = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 16, 1)
    return MXFP4Array(np.repeat(codes.view(np.uint32), 256, 0), scales)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_dequantisation_is_exact(dtype):
    """To the bit, also what is subnormal, infinite or not a number."""
    array = every_code_under_every_scale()
    with np.errstate(over="ignore"):
        want = plain(array).astype(np.float32).astype(dtype)
    got = np.asarray(jax.jit(lambda a: a.dequantize(dtype))(array))
    assert got.dtype == dtype and got.shape == array.shape == (256, 512)
    np.testing.assert_array_equal(got[:255].view(np.uint8), want[:255].view(np.uint8))
    assert np.isnan(got[255]).all() and not np.isnan(got[:255]).any()
    assert np.isinf(got[254]).any() and (got[0] != 0).any()


def test_float16_is_rounded_from_float32():
    array = every_code_under_every_scale()
    with np.errstate(over="ignore"):
        want = plain(array).astype(np.float16)
    np.testing.assert_array_equal(array.dequantize(np.float16)[:255], want[:255])


def test_the_first_input_is_in_the_low_bits():
    words = np.full((1, 4), 0x76543210, np.uint32)
    array = MXFP4Array(jnp.asarray(words), jnp.full((1, 1), 127, jnp.uint8))
    assert array.dequantize()[0].tolist() == 4 * [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert words.view(np.uint8)[0, :4].tolist() == [0x10, 0x32, 0x54, 0x76]  # of a checkpoint: even inputs low


def test_it_has_the_manners_of_an_array():
    array = draw(4, 6, 64, dtype=ml_dtypes.bfloat16)
    assert array.shape == (4, 6, 64) and array.ndim == 3 and array.size == 1536
    assert array.nbytes == 4 * 6 * (32 + 2) and array.dtype == ml_dtypes.bfloat16
    assert is_quantized(array) and not array.runs
    assert dense(array).dtype == ml_dtypes.bfloat16 and dense(array, np.float32).dtype == np.float32
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(array)]
    assert names == [".blocks", ".scales"]


def test_indexing_and_mapping_over_leaves():
    array = draw(4, 6, 64)
    wide = plain(array)
    ids = jnp.array([[3, 0], [1, 1]])
    for index in (2, slice(1, 3), ids, -1, ..., (2, ...), (1, 2), (slice(None), slice(2, 5))):
        np.testing.assert_array_equal(array[index].dequantize(), wide[np.asarray(index) if index is ids else index])
    one = jax.jit(lambda a, i: jax.tree.map(lambda w: jax.lax.dynamic_index_in_dim(w, i, keepdims=False), a))(array, 3)
    np.testing.assert_array_equal(one.dequantize(), wide[3])
    split = jax.tree.map(lambda w: w.reshape(2, 2, *w.shape[1:]), array)
    np.testing.assert_array_equal(split.dequantize(), wide.reshape(2, 2, 6, 64))
    np.testing.assert_array_equal(rows_of(array, jnp.int32(2), jnp.int32(3), 3).dequantize(), wide[2, 3:])
    with pytest.raises(IndexError, match=r"MXFP4Array \(4, 6, 64\) has 2 leading axes"):
        array[1, 2, 3]


def test_transformations():
    array = draw(3, 6, 64)
    abstract = jax.eval_shape(lambda a: a, array)
    assert isinstance(abstract, MXFP4Array) and abstract.shape == (3, 6, 64)
    assert jax.eval_shape(lambda a: a.dequantize(jnp.bfloat16), array).dtype == jnp.bfloat16
    _, rows = jax.lax.scan(lambda carry, own: (carry, own.dequantize().sum()), 0, array)
    np.testing.assert_allclose(rows, plain(array).sum((1, 2)), rtol=1e-5)
    np.testing.assert_array_equal(jax.vmap(lambda own: own.dequantize())(array), plain(array))
    put = jax.jit(lambda a, own, i: jax.tree.map(lambda w, v: w.at[i].set(v), a, own), donate_argnums=0)
    given = jax.tree.map(jnp.copy, array)
    changed = put(given, draw(6, 64, seed=1), 2)
    assert given.blocks.is_deleted() and given.scales.is_deleted()
    np.testing.assert_array_equal(changed.dequantize()[2], plain(draw(6, 64, seed=1)))


# -- the expert MLP


def experts_of(num, width, hidden, lead=(), biases=False, activation="swiglu"):
    """Experts with 4-bit kernels; biases and the rest as the other tests make them."""
    wide = make_experts(num, width, hidden, layers=lead, layout="out_in", biases=biases, activation=activation)
    shapes = {n: getattr(wide, n) for n in ("gate", "up", "down")}
    kernels = {n: draw(*w.shape, seed=i) for i, (n, w) in enumerate(shapes.items()) if w is not None}
    return dataclasses.replace(wide, **kernels)


def widened(experts):
    return jax.tree.map(dense, experts, is_leaf=is_quantized)


def close(got, want):
    np.testing.assert_allclose(got, want, atol=3e-6 * np.abs(want).max(), rtol=0)


@pytest.mark.parametrize("implementation", ["xla_tiles", "xla_ragged"])
@pytest.mark.parametrize("tokens", [1, 7, 40])
def test_against_float64(tokens, implementation):
    experts = experts_of(5, 64, 96, lead=(2,), biases=True)
    x, ids, weights = make_tokens(tokens, 64, 5, 2)
    ids = ids.at[0, 0].set(-1)
    got = routed_mlp(x, ids, weights, experts, layer=1, implementation=implementation)
    close(got, oracle(x, ids, weights, widened(experts), layer=1))


def test_through_slots_and_plainly():
    experts = experts_of(4, 64, 32, activation="gelu")
    x, ids, weights = make_tokens(6, 64, 4, 1)
    position = jnp.asarray([[int((ids[:g, 0] == ids[g, 0]).sum())] for g in range(6)])
    want = oracle(x, ids, weights, widened(experts))
    close(capacity_mlp(x, ids, weights, position, experts, capacity=6), want)
    close(reference.routed_mlp(x, ids, weights, experts, None, 0), want)


def test_the_default_takes_bfloat16():
    """As near to float64 as bfloat16 kernels, which hold MXFP4 exactly."""
    experts = experts_of(4, 64, 96)
    x, ids, weights = make_tokens(9, 64, 4, 2)
    x = x.astype(jnp.bfloat16)
    wide = jax.tree.map(lambda w: dense(w, jnp.bfloat16), experts, is_leaf=is_quantized)
    want = oracle(x.astype(jnp.float32), ids, weights, widened(experts))
    got, plain = (routed_mlp(x, ids, weights, e) for e in (experts, wide))
    assert got.dtype == jnp.bfloat16
    error, bound = (np.abs(np.asarray(y, np.float64) - want).max() for y in (got, plain))
    assert error <= 1.2 * bound


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nothing_about_places_leaves_a_loop(dtype):
    """An array of shifts that the loop reads from memory made it 4 to 6 times as slow on a CPU."""
    array = draw(4, 6, 64)

    def run(array):
        put = lambda i, total: total + array[i].dequantize(dtype).sum(0)
        return jax.lax.fori_loop(0, 4, put, jnp.zeros(64, dtype))

    text = jax.jit(run).lower(array).compile().as_text()
    assert "u32[4,6,8]" in text and not re.search(r"= u32\[8\]\S* (get-tuple-element|fusion|parameter)", text)


@pytest.mark.parametrize("implementation", ["xla_tiles", "xla_ragged"])
def test_gradients_reach_what_is_float(implementation):
    experts = experts_of(5, 64, 96, lead=(2,), biases=True)
    x, ids, weights = make_tokens(13, 64, 5, 2)
    cotangent = np.random.default_rng(4).standard_normal((13, 64)).astype(np.float32)

    @jax.jit
    def gradients(x, weights, biases, experts):
        def loss(x, weights, biases):
            full = dataclasses.replace(experts, **biases)
            return (routed_mlp(x, ids, weights, full, layer=1, implementation=implementation) * cotangent).sum()

        return jax.grad(loss, (0, 1, 2))(x, weights, biases)

    biases = {n: getattr(experts, n) for n in ("gate_bias", "up_bias", "down_bias")}
    got, want = (gradients(x, weights, biases, e) for e in (experts, widened(experts)))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())
        assert (b != 0).any()


def test_nothing_flows_to_4_bit_kernels():
    x, ids, weights = make_tokens(3, 64, 5, 2)
    experts = experts_of(5, 64, 96)
    loss = lambda experts: routed_mlp(x, ids, weights, experts).sum()
    got = jax.grad(loss, allow_int=True)(experts)
    assert got.up.blocks.dtype == got.up.scales.dtype == jax.dtypes.float0
    with pytest.raises(TypeError, match="uint32"):
        jax.grad(loss)(experts)


@pytest.mark.parametrize("tokens", [1, 13])
def test_no_stack_is_widened(tokens):
    layers, num, width, hidden = 3, 8, 64, 96

    def run(x, ids, weights, experts):
        return jax.lax.fori_loop(0, layers, lambda i, x: x + routed_mlp(x, ids, weights, experts, layer=i), x)

    experts = experts_of(num, width, hidden, lead=(layers,))
    x, ids, weights = make_tokens(tokens, width, num, 2)
    text = jax.jit(run).lower(x, ids, weights, experts).compile().as_text()
    assert materialised(text, num * width * hidden) == []
    assert "u32[" in text


def test_experts_check_the_shapes_that_arrays_stand_for():
    up, down = draw(4, 96, 64), draw(4, 64, 96)
    experts = Experts(up=up, down=down, activation="relu", layout="out_in")
    assert (experts.num_experts, experts.width, experts.hidden, experts.quantized) == (4, 64, 96, True)
    assert prepare(experts, "xla_ragged") is experts
    with pytest.raises(ValueError, match=r"down: shape \(4, 96, 64\), expected \(4, 64, 96\)"):
        Experts(up=up, down=up, activation="relu", layout="out_in")
    with pytest.raises(ValueError, match="quantised kernels have the contraction last"):
        Experts(up=up, down=down, activation="relu")
    flat = experts_of(4, 64, 96, lead=(2,)).flat()
    assert flat.up.shape == (8, 96, 64) and isinstance(flat.up, MXFP4Array)
