"""Ways to cut a product of a few rows: the numbers are the same whichever is taken."""

import functools

import jax
import numpy as np
import pytest
from test_linear import CASES, assert_standard, make

from pallas_kernels.linear import triton_rows
from pallas_kernels.linear.triton_rows import Tile

pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")
TILES = {
    "kernels on the right": Tile(rows=16, depth=256, stages=2),
    "kernels on the right, parts of the inputs": Tile(rows=16, depth=64, stages=4, splits=3),
    "kernels on the left": Tile(rows=64, depth=32, stages=6),
    "kernels on the left, parts of the inputs": Tile(rows=64, depth=64, stages=4, splits=2),
    "more parts than inputs": Tile(rows=16, depth=128, stages=4, splits=8),
}
QUICK = "q, k and v", "two rows", "int8 in groups, 33 rows"
#: More rows than a block has, several kernels with and without bias, scales of groups and of rows, a residual.
SUITE = [*QUICK, "33 rows", "int8, five rows", "layer norm, five rows", "an output"]


@functools.partial(jax.jit, static_argnames=("dtype", "normed", "tile"))
def run(x, kernels, layer, norm, biases, residual, dtype, normed, tile):
    return triton_rows.interpreted(x, kernels, layer, norm, biases, residual, dtype, normed, tile=tile)


@pytest.mark.parametrize("case", [pytest.param(c, marks=() if c in QUICK else pytest.mark.slow) for c in SUITE])
@pytest.mark.parametrize("tile", TILES)
def test_values(tile, case):
    call = make(*CASES[case])
    assert_standard(run(**call, tile=TILES[tile]), call)


@pytest.mark.parametrize("tile", ["kernels on the right, parts of the inputs", "kernels on the left"])
def test_a_poisoned_row_stays_alone(tile):
    call = make(7, 160, [24], dict(norm=True, residual=True, biases=(1,), stacked=True))
    clean = run(**call, tile=TILES[tile])[0]
    call["x"][2, 7] = call["biases"][0][1, 5] = np.nan
    got = np.asarray(run(**call, tile=TILES[tile])[0])
    at = np.isnan(got.astype(np.float32))
    assert at[2].all() and at[:, 5].all() and at.sum() == 24 + 6
    np.testing.assert_array_equal(got[~at], np.asarray(clean)[~at])
