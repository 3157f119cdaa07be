"""Attention of one new token per row on a GPU: norm, rotation, cache entry and attention in one launch.

    for every row, key/value head and split of the cache's columns:
        q, k = rotate(norm(q)), rotate(norm(k)); split 0 writes k and v to the cache, and begins with them
        for blocks of earlier columns: running maximum, sum and weighted values of the group's query heads

Long caches are split, so that there is work for every multiprocessor; a second launch puts the parts together.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from .. import compat
from ..triton_call import LEAST, call_triton, zero_behind_a_barrier
from . import cached, splits
from .heads import Place, padded, prepare

_F32, _I32 = jnp.float32, jnp.int32
#: Columns that a program reads at once, its warps and stages; columns that are worth a program of their own, and
#: programs that a multiprocessor should have at most.
_COLUMNS, _WARPS, _STAGES, _SPLIT, _PER_SM = 64, 4, 3, 512, 1


def refuse(q, k, v, keys, values, lengths, layer, scale, norm, rotary, seen) -> str | None:
    """Why these kernels cannot serve the call; None if they can."""
    del lengths, layer, scale, norm, rotary, seen
    kinds = {str(a.dtype) for a in (q, k, v, keys, values)}
    if kinds not in ({"bfloat16"}, {"float16"}):
        return f"q, k, v and the cache must all be bfloat16 or all float16, got {', '.join(sorted(kinds))}"
    if max(q.shape[2], v.shape[2]) > 256 or q.shape[1] // k.shape[1] > 64:
        return f"heads of {q.shape[2]} and {v.shape[2]}, {q.shape[1] // k.shape[1]} queries per key; at most 256 and 64"
    return cached.refuse(keys) or cached.refuse(values)


def decode_attention(q, k, v, keys, values, lengths, layer, scale, norm, rotary, seen, *, interpret=False):
    """See `decode.decode_attention`."""
    (batch, heads, _), kv_heads, width = q.shape, k.shape[1], v.shape[2]
    parts = splits.count(batch * kv_heads, keys.shape[3], _SPLIT, _PER_SM * compat.num_sms())
    limit = lambda a: None if a is None else jnp.asarray(a, _I32).reshape(1)
    limits = limit(seen.window), limit(seen.chunk)
    first = layer.reshape(1), lengths, q, k, v
    operands = *first, (keys, values), limits, norm, rotary, seen.sinks if parts == 1 else None
    stacks, structure = jax.tree.flatten((keys, values))
    outputs = splits.outputs(batch, heads, width, parts, q.dtype)
    aliases = {len(first) + i: len(outputs) + i for i in range(len(stacks))}
    given = _Given(scale, parts, structure)
    found = call_triton(
        functools.partial(moe_jax_attention_decode, given=given),
        "moe_jax_attention_decode",
        batch * kv_heads * parts,
        outputs + [(a.shape, a.dtype) for a in stacks],
        _WARPS,
        interpret,
        operands,
        aliases,
        _STAGES,
    )
    y = splits.join(layer, found[: len(outputs)], seen.sinks, q.dtype, interpret)
    return y, *jax.tree.unflatten(structure, found[len(outputs) :])


interpreted = functools.partial(decode_attention, interpret=True)


@dataclasses.dataclass(frozen=True)
class _Given:
    """What is static of a call; `structure`: how the cache's stacks are stored."""

    scale: float
    splits: int
    structure: Any


def moe_jax_attention_decode(layer_ref, lengths, q_ref, k_ref, v_ref, old, limits, norm, rotary, sinks, *outs, given):
    """One program: a row's query heads of one key/value head over one split of its columns."""
    del old  # the same memory as the outputs
    stored = given.structure.num_leaves
    keys, values = jax.tree.unflatten(given.structure, outs[-stored:])
    kv_heads, size, width = k_ref.shape[1], k_ref.shape[2], v_ref.shape[2]
    group = q_ref.shape[1] // kv_heads
    program, split = lax.div(pl.program_id(0), _I32(given.splits)), lax.rem(pl.program_id(0), _I32(given.splits))
    batch, kv = lax.div(program, _I32(kv_heads)), lax.rem(program, _I32(kv_heads))
    layer = layer_ref[0]
    place = Place(batch, layer, lax.iota(_I32, padded(size)), size)
    member = lax.iota(_I32, max(LEAST, pl.next_power_of_2(group)))
    query = kv * group + jnp.minimum(member, group - 1)
    position = pltriton.load(lengths.at[batch])
    at_value = Place(batch, layer, lax.iota(_I32, padded(width)), width)
    only = jnp.full((1,), kv, _I32)
    parts = [
        prepare(q_ref, query, place, norm and (norm.q, norm.epsilon), rotary),
        prepare(k_ref, only, place, norm and (norm.k, norm.epsilon), rotary),
        prepare(v_ref, only, at_value, None, None),
    ]
    zero = zero_behind_a_barrier(layer).astype(_F32)
    q, k, v = (finish(zero) for finish in parts)
    (new_k, k), (new_v, v) = (cached.as_stored(*each, q_ref.dtype) for each in ((keys, k), (values, v)))
    head = layer, batch, kv

    @pl.when((split == 0) & (position < keys.shape[3]))
    def _():
        cached.write(keys, new_k, head, position, place.component, place.real)
        cached.write(values, new_v, head, position, at_value.component, at_value.real)

    q = q.astype(q_ref.dtype)
    own = (lax.iota(_I32, LEAST) == 0) & (split == 0)  # the new token belongs to the first split
    carry = _attend(given.scale, q, own, k, v, splits.nothing(member.shape[0], at_value.component.shape[0]))
    start, stop = splits.share(_first(position, limits), position, split, given.splits, _COLUMNS)
    step = functools.partial(_step, given.scale, head, q, (keys, place), (values, at_value), start, stop)
    blocks = lax.div(jnp.maximum(stop - start, 0) + (_COLUMNS - 1), _I32(_COLUMNS))
    top, total, mixed = lax.fori_loop(0, blocks, step, carry)

    if given.splits == 1 and sinks is not None:
        sink = pltriton.load(sinks.at[jnp.full(query.shape, layer, _I32), query]).astype(_F32)
        higher = jnp.maximum(top, sink)
        mixed *= jnp.exp(top - higher)[:, None]
        total = total * jnp.exp(top - higher) + jnp.exp(sink - higher)
    if given.splits == 1:
        mixed = mixed / total[:, None]
    there, target = member < group, kv * group + member
    sums = mixed, top, total
    splits.write(outs[:-stored], batch, target, there, split, at_value.component, at_value.real, sums)


def _first(position, limits):
    """The first column that the new token sees."""
    first, (window, chunk) = jnp.zeros_like(position), limits
    if window is not None:
        first = jnp.maximum(first, position - (window[0] - 1))
    if chunk is not None:
        first = jnp.maximum(first, lax.div(position, chunk[0]) * chunk[0])
    return first


def _step(scale, head, q, keys, values, start, stop, i, carry):
    """`_COLUMNS` more columns of the cache."""
    column = start + i * _COLUMNS + lax.iota(_I32, _COLUMNS)
    there = column < stop
    read = lambda stack, place: cached.columns(stack, head, column, there, place.component, place.real, q.dtype)
    return _attend(scale, q, there, read(*keys), read(*values), carry)


def _attend(scale, q, there, keys, values, carry):
    """A block of columns more; an entry's scale goes to its score."""
    k, k_scales = keys
    scores = pltriton.dot(q, k.T) * scale
    if k_scales is not None:
        scores *= k_scales[None, :]
    return splits.add(carry, jnp.where(there[None, :], scores, splits.MASKED), *values)
