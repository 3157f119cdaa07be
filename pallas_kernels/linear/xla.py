"""The linear map as XLA's products; a layer's kernels are taken out of their stacks, which XLA fuses where it can."""

import jax
import jax.numpy as jnp

from ..quantized import dense
from .norms import LayerNorm


def linear(x, kernels, layer, norm, biases, residual, dtype, return_normed):
    """See `api.linear`."""
    if norm is not None:
        x = normed(x, norm)
    products = [product(x, _take(kernel, layer), dtype) for kernel in kernels]
    for i, bias in enumerate(biases or ()):
        if bias is not None:
            products[i] += _take(bias, layer).astype(products[i].dtype)
    if residual is not None:
        products = [products[0] + residual]
    return products + [x] * return_normed


def _take(stack, layer):
    if layer is None:
        return stack
    return jax.tree.map(lambda w: jax.lax.dynamic_index_in_dim(w, layer, keepdims=False), stack)


def product(x, kernel, dtype=None):
    """`x [G, K] @ kernel.T`, `[G, N]`.

    Of all spellings those that XLA runs fastest on a CPU: one row as `row @ kernel.T`, which is fused with the slice
    that took a layer's kernel out of its stack, so that decoding reads each weight once; more rows with the kernel as
    the left operand (docs/decisions.md).
    """
    kernel, dtype = dense(kernel, x.dtype), dtype or x.dtype
    if len(x) == 1:
        return jnp.matmul(x, kernel.T, preferred_element_type=dtype)
    return jnp.matmul(kernel, x.T, preferred_element_type=dtype).T


def normed(x, norm):
    """The norm over the last axis of `x`, computed in float32, in x's dtype."""
    wide, own = x.astype(jnp.float32), lambda part: _take(part, norm.layer).astype(jnp.float32)
    centred = isinstance(norm, LayerNorm)
    if centred:
        wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
    wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + norm.epsilon) * own(norm.scale)
    return (wide + own(norm.bias) if centred else wide).astype(x.dtype)
