"""The kernel of weight gradients in JAX's interpreter, over plans of all kinds."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels import compat, make_plan
from pallas_kernels.expert_mlp.mosaic_weight_gradient import Contraction, GradientTiling, spans_of, weight_gradient

pytestmark = pytest.mark.skipif(not compat.INTERPRETS_GPU, reason="JAX's interpreter runs these kernels from 0.11 on")

# A tile for all, tiles that overlap at the ends, one consumer, steps of half a tile.
CASES = {
    "one tile": (GradientTiling(128, 64), (128, 64), 64),
    "overlapping tiles": (GradientTiling(128, 128, stages=2, group=2), (192, 320), 64),
    "one consumer, half tiles": (GradientTiling(64, 64, stages=3, consumers=1, group=1), (64, 128), 128),
}


@functools.partial(jax.jit, static_argnums=(0, 4, 5))
def run(tiling, a, b, ids, num, tile_rows):
    plan = make_plan(ids, num, tile_rows)
    rows = lambda tokens: tokens.at[plan.row_choice // ids.shape[1]].get(mode="fill", fill_value=0)
    call = Contraction("moe_jax_expert_d_kernel", tiling, None, ids.shape[1], 3, compat.interpret_gpu())
    spans = spans_of(plan, ids.size, num, tiling.depth)
    return weight_gradient(call, rows(a), rows(b), spans, plan.row_choice)


@pytest.mark.parametrize("name", CASES)
def test_values(name):
    """Experts with many rows, with one and without; NaN in one of them."""
    tiling, (m, n), tile_rows = CASES[name]
    rng = np.random.default_rng(3)
    tokens, num = 2 * tile_rows + 10, 4
    a, b = (rng.standard_normal((tokens, width)).astype(ml_dtypes.bfloat16) for width in (m, n))
    ids = np.where(rng.random((tokens, 1)) < 0.2, 2, 0).astype(np.int32)
    ids[3], ids[4] = 3, -1
    a[[3, 4], 5] = np.nan
    got = np.asarray(run(tiling, a, b, ids, num, tile_rows)).astype(np.float64)
    assert got.shape == (num, m, n) and (got[1] == 0).all()
    for e in (0, 2):
        own = ids[:, 0] == e
        want = a[own].astype(np.float64).T @ b[own].astype(np.float64)
        assert np.abs(got[e] - want).max() <= 0.005 * np.abs(want).max()
    assert np.isnan(got[3, 5]).all() and not np.isnan(np.delete(got[3], 5, axis=0)).any()


def test_no_choice_inside_gives_zeros():
    tiling, (m, n), tile_rows = CASES["one tile"]
    a, b = (np.full((tile_rows + 8, width), np.nan, ml_dtypes.bfloat16) for width in (m, n))
    assert (np.asarray(run(tiling, a, b, np.full((len(a), 1), 9, np.int32), 4, tile_rows)) == 0).all()


def test_too_large_a_tiling_is_refused():
    plan = make_plan(jnp.zeros((200, 1), jnp.int32), 2, 64)
    rows = jnp.zeros((plan.max_tiles * 64, 256), jnp.bfloat16)
    call = Contraction("moe_jax_expert_d_kernel", GradientTiling(256, 256), None, 1, 3)
    with pytest.raises(ValueError, match="tiling: .* leaves no shared memory for stores"):
        weight_gradient(call, rows, rows, spans_of(plan, 200, 2, 64), plan.row_choice)
