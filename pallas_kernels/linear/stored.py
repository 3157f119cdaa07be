"""Inside a Triton kernel: rows of a stored matrix times one vector, whatever the matrix is stored as.

A matrix is one of a stack `[S, N, K]`, the contraction last. How a row is read depends on the type of the stack: an
array, or a `QuantizedArray`, which reaches a kernel as the same type with references in place of arrays.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from ..quantized import QuantizedArray, is_quantized

_F32 = jnp.float32
#: Triton's offsets are signed and have 32 bits for arrays of up to 4 GiB: bytes beyond 2 GiB are out of its reach.
_UNREACHABLE = range(2**31 + 1, 2**32 + 1)


def refuse(kernel: Any) -> str | None:
    """Why the kernels here cannot read a stack; None if they can."""
    if not is_quantized(kernel):
        return None if kernel.dtype in (jnp.bfloat16, jnp.float16) else f"kernels of {kernel.dtype}"
    if not isinstance(kernel, QuantizedArray):
        return f"kernels stored as {type(kernel).__name__}"
    width, group = kernel.values.shape[-1], kernel.group_size
    if kernel.runs:
        return "scales over runs of a flattened matrix"
    if group is not None and group < width and (group & (group - 1) or width % group):
        return f"groups of {group} of {width} inputs, no power of two or no divisor"
    if kernel.values.size in _UNREACHABLE:
        return f"{kernel.values.size} bytes of int8 in one stack, between 2 and 4 GiB"
    return None


def step_of(width: int, most: int) -> int:
    """Columns that are read at once, a power of two up to `most`, so that not many lie beyond `width`.

    >>> [step_of(width, 2048) for width in (2048, 2880, 768, 7168, 4096)]
    [2048, 1024, 1024, 1024, 2048]
    """
    step = min(most, pl.next_power_of_2(width))
    while step > 256 and math.ceil(width / step) * step > 1.4 * width:
        step //= 2
    return step


def scales_of(kernel: Any) -> tuple[Any, int]:
    """Scales of a stack and the inputs that share one; None and 0 without."""
    if not is_quantized(kernel):
        return None, 0
    return kernel.scales, kernel.values.shape[-1] if kernel.scales.shape[-1] == 1 else kernel.group_size


def row_products(
    kernel: Any, matrix: Any, rows: jax.Array, load: Callable[[jax.Array, Any], jax.Array], most: int
) -> jax.Array:
    """`sum over k of w[matrix, rows, k] * x[k]` in float32, `[rows]`; `load(columns, there)` gives parts of x, 0 beyond
    its end. `most`: columns that are read at once."""
    values, (scales, group) = kernel.values if is_quantized(kernel) else kernel, scales_of(kernel)
    width = values.shape[-1]
    step, total = step_of(width, most), jnp.zeros(rows.shape, _F32)
    for first in range(0, width, step):
        column = first + lax.iota(jnp.int32, step)
        there = None if first + step <= width else column < width
        products = _load(values, matrix, rows, column, there).astype(_F32) * load(column, there)[None, :]
        if group in (0, width):
            total += jnp.sum(products, axis=1)
            continue
        size = min(group, step)
        block = first // group + lax.iota(jnp.int32, step // size)
        sums = jnp.sum(products.reshape(rows.shape[0], step // size, size), axis=2)
        inside = None if there is None else block * group < width
        total += jnp.sum(sums * _load(scales, matrix, rows, block, inside), axis=1)
    if group == width:
        total *= pltriton.load(scales.at[jnp.full(rows.shape, matrix, jnp.int32), rows, jnp.zeros_like(rows)])
    return total


def _load(ref, matrix, rows, columns, there):
    """`[rows, columns]` of one matrix, 0 where `there` is false."""
    shape = rows.shape[0], columns.shape[0]
    at = ref.at[jnp.full(shape, matrix, jnp.int32), rows[:, None], columns[None, :]]
    if there is None:
        return pltriton.load(at)
    return pltriton.load(at, mask=jnp.broadcast_to(there[None, :], shape), other=0)
