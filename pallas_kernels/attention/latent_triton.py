"""Latent attention of one new token per row on a GPU: norm, rotation, cache entry and attention in one launch.

    for every row, block of heads and split of the cache's columns:
        latent, k = norm(latent), rotate(k); the first block's split 0 writes them to the cache, and all begin with them
        for blocks of earlier columns, each read once: scores of all heads of the block, then their mix of latents

All heads share what is read, so a block of them fills the tensor cores. Splits are joined as in `decode_triton`.
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
#: Heads in a block -> columns that are read at once, warps, stages.
_TILES = {16: (64, 4, 2), 32: (64, 4, 2), 64: (32, 8, 3)}
#: Columns that are worth a program of their own, while there is a multiprocessor for each.
_SPLIT = 128


def refuse(absorbed, q, new, latents, rotaries, lengths, layer, scale, norm, rotary) -> str | None:
    """Why these kernels cannot serve the call; None if they can."""
    del lengths, layer, scale, norm, rotary
    kinds = {str(a.dtype) for a in (absorbed, q, new, latents, rotaries)}
    if kinds not in ({"bfloat16"}, {"float16"}):
        return f"queries, latents and the cache must all be bfloat16 or all float16, got {', '.join(sorted(kinds))}"
    if latents.shape[-1] > 512 or rotaries.shape[-1] > 128:
        return f"latents of {latents.shape[-1]} and {rotaries.shape[-1]} rotary components, at most 512 and 128"
    return cached.refuse(latents) or cached.refuse(rotaries)


def decode_latent_attention(
    absorbed, q, new, latents, rotaries, lengths, layer, scale, norm, rotary, *, interpret=False
):
    """See `latent.decode_latent_attention`."""
    batch, heads, rank = absorbed.shape
    block = min(max(_TILES), max(LEAST, pl.next_power_of_2(heads)))
    columns, warps, stages = _TILES[block]
    programs = batch * pl.cdiv(heads, block)
    parts = splits.count(programs, latents.shape[2], _SPLIT, compat.num_sms())
    stacks, structure = jax.tree.flatten((latents, rotaries))
    first = layer.reshape(1), lengths, absorbed, q, new[:, None]
    outputs = splits.outputs(batch, heads, rank, parts, q.dtype)
    norm = None if norm is None else (norm.scale, norm.epsilon)
    given = _Given(scale, parts, block, columns, None if norm is None else norm[1], structure)
    found = call_triton(
        functools.partial(moe_jax_attention_latent, given=given),
        "moe_jax_attention_latent",
        programs * parts,
        outputs + [(a.shape, a.dtype) for a in stacks],
        warps,
        interpret,
        (*first, stacks, norm and norm[0], rotary),
        {len(first) + i: len(outputs) + i for i in range(len(stacks))},
        stages,
    )
    y = splits.join(layer, found[: len(outputs)], None, q.dtype, interpret)
    return y, *jax.tree.unflatten(structure, found[len(outputs) :])


interpreted = functools.partial(decode_latent_attention, interpret=True)


@dataclasses.dataclass(frozen=True)
class _Given:
    """What is static of a call; `structure`: how the cache's stacks are stored."""

    scale: float
    splits: int
    heads: int
    columns: int
    epsilon: float | None
    structure: Any


def moe_jax_attention_latent(layer_ref, lengths, absorbed_ref, q_ref, new_ref, old, norm, rotary, *outs, given):
    """One program: a row's block of heads over one split of its columns."""
    del old  # the same memory as the outputs
    stored = given.structure.num_leaves
    latents, rotaries = jax.tree.unflatten(given.structure, outs[-stored:])
    (_, heads, rank), turned = absorbed_ref.shape, rotaries.shape[-1]
    program, split = lax.div(pl.program_id(0), _I32(given.splits)), lax.rem(pl.program_id(0), _I32(given.splits))
    blocks = pl.cdiv(heads, given.heads)
    batch, block = lax.div(program, _I32(blocks)), lax.rem(program, _I32(blocks))
    layer, position = layer_ref[0], pltriton.load(lengths.at[batch])
    member = block * given.heads + lax.iota(_I32, given.heads)
    head, only = jnp.minimum(member, heads - 1), jnp.zeros((1,), _I32)
    at_latent = Place(batch, layer, lax.iota(_I32, padded(rank)), rank)
    at_rotary = Place(batch, layer, lax.iota(_I32, padded(turned)), turned, rank)

    parts = [
        prepare(new_ref, only, at_latent, None if norm is None else (norm, given.epsilon), None),
        prepare(new_ref, only, at_rotary, None, rotary),
        prepare(absorbed_ref, head, at_latent, None, None),
        prepare(q_ref, head, dataclasses.replace(at_rotary, first=q_ref.shape[2] - turned), None, rotary),
    ]
    zero = zero_behind_a_barrier(layer).astype(_F32)
    latent, k, absorbed, q = (finish(zero) for finish in parts)
    pairs = (latents, latent), (rotaries, k)
    (new_latent, latent), (new_k, k) = (cached.as_stored(*pair, q_ref.dtype) for pair in pairs)
    lead = layer, batch

    @pl.when((split == 0) & (block == 0) & (position < latents.shape[2]))
    def _():
        cached.write(latents, new_latent, lead, position, at_latent.component, at_latent.real)
        cached.write(rotaries, new_k, lead, position, at_rotary.component, at_rotary.real)

    queries = tuple(x.astype(q_ref.dtype) for x in (absorbed, q))
    own = (lax.iota(_I32, LEAST) == 0) & (split == 0)  # the new token belongs to the first split
    nothing = splits.nothing(given.heads, at_latent.component.shape[0])
    carry = _attend(given.scale, queries, own, (latent, k), nothing)
    start, stop = splits.share(jnp.zeros_like(position), position, split, given.splits, given.columns)
    step = functools.partial(_step, given, queries, ((latents, at_latent), (rotaries, at_rotary)), start, stop)
    turns = lax.div(jnp.maximum(stop - start, 0) + (given.columns - 1), _I32(given.columns))
    top, total, mixed = lax.fori_loop(0, turns, step, carry)
    if given.splits == 1:
        mixed = mixed / total[:, None]
    sums = mixed, top, total
    splits.write(outs[:-stored], batch, member, member < heads, split, at_latent.component, at_latent.real, sums)


def _step(given, queries, stacks, start, stop, i, carry):
    """`given.columns` more columns of the cache."""
    column = start + i * given.columns + lax.iota(_I32, given.columns)
    there = column < stop
    blocks = [
        cached.columns(stack, (place.layer, place.batch), column, there, place.component, place.real, q.dtype)
        for q, (stack, place) in zip(queries, stacks, strict=True)
    ]
    return _attend(given.scale, queries, there, blocks, carry)


def _attend(scale, queries, there, blocks, carry):
    """A block of columns more: latents, which are keys and values, and what is rotated."""
    scores = 0.0
    for q, (block, scales) in zip(queries, blocks, strict=True):
        part = pltriton.dot(q, block.T)
        scores += part if scales is None else part * scales[None, :]
    return splits.add(carry, jnp.where(there[None, :], scores * scale, splits.MASKED), *blocks[0])
