"""Normalisations, computed in float32 and returned in the input's dtype."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from .axes import add_up
from .block_config import NormConfig


def rms_norm(
    x: jax.Array,
    scale: jax.Array | None,
    epsilon: float,
    axis: int | tuple[int, ...] = -1,
    over: tuple[tuple[str, ...], int] | None = None,
) -> jax.Array:
    """`x / sqrt(mean(x^2) + epsilon) * scale` over `axis` (arXiv:1910.07467); no scale, no product.

    `over`: mesh axes along which the normed axes are cut, and how many components there are in all.
    """
    wide = x.astype(jnp.float32)
    if over is None:
        mean = jnp.mean(jnp.square(wide), axis=axis, keepdims=True)
    else:
        mean = add_up(jnp.sum(jnp.square(wide), axis=axis, keepdims=True), over[0]) / over[1]
    wide = wide * jax.lax.rsqrt(mean + epsilon)
    if scale is not None:
        wide = wide * scale.astype(jnp.float32)
    return wide.astype(x.dtype)


def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float) -> jax.Array:
    """LayerNorm over the last axis (arXiv:1607.06450)."""
    wide = x.astype(jnp.float32)
    wide = wide - wide.mean(-1, keepdims=True)
    wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + epsilon)
    return (wide * scale.astype(jnp.float32) + bias.astype(jnp.float32)).astype(x.dtype)


def norm(config: NormConfig, x: jax.Array, weights: Mapping[str, jax.Array]) -> jax.Array:
    """The block's norm over the last axis of `x [..., D]`."""
    if config.kind == "layer":
        return layer_norm(x, weights["scale"], weights["bias"], config.epsilon)
    return rms_norm(x, weights["scale"], config.epsilon)
