"""A few rows times kernels of a stack on a GPU, on tensor cores: products, biases and residual in one launch.

A program multiplies rows of x with rows of one kernel, both of which it reads ahead in a ring of stages. XLA's own
products read a kernel as fast, but copy it out of its stack first.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from ..quantized import is_quantized
from ..triton_call import LEAST, call_triton
from . import stored, xla

#: Rows of x up to which reading the weights is all the time there is.
MAX_ROWS = 64
#: Inputs that a part of a split product has at least, and programs that are enough for a GPU's multiprocessors.
_LEAST_SPLIT, _PROGRAMS = 256, 128


@dataclasses.dataclass(frozen=True)
class Tile:
    """Rows of a kernel and inputs that a program reads at once, stages of the ring, warps.

    `splits`: programs that have a part of an output's inputs each; XLA adds up their sums, in the program that reads
    them if it makes that one.
    """

    rows: int
    depth: int
    stages: int
    warps: int = 4
    splits: int = 1

    @property
    def left(self) -> bool:
        """Whether the kernel is the left operand, of whose rows tensor cores take 64 at once."""
        return self.rows >= 64


def choose(rows: int, size: int, width: int) -> Tile:
    """How products of `rows` of x with `size` rows of kernels of `width` inputs are cut, see docs/decisions.md."""
    few = size <= 256  # a router's
    splits = min(8 if few else _PROGRAMS * 64 // size, width // _LEAST_SPLIT)
    if few:
        return Tile(rows=16, depth=256, stages=2, splits=max(1, splits))
    depth, stages = (256, 4) if rows <= 16 else (128, 6)
    return Tile(rows=64, depth=depth, stages=stages, splits=max(1, splits))


def refuse(x, kernels, layer, norm, biases, residual, dtype, normed) -> str | None:
    """Why these kernels cannot serve the call; None if they can."""
    del layer, norm, biases, residual, dtype, normed
    if not 0 < x.shape[0] <= MAX_ROWS:
        return f"{x.shape[0]} rows of x, at most {MAX_ROWS}"
    if x.dtype not in (jnp.bfloat16, jnp.float16):
        return f"x of {x.dtype}, only bfloat16 and float16"
    if reason := stored.refuse_beside(x, kernels):
        return reason
    least = min([x.shape[1], *(group for group in (stored.scales_of(kernel)[1] for kernel in kernels) if group)])
    return f"products of {least} inputs at once, at least {LEAST}" if pl.next_power_of_2(least) < LEAST else None


def linear(x, kernels, layer, norm, biases, residual, dtype, normed, *, tile=None, interpret=False):
    """See `api.linear`. `tile`: instead of the usual one."""
    if norm is not None:
        x = xla.normed(x, norm)
    if layer is None:
        kernels, biases = jax.tree.map(lambda w: w[None], (kernels, biases))
    sizes, count, dtype = [kernel.shape[1] for kernel in kernels], x.shape[0], dtype or x.dtype
    tile = tile or choose(count, sum(sizes), x.shape[1])
    programs = [tile.splits * pl.cdiv(size, tile.rows) for size in sizes]
    kernel = functools.partial(moe_jax_linear_rows, programs=programs, tile=tile)
    index = jnp.asarray(0 if layer is None else layer, jnp.int32)
    inside = residual if tile.splits == 1 else None
    outputs = [((count, size), dtype) for size in sizes]
    if tile.splits > 1:
        outputs = [((tile.splits, count, size), jnp.float32) for size in sizes]
    call = functools.partial(call_triton, kernel, "moe_jax_linear_rows", sum(programs), outputs, tile.warps, interpret)
    products = call((index.reshape(1), x, kernels, biases, inside), stages=tile.stages)
    if tile.splits > 1:
        products = [parts.sum(0).astype(dtype) for parts in products]
        products = products if residual is None else [products[0] + residual]
    return products + [x] * normed


interpreted = functools.partial(linear, interpret=True)


def moe_jax_linear_rows(layer_ref, x_ref, kernels, biases, residual, *outs, programs, tile):
    """One program: `tile.rows` outputs of one of the kernels, for all rows of x and a part of the inputs."""
    layer, count, program = layer_ref[0], x_ref.shape[0], pl.program_id(0)
    token = lax.iota(jnp.int32, max(LEAST, pl.next_power_of_2(count)))
    there = token < count
    first = 0
    for i, kernel in enumerate(kernels):

        @pl.when((program >= first) & (program < first + programs[i]))
        def _(first=first, kernel=kernel, bias=biases[i] if biases else None, out=outs[i]):
            size, (strip, split) = kernel.shape[1], _divided(program - first, tile.splits)
            target = strip * tile.rows + lax.iota(jnp.int32, tile.rows)
            row = jnp.minimum(target, size - 1)
            y = _product(x_ref, kernel, layer, _Part(token, there, row, split), tile)
            at = jnp.broadcast_to(token[:, None], y.shape), jnp.broadcast_to(target[None, :], y.shape)
            mask = there[:, None] & (target < size)[None, :]
            if bias is not None:
                once = {} if tile.splits == 1 else dict(mask=jnp.full(row.shape, split == 0), other=0.0)
                one = pltriton.load(bias.at[jnp.full(row.shape, layer, jnp.int32), row], **once)
                y += one.astype(jnp.float32)[None, :]
            if residual is not None:
                y = y.astype(out.dtype).astype(jnp.float32)
                y += pltriton.load(residual.at[at], mask=mask, other=0.0).astype(jnp.float32)
            if tile.splits > 1:
                at = jnp.full(y.shape, split, jnp.int32), *at
            pltriton.store(out.at[at], y.astype(out.dtype), mask=mask)

        first += programs[i]


def _divided(n, by):
    """Quotient and remainder; by 1 without any operation."""
    return (n, 0) if by == 1 else (lax.div(n, jnp.int32(by)), lax.rem(n, jnp.int32(by)))


class _Part(NamedTuple):
    """What a program computes: rows of x and which of them there are, rows of a kernel, which part of the inputs."""

    token: jax.Array
    there: jax.Array
    row: jax.Array
    split: Any


def _product(x_ref, kernel, layer, part, tile):
    """`[tokens, rows]` in float32."""
    values = kernel.values if is_quantized(kernel) else kernel
    width, (scales, group) = values.shape[-1], stored.scales_of(kernel)
    depth = min(tile.depth, pl.next_power_of_2(width), group if 0 < group < width else tile.depth)
    turns = pl.cdiv(width, depth * tile.splits)
    spread = lambda scale: scale[:, None] if tile.left else scale[None, :]

    def scale_of(block):
        at = jnp.full(part.row.shape, layer, jnp.int32), part.row, jnp.full(part.row.shape, block, jnp.int32)
        return spread(pltriton.load(scales.at[at]))

    def step(i, total):
        first = (part.split * turns + i) * depth
        column = first + lax.iota(jnp.int32, depth)
        inside = [(column < width)[None, :]] if width % (depth * tile.splits) else []
        x = _load(x_ref, (), part.token, column, [part.there[:, None], *inside])
        w = _load(values, (layer,), part.row, column, inside).astype(x.dtype)
        product = pltriton.dot(w, x.T) if tile.left else pltriton.dot(x, w.T)
        if 0 < group < width:
            product *= scale_of(jnp.minimum(lax.div(first, jnp.int32(group)), scales.shape[2] - 1))
        return total + product

    shape = part.token.shape[0], part.row.shape[0]
    zeros = jnp.zeros(shape[::-1] if tile.left else shape, jnp.float32)
    total = lax.fori_loop(jnp.int32(0), jnp.int32(turns), step, zeros)
    if group == width:
        total *= scale_of(0)
    return total.T if tile.left else total


def _load(ref, lead, rows, column, masks):
    """`ref[*lead, rows, column]`, `[rows, columns]`, 0 where a mask is false."""
    shape = rows.shape[0], column.shape[0]
    at = [jnp.broadcast_to(i, shape) for i in (*lead, rows[:, None], column[None, :])]
    mask = functools.reduce(jnp.logical_and, [jnp.broadcast_to(mask, shape) for mask in masks]) if masks else None
    return pltriton.load(ref.at[tuple(at)], **({} if mask is None else dict(mask=mask, other=0)))
