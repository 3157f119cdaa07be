"""Inside a Triton kernel: rows of a stored matrix times one vector, whatever the matrix is stored as.

A matrix is one of a stack `[S, N, K]`, the contraction last. How a row is read depends on the type of the stack: an
array, a `QuantizedArray` or an `MXFP4Array`, which reach a kernel as the same types with references in place of arrays.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from ..mxfp4 import GROUP, MXFP4Array
from ..quantized import QuantizedArray

_F32, _I32, _U32 = jnp.float32, jnp.int32, jnp.uint32
#: Triton's offsets are signed and have 32 bits for arrays of up to 4 GiB: bytes beyond 2 GiB are out of its reach.
_UNREACHABLE = range(2**31 + 1, 2**32 + 1)
_PER_WORD = 8  # inputs in a word of an MXFP4Array

#: `load(columns, there)` gives parts of x in float32, `[1, columns]`, 0 where `there` is false (None: all is there).
Load = Callable[[jax.Array, Any], jax.Array]


def refuse(kernel: Any) -> str | None:
    """Why the kernels here cannot read a stack; None if they can."""
    if isinstance(kernel, MXFP4Array):
        return None if kernel.shape[-1] % GROUP == 0 else f"rows of {kernel.shape[-1]}, no multiple of {GROUP}"
    if not isinstance(kernel, QuantizedArray):
        return None if kernel.dtype in (jnp.bfloat16, jnp.float16) else f"kernels of {kernel.dtype}"
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
    [2048, 1024, 1024, 2048, 2048]
    """
    step = min(most, pl.next_power_of_2(width))
    while step > 256 and math.ceil(width / step) * step > 1.4 * width:
        step //= 2
    return step


def scales_of(kernel: Any) -> tuple[Any, int]:
    """Scales of a stack in int8 and the inputs that share one; None and 0 without."""
    if not isinstance(kernel, QuantizedArray):
        return None, 0
    return kernel.scales, kernel.values.shape[-1] if kernel.scales.shape[-1] == 1 else kernel.group_size


def row_products(kernel: Any, matrix: Any, rows: jax.Array, load: Load, most: int) -> jax.Array:
    """`sum over k of w[matrix, rows, k] * x[k]` in float32, `[rows]`. `most`: columns that are read at once."""
    terms = _array_terms
    if isinstance(kernel, MXFP4Array):
        terms = _mxfp4_terms
    elif isinstance(kernel, QuantizedArray):
        terms = _int8_terms
    return jnp.sum(terms(kernel, functools.partial(_load, matrix, rows), load, most), axis=1)


def pieces(width: int, step: int):
    """Columns `step` at a time, and which of them there are (None: all)."""
    for first in range(0, width, step):
        column = first + lax.iota(_I32, step)
        yield column, None if first + step <= width else column < width


def _array_terms(kernel, read, load, most):
    total = 0.0
    for column, there in pieces(kernel.shape[-1], step_of(kernel.shape[-1], most)):
        total += read(kernel, column, there).astype(_F32) * load(column, there)
    return total


def _int8_terms(kernel, read, load, most):
    scales, group = scales_of(kernel)
    width, total = kernel.values.shape[-1], 0.0
    step = step_of(width, most)
    for first, (column, there) in zip(range(0, width, step), pieces(width, step), strict=True):
        products = read(kernel.values, column, there).astype(_F32) * load(column, there)
        if group < width:
            size = min(group, step)
            block = first // group + lax.iota(_I32, step // size)
            inside = None if there is None else block * group < width
            products = jnp.sum(products.reshape(products.shape[0], step // size, size), axis=2)
            products *= read(scales, block, inside)
        total += products
    return total if group < width else total * read(scales, jnp.zeros((1,), _I32), None)


def _mxfp4_terms(kernel, read, load, most):
    words, total = kernel.blocks.shape[-1], 0.0
    for word, there in pieces(words, step_of(words, max(128, most // _PER_WORD))):
        codes, sums = read(kernel.blocks, word, there), 0.0
        for i in range(_PER_WORD // 2):
            low, high = _e2m1_pairs(codes >> (4 * i))
            sums += low * load(word * _PER_WORD + i, there)
            sums += high * load(word * _PER_WORD + (i + _PER_WORD // 2), there)
        total += sums * _e8m0(read(kernel.scales, word // (GROUP // _PER_WORD), there))
    return total


def _e2m1_pairs(codes):
    """Float32 of the lowest four bits of both halves of words: sign, exponent and mantissa in float16's places.

    Float16's exponent is 14 too low for them, which `_e8m0` makes up for.
    """
    bits = (codes & 0x00070007) << 9 | (codes & 0x00080008) << 12
    half = lambda word: lax.bitcast_convert_type(word.astype(jnp.uint16), jnp.float16).astype(_F32)
    return half(bits), half(bits >> 16)


def _e8m0(scales):
    """`2**(scale - 127)` times 2^14: the scale in the exponent's place, for 0 the subnormal number, NaN for 255."""
    scales = scales.astype(_U32)
    power = lax.bitcast_convert_type(jnp.where(scales == 0, jnp.uint32(1 << 22), scales << 23), _F32)
    return jnp.where(scales == 255, jnp.float32(jnp.nan), power) * 2.0**14


def _load(matrix, rows, ref, columns, there):
    """`[rows, columns]` of one matrix of a stack, 0 where `there` is false."""
    shape = rows.shape[0], columns.shape[0]
    at = ref.at[jnp.full(shape, matrix, _I32), rows[:, None], columns[None, :]]
    if there is None:
        return pltriton.load(at)
    return pltriton.load(at, mask=jnp.broadcast_to(there[None, :], shape), other=0)
