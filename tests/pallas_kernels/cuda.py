"""Programs made for a GPU that nobody here has; shared by the tests of the GPU's kernels."""

import jax
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, use_abstract_mesh

H100 = "NVIDIA H100 80GB HBM3"


def mesh_of(kind=H100):
    """Makes JAX trace for one device of that kind."""
    device = AbstractDevice(device_kind=kind, num_cores=132, platform="cuda")
    return use_abstract_mesh(AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=device))


def lowered(function, *operands, platform="cuda", kind=H100):
    """Text of the program for `operands`, of which shapes and dtypes will do."""
    with mesh_of(kind):
        return jax.jit(function).trace(*operands).lower(lowering_platforms=(platform,)).as_text()
