"""The linear map, over kernels stored output first."""

import math

import jax
from jaxtyping import Array, Float


def linear(x: Float[Array, "*G D"], kernel: Array, bias: Array | None = None) -> jax.Array:
    """`x [..., D]` times `kernel [*out, D]` plus `bias [*out]`: `[..., *out]` in x's dtype.

    Written as `rows @ kernel.T`: of all spellings the one that XLA on a CPU fuses with the slice that took a layer's
    kernel out of its stack, so that decoding one row reads each weight once (docs/decisions.md).
    """
    *out, width = kernel.shape
    y = x.reshape(-1, width) @ kernel.reshape(math.prod(out), width).T
    y = y.reshape(*x.shape[:-1], *out)
    return y if bias is None else y + bias
