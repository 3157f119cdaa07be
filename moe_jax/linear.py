"""The linear map, over kernels stored output first."""

import math

import jax
from jaxtyping import Array, Float

from pallas_kernels.quantized import QuantizedArray, dense


def linear(x: Float[Array, "*G D"], kernel: Array | QuantizedArray, bias: Array | None = None) -> jax.Array:
    """`x [..., D]` times `kernel [*out, D]` plus `bias [*out]`: `[..., *out]` in x's dtype.

    Of all spellings those that XLA runs fastest on a CPU: one row as `row @ kernel.T`, which is fused with the slice
    that took a layer's kernel out of its stack, so that decoding reads each weight once; more rows with the kernel as
    the left operand (docs/decisions.md).
    """
    *out, width = kernel.shape
    rows, matrix = x.reshape(-1, width), dense(kernel, x.dtype).reshape(math.prod(out), width)
    y = rows @ matrix.T if len(rows) == 1 else (matrix @ rows.T).T
    y = y.reshape(*x.shape[:-1], *out)
    return y if bias is None else y + bias
