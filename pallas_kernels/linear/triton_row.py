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

from ..quantized import is_quantized
from ..triton_call import call_triton
from . import stored
from .norms import LayerNorm

#: Most rows of a kernel per program, inputs of a piece of them, most warps: the best on an H100 (docs/benchmarks.md).
ROWS, STEP, WARPS = 4, 2048, 4
_PROGRAMS = 256  # at least, where a kernel has so many rows
#: Without a norm and with fewer rows than `_ENOUGH`, a program has one row if that is up to `_SHORT` bytes, else two:
#: the next kernel starts when all of this one's programs have.
_ENOUGH, _SHORT = 16384, 4096


def refuse(x, kernels, layer, norm, biases, residual, dtype, normed) -> str | None:
    """Why these kernels cannot serve the call; None if they can."""
    del layer, norm, biases, residual, dtype, normed
    if x.shape[0] != 1:
        return f"{x.shape[0]} rows of x, only one"
    if x.dtype not in (jnp.bfloat16, jnp.float16):
        return f"x of {x.dtype}, only bfloat16 and float16"
    return stored.refuse_beside(x, kernels)


def linear(x, kernels, layer, norm, biases, residual, dtype, normed, *, interpret=False):
    """See `api.linear`."""
    if layer is None:
        kernels, biases = jax.tree.map(lambda w: w[None], (kernels, biases))
    if norm is not None:
        one = norm if norm.layer is not None else jax.tree.map(lambda part: part[None], norm)
        norm = dataclasses.replace(one, layer=_index(norm.layer))
    sizes = [kernel.shape[1] for kernel in kernels]
    outputs = [((1, size), dtype or x.dtype) for size in sizes] + [(x.shape, x.dtype)] * normed
    quantized = any(map(is_quantized, kernels))
    rows = _rows(sizes, x.shape[1] * (1 if quantized else x.dtype.itemsize), norm is not None)
    programs = [pl.cdiv(size, per_program) for size, per_program in zip(sizes, rows, strict=True)]
    kernel = functools.partial(moe_jax_linear_row, rows=rows, programs=programs, normed=normed)
    operands = _index(layer), x, kernels, norm, biases, residual
    warps = _warps(x.shape[1], quantized)
    return call_triton(kernel, "moe_jax_linear_row", sum(programs) + normed, outputs, warps, interpret, operands)


def _rows(sizes, nbytes, with_norm):
    """Rows of each kernel per program; `nbytes` are a row's."""
    most = ROWS if with_norm or sum(sizes) >= _ENOUGH else 1 if nbytes <= _SHORT else 2
    return [max(1, min(most, pl.next_power_of_2(size // _PROGRAMS))) for size in sizes]


def _warps(width, quantized):
    return WARPS // 2 if width <= STEP and not quantized else WARPS


def _index(layer):
    return jnp.asarray(0 if layer is None else layer, jnp.int32).reshape(1)


interpreted = functools.partial(linear, interpret=True)


def moe_jax_linear_row(layer_ref, x_ref, kernels, norm, biases, residual, *outs, rows, programs, normed):
    """One program: `rows[i]` outputs of kernel i; the last one, if asked for, the normed row."""
    layer, program = layer_ref[0], pl.program_id(0)
    first = 0
    for i, kernel in enumerate(kernels):

        @pl.when((program >= first) & (program < first + programs[i]))
        def _(first=first, kernel=kernel, bias=biases[i] if biases else None, out=outs[i], rows=rows[i]):
            size, x = kernel.shape[1], _Row(x_ref, norm)
            target = (program - first) * rows + lax.iota(jnp.int32, rows)
            row = jnp.minimum(target, size - 1)
            # what is added at the end is on its way first
            read = lambda ref, at: None if ref is None else pltriton.load(ref.at[at, row]).astype(jnp.float32)
            added = read(bias, jnp.full(row.shape, layer, jnp.int32)), read(residual, jnp.zeros_like(row))
            y = stored.row_products([kernel], layer, row, x.load, STEP)[0] * x.factor()
            if bias is not None:
                y += added[0]
            if residual is not None:
                y = y.astype(out.dtype).astype(jnp.float32) + added[1]  # rounded first, as a product by itself would be
            pltriton.store(out.at[jnp.zeros_like(row), target], y.astype(out.dtype), mask=target < size)

        first += programs[i]
    if normed:

        @pl.when(program == first)
        def _():
            x = _Row(x_ref, norm)
            for _, column, there in _pieces(x_ref.shape[1]):
                y = (x.load(column, there)[0] * x.factor()).astype(x_ref.dtype)
                pltriton.store(outs[-1].at[jnp.zeros_like(column), column], y, mask=there)


class _Row:
    """The input `[1, K]` as products want it: normed columns, and the factor that is still to apply.

    Sums over the row are formed when columns are first asked for: products have read weights by then, which are on
    their way meanwhile. RMSNorm's columns do not wait for the sum, as its factor applies to products too; LayerNorm's
    do, and its factor is 1.
    """

    def __init__(self, ref, norm):
        self._ref, self._norm, self._sums = ref, norm, None
        self._layer = None if norm is None else norm.layer[0]

    def load(self, column, there):
        """Columns in float32, `[1, columns]`."""
        x = stored.load_row(self._ref, 0, column, there)
        if self._norm is None:
            return x[None, :]
        part = lambda ref: stored.load_row(ref, self._layer, column, there)
        if isinstance(self._norm, LayerNorm):
            scale, bias, (mean, share) = part(self._norm.scale), part(self._norm.bias), self._moments()
            return ((x - mean) * share * scale + bias)[None, :]
        x *= part(self._norm.scale)
        self._moments()
        return x[None, :]

    def factor(self):
        """What is to be multiplied to sums of products."""
        if self._norm is None or isinstance(self._norm, LayerNorm):
            return jnp.float32(1)
        return self._moments()[1]

    def _moments(self):
        """The mean, None for RMSNorm, and one over the root of the mean square around it."""
        if self._sums is None:
            width, mean = self._ref.shape[1], None
            pieces = [(stored.load_row(self._ref, 0, piece.columns, piece.there), piece) for piece in _pieces(width)]
            parts = [x for x, _ in pieces]
            if isinstance(self._norm, LayerNorm):
                mean = sum(jnp.sum(x) for x in parts) / width
                around = lambda x, there: x - mean if there is None else jnp.where(there, x - mean, 0)
                parts = [around(x, piece.there) for x, piece in pieces]
            squares = sum(jnp.sum(jnp.square(x)) for x in parts)
            self._sums = mean, lax.rsqrt(squares / width + self._norm.epsilon)
        return self._sums


def _pieces(width):
    return stored.pieces(width, min(STEP, pl.next_power_of_2(width)))
