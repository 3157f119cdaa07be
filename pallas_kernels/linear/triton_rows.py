"""A few rows times kernels of a stack on a GPU, on tensor cores: products, biases and residual in one launch.

A program multiplies all rows of x with a few rows of one kernel, whose parts it reads ahead in a ring of stages. XLA's
own products read a kernel as fast, but copy it out of its stack first.
"""

import dataclasses
import functools

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


@dataclasses.dataclass(frozen=True)
class Tile:
    """Rows of a kernel and inputs that a program reads at once, stages of the ring, warps."""

    rows: int = 16
    depth: int = 256
    stages: int = 4
    warps: int = 4


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


def linear(x, kernels, layer, norm, biases, residual, dtype, normed, *, tile=Tile(), interpret=False):
    """See `api.linear`. `tile`: instead of the usual one."""
    if norm is not None:
        x = xla.normed(x, norm)
    if layer is None:
        kernels, biases = jax.tree.map(lambda w: w[None], (kernels, biases))
    sizes = [kernel.shape[1] for kernel in kernels]
    outputs = [((x.shape[0], size), dtype or x.dtype) for size in sizes]
    programs = [pl.cdiv(size, tile.rows) for size in sizes]
    kernel = functools.partial(moe_jax_linear_rows, programs=programs, tile=tile)
    operands = jnp.asarray(0 if layer is None else layer, jnp.int32).reshape(1), x, kernels, biases, residual
    call = functools.partial(call_triton, kernel, "moe_jax_linear_rows", sum(programs), outputs, tile.warps, interpret)
    return call(operands, stages=tile.stages) + [x] * normed


interpreted = functools.partial(linear, interpret=True)


def moe_jax_linear_rows(layer_ref, x_ref, kernels, biases, residual, *outs, programs, tile):
    """One program: `tile.rows` outputs of one of the kernels, for all rows of x."""
    layer, count, program = layer_ref[0], x_ref.shape[0], pl.program_id(0)
    token = lax.iota(jnp.int32, max(LEAST, pl.next_power_of_2(count)))
    first = 0
    for i, kernel in enumerate(kernels):

        @pl.when((program >= first) & (program < first + programs[i]))
        def _(first=first, kernel=kernel, bias=biases[i] if biases else None, out=outs[i]):
            size = kernel.shape[1]
            target = (program - first) * tile.rows + lax.iota(jnp.int32, tile.rows)
            row = jnp.minimum(target, size - 1)
            y = _product(x_ref, kernel, layer, token, row, tile)
            at = jnp.broadcast_to(token[:, None], y.shape), jnp.broadcast_to(target[None, :], y.shape)
            mask = (token < count)[:, None] & (target < size)[None, :]
            if bias is not None:
                y += pltriton.load(bias.at[jnp.full(row.shape, layer, jnp.int32), row]).astype(jnp.float32)[None, :]
            if residual is not None:
                y = y.astype(out.dtype).astype(jnp.float32)
                y += pltriton.load(residual.at[at], mask=mask, other=0.0).astype(jnp.float32)
            pltriton.store(out.at[at], y.astype(out.dtype), mask=mask)

        first += programs[i]


def _product(x_ref, kernel, layer, token, row, tile):
    """`[tokens, rows]` in float32."""
    values = kernel.values if is_quantized(kernel) else kernel
    width, (scales, group) = values.shape[-1], stored.scales_of(kernel)
    depth = min(tile.depth, pl.next_power_of_2(width), group if 0 < group < width else tile.depth)

    def load(ref, lead, rows, column, masks):
        shape = rows.shape[0], column.shape[0]
        at = [jnp.broadcast_to(i, shape) for i in (*lead, rows[:, None], column[None, :])]
        masks = [jnp.broadcast_to(mask, shape) for mask in masks]
        return pltriton.load(
            ref.at[tuple(at)], **(dict(mask=functools.reduce(jnp.logical_and, masks), other=0) if masks else {})
        )

    def step(i, total):
        column = i * depth + lax.iota(jnp.int32, depth)
        inside = [(column < width)[None, :]] if width % depth else []
        x = load(x_ref, (), token, column, [(token < x_ref.shape[0])[:, None], *inside])
        w = load(values, (layer,), row, column, inside)
        part = pltriton.dot(x, w.astype(x.dtype).T)
        if 0 < group < width:
            block = lax.div(i * depth, jnp.int32(group))
            part *= pltriton.load(
                scales.at[
                    tuple(jnp.full(row.shape, a, jnp.int32) for a in (layer,)) + (row, jnp.full(row.shape, block))
                ]
            )[None, :]
        return total + part

    total = lax.fori_loop(
        jnp.int32(0), jnp.int32(pl.cdiv(width, depth)), step, jnp.zeros((token.shape[0], row.shape[0]), jnp.float32)
    )
    if group == width:
        total *= pltriton.load(scales.at[jnp.full(row.shape, layer, jnp.int32), row, jnp.zeros_like(row)])[None, :]
    return total
