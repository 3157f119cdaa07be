"""Random weights, drawn on the device in blocks: nothing but the weights themselves ever takes much memory."""

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.mxfp4 import GROUP, MXFP4Array
from pallas_kernels.quantized import check_group_size, is_quantized, quantize

from .weights import Parameter, is_kernel

#: Elements drawn at a time; with the random bits behind them they take about 24 bytes each.
_BLOCK = 1 << 22
#: Mean square of the values of 4 bits.
_SQUARE = 8.5625


def stored_forms(table: Mapping[str, Parameter], quantize: str | None, group_size: int | None) -> dict[str, str]:
    """Which parameters are drawn in a smaller form: all kernels for "int8", those of experts for "mxfp4".

    Raises `ValueError` for another word, a `group_size` without int8, and what MXFP4 cannot hold.
    """
    if quantize not in (None, "int8", "mxfp4"):
        raise ValueError(f"quantize: {quantize!r} is neither None nor 'int8' nor 'mxfp4'")
    check_group_size(group_size)
    if group_size is not None and quantize != "int8":
        raise ValueError(f"group_size: {group_size}, but quantize is {quantize}")
    if quantize != "mxfp4":
        return {name: quantize for name in table if is_kernel(name)} if quantize else {}
    experts = {name: p for name, p in table.items() if is_kernel(name) and p.experts}
    if not experts or any(p.counts is not None for p in experts.values()):
        raise ValueError("quantize: mxfp4 is for experts, of which every layer has equally many")
    if odd := [f"{name} has {p.shape[-1]}" for name, p in experts.items() if p.shape[-1] % GROUP]:
        raise ValueError(f"quantize: mxfp4 takes inputs in multiples of {GROUP}, {', '.join(odd)}")
    return dict.fromkeys(experts, "mxfp4")


def draw(
    key: Array, name: str, parameter: Parameter, dtype: Any, form: str | None = None, group_size: int | None = None
) -> Any:
    """Random weights: kernels normal with standard deviation `1/sqrt(fan-in)`, norms 1, biases and sinks 0.

    `form` "int8": the kernel as `quantize` rounds it, which is never stored wide. "mxfp4": random codes, and powers of
    two that give them this standard deviation.
    """
    leaf = name.rsplit(".", 1)[-1]
    if "bias" in leaf or leaf == "sinks":
        return jnp.zeros(parameter.shape, dtype)
    if "norm" in name:
        return jnp.ones(parameter.shape, dtype)
    return _filled(key, parameter.shape, jnp.dtype(dtype), form, group_size)


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _filled(key, shape, dtype, form=None, group_size=None):
    """A kernel `[..., in]`, row by row, in a buffer that the loop carries.

    It leaves in its final shape: outside of the program a reshape would be a copy.
    """
    *lead, width = shape
    rows = math.prod(lead)
    size = max(1, min(rows, _BLOCK // width))

    def block(key):
        if form == "mxfp4":
            return _codes(key, size, width, dtype)
        wide = (jax.random.normal(key, (size, width), jnp.float32) * width**-0.5).astype(dtype)
        return quantize(wide, group_size) if form == "int8" else wide

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
    if not is_quantized(made):
        return made.reshape(shape)
    return jax.tree.map(lambda a: a.reshape(*lead, a.shape[-1]), made)


def _codes(key, rows, width, dtype):
    """`[rows, width]` of random codes. Scales are one of two powers of two, whose share makes the mean square exact."""
    codes, scales = jax.random.split(key)
    square = 1 / (width * _SQUARE)
    low = math.floor(math.log2(square) / 2)
    high = jax.random.bernoulli(scales, (square / 4.0**low - 1) / 3, (rows, width // GROUP))
    words = jax.random.bits(codes, (rows, width // 8), jnp.uint32)
    return MXFP4Array(words, (high + (low + 127)).astype(jnp.uint8), dtype)
