"""The linear map, over kernels stored output first."""

import jax
from jaxtyping import Array, Float

from pallas_kernels.linear import linear as products
from pallas_kernels.quantized import Quantized, dense


def linear(x: Float[Array, "*G D"], kernel: Array | Quantized, bias: Array | None = None) -> jax.Array:
    """`x [..., D]` times `kernel [*out, D]` plus `bias [*out]`: `[..., *out]` in x's dtype."""
    *out, width = kernel.shape
    if isinstance(kernel, Quantized) and kernel.runs:  # scales that cross rows
        kernel = dense(kernel, x.dtype)
    matrix = jax.tree.map(lambda w: w.reshape(-1, w.shape[-1]), kernel)
    (y,) = products(x.reshape(-1, width), [matrix])
    y = y.reshape(*x.shape[:-1], *out)
    return y if bias is None else y + bias
