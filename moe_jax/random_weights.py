"""Random weights, drawn on the device in blocks: nothing but the weights themselves ever takes much memory."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.quantized import QuantizedArray, quantize

from .weights import Parameter

#: Elements drawn at a time; with the random bits behind them they take about 24 bytes each.
_BLOCK = 1 << 22


def draw(key: Array, name: str, parameter: Parameter, dtype: Any) -> Array:
    """Random weights: kernels normal with standard deviation `1/sqrt(fan-in)`, norms 1, biases and sinks 0."""
    leaf = name.rsplit(".", 1)[-1]
    if "bias" in leaf or leaf == "sinks":
        return jnp.zeros(parameter.shape, dtype)
    if "norm" in name:
        return jnp.ones(parameter.shape, dtype)
    return _filled(key, parameter.shape, max(1, parameter.inputs), jnp.dtype(dtype))


def draw_int8(key: Array, parameter: Parameter, dtype: Any, group_size: int | None = None) -> QuantizedArray:
    """The kernel that `draw` gives, in int8 as `moe_jax.quantize` rounds it; the wide kernel is never stored."""
    return _filled(key, parameter.shape, max(1, parameter.inputs), jnp.dtype(dtype), True, group_size)


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4, 5))
def _filled(key, shape, inputs, dtype, int8=False, group_size=None):
    """A kernel of normal numbers `[..., *inputs]`, row by row of its products, in a buffer that the loop carries.

    It leaves in its final shape: outside of the program a reshape would be a copy.
    """
    lead, tail = shape[:-inputs], shape[-inputs:]
    rows, width = math.prod(lead), math.prod(tail)
    size = max(1, min(rows, _BLOCK // width))

    def block(key):
        wide = (jax.random.normal(key, (size, width), jnp.float32) * width**-0.5).astype(dtype)
        return quantize(wide, group_size) if int8 else wide

    def put(turn, stacks):
        first = jnp.minimum(turn * size, rows - size)  # the last block overlaps the one before it
        made = block(jax.random.fold_in(key, turn))
        update = lambda stack, part: jax.lax.dynamic_update_slice(stack, part, (first, 0))
        return jax.tree.map(update, stacks, made)

    if size == rows:
        made = block(key)
    else:
        like = jax.eval_shape(block, key)
        empty = jax.tree.map(lambda a: jnp.zeros((rows, a.shape[1]), a.dtype), like)
        made = jax.lax.fori_loop(0, -(-rows // size), put, empty)
    if not int8:
        return made.reshape(shape)
    values, scales = (a.reshape(*lead, a.shape[-1]) for a in (made.values, made.scales))
    return QuantizedArray(values, scales, made.dtype, tail if inputs > 1 else None, group_size)
