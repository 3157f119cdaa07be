"""The GPU's backward pass in JAX's interpreter, against float64. Lowering: test_mosaic_backward_lowering."""

from inspect import signature

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from expert_oracle import error, make_experts, make_tokens
from jax.experimental.pallas import mosaic_gpu
from test_expert_mlp_gradients import arrays_of, dense_gradients

from pallas_kernels import compat, make_plan, routed_mlp
from pallas_kernels.expert_mlp import mosaic_backward
from pallas_kernels.expert_mlp.mosaic_tilings import choose, trained_rows

InterpretGPUParams = getattr(mosaic_gpu, "InterpretGPUParams", object)  # jax 0.10 has none
pytestmark = pytest.mark.skipif(not compat.INTERPRETS_GPU, reason="JAX's interpreter runs these kernels from 0.11 on")
BFLOAT16 = ml_dtypes.bfloat16

# tokens, E, choices, D, F and make_experts' options
CASES = {
    "a stack of layers": (
        *(70, 5, 2, 64, 128),
        dict(activation="swiglu", layout="out_in", biases=True, layers=(3,), dtype=BFLOAT16),
    ),
    "the only layer of a stack": (
        *(66, 4, 3, 192, 64),
        dict(activation="gelu_tanh", layout="in_out", layers=(1,), dtype=np.float16),
    ),
    "tiles of 128 rows": (140, 3, 2, 64, 64, dict(activation="swiglu", layout="in_out", dtype=BFLOAT16)),
    "wide": (70, 3, 2, 192, 320, dict(activation="swiglu", layout="out_in", biases=True, dtype=BFLOAT16)),
}


def make(name):
    """Operands with an expert without rows, duplicates in a row and choices outside, and a cotangent."""
    tokens, num, choices, width, hidden, options = CASES[name]
    x, ids, weights = (np.array(a) for a in make_tokens(tokens, width, num, choices, options["dtype"]))
    ids = np.where(ids == num - 2, 1, ids)
    ids[0], ids[1, 1], ids[2, 0] = 2, -1, num
    cotangent = np.random.default_rng(8).standard_normal(x.shape).astype(x.dtype)
    return x, weights, make_experts(num, width, hidden, **options), cotangent, ids


@jax.jit
def _gradients(x, weights, experts, cotangent, ids, layer):
    def run(x, weights, experts):
        return routed_mlp(x, ids, weights, experts, layer=layer, implementation="mosaic_gpu_interpreted")

    y, pull = jax.vjp(run, x, weights, experts)
    return y, pull(cotangent)


def gradients(x, weights, experts, cotangent, ids):
    layer = np.int32(experts.up.shape[0] - 1) if experts.stacked else None
    _, (d_x, d_weights, d_experts) = _gradients(x, weights, experts, cotangent, ids, layer)
    return {n: np.asarray(a) for n, a in {"x": d_x, "weights": d_weights, **arrays_of(d_experts)}.items()}


def assert_standard(got, x, weights, experts, cotangent, ids):
    """At most 1.2 times the error of a dense float32 backward pass that rounds what the kernels round."""
    layer = np.int32(experts.up.shape[0] - 1) if experts.stacked else None
    operands = x, weights, experts, cotangent, ids, layer
    plain = dense_gradients(jnp.float32, *operands, narrow=x.dtype, kept=True)
    with jax.enable_x64(True):
        want = dense_gradients(jnp.float64, *operands)
    assert set(got) == set(want)
    for field in want:
        dtype = np.float32 if field == "weights" else x.dtype
        assert got[field].dtype == dtype and got[field].shape == want[field].shape, field
        assert error(got[field], want[field]) <= 1.2 * error(plain[field].astype(dtype), want[field]), field


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow if name != "a stack of layers" else ()) for name in CASES],
)
def test_gradients(name):
    operands = make(name)
    assert_standard(gradients(*operands), *operands)


@pytest.mark.skipif("detect_races" not in signature(InterpretGPUParams).parameters, reason="from JAX 0.12 on")
@pytest.mark.parametrize("consumers", [1, 2])
def test_no_store_overwrites_what_another_still_reads(monkeypatch, consumers):
    """Of three arrays that a piece of work stores, in calls of few steps, whose staging memory holds each at once."""
    monkeypatch.setattr(compat, "interpret_gpu", lambda: InterpretGPUParams(detect_races=True))
    tokens, hidden = {1: (70, 128), 2: (160, 256)}[consumers]
    options = dict(activation="swiglu", layout="in_out", dtype=BFLOAT16)
    x, ids, weights = make_tokens(tokens, 64, 3, 2, BFLOAT16)
    experts = make_experts(3, 64, hidden, **options)
    tilings = choose(tokens, 2, experts, trained_rows(tokens, tokens * 2 / 3))
    assert tilings.up.consumers == consumers
    jax.clear_caches()
    operands = x, weights, experts, np.ones_like(x), ids
    assert_standard(gradients(*operands), *operands)


def test_what_is_idle_or_outside_has_no_gradient_and_a_poisoned_row_stays_with_its_experts():
    x, weights, experts, cotangent, ids = make("a stack of layers")
    ids[:, 0], ids[:, 1], ids[5] = 4, -1, 0  # one expert takes nearly everything
    x[5], weights[ids < 0] = np.nan, np.nan
    got = gradients(x, weights, experts, cotangent, ids)
    clean, others = np.array(x), np.arange(len(x)) != 5
    clean[5] = 0
    want = gradients(clean, np.where(ids < 0, 0, weights), experts, cotangent, ids)
    assert np.isnan(got["x"][5]).any() and (got["weights"][ids < 0] == 0).all()
    for field in ("x", "weights"):
        np.testing.assert_array_equal(got[field][others], want[field][others])
    for field in set(got) - {"x", "weights"}:
        assert (got[field][:2] == 0).all() and (got[field][2, 1:4] == 0).all()  # other layers, idle experts
        np.testing.assert_array_equal(got[field][2, 4], want[field][2, 4])
        assert (got[field][2, 4] != 0).any()
    assert np.isnan(got["up"][2, 0]).any() and np.isnan(got["down"][2, 0]).any()


def test_a_suitable_plan_is_taken():
    ids = jnp.asarray(make_tokens(200, 8, 4, 2)[1])
    assert [mosaic_backward.suits(make_plan(ids, 4, rows)) for rows in (64, 72, 256)] == [True, False, False]
    assert not mosaic_backward.suits(None)
