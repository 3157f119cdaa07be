"""Attention of one new token per row on a GPU: norm, rotation, cache entry and attention in one launch.

    for every row, key/value head and split of the cache's columns:
        q, k = rotate(norm(q)), rotate(norm(k)); split 0 writes k and v to the cache, and begins with them
        for blocks of earlier columns: running maximum, sum and weighted values of the group's query heads

Long caches are split, so that there is work for every multiprocessor; a second launch puts the parts together.
"""

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from ..triton_call import call_triton

_F32, _I32 = jnp.float32, jnp.int32
_MASKED = -1e30
_LEAST = 16  # rows of a product on tensor cores
#: Columns that a program reads at once and its warps; columns that are worth a program of their own, and how many
#: programs there should be at most.
_COLUMNS, _WARPS, _STAGES, _SPLIT, _PROGRAMS = 64, 4, 3, 256, 132


def refuse(q, k, v, keys, values, lengths, layer, scale, norm, rotary, seen) -> str | None:
    """Why these kernels cannot serve the call; None if they can."""
    del lengths, layer, scale, norm, rotary, seen
    kinds = {str(a.dtype) for a in (q, k, v, keys, values)}
    if kinds not in ({"bfloat16"}, {"float16"}):
        return f"q, k, v and the cache must all be bfloat16 or all float16, got {', '.join(sorted(kinds))}"
    if max(q.shape[2], v.shape[2]) > 256 or q.shape[1] // k.shape[1] > 64:
        return f"heads of {q.shape[2]} and {v.shape[2]}, {q.shape[1] // k.shape[1]} queries per key; at most 256 and 64"
    return None


def decode_attention(q, k, v, keys, values, lengths, layer, scale, norm, rotary, seen, *, interpret=False):
    """See `decode.decode_attention`."""
    (batch, heads, _), kv_heads, width = q.shape, k.shape[1], v.shape[2]
    splits = _splits(batch * kv_heads, keys.shape[3])
    limit = lambda a: None if a is None else jnp.asarray(a, _I32).reshape(1)
    limits = limit(seen.window), limit(seen.chunk)
    operands = (
        *(layer.reshape(1), lengths, q, k, v, keys, values),
        *(limits, norm, rotary, seen.sinks if splits == 1 else None),
    )
    outputs = [((batch, heads, splits, width), q.dtype if splits == 1 else _F32)]
    outputs += [((batch, heads, splits), _F32)] * (2 if splits > 1 else 0)
    outputs += [(keys.shape, keys.dtype), (values.shape, values.dtype)]
    given = _Given(scale, splits)
    run = functools.partial(moe_jax_attention_decode, given=given)
    grid, aliases = batch * kv_heads * splits, {5: len(outputs) - 2, 6: len(outputs) - 1}
    call = functools.partial(call_triton, interpret=interpret)
    *parts, keys, values = call(
        run, "moe_jax_attention_decode", grid, outputs, _WARPS, operands=operands, aliases=aliases, stages=_STAGES
    )
    if splits > 1:
        join = functools.partial(moe_jax_attention_join, splits=splits)
        outputs = [((batch, heads, width), q.dtype)]
        operands = (layer.reshape(1), *parts, seen.sinks)
        parts = call(join, "moe_jax_attention_join", batch * heads, outputs, 1, operands=operands)
    return parts[0].reshape(batch, heads, width), keys, values


interpreted = functools.partial(decode_attention, interpret=True)


def _splits(programs: int, columns: int) -> int:
    """Into how many parts a cache of `columns` is cut for `programs` rows and heads.

    >>> _splits(4, 256), _splits(4, 4096), _splits(4, 32768), _splits(512, 32768)
    (1, 8, 32, 1)
    """
    most = max(1, min(columns // (2 * _SPLIT), _PROGRAMS // programs))
    return 1 << (most.bit_length() - 1)


@dataclasses.dataclass(frozen=True)
class _Given:
    """What is static of a call."""

    scale: float
    splits: int


@dataclasses.dataclass(frozen=True)
class _Head:
    """Where a program works: row of the batch and key/value head, components of a head (padded) and its layer."""

    batch: Any
    kv: Any
    layer: Any
    component: Any
    size: int

    @property
    def real(self):
        return self.component < self.size


def moe_jax_attention_decode(
    layer_ref, lengths, q_ref, k_ref, v_ref, old_keys, old_values, limits, norm, rotary, sinks, out, *outs, given
):
    """One program: a row's query heads of one key/value head over one split of its columns."""
    del old_keys, old_values  # the same memory as the outputs
    *sums, keys, values = outs
    kv_heads, size, width = k_ref.shape[1], k_ref.shape[2], v_ref.shape[2]
    group = q_ref.shape[1] // kv_heads
    program, split = lax.div(pl.program_id(0), _I32(given.splits)), lax.rem(pl.program_id(0), _I32(given.splits))
    batch, kv = lax.div(program, _I32(kv_heads)), lax.rem(program, _I32(kv_heads))
    layer = layer_ref[0]
    head = _Head(batch, kv, layer, lax.iota(_I32, _padded(size)), size)
    member = lax.iota(_I32, max(_LEAST, pl.next_power_of_2(group)))
    query = kv * group + jnp.minimum(member, group - 1)
    position = pltriton.load(lengths.at[batch])

    q = _prepared(q_ref, query, head, norm and (norm.q, norm.epsilon), rotary)
    k = _prepared(k_ref, jnp.full((1,), kv, _I32), head, norm and (norm.k, norm.epsilon), rotary)
    value_at = lax.iota(_I32, _padded(width))
    v = pltriton.load(
        v_ref.at[jnp.full(value_at.shape, batch, _I32), jnp.full(value_at.shape, kv, _I32), value_at],
        mask=value_at < width,
        other=0.0,
    )

    @pl.when((split == 0) & (position < keys.shape[3]))
    def _():
        for ref, new, at, there in (
            (keys, k, head.component, head.real),
            (values, v[None], value_at, value_at < width),
        ):
            where = [jnp.full((1, at.shape[0]), i, _I32) for i in (layer, batch, kv, position)]
            pltriton.store(ref.at[(*where, at[None, :])], new.astype(ref.dtype), mask=there[None, :])

    mine = split == 0  # the new token belongs to the first split
    score = jnp.sum(q * k, axis=1) * given.scale
    top = jnp.where(mine, score, _MASKED)
    total = jnp.where(mine, jnp.ones_like(score), 0.0)
    mixed = jnp.where(mine, jnp.broadcast_to(v.astype(_F32)[None], (member.shape[0], v.shape[0])), 0.0)
    start, stop = _columns(position, split, limits, given)
    step = functools.partial(_step, given, head, q.astype(q_ref.dtype), value_at, width, keys, values, start, stop)
    blocks = lax.div(jnp.maximum(stop - start, 0) + (_COLUMNS - 1), _I32(_COLUMNS))
    top, total, mixed = lax.fori_loop(0, blocks, step, (top, total, mixed))

    if given.splits == 1 and sinks is not None:
        sink = pltriton.load(sinks.at[jnp.full(query.shape, layer, _I32), query]).astype(_F32)
        higher = jnp.maximum(top, sink)
        mixed *= jnp.exp(top - higher)[:, None]
        total = total * jnp.exp(top - higher) + jnp.exp(sink - higher)
    there = member < group
    if given.splits == 1:
        mixed = mixed / total[:, None]
    target = kv * group + member
    at = [jnp.broadcast_to(i, mixed.shape) for i in (batch, target[:, None], split, value_at[None, :])]
    pltriton.store(out.at[tuple(at)], mixed.astype(out.dtype), mask=there[:, None] & (value_at < width)[None, :])
    for ref, value in zip(sums, (top, total), strict=False):
        at = [jnp.full(member.shape, batch, _I32), target, jnp.full(member.shape, split, _I32)]
        pltriton.store(ref.at[tuple(at)], value, mask=there)


def _columns(position, split, limits, given):
    """First and last (exclusive) of the split's earlier columns."""
    first, (window, chunk) = jnp.zeros_like(position), limits
    if window is not None:
        first = jnp.maximum(first, position - (window[0] - 1))
    if chunk is not None:
        first = jnp.maximum(first, lax.div(position, chunk[0]) * chunk[0])
    if given.splits == 1:
        return first, position
    share = lax.div(position - first + (given.splits - 1), _I32(given.splits))
    share = lax.div(share + (_COLUMNS - 1), _I32(_COLUMNS)) * _COLUMNS
    start = first + split * share
    return start, jnp.minimum(start + share, position)


def _step(given, head, q, value_at, width, keys, values, start, stop, i, carry):
    """`_COLUMNS` more columns."""
    top, total, mixed = carry
    column = start + i * _COLUMNS + lax.iota(_I32, _COLUMNS)
    there = column < stop

    def block(ref, at, real):
        where = [jnp.broadcast_to(a, (_COLUMNS, at.shape[0])) for a in (head.layer, head.batch, head.kv)]
        mask = there[:, None] & real[None, :]
        return pltriton.load(ref.at[(*where, column[:, None], at[None, :])], mask=mask, other=0.0)

    k, v = block(keys, head.component, head.real), block(values, value_at, value_at < width)
    scores = pltriton.dot(q, k.T) * given.scale
    scores = jnp.where(there[None, :], scores, _MASKED)
    higher = jnp.maximum(top, jnp.max(scores, axis=1))
    powers, shrink = jnp.exp(scores - higher[:, None]), jnp.exp(top - higher)
    mixed = mixed * shrink[:, None] + pltriton.dot(powers.astype(v.dtype), v)
    return higher, total * shrink + jnp.sum(powers, axis=1), mixed


def _prepared(ref, heads, place, norm, rotary):
    """Normed and rotated `[heads, H padded]` of `ref [B, heads, H]`, in float32, rounded as the plain operations do."""

    def load(component, real):
        at = [
            jnp.broadcast_to(i, (heads.shape[0], component.shape[0]))
            for i in (place.batch, heads[:, None], component[None, :])
        ]
        return pltriton.load(ref.at[tuple(at)], mask=jnp.broadcast_to(real[None, :], at[0].shape), other=0.0).astype(
            _F32
        )

    rounded = lambda x: x.astype(ref.dtype).astype(_F32)
    x = load(place.component, place.real)
    scaled = lambda x, component: x
    if norm is not None:
        scales, epsilon = norm
        together = len(scales.shape) == 3
        share = (
            _share(ref, place, epsilon)
            if together
            else lax.rsqrt(jnp.sum(x * x, axis=1) / place.size + epsilon)[:, None]
        )

        def scaled(x, component):
            shape = (heads.shape[0], component.shape[0]) if together else (1, component.shape[0])
            lead = (place.layer, heads[:, None]) if together else (place.layer,)
            at = [jnp.broadcast_to(i, shape) for i in (*lead, component[None, :])]
            real = jnp.broadcast_to((component < place.size)[None, :], shape)
            return rounded(x * share * pltriton.load(scales.at[tuple(at)], mask=real, other=0.0).astype(_F32))

    x = scaled(x, place.component)
    if rotary is None:
        return x
    half = rotary.cos.shape[1]
    c = place.component
    if rotary.interleaved:
        angle, partner, second = c >> 1, c ^ 1, (c & 1) == 1
    else:
        second = c >= half
        angle, partner = jnp.where(second, c - half, c), jnp.where(second, c - half, c + half)
    turned = c < 2 * half
    angle, partner = jnp.where(turned, angle, 0), jnp.where(turned, partner, 0)
    at = jnp.full(c.shape, place.batch, _I32), angle
    cos, sin = pltriton.load(rotary.cos.at[at]), pltriton.load(rotary.sin.at[at])
    other = scaled(load(partner, turned), partner)
    y = x * cos[None, :] + jnp.where(second, sin, -sin)[None, :] * other
    return rounded(jnp.where(turned[None, :], y, x))


def _share(ref, place, epsilon):
    """One over the root mean square of all heads of a row together."""
    heads, size = ref.shape[1:]
    head = lax.iota(_I32, pl.next_power_of_2(heads))
    shape = head.shape[0], place.component.shape[0]
    at = [jnp.broadcast_to(i, shape) for i in (place.batch, head[:, None], place.component[None, :])]
    x = pltriton.load(ref.at[tuple(at)], mask=(head < heads)[:, None] & place.real[None, :], other=0.0).astype(_F32)
    return lax.rsqrt(jnp.sum(x * x) / (heads * size) + epsilon)


def _padded(size):
    return max(_LEAST, pl.next_power_of_2(size))


def moe_jax_attention_join(layer, parts, tops, totals, sinks, out, *, splits):
    """One program: a head's output out of its splits'."""
    heads, width = out.shape[1:]
    batch, head = lax.div(pl.program_id(0), _I32(heads)), lax.rem(pl.program_id(0), _I32(heads))
    split, component = lax.iota(_I32, splits), lax.iota(_I32, _padded(width))
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
