"""One row times kernels of a stack on a GPU: norm, products, biases and residual in one launch.

Every program reads a few rows of one kernel, all of their inputs at once, and the whole of x, which is in the cache.
Reading the weights is all the time there is: many small programs keep more bytes on their way than few large ones.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from ..mxfp4 import MXFP4Array
from ..quantized import is_quantized
from ..triton_call import call_triton
from . import stored

#: Most rows of a kernel per program, inputs read at once, most warps: the best on an H100 (docs/benchmarks.md).
ROWS, STEP, WARPS = 4, 2048, 4
_PROGRAMS = 256  # at least, where a kernel has so many rows
_ENOUGH = 16384  # rows from which on programs of a single one are too many; fewer rows are better without a norm


def refuse(x, kernels, layer, norm, biases, residual, dtype, normed) -> str | None:
    """Why these kernels cannot serve the call; None if they can."""
    del layer, norm, biases, residual, dtype, normed
    if x.shape[0] != 1:
        return f"{x.shape[0]} rows of x, only one"
    if x.dtype not in (jnp.bfloat16, jnp.float16):
        return f"x of {x.dtype}, only bfloat16 and float16"
    if any(isinstance(kernel, MXFP4Array) for kernel in kernels):
        return "kernels in MXFP4"
    return next(filter(None, map(stored.refuse, kernels)), None)


def linear(x, kernels, layer, norm, biases, residual, dtype, normed, *, interpret=False):
    """See `api.linear`."""
    if layer is None:
        kernels, biases = jax.tree.map(lambda w: w[None], (kernels, biases))
    if norm is not None:
        scale = norm.scale if norm.layer is not None else norm.scale[None]
        norm = dataclasses.replace(norm, scale=scale, layer=_index(norm.layer))
    sizes = [kernel.shape[1] for kernel in kernels]
    outputs = [((1, size), dtype or x.dtype) for size in sizes] + [(x.shape, x.dtype)] * normed
    rows = _rows(sizes, norm is not None)
    programs = [pl.cdiv(size, per_program) for size, per_program in zip(sizes, rows, strict=True)]
    kernel = functools.partial(moe_jax_linear_row, rows=rows, programs=programs, normed=normed)
    operands = _index(layer), x, kernels, norm, biases, residual
    warps = _warps(x.shape[1], any(map(is_quantized, kernels)))
    return call_triton(kernel, "moe_jax_linear_row", sum(programs) + normed, outputs, warps, interpret, operands)


def _rows(sizes, with_norm):
    """Rows of each kernel per program."""
    most = ROWS if with_norm or sum(sizes) >= _ENOUGH else 1
    return [max(1, min(most, pl.next_power_of_2(size // _PROGRAMS))) for size in sizes]


def _warps(width, quantized):
    return WARPS // 2 if width <= STEP and not quantized else WARPS


def _index(layer):
    return jnp.asarray(0 if layer is None else layer, jnp.int32).reshape(1)


interpreted = functools.partial(linear, interpret=True)


def moe_jax_linear_row(layer_ref, x_ref, kernels, norm, biases, residual, *outs, rows, programs, normed):
    """One program: `rows[i]` outputs of kernel i; the last one, if asked for, the normed row."""
    layer, program = layer_ref[0], pl.program_id(0)
    load, factor = _normed(x_ref, norm)
    first = 0
    for i, kernel in enumerate(kernels):

        @pl.when((program >= first) & (program < first + programs[i]))
        def _(first=first, kernel=kernel, bias=biases[i] if biases else None, out=outs[i], rows=rows[i]):
            size = kernel.shape[1]
            target = (program - first) * rows + lax.iota(jnp.int32, rows)
            row = jnp.minimum(target, size - 1)
            y = stored.row_products([kernel], layer, row, load, STEP)[0] * factor()
            if bias is not None:
                y += pltriton.load(bias.at[jnp.full(row.shape, layer, jnp.int32), row]).astype(jnp.float32)
            if residual is not None:
                # rounded first, as a product by itself would be
                y = y.astype(out.dtype).astype(jnp.float32)
                y += pltriton.load(residual.at[jnp.zeros_like(row), row]).astype(jnp.float32)
            pltriton.store(out.at[jnp.zeros_like(row), target], y.astype(out.dtype), mask=target < size)

        first += programs[i]
    if normed:

        @pl.when(program == first)
        def _():
            share = factor()
            for _, column, there in _pieces(x_ref.shape[1]):
                y = (load(column, there)[0] * share).astype(x_ref.dtype)
                pltriton.store(outs[-1].at[jnp.zeros_like(column), column], y, mask=there)


def _normed(x_ref, norm):
    """Two functions: columns of `x [1, K]` times the norm's scale, in float32, and the factor that is still to apply.

    The factor is asked for late, so that the weights are on their way before x is added up.
    """

    def load(column, there, scaled=norm is not None):
        mask = {} if there is None else dict(mask=there, other=0.0)
        x = pltriton.load(x_ref.at[jnp.zeros_like(column), column], **mask).astype(jnp.float32)
        if scaled:
            at = norm.scale.at[jnp.full(column.shape, norm.layer[0], jnp.int32), column]
            x *= pltriton.load(at, **mask).astype(jnp.float32)
        return x[None, :]

    def factor():
        if norm is None:
            return jnp.float32(1)
        squares = [jnp.sum(jnp.square(load(column, there, False))) for _, column, there in _pieces(x_ref.shape[1])]
        return lax.rsqrt(sum(squares) / x_ref.shape[1] + norm.epsilon)

    return load, factor


def _pieces(width):
    return stored.pieces(width, min(STEP, pl.next_power_of_2(width)))
