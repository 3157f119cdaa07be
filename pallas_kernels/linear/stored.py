"""Inside a Triton kernel: rows of a stored matrix times one vector, whatever the matrix is stored as.

A matrix is one of a stack `[S, N, K]`, the contraction last. How a row is read depends on the type of the stack: an
array, a `QuantizedArray` or an `MXFP4Array`, which reach a kernel as the same types with references in place of arrays.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

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
_AHEAD = 4  # pieces of a row that are read before the first is multiplied

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


def refuse_beside(x: Any, kernels: Sequence[Any]) -> str | None:
    """Why the kernels of a product cannot be multiplied with x; None if they can."""
    if any(isinstance(kernel, MXFP4Array) for kernel in kernels):
        return "kernels in MXFP4"
    if any(not isinstance(kernel, QuantizedArray) and kernel.dtype != x.dtype for kernel in kernels):
        return f"kernels of another dtype than x's, {x.dtype}"
    return next(filter(None, map(refuse, kernels)), None)


def alike(a: Any, b: Any) -> bool:
    """Whether two stacks are stored in the same way, as `row_products` wants them."""
    return type(a) is type(b) and a.dtype == b.dtype and scales_of(a)[1] == scales_of(b)[1]


def step_of(width: int, most: int) -> int:
    """Columns of a piece, a power of two up to `most`, so that not many lie beyond `width`.

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


def row_products(kernels: Sequence[Any], matrix: Any, rows: jax.Array, load: Load, most: int, live: Any = None) -> list:
    """`sum over k of w[matrix, rows, k] * x[k]` in float32, `[rows]`, for each of `kernels`, all stored alike.

    `matrix`: one for all or `[rows]`, as x may be; `most`: columns of a piece; `live [rows]`: rows that are read, 0 for
    the others. `_AHEAD` pieces of all kernels are on their way before the first is multiplied.
    """
    form, read = _form_of(kernels[0]), functools.partial(_load, matrix, rows, live)
    every = list(pieces(form.width, step_of(form.width, max(form.least, most // form.packed))))
    scales = [form.row_scales(kernel, read) for kernel in kernels]
    totals = [0.0] * len(kernels)
    for first in range(0, len(every), _AHEAD):
        some = every[first : first + _AHEAD]
        weights = [[form.read(kernel, read, piece) for piece in some] for kernel in kernels]
        for i, piece in enumerate(some):
            x = form.inputs(load, piece)
            totals = [total + form.multiply(own[i], x) for total, own in zip(totals, weights, strict=True)]
    return [jnp.sum(total * scale, axis=1) for total, scale in zip(totals, scales, strict=True)]


def load_row(ref: Any, lead: Any, columns: jax.Array, there: Any = None) -> jax.Array:
    """Columns of `ref[lead]` in float32."""
    mask = {} if there is None else dict(mask=there, other=0.0)
    return pltriton.load(ref.at[jnp.full(columns.shape, lead, _I32), columns], **mask).astype(_F32)


def arranged(kernel: Any, x: jax.Array) -> jax.Array:
    """`x [G, K]` in the order in which `row_products` with `kernel` asks for it: `x[:, k]` is at `place(kernel, k)`."""
    if not isinstance(kernel, MXFP4Array):
        return x
    return x.reshape(x.shape[0], -1, _PER_WORD).swapaxes(1, 2).reshape(x.shape)


def place(kernel: Any, k: Any) -> Any:
    """Where input `k` of `kernel` lies: for words of eight, inputs that are at the same place of one lie together."""
    if not isinstance(kernel, MXFP4Array):
        return k
    return lax.rem(k, _I32(_PER_WORD)) * (kernel.shape[-1] // _PER_WORD) + lax.div(k, _I32(_PER_WORD))


class Piece(NamedTuple):
    """Columns from `first` on, and which of them there are (None: all)."""

    first: int
    columns: jax.Array
    there: Any


def pieces(width: int, step: int):
    """A row of `width`, `step` columns at a time."""
    for first in range(0, width, step):
        columns = first + lax.iota(_I32, step)
        yield Piece(first, columns, None if first + step <= width else columns < width)


@dataclasses.dataclass(frozen=True)
class _Floats:
    """An array `[S, N, K]`: how parts of rows are read and multiplied. `width` elements hold `packed` inputs each."""

    width: int
    packed: int = 1
    least: int = 1

    def row_scales(self, kernel, read):
        return 1.0

    def read(self, kernel, read, piece):
        return read(kernel, piece.columns, piece.there)

    def inputs(self, load, piece):
        return load(piece.columns, piece.there)

    def multiply(self, weights, x):
        return weights.astype(_F32) * x


@dataclasses.dataclass(frozen=True)
class _Int8(_Floats):
    """A `QuantizedArray`, `group` inputs of a row with a scale."""

    group: int = 0

    def row_scales(self, kernel, read):
        return 1.0 if self.group < self.width else read(kernel.scales, jnp.zeros((1,), _I32), None)

    def read(self, kernel, read, piece):
        values, step = read(kernel.values, piece.columns, piece.there), piece.columns.shape[0]
        if self.group == self.width:
            return values, None
        block = piece.first // self.group + lax.iota(_I32, step // min(self.group, step))
        return values, read(kernel.scales, block, None if piece.there is None else block * self.group < self.width)

    def multiply(self, weights, x):
        values, scales = weights
        products = values.astype(_F32) * x
        if scales is None:
            return products
        return jnp.sum(products.reshape(*scales.shape, -1), axis=2) * scales


@dataclasses.dataclass(frozen=True)
class _MXFP4(_Floats):
    """An `MXFP4Array`: words of eight inputs, four words to a scale."""

    packed: int = _PER_WORD
    least: int = 128

    def read(self, kernel, read, piece):
        words, there = piece.columns, piece.there
        return read(kernel.blocks, words, there), read(kernel.scales, words // (GROUP // _PER_WORD), there)

    def inputs(self, load, piece):
        return [load(i * self.width + piece.columns, piece.there) for i in range(_PER_WORD)]

    def multiply(self, weights, x):
        codes, scales = weights
        sums = 0.0
        for i in range(_PER_WORD // 2):
            low, high = _e2m1_pairs(codes, i)
            sums += low * x[i] + high * x[i + _PER_WORD // 2]
        return sums * _e8m0(scales)


def _form_of(kernel):
    if isinstance(kernel, MXFP4Array):
        return _MXFP4(kernel.blocks.shape[-1])
    if isinstance(kernel, QuantizedArray):
        return _Int8(kernel.values.shape[-1], group=scales_of(kernel)[1])
    return _Floats(kernel.shape[-1])


def _e2m1_pairs(codes, i):
    """Float32 of the `i`-th four bits of both halves of words: sign, exponent and mantissa in float16's places.

    Float16's exponent is 14 too low for them, which `_e8m0` makes up for.
    """
    moved = lambda by: codes << by if by >= 0 else codes >> -by
    bits = moved(9 - 4 * i) & _U32(0x0E000E00) | moved(12 - 4 * i) & _U32(0x80008000)
    half = lambda word: lax.bitcast_convert_type(word.astype(jnp.uint16), jnp.float16).astype(_F32)
    return half(bits), half(bits >> 16)


def _e8m0(scales):
    """`2**(scale - 127)` times 2^14: the scale in the exponent's place, for 0 the subnormal number, NaN for 255."""
    scales = scales.astype(_U32)
    power = lax.bitcast_convert_type(jnp.where(scales == 0, jnp.uint32(1 << 22), scales << 23), _F32)
    return jnp.where(scales == 255, jnp.float32(jnp.nan), power) * 2.0**14


def _load(matrix, rows, live, ref, columns, there):
    """`[rows, columns]` of matrices of a stack, 0 where `there` or `live` is false."""
    shape = rows.shape[0], columns.shape[0]
    spread = lambda a, axis: jnp.broadcast_to(jnp.expand_dims(a, axis), shape)
    matrix = spread(matrix, 1) if matrix.ndim else jnp.full(shape, matrix, _I32)
    at = ref.at[matrix, rows[:, None], columns[None, :]]
    masks = [spread(mask, axis) for mask, axis in ((live, 1), (there, 0)) if mask is not None]
    load = functools.partial(pltriton.load, at, eviction_policy="evict_first")  # nothing is read twice
    if not masks:
        return load()
    return load(mask=functools.reduce(jnp.logical_and, masks), other=0)
