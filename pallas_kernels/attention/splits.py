"""Caches that several programs share on a GPU: into how many parts columns are cut, and the kernel that joins them."""

import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from ..triton_call import call_triton
from .heads import padded

_F32, _I32 = jnp.float32, jnp.int32
MASKED = -1e30
_VALUES = 4096  # that a warp of `join` holds


def count(programs: int, columns: int, least: int, most: int) -> int:
    """Into how many parts of at least `least` a cache of `columns` is cut for `programs` rows and heads.

    There are `most` programs then, or fewer, unless there are more already.

    >>> count(4, 256, 512, 132), count(4, 4096, 512, 132), count(4, 32768, 512, 132), count(512, 32768, 512, 132)
    (1, 8, 32, 1)
    """
    parts = max(1, min(columns // least, most // programs))
    return 1 << (parts.bit_length() - 1)


def share(first, last, split, splits, block):
    """First and last (exclusive) of the columns `[first, last)` that a split takes, in whole blocks but for the end."""
    if splits == 1:
        return first, last
    own = lax.div(last - first + (splits - 1), _I32(splits))
    own = lax.div(own + (block - 1), _I32(block)) * block
    start = first + split * own
    return start, jnp.minimum(start + own, last)


def nothing(heads, width):
    """The running maximum, sum and mix of no column."""
    return jnp.full((heads,), MASKED, _F32), jnp.zeros((heads,), _F32), jnp.zeros((heads, width), _F32)


def add(carry, scores, values, scales):
    """Running maximum, sum and mix with more columns: their `scores` and `values`, an entry's scale going to its power.

    Where all of the scores are `MASKED`, so is the maximum, and the rest means nothing: whatever is added later erases
    it.
    """
    top, total, mixed = carry
    higher = jnp.maximum(top, jnp.max(scores, axis=1))
    powers, shrink = jnp.exp(scores - higher[:, None]), jnp.exp(top - higher)
    total = total * shrink + jnp.sum(powers, axis=1)
    largest = jnp.float32(1)
    if scales is not None and values.dtype == jnp.float16:  # whose smallest numbers are too large for small scales
        largest = jnp.maximum(jnp.max(scales), jnp.finfo(_F32).tiny)
    powers = powers if scales is None else powers * (scales / largest)[None, :]
    return higher, total, mixed * shrink[:, None] + pltriton.dot(powers.astype(values.dtype), values) * largest


def outputs(batch: int, heads: int, width: int, splits: int, dtype) -> list:
    """Shapes and dtypes of the outputs of all splits: their mixes and, if there are several, maxima and sums."""
    found = [((batch, heads, splits, width), dtype if splits == 1 else _F32)]
    return found + [((batch, heads, splits), _F32)] * (2 if splits > 1 else 0)


def write(refs, batch, heads, there, split, component, real, sums):
    """A program's part of `outputs`: its mix `[heads, components]` and then, where they are asked for, its sums."""
    mixed, *sums = sums
    out, *refs = refs
    at = [jnp.broadcast_to(i, mixed.shape) for i in (batch, heads[:, None], split, component[None, :])]
    pltriton.store(out.at[tuple(at)], mixed.astype(out.dtype), mask=there[:, None] & real[None, :])
    for ref, value in zip(refs, sums, strict=False):
        at = [jnp.full(heads.shape, batch, _I32), heads, jnp.full(heads.shape, split, _I32)]
        pltriton.store(ref.at[tuple(at)], value, mask=there)


def join(layer, parts, sinks, dtype, interpret):
    """`[B, N, width]` in `dtype` out of the splits' outputs."""
    batch, heads, splits, width = parts[0].shape
    if splits == 1:
        return parts[0].reshape(batch, heads, width)
    kernel = functools.partial(moe_jax_attention_join, splits=splits)
    operands, outs = (layer.reshape(1), *parts, sinks), [((batch, heads, width), dtype)]
    warps = min(8, max(1, splits * padded(width) // _VALUES))
    return call_triton(kernel, "moe_jax_attention_join", batch * heads, outs, warps, interpret, operands)[0]


def moe_jax_attention_join(layer, parts, tops, totals, sinks, out, *, splits):
    """One program: a head's output out of its splits'."""
    heads, width = out.shape[1:]
    batch, head = lax.div(pl.program_id(0), _I32(heads)), lax.rem(pl.program_id(0), _I32(heads))
    split, component = lax.iota(_I32, splits), lax.iota(_I32, padded(width))
    at = jnp.full(split.shape, batch, _I32), jnp.full(split.shape, head, _I32), split
    top, total = pltriton.load(tops.at[at]), pltriton.load(totals.at[at])
    highest = jnp.max(top)
    sum_ = jnp.float32(0)
    if sinks is not None:
        sink = pltriton.load(sinks.at[layer[0], head]).astype(_F32)
        highest = jnp.maximum(highest, sink)
        sum_ = jnp.exp(sink - highest)
    weight = jnp.exp(top - highest)
    where = [
        jnp.broadcast_to(i, (splits, component.shape[0])) for i in (batch, head, split[:, None], component[None, :])
    ]
    real = jnp.broadcast_to((component < width)[None, :], where[0].shape)
    mixed = jnp.sum(pltriton.load(parts.at[tuple(where)], mask=real, other=0.0) * weight[:, None], axis=0)
    y = mixed / (jnp.sum(total * weight) + sum_)
    at = jnp.full(component.shape, batch, _I32), jnp.full(component.shape, head, _I32), component
    pltriton.store(out.at[at], y.astype(out.dtype), mask=component < width)
