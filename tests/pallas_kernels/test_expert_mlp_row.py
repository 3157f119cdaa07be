"""The GPU's expert MLP for one token: interpreted against `expert_oracle`, and lowered; the residual of all others."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from expert_oracle import error, make_experts, make_tokens, oracle

from pallas_kernels import ACTIVATIONS, MXFP4Array, compat, routed_mlp
from pallas_kernels.expert_mlp.api import OPERATION
from pallas_kernels.quantized import quantize

pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")
BFLOAT16 = ml_dtypes.bfloat16
KERNELS = '"moe_jax_expert_up_row"', '"moe_jax_expert_down_row"'
FIELDS = ("gate", "up", "down", "gate_bias", "up_bias", "down_bias")
LAYER = 1

# D, F, E, ids, activations and what differs from bfloat16 without biases; `store`: of int8 "row" or a group size.
CASES = {
    "a stack": (96, 70, 7, [[4, 1]], ["swiglu", "gelu"], dict(biases=True, layers=3)),
    "not all are experts": (160, 96, 5, [[2, -1, 5, 4]], ["swiglu_clamped"], dict(biases=True, layers=3)),
    "all experts": (64, 48, 5, [[3, 0, 2, 4, 1]], ["geglu_tanh", "relu"], dict(dtype=np.float16)),
    "many choices": (64, 40, 24, [[*range(3, 22), 24]], ["reglu", "gelu_tanh"], dict()),
    "twice the same": (96, 64, 4, [[2, 2]], ["geglu", "silu"], dict(biases=True)),
    "int8": (96, 70, 5, [[3, 1, 7]], ["swiglu"], dict(store="row", layers=3, biases=True)),
    "int8 in groups": (160, 96, 5, [[0, 4]], ["swiglu"], dict(store=32, dtype=np.float16)),
    "int8 in groups of a stack": (128, 384, 5, [[0, 4]], ["relu"], dict(store=128, layers=3)),
    "mxfp4": (96, 64, 5, [[3, 1, 7]], ["swiglu_clamped"], dict(store="mxfp4", layers=3, biases=True)),
    "mxfp4 in pieces": (1152, 1056, 3, [[2, 0]], ["relu"], dict(store="mxfp4")),
}


SLOW = "twice the same", "int8", "int8 in groups", "all experts", "mxfp4 in pieces"
NAMED = [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in CASES]


def narrow(experts, store):
    """The same experts in int8, or others in MXFP4, and what they stand for."""
    few, wide = {}, {}
    for name in ("gate", "up", "down"):
        if (kernel := getattr(experts, name)) is not None:
            few[name] = _mxfp4(kernel) if store == "mxfp4" else _int8(kernel, None if store == "row" else store)
            wide[name] = np.asarray(few[name].dequantize(np.float32))
    return dataclasses.replace(experts, **few), dataclasses.replace(experts, **wide)


_int8 = jax.jit(quantize, static_argnums=1)


def _mxfp4(kernel):
    """Random codes, with scales that give them about the size of the kernel's weights."""
    rng, (*lead, width) = np.random.default_rng(kernel.size), kernel.shape
    words = rng.integers(0, 2**32, (*lead, width // 8), dtype=np.uint32)
    scales = rng.integers(-2, 1, (*lead, width // 32)) + 127 - round(np.log2(width) / 2 + 1)
    return MXFP4Array(words, scales.astype(np.uint8), kernel.dtype)


def poisoned(experts, ids):
    """NaN in every expert that is not chosen and every other layer."""
    num, stacked = experts.num_experts, experts.stacked
    idle = np.setdiff1d(np.arange(num), ids)

    def poison(array):
        if array.dtype in (np.int8, np.uint32):
            return array
        array, poison = np.array(array), 255 if array.dtype == np.uint8 else np.nan
        array[(slice(None), idle) if stacked else idle] = poison
        if stacked:
            array[[0, 2]] = poison
        return array

    return jax.tree.map(poison, experts)


def make(name):
    """`x`, `ids`, `weights`, experts to run, experts for the oracle and the layer, for each activation."""
    width, hidden, num, ids, activations, options = CASES[name]
    dtype, layers = options.get("dtype", BFLOAT16), options.get("layers")
    ids = np.array(ids, np.int32)
    x, _, weights = make_tokens(1, width, max(num, ids.size), ids.size, dtype)
    real = (ids >= 0) & (ids < num)
    weights = np.where(real, weights, np.nan).astype(np.float32)
    for activation in activations:
        experts = wide = make_experts(
            *(num, width, hidden),
            **dict(layers=(layers,) if layers else (), activation=activation, dtype=dtype, layout="out_in"),
            biases=options.get("biases", False),
        )
        if store := options.get("store"):
            experts, wide = narrow(experts, store)
        layer = np.array(LAYER, np.int32) if layers else None
        yield x, ids, weights, poisoned(experts, ids), wide, layer


@functools.partial(jax.jit, static_argnames="implementation")
def run(x, ids, weights, experts, layer, residual=None, implementation="triton_row_interpreted"):
    return routed_mlp(x, ids, weights, experts, layer=layer, residual=residual, implementation=implementation)


def assert_standard(got, x, ids, weights, experts, layer, residual=None):
    """The project's standard, the residual added to the rounded output."""
    added = 0 if residual is None else np.asarray(residual).astype(np.float64)
    assert got.dtype == x.dtype and got.shape == x.shape
    want = oracle(x, ids, weights, experts, layer) + added
    plain = oracle(x, ids, weights, experts, layer, np.float32, x.dtype)
    plain = plain if residual is None else (plain + added.astype(np.float32)).astype(x.dtype)
    assert error(got, want) <= 1.2 * error(plain, want)


@pytest.mark.parametrize("name", NAMED)
def test_values(name):
    for x, ids, weights, experts, wide, layer in make(name):
        residual = np.random.default_rng(1).standard_normal(x.shape).astype(x.dtype)
        assert_standard(run(x, ids, weights, experts, layer, residual), x, ids, weights, wide, layer, residual)
        if name == "a stack":
            assert_standard(run(x, ids, weights, experts, layer), x, ids, weights, wide, layer)


def test_every_activation_has_a_case():
    assert {name for case in CASES.values() for name in case[4]} == set(ACTIVATIONS)


def test_no_choice_inside_gives_the_residual():
    x, ids, weights, experts, _, layer = next(make("a stack"))
    residual = np.full(x.shape, 3, x.dtype)
    x, weights = np.full_like(x, np.nan), np.full_like(weights, np.nan)
    for outside in (-1, 7, np.iinfo(np.int32).min, np.iinfo(np.int32).max):
        got = run(x, np.full_like(ids, outside), weights, experts, layer, residual)
        np.testing.assert_array_equal(got, residual)
    nothing = routed_mlp(x, ids[:, :0], weights[:, :0], experts, layer=1, residual=residual)
    np.testing.assert_array_equal(nothing, residual)


def test_nan_is_kept():
    x, ids, weights, experts, *_, layer = next(make("a stack"))
    bad = np.where(np.arange(x.shape[1]) == 7, np.nan, x).astype(x.dtype)
    for row, shares in ((bad, weights), (x, weights * np.array([np.nan, 1], np.float32))):
        assert np.isnan(np.asarray(run(row, ids, shares, experts, layer))).all()


@pytest.mark.slow
def test_with_64_bit_types():
    with jax.enable_x64(True):
        for name in ("many choices", "int8 in groups"):
            x, ids, weights, experts, wide, layer = next(make(name))
            assert_standard(run(x, ids, weights, experts, layer), x, ids, weights, wide, layer)


ALL = [name for name, one in OPERATION.implementations.items() if not one.platform]
residuals = pytest.mark.parametrize(
    "implementation",
    [
        pytest.param(
            name,
            marks=[pytest.mark.slow] * (name != "triton_row_interpreted")
            + [pytest.mark.skipif("mosaic" in name and not compat.INTERPRETS_GPU, reason="jax 0.10's")],
        )
        for name in ALL
    ],
)


@residuals
def test_the_residual_and_all_gradients_of_every_implementation(implementation):
    """Values against the oracle, gradients against automatic differentiation of a plain sum over the choices."""
    width, hidden, num = 64, 128, 3
    x, ids, weights = make_tokens(1, width, num, 2, BFLOAT16)
    experts = make_experts(num, width, hidden, layers=(2,), dtype=BFLOAT16, layout="out_in")
    rng = np.random.default_rng(2)
    residual, cotangent = (rng.standard_normal(x.shape).astype(BFLOAT16) for _ in range(2))

    def ours(x, weights, experts, residual, layer):
        call = dict(layer=layer, residual=residual, implementation=implementation)
        return routed_mlp(x, ids, weights, experts, **call)

    def plain(x, weights, experts, residual, layer):
        y = residual
        for a in range(2):
            gate, up, down = (getattr(experts, n)[layer, ids[0, a]] for n in FIELDS[:3])
            y = y + weights[:, a, None] * ((jax.nn.silu(x @ gate.T) * (x @ up.T)) @ down.T)
        return y

    @functools.partial(jax.jit, static_argnums=0)
    def both(function, operands, layer, cotangent):
        y, back = jax.vjp(lambda *operands: function(*operands, layer), *operands)
        return y, back(cotangent.astype(y.dtype))

    layer, operands = np.array(LAYER, np.int32), (x, weights, experts, residual)
    y, got = both(ours, operands, layer, cotangent)
    wide = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), operands)
    want = both(plain, wide, layer, cotangent)[1]
    assert_standard(y, x, ids, weights, experts, layer, residual)
    np.testing.assert_array_equal(got[3], cotangent)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for one, other, like in zip(*map(jax.tree.leaves, (got, want, operands)), strict=True):
        assert one.dtype == like.dtype and np.abs(other).max() > 0
        assert error(one, other) <= 2**-6 * np.sqrt(np.mean(np.square(other)))


@pytest.mark.slow
def test_the_gradient_of_int8_experts():
    x, ids, weights, experts, wide, layer = next(make("int8"))
    loss = lambda x, experts, name: run(x, ids, weights, experts, layer, implementation=name).astype(jnp.float32).sum()
    got = jax.grad(loss)(x, experts, "triton_row_interpreted")
    want = jax.grad(loss)(np.float32(x), wide, "xla_tiles")
    assert error(got, want) <= 2**-6 * np.sqrt(np.mean(np.square(want)))
