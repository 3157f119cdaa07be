"""Derivatives of `linear`, behind either norm."""

import jax
import numpy as np
import pytest
from test_linear import make, oracle

from pallas_kernels.linear import linear

pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")


def weighed(outputs):
    return sum((y * np.cos(np.arange(y.size, dtype=np.float32)).reshape(y.shape)).sum() for y in outputs)


def gradients(call, implementation):
    """Of a weighed sum of all outputs, with respect to all arrays, which come first."""
    options = {key: call[key] for key in ("layer", "dtype", "normed")}
    arrays = {key: call[key] for key in call if key not in options}
    run = lambda arrays: weighed(linear(**arrays, **options, implementation=implementation))
    return arrays, jax.grad(run)(arrays)


@pytest.mark.parametrize("norm", [True, "layer"])
def test_they_are_differences(norm):
    """Along one direction, in float64."""
    call = make(3, 64, [24], dict(norm=norm, biases=(1,), residual=True, normed=True, dtype=np.float32))
    arrays, found = gradients(call, "xla")
    rng, step = np.random.default_rng(8), 1e-5
    way = jax.tree.map(lambda a: rng.standard_normal(a.shape), arrays)
    moved = lambda by: jax.tree.map(lambda a, b: np.asarray(a, np.float64) + by * b, arrays, way)
    ends = [weighed(oracle(**{**call, **moved(by)})) for by in (step, -step)]
    along = sum(np.vdot(a, b) for a, b in zip(*map(jax.tree.leaves, (found, way)), strict=True))
    assert along == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-4)


@pytest.mark.parametrize("norm", [True, "layer"])
@pytest.mark.parametrize("implementation, rows", [("triton_row_interpreted", 1), ("triton_rows_interpreted", 3)])
def test_a_kernel_has_those_of_xla(implementation, rows, norm):
    call = make(rows, 64, [24], dict(norm=norm, biases=(1,), residual=True, normed=True))
    got, want = (gradients(call, name)[1] for name in (implementation, "xla"))
    jax.tree.map(np.testing.assert_array_equal, got, want)
