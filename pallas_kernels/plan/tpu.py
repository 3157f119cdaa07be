"""The plan on a TPU without a sort: a kernel ranks choices within their experts, a block of tokens a step."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from .. import compat
from .value import Plan, tile_bound

NAME = "moe_jax_routing_rank_tpu"
#: Tokens of a step; those before each are counted by a product with a triangle of so many rows.
_ROWS = 256


def refuse(ids, num_experts, tile_rows) -> str | None:
    """Why this call is not supported, None if it is."""
    if tile_rows >= ids.shape[0]:
        return "a plan in place, which needs no ranks"
    if ids.shape[1] == 0:
        return "no choices"
    if num_experts > 4096:
        return f"{num_experts} experts, at most 4096"
    return None


def make_plan(ids, num_experts, tile_rows, *, interpret: Any = False) -> Plan:
    """See `plan.make_plan`."""
    rank, counts = ranks(ids, num_experts, interpret)
    tiles = tile_bound(ids.size, num_experts, tile_rows)
    tiles_of = -(-counts // tile_rows)
    last = jnp.cumsum(tiles_of, dtype=jnp.int32)
    every, nowhere = jnp.arange(num_experts), tiles * tile_rows
    # tables of experts are looked up by comparing: a gather takes its elements one by one
    first_row = jnp.where(ids[..., None] == every, (last - tiles_of) * tile_rows, 0).sum(-1, dtype=jnp.int32)
    slot = jnp.where((ids >= 0) & (ids < num_experts), first_row + rank, nowhere)
    tile_expert = (last <= jnp.arange(tiles)[:, None]).sum(1, dtype=jnp.int32)
    choices = jnp.arange(ids.size, dtype=jnp.int32)
    return Plan(
        row_choice=jnp.full(nowhere, ids.size, jnp.int32).at[slot.reshape(-1)].set(choices, mode="drop"),
        slot=slot,
        tile_expert=jnp.minimum(tile_expert, num_experts - 1),
        num_tiles=last[-1],
        tile_rows=tile_rows,
        in_place=False,
    )


def interpreted(*args):
    """The same kernel in JAX's simulation of a TPU, for tests."""
    return make_plan(*args, interpret=compat.interpret_tpu())


def ranks(ids: jax.Array, num_experts: int, interpret: Any = False) -> tuple[jax.Array, jax.Array]:
    """Each choice's rank `[G, A]` among those of its expert, read row by row, and the experts' counts `[E]`."""
    tokens, choices = ids.shape
    rows = min(_ROWS, tokens)
    block, whole = (
        pl.BlockSpec((rows, choices), lambda step: (step, 0)),
        pl.BlockSpec((1, num_experts), lambda step: (0, 0)),
    )
    rank, counts = pl.pallas_call(
        functools.partial(moe_jax_routing_rank_tpu, tokens=tokens),
        name=NAME,
        grid=(pl.cdiv(tokens, rows),),
        in_specs=[block],
        out_specs=[block, whole],
        out_shape=[
            jax.ShapeDtypeStruct(ids.shape, jnp.int32),
            jax.ShapeDtypeStruct((1, num_experts), jnp.int32),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        cost_estimate=pl.CostEstimate(
            flops=2 * tokens * num_experts * (rows + 2 * choices), bytes_accessed=8 * ids.size, transcendentals=0
        ),
        interpret=interpret,
    )(ids)
    return rank, counts[0]


def moe_jax_routing_rank_tpu(ids_ref, rank_ref, counts_ref, *, tokens):
    """One step: choices before each in its block, on top of those of the blocks before."""
    step, (rows, choices), experts = pl.program_id(0), ids_ref.shape, counts_ref.shape[1]

    @pl.when(step == 0)
    def _():
        counts_ref[...] = jnp.zeros_like(counts_ref)

    there = step * rows + lax.broadcasted_iota(jnp.int32, (rows, choices), 0) < tokens
    ids, choice = jnp.where(there, ids_ref[...], -1), lax.broadcasted_iota(jnp.int32, (rows, choices), 1)
    expert = lax.broadcasted_iota(jnp.int32, (rows, experts), 1)
    column = lambda a: jnp.sum(jnp.where(choice == a, ids, 0), axis=1, keepdims=True)
    hits = [column(a) == expert for a in range(choices)]
    own = sum(jnp.where(hit, 1, 0) for hit in hits)
    square = (rows, rows)
    below = lax.broadcasted_iota(jnp.int32, square, 1) < lax.broadcasted_iota(jnp.int32, square, 0)
    earlier = lax.dot(
        jnp.where(below, 1.0, 0.0),
        own.astype(jnp.float32),
        precision=lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    before = counts_ref[...] + earlier.astype(jnp.int32)
    rank = jnp.zeros((rows, choices), jnp.int32)
    for a, hit in enumerate(hits):
        rank = jnp.where(choice == a, jnp.sum(jnp.where(hit, before, 0), axis=1, keepdims=True), rank)
        before = before + jnp.where(hit, 1, 0)
    rank_ref[...] = rank
    counts_ref[...] += jnp.sum(own, axis=0, keepdims=True)
