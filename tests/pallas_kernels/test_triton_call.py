"""What every Triton kernel has in common."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cuda import lowered, mesh_of
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from pallas_kernels import compat
from pallas_kernels.triton_call import call_triton

pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")


def moe_jax_double(operands, out):
    at = pl.program_id(0) * 4 + lax.iota(jnp.int32, 4)
    pltriton.store(out.at[at], 2 * pltriton.load(operands["x"].at[at]))


def double(x, warps=1, interpret=False):
    outputs = [(x.shape, x.dtype)]
    operands = ({"x": x, "none": None},)
    return call_triton(moe_jax_double, "moe_jax_double", x.size // 4, outputs, warps, interpret, operands)[0]


def test_a_kernel_gets_the_pytrees_of_its_operands():
    np.testing.assert_array_equal(double(jnp.arange(8.0), interpret=True), 2 * np.arange(8))


@pytest.mark.parametrize("warps", [3, 6])
def test_warps_that_would_end_the_process_are_refused(warps):
    with pytest.raises(ValueError, match=f"moe_jax_double: {warps} warps, no power of two"):
        double(jnp.ones(8), warps)


def test_the_next_kernel_starts_early_where_the_device_can():
    x = jax.ShapeDtypeStruct((8,), np.float32)
    assert "launch_dependents" in lowered(double, x)
    for kind, early in KINDS.items():
        with mesh_of(kind):
            assert compat.launches_early() == early


KINDS = {
    "NVIDIA A100-SXM4-80GB": False,
    "NVIDIA H100 80GB HBM3": True,
    "NVIDIA H200": True,
    "NVIDIA GH200 480GB": True,
    "NVIDIA B200": True,
    "NVIDIA L40S": False,
}
