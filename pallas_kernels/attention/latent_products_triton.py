"""Products of each head with its own part of latent attention's up projection, on a GPU: the weights are read in place.

One row is multiplied and added up, more go to the tensor cores, up to `_ROWS` of them in a program.
"""

import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from ..linear import stored
from ..quantized import QuantizedArray, is_quantized
from ..triton_call import LEAST, call_triton
from .heads import padded

_F32, _I32 = jnp.float32, jnp.int32
_ROWS, _WARPS = 64, 4
#: Weights that a program reads, for one row of x and for several.
_WEIGHTS = 4096, 16384


def refuse(x, kv_up, layer, plain, up) -> str | None:
    """Why these kernels cannot serve the call; None if they can."""
    del layer, plain, up
    if x.dtype not in (jnp.bfloat16, jnp.float16):
        return f"x of {x.dtype}, only bfloat16 and float16"
    if is_quantized(kv_up) and not isinstance(kv_up, QuantizedArray):
        return f"a {type(kv_up).__name__}"
    if not is_quantized(kv_up) and kv_up.dtype != x.dtype:
        return f"kv_up of {kv_up.dtype} for x of {x.dtype}"
    return stored.refuse(kv_up)


def products(x, kv_up, layer, plain, up, *, interpret=False):
    """See `latent_products`; `up`: values out of latents, else queries into them."""
    batch, heads, _ = x.shape
    _, _, rows, rank = kv_up.shape
    width, size = (rank, rows - plain) if up else (plain, rank)
    row_block = 1 if batch == 1 else min(_ROWS, max(LEAST, pl.next_power_of_2(batch)))
    block = min(padded(size), max(LEAST, pl.next_power_of_2(_WEIGHTS[batch > 1] // padded(width))))
    if batch == 1 and up:
        block = max(4, block // 2)
    sizes = dict(plain=plain, up=up, width=width, size=size, row_block=row_block, block=block)
    grid = pl.cdiv(batch, row_block) * heads * pl.cdiv(size, block)
    kernel = functools.partial(moe_jax_latent_products, **sizes)
    outputs = [((batch, heads, size), x.dtype)]
    operands = layer.reshape(1), x, kv_up
    return call_triton(kernel, "moe_jax_latent_products", grid, outputs, _WARPS, interpret, operands)[0]


interpreted = functools.partial(products, interpret=True)


def moe_jax_latent_products(layer, x_ref, kv_up, out, *, plain, up, width, size, row_block, block):
    """One program: a block of one head's outputs for a block of rows."""
    batch, heads = x_ref.shape[:2]
    blocks = pl.cdiv(size, block)
    rest, part = lax.div(pl.program_id(0), _I32(blocks)), lax.rem(pl.program_id(0), _I32(blocks))
    rows, head = lax.div(rest, _I32(heads)), lax.rem(rest, _I32(heads))
    target = part * block + lax.iota(_I32, block)
    source = lax.iota(_I32, padded(width))
    row = rows * row_block + lax.iota(_I32, row_block)

    shape = row_block, source.shape[0]
    at = jnp.broadcast_to(row[:, None], shape), jnp.full(shape, head, _I32), jnp.broadcast_to(source[None, :], shape)
    x = pltriton.load(x_ref.at[at], mask=(row < batch)[:, None] & (source < width)[None, :], other=0.0)
    # always [source, target], whichever of the two the weights' rows are
    lines, across = (plain + target[None, :], source[:, None]) if up else (source[:, None], target[None, :])
    w = _weights(kv_up, (layer[0], head), lines, across, (source < width)[:, None] & (target < size)[None, :], x.dtype)
    if row_block == 1:
        y = jnp.sum(w.astype(_F32) * x.astype(_F32).reshape(source.shape)[:, None], axis=0)[None, :]
    else:
        y = pltriton.dot(x, w)
    shape = row_block, block
    at = jnp.broadcast_to(row[:, None], shape), jnp.full(shape, head, _I32), jnp.broadcast_to(target[None, :], shape)
    pltriton.store(out.at[at], y.astype(out.dtype), mask=(row < batch)[:, None] & (target < size)[None, :])


def _weights(kv_up, lead, lines, across, there, dtype):
    """Weights at `lines` and `across`, 0 where they are not `there`; int8 as `dequantize` widens it."""
    full = lambda i: jnp.broadcast_to(i, there.shape)
    at = *map(full, lead), full(lines), full(across)
    if not isinstance(kv_up, QuantizedArray):
        return pltriton.load(kv_up.at[at], mask=there, other=0)
    scales, group = stored.scales_of(kv_up)
    values = pltriton.load(kv_up.values.at[at], mask=there, other=0).astype(_F32)
    at = *at[:3], full(lax.div(across, jnp.full_like(across, group)))
    return (values * pltriton.load(scales.at[at], mask=there, other=0.0)).astype(dtype)
